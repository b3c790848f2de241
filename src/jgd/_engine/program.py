"""A traced loss: the jaxpr of ONE example, and the cache that keeps a second call from tracing again."""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jgd._engine import jaxprs
from jgd._engine.devices import platform_of
from jgd._errors import describe, is_concrete
from jgd._loss import Call, example_of
from jgd._mesh import compiler_places, explicit_mesh, manual_type, unplaced


@dataclass(frozen=True, eq=False)
class Program:
    """The jaxpr of a loss on one example. Compared by identity: the cache hands out one for each key.

    Its inputs are the parameters' leaves, the shared arguments' and one example's; its constants are the arrays
    that the loss closes over. Its first output is the value, the rest are the auxiliary leaves.
    """

    jaxpr: Any
    param_avals: tuple[jax.ShapeDtypeStruct, ...]
    num_shared: int
    captured: tuple[Any, ...] = field(repr=False)  # what the loss closes over: the last of the constants
    aux_treedef: Any
    param_paths: tuple[str, ...]
    platform: str  # that the arguments lie on, for which plans are made
    found: dict[Any, Any] = field(default_factory=dict, repr=False)  # by `once`

    def constants(self, shared: Sequence[Any]) -> list[Any]:
        """The values that no example changes: shared arguments, then what the loss closes over."""
        return [*shared, *self.captured]

    def avals(self) -> tuple[list[Any], list[Any], list[Any]]:
        """Shapes and dtypes of what `run` takes: parameters, constants and one example."""
        inputs, captured = (
            [jaxprs.aval_of(v) for v in some] for some in (self.jaxpr.invars, self.jaxpr.constvars)
        )
        first, last = len(self.param_avals), len(self.param_avals) + self.num_shared
        return inputs[:first], inputs[first:last] + captured, inputs[last:]

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What is worked out about the program once for each key, and goes with it."""
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


def trace(call: Call) -> Program:
    """The program of a call, from the cache where the loss was traced for these shapes before.

    Raises:
        TypeError: the loss of one example is not a floating-point scalar.
    """
    platform = platform_of((*call.param_leaves, *call.batch_leaves))
    key = (
        platform, call.signature.argnums, call.signature.has_aux, call.signature.treedef,
        call.signature.roles,
        tuple(_aval_key(x) for x in (*call.param_leaves, *call.shared_leaves)),
        tuple((x.shape[1:], x.dtype) for x in call.batch_leaves),
        *(getattr(jax.config, name) for name in _CONFIG),
        jax.sharding.get_abstract_mesh(), explicit_mesh((call.param_leaves, call.batch_leaves)),
        manual_type(call.batch_leaves[0]),
    )  # fmt: skip
    programs = _programs_of(call.signature.loss)
    if key in programs:
        return programs[key]
    with compiler_places((call.param_leaves, call.batch_leaves)):
        program = _trace(call, platform)
    if all(is_concrete(x) for x in program.captured):
        programs[key] = program
        if len(programs) > _SHAPES_KEPT:
            programs.popitem(last=False)
    return program


def _aval_key(x: Any) -> tuple[Any, ...]:
    return (
        jnp.shape(x),
        jnp.result_type(x),
        getattr(getattr(x, "aval", x), "weak_type", not hasattr(x, "dtype")),
    )


# What changes a trace, of all that JAX can be told.
_CONFIG = (
    "jax_enable_x64", "jax_disable_jit", "jax_default_matmul_precision", "jax_numpy_dtype_promotion",
    "jax_default_prng_impl",
)  # fmt: skip
_SHAPES_KEPT = 64
_LOSSES_KEPT = 64
_by_loss: weakref.WeakKeyDictionary[Any, OrderedDict[Any, Program]] = weakref.WeakKeyDictionary()
_by_equal_loss: OrderedDict[Any, OrderedDict[Any, Program]] = OrderedDict()


def _programs_of(loss: Callable[..., Any]) -> OrderedDict[Any, Program]:
    """The programs kept for a loss. A function's die with it; a bound method, made anew each time, is kept by value."""
    try:
        if not hasattr(loss, "__self__"):
            return _by_loss.setdefault(loss, OrderedDict())
        programs = _by_equal_loss.setdefault(loss, OrderedDict())
    except TypeError:  # not hashable, or not weakly referable: nothing to keep it by
        return OrderedDict()
    _by_equal_loss.move_to_end(loss)
    if len(_by_equal_loss) > _LOSSES_KEPT:
        _by_equal_loss.popitem(last=False)
    return programs


def _trace(call: Call, platform: str) -> Program:
    signature = call.signature

    def example_loss(params: Any, shared: Any, example: Any) -> tuple[Any, Any]:
        out = signature.call(params, shared, example)
        return _check_value(out[0]), out[1]

    leaves = unplaced((call.param_leaves, call.shared_leaves))
    try:
        jaxpr, captured, (_, aux) = jaxprs.trace_jaxpr(example_loss, *leaves, example_of(call.batch_leaves))
    except ValueError as error:
        if signature.has_aux and "unpack" in str(error):
            raise TypeError("with `has_aux=True` the loss must return a pair `(scalar, aux)`") from error
        raise
    paths = jax.tree_util.tree_flatten_with_path(call.params)[0]
    return Program(
        jaxpr=jaxpr,
        param_avals=tuple(jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in call.param_leaves),
        num_shared=len(call.shared_leaves),
        captured=tuple(captured),
        aux_treedef=jax.tree.structure(aux),
        param_paths=tuple(jax.tree_util.keystr(path) or "params" for path, _ in paths),
        platform=platform,
    )


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
