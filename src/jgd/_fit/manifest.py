"""What is said in JSON beside the arrays of a checkpoint, and of every file in it what it must read."""

import hashlib
import json
from pathlib import Path
from typing import Any

NAME = "jgd.json"

# Written by orbax once the manifest is, and not read: whether a checkpoint is whole, the manifest says.
_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")


class DamagedError(ValueError):
    """A checkpoint is not what was written."""


def write(folder: Path, run: dict[str, Any]) -> None:
    """Writes the manifest of a checkpoint whose other files are written: what the run is, and the files' digests."""
    files = {str(path.relative_to(folder)): _digest(path.read_bytes()) for path in _files(folder)}
    text = json.dumps({"run": run, "files": files})
    with open(folder / NAME, "w") as file:
        file.write(f"{_digest(text.encode())}\n{text}")


def read(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of the run.

    Raises:
        DamagedError: it is not what was written.
        OSError: it cannot be read.
    """
    return _read(folder)["run"]


def check_files(folder: Path) -> None:
    """Looks whether every file of a checkpoint is as it was written.

    Raises:
        DamagedError: one is not.
        OSError: one is missing, or cannot be read.
    """
    files = _read(folder)["files"]
    for name, digest in files.items():
        if _digest((folder / name).read_bytes()) != digest:
            raise DamagedError(f"its file {name} is not what was written")


def _read(folder: Path) -> dict[str, Any]:
    digest, _, text = (folder / NAME).read_bytes().partition(b"\n")
    if digest != _digest(text).encode():
        raise DamagedError(f"its file {NAME} is not what was written")
    return json.loads(text)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (NAME, *_LATER))


def _digest(raw: bytes) -> str:
    return hashlib.blake2b(raw, digest_size=16).hexdigest()
