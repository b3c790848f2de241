"""The checkpoints in a folder: orbax writes them in the background, and reads the newest that is whole."""

import json
import logging
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jgd._errors import require
from jgd._fit.folder import FORMAT, OtherRunError, compare, first_line, writable
from jgd._fit.history import History
from jgd._fit.leaves import (
    Stored,
    checksums_of,
    history_checksum,
    names_of,
    state_from,
    stored,
    targets_of,
)
from jgd._fit.processes import agreed, gathered, gathered_text
from jgd._fit.standing import Standing
from jgd._methods.method import MethodState

_log = logging.getLogger("jgd")


class Snapshot(NamedTuple):
    """Copies of where a run stood, on their way to the store."""

    stored: Stored
    names: dict[str, str]
    history: History  # may have room for more
    batches: int
    position: Any


def snapshot_of(at: Standing) -> Snapshot:
    """Copies what there is to save. Waits for nothing."""
    history = jax.tree.map(_copied, at.history())
    return Snapshot(stored(at.state), names_of(at.state), history, at.batches, at.position)


class Store:
    """The newest checkpoints of one run, in a folder of its own."""

    def __init__(self, path: Path, keep: int, identity: dict[str, Any], inner_steps: int) -> None:
        self._ocp = require("orbax.checkpoint", "checkpoint")
        self._keep, self._identity, self._inner = keep, identity, inner_steps
        self._path = writable(path)
        self._manager = self._opened()

    def _opened(self, *, clean: bool = False) -> Any:
        """Orbax at work on the folder; `clean` removes what was half written, once it is sure whose folder this is."""
        options = self._ocp.CheckpointManagerOptions(
            preservation_policy=self._ocp.checkpoint_managers.LatestN(self._keep),
            cleanup_tmp_directories=clean,
            enable_async_checkpointing=True,
        )
        return self._ocp.CheckpointManager(self._path, options=options)

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
                stacklevel=5,
            )
        if unreadable:
            agreed(0)  # that they are renamed

    def save(self, snapshot: Snapshot) -> None:
        """Has a checkpoint written in the background.

        Raises:
            OSError: it, or the one before, could not be written.
        """
        updates = snapshot.batches * self._inner
        history = jax.tree.map(lambda x: np.asarray(x)[:updates], snapshot.history)
        run = {
            "format": FORMAT,
            "identity": self._identity,
            "names": snapshot.names,
            "checksums": np.asarray(snapshot.stored.checksums).tolist(),
            "history_checksum": history_checksum(history),
            "history_dtype": history.value.dtype.name,
            "batches": snapshot.batches,
            "updates": updates,
            "positions": _everywhere(snapshot.position),
        }
        arrays = {"state": snapshot.stored.leaves, "history": history._asdict()}
        args = self._ocp.args.Composite(
            arrays=self._ocp.args.StandardSave(arrays), run=self._ocp.args.JsonSave(run)
        )
        try:
            self._manager.save(updates, args=args, force=True)
        except Exception as error:
            raise self._unwritten(error) from error

    def wait(self) -> None:
        """Waits for what is being written.

        Raises:
            OSError: it could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._unwritten(error) from error

    def close(self) -> None:
        """Ends the work in the background; that it fails is nothing to stop for."""
        try:
            self._manager.close()
        except Exception as error:
            _log.debug("closing %s: %s", self._path, error)

    def _unwritten(self, error: Exception) -> OSError:
        whole = max(self._manager.all_steps(read=True), default=None)
        left = "there is none before it" if whole is None else f"that after update {whole} is whole"
        return OSError(
            f"`checkpoint`: a checkpoint could not be written to {self._path}; {left}. Make room, and the same "
            f"call goes on from there. What the system said: {first_line(error)}"
        )


def _everywhere(position: Any) -> list[Any]:
    """The positions of all processes; arrays have none."""
    return [None] if position is None else [json.loads(text) for text in gathered_text(json.dumps(position))]


def _copied(x: Any) -> Any:
    return jnp.copy(x) if isinstance(x, jax.Array) else x
