"""A method: how a batch changes the parameters. State goes in, state comes out."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import tree_flatten_with_path
from jaxtyping import Array, Float, Int

from jgd._engine.calls import check_alive
from jgd._engine.dtypes import accumulation_dtype
from jgd._errors import describe, leaf_name
from jgd._methods.derivatives import Evaluator
from jgd._methods.host import owned
from jgd._methods.optimizers import told
from jgd._reductions.arguments import Weights


class MethodState(NamedTuple):
    """Where a run stands.

    Attributes:
        params: the parameters.
        opt_state: the optimizer's state.
        step: the number of updates made, an int32 scalar.
    """

    params: Any
    opt_state: Any
    step: Int[Array, ""]


class StepInfo(NamedTuple):
    """What one update saw, at the parameters before it.

    Attributes:
        value: the objective of the batch: the mean of its losses, or their sum with `total="sum"`.
        grad_norm: the Euclidean norm of the gradient that the optimizer was given.
        aux: what the loss returned beside its value, with a leading axis B; None without `has_aux`. `method.step`
            with `weights` gives all rows, those of weight 0 too; a callback of `jgd.fit` sees none of what `fit`
            itself filled a batch up with.
    """

    value: Float[Array, ""]
    grad_norm: Float[Array, ""]
    aux: Any


@dataclass(frozen=True, eq=False)
class Method:
    """Descent, ascent or both, made by `jgd.descent`, `jgd.ascent` and `jgd.descent_ascent`.

    Compared by identity: each method compiles its step once for each shape of a batch.
    """

    evaluate: Evaluator = field(repr=False)
    optimizer: optax.GradientTransformationExtraArgs = field(
        repr=False
    )  # minimises; ascent is folded into it
    in_axes: Any = None
    kind: str = "descent"

    @property
    def takes_key(self) -> bool:
        """Whether each update needs a key."""
        return bool(self.evaluate.takes_key)

    def init(self, params: Any) -> MethodState:
        """The state to start from.

        Args:
            params: a pytree of floating-point arrays.

        Raises:
            TypeError: a leaf is not floating-point.
        """
        for path, leaf in tree_flatten_with_path(params)[0]:
            if not jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.floating):
                raise TypeError(
                    f"{leaf_name('params', path)} is {describe(leaf)}, but a parameter must be a "
                    "floating-point array. Split the model first, with `eqx.partition(model, "
                    "eqx.is_inexact_array)` or `nnx.split(model, nnx.Param, ...)`, and let the loss join the "
                    "parts"
                )
        check_alive(params, "params")
        params = _strongly_typed(owned(params))
        return MethodState(params, _strongly_typed(self.optimizer.init(params)), jnp.zeros((), jnp.int32))

    def step(
        self, state: MethodState, *batch: Any, weights: Weights | None = None, key: jax.Array | None = None
    ) -> tuple[MethodState, StepInfo]:
        """One update from one batch; compiled at the first call with its shapes.

        Args:
            state: what `init` or the last step returned. It is left intact, so it can be kept or stepped from
                again; `jgd.fit`, which owns its states, updates in place.
            batch: the arguments of the loss after the parameters, with a leading axis B. NumPy arrays are copied:
                they may be written to as soon as this returns.
            weights: `(B,)`, handed to `reduce`, and weighing the losses in `info.value`. Weight 0 is an absent
                example, which fills a batch up to a common size and counts for nothing.
            key: a PRNG key, another at each update, for a loss or a `reduce` that takes one (see `jgd.descent`).

        Returns:
            The new state, and what this update saw at the old one.

        Raises:
            TypeError: `state` is not a `MethodState`, or `reduce` takes no `weights` and some are given.
            ValueError: `state` is not this method's optimizer's, or the batch does not fit the loss; a key is given and
                nothing takes it, or the other way round.
        """
        if not isinstance(state, MethodState):
            raise TypeError(
                "`state` must be the MethodState that `method.init(params)` returned, got "
                f"{type(state).__name__}"
            )
        return update(self, *owned((state, batch, weights, key)))


def _update(
    method: Method,
    state: MethodState,
    batch: tuple[Any, ...],
    weights: jax.Array | None,
    key: jax.Array | None,
) -> tuple[MethodState, StepInfo]:
    _check_state(method, state)
    at = method.evaluate(state.params, *batch, weights=weights, key=key)
    _check_gradient(at.gradient, state.params)
    grad_fn = lambda params, *_: method.evaluate(params, *batch, weights=weights, key=key).gradient
    extra = told(at.value, at.gradient, at.value_fn, grad_fn)
    with jax.numpy_dtype_promotion("standard"):  # which optax counts on
        updates, opt_state = method.optimizer.update(at.gradient, state.opt_state, state.params, **extra)
        params = optax.apply_updates(state.params, updates)
    info = StepInfo(at.value, _norm(at.gradient), at.aux)
    return MethodState(params, _typed_like(opt_state, state.opt_state), state.step + 1), info


_step = jax.jit(_update, static_argnums=0)
_step_in_place = jax.jit(_update, static_argnums=0, donate_argnums=1)


def update(
    method: Method,
    state: MethodState,
    batch: tuple[Any, ...],
    weights: jax.Array | None,
    key: jax.Array | None = None,
    *,
    in_place: bool = False,
) -> tuple[MethodState, StepInfo]:
    """`method.step`, for a caller to whom the memory of all arguments belongs: it is read in its place.

    With `in_place` the state's memory goes to the next one.
    """
    return (_step_in_place if in_place else _step)(method, state, batch, weights, key)


def traced_step(method: Method, state: MethodState, batch: tuple[Any, ...], key: jax.Array) -> Any:
    """The jaxpr of `method.step` for such a batch, arrays or their shapes. The step itself is not traced again."""
    return _step.trace(method, state, batch, None, key if method.takes_key else None).jaxpr


def own_key(method: Method, key: jax.Array, state: MethodState) -> jax.Array | None:
    """The key of a run's next update; None where nothing takes one."""
    return key_of_update(key, state.step) if method.takes_key else None


@jax.jit
def key_of_update(key: jax.Array, step: Int[Array, ""]) -> jax.Array:
    """The key of the update after `step` others; none that orders an epoch, which are numbered from 0."""
    return jax.random.fold_in(jax.random.fold_in(key, _UPDATES), step)


_UPDATES = 0xFFFFFFFF


def _strongly_typed(tree: Any) -> Any:
    """Arrays without weak types: the first update would harden them, and the step compile twice."""

    def harden(x: Any) -> jax.Array:
        is_weak = not hasattr(x, "dtype") or getattr(x, "weak_type", False)
        return jnp.asarray(x, jnp.result_type(x)) if is_weak else jnp.asarray(x)

    return jax.tree.map(harden, tree)


def _typed_like(tree: Any, like: Any) -> Any:
    """The optimizer's state in the types that it had: a scan carries it, and some optimizers widen theirs.

    Raises:
        TypeError: a leaf would lose more than digits, as a float does that becomes an int.
    """

    def cast(path: Any, new: Any, old: jax.Array) -> jax.Array:
        dtype = getattr(new, "dtype", None) or jnp.result_type(new)
        if dtype == old.dtype:
            return jnp.asarray(new, dtype)
        if _kind(dtype) > _kind(old.dtype):
            raise TypeError(
                f"{leaf_name('opt_state', path)} was {describe(old)} after the optimizer's `init` and is {dtype} "
                "after its `update`: its values would be cut. Let `init` return the dtype that `update` does"
            )
        return jnp.asarray(new, old.dtype)

    return _strongly_typed(jax.tree_util.tree_map_with_path(cast, tree, like))


def _kind(dtype: Any) -> int:
    """The kind of a number; one of a larger kind does not fit into a smaller one."""
    kinds = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)
    return next((k for k, kind in enumerate(kinds) if jnp.issubdtype(dtype, kind)), len(kinds))


def _norm(tree: Any) -> jax.Array:
    return optax.tree.norm(jax.tree.map(lambda x: x.astype(accumulation_dtype(x.dtype)), tree))


def _check_state(method: Method, state: MethodState) -> None:
    expected = jax.tree.map(jnp.shape, jax.eval_shape(method.optimizer.init, state.params))
    got = jax.tree.map(jnp.shape, state.opt_state)
    if got != expected:
        raise ValueError(
            "`state.opt_state` is not what this method's optimizer keeps for `state.params`; start from "
            f"`method.init(params)`. It needs arrays of shapes {expected}, got {got}"
        )


def _check_gradient(gradient: Any, params: Any) -> None:
    source = "the gradient that `reduce` or `derivative` returned"
    structure, expected = jax.tree.structure(gradient), jax.tree.structure(params)
    if structure != expected:
        raise ValueError(f"{source} must be a pytree like the parameters, {expected}, got {structure}")
    for (path, leaf), param in zip(tree_flatten_with_path(gradient)[0], jax.tree.leaves(params), strict=True):
        if jnp.shape(leaf) != param.shape:
            raise ValueError(
                f"{source} has {leaf_name('gradient', path)} of shape {jnp.shape(leaf)}, but the parameter's "
                f"is {param.shape}"
            )
