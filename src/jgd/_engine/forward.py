"""The forward pass of one example with a tap at each site.

It evaluates a region as it stands. Each site's output passes through a tap, whose derivative is the site's cotangent.
The DATA operands that the sites' rules need come out beside the result, as residuals. Residuals and taps are trees of
the same form.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jgd._engine.differentiated import bind_differentiated
from jgd._engine.jaxprs import prim, scan_of
from jgd._engine.sites import Nested, Region, Site, Value
from jgd._engine.trees import Tree, filled, residuals_of
from jgd._mesh import varying


@jax.custom_jvp
def _tap(x: jax.Array, tap: jax.Array) -> jax.Array:
    # Not `x + tap`: that would turn −0 into 0, and a scan would carry the zeros through memory.
    return x


@_tap.defjvp
def _tap_jvp(primals: Any, tangents: Any) -> Any:
    return primals[0], tangents[0] + tangents[1]


Watch = Callable[[Value, jax.Array, Callable[[Value], Any], dict[tuple[int, int], Any]], jax.Array]


def run(
    region: Region, inputs: Sequence[Any], taps: Tree, bumps: Tree, watch: Watch
) -> tuple[list[Any], Tree]:
    """One example's forward pass: the region's outputs and its residuals.

    Each tapped value goes through `watch` first, which may put probes on it. `watch` also gets a function that looks up
    other values of the region, and the `bumps` of each parameter operand by the site's identity and the position.
    `bumps` is a tree like that of `bumps_of`.
    """
    env, inner_taps = Environment(region.inputs, inputs), iter(zip(taps[1], bumps[1], strict=True))
    operands_at = [(id(op), i) for op in region.ops if isinstance(op, Site) for i in op.params]
    bump = dict(zip(operands_at, bumps[0], strict=True))
    tap = {id(value): array for value, array in zip(region.taps, taps[0], strict=True)}
    inner_residuals = []
    for op in region.ops:
        operands = [env[x] for x in op.inputs]
        if isinstance(op, Nested):
            outputs, residuals = _run_nested(op, operands, *next(inner_taps), watch)
            inner_residuals.append(residuals)
        else:
            outputs = operands if op.eqn is None else bind_differentiated(op.eqn, op.moving, operands)
        values = zip(op.outputs, outputs, strict=True)
        tapped = lambda v, x: _tap(watch(v, x, env.__getitem__, bump), tap[id(v)])
        env.set(op.outputs, [tapped(v, x) if id(v) in tap else x for v, x in values])
    return [env[x] for x in region.outputs], (tuple(env[x] for x in region.residuals), tuple(inner_residuals))


class Environment:
    """The arrays of the values computed so far, by the value's identity; a literal has its own."""

    def __init__(self, values: Sequence[Value], arrays: Sequence[Any]):
        self._arrays: dict[int, Any] = {}
        self.set(values, arrays)

    def set(self, values: Sequence[Value], arrays: Sequence[Any]) -> None:
        self._arrays.update((id(value), array) for value, array in zip(values, arrays, strict=True))

    def __getitem__(self, value: Value) -> Any:
        return self._arrays[id(value)] if value.literal is None else value.literal


def _run_nested(
    op: Nested, operands: list[Any], taps: Any, bumps: Any, watch: Watch
) -> tuple[Sequence[Any], Any]:
    if op.eqn.primitive is prim.scan_p:
        return _run_scan(op, operands, taps[0], bumps[0], watch)
    if op.eqn.primitive is prim.remat_p:
        again = jax.checkpoint(
            lambda inputs, taps, bumps: run(op.regions[0], inputs, taps, bumps, watch),
            policy=op.eqn.params["policy"],
            prevent_cse=op.eqn.params["prevent_cse"],
        )
        outputs, residuals = again(operands, taps[0], bumps[0])
        return outputs, (residuals,)

    def branch(number: int) -> Callable[..., Any]:
        def run_branch(inputs: list[Any], taps: Any, bumps: Any) -> Any:
            outputs, own = run(op.regions[number], inputs, taps[number], bumps[number], watch)
            # The residuals of branches that are not taken are 1, which every rule can multiply with and divide by.
            blank = [filled(region, residuals_of, 1) for region in op.regions]
            return varying((outputs, (*blank[:number], own, *blank[number + 1 :])), operands)

        return run_branch

    return jax.lax.switch(operands[0], [branch(k) for k in range(len(op.regions))], operands[1:], taps, bumps)


def _run_scan(
    op: Nested, operands: list[Any], taps: Tree, bumps: Tree, watch: Watch
) -> tuple[Sequence[Any], Any]:
    scan = scan_of(op.eqn)
    ends = scan.num_consts, scan.num_consts + scan.num_carry
    consts, xs = operands[: ends[0]], operands[ends[1] :]
    carry = [jnp.asarray(x, v.aval.dtype) for x, v in _arrays(operands, op.inputs)[ends[0] : ends[1]]]

    def body(carry: list[Any], step: Any) -> Any:
        outputs, residuals = run(op.regions[0], [*consts, *carry, *step[0]], step[1], step[2], watch)
        return outputs[: scan.num_carry], (outputs[scan.num_carry :], residuals)

    carry, (ys, residuals) = jax.lax.scan(
        body, carry, (xs, taps, bumps), length=scan.length, reverse=scan.reverse, unroll=scan.unroll
    )
    return [*carry, *ys], (residuals,)


def _arrays(operands: list[Any], values: Sequence[Value]) -> list[tuple[Any, Value]]:
    return list(zip(operands, values, strict=True))
