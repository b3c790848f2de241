"""The sites once more, from the parameters, the records of one example standing in for all that came before.

The `vjp` at the δ's is the example's gradient, the `jvp` the products with a direction.
"""

from collections.abc import Callable, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import GatherScatterMode

from jgd._engine.differentiated import bind_differentiated
from jgd._engine.jaxprs import bind, mentions, prim, scan_of, with_wide_ids
from jgd._engine.regions import Nested, Region, Side, Site, has_part, needed_by, recorded
from jgd._engine.tapped import Environment
from jgd._engine.trees import Tree, picked, taps_of, zeros
from jgd._mesh import varying


def replay(
    region: Region,
    known: Sequence[Any],
    records: Tree,
    leaves: Set[int],
    bumps: Tree | None = None,
) -> list[Any]:
    """The tapped outputs of the sites of some leaves, from the known inputs and the records of one example.

    Args:
        region: the region.
        known: its inputs; of the DATA inputs, only those that it asks for are looked at.
        records: its records.
        leaves: whose sites to replay; they alone may be differentiated.
        bumps: what to add to the sites' parameter operands, see `bumps_of`.
    """
    env, inner = Environment(region.inputs, known), iter(records[1])
    env.set(region.records, records[0])
    bump, inner_bumps = (None, None) if bumps is None else (iter(bumps[0]), iter(bumps[1]))
    outputs: list[Any] = []
    for op in region.ops:
        if isinstance(op, Nested):
            parts = next(inner), None if inner_bumps is None else next(inner_bumps)
            if has_part(op, leaves):
                asked = {id(x) for x in needed_by(op)}
                operands = [env[x] if x.side != Side.DATA or id(x) in asked else None for x in op.inputs]
                outputs += _replay_nested(op, operands, parts, leaves)
        elif isinstance(op, Site):
            added = {i: None if bump is None else next(bump) for i in op.params}
            if has_part(op, leaves):
                outputs += _replay_site(op, env, added)
        elif op.known:
            operands = [env[x] for x in op.inputs]
            operands = varying(operands, operands)
            # Where one of the leaves is differentiated here, the equation is already.
            moving = op.moving if all(x.leaves.isdisjoint(leaves) for x in op.inputs) else ()
            env.set(op.outputs, bind_differentiated(op.eqn, moving, operands))
    return outputs


def _replay_site(site: Site, env: Environment, bumps: dict[int, Any]) -> list[Any]:
    kept = {id(x) for x in recorded(site)}
    operands = []
    for position, x in enumerate(site.inputs):
        if x.side != Side.DATA:
            bump = bumps.get(position)
            operands.append(env[x] if bump is None else env[x] + bump)
        else:  # where the site only adds, the operand's value makes no difference
            shared = [env[site.inputs[i]] for i in site.params]
            zero = varying(jnp.zeros(x.aval.shape, x.aval.dtype), shared)
            operands.append(env[x] if id(x) in kept else zero)
    outputs = operands if site.eqn is None else _REPLAYED.get(site.eqn.primitive, bind)(site.eqn, operands)
    return [outputs[i] for i in site.tapped]


def _pad(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    # JAX cannot transpose a pad in its value alone, which is what is left when the operand is recorded data.
    operand, value = operands
    zero, one = jnp.zeros((), operand.dtype), jnp.ones((), operand.dtype)
    config = eqn.params["padding_config"]
    around = jax.lax.pad(jnp.zeros_like(operand), one, config)
    return [jax.lax.pad(operand, zero, config) + value * around]


def _gather(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    # Out of bounds, a gather that was promised none clamps forward and drops backward: here it drops both ways.
    if eqn.params["mode"] != GatherScatterMode.PROMISE_IN_BOUNDS:
        return bind(eqn, operands)
    params = {k: v for k, v in eqn.params.items() if k not in ("mode", "fill_value")}
    operands = with_wide_ids(eqn, operands)
    return [eqn.primitive.bind(*operands, **params, mode=GatherScatterMode.FILL_OR_DROP, fill_value=0)]


def _linear_solve(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    # Nothing flows through how it is solved, and JAX fails where only that is differentiated, as one leaf may be here.
    first, end = eqn.params["const_lengths"].matvec, sum(eqn.params["const_lengths"])
    stopped = map(jax.lax.stop_gradient, operands[first:end])
    return bind(eqn, [*operands[:first], *stopped, *operands[end:]])


_REPLAYED = {prim.pad_p: _pad, prim.gather_p: _gather, prim.linear_solve_p: _linear_solve}


def _replay_nested(op: Nested, operands: list[Any], parts: tuple[Any, Any], leaves: Set[int]) -> list[Any]:
    records, bumps = parts
    bumps = [None] * len(op.regions) if bumps is None else bumps
    if op.eqn.primitive is prim.remat_p:
        return replay(op.regions[0], operands, records[0], leaves, bumps[0])
    if op.eqn.primitive is prim.cond_p:
        return _replay_cond(op, operands, (records, bumps), leaves)
    # What the carry held is recorded, so the steps do not wait for each other: they are one more batch axis.
    scan = scan_of(op.eqn)
    first = scan.num_consts + scan.num_carry
    axes = [None if i < first or x is None else 0 for i, x in enumerate(operands)]
    step = lambda operands, records, bumps: replay(op.regions[0], operands, records, leaves, bumps)
    if not goes_in_order(op.regions[0]):
        return jax.vmap(step, in_axes=(axes, 0, 0), axis_size=scan.length)(operands, records[0], bumps[0])

    def one(_: None, xs: Any) -> tuple[None, list[Any]]:
        return None, step([*operands[:first], *xs[0]], *xs[1:])

    return jax.lax.scan(one, None, (operands[first:], records[0], bumps[0]), length=scan.length)[1]


def _replay_cond(op: Nested, operands: list[Any], parts: tuple[Any, Any], leaves: Set[int]) -> list[Any]:
    """The outputs of all branches: zeros for those that were not taken."""
    known = [x for x in operands if x is not None]
    blank = [[jnp.zeros_like(x) for x in picked(r, zeros(r, taps_of), leaves)] for r in op.regions]
    blank = varying(blank, known)  # out here: JAX does not differentiate the cast of a constant in a branch

    def branch(number: int, region: Region, records: Tree, bumps: Any) -> Callable[[], list[Any]]:
        def replay_branch() -> list[Any]:
            own = replay(region, operands[1:], records, leaves, bumps)
            made = [x for each in (*blank[:number], own, *blank[number + 1 :]) for x in each]
            return varying(made, known)

        return replay_branch

    each = zip(range(len(blank)), op.regions, *parts, strict=True)
    return jax.lax.switch(operands[0], [branch(*arguments) for arguments in each])


def goes_in_order(region: Region) -> bool:
    """Whether the steps of a scan have to be replayed one after the other, not side by side.

    Under `vmap` every branch of a `cond` would be differentiated, and those not taken may have no derivative. A
    `custom_vjp` of parameters alone, which is the same at every step, would be given the sum of the steps'
    cotangents, and it need not be linear.
    """
    for op in region.ops:
        if isinstance(op, Nested):
            if len(op.regions) > 1 or any(map(goes_in_order, op.regions)):
                return True
        elif (
            op.eqn is not None
            and any(x.leaves for x in op.inputs)
            and mentions(op.eqn, prim.custom_vjp_call_p)
        ):
            return True
    return False
