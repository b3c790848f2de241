"""What several processes of one program must decide alike: a collective that one of them skips hangs them all."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def several() -> bool:
    """Whether this program runs in several processes."""
    return jax.process_count() > 1


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
