"""When a run is saved: at what the plan says is due, at its end, and when Ctrl-C interrupts it."""

import logging
import time
from types import TracebackType
from typing import Any, Self

import jax

from jgd._fit.checkpoint import Checkpoint
from jgd._fit.processes import agreed, several
from jgd._fit.standing import Standing
from jgd._fit.store import Snapshot, Store, snapshot_of
from jgd._methods.method import MethodState

_log = logging.getLogger("jgd")

# Processes agree on the time by a message, which not every batch of a loader should wait for.
_ASK_EVERY = 16


class Keeper:
    """Saves a run while it goes, and finds where it stood.

    As a context it waits, at its end, for what is being written. A run that ends is saved as it ended; one that
    Ctrl-C interrupts, after the last batch that was done.
    """

    def __init__(self, checkpoint: Checkpoint, identity: dict[str, Any], inner_steps: int) -> None:
        self._plan, self._inner = checkpoint, inner_steps
        self._store = Store(checkpoint.path, checkpoint.keep, identity, inner_steps)
        self._latest: Standing | None = None
        self._pending: Snapshot | None = None
        self._saved, self._when, self._asked = 0, time.monotonic(), 0

    def restore(self, state: MethodState) -> Standing | None:
        """Where the run stood, as `Store.restore` finds it."""
        self._latest = self._store.restore(state)
        if self._latest:
            self._saved = self._latest.batches * self._inner
        return self._latest

    def stop(self, at: int) -> int | float:
        """The next batch after which a checkpoint is due, from batch `at` on; infinite where time decides."""
        if self._plan.every is None:
            return float("inf")
        due = (at * self._inner // self._plan.every + 1) * self._plan.every
        return -(-due // self._inner)

    def offer(self, at: Standing) -> bool:
        """Copies what there is to save if a checkpoint is due, for `write`. Waits for nothing."""
        self._latest = at
        if not self._due(at.batches * self._inner):
            return False
        self._take(at)
        return True

    def write(self) -> None:
        """Hands the last copies to the store, which writes them in the background.

        Raises:
            OSError: this checkpoint, or the one before, could not be written.
        """
        pending, self._pending = self._pending, None
        if pending:
            self._store.save(pending)

    def _due(self, updates: int) -> bool:
        if self._plan.every is not None:
            return updates // self._plan.every > self._saved // self._plan.every
        if several():
            self._asked += 1
            if self._asked % _ASK_EVERY:
                return False
        return bool(agreed(time.monotonic() - self._when >= self._plan.seconds))

    def _take(self, at: Standing) -> None:
        self.write()
        self._pending = snapshot_of(at)
        self._saved, self._when = at.batches * self._inner, time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if several() and error is not None:
            return  # to wait for the others, of which one may be gone, is to wait for ever
        ended = error is None or isinstance(error, KeyboardInterrupt)
        try:
            latest = self._latest
            if ended and latest and latest.batches * self._inner > self._saved and _alive(latest):
                self._take(latest)
            self.write()
            self._store.wait()
        except Exception:
            if error is None:
                raise
            _log.exception("the last checkpoint could not be written to %s", self._plan.path)
        finally:
            self._store.close()


def _alive(at: Standing) -> bool:
    """Whether the state was not yet given away to the next one."""
    return not any(x.is_deleted() for x in jax.tree.leaves(at.state))
