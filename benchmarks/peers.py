"""The PyTorch peers: makes their environment where it is not there, and runs `torch_peers.py` in it."""

import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "peers.txt"
ENVIRONMENT = HERE / ".venv-torch"
MODELS = ("mlp", "cnn", "transformer")
METHODS = ("torch.func", "Opacus hooks", "Opacus ghost", "BackPACK")


def measure(models: list[str], *, repeats: int, seconds: float, threads: int, small: bool) -> dict[str, Any]:
    """The peers' environment, measurements, and what is missing and why: all of it, where they cannot be had."""
    models = [name for name in models if name in MODELS]
    if not models:
        return {"environment": {}, "measurements": [], "missing": []}
    try:
        python = prepared()
        options = ["--repeats", repeats, "--seconds", seconds, "--threads", threads, "--models", *models]
        return json.loads(
            _run([python, HERE / "torch_peers.py", *options, *["--small"] * small]).splitlines()[-1]
        )
    except (OSError, RuntimeError, ValueError) as error:
        missing = [
            {"model": model, "quantity": quantity, "method": method, "why": str(error)}
            for model in models
            for method in METHODS
            for quantity in ("norms", "clipped_sum")
        ]
        return {"environment": {}, "measurements": [], "missing": missing}


def prepared(folder: Path = ENVIRONMENT) -> Path:
    """The interpreter of the peers' environment, which is made, or brought up to `peers.txt`, where need be.

    Raises:
        RuntimeError: a package cannot be installed.
    """
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    done, wanted = folder / "installed.txt", REQUIREMENTS.read_text()
    if done.exists() and done.read_text() == wanted:
        return python
    print(f"making {folder}: some gigabytes of packages", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=True)
    _run([python, "-m", "pip", "install", "--quiet", "--requirement", REQUIREMENTS])
    done.write_text(wanted)
    return python


def _run(command: list[Any]) -> str:
    """What a command prints.

    Raises:
        RuntimeError: it fails; the message is the last thing that it said.
    """
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"the environment is not to be had: {said[-1][:200]}")
    return done.stdout
