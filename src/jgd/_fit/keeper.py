"""The run in its folder: orbax writes it in the background, and reads the newest that is whole."""

import json
import logging
import time
import warnings
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from jgd._errors import require
from jgd._fit.checkpoint import Checkpoint
from jgd._fit.folder import FORMAT, OtherRunError, compare, first_line, writable
from jgd._fit.history import History
from jgd._fit.processes import agreed, gathered, gathered_text, several
from jgd._fit.standing import Standing
from jgd._fit.stored import (
    Stored,
    checksums_of,
    history_checksum,
    names_of,
    state_from,
    stored,
    targets_of,
)
from jgd._methods.method import MethodState

_log = logging.getLogger("jgd")


class Pending(NamedTuple):
    """Copies on their way to the store."""

    stored: Stored
    history: History
    batches: int
    position: Any


class Keeper:
    """Saves a run while it goes, and finds where it stood.

    As a context it waits, at its end, for what is being written. A run that ends is saved as it ended; one that
    Ctrl-C interrupts, after the last batch that was done.
    """

    def __init__(self, checkpoint: Checkpoint, identity: dict[str, Any], inner_steps: int) -> None:
        self._ocp = require("orbax.checkpoint", "checkpoint")
        self._plan, self._identity, self._inner = checkpoint, identity, inner_steps
        self._path = writable(checkpoint.path)
        self._manager = self._opened()
        self._latest: Standing | None = None
        self._pending: Pending | None = None
        self._saved, self._when, self._asked = 0, time.monotonic(), 0

    def _opened(self, *, clean: bool = False) -> Any:
        """The store; `clean` removes what was half written, once it is sure whose folder this is."""
        options = self._ocp.CheckpointManagerOptions(
            preservation_policy=self._ocp.checkpoint_managers.LatestN(self._plan.keep),
            cleanup_tmp_directories=clean,
            enable_async_checkpointing=True,
        )
        return self._ocp.CheckpointManager(self._path, options=options)

    # Going on

    def restore(self, state: MethodState) -> Standing | None:
        """Where the run stood at the newest checkpoint that is whole; None if there is none at all.

        Raises:
            OtherRunError: the folder holds a run of another kind.
            ValueError: none of its checkpoints can be read.
        """
        unreadable = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            standing, error = None, None
            try:
                standing = self._read(step, state)
            except OtherRunError:
                raise
            except Exception as caught:  # of any library between here and the disk
                error = caught
            whole = gathered(error is None).all()
            if standing is None or not whole:
                unreadable.append((step, error or OSError("another process cannot read it")))
                continue
            self._set_aside(unreadable, step)
            self._reopen()
            _log.info("goes on after update %d, from %s", step, self._path / str(step))
            self._latest, self._saved = standing, step
            return standing
        if unreadable:
            step, error = unreadable[0]
            raise ValueError(
                f"`checkpoint`: no checkpoint in {self._path} can be read, the newest being that after update "
                f"{step}: {first_line(error)}. Nothing was changed; to start anew, give another folder"
            ) from error
        self._reopen()
        return None

    def _reopen(self) -> None:
        self._manager.close()
        self._manager = self._opened(clean=True)

    def _read(self, step: int, state: MethodState) -> Standing:
        run = self._manager.restore(step, args=self._ocp.args.Composite(run=self._ocp.args.JsonRestore())).run
        compare(self._path, run, self._identity, state)
        blank = np.empty(run["updates"], run["history_dtype"])
        target = {"state": targets_of(state), "history": {"value": blank, "grad_norm": blank}}
        read = self._manager.restore(
            step, args=self._ocp.args.Composite(arrays=self._ocp.args.StandardRestore(target))
        ).arrays
        history = History(**read["history"])
        restored = state_from(read["state"], state)
        same = checksums_of(restored) == run["checksums"]
        if not same or history_checksum(history) != run["history_checksum"]:
            raise ValueError("its numbers are not those that were saved")
        return Standing(restored, lambda: history, run["batches"], self._own_position(run["positions"]))

    def _own_position(self, positions: list[Any]) -> Any:
        """Where the data of this process stood."""
        if positions == positions[:1] * len(positions):
            return positions[0]
        if len(positions) != jax.process_count():
            raise OtherRunError(
                f"`checkpoint`: the run in {self._path} read its data by {len(positions)} processes, and now there "
                f"are {jax.process_count()}, which share them out otherwise. Go on with {len(positions)}"
            )
        return positions[jax.process_index()]

    def _set_aside(self, unreadable: list[tuple[int, Exception]], step: int) -> None:
        """Renames the checkpoints that cannot be read, whose numbers the run will come to again."""
        for bad, error in unreadable:
            aside = self._path / f"{bad}.unreadable"
            while aside.exists():
                aside = aside.with_name(aside.name + "-")
            if jax.process_index() == 0:
                (self._path / str(bad)).rename(aside)
            warnings.warn(
                f"the checkpoint after update {bad} in {self._path} cannot be read ({first_line(error)}); the "
                f"run goes on from the one after update {step}, and {aside.name} is left for you to look at",
                RuntimeWarning,
                stacklevel=4,
            )
        if unreadable:
            agreed(0)  # that they are renamed

    # Saving

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
        if pending is None:
            return
        updates = pending.batches * self._inner
        history = jax.tree.map(lambda x: np.asarray(x)[:updates], pending.history)
        assert self._latest is not None
        run = {
            "format": FORMAT,
            "identity": self._identity,
            "names": names_of(self._latest.state),
            "checksums": np.asarray(pending.stored.checksums).tolist(),
            "history_checksum": history_checksum(history),
            "history_dtype": history.value.dtype.name,
            "batches": pending.batches,
            "updates": updates,
            "positions": _everywhere(pending.position),
        }
        arrays = {"state": pending.stored.leaves, "history": history._asdict()}
        args = self._ocp.args.Composite(
            arrays=self._ocp.args.StandardSave(arrays), run=self._ocp.args.JsonSave(run)
        )
        try:
            self._manager.save(updates, args=args, force=True)
        except Exception as error:
            raise self._unwritten(error) from error
        self._saved = updates

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
        self._pending = Pending(
            stored(at.state), jax.tree.map(_copied, at.history()), at.batches, at.position
        )
        self._saved, self._when = at.batches * self._inner, time.monotonic()

    def _unwritten(self, error: Exception) -> OSError:
        whole = max(self._manager.all_steps(read=True), default=None)
        left = "there is none before it" if whole is None else f"that after update {whole} is whole"
        return OSError(
            f"`checkpoint`: a checkpoint could not be written to {self._path}; {left}. Make room, and the same "
            f"call goes on from there. What the system said: {first_line(error)}"
        )

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
            self._wait()
        except Exception:
            if error is None:
                raise
            _log.exception("the last checkpoint could not be written to %s", self._path)
        finally:
            self._close()

    def _wait(self) -> None:
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._unwritten(error) from error

    def _close(self) -> None:
        try:
            self._manager.close()
        except Exception as error:
            _log.debug("closing %s: %s", self._path, error)


def _everywhere(position: Any) -> list[Any]:
    """The positions of all processes; arrays have none."""
    return [None] if position is None else [json.loads(text) for text in gathered_text(json.dumps(position))]


# Processes agree on the time by a message, which not every batch of a loader should wait for.
_ASK_EVERY = 16


def _alive(at: Standing) -> bool:
    """Whether the state was not yet given away to the next one."""
    return not any(x.is_deleted() for x in jax.tree.leaves(at.state))


def _copied(x: Any) -> Any:
    return jnp.copy(x) if isinstance(x, jax.Array) else x
