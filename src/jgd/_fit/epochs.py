"""Epochs as compiled scans over arrays: no dispatch between updates, and the state updated in place."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgd._fit.data import Examples
from jgd._fit.history import History, check_history, joined
from jgd._fit.schedule import Pass, Schedule
from jgd._methods.method import Method, MethodState


def run_epochs(
    method: Method,
    state: MethodState,
    examples: Examples,
    key: jax.Array,
    schedule: Schedule,
    *,
    check_finite: bool,
) -> tuple[MethodState, History]:
    """Trains by a schedule. The state is consumed.

    Whole epochs are one compiled call, and the part of one that is left another; `check_finite` makes a call
    of each epoch, to look at its history, and keeps the state before it.
    """
    numbers = np.arange(schedule.epochs + 1)
    calls = np.split(numbers[:-1], schedule.epochs if check_finite else 1) if schedule.epochs else []
    pieces = [(schedule.epoch, call) for call in calls]
    if schedule.last:
        pieces.append((schedule.last, numbers[-1:]))
    parts: list[History] = []
    for one, epochs in pieces:
        run = _run if check_finite else _run_in_place
        before = state
        with warnings.catch_warnings():
            # Under `vmap` the state may be the same for all runs, and then has no room for their states.
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")
            state, history = run(method, one, state, examples, key, epochs)
        parts.append(history)
        if check_finite:
            check_history(before, state, parts)
    return state, joined(parts)


def order_of(key: jax.Array, epoch: jax.Array | int, size: int) -> jax.Array:
    """The order in which an epoch walks the examples."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), size)


def _epochs(
    method: Method, one: Pass, state: MethodState, examples: Examples, key: jax.Array, epochs: jax.Array
) -> tuple[MethodState, History]:
    """Walks the examples once for each of `epochs`, numbers that draw an order from `key`."""
    state, history = jax.lax.scan(functools.partial(_epoch, method, one, examples, key), state, epochs)
    return state, jax.tree.map(lambda x: x.reshape(epochs.shape[0] * one.updates), history)


_run = jax.jit(_epochs, static_argnums=(0, 1))
_run_in_place = jax.jit(_epochs, static_argnums=(0, 1), donate_argnums=2)


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
        history = joined([history, last])
    return state, history
