"""What each example leaves behind, and one example's gradient from it.

The pass over a batch leaves, for each example, the example itself, the records and the δ's of every site, and the
gradients of those leaves that are so small that they are taken at once. All
functions here but the pass see ONE example; `Factored` maps them over the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jgd._engine.fused import EXAMPLES, NOTHING, Bumps, Sums, Together, sums_of, watching
from jgd._engine.parts import Part
from jgd._engine.plan import Plan
from jgd._engine.regions import Nested, Region, Site, recorded, sites_of
from jgd._engine.replay import replay
from jgd._engine.tapped import run
from jgd._engine.trees import batch_axes, bumps_of, picked, records_of, taps_of, zeros
from jgd._engine.uses import SiteData
from jgd._mesh import varying

Leaves = Sequence[int] | range


class Model(NamedTuple):
    """What all examples share: the parameters' leaves and the constants."""

    params: list[Any]
    constants: list[Any]


class Example(NamedTuple):
    """What belongs to one example, or, with a batch axis where `axes_of` says, to all of them."""

    inputs: list[Any]
    records: Any
    deltas: Any
    blocks: dict[int, Any]  # the gradient of each dense leaf
    # The squared norm of each leaf that has probes and whose blocks are not kept, in the parts that have them.
    squares: dict[int, Any]


def axes_of(plan: Plan) -> Example:
    """Where the batch axis lies in each array of a batch of examples: behind the steps of the scans around."""
    records, deltas = (batch_axes(plan.region, of) for of in (records_of, taps_of))
    return Example(0, records, deltas, 0, 0)  # pyright: ignore[reportArgumentType]


def pass_over(
    plan: Plan, model: Model, batch: list[Any], *, fuse: bool = False, together: bool = False
) -> tuple[jax.Array, list[Any], Example, Sums]:
    """One forward and one backward pass: values, auxiliary leaves, what the examples leave, and sums over them.

    Told to `fuse`, it takes the squared norms that have probes, and what these see of all examples `together`: no
    work, where nobody asks for it in its program.
    """
    dense = sorted(plan.dense)
    probes = plan.probes if fuse else {}
    if not together:  # then blocks that are kept give the squares
        probes = {at: tuple(p for p in some if p.of.leaf not in plan.kept) for at, some in probes.items()}
    each_probe = [probe for some in probes.values() for probe in some]
    probed = sorted({probe.of.leaf for probe in each_probe})
    summed = {p.operand: p.of.leaf for p in each_probe if together and p.of.leaf in plan.summed}
    zero = lambda leaf: jnp.zeros((), jnp.promote_types(model.params[leaf].dtype, jnp.float32))
    size = batch[0].shape[0]

    def asked() -> Together | None:
        if not summed:
            return None
        bumps = bumps_of(plan.region, lambda site, i: (id(site), i) in summed)
        squares = {leaf: zero(leaf) for leaf in summed.values()}
        dtype = jnp.result_type(*squares.values())
        return Together(
            jax.tree.map(lambda x: Bumps(x, x, x), bumps), squares, jnp.zeros((size, size), dtype)
        )

    def one(inputs: list[Any]) -> Any:
        def forward(taps: Any, values: list[Any], numbers: dict[int, Any], together: Together | None) -> Any:
            known = _inputs(plan, _with(model, dense, values), inputs)
            bumps = no_bumps if together is None else together.bumps
            watch = watching(probes, numbers, together)
            (value, *aux), records = run(plan.region, known, taps, bumps, watch)
            return value, (aux, records)

        no_bumps = bumps_of(plan.region, lambda site, i: False)
        taps = varying(zeros(plan.region, taps_of), inputs)
        values = varying([model.params[leaf] for leaf in dense], inputs)
        numbers = varying({leaf: zero(leaf) for leaf in probed}, inputs)
        value, pull, (aux, records) = jax.vjp(
            forward, taps, values, numbers, varying(asked(), inputs), has_aux=True
        )
        deltas, blocks, squares, made = pull(jnp.ones_like(value))
        return value, aux, records, deltas, dict(zip(dense, blocks, strict=True)), squares, made

    axes = axes_of(plan)
    each = jax.vmap(one, out_axes=(0, 0, axes.records, axes.deltas, 0, 0, None), axis_name=EXAMPLES)
    values, aux, records, deltas, blocks, squares, made = each(batch)
    sums = NOTHING if made is None else sums_of(plan.region, made, plan.parts)
    norms = {leaf: squares.pop(leaf) for leaf in sorted(plan.kept & squares.keys())}
    return values, aux, Example(batch, records, deltas, blocks, squares), sums._replace(norms=norms)


def _with(model: Model, leaves: Leaves, values: Sequence[Any]) -> Model:
    """The model with other values of some leaves."""
    params = list(model.params)
    for leaf, value in zip(leaves, values, strict=True):
        params[leaf] = value
    return model._replace(params=params)


def _inputs(plan: Plan, model: Model, inputs: Sequence[Any]) -> list[Any]:
    shared, captured = model.constants[: plan.program.num_shared], model.constants[plan.program.num_shared :]
    return [*captured, *model.params, *shared, *inputs]


def deltas_of(plan: Plan, example: Example, leaves: Leaves) -> list[Any]:
    """The δ's that belong to the outputs of `site_outputs`."""
    return picked(plan.region, example.deltas, frozenset(leaves))


def site_outputs(
    plan: Plan, model: Model, example: Example, leaves: Leaves, values: Sequence[Any], bumps: Any = None
) -> list[Any]:
    """The outputs of the sites that the leaves have a part in, as a function of those leaves' `values`."""
    known = _inputs(plan, _with(model, leaves, values), example.inputs)
    return replay(plan.region, known, example.records, frozenset(leaves), bumps)


def gradient(plan: Plan, model: Model, example: Example, leaves: Leaves) -> list[jax.Array]:
    """The gradient with respect to some leaves, by the sites' own `vjp` where the pass has not made it."""
    pulled = plan.pulled_with([leaf for leaf in leaves if leaf not in example.blocks])
    if not pulled:
        return [example.blocks[leaf] for leaf in leaves]
    outputs = lambda values: site_outputs(plan, model, example, pulled, values)
    _, pull = jax.vjp(outputs, [model.params[leaf] for leaf in pulled])
    made = example.blocks | dict(zip(pulled, pull(deltas_of(plan, example, pulled))[0], strict=True))
    return [made[leaf] for leaf in leaves]


def batch_data(plan: Plan, model: Model, examples: Example) -> dict[int, SiteData]:
    """What all examples left at the sites, by identity; in each array the batch axis is behind the loops'."""
    # A dense leaf is data, which has the batch axis like all other data.
    size, dense = examples.inputs[0].shape[0], sorted(plan.dense)
    rows = [jnp.broadcast_to(model.params[leaf], (size, *model.params[leaf].shape)) for leaf in dense]
    sites = set(map(id, sites_of(plan.region)))
    return _site_data(plan, _with(model, dense, rows), examples, sites, None, batch=True)


def part_data(plan: Plan, model: Model, example: Example, part: Part) -> dict[int, SiteData]:
    """What the example left at the sites of a part, by the site's identity."""
    bumps = None
    asked = {(id(use.site), use.position) for use in part.uses if use.needs_operand_grad}
    if asked:
        zero = bumps_of(plan.region, lambda site, position: (id(site), position) in asked)
        zero = varying(zero, example)
        values = [model.params[part.leaf]]
        outputs = lambda bumps: site_outputs(plan, model, example, [part.leaf], values, bumps)
        bumps = jax.vjp(outputs, zero)[1](deltas_of(plan, example, [part.leaf]))[0]
    return _site_data(plan, model, example, {id(use.site) for use in part.uses}, bumps, batch=False)


def _site_data(
    plan: Plan, model: Model, example: Example, sites: set[int], bumps: Any, *, batch: bool
) -> dict[int, SiteData]:
    collector = _Collector(sites, batch, {})
    given = dict(zip(map(id, plan.region.inputs), _inputs(plan, model, example.inputs), strict=True))
    collector.collect(plan.region, given, (example.records, example.deltas, bumps), 0)
    return collector.found


@dataclass(frozen=True)
class _Collector:
    """Finds the arrays of some sites in the trees of one example, or of a batch."""

    sites: set[int]
    batch: bool
    found: dict[int, SiteData]

    def collect(self, region: Region, given: dict[int, Any], trees: tuple[Any, Any, Any], depth: int) -> None:
        """Looks through a region; the steps of `depth` scans lead in each array."""
        records, deltas, bumps = trees
        values = given | {id(v): x for v, x in zip(region.records, records[0], strict=True)}
        own_bumps = None if bumps is None else iter(bumps[0])
        inner = iter(
            zip(records[1], deltas[1], [None] * len(records[1]) if bumps is None else bumps[1], strict=True)
        )
        for op in region.ops:
            if isinstance(op, Nested):
                in_records, in_deltas, in_bumps = next(inner)
                in_bumps = [None] * len(op.regions) if in_bumps is None else in_bumps
                for k, each in enumerate(zip(op.regions, in_records, in_deltas, in_bumps, strict=True)):
                    below = depth if op.loop is None else depth + 1
                    self.collect(each[0], self._given(op, k, values, depth), each[1:], below)
            elif isinstance(op, Site):
                bumped = {i: None if own_bumps is None else next(own_bumps) for i in op.params}
                if id(op) in self.sites:
                    kept = {id(v) for v in recorded(op)}
                    data = {i: values[id(v)] for i, v in enumerate(op.inputs) if id(v) in kept}
                    mine = [deltas[0][region.delta_at(op.outputs[i])] for i in op.tapped]
                    self.found[id(op)] = SiteData(
                        data, mine, {i: g for i, g in bumped.items() if g is not None}
                    )

    def _given(self, op: Nested, number: int, values: dict[int, Any], depth: int) -> dict[int, Any]:
        """The inputs that an inner region asks for, with the steps of its scan leading."""
        region = op.regions[number]
        first = len(op.inputs) - len(region.inputs)
        given = {}
        for i in region.asks:
            outer, own = op.inputs[first + i], region.inputs[i]
            array = values[id(outer)]
            if op.loop is not None and outer.aval.shape == own.aval.shape:  # the same at each step
                shape = (*array.shape[:depth], op.loop[1], *array.shape[depth:])
                array = jnp.broadcast_to(jnp.expand_dims(array, depth), shape)
            elif op.loop is not None and self.batch:
                array = jnp.swapaxes(array, depth, depth + 1)
            if first and jnp.issubdtype(array.dtype, jnp.inexact) and id(op.inputs[0]) in values:
                taken = (
                    values[id(op.inputs[0])] == number
                )  # a branch not taken was spared what it cannot bear
                array = jnp.where(taken.reshape(taken.shape + (1,) * (array.ndim - taken.ndim)), array, 0)
            given[id(own)] = array
        return given
