"""What a loss that was written for a batch does with the one example that it sees."""

from collections.abc import Sequence
from typing import Any

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
    f"through. That is a batch statistic, as of batch normalisation, of the ONE example that a loss sees. {_INSTEAD}"
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


Source = tuple[
    Any, bool
]  # the variable that an array holds the numbers of, and whether a sum was taken on the way


def takes_batch_statistic(jaxpr: Any) -> bool:
    """Whether an array is taken from itself, by way of a sum over axes of length 1."""
    return _walk(jaxpr, [(x, False) for x in jaxpr.invars])[0]


def _walk(jaxpr: Any, sources: Sequence[Source]) -> tuple[bool, list[Source]]:
    """Whether that is so, and what the jaxpr's results hold the numbers of."""
    of: dict[Any, Source] = dict(zip(jaxpr.invars, sources, strict=True))
    read = lambda atom: (atom, False) if isinstance(atom, Literal) else of.get(atom, (atom, False))
    for eqn in jaxpr.eqns:
        inside = called(eqn)
        if inside is not None:
            found, results = _walk(inside[0], [read(x) for x in eqn.invars])
            if found:
                return True, []
            of.update(zip(eqn.outvars, results, strict=True))
        elif eqn.primitive is prim.sub_p:
            (first, summed), (second, also) = map(read, eqn.invars)
            if first is second and summed != also:
                return True, []
        elif _keeps_numbers(eqn):
            source, summed = read(eqn.invars[0])
            of[eqn.outvars[0]] = source, summed or eqn.primitive is prim.reduce_sum_p
    return False, [read(x) for x in jaxpr.outvars]


_SAME = (prim.reduce_sum_p, prim.broadcast_in_dim_p, prim.reshape_p, prim.squeeze_p, prim.copy_p)


def _keeps_numbers(eqn: Any) -> bool:
    """Whether an equation's result has the numbers of its first operand."""
    if eqn.primitive in (prim.div_p, prim.mul_p):
        by = eqn.invars[1]
        return isinstance(by, Literal) and jnp.ndim(by.val) == 0 and by.val == 1
    return eqn.primitive in _SAME and 0 < eqn.invars[0].aval.size == eqn.outvars[0].aval.size
