"""One compiled update at a time: for batches that someone else makes, and for runs that someone watches."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgd._errors import describe, is_concrete
from jgd._fit.batch import Batch, Feed
from jgd._fit.checkpointer import Checkpointer
from jgd._fit.data import Examples
from jgd._fit.epochs import order_of
from jgd._fit.history import History, NonFiniteError, is_finite, no_history
from jgd._fit.progress import Report
from jgd._fit.run_state import RunState
from jgd._fit.schedule import Schedule
from jgd._methods.method import Method, MethodState, StepInfo, own_key, update

_AHEAD = 8  # updates that may wait for the device


def run_steps(
    method: Method,
    start: RunState,
    feed: Feed,
    key: jax.Array,
    *,
    inner_steps: int,
    check_finite: bool,
    callback: Callable[[MethodState, StepInfo], Any] | None,
    report: Report | None,
    keeper: Checkpointer | None,
) -> tuple[MethodState, History]:
    """Makes `inner_steps` updates from each batch, until the callback returns True. The state is consumed."""
    state, record, at = start.state, _Record(start), start
    watched = check_finite or callback is not None
    in_place = not watched and is_concrete(state.step)
    ends = _ends(callback) if callback else None
    batches = iter(feed)
    following = next(batches, None)
    while following is not None:
        batch = following
        for repeat in range(at.repeats, inner_steps):
            before = state
            own = own_key(method, key, state)
            state, info = update(method, state, batch.args, batch.weights, own, in_place=in_place)
            record.add(info)
            if check_finite and not is_finite((_values(record.last, batch), state.params)):
                raise NonFiniteError(before, record.result())
            if report and watched:
                report(at.batches * inner_steps + repeat + 1, info.value)
            if ends and ends(state, _seen(info, batch)):
                _stopped(feed, keeper, batch, at, repeat + 1, inner_steps, state, record)
                return state, record.result()
        feed.use()
        at = RunState(state, record.history, at.batches + 1, batch.position)
        due = keeper and keeper.offer(at)
        following = next(batches, None)  # made while the device is at work, before anyone waits for it
        if keeper and due:
            keeper.write()
        if report and not watched:
            report(at.batches * inner_steps, info.value)
        record.wait()
    return state, record.result()


def _stopped(
    feed: Feed,
    keeper: Checkpointer | None,
    batch: Batch,
    at: RunState,
    repeats: int,
    inner_steps: int,
    state: MethodState,
    record: "_Record",
) -> None:
    """Keeps what was trained: the batch is done, or to be gone on with where a callback stopped amid its updates."""
    if repeats == inner_steps:
        feed.use()
        at = RunState(state, record.history, at.batches + 1, batch.position)
    else:
        at = RunState(state, record.history, at.batches, at.position, repeats)
    if keeper:
        keeper.end(at)


def _ends(callback: Callable[[MethodState, StepInfo], Any]) -> Callable[[MethodState, StepInfo], bool]:
    """Whether a callback ends the training: it does by True alone. Says so once where it returns something like it."""
    said = False

    def ends(state: MethodState, info: StepInfo) -> bool:
        nonlocal said
        out = callback(state, info)
        if out is None or isinstance(out, bool | np.bool_):
            return bool(out)
        if isinstance(out, np.ndarray | jax.Array) and out.dtype == bool and out.ndim == 0:
            return bool(out)
        if not said:
            said = True
            warnings.warn(
                f"`callback` returned {describe(out)}, which does not end the training: only True does. Return True, "
                "or nothing",
                UserWarning,
                stacklevel=4,
            )
        return False

    return ends


def _seen(info: StepInfo, batch: Batch) -> StepInfo:
    """What a step saw of the examples that are there, without the copies that fill a batch up."""
    if batch.present is None or info.aux is None:
        return info
    return info._replace(aux=_rows(info.aux, batch.present))


def _values(saw: History, batch: Batch) -> Any:
    """What must be finite of what an update saw: the mean of no examples is nan, and nothing is wrong with it."""
    return saw.grad_norm if batch.size == 0 else saw


class ArrayFeed:
    """The batches that the compiled epochs make, in the same order, from number `start` on."""

    def __init__(self, examples: Examples, key: jax.Array, schedule: Schedule, start: int) -> None:
        self._examples, self._key, self._schedule, self._start = examples, key, schedule, start

    def __iter__(self) -> Iterator[Batch]:
        """The batches that are left."""
        one, examples, order = self._schedule.epoch, self._examples, None
        for number in range(self._start, self._schedule.batches):
            if one.batch_size == examples.size:
                yield Batch(_take(examples) if examples.sharding else examples.args)
                continue
            epoch, place = divmod(number, one.batches)
            if order is None or place == 0:
                order = np.asarray(_order(self._key, epoch, examples.size))
            yield Batch(_take(examples, order[place * one.batch_size : (place + 1) * one.batch_size]))

    def like(self) -> Any:
        """The shapes and dtypes of a whole batch."""
        one, examples = self._schedule.epoch, self._examples
        index = None if one.batch_size == examples.size else np.arange(one.batch_size)
        return jax.eval_shape(Examples.take, examples, index)

    def use(self) -> None:
        """Nothing waits for it: the batches of arrays are made anew."""

    def close(self) -> None:
        """Nothing waits for it."""


class _Record:
    """The history as it grows. Numbers stay on the device until someone asks."""

    def __init__(self, start: RunState) -> None:
        self._parts = [jax.device_get(start.history())] if start.batches or start.repeats else []
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


@jax.jit
def _rows(tree: Any, index: np.ndarray) -> Any:
    return jax.tree.map(lambda x: jnp.take(x, index, axis=0), tree)
