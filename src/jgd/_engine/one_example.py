"""What a loss that was written for a batch does with the one example that it sees."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jgd._engine.calls import Call, example_of
from jgd._engine.jaxprs import Literal, called, prim
from jgd._errors import describe

_INSTEAD = (
    "Normalise over what an example has, by layer or group norm, or by statistics that are an argument which all "
    "examples share"
)

BATCH_STATISTIC = (
    "`loss` subtracts from an array its mean over an axis of length 1, so that nothing is left, and no gradient comes "
    "through. Is it a batch statistic, as of batch normalisation? A loss sees ONE example, not a batch. "
    f"{_INSTEAD}"
)


def note(call: Call, error: Exception) -> str:
    """What to say beside an error that a loss raised."""
    given = ", ".join(map(describe, example_of(call.batch_leaves)))
    if isinstance(error, NameError) and "axis name" in str(error):
        return (
            "jgd: examples are not mapped under a name that a loss could sum over: the gradient of each is of its own "
            f"loss alone. What needs all examples, as batch normalisation does, has no such gradients. {_INSTEAD}"
        )
    return (
        "jgd: this was raised by the loss. It is called with ONE example, without the batch axis: beside the "
        f"parameters and what all examples share it was given {given}"
    )


class _Numbers(NamedTuple):
    """What an array holds: whose numbers, after which steps, and what they depend on."""

    source: Any
    is_summed: bool = False
    is_mean: bool = False
    of_params: bool = False
    of_example: bool = False


def takes_batch_statistic(jaxpr: Any, params: int, shared: int) -> bool:
    """Whether an array is taken from its mean over axes of length 1.

    Args:
        jaxpr: of one example's loss; its inputs are the parameters, what examples share, and the example.
        params: how many are parameters.
        shared: how many are shared.
    """
    inputs = enumerate(jaxpr.invars)
    return _walk(
        jaxpr, [_Numbers(x, of_params=k < params, of_example=k >= params + shared) for k, x in inputs]
    )[0]


def _walk(jaxpr: Any, given: Sequence[_Numbers]) -> tuple[bool, list[_Numbers]]:
    """Whether that is so, and what the jaxpr's results hold."""
    of: dict[Any, _Numbers] = dict(zip(jaxpr.invars, given, strict=True))
    read = lambda atom: _Numbers(atom) if isinstance(atom, Literal) else of.get(atom, _Numbers(atom))
    for eqn in jaxpr.eqns:
        operands = [read(x) for x in eqn.invars]
        inside = called(eqn)
        if inside is not None:
            found, results = _walk(inside[0], operands)
            if found:
                return True, []
            of.update(zip(eqn.outvars, results, strict=True))
            continue
        if eqn.primitive is prim.sub_p:
            first, second = operands
            both = first.of_params and first.of_example
            if first.source is second.source and first.is_mean != second.is_mean and both:
                return True, []
        if _keeps_numbers(eqn):
            first = operands[0]
            is_summed = first.is_summed or eqn.primitive is prim.reduce_sum_p
            is_mean = first.is_mean or (is_summed and eqn.primitive in (prim.div_p, prim.mul_p))
            of[eqn.outvars[0]] = first._replace(is_summed=is_summed, is_mean=is_mean)
            continue
        depends = any(x.of_params for x in operands), any(x.of_example for x in operands)
        of.update({x: _Numbers(x, False, False, *depends) for x in eqn.outvars})
    return False, [read(x) for x in jaxpr.outvars]


_SAME = (prim.reduce_sum_p, prim.broadcast_in_dim_p, prim.reshape_p, prim.squeeze_p, prim.copy_p)


def _keeps_numbers(eqn: Any) -> bool:
    """Whether an equation's result has the numbers of its first operand."""
    if eqn.primitive in (prim.div_p, prim.mul_p):
        by = eqn.invars[1]
        return isinstance(by, Literal) and jnp.ndim(by.val) == 0 and by.val == 1
    return eqn.primitive in _SAME and 0 < eqn.invars[0].aval.size == eqn.outvars[0].aval.size
