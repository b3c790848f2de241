"""The path from the parameters to the operands that are computed from them. It needs no example."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jgd._engine.forward import Environment
from jgd._engine.jaxprs import bind, scan_of
from jgd._engine.plan import Plan
from jgd._engine.sites import Nested, Region, Side, Value

Path = Callable[[list[jax.Array]], dict[int, jax.Array]]


def leaves_of(plan: Plan, operands: Collection[int]) -> list[int]:
    """The leaves that some operands are computed from."""
    leaves = len(plan.program.param_avals)
    return sorted(frozenset().union(*(plan.reading.computed[k - leaves].leaves for k in operands)))


def path_to(plan: Plan, operands: Collection[int], params: Sequence[Any], constants: Sequence[Any]) -> Path:
    """A function of the leaves that some operands are computed from, to those operands by number.

    Inside of scans an operand is that of all steps, with the steps as leading axes.
    """
    first, leaves = len(params), leaves_of(plan, operands)
    wanted = {id(plan.reading.computed[k - first]): k for k in operands}
    shared, captured = constants[: plan.program.num_shared], constants[plan.program.num_shared :]

    def path(values: list[jax.Array]) -> dict[int, jax.Array]:
        own = dict(zip(leaves, values, strict=True))
        known = [*captured, *(own.get(k, x) for k, x in enumerate(params)), *shared]
        examples = len(plan.region.inputs) - len(known)
        return _computed(plan.region, [*known, *[None] * examples], wanted)

    return path


def _computed(region: Region, inputs: Sequence[Any], wanted: dict[int, int]) -> dict[int, jax.Array]:
    """The wanted values of a region and those inside, by number; DATA inputs are not looked at."""
    env = Environment(region.inputs, inputs)
    found: dict[int, jax.Array] = {}
    needed = _needed(region, wanted)
    for op in region.ops:
        if isinstance(op, Nested):
            if any(_contains(inner, wanted) for inner in op.regions):
                operands = [None if x.side == Side.DATA else env[x] for x in op.inputs]
                found |= _computed_inside(op, operands, wanted)
        elif any(id(x) in needed for x in op.outputs):
            # Not `bind_differentiated`: the path itself is differentiated, and then the equation has that value anyway.
            env.set(op.outputs, bind(op.eqn, [env[x] for x in op.inputs]))
            found |= {wanted[id(x)]: env[x] for x in op.outputs if id(x) in wanted}
    return found


def _computed_inside(op: Nested, operands: list[Any], wanted: dict[int, int]) -> dict[int, jax.Array]:
    (region,) = op.regions  # no operand inside of a branch is computed, see `reading`
    if op.loop is None:
        return _computed(region, operands, wanted)
    scan = scan_of(op.eqn)
    first = scan.num_consts + scan.num_carry
    numbers = {wanted[key]: value for key, value in _values(region) if key in wanted}
    stepped = {number: 0 if op.loop[0] in value.loops else None for number, value in numbers.items()}
    axes = [None if i < first or x is None else 0 for i, x in enumerate(operands)]
    step = jax.vmap(
        lambda operands: _computed(region, operands, wanted),
        in_axes=(axes,),
        out_axes=stepped,
        axis_size=scan.length,
    )
    return step(operands)


def _values(region: Region) -> list[tuple[int, Value]]:
    """All values that equations of a region and of those inside compute, with their identity."""
    found = [(id(x), x) for op in region.ops for x in op.outputs]
    nested = [op for op in region.ops if isinstance(op, Nested)]
    return found + [pair for op in nested for inner in op.regions for pair in _values(inner)]


def _contains(region: Region, wanted: dict[int, int]) -> bool:
    return any(key in wanted for key, _ in _values(region))


def _needed(region: Region, wanted: dict[int, int]) -> set[int]:
    """The values, by identity, that have to be computed for those that are wanted here or inside."""
    needed: set[int] = set()
    for op in reversed(region.ops):
        if isinstance(op, Nested):
            if any(_contains(inner, wanted) for inner in op.regions):
                needed.update(id(x) for x in op.inputs if x.side != Side.DATA)
        elif any(id(x) in wanted or id(x) in needed for x in op.outputs):
            needed.update(map(id, (*op.inputs, *op.outputs)))
    return needed


def rounds(plan: Plan, leaves: Collection[int], dtype: Any) -> bool:
    """Whether a direction of this dtype would be rounded on its way from some leaves to the operands."""
    digits = max(_digits(dtype), _digits(jnp.float32))
    made = [x.aval.dtype for x in _values_of(plan.region, frozenset(leaves))]
    return any(_digits(x) < digits for x in (*made, *(plan.program.param_avals[k].dtype for k in leaves)))


def _digits(dtype: Any) -> int:
    return jnp.finfo(dtype).nmant if jnp.issubdtype(dtype, jnp.inexact) else 0


def _values_of(region: Region, leaves: frozenset[int]) -> list[Value]:
    """The values that are computed from some leaves and no example, in a region and those inside."""
    found = [x for op in region.ops for x in op.inputs if x.leaves & leaves]
    nested = [op for op in region.ops if isinstance(op, Nested)]
    return found + [x for op in nested for inner in op.regions for x in _values_of(inner, leaves)]
