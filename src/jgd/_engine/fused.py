"""Squared norms that the backward pass of a scan takes as it goes, before what its steps leave is stored.

Where a scan steps through a stacked parameter, as through layers, each step has its own elements of the leaf:
their squares add up over the steps, without products between them. So each step's square can be taken as soon as
its δ is there, and where no more is asked than the norms, nothing of a step outlives it.

A *probe* stands beside the tap of a site's output: a number, whose derivative is defined to be the square, and a
bump of the parameter operand, whose derivative is that of all examples' losses together: the step's part of the sum.
The sum's own square is a number again.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax

from jgd._engine.factors import sum_squares
from jgd._engine.jaxprs import bind
from jgd._engine.parts import Part
from jgd._engine.regions import Nested, Region, Site, Value
from jgd._engine.rules import use_of
from jgd._engine.trees import Tree, bumped
from jgd._engine.uses import SiteData, opaque
from jgd._engine.views import View

EXAMPLES = "jgd examples"  # the axis that they lie along in the pass


class Sums(NamedTuple):
    """What the pass has made of the sum over all examples.

    Attributes:
        parts: Σ g_i of a part, flat in the order of memory, by the part's number.
        squares: ‖Σ g_i‖² of each leaf whose parts are all there.
    """

    parts: dict[int, jax.Array]
    squares: dict[int, jax.Array]


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

    def square(self, data: jax.Array, delta: jax.Array) -> jax.Array:
        """‖G‖² of one example."""
        return self.part.square({id(self.site): SiteData({1 - self.own: data}, [delta], {})})

    def total(self, data: jax.Array, delta: jax.Array, like: jax.Array) -> jax.Array:
        """Σ G of all examples, from one of them, as the operand lies: an array `like` it."""

        def output(parameter: jax.Array, data: jax.Array) -> jax.Array:
            operands = (parameter, data) if self.own == 0 else (data, parameter)
            return bind(self.site.eqn, operands)[0]

        data, delta = (jax.lax.all_gather(x, EXAMPLES) for x in (data, delta))
        outputs = lambda parameter: jax.vmap(functools.partial(output, parameter))(data)
        return jax.linear_transpose(outputs, like)(delta)[0]


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
    probes: Probes, numbers: dict[int, jax.Array], together: dict[int, jax.Array]
) -> Callable[..., jax.Array]:
    """What sets the probes beside the values that are tapped, in a pass along the axis `EXAMPLES`.

    The leaves' `numbers` receive the squares, the bumps the sums, and the numbers of all examples `together` the
    sums' squares.
    """

    def watch(value: Value, x: jax.Array, look: Callable[[Value], Any], bumps: dict[Any, Any]) -> jax.Array:
        for probe in probes.get(id(value), ()):
            data = look(probe.site.inputs[1 - probe.own])
            leaf = probe.of.leaf
            x = _watched(x, probe, data, numbers[leaf], together.get(leaf), bumps[probe.operand])
        return x

    return watch


def _watched(
    x: jax.Array, probe: Probe, data: jax.Array, number: jax.Array, together: Any, bump: Any
) -> jax.Array:
    @jax.custom_vjp
    def watch(x: jax.Array, *beside: Any) -> jax.Array:
        del beside
        return x

    def forward(x: jax.Array, *beside: Any) -> Any:
        return x, beside

    def backward(kept: Any, delta: jax.Array) -> Any:
        data, number, together, bump = kept
        square = probe.square(data, delta).astype(number.dtype)
        if together is None:
            return delta, None, square, None, None
        total = probe.total(data, delta, bump)
        return delta, None, square, sum_squares(total).astype(together.dtype), total

    watch.defvjp(forward, backward)
    return watch(x, data, number, together, bump)


def sums_of_parts(region: Region, bumps: Tree, parts: Sequence[Part]) -> dict[int, jax.Array]:
    """Σ g_i of those parts whose operand has received it, flat in the order of memory, by the part's number."""
    found = {(id(site), position): made for site, position, made in bumped(region, bumps)}
    sums = {}
    for number, part in enumerate(parts):
        use = part.uses[0]  # a part with probes has no other
        made = found.get((id(use.site), use.position))
        if made is not None:
            view = use.site.inputs[use.position].view
            assert view is not None
            whole = opaque(use.site, use.position, view)
            sums[number] = whole.gradient(SiteData({}, [], {use.position: made}))
    return sums
