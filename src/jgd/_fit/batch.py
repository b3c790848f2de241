"""What one step is given, and the common form of what gives it."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np


class Batch(NamedTuple):
    """The arguments of one step.

    Attributes:
        args: the arguments of the loss after the parameters.
        position: where what gives the batches stands after this one; None for arrays.
        weights: 0 where examples are absent; None where all are there.
        size: how many examples there are; None where that is not known.
        present: which rows are examples, where some are absent.
    """

    args: tuple[Any, ...]
    position: Any = None
    weights: jax.Array | None = None
    size: int | None = None
    present: np.ndarray | None = None


class Feed(Protocol):
    """Gives batches, and is told which were trained on."""

    def __iter__(self) -> Iterator[Batch]:
        """The batches that are left."""
        ...

    def like(self) -> Any:
        """The shapes and dtypes of a batch, of which none is lost; None where there is no batch to be had."""
        ...

    def use(self) -> None:
        """Says that the oldest batch that was given out was trained on to its end."""

    def close(self) -> None:
        """Says that no more are asked for."""
