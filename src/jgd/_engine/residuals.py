"""The pass over a batch: one forward and one backward pass, and the residuals that they leave.

For each example there remain the example itself, the operands and cotangents of every site, and the gradients of the
dense leaves. From these all questions are answered.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jgd._engine.dtypes import accumulation_dtype
from jgd._engine.forward import run
from jgd._engine.norms import Buckets
from jgd._engine.plan import Plan
from jgd._engine.rules.rule import SiteData
from jgd._engine.scan_reductions import (
    EXAMPLES,
    NOTHING,
    Bumps,
    ScanReductions,
    Together,
    insert_probes,
    scan_reductions_of,
)
from jgd._engine.sites import Nested, Region, Site, recorded
from jgd._engine.trees import batch_axes, bumps_of, residuals_of, taps_of, zeros
from jgd._mesh import varying


class Model(NamedTuple):
    """What all examples share: the parameters' leaves and the constants."""

    params: list[Any]
    constants: list[Any]


class Residuals(NamedTuple):
    """What a batch of examples left, with the batch axis where `axes_of` says.

    Attributes:
        inputs: the examples.
        operands: the DATA operands that the sites' rules need, a tree.
        cotangents: the loss's derivative by each tapped value, a tree.
        blocks: the gradients of each dense leaf.
        squares: for each leaf that has probes and whose blocks are not kept, the squared norms of its probed parts.
    """

    inputs: list[Any]
    operands: Any
    cotangents: Any
    blocks: dict[int, Any]
    squares: dict[int, Buckets]


def axes_of(plan: Plan) -> Residuals:
    """Where the batch axis lies in each array: behind the steps of the scans around."""
    operands, cotangents = (batch_axes(plan.region, of) for of in (residuals_of, taps_of))
    return Residuals(0, operands, cotangents, 0, 0)  # pyright: ignore[reportArgumentType]


def pass_over(
    plan: Plan, model: Model, batch: list[Any], *, fuse: bool = False, together: bool = False
) -> tuple[jax.Array, list[Any], Residuals, ScanReductions]:
    """One forward and one backward pass over a batch.

    Args:
        plan: the plan.
        model: the parameters and constants.
        batch: the examples' leaves.
        fuse: also compute the squared norms of probed leaves in the backward pass.
        together: also compute their reductions over all examples. Under `jit`, unused ones are eliminated as dead code.

    Returns:
        The losses, the auxiliary leaves, the residuals, and the reductions.
    """
    dense = sorted(plan.dense)
    probes = plan.probes if fuse else {}
    if not together:  # then blocks that are kept give the squares
        probes = {at: tuple(p for p in some if p.of.leaf not in plan.kept) for at, some in probes.items()}
    each_probe = [probe for some in probes.values() for probe in some]
    probed = sorted({probe.of.leaf for probe in each_probe})
    summed = {p.operand: p.of.leaf for p in each_probe if together and p.of.leaf in plan.summed}
    zero = lambda leaf: jnp.zeros((), accumulation_dtype(model.params[leaf]))
    size = batch[0].shape[0]

    def asked() -> Together | None:
        if not summed:
            return None
        bumps = bumps_of(plan.region, lambda site, i: (id(site), i) in summed)
        squares = {leaf: zero(leaf) for leaf in summed.values()}
        dtype = jnp.result_type(*squares.values())
        return Together(
            jax.tree.map(lambda x: Bumps(x, x, x), bumps), squares, squares, jnp.zeros((size, size), dtype)
        )

    def one(inputs: list[Any]) -> Any:
        def forward(
            taps: Any, values: list[Any], numbers: dict[int, Buckets], together: Together | None
        ) -> Any:
            params = list(model.params)
            for leaf, value in zip(dense, values, strict=True):
                params[leaf] = value
            known = _inputs(plan, model._replace(params=params), inputs)
            bumps = no_bumps if together is None else together.bumps
            watch = insert_probes(probes, numbers, together)
            (value, *aux), operands = run(plan.region, known, taps, bumps, watch)
            return value, (aux, operands)

        no_bumps = bumps_of(plan.region, lambda site, i: False)
        taps = varying(zeros(plan.region, taps_of), inputs)
        values = varying([model.params[leaf] for leaf in dense], inputs)
        number = lambda leaf: Buckets.zeros(zero(leaf).dtype)
        numbers = varying({leaf: number(leaf) for leaf in probed}, inputs)
        value, pull, (aux, operands) = jax.vjp(
            forward, taps, values, numbers, varying(asked(), inputs), has_aux=True
        )
        cotangents, blocks, squares, made = pull(jnp.ones_like(value))
        return value, aux, operands, cotangents, dict(zip(dense, blocks, strict=True)), squares, made

    axes = axes_of(plan)
    each = jax.vmap(one, out_axes=(0, 0, axes.operands, axes.cotangents, 0, 0, None), axis_name=EXAMPLES)
    values, aux, operands, cotangents, blocks, squares, made = each(batch)
    reductions = NOTHING if made is None else scan_reductions_of(plan.region, made, plan.parts)
    norms = {leaf: squares.pop(leaf) for leaf in sorted(plan.kept & squares.keys())}
    left = Residuals(batch, operands, cotangents, blocks, squares)
    return values, aux, left, reductions._replace(norms=norms)


def _inputs(plan: Plan, model: Model, inputs: Sequence[Any]) -> list[Any]:
    shared, captured = model.constants[: plan.program.num_shared], model.constants[plan.program.num_shared :]
    return [*captured, *model.params, *shared, *inputs]


def site_data(plan: Plan, model: Model, residuals: Residuals) -> dict[int, SiteData]:
    """The residuals of all examples at each site, by its identity, with the batch axis behind the loops'."""
    # A dense leaf is data, which has the batch axis like all other data.
    size, params = residuals.inputs[0].shape[0], list(model.params)
    for leaf in plan.dense:
        params[leaf] = jnp.broadcast_to(params[leaf], (size, *params[leaf].shape))
    given = dict(
        zip(
            map(id, plan.region.inputs),
            _inputs(plan, model._replace(params=params), residuals.inputs),
            strict=True,
        )
    )
    collector = _Collector({})
    collector.collect(plan.region, given, residuals.operands, residuals.cotangents, 0)
    return collector.found


@dataclass(frozen=True)
class _Collector:
    """Finds the arrays of all sites in the trees of a batch."""

    found: dict[int, SiteData]

    def collect(
        self, region: Region, given: dict[int, Any], operands: Any, cotangents: Any, depth: int
    ) -> None:
        """Looks through a region; the steps of `depth` scans lead in each array."""
        values = given | {id(v): x for v, x in zip(region.residuals, operands[0], strict=True)}
        inner = iter(zip(operands[1], cotangents[1], strict=True))
        for op in region.ops:
            if isinstance(op, Nested):
                for k, each in enumerate(zip(op.regions, *next(inner), strict=True)):
                    below = depth if op.loop is None else depth + 1
                    self.collect(each[0], self._given(op, k, values, depth), *each[1:], below)
            elif isinstance(op, Site):
                kept = {id(v) for v in recorded(op)}
                data = {i: values[id(v)] for i, v in enumerate(op.inputs) if id(v) in kept}
                own = [cotangents[0][region.tap_number(op.outputs[i])] for i in op.tapped]
                self.found[id(op)] = SiteData(data, own)

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
            elif op.loop is not None:
                array = jnp.swapaxes(array, depth, depth + 1)
            if first and jnp.issubdtype(array.dtype, jnp.inexact) and id(op.inputs[0]) in values:
                # The inputs of a branch that was not taken may be anything. They are replaced by 1.
                taken = values[id(op.inputs[0])] == number
                array = jnp.where(taken.reshape(taken.shape + (1,) * (array.ndim - taken.ndim)), array, 1)
            given[id(own)] = array
        return given
