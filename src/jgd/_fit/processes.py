"""What several processes of one program must decide alike: a collective that one of them skips hangs them all."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def several() -> bool:
    """Whether this program runs in several processes."""
    return jax.process_count() > 1


@contextmanager
def lost_processes_named() -> Iterator[None]:
    """Says what it means when a collective fails: the others have stopped, and so must this one.

    Raises:
        RuntimeError: another process cannot be reached any more.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not several():
            raise
        raise RuntimeError(
            f"process {jax.process_index()} of {jax.process_count()} stops, as another process of this run has "
            "died or cannot be reached: look at what that one said last, and start all of them again; with "
            f"`checkpoint` they go on from the newest one. {str(error).splitlines()[0][:300]}"
        ) from error


def agreed(value: int) -> int:
    """What process 0 says."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value))) if several() else value


def gathered(row: Any) -> np.ndarray:
    """The rows of all processes, one array each, of a common shape: `(processes, *shape)`."""
    row = np.asarray(row)
    if not several():
        return row[None]
    return np.asarray(multihost_utils.process_allgather(row)).reshape(-1, *row.shape)


def gathered_text(text: str) -> list[str]:
    """The texts of all processes."""
    raw = np.frombuffer(text.encode(), np.uint8)
    sizes = gathered(np.int32(raw.size))
    rows = gathered(np.pad(raw, (0, int(sizes.max()) - raw.size)))
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]
