"""The products of a loss, forward and backward: what the plain gradient's time is predicted from."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jgd._engine.jaxprs import Literal, all_within, aval_of, inner_jaxprs, prim, scan_of
from jgd._engine.trace import TracedLoss


class Work(NamedTuple):
    """Floating-point operations of one example's products.

    Attributes:
        forward: those that make the loss.
        backward: those that make its derivative, of the parameters and of all that lies between.
    """

    forward: int
    backward: int

    def times(self, number: int) -> "Work":
        """The same, so many times."""
        return Work(number * self.forward, number * self.backward)


def work_of(program: TracedLoss) -> Work:
    """The work of a program. A loop without known length counts nothing, of several branches the dearest counts."""
    params = len(program.param_avals)
    trained = [k < params for k in range(len(program.jaxpr.invars))]
    return _of_jaxpr(program.jaxpr, trained)[0]


def _of_jaxpr(jaxpr: Any, trained: Sequence[bool]) -> tuple[Work, list[bool]]:
    """The work, and which outputs depend on what is `trained` of the inputs."""
    depends = dict(zip(jaxpr.invars, trained, strict=True))
    look = lambda atom: not isinstance(atom, Literal) and depends.get(atom, False)
    forward = backward = 0
    for eqn in jaxpr.eqns:
        work, outputs = _of_equation(eqn, [look(x) for x in eqn.invars])
        forward, backward = forward + work.forward, backward + work.backward
        depends.update(zip(eqn.outvars, outputs, strict=True))
    return Work(forward, backward), [look(x) for x in jaxpr.outvars]


def _of_equation(eqn: Any, trained: list[bool]) -> tuple[Work, list[bool]]:
    if eqn.primitive in _FLOPS:
        flops = _FLOPS[eqn.primitive](eqn)
        return Work(flops, flops * sum(trained)), [any(trained)]  # backward, one for each side that depends
    if eqn.primitive is prim.scan_p:
        return _of_scan(eqn, trained)
    inner = inner_jaxprs(eqn)
    if eqn.primitive is prim.cond_p:
        works, outputs = zip(*(_of_jaxpr(jaxpr, trained[1:]) for jaxpr in inner), strict=True)
        return max(works, key=sum), [any(each) for each in zip(*outputs, strict=True)]
    if len(inner) != 1 or len(inner[0].invars) != len(trained):
        return Work(0, 0), [any(trained)] * len(eqn.outvars)
    work, outputs = _of_jaxpr(inner[0], trained)
    if eqn.primitive is prim.remat_p and any(trained):
        work = Work(work.forward, work.backward + work.forward)
    return work, outputs


def _of_scan(eqn: Any, trained: list[bool]) -> tuple[Work, list[bool]]:
    scan = scan_of(eqn)
    before, carried = scan.num_consts, slice(scan.num_consts, scan.num_consts + scan.num_carry)
    while True:  # until the carry depends on nothing more
        step, outputs = _of_jaxpr(scan.jaxpr, trained)
        carry = [a or b for a, b in zip(trained[carried], outputs[: scan.num_carry], strict=True)]
        if carry == trained[carried]:
            return step.times(scan.length), outputs
        trained = [*trained[:before], *carry, *trained[carried.stop :]]


def _of_dot(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    flops = 2 * aval_of(eqn.outvars[0]).size
    for axis in contracted:
        flops *= aval_of(eqn.invars[0]).shape[axis]
    return flops


def _of_convolution(eqn: Any) -> int:
    kernel = aval_of(eqn.invars[1])
    channels = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2 * aval_of(eqn.outvars[0]).size * kernel.size // max(channels, 1)


def convolution_flops(jaxpr: Any) -> int:
    """The operations of all convolutions in a jaxpr; those in a loop count once."""
    each = (inner for eqn in jaxpr.eqns for inner in all_within(eqn))
    return sum(_of_convolution(eqn) for eqn in each if eqn.primitive is prim.conv_general_dilated_p)


_FLOPS = {prim.dot_general_p: _of_dot, prim.conv_general_dilated_p: _of_convolution}
