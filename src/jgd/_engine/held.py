"""What the pass left of B examples, and the ways to go through it: one example, all of them, or a tile."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from jgd._engine import factors, partitioned
from jgd._engine.examples import Example, Leaves, Model, axes_of, batch_data, gradient, part_data
from jgd._engine.fused import NOTHING, Sums
from jgd._engine.gathered import Gathered
from jgd._engine.parts import Part
from jgd._engine.plan import Plan
from jgd._engine.tiles import Batch
from jgd._engine.uses import SiteData
from jgd._engine.weighting import silenced
from jgd._mesh import Placement, spec_of


@dataclass(frozen=True)
class Held:
    """B gradients, as what each example left at each site.

    Beside it may be the `sums` that the pass has made, and `made`, the blocks that are at hand, by the part's number.
    """

    model: Model
    examples: Example  # with the batch axis where `axes_of` says
    plan: Plan = field(metadata={"static": True})
    pieces: int = field(default=1, metadata={"static": True})  # the devices that may share the batch axis
    sums: Sums = NOTHING
    made: dict[int, jax.Array] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The number of examples, B."""
        return self.examples.inputs[0].shape[0]

    @property
    def like(self) -> list[jax.ShapeDtypeStruct]:
        """Shape and dtype of one gradient's leaves."""
        return list(self.plan.program.param_avals)

    @property
    def placement(self) -> Placement:
        """Over which axes of a mesh the gradients lie, where that is part of their type."""
        return Placement(spec_of(self.examples.inputs[0])[0], [spec_of(p) for p in self.model.params])

    @property
    def leaves(self) -> range:
        """The numbers of the leaves."""
        return range(len(self.like))

    @property
    def summed(self) -> frozenset[int]:
        """The leaves whose sum the pass has made."""
        return frozenset(self.sums.squares)

    def gradient(self, example: Example, leaves: Leaves) -> list[jax.Array]:
        """One example's gradient with respect to some leaves."""
        pulled = [leaf for leaf in leaves if leaf not in self.grouped(groups=1)]
        self.refuse(self.unruled().intersection(pulled))
        made = dict(zip(pulled, gradient(self.plan, self.model, example, pulled), strict=True))
        return [made[leaf] if leaf in made else self._leaf_gradient(example, leaf) for leaf in leaves]

    def _leaf_gradient(self, example: Example, leaf: int) -> jax.Array:
        """The gradient with respect to one leaf, by the rules of its parts."""
        self.refuse(self.unruled().intersection([leaf]))
        flat = lambda part: part.in_memory(part.unordered(part_data(self.plan, self.model, example, part)))
        return self.assembled(leaf, flat).astype(self.like[leaf].dtype)

    @functools.cached_property
    def data(self) -> dict[int, SiteData]:
        """What the examples left at the sites, by identity; in each array the batch axis is behind the loops'."""
        return batch_data(self.plan, self.model, self.examples)

    def gathered(self, part: Part) -> Gathered:
        """What the examples left for one part."""
        self.refuse(self.unruled().intersection([part.leaf]))
        sites = [use.site for use in part.uses]
        if any(use.needs_operand_grad for use in part.uses):
            batch = self.batch()
            data = lambda example: part_data(self.plan, self.model, example, part)
        else:
            left = [self.data[id(site)] for site in sites]
            batch = Batch(left, [len(site.loops) for site in sites], self.size, self.pieces)
            data = lambda left: dict(zip(map(id, sites), left, strict=True))
        blocks = self.made.get(self.plan.parts.index(part))
        return Gathered(part, batch, data, part.leaf in self.plan.kept, blocks)

    def leaf_blocks(self, leaf: int) -> jax.Array:
        """The examples' gradients with respect to one leaf."""
        if leaf in self.examples.blocks:
            return self.examples.blocks[leaf]
        return self.each(lambda one: self.gradient(one, [leaf])[0])

    def assembled(self, leaf: int, flat: Callable[..., jax.Array], *args: Any) -> jax.Array:
        """One leaf, from what `flat` says of each of its parts."""
        total = None
        for part in self.plan.parts:
            if part.leaf == leaf:
                total = factors.place(flat(part, *args), part.offset, part.axes, self.like[leaf], total)
        assert total is not None
        return total

    def each(
        self, fun: Callable[[Example], Any], examples: Example | None = None, size: int | None = None
    ) -> Any:
        """`fun` of each example, all at once; of all of them, or of as many others as `size` says."""
        each = jax.vmap(fun, in_axes=(axes_of(self.plan),), axis_size=size or self.size)
        return each(self.examples if examples is None else examples)

    def tiled(self, workspace: int, fun: Callable[[Example], jax.Array]) -> jax.Array:
        """`fun` of each example, as many at once as there is room for at this many elements for each."""
        return self.batch().mapped(lambda some, size: self.each(fun, some, size), workspace)

    def batch(self) -> Batch:
        """The examples, to go through a tile at a time."""
        return Batch(self.examples, axes_of(self.plan), self.size, self.pieces)

    def silenced(
        self, weights: jax.Array, blocks: Sequence[jax.Array] = (), *, stand_in: bool, in_place: bool
    ) -> tuple[Example, list[jax.Array]]:
        """The examples and `blocks` without anything of those of weight 0, see `weighting.silenced`."""
        axes = axes_of(self.plan)
        return silenced(self.examples, axes, weights, blocks, stand_in=stand_in, in_place=in_place)

    def grouped(self, *, groups: int) -> frozenset[int]:
        """The kernels whose gradient only the rule gives, over several devices."""
        return partitioned.grouped_kernels(self.plan, groups=groups) if self.pieces > 1 else frozenset()

    def unruled(self, *, batch_groups: int = 1) -> frozenset[int]:
        """The leaves whose gradient XLA computes wrongly, over several devices."""
        if self.pieces == 1:
            return frozenset()
        return partitioned.unruled_kernels(self.plan, batch_groups=batch_groups)

    def refuse(self, leaves: frozenset[int]) -> None:
        """Raises NotImplementedError where there are such leaves."""
        partitioned.refuse(self.plan, leaves)
