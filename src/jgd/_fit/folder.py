"""The folder of a run: whether it can be written to, and whether the run in it is the one that is asked for."""

import os
import tempfile
from pathlib import Path
from typing import Any

from jgd._fit.leaves import names_of
from jgd._methods.method import MethodState

FORMAT = 1  # of what is said in JSON beside the arrays


class OtherRunError(ValueError):
    """The folder holds a run that this call does not go on with. Nothing in it was changed."""


def compare(path: Path, run: dict[str, Any], identity: dict[str, Any], state: MethodState) -> None:
    """Looks whether the run in a folder is the one that is asked for.

    Raises:
        OtherRunError: it is not.
    """
    if run["format"] != FORMAT:
        raise OtherRunError(
            f"`checkpoint`: {path} was written by another version of jgd, in format {run['format']}, "
            f"and this one reads format {FORMAT}"
        )
    for what, was in run["identity"].items():
        if was != (now := identity.get(what)):
            raise OtherRunError(
                f"`checkpoint`: {path} holds another run, with `{what}` {was} where this one has "
                f"{now}. Nothing was changed; give each run a folder of its own"
            )
    was, now = run["names"], names_of(state)
    if was != now:
        paths = [path for path in {**was, **now} if was.get(path) != now.get(path)]
        differ = [f"`{p}` was {was.get(p, 'not there')}, is {now.get(p, 'not there')}" for p in paths[:5]]
        more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
        raise OtherRunError(
            f"`checkpoint`: {path} holds the state of another model or optimizer: {'; '.join(differ)}"
            f"{more}. Nothing was changed; give each run a folder of its own"
        )


def first_line(error: BaseException) -> str:
    """What went wrong, without the store's account of how it was set up."""
    text = (str(error).strip().splitlines() or [""])[0].split(" [tensorstore_spec")[0]
    if len(text) > 320:
        text = f"{text[:120]} … {text[-200:]}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def writable(path: Path) -> Path:
    """The folder, made if need be.

    Raises:
        NotADirectoryError: it, or a part of its path, is a file.
        PermissionError: nothing can be written there.
        OSError: whatever else is in the way.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            f"`checkpoint` must be a folder, or a path where one can be made, got {path}, of which a part is a file"
        ) from error
    except OSError as error:
        raise type(error)(
            error.errno,
            f"`checkpoint`: nothing can be written to the folder ({os.strerror(error.errno or 0)})",
            str(path),
        ) from error
    return path
