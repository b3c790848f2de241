"""What the backward pass of a scan makes of its steps as it goes, before what they leave is stored.

Where a scan steps through a stacked parameter, as through layers, each step has its own elements of the leaf:
squares and inner products add up over the steps, without products between them, and a sum over examples is
complete as soon as the step's δ is there. So what is asked without weights can be made then, and nothing of a step
outlives it.

A *probe* stands beside the tap of a site's output: a number, whose derivative is defined to be an example's square,
and what has all examples' derivatives together: bumps of the parameter operand, which receive the step's part of the
sum and of the moments, and numbers, which receive the sum's own square and the examples' inner products.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jgd._engine.factors import group, sum_squares
from jgd._engine.gathered import Gathered
from jgd._engine.jaxprs import bind
from jgd._engine.parts import Part
from jgd._engine.regions import Nested, Region, Site, Value
from jgd._engine.rules import use_of
from jgd._engine.stored import stored
from jgd._engine.tiles import Batch
from jgd._engine.trees import bumped
from jgd._engine.uses import SiteData, opaque
from jgd._engine.views import Axis, View

EXAMPLES = "jgd examples"  # the axis that they lie along in the pass


class Sums(NamedTuple):
    """What the pass has made of all examples together, of those leaves whose parts are all there.

    Attributes:
        parts: Σ g_i of a part, flat in the order of memory, by the part's number.
        seconds: Σ g_i² of a part, likewise.
        spreads: Σ (g_i − ḡ)² of a part, likewise.
        squares: ‖Σ g_i‖² of each leaf.
        gram: ⟨g_i, g_j⟩, `(B, B)`, in all these leaves together; None where there are none.
        norms: ‖g_i‖², `(B,)`, of each leaf whose blocks give it where a sum is made of them too.
    """

    parts: dict[int, jax.Array]
    seconds: dict[int, jax.Array]
    spreads: dict[int, jax.Array]
    squares: dict[int, jax.Array]
    gram: jax.Array | None
    norms: dict[int, jax.Array]


NOTHING = Sums({}, {}, {}, {}, None, {})


class Bumps(NamedTuple):
    """Of one parameter operand, what receives the step's Σ g_i, Σ g_i² and Σ (g_i − ḡ)²."""

    total: Any
    second: Any
    spread: Any


class Together(NamedTuple):
    """Of all examples: each operand's bumps, as a tree, and the numbers that receive squares and inner products."""

    bumps: Any
    squares: dict[int, Any]
    gram: Any


@dataclass(frozen=True, eq=False)
class Probe:
    """What is asked of one step's gradient in a part `of` a leaf; `part` and `site`, of two operands, are its own."""

    of: Part
    part: Part
    site: Site

    @property
    def operand(self) -> tuple[int, int]:
        """The parameter operand: the site's identity and the position."""
        return id(self.of.uses[0].site), self.own

    @property
    def own(self) -> int:
        """Which operand is the parameter; the other is data."""
        return self.part.uses[0].position

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Where the axes of one step's operand lie in the leaf's memory."""
        use = self.of.uses[0]
        view = use.site.inputs[use.position].view
        assert view is not None
        return view.axes

    @property
    def is_summed(self) -> bool:
        """Whether it sees the examples' sum too: of an operand that is wide enough, and not spread over axes."""
        return self.part.uses[0].is_wide and all(stride != 0 or size == 1 for size, stride in self.axes)

    def data(self, example: tuple[jax.Array, jax.Array]) -> dict[int, SiteData]:
        """What an example has at the site: the other operand, and the δ."""
        return {id(self.site): SiteData({1 - self.own: example[0]}, [example[1]], {})}

    def total(self, data: jax.Array, delta: jax.Array, like: jax.Array) -> jax.Array:
        """Σ G of all examples, as the operand lies: real, where the leaf was cast to complex numbers too."""

        def output(parameter: jax.Array, data: jax.Array) -> jax.Array:
            operands = (parameter, data) if self.own == 0 else (data, parameter)
            return bind(self.site.eqn, operands)[0]

        outputs = lambda parameter: jax.vmap(functools.partial(output, parameter))(data)
        return jnp.real(jax.linear_transpose(outputs, like)(delta)[0])

    def as_operand(self, flat: jax.Array) -> jax.Array:
        """What lies in the order of the leaf's memory, as the operand does."""
        order, _ = group(list(enumerate(self.axes)))
        sizes = [self.axes[i][0] for i in order]
        return flat.reshape(sizes).transpose(sorted(range(len(order)), key=order.__getitem__))


Probes = dict[int, tuple[Probe, ...]]  # by the identity of the value that is tapped


def probes_of(region: Region, parts: Sequence[Part], planned: Callable[[Part], Part]) -> Probes:
    """The probes of all `parts` that have one; `planned` chooses the method by which a step's square is taken."""
    by_site = {id(part.uses[0].site): part for part in parts if _is_stepped(part)}
    found: Probes = {}
    for inner in _unbranched(region):
        for op in inner.ops:
            part = by_site.get(id(op)) if isinstance(op, Site) else None
            if part is not None:
                tap = inner.taps[inner.delta_at(op.outputs[0])]
                found[id(tap)] = (*found.get(id(tap), ()), _probe(part, planned))
    return found


def _is_stepped(part: Part) -> bool:
    """Whether each step of the scans around has elements of its own, and a rule for them."""
    first, *others = part.uses
    view = first.site.inputs[first.position].view
    if others or view is None or first.rule not in ("dot_general", "convolution") or not first.site.loops:
        return False
    steps = [view.loop_axis(number) for number, _ in first.site.loops]
    return all(axis is not None and axis[1] != 0 for axis in steps)


def _probe(part: Part, planned: Callable[[Part], Part]) -> Probe:
    use = part.uses[0]
    view = use.site.inputs[use.position].view
    assert view is not None
    site = replace(use.site, loops=())
    step = use_of(site, use.position, View(view.leaf, view.array[(0,) * len(view.loops)]))
    return Probe(part, planned(replace(part, axes=step.axes, uses=(step,), shape=step.shape)), site)


def _unbranched(region: Region) -> list[Region]:
    """The region and those inside of its scans and checkpoints, but for those of a `cond`."""
    nested = [op for op in region.ops if isinstance(op, Nested) and len(op.regions) == 1]
    return [region, *(inner for op in nested for inner in _unbranched(op.regions[0]))]


def watching(
    probes: Probes, numbers: dict[int, jax.Array], together: Together | None
) -> Callable[..., jax.Array]:
    """What sets the probes beside the values that are tapped, in a pass along the axis `EXAMPLES`.

    The leaves' `numbers` receive an example's squares; what is there for all examples `together`, what is theirs.
    """

    def watch(value: Value, x: jax.Array, look: Callable[[Value], Any], bumps: dict[Any, Any]) -> jax.Array:
        for probe in probes.get(id(value), ()):
            data, leaf = look(probe.site.inputs[1 - probe.own]), probe.of.leaf
            asked = None
            if together is not None and leaf in together.squares:
                asked = Together(bumps[probe.operand], {leaf: together.squares[leaf]}, together.gram)
            x = _watched(x, probe, data, numbers[leaf], asked)
        return x

    return watch


def _watched(x: jax.Array, probe: Probe, data: jax.Array, number: jax.Array, together: Any) -> jax.Array:
    @jax.custom_vjp
    def watch(x: jax.Array, *beside: Any) -> jax.Array:
        del beside
        return x

    def forward(x: jax.Array, *beside: Any) -> Any:
        return x, beside

    def backward(kept: Any, delta: jax.Array) -> Any:
        data, number, together = kept
        data, delta = stored((data, delta))
        square = probe.part.square(probe.data((data, delta))).astype(number.dtype)
        made = None if together is None else _made_together(probe, data, delta, together)
        return delta, None, square, made

    watch.defvjp(forward, backward)
    return watch(x, data, number, together)


def _made_together(probe: Probe, data: jax.Array, delta: jax.Array, asked: Together) -> Together:
    """What all examples make, from one of them: in the dtypes of what is asked."""
    data, delta = jax.lax.all_gather(data, EXAMPLES), jax.lax.all_gather(delta, EXAMPLES)
    gathered = Gathered(probe.part, Batch((data, delta), (0, 0), data.shape[0], 1), probe.data)
    total = probe.total(data, delta, asked.bumps.total)
    second, spread = map(probe.as_operand, gathered.both_moments())
    squares = {leaf: sum_squares(total) for leaf in asked.squares}
    made = Together(Bumps(total, second, spread), squares, gathered.gram())
    return jax.tree.map(lambda x, like: x.astype(like.dtype), made, asked)


def sums_of(region: Region, together: Together, parts: Sequence[Part]) -> Sums:
    """What the pass has made of all examples together, by the numbers of those parts whose operand received it."""
    found = {(id(site), position): made for site, position, made in bumped(region, together.bumps)}
    totals, seconds, spreads = {}, {}, {}
    for number, part in enumerate(parts):
        use = part.uses[0]  # a part with probes has no other
        received = found.get((id(use.site), use.position), ())
        for made, x in zip((totals, seconds, spreads), received, strict=False):
            view = use.site.inputs[use.position].view
            assert view is not None
            whole = opaque(use.site, use.position, view)
            made[number] = whole.gradient(SiteData({}, [], {use.position: x}))
    return Sums(totals, seconds, spreads, together.squares, together.gram, {})
