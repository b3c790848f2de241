"""A long compiled run in calls of about a tenth of a second, between which it is saved and reported."""

import time

import jax

from jgd._fit.checkpointer import Checkpointer
from jgd._fit.processes import agreed
from jgd._fit.progress import Report
from jgd._fit.run_state import RunState

# Long against the dispatch of a call, about 0.2 ms; short to someone who watches, or presses Ctrl-C.
_SECONDS = 0.1


class Dispatcher:
    """Decides how far each call goes, and does between the calls what is due.

    The device never waits for the host: what is due after a call is done once the next one runs.
    """

    def __init__(self, keeper: Checkpointer | None, report: Report | None, inner_steps: int) -> None:
        self._keeper, self._report, self._inner = keeper, report, inner_steps
        self._size, self._looked = 1, time.monotonic()
        self._last: tuple[int, jax.Array] | None = None

    def stop(self, at: int, end: int) -> int:
        """The batch before which a call from batch `at` is to stop, at most `end`."""
        stop = min(end, at + agreed(self._size))
        return int(min(stop, self._keeper.stop(at))) if self._keeper else stop

    def passed(self, at: RunState, value: jax.Array) -> None:
        """Looks at the call before the one that led to `at`, while this one runs."""
        if self._keeper:
            self._keeper.write()
            self._keeper.offer(at)
        self._look()
        self._last = at.batches, value

    def finish(self) -> None:
        """Waits for the last call."""
        self._look()

    def _look(self) -> None:
        if self._last is None:
            return
        batches, value = self._last
        value.block_until_ready()
        now = time.monotonic()
        took, self._looked = now - self._looked, now
        if took < _SECONDS / 2:
            self._size *= 2
        elif took > _SECONDS * 2:
            self._size = max(1, self._size // 2)
        if self._report:
            self._report(batches * self._inner, value)
        self._last = None
