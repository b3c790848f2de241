"""Epochs as compiled loops over arrays: no dispatch between updates, and the state updated in place."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgd._errors import is_concrete
from jgd._fit.data import Examples
from jgd._fit.dispatcher import Dispatcher
from jgd._fit.history import History, check_history
from jgd._fit.run_state import RunState
from jgd._fit.schedule import Pass, Schedule
from jgd._methods.method import Method, MethodState, own_key


def run_epochs(
    method: Method,
    start: RunState,
    examples: Examples,
    key: jax.Array,
    schedule: Schedule,
    *,
    check_finite: bool,
    chunks: Dispatcher | None = None,
) -> tuple[MethodState, History]:
    """Trains by a schedule, from where `start` stands. Its state is consumed.

    All updates are one compiled call; `check_finite` makes a call of each epoch, to look at its history, and
    keeps the state before it. With `chunks`, who saves and reports, calls are shorter. Where a call begins and
    ends is data of one compiled loop, so that the numbers are the same however the updates are cut into calls.
    """
    one, at = schedule.epoch, start
    if not all(is_concrete(x) for x in jax.tree.leaves((start.state, examples, key))):
        history, _ = _buffer(method, one, start, examples, key, schedule.updates)
        return _run_all(method, schedule, (start.state, history), examples, key)
    # Room for more than is asked for, so that runs of other lengths are the same program.
    room = max(_ROOM, 1 << (schedule.updates - 1).bit_length())
    history, captures = _buffer(method, one, start, examples, key, room)
    so_far = functools.partial(_first, schedule.updates)
    # Where the method itself holds what a transformation maps over, the state changes its shape under it.
    run = _run if check_finite or captures else _run_in_place
    while at.batches < schedule.batches:
        stop = schedule.batches
        if check_finite:
            stop = min(stop, (at.batches // one.batches + 1) * one.batches)
        if chunks:
            stop = chunks.stop(at.batches, stop)
        (state, history), value = run(method, one, (at.state, history), examples, key, at.batches, stop)
        before, at = at, RunState(state, functools.partial(so_far, history), stop)
        if check_finite:
            made = [batches * one.inner_steps for batches in (before.batches, stop)]
            check_history(before.state, state, history, *made)
        if chunks:
            chunks.passed(at, value)
    if chunks:
        chunks.finish()
    return at.state, jax.device_put(so_far(history))


def order_of(key: jax.Array, epoch: jax.Array | int, size: int) -> jax.Array:
    """The order in which an epoch walks the examples."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), size)


_ROOM = 1024  # updates


def _first(updates: int, history: History) -> History:
    """What the first updates saw; on the host, or to cut it out would be one more program for each length."""
    return jax.tree.map(lambda x: np.asarray(x)[:updates] if is_concrete(x) else x[:updates], history)


Carry = tuple[MethodState, History]


def _span(
    method: Method,
    one: Pass,
    carry: Carry,
    examples: Examples,
    key: jax.Array,
    start: jax.Array,
    stop: jax.Array,
) -> tuple[Carry, jax.Array]:
    """The batches from `start` up to `stop`, counted over all epochs, and the value that the last one saw."""

    def epoch(number: jax.Array, carry: Carry) -> Carry:
        first = number * one.batches
        low, high = jnp.maximum(start - first, 0), jnp.minimum(stop - first, one.batches)
        return _epoch(method, one, examples, key, carry, number, low, high)

    carry = jax.lax.fori_loop(start // one.batches, -(-stop // one.batches), epoch, carry)
    return carry, carry[1].value[stop * one.inner_steps - 1]


_run = jax.jit(_span, static_argnums=(0, 1))
_run_in_place = jax.jit(_span, static_argnums=(0, 1), donate_argnums=2)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_all(
    method: Method, schedule: Schedule, carry: Carry, examples: Examples, key: jax.Array
) -> tuple[MethodState, History]:
    """A whole run under a transformation, where all bounds are fixed: JAX can then differentiate it too."""
    one = schedule.epoch
    walk = functools.partial(_epoch, method, one, examples, key)
    epochs, rest = divmod(schedule.batches, one.batches)
    if epochs:
        carry = jax.lax.fori_loop(0, epochs, lambda number, carry: walk(carry, number, 0, one.batches), carry)
    return walk(carry, epochs, 0, rest) if rest else carry


def _epoch(
    method: Method,
    one: Pass,
    examples: Examples,
    key: jax.Array,
    carry: Carry,
    number: jax.Array | int,
    low: jax.Array | int,
    high: jax.Array | int,
) -> Carry:
    """The batches of one epoch from `low` up to `high`; fixed bounds are ints."""

    def train(carry: Carry, place: jax.Array | int, batch: tuple[Any, ...]) -> Carry:
        first = (number * one.batches + place) * one.inner_steps

        def update(repeat: jax.Array, carry: Carry) -> Carry:
            state, history = carry
            state, info = method.step(state, *batch, key=own_key(method, key, state))
            saw = History(info.value, info.grad_norm)
            return state, jax.tree.map(lambda all, x: all.at[first + repeat].set(x), history, saw)

        return jax.lax.fori_loop(0, one.inner_steps, update, carry)

    if one.batch_size == examples.size:
        return train(carry, 0, examples.take())
    order = order_of(key, number, examples.size)

    def whole(place: jax.Array, carry: Carry) -> Carry:
        index = jax.lax.dynamic_slice_in_dim(order, place * one.batch_size, one.batch_size)
        return train(carry, place, examples.take(index))

    def rest(carry: Carry) -> Carry:
        return train(carry, one.whole, examples.take(order[one.whole * one.batch_size :]))

    fixed = isinstance(high, int)
    carry = jax.lax.fori_loop(
        low, min(high, one.whole) if fixed else jnp.minimum(high, one.whole), whole, carry
    )
    if not one.rest:
        return carry
    if fixed:
        return rest(carry) if high > one.whole else carry
    return jax.lax.cond(high > one.whole, rest, lambda carry: carry, carry)


def _buffer(
    method: Method, one: Pass, start: RunState, examples: Examples, key: jax.Array, updates: int
) -> tuple[History, bool]:
    """Room for the history of all updates, those made already filled in; and whether the method holds tracers."""

    def saw(state: MethodState, examples: Examples) -> History:
        index = None if one.batch_size == examples.size else jnp.arange(one.batch_size)
        _, info = method.step(state, *examples.take(index), key=own_key(method, key, state))
        return History(info.value, info.grad_norm)

    traced, like = jax.make_jaxpr(saw, return_shape=True)(start.state, examples)
    captures = not all(is_concrete(x) for x in traced.consts)
    made = start.batches * one.inner_steps
    blank = jax.tree.map(lambda x: jnp.zeros(updates, x.dtype), like)
    if made:
        blank = jax.tree.map(lambda all, so_far: all.at[:made].set(so_far[:made]), blank, start.history())
    return blank, captures
