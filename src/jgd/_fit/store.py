"""The checkpoints in a folder: orbax writes their arrays in the background, and the newest that is whole is read."""

import json
import logging
import shutil
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jgd._errors import require
from jgd._fit import manifest
from jgd._fit.folder import (
    FORMAT,
    OtherRunError,
    checkpoint_name,
    checkpoints_in,
    compare,
    first_line,
    half_written_in,
    writable,
)
from jgd._fit.history import History
from jgd._fit.identity import Identity, name_of
from jgd._fit.leaves import Stored, checksums_of, history_checksum, state_from, stored, targets_of
from jgd._fit.lock import Lock
from jgd._fit.position import Position
from jgd._fit.processes import agreed, gathered, gathered_text
from jgd._fit.run_state import RunState
from jgd._methods.method import MethodState

_log = logging.getLogger("jgd")


class Snapshot(NamedTuple):
    """Copies of where a run stood, on their way to the store."""

    stored: Stored
    history: History  # may have room for more
    at: RunState


def snapshot_of(at: RunState) -> Snapshot:
    """Copies what there is to save. Waits for nothing."""
    history = jax.tree.map(_copied, at.history())
    return Snapshot(stored(at.state), history, at)


class Store:
    """The newest checkpoints of one run, in a folder that no other run uses at the same time.

    Nothing is touched but what bears the run's own name, which follows from its identity.
    """

    def __init__(self, path: Path, keep: int, identity: Identity, inner_steps: int) -> None:
        self._ocp = require("orbax.checkpoint", "checkpoint")
        self._keep, self.identity, self._inner = keep, identity, inner_steps
        self._path, self._name = writable(path), name_of(identity)
        self._lock, self._jax = None, jax.__version__
        self._writer: Any = None
        self._kept: list[Path] = []  # the newest last
        error = None
        if jax.process_index() == 0:
            try:
                self._lock = Lock(self._path)
            except OSError as caught:
                error = caught
        if agreed(int(error is not None)):
            raise error or OSError(f"`checkpoint`: process 0 could not take the lock in {self._path}")

    def restore(self, state: MethodState) -> RunState | None:
        """Where the run stood at the newest checkpoint that is whole; None if there is none at all.

        Raises:
            OtherRunError: the folder holds a run of another kind.
            ValueError: none of its checkpoints can be read.
        """
        unreadable: list[tuple[Path, Exception]] = []
        found = checkpoints_in(self._path)
        self._refuse_others([path for _, name, path in found if name != self._name])
        own = [path for _, name, path in found if name == self._name]
        for path in own:
            standing, error = None, None
            try:
                standing = self._read(path, state)
            except OtherRunError:
                raise
            except Exception as caught:  # of any library between here and the disk
                error = caught
            whole = gathered(error is None).all()
            if standing is None or not whole:
                unreadable.append((path, error or OSError("another process cannot read it")))
                continue
            for bad, error in unreadable:
                warnings.warn(
                    f"the checkpoint {bad} cannot be read ({first_line(error)}); the run goes on from {path.name}, "
                    "and the other is left for you to look at",
                    RuntimeWarning,
                    stacklevel=5,
                )
            self._kept = own[own.index(path) :][::-1]
            updates = standing.batches * self._inner + standing.repeats
            _log.info("goes on after update %d, from %s", updates, path)
            return standing
        if unreadable:
            path, error = unreadable[0]
            raise ValueError(
                f"`checkpoint`: no checkpoint in {self._path} can be read, the newest being {path.name}: "
                f"{first_line(error)}. Nothing was changed; to start anew, give another folder"
            ) from error
        return None

    def know(self, part: Identity) -> None:
        """Adds what makes the run the run that it is, known by now.

        Raises:
            OtherRunError: the run that was restored is another.
        """
        compare(self._path, {"format": FORMAT, "jax": self._jax, "identity": self.identity}, part)
        self.identity = self.identity | part

    def _refuse_others(self, others: list[Path]) -> None:
        error: Exception | None = None
        for path in others:
            try:
                compare(self._path, manifest.read(path), self.identity)
            except OtherRunError:
                raise
            except (OSError, ValueError, KeyError) as caught:
                error = caught
        if others:
            raise OtherRunError(
                f"`checkpoint`: {self._path} holds another run, of which {others[0].name} cannot be read. Nothing was "
                "changed; to start anew, give another folder"
            ) from error

    def _read(self, path: Path, state: MethodState) -> RunState:
        run = manifest.read(path)
        compare(self._path, run, self.identity)
        if jax.process_index() == 0:
            manifest.check_files(path)
        blank = np.empty(run["updates"], run["history_dtype"])
        target = {"state": targets_of(state), "history": {"value": blank, "grad_norm": blank}}
        # By the handler itself: a checkpointer reads more files, which it writes after the manifest.
        handler = self._ocp.StandardCheckpointHandler()
        try:
            read = handler.restore(
                require("etils.epath", "checkpoint").Path(path), args=self._ocp.args.StandardRestore(target)
            )
        finally:
            handler.close()
        history = History(**read["history"])
        restored = state_from(read["state"], state)
        same = checksums_of(restored) == run["checksums"]
        if not same or history_checksum(history) != run["history_checksum"]:
            raise ValueError("its numbers are not those that were saved")
        position = self._own_position(run["positions"])
        self.identity, self._jax = run["identity"] | self.identity, run["jax"]
        return RunState(
            restored, lambda: history, run["batches"], position and Position(*position), run["repeats"]
        )

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

    def save(self, snapshot: Snapshot) -> None:
        """Has a checkpoint written in the background.

        Raises:
            OSError: it, or the one before, could not be written.
        """
        self.wait()
        at, position = snapshot.at, snapshot.at.position
        if position is not None and isinstance(position.state, Exception):
            raise OSError(f"`checkpoint`: the loader's position cannot be kept: {position.state}")
        updates = at.batches * self._inner + at.repeats
        history = jax.tree.map(lambda x: np.asarray(x)[:updates], snapshot.history)
        run = {
            "format": FORMAT,
            "jax": jax.__version__,
            "identity": self.identity,
            "checksums": np.asarray(snapshot.stored.checksums).tolist(),
            "history_checksum": history_checksum(history),
            "history_dtype": history.value.dtype.name,
            "batches": at.batches,
            "repeats": at.repeats,
            "updates": updates,
            "positions": _everywhere(position),
        }
        arrays = {"state": snapshot.stored.leaves, "history": history._asdict()}
        try:
            path = self._free(updates)
            self._writer = self._writer_of(path, run)
            self._writer.save(path, args=self._ocp.args.StandardSave(arrays))
            self._kept.append(path)
        except Exception as error:
            raise self._unwritten(error) from error

    def _writer_of(self, path: Path, run: dict[str, Any]) -> Any:
        """What writes one checkpoint: the manifest is its last file, before it gets its name."""

        def finish() -> None:
            (begun,) = path.parent.glob(f"{path.name}.orbax-checkpoint-tmp*")
            manifest.write(begun, run)

        options = self._ocp.options.AsyncOptions(post_finalization_callback=finish)
        return self._ocp.AsyncCheckpointer(self._ocp.StandardCheckpointHandler(), async_options=options)

    def _free(self, updates: int) -> Path:
        """Where a checkpoint goes. A damaged one that is in its way steps aside, and what was half written goes."""
        path = self._path / checkpoint_name(updates, self._name)
        if jax.process_index() == 0:
            for begun in half_written_in(self._path, self._name):
                _discard(begun)
            if path.exists():
                aside = path.with_name(f"{path.name}.unreadable")
                while aside.exists():
                    aside = aside.with_name(aside.name + "-")
                path.rename(aside)
        agreed(0)
        return path

    def wait(self) -> None:
        """Waits for what is being written, and lets the oldest go.

        Raises:
            OSError: it could not be written.
        """
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        try:
            writer.wait_until_finished()
        except Exception as error:
            self._kept.pop()
            raise self._unwritten(error) from error
        finally:
            self._close(writer)
        while len(self._kept) > self._keep:
            oldest = self._kept.pop(0)
            if jax.process_index() == 0:
                shutil.rmtree(oldest, ignore_errors=True)

    def close(self) -> None:
        """Ends the work in the background; that it fails is nothing to stop for."""
        if self._writer is not None:
            self._close(self._writer)
        self.release()

    def release(self) -> None:
        """Lets another run have the folder, whatever is still being written."""
        if self._lock is not None:
            self._lock.release()

    def _close(self, writer: Any) -> None:
        try:
            writer.close()
        except Exception as error:
            _log.debug("closing %s: %s", self._path, error)

    def _unwritten(self, error: Exception) -> OSError:
        left = f"{self._kept[-1].name} is whole" if self._kept else "there is none before it"
        return OSError(
            f"`checkpoint`: a checkpoint could not be written to {self._path}; {left}. Make room, and the same "
            f"call goes on from there. What the system said: {first_line(error)}"
        )


def _discard(begun: Path) -> None:
    """Removes what was half written. Threads of a write that failed may still be adding to it: what they leave
    goes before the next write."""
    for pause in (0.0, 0.1, 0.4):
        time.sleep(pause)
        shutil.rmtree(begun, ignore_errors=True)
        if not begun.exists():
            return
    _log.info("%s is left for the next write to remove", begun)


def _everywhere(position: Position | None) -> list[Any]:
    """The positions of all processes; arrays have none."""
    return [None] if position is None else [json.loads(x) for x in gathered_text(json.dumps(position))]


def _copied(x: Any) -> Any:
    return jnp.copy(x) if isinstance(x, jax.Array) else x
