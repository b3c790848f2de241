"""`Checkpoint`: where a run is kept, how often, and how many times over."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jgd._errors import describe
from jgd._fit.schedule import count


@dataclass(frozen=True)
class Checkpoint:
    """Where `jgd.fit` keeps a run, so that the same call goes on from there after it died.

    Attributes:
        directory: a folder for this run alone, on storage that all processes share; made if it is not there. What
            else lies in it stays as it is.
        every: how many updates there are from one checkpoint to the next, at the batch after which they are
            reached. By default time decides: there is one every `seconds`.
        seconds: the time between checkpoints, where `every` is None.
        keep: how many checkpoints stay, the newest ones. With one alone, nothing is left if it is damaged.

    Raises:
        TypeError: `directory` is no path, or a number is not one.
        ValueError: `directory` is an address such as `gs://…`, or a number is out of range.

    Example:
        >>> import jgd
        >>> jgd.Checkpoint("runs/first", every=1000, keep=3).seconds
        30.0
    """

    directory: str | os.PathLike[str]
    every: int | None = None
    seconds: float = 30.0
    keep: int = 3

    def __post_init__(self) -> None:
        if not isinstance(self.directory, str | os.PathLike):
            raise TypeError(f"`directory` must be the path of a folder, got {describe(self.directory)}")
        if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:/", os.fspath(self.directory)):
            raise ValueError(
                f"`directory` must be the path of a folder, got the address {os.fspath(self.directory)!r}: a bucket "
                "must be mounted, and its path given"
            )
        if self.every is not None:
            count(self.every, "every", least=1, hint=" updates; None saves by time")
        count(self.keep, "keep", least=1)
        if (
            isinstance(self.seconds, bool)
            or not isinstance(self.seconds, int | float)
            or not self.seconds > 0
        ):
            raise ValueError(f"`seconds` must be a number above 0, got {self.seconds!r}")

    @property
    def path(self) -> Path:
        """The folder, whatever the working directory becomes."""
        return Path(self.directory).expanduser().absolute()


def checkpoint_of(checkpoint: Any) -> Checkpoint:
    """The argument of `fit`: a `Checkpoint`, or the path of a folder.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(checkpoint, Checkpoint):
        return checkpoint
    if isinstance(checkpoint, str | os.PathLike):
        return Checkpoint(checkpoint)
    raise TypeError(
        f"`checkpoint` must be the path of a folder or a `jgd.Checkpoint`, got {describe(checkpoint)}"
    )
