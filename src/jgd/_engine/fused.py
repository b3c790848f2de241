"""Squared norms that the backward pass of a scan takes as it goes, before what its steps leave is stored.

Where a scan steps through a stacked parameter, as through layers, each step has its own elements of the leaf:
their squares add up over the steps, without products between them. So each step's square can be taken as soon as
its δ is there, and where no more is asked than the norms, nothing of a step outlives it.

A *probe* stands beside the tap of a site's output: a number, whose derivative is defined to be the square.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from jgd._engine.parts import Part
from jgd._engine.regions import Nested, Region, Site, Value, recorded
from jgd._engine.rules import use_of
from jgd._engine.uses import SiteData
from jgd._engine.views import View


@dataclass(frozen=True, eq=False)
class Probe:
    """The squared norm of one step's gradient in a part `of` a leaf; `part` and `site` are a step's own."""

    of: Part
    part: Part
    site: Site

    @property
    def operands(self) -> tuple[Value, ...]:
        """The values of a step that it needs, beside the δ."""
        return recorded(self.site)

    def square(self, operands: Sequence[jax.Array], delta: jax.Array) -> jax.Array:
        """‖G‖²."""
        values = {id(x): array for x, array in zip(self.operands, operands, strict=True)}
        data = {i: values[id(x)] for i, x in enumerate(self.site.inputs) if id(x) in values}
        return self.part.square({id(self.site): SiteData(data, [delta], {})})


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


def watching(probes: Probes, numbers: dict[int, jax.Array]) -> Callable[..., jax.Array]:
    """What sets the probes beside the values that are tapped, in a pass: the leaves' `numbers` receive the squares."""

    def watch(value: Value, x: jax.Array, look: Callable[[Value], Any]) -> jax.Array:
        for probe in probes.get(id(value), ()):
            x = _watched(x, probe, [look(operand) for operand in probe.operands], numbers[probe.of.leaf])
        return x

    return watch


def _watched(x: jax.Array, probe: Probe, operands: Sequence[jax.Array], number: jax.Array) -> jax.Array:
    @jax.custom_vjp
    def watch(x: jax.Array, operands: Sequence[jax.Array], number: jax.Array) -> jax.Array:
        del operands, number
        return x

    def forward(x: jax.Array, operands: Sequence[jax.Array], number: jax.Array) -> Any:
        return x, (operands, number)

    def backward(kept: Any, delta: jax.Array) -> Any:
        operands, number = kept
        return delta, None, probe.square(operands, delta).astype(number.dtype)

    watch.defvjp(forward, backward)
    return watch(x, operands, number)
