"""B gradients in one of three forms behind one protocol. A reduction asks each leaf, and adds up or collects."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jgd._engine import xla_workarounds
from jgd._engine.batch_sums import adds_rows, unrolls_rows
from jgd._engine.carried import carried_leaves, operands_of
from jgd._engine.computed_leaves import ComputedLeaves
from jgd._engine.dense_leaf import DenseLeaf
from jgd._engine.dtypes import accumulation_dtype
from jgd._engine.factored_leaf import FactoredLeaf
from jgd._engine.leaf_gradients import LeafGradients
from jgd._engine.masking import mask_absent, replace_absent
from jgd._engine.moments import deviation_of
from jgd._engine.norms import Groups, Norm, all_together, total
from jgd._engine.origin import Origin
from jgd._engine.part_gradients import PartGradients
from jgd._engine.parts import Part
from jgd._engine.paths import leaves_of, path_to, rounds
from jgd._engine.plan import Plan, has_second_pass
from jgd._engine.residuals import Model, Residuals, axes_of, pass_over, site_data
from jgd._engine.scan_reductions import NOTHING, ScanReductions
from jgd._engine.stored import stored
from jgd._engine.tiles import Batch, num_shards_of
from jgd._mesh import Placement, spec_of, varying

# What is asked of some examples' gradients and their weights.
OfGradients = Callable[["HeldGradients", jax.Array | None], Any]


@runtime_checkable
class Gradients(Protocol):
    """B gradients, however they are held: as blocks, as factors, or as what makes them a microbatch at a time."""

    @property
    def size(self) -> int:
        """The number of examples, B."""
        ...

    @property
    def leaf_structs(self) -> list[jax.ShapeDtypeStruct]:
        """Shape and dtype of one gradient's leaves."""
        ...

    @property
    def placement(self) -> Placement:
        """Over which axes of a mesh the gradients lie, where that is part of their type."""
        ...

    def map_microbatches(
        self, fun: Callable[["HeldGradients", jax.Array | None], Any], weights: jax.Array | None
    ) -> Any:
        """Applies `fun` to each microbatch's gradients and weights.

        `fun` returns a pair: the first is summed over microbatches, the second concatenated.
        """
        ...

    def materialize(self) -> list[jax.Array]:
        """g_i, every leaf with a leading axis B."""
        ...

    def gram(self, other: "Gradients") -> jax.Array:
        """⟨g_i, g'_j⟩, `(B, B')`."""
        ...

    def self_gram(self) -> jax.Array:
        """⟨g_i, g_j⟩, `(B, B)`."""
        ...

    def spreads(self, weights: jax.Array | None, scale: Any = 1) -> list[jax.Array]:
        """scale · Σ w_i (g_i − ḡ)², elementwise, with ḡ the weighted mean. Leaves in the accumulation dtype."""
        ...

    def deviation_and_squared_sum(self) -> tuple[jax.Array, jax.Array]:
        """Σ ‖g_i − ḡ‖², and ‖Σ g_i‖²."""
        ...

    def with_present(self, present: jax.Array) -> "Gradients":
        """The same gradients made anew, with those of a present example in the place of each that is not."""
        ...


class HeldGradients:
    """Gradients that are all held at the same time, leaf by leaf.

    A subclass defines `size`, `leaf_structs`, `num_shards` and `leaves`. No sum is rounded to the parameters' dtype.
    """

    num_shards: int

    @property
    def size(self) -> int:
        """The number of examples, B."""
        raise NotImplementedError

    @property
    def leaf_structs(self) -> list[jax.ShapeDtypeStruct]:
        """Shape and dtype of one gradient's leaves."""
        raise NotImplementedError

    def leaves(self) -> Sequence[LeafGradients]:
        """The gradients with respect to each leaf. A leaf that never meets data has none, and gradients of 0."""
        raise NotImplementedError

    def with_present(self, present: jax.Array) -> "HeldGradients":
        """The same gradients made anew, with those of a present example in the place of each that is not."""
        raise NotImplementedError

    def for_norms_and_sums(self) -> "HeldGradients":
        """The same gradients, to be asked for norms and sums: blocks that serve both are built once."""
        return self

    def map_microbatches(
        self, fun: Callable[["HeldGradients", jax.Array | None], Any], weights: jax.Array | None
    ) -> Any:
        """`fun` of the gradients and weights: the pair of what is summed over examples and what each example has."""
        return fun(self, weights)

    def materialize(self) -> list[jax.Array]:
        """g_i, every leaf with a leading axis B."""
        made = _joined(leaf.blocks() for leaf in self.leaves())
        zeros = lambda x: jnp.zeros((self.size, *x.shape), x.dtype)
        return [made[k].astype(x.dtype) if k in made else zeros(x) for k, x in enumerate(self.leaf_structs)]

    def norms(self, groups: Groups) -> list[Norm]:
        """‖g_i‖ of each group of leaves, `(B,)`."""
        of_leaf = _joined(leaf.norms() for leaf in self.leaves())
        of = lambda group: [norm for leaf in group for norm in of_leaf.get(leaf, [])]
        return [total(of(group), self.size) for group in groups]

    def weighted_sum(self, weights: jax.Array | None) -> list[jax.Array]:
        """Σ w_i g_i. Leaves in the accumulation dtype."""
        made = _joined(leaf.weighted_sum(weights) for leaf in self.leaves())
        return [made[k] if k in made else _zeros(x) for k, x in enumerate(self.leaf_structs)]

    def squared_sum(self) -> jax.Array:
        """‖Σ g_i‖²."""
        return functools.reduce(
            jnp.add, [leaf.squared_sum() for leaf in self.leaves()], jnp.zeros((), jnp.float32)
        )

    def deviation_and_squared_sum(self) -> tuple[jax.Array, jax.Array]:
        """Σ ‖g_i − ḡ‖², and ‖Σ g_i‖²."""
        (norms,) = self.norms(all_together(self.leaf_structs))
        of_sum = self.squared_sum()
        zero = jnp.zeros((), jnp.float32)
        itself = lambda: functools.reduce(jnp.add, [leaf.deviation() for leaf in self.leaves()], zero)
        return deviation_of(jnp.sum(jnp.square(norms.length)), of_sum, self.size, itself), of_sum

    def dot(self, direction: Sequence[jax.Array]) -> jax.Array:
        """⟨g_i, v⟩, `(B,)`, in at least float32, with the direction in its own dtype."""
        each = [leaf.dot(direction) for leaf in self.leaves()]
        return functools.reduce(jnp.add, each, jnp.zeros(self.size, jnp.float32))

    def gram(self, other: Any) -> jax.Array:
        """⟨g_i, g'_j⟩, with gradients that are held in any form."""
        ours, theirs = (
            DenseGradients(x.materialize()) if not isinstance(x, DenseGradients) else x for x in (self, other)
        )
        return _gram(ours.leaves(), theirs.leaves(), ours.size, theirs.size, 1)

    def self_gram(self) -> jax.Array:
        """⟨g_i, g_j⟩."""
        return _gram(self.leaves(), None, self.size, self.size, self.num_shards)

    def second_moments(self, weights: jax.Array | None, scale: Any = 1) -> list[jax.Array]:
        """scale · Σ w_i g_i², elementwise. Leaves in the accumulation dtype."""
        return self._moments(weights, scale, centred=False)

    def spreads(self, weights: jax.Array | None, scale: Any = 1) -> list[jax.Array]:
        """scale · Σ w_i (g_i − ḡ)², elementwise, with ḡ the weighted mean. Leaves in the accumulation dtype."""
        return self._moments(weights, scale, centred=True)

    def _moments(self, weights: jax.Array | None, scale: Any, *, centred: bool) -> list[jax.Array]:
        made = _joined(leaf.moments(weights, scale, centred=centred) for leaf in self.leaves())
        return [made[k] if k in made else _zeros(x) for k, x in enumerate(self.leaf_structs)]

    def project(self, key: jax.Array, dim: int) -> jax.Array:
        """⟨g_i, r_k⟩/√dim for `dim` random directions r_k."""
        each = [leaf.project(key, dim) for leaf in self.leaves()]
        return functools.reduce(jnp.add, each, jnp.zeros((self.size, dim), jnp.float32)) / math.sqrt(dim)


def _joined(each: Any) -> dict[int, Any]:
    made: dict[int, Any] = {}
    for one in each:
        made |= one
    return made


def _zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(x.shape, accumulation_dtype(x))


def _gram(
    ours: Sequence[LeafGradients],
    theirs: Sequence[LeafGradients] | None,
    size: int,
    other_size: int,
    num_shards: int,
) -> jax.Array:
    others: Sequence[Any] = [None] * len(ours) if theirs is None else theirs
    each = [a.gram(b, num_shards=num_shards) for a, b in zip(ours, others, strict=True)]
    return functools.reduce(jnp.add, each, jnp.zeros((size, other_size), jnp.float32))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenseGradients(HeldGradients):
    """B gradients as one `(B, *leaf.shape)` block for each leaf, as `vmap(grad)` returns them.

    Attributes:
        arrays: the blocks.
        origin: what made them; None for those that a user gives.
    """

    arrays: list[jax.Array]
    origin: Origin | None = None

    @property
    def size(self) -> int:
        return self.arrays[0].shape[0]

    @property
    def leaf_structs(self) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in self.arrays]

    @property
    def num_shards(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return num_shards_of(self.arrays, self.size)

    @property
    def placement(self) -> Placement:
        """Over which axes of a mesh the gradients lie, where that is part of their type."""
        specs = [spec_of(x) for x in self.arrays]
        return Placement(specs[0][0], [PartitionSpec(*spec[1:]) for spec in specs])

    def leaves(self) -> list[DenseLeaf]:
        return [DenseLeaf(k, x, self.num_shards) for k, x in enumerate(self.arrays)]

    def materialize(self) -> list[jax.Array]:
        return self.arrays

    def with_present(self, present: jax.Array) -> "DenseGradients":
        if self.origin is None:
            return DenseGradients(replace_absent(self.arrays, present))
        origin = self.origin.with_present(present)
        return DenseGradients(origin.values_and_blocks()[2], origin)

    def self_gram(self) -> jax.Array:
        return self.gram(self)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FactoredGradients(HeldGradients):
    """B gradients as the residuals of a pass.

    Attributes:
        model: the parameters and constants.
        residuals: with the batch axis where `axes_of` says.
        plan: the plan that they were made by.
        num_shards: how many devices may share the batch axis.
        reductions: what the pass has reduced.
        kept: blocks that are at hand, by the number of the part.
        unmasked: the residuals as they were before examples of weight 0 were masked, for parts that mask their own.
    """

    model: Model
    residuals: Residuals
    plan: Plan = field(metadata={"static": True})
    num_shards: int = field(default=1, metadata={"static": True})
    reductions: ScanReductions = NOTHING
    kept: Mapping[int, jax.Array] = field(default_factory=dict)
    unmasked: Residuals | None = None

    @property
    def size(self) -> int:
        return self.residuals.inputs[0].shape[0]

    @property
    def leaf_structs(self) -> list[jax.ShapeDtypeStruct]:
        return list(self.plan.program.param_avals)

    @property
    def placement(self) -> Placement:
        """Over which axes of a mesh the gradients lie, where that is part of their type."""
        return Placement(spec_of(self.residuals.inputs[0])[0], [spec_of(p) for p in self.model.params])

    def leaves(self) -> list[LeafGradients]:
        if self.num_shards > 1 and xla_workarounds.wrong_when_sharded(self.plan):
            xla_workarounds.refuse(self.plan)
        parts = [(k, part, gradients) for k, (part, gradients) in enumerate(self._parts())]
        made: list[LeafGradients] = []
        for leaf in self.plan.factored:
            own = [each for each in parts if each[1].leaf == leaf]
            at_hand = any(k in self.kept for k, _, _ in own)
            squares = (self.residuals.squares | self.reductions.norms).get(leaf)
            made.append(
                FactoredLeaf(
                    leaf,
                    self.leaf_structs[leaf],
                    [(part, gradients) for _, part, gradients in own],
                    [k for k, _, _ in own],
                    self.plan.device,
                    None if at_hand else squares,
                    [self.plan.is_probed(part) for _, part, _ in own],
                    self.reductions,
                    self.plan.program.platform == "cpu",  # elsewhere a product may be too coarse for a sum
                )
            )
        made += [
            DenseLeaf(leaf, self.residuals.blocks[leaf], self.num_shards, is_of_pass=True)
            for leaf in sorted(self.plan.dense)
        ]
        if self.plan.computed:
            own = [(part, gradients) for _, part, gradients in parts]
            computed = functools.partial(self._computed, own)
            carried = carried_leaves(self.plan, self.model, own, computed)
            made += carried.values()
            if rest := self.plan.computed - carried.keys():
                made.append(computed(sorted(rest)))
        return made

    def _parts(self) -> list[tuple[Part, PartGradients]]:
        data = site_data(self.plan, self.model, self.residuals)
        # Rows that were looked up are masked as they are scaled: the others' copies would be made for nothing.
        own = data if self.unmasked is None else site_data(self.plan, self.model, self.unmasked)
        found = []
        for k, part in enumerate(self.plan.parts):
            masks_rows = part.rules.is_lookup and part.rules.layout is not None and self.num_shards == 1
            arrays = tuple((own if masks_rows else data)[id(use.site)] for use in part.uses)
            axes = tuple(len(use.site.loops) for use in part.uses)
            batch = Batch(arrays, axes, self.size, self.num_shards, self.plan.device.tile)
            is_kept = part.leaf in self.plan.kept
            found.append((part, PartGradients(part.rules, batch, is_kept, self.kept.get(k))))
        return found

    def _computed(
        self, parts: Sequence[tuple[Part, PartGradients]], numbers: Sequence[int]
    ) -> ComputedLeaves:
        plan, model = self.plan, self.model
        operands = {k: plan.operand_struct(k) for k in operands_of(plan, numbers)}
        every = leaves_of(plan, operands)
        sources = [leaf for leaf in every if leaf in numbers]
        path = path_to(plan, operands, *model)

        def from_sources(values: Sequence[jax.Array]) -> dict[int, jax.Array]:
            own: dict[int, Any] = dict(zip(sources, values, strict=True))
            return path([own.get(leaf, model.params[leaf]) for leaf in every])

        return ComputedLeaves(
            {leaf: self.leaf_structs[leaf] for leaf in numbers},
            operands,
            [(part, each) for part, each in parts if part.leaf in numbers or part.leaf in operands],
            from_sources,
            {leaf: model.params[leaf] for leaf in sources},
            functools.partial(rounds, plan, numbers),
            plan.nonlinear.isdisjoint(sources),
        )

    def with_present(self, present: jax.Array) -> "FactoredGradients":
        inputs = replace_absent(self.residuals.inputs, present)
        _, _, residuals, _ = pass_over(self.plan, self.model, inputs, fuse=self.num_shards == 1)
        return FactoredGradients(self.model, stored(residuals), self.plan, self.num_shards)

    def for_norms_and_sums(self) -> "FactoredGradients":
        return self._with_blocks(self.plan.kept)

    def deviation_and_squared_sum(self) -> tuple[jax.Array, jax.Array]:
        form = self._with_blocks(self.plan.kept - self.reductions.squares.keys())
        return HeldGradients.deviation_and_squared_sum(form)

    def _with_blocks(self, leaves: frozenset[int]) -> "FactoredGradients":
        if not leaves:
            return self
        each = enumerate(self._parts())
        return replace(self, kept={k: x.native_blocks() for k, (part, x) in each if part.leaf in leaves})

    def weighted_sum(self, weights: jax.Array | None) -> list[jax.Array]:
        if self.plan.second_pass:
            return self._second_pass(weights)
        if self.num_shards > 1 and xla_workarounds.wrong_when_sharded(self.plan):
            if xla_workarounds.sum_is_wrong_when_sharded(self.plan):
                xla_workarounds.refuse(self.plan)
            if weights is None or has_second_pass(self.plan.program):
                return self._second_pass(weights)
        form = self if weights is None else self._without_absent(weights)
        return HeldGradients.weighted_sum(form, weights)

    def _without_absent(self, weights: jax.Array) -> "FactoredGradients":
        """The same with absent examples masked, for sums. The weights are looked at once for all leaves."""
        one_device = self.num_shards == 1
        blocks = {("kept", k): x for k, x in self.kept.items()}
        blocks |= {("dense", k): x for k, x in self.residuals.blocks.items()}
        # The others are masked by `sum_masked`: XLA fuses the mask into sums that are elementwise programs.
        some = {
            key: x.reshape(self.size, math.prod(x.shape[1:]))
            for key, x in blocks.items()
            if not (adds_rows(x) or (one_device and unrolls_rows(x)))
        }
        axes = axes_of(self.plan)
        residuals, masked = mask_absent(
            self.residuals, axes, weights, list(some.values()), in_place=one_device
        )
        each = zip(some, masked, strict=True)
        blocks |= {key: x.reshape(blocks[key].shape) for key, x in each}
        of = lambda kind: {k: x for (which, k), x in blocks.items() if which == kind}
        masked = residuals._replace(blocks=of("dense"))
        return replace(self, residuals=masked, kept=of("kept"), unmasked=self.residuals)

    def _second_pass(self, weights: jax.Array | None) -> list[jax.Array]:
        """Σ w_i g_i by a backward pass of its own, the weights being the losses' derivatives."""
        program, constants, inputs = self.plan.program, self.model.constants, self.residuals.inputs
        if weights is None:
            weights = jnp.ones(self.size)
        else:  # a present example replaces an absent one, with weight 0
            present = weights != 0
            who = jnp.where(present, jnp.arange(self.size), jnp.argmax(present))
            inputs = [x[who] for x in inputs]

        def losses(params: list[jax.Array]) -> jax.Array:
            narrow = [x.astype(like.dtype) for x, like in zip(params, self.leaf_structs, strict=True)]
            return jax.vmap(lambda example: program.run(narrow, constants, example)[0])(inputs)

        wide = [x.astype(accumulation_dtype(x)) for x in self.model.params]
        values, pull = jax.vjp(losses, wide)
        sums = pull(weights.astype(values.dtype))[0]
        anyone = jnp.any(weights != 0)
        return stored([jnp.where(anyone, x, 0) for x in sums])

    def dot(self, direction: Sequence[jax.Array]) -> jax.Array:
        return super().dot(varying(stored(list(direction)), self.residuals))

    def gram(self, other: Any) -> jax.Array:
        if not isinstance(other, FactoredGradients) or other.plan is not self.plan:
            return super().gram(other)
        num_shards = math.gcd(other.size, max(self.num_shards, other.num_shards))
        return _gram(self.leaves(), other.leaves(), self.size, other.size, num_shards)

    def self_gram(self) -> jax.Array:
        if self.reductions.gram is None:
            return super().self_gram()
        others = [x for x in self.leaves() if not (isinstance(x, FactoredLeaf) and x.is_reduced)]
        return self.reductions.gram + _gram(others, None, self.size, self.size, self.num_shards)
