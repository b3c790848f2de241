"""One compiled update at a time: for batches that someone else makes, and for runs that someone watches."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgd._errors import is_concrete
from jgd._fit.data import Examples, splat
from jgd._fit.epochs import History, order_of
from jgd._fit.schedule import Length, Pass
from jgd._methods.method import Method, MethodState, StepInfo


class NonFiniteError(FloatingPointError):
    """An update met a value or a gradient that is not finite.

    Attributes:
        state: the last state known to be good.
        history: what the updates saw, up to and with the one that failed.
    """

    def __init__(self, state: MethodState, history: History) -> None:
        value, norm = float(history.value[-1]), float(history.grad_norm[-1])
        super().__init__(
            f"update {history.value.shape[0]} met a value of {value:g} and a gradient norm of {norm:g}; lower the "
            "learning rate, clip the gradients, or look at the batch. The error's `.state` is the last state known "
            "to be good, `.history` what led here"
        )
        self.state, self.history = state, history


def batches_of_examples(
    examples: Examples, key: jax.Array, epoch: Pass, epochs: int, last: Pass | None
) -> Iterator[tuple[Any, ...]]:
    """The batches that the compiled epochs make, in the same order."""
    for number in range(epochs + (last is not None)):
        one = last if last is not None and number == epochs else epoch
        if one.batch_size == examples.size:
            yield examples.args
            continue
        order = np.asarray(_order(key, number, examples.size))
        starts = range(0, one.whole * one.batch_size + one.rest, one.batch_size)
        for start in starts:
            stop = min(start + one.batch_size, examples.size)
            yield _take(examples, order[start:stop])


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
                f"`data` gave no batch in epoch {epoch + 1}, after {made} batches in all: an iterator can be walked "
                "only once. Give what starts anew each time, such as a list or a data loader, or ask for less"
            )
        epoch += 1


def run_steps(
    method: Method,
    state: MethodState,
    batches: Iterable[tuple[Any, ...]],
    *,
    inner_steps: int,
    check_finite: bool,
    watchers: list[Callable[[MethodState, StepInfo], Any]],
) -> tuple[MethodState, History]:
    """Makes `inner_steps` updates from each batch; a watcher that returns True ends it."""
    infos: list[History] = []
    for batch in batches:
        for _ in range(inner_steps):
            before = state
            state, info = method.step(state, *batch)
            infos.append(History(info.value, info.grad_norm))
            if check_finite and not (np.isfinite(info.value) and np.isfinite(info.grad_norm)):
                raise NonFiniteError(before, _stacked(infos))
            # Every watcher sees the update, so no shortcut at the first that wants to stop.
            if any([watcher(state, info) for watcher in watchers]):
                return state, _stacked(infos)
    return state, _stacked(infos)


def _stacked(infos: list[History]) -> History:
    if not infos:
        return History(jnp.zeros(0), jnp.zeros(0))
    if not is_concrete(infos[-1].value):
        return jax.tree.map(lambda *parts: jnp.stack(parts), *infos)
    # By way of the host: a stack of thousands of little device arrays would be a program with as many arguments.
    values, norms = zip(*jax.device_get(infos), strict=True)
    return History(jnp.asarray(np.stack(values)), jnp.asarray(np.stack(norms)))


_order = jax.jit(order_of, static_argnums=2)
_take = jax.jit(Examples.take)
