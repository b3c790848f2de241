"""Epochs as compiled scans over arrays: no dispatch between updates, and the state updated in place."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jgd._fit.data import Examples
from jgd._fit.schedule import Pass
from jgd._methods.method import Method, MethodState


class History(NamedTuple):
    """What each update saw, in order.

    Attributes:
        value: `(updates,)`, the objective of the update's batch, before the update.
        grad_norm: `(updates,)`, the norm of its gradient.
    """

    value: jax.Array
    grad_norm: jax.Array


def order_of(key: jax.Array, epoch: jax.Array | int, size: int) -> jax.Array:
    """The order in which an epoch walks the examples."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), size)


def _run(
    method: Method, one: Pass, state: MethodState, examples: Examples, key: jax.Array, epochs: jax.Array
) -> tuple[MethodState, History]:
    """Walks the examples once for each of `epochs`, which number the orders drawn from `key`."""
    run_epoch = functools.partial(_epoch, method, one, examples, key)
    state, history = jax.lax.scan(run_epoch, state, epochs)
    return state, jax.tree.map(lambda x: x.reshape(epochs.shape[0] * one.updates), history)


run = jax.jit(_run, static_argnums=(0, 1))
run_in_place = jax.jit(_run, static_argnums=(0, 1), donate_argnums=2)


def _epoch(
    method: Method, one: Pass, examples: Examples, key: jax.Array, state: MethodState, epoch: jax.Array
) -> tuple[MethodState, History]:
    def train(state: MethodState, index: jax.Array | None) -> tuple[MethodState, History]:
        batch = examples.args if index is None else examples.take(index)

        def update(state: MethodState, _: Any) -> tuple[MethodState, History]:
            state, info = method.step(state, *batch)
            return state, History(info.value, info.grad_norm)

        return jax.lax.scan(update, state, length=one.inner_steps)

    if one.batch_size == examples.size:
        return train(state, None)
    order = order_of(key, epoch, examples.size)
    split = one.whole * one.batch_size
    state, history = jax.lax.scan(train, state, order[:split].reshape(one.whole, one.batch_size))
    history = jax.tree.map(jnp.ravel, history)
    if one.rest:
        state, last = train(state, order[split:])
        history = jax.tree.map(lambda *parts: jnp.concatenate(parts), history, last)
    return state, history
