"""The path that a method takes: its parameters at every update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


def walk(method: Any, params: Any, *batch: Any, steps: int) -> Any:
    """The parameters before the first update and after each, on the same batch: leaves `(steps + 1, ...)`."""

    def update(state: Any, _: None) -> tuple[Any, Any]:
        after, _ = method.step(state, *batch)
        return after, after.params

    _, path = jax.lax.scan(update, method.init(params), None, length=steps)
    return jax.tree.map(lambda first, rest: jnp.concatenate([jnp.asarray(first)[None], rest]), params, path)


class Record(NamedTuple):
    """The optimizer state of `recorded`."""

    count: jax.Array
    path: Any  # leaves (steps + 1, ...)
    inner: Any


def recorded(optimizer: optax.GradientTransformation, *, steps: int) -> optax.GradientTransformationExtraArgs:
    """The same optimizer, keeping the parameters before the first update and after each of `steps`.

    As a part of the optimizer's state the record is written inside of `jgd.fit`'s compiled epochs; a callback
    would have to leave them after every update. Read it from `result.state.opt_state.path`.
    """
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> Record:
        path = jax.tree.map(lambda p: jnp.zeros((steps + 1, *p.shape), p.dtype).at[0].set(p), params)
        return Record(jnp.zeros((), jnp.int32), path, inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Record]:
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        after, count = optax.apply_updates(params, updates), state.count + 1
        path = jax.tree.map(lambda kept, p: kept.at[count].set(p), state.path, after)
        return updates, Record(count, path, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
