"""One compiled update at a time: for batches that someone else makes, and for runs that someone watches."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jgd._errors import is_concrete
from jgd._fit.data import Examples
from jgd._fit.epochs import order_of
from jgd._fit.history import History, NonFiniteError, is_finite, no_history
from jgd._fit.keeper import Keeper
from jgd._fit.progress import Report
from jgd._fit.schedule import Schedule
from jgd._fit.standing import Standing
from jgd._methods.method import Method, MethodState, StepInfo, step_in_place

_AHEAD = 8  # updates that may wait for the device


class Batch(NamedTuple):
    """The arguments of one step, and where what gives them stands after it."""

    args: tuple[Any, ...]
    position: Any = None
    weights: jax.Array | None = None  # where examples are absent


def run_steps(
    method: Method,
    start: Standing,
    batches: Iterable[Batch],
    *,
    inner_steps: int,
    check_finite: bool,
    callback: Callable[[MethodState, StepInfo], Any] | None,
    report: Report | None,
    keeper: Keeper | None,
) -> tuple[MethodState, History]:
    """Makes `inner_steps` updates from each batch, until the callback returns True. The state is consumed."""
    state, record = start.state, _Record(start)
    watched = check_finite or callback is not None
    step = Method.step if watched or not is_concrete(state.step) else step_in_place
    batches, number = iter(batches), start.batches
    following = next(batches, None)
    while following is not None:
        batch, number = following, number + 1
        for repeat in range(inner_steps):
            before = state
            state, info = step(method, state, *batch.args, weights=batch.weights)
            record.add(info)
            if check_finite and not is_finite((record.last, state.params)):
                raise NonFiniteError(before, record.result())
            if report and watched:
                report((number - 1) * inner_steps + repeat + 1, info.value)
            if callback and callback(state, info):
                return state, record.result()
        due = keeper and keeper.offer(Standing(state, record.history, number, batch.position))
        following = next(batches, None)  # made while the device is at work, before anyone waits for it
        if keeper and due:
            keeper.write()
        if report and not watched:
            report(number * inner_steps, info.value)
        record.wait()
    return state, record.result()


def batches_of_examples(
    examples: Examples, key: jax.Array, schedule: Schedule, start: int
) -> Iterator[Batch]:
    """The batches that the compiled epochs make, in the same order, from number `start` on."""
    one, order = schedule.epoch, None
    for number in range(start, schedule.batches):
        if one.batch_size == examples.size:
            yield Batch(_take(examples) if examples.sharding else examples.args)
            continue
        epoch, place = divmod(number, one.batches)
        if order is None or place == 0:
            order = np.asarray(_order(key, epoch, examples.size))
        yield Batch(_take(examples, order[place * one.batch_size : (place + 1) * one.batch_size]))


class _Record:
    """The history as it grows. Numbers stay on the device until someone asks."""

    def __init__(self, start: Standing) -> None:
        self._parts = [jax.device_get(start.history())] if start.batches else []
        self._recent: list[History] = []

    @property
    def last(self) -> History:
        """What the last update saw."""
        return self._recent[-1]

    def add(self, info: StepInfo) -> None:
        """Notes what one more update saw."""
        self._recent.append(History(info.value, info.grad_norm))

    def wait(self) -> None:
        """Waits for an update some way back: batches that run far ahead of the device fill its memory."""
        if len(self._recent) > _AHEAD and is_concrete(self.last.value):
            self._recent[-1 - _AHEAD].value.block_until_ready()

    def history(self) -> History:
        """What all updates saw, on the host."""
        if self._recent:
            # By way of the host: to stack thousands of little device arrays is to compile as many arguments.
            recent = jax.tree.map(lambda *x: np.stack(x), *jax.device_get(self._recent))
            parts = [*self._parts, recent]
            self._parts, self._recent = [jax.tree.map(lambda *x: np.concatenate(x), *parts)], []
        return self._parts[0] if self._parts else no_history()

    def result(self) -> History:
        """What all updates saw, on the device; under a transformation too."""
        if self._recent and not is_concrete(self.last.value):
            return jax.tree.map(lambda *x: jnp.stack(x), *self._recent)
        return jax.tree.map(jnp.asarray, self.history())


_order = jax.jit(order_of, static_argnums=2)
_take = jax.jit(Examples.take)
