"""A traced loss: the jaxpr of ONE example, traced at each call, and what keeps a second call from compiling."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jgd._engine import jaxprs
from jgd._engine.calls import Call, example_of
from jgd._engine.devices import platform_of
from jgd._engine.fingerprint import fingerprint
from jgd._engine.one_example import BATCH_STATISTIC, note, takes_batch_statistic
from jgd._engine.rules import registered
from jgd._errors import describe
from jgd._mesh import compiler_places, explicit_mesh, manual_type, unplaced


@dataclass(frozen=True, eq=False)
class TracedLoss:
    """The jaxpr of a loss on one example. Compared by identity: `trace` returns one object for all equal programs.

    Its inputs are the parameters' leaves, the shared arguments' and one example's; its constants stand for the arrays
    that the loss closes over, whose values are not kept here. Its first output is the value, the rest are the auxiliary
    leaves.
    """

    jaxpr: Any
    param_avals: tuple[jax.ShapeDtypeStruct, ...]
    num_shared: int
    aux_treedef: Any
    param_paths: tuple[str, ...]
    platform: str  # that the arguments lie on; plans are made for it
    found: dict[Any, Any] = field(default_factory=dict, repr=False)  # what `once` has made

    def avals(self) -> tuple[list[Any], list[Any], list[Any]]:
        """Shapes and dtypes of what `run` takes: parameters, constants and one example."""
        inputs, captured = (
            [jaxprs.aval_of(v) for v in some] for some in (self.jaxpr.invars, self.jaxpr.constvars)
        )
        first, last = len(self.param_avals), len(self.param_avals) + self.num_shared
        return inputs[:first], inputs[first:last] + captured, inputs[last:]

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns: called once for each key, and kept with the program."""
        if key not in self.found:
            self.found[key] = make()
        return self.found[key]

    def run(
        self, params: Sequence[Any], constants: Sequence[Any], example: Sequence[Any]
    ) -> tuple[Any, list[Any]]:
        """The loss of one example and its auxiliary leaves."""
        value, *aux = jaxprs.evaluate(self.jaxpr, self.environment(params, constants, example))
        return value, aux

    def environment(
        self, params: Sequence[Any], constants: Sequence[Any], example: Sequence[Any]
    ) -> dict[Any, Any]:
        """The value of each of the jaxpr's inputs."""
        shared, captured = constants[: self.num_shared], constants[self.num_shared :]
        inputs = dict(zip(self.jaxpr.constvars, captured, strict=True))
        return inputs | dict(zip(self.jaxpr.invars, [*params, *shared, *example], strict=True))


class Traced(NamedTuple):
    """What a call's loss traced to, and the values of the program's constants in this call."""

    program: TracedLoss
    constants: list[Any]  # shared arguments, then the arrays that the loss closes over


def trace(call: Call) -> Traced:
    """Traces the loss of a call, as it is now, on one example.

    If an equal program was traced before, that object is returned. Plans and compiled functions are kept by the
    program's identity, so they are used again.

    Raises:
        TypeError: the loss of one example is not a floating-point scalar, or closes over an array reference.
    """
    platform = platform_of((*call.param_leaves, *call.batch_leaves))
    with compiler_places((call.param_leaves, call.batch_leaves)):
        program, captured = _trace(call, platform)
        said = fingerprint(program.jaxpr)
    if any(map(jaxprs.is_reference, captured)):
        raise TypeError(
            "`loss` closes over an array reference, which is no constant: pass `reference[...]` as a shared argument"
        )
    constants = [*call.shared_leaves, *map(_as_now, captured)]
    if said is None:
        _warn(program)
        return Traced(program, constants)
    key = (
        said, len(program.param_avals), program.num_shared, program.aux_treedef, program.param_paths, platform,
        explicit_mesh((call.param_leaves, call.batch_leaves)), manual_type(call.batch_leaves[0]), registered(),
    )  # fmt: skip
    kept = _programs.eval_shape().once(key, program)
    if kept is program:
        _warn(program)
    return Traced(kept, constants)


def _warn(program: TracedLoss) -> None:
    """Says what a new program shows of a loss that was meant otherwise."""
    if takes_batch_statistic(program.jaxpr, len(program.param_avals), program.num_shared):
        warnings.warn(BATCH_STATISTIC, UserWarning, stacklevel=5)


def _as_now(x: Any) -> Any:
    """A captured array, copied if it is NumPy's, which may change later."""
    return x if isinstance(x, jax.Array) else jnp.array(x)


class _Programs:
    """The programs that were traced last, one for each key. As a pytree it has no leaves."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Any, TracedLoss] = OrderedDict()

    def once(self, key: Any, program: TracedLoss) -> TracedLoss:
        """The program that has the key; the one given, where there is none yet."""
        program = self._kept.setdefault(key, program)
        self._kept.move_to_end(key)
        if len(self._kept) > _PROGRAMS_KEPT:
            self._kept.popitem(last=False)
        return program


_PROGRAMS_KEPT = 256
jax.tree_util.register_static(_Programs)
# Tracing this function gives an object from JAX's own cache. There is one for each state of the options that change a
# trace, and clearing the cache removes it.
_programs = jax.jit(_Programs)


def _trace(call: Call, platform: str) -> tuple[TracedLoss, list[Any]]:
    signature = call.signature

    def example_loss(params: Any, shared: Any, example: Any) -> tuple[Any, Any]:
        out = signature.call(params, shared, example)
        return _check_value(out[0]), out[1]

    leaves = unplaced((call.param_leaves, call.shared_leaves))
    try:
        jaxpr, captured, (_, aux) = jaxprs.trace_jaxpr(example_loss, *leaves, example_of(call.batch_leaves))
    except Exception as error:
        if isinstance(error, ValueError) and signature.has_aux and "unpack" in str(error):
            raise TypeError("with `has_aux=True` the loss must return a pair `(scalar, aux)`") from error
        error.add_note(note(call, error))
        raise
    paths = jax.tree_util.tree_flatten_with_path(call.params)[0]
    program = TracedLoss(
        jaxpr=jaxpr,
        param_avals=tuple(jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in call.param_leaves),
        num_shared=len(call.shared_leaves),
        aux_treedef=jax.tree.structure(aux),
        param_paths=tuple(jax.tree_util.keystr(path) or "params" for path, _ in paths),
        platform=platform,
    )
    return program, captured


def _check_value(value: Any) -> Any:
    must = "`loss` must return a floating-point scalar for one example"
    if isinstance(value, tuple | list | dict):
        hint = "; for `(scalar, aux)` say `has_aux=True`" if isinstance(value, tuple) else ""
        raise TypeError(f"{must}, got a {type(value).__name__}{hint}")
    if isinstance(value, float):
        return jnp.asarray(value)
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(f"{must}, got {describe(value)}")
    if value.shape != ():
        raise TypeError(
            f"{must}, got {describe(value)}: it sees ONE example, without the batch axis; reduce its output with "
            "`jnp.sum` or `jnp.mean`"
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"{must}, got {describe(value)}")
    return value
