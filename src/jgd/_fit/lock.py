"""One run in one folder: a lock that ends with the process that holds it."""

import os
import threading
from pathlib import Path

try:
    import fcntl

    def _lock(file: int) -> None:
        # By process and not by handle: a loader's worker, forked with the handle, outlives a kill.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

except ImportError:
    import msvcrt

    def _lock(file: int) -> None:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore


NAME = "jgd.lock"

# A process that asks again for a lock of its own is given it, so its threads look here.
_held: set[tuple[int, int]] = set()
_guard = threading.Lock()


class Lock:
    """Held from when it is made until `release`.

    Raises:
        BlockingIOError: another run holds it, in this process or in another.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / NAME
        with _guard:
            # Closing any handle to the file would give up the lock on it, so none is opened that is held here.
            if path.exists() and self._id(os.stat(path)) in _held:
                raise self._taken(folder)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
            try:
                _lock(self._file)
            except OSError as error:
                os.close(self._file)
                if isinstance(error, BlockingIOError | PermissionError):
                    raise self._taken(folder) from error
                raise
            self._key = self._id(os.fstat(self._file))
            _held.add(self._key)

    def release(self) -> None:
        """Lets another run have the folder."""
        with _guard:
            os.close(self._file)
            _held.discard(self._key)

    @staticmethod
    def _id(stat: os.stat_result) -> tuple[int, int]:
        return stat.st_dev, stat.st_ino

    @staticmethod
    def _taken(folder: Path) -> BlockingIOError:
        return BlockingIOError(
            f"`checkpoint`: another run is at work in {folder}; give each run a folder of its own, or wait for it"
        )


def _forget_held() -> None:
    """A child does not inherit the locks of the process that forked it."""
    global _guard
    _guard = threading.Lock()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_held)
