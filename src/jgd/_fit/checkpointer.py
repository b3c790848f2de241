"""When a run is saved: at what the plan says is due, at its end, and when Ctrl-C interrupts it."""

import logging
import time
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import jax

from jgd._fit.checkpoint import Checkpoint
from jgd._fit.folder import OtherRunError
from jgd._fit.identity import Identity, batch_identity
from jgd._fit.processes import agreed, several
from jgd._fit.run_state import RunState
from jgd._fit.store import Snapshot, Store, snapshot_of
from jgd._methods.method import Method, MethodState

_log = logging.getLogger("jgd")

# Processes agree on the time by a message, which not every batch of a loader should wait for.
_ASK_EVERY = 16


class Checkpointer:
    """Saves a run while it goes, and finds where it stood.

    As a context it waits, at its end, for what is being written. A run that ends is saved as it ended; one that
    Ctrl-C interrupts, after the last batch that was done. That a checkpoint cannot be written is said, and the
    training goes on: what it leads to is worth more than where it could have gone on from.
    """

    def __init__(self, checkpoint: Checkpoint, identity: Identity, inner_steps: int) -> None:
        self._plan, self._inner = checkpoint, inner_steps
        self._store = Store(checkpoint.path, checkpoint.keep, identity, inner_steps)
        self._latest: RunState | None = None
        self._pending: Snapshot | None = None
        self._saved, self._when, self._asked = 0, time.monotonic(), 0

    def restore(self, state: MethodState) -> RunState | None:
        """Where the run stood, as `Store.restore` finds it."""
        self._latest = self._store.restore(state)
        if self._latest:
            self._saved = self._updates(self._latest)
        return self._latest

    def check_batches(self, method: Method, params: Any, like: Any) -> None:
        """Looks whether the loss is the run's, once there is a batch to trace it for.

        Args:
            method: the method.
            params: the parameters.
            like: the shapes and dtypes of a batch of `data`.

        Raises:
            OtherRunError: it is another.
        """
        was = self._store.identity.get("batch")
        kinds = None if was is None else batch_identity(method, params, like)["batch"]
        if was is not None and kinds is not None and _kinds(was) != _kinds(kinds):
            raise OtherRunError(
                f"`checkpoint`: {self._plan.path} holds another run, whose batches were of another structure: "
                f"{_kinds(was)}, and `data` now gives {_kinds(kinds)}. Nothing was changed; to start anew, give "
                "another folder"
            )
        self._store.know(batch_identity(method, params, like, was and was["leaves"]))

    def stop(self, at: int) -> int | float:
        """The next batch after which a checkpoint is due, from batch `at` on; infinite where time decides."""
        if self._plan.every is None:
            return float("inf")
        due = (at * self._inner // self._plan.every + 1) * self._plan.every
        return -(-due // self._inner)

    def offer(self, at: RunState) -> bool:
        """Copies what there is to save if a checkpoint is due, for `write`. Waits for nothing."""
        self._latest = at
        if not self._due(self._updates(at)):
            return False
        self._take(at)
        return True

    def end(self, at: RunState) -> None:
        """Notes where the run has ended, to be saved."""
        self._latest = at

    def write(self) -> None:
        """Hands the last copies to the store, which writes them in the background."""
        pending, self._pending = self._pending, None
        if pending:
            self._try(lambda: self._store.save(pending))

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except OSError as error:
            _log.error("%s", error)
            warnings.warn(f"{error}. The training goes on without it", RuntimeWarning, stacklevel=3)

    def _updates(self, at: RunState) -> int:
        return at.batches * self._inner + at.repeats

    def _due(self, updates: int) -> bool:
        if self._plan.every is not None:
            return updates // self._plan.every > self._saved // self._plan.every
        if several():
            self._asked += 1
            if self._asked % _ASK_EVERY:
                return False
        return bool(agreed(time.monotonic() - self._when >= self._plan.seconds))

    def _take(self, at: RunState) -> None:
        self.write()
        self._pending = snapshot_of(at)
        self._saved, self._when = self._updates(at), time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if several() and error is not None:
            self._store.release()
            return  # to wait for the others, of which one may be gone, is to wait for ever
        ended = error is None or isinstance(error, KeyboardInterrupt)
        try:
            latest = self._latest
            if ended and latest and self._updates(latest) > self._saved and _alive(latest):
                self._take(latest)
            self.write()
            self._try(self._store.wait)
        except Exception:
            if error is None:
                raise
            _log.exception("the last checkpoint could not be written to %s", self._plan.path)
        finally:
            self._store.close()


def _alive(at: RunState) -> bool:
    """Whether the state was not yet given away to the next one."""
    return not any(x.is_deleted() for x in jax.tree.leaves(at.state))


def _kinds(batch: dict[str, Any]) -> list[Any]:
    """What all batches of a run have in common: they may differ in how long they are."""
    return [batch["structure"], batch["kinds"]]
