"""One compiled update at a time: for batches that someone else makes, and for runs that someone watches."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgd._errors import is_concrete
from jgd._fit.data import Examples, splat
from jgd._fit.epochs import order_of
from jgd._fit.history import History, NonFiniteError, is_finite, joined
from jgd._fit.schedule import Length, Schedule
from jgd._methods.method import Method, MethodState, StepInfo, step_in_place

Watcher = Callable[[MethodState, StepInfo], Any]


def run_steps(
    method: Method,
    state: MethodState,
    batches: Iterable[tuple[Any, ...]],
    *,
    inner_steps: int,
    check_finite: bool,
    watchers: list[Watcher],
) -> tuple[MethodState, History]:
    """Makes `inner_steps` updates from each batch, until a watcher returns True. The state is consumed."""
    may_be_kept = check_finite or watchers or not is_concrete(state.step)
    step = Method.step if may_be_kept else step_in_place
    infos: list[History] = []
    for batch in batches:
        for _ in range(inner_steps):
            before = state
            state, info = step(method, state, *batch)
            infos.append(History(info.value, info.grad_norm))
            if check_finite and not is_finite((infos[-1], state.params)):
                raise NonFiniteError(before, _stacked(infos))
            # Every watcher sees the update: no shortcut at the first that wants to stop.
            if any([watcher(state, info) for watcher in watchers]):
                return state, _stacked(infos)
    return state, _stacked(infos)


def batches_of_examples(examples: Examples, key: jax.Array, schedule: Schedule) -> Iterator[tuple[Any, ...]]:
    """The batches that the compiled epochs make, in the same order."""
    for number, one in enumerate(schedule.passes):
        if one.batch_size == examples.size:
            yield examples.args
            continue
        order = np.asarray(_order(key, number, examples.size))
        end = one.whole * one.batch_size + one.rest
        for start in range(0, end, one.batch_size):
            yield _take(examples, order[start : min(start + one.batch_size, end)])


def batches_of_iterable(data: Iterable[Any], length: Length) -> Iterator[tuple[Any, ...]]:
    """The batches of `data`, walked once an epoch, or as often as `steps` needs.

    Raises:
        ValueError: the batches have run out.
    """
    wanted = None if length.steps is None else length.steps // length.inner_steps
    made, epoch = 0, 0
    while epoch != length.epochs and made != wanted:
        made_before = made
        for element in data:
            yield splat(element)
            made += 1
            if made == wanted:
                return
        if made == made_before:
            raise ValueError(
                f"`data` gave no batch in epoch {epoch + 1}, after {made} in all: an iterator can be walked "
                "only once. Give what starts anew each time, such as a list or a data loader, or ask for less"
            )
        epoch += 1


def _stacked(infos: list[History]) -> History:
    if not infos:
        return joined([])
    if not is_concrete(infos[-1].value):
        return jax.tree.map(lambda *scalars: jnp.stack(scalars), *infos)
    # By way of the host: to stack thousands of little device arrays is to compile as many arguments.
    return jax.tree.map(lambda *scalars: jnp.asarray(np.stack(scalars)), *jax.device_get(infos))


_order = jax.jit(order_of, static_argnums=2)
_take = jax.jit(Examples.take)
