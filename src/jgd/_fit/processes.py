"""What several processes of one program must decide alike: a collective that one of them skips hangs them all."""

from typing import Any

import jax
import numpy as np


def several() -> bool:
    """Whether this program runs in several processes."""
    return jax.process_count() > 1


def agreed(value: int) -> int:
    """What process 0 says."""
    if not several():
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def gathered(row: Any) -> np.ndarray:
    """The rows of all processes, an array each, of one shape: `(processes, *row.shape)`."""
    row = np.asarray(row)
    if not several():
        return row[None]
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(row)).reshape(jax.process_count(), *row.shape)
