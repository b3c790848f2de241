"""The folder of a run: whether it can be written to, and whether the run in it is the one that is asked for."""

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import jax

from jgd._fit.identity import Identity

FORMAT = 2  # of what is said in JSON beside the arrays

_CHECKPOINT = re.compile(r"update-(\d+)-([0-9a-f]{12})")
_HALF_WRITTEN = ".orbax-checkpoint-tmp"

# How an error calls what differs. Of a digest there is nothing to be read.
_SAID = {
    "method": "the method",
    "optimizer": "the optimizer: what it keeps, what it makes of a gradient, or a number in it",
    "loss": "the loss, or `total`",
    "gradient": "the gradient: `reduce`, `derivative`, or a derivative rule in the loss",
    "batch": "the batches that `data` gives",
    "in_axes": "the method's `in_axes`",
}


class OtherRunError(ValueError):
    """The folder holds a run that this call does not go on with. Nothing in it was changed."""


def checkpoint_name(updates: int, run: str) -> str:
    """The name of a checkpoint: after how many updates, and of which run."""
    return f"update-{updates}-{run}"


def checkpoints_in(path: Path) -> list[tuple[int, str, Path]]:
    """The checkpoints that lie in a folder, the newest first: after how many updates, of which run, and where."""
    found = [(_CHECKPOINT.fullmatch(x.name), x) for x in path.iterdir() if x.is_dir()]
    return sorted(((int(m[1]), m[2], x) for m, x in found if m), reverse=True)


def half_written_in(path: Path, run: str) -> list[Path]:
    """What a run that died had begun to write."""
    begun = [(x.name.partition(_HALF_WRITTEN), x) for x in path.iterdir() if _HALF_WRITTEN in x.name]
    return [x for (name, _, _), x in begun if (m := _CHECKPOINT.fullmatch(name)) and m[2] == run]


def compare(path: Path, run: dict[str, Any], identity: Identity) -> None:
    """Looks whether the run in a folder is the one that is asked for, as far as `identity` says.

    Raises:
        OtherRunError: it is not.
    """
    if run["format"] != FORMAT:
        raise OtherRunError(
            f"`checkpoint`: {path} was written by another version of jgd, in format {run['format']}, "
            f"and this one reads format {FORMAT}"
        )
    was = run["identity"]
    differ = [part for part in identity if part in was and was[part] != identity[part]]
    if not differ:
        return
    said = [_difference(part, was[part], identity[part]) for part in differ]
    if run["jax"] != jax.__version__:
        said.append(
            f"it was written under JAX {run['jax']}, this is {jax.__version__}, which may trace otherwise"
        )
    if "start" in differ:
        said.append(
            "to go on with it, give what it began with, not what it led to, and more `epochs` or `steps`; calls that "
            "go on from one another's result need a folder each"
        )
    raise OtherRunError(
        f"`checkpoint`: {path} holds another run. {'; '.join(said)}. Nothing was changed; to start anew, give another "
        "folder or remove this one"
    )


def _difference(part: str, was: Any, now: Any) -> str:
    if part == "start":
        return _difference_at_start(was, now)
    if part in ("loss", "gradient", "optimizer"):
        return f"another is {_SAID[part]}"
    if part == "data" and _bare(was) == _bare(now):
        return "another is what `data` holds"
    return f"{_SAID.get(part, f'`{part}`')} was {_bare(was)}, is {_bare(now)}"


def _difference_at_start(was: dict[str, str], now: dict[str, str]) -> str:
    kinds_was, kinds_now = ({name: _bare(x) for name, x in leaves.items()} for leaves in (was, now))
    if kinds_was != kinds_now:
        return "it is of another model or optimizer: " + _listed(
            kinds_was, kinds_now, "`{0}` was {1}, is {2}"
        )
    return "it began with other numbers in " + _listed(was, now, "`{0}`")


def _listed(was: dict[str, str], now: dict[str, str], form: str) -> str:
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    listed = [form.format(x, was.get(x, "not there"), now.get(x, "not there")) for x in names[:5]]
    return ", ".join(listed) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _bare(value: Any) -> Any:
    """Without the digests, of which there is nothing to be read."""
    if isinstance(value, list):
        return [_bare(x) for x in value]
    if isinstance(value, str):
        return re.sub(r" [0-9a-f]{16}$", "", value)
    return value


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
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b" ")
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
