"""Kills training runs at random moments, starts them again, and compares what they end in, bit by bit.

`python benchmarks/kills.py --kills 200` makes the table of docs/scaling.md.
"""

import argparse
import json
import mmap
import os
import random
import shutil
import signal
import struct
import tempfile
import time
import traceback
import warnings
from pathlib import Path

# The children are forked from this process, which has imported everything and started nothing.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import optax
import orbax.checkpoint  # noqa: F401  (the children would each take a second to import it)

import jgd

UPDATES, EVERY, LONGEST = 210, 7, 1.0


def train(folder: Path | None, watch: mmap.mmap | None) -> dict[str, np.ndarray]:
    """The run: kept in a folder, or left alone; compiled, or watched by who counts its updates."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(203, 8)).astype(np.float32), rng.normal(size=203).astype(np.float32)
    params = {"w": rng.normal(size=(8, 16)).astype(np.float32), "v": np.ones(16, np.float32)}

    def loss(p: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
        return 0.5 * (jax.numpy.tanh(x @ p["w"]) @ p["v"] - y) ** 2

    def count(state: jgd.MethodState, info: jgd.StepInfo) -> None:
        if watch:
            watch[:8] = struct.pack("q", int(state.step))

    result = jgd.fit(
        jgd.descent(loss, optax.adam(1e-2)),
        params,
        (x, y),
        batch_size=16,
        steps=UPDATES,
        key=jax.random.key(1),
        checkpoint=jgd.Checkpoint(folder, every=EVERY) if folder else None,
        callback=count if watch else None,
    )
    return {str(k): np.asarray(leaf) for k, leaf in enumerate(jax.tree.leaves(result))}


def fork(work: Path, folder: Path | None, watch: mmap.mmap | None) -> tuple[int, int]:
    """A child that trains and leaves what it ended in; its id, and a pipe that says when it begins."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that JAX runs threads, which it does not before its first array
        child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    status = 1
    try:
        jax.config.update("jax_compilation_cache_dir", str(work / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
        os.write(writer, b"go")
        ended = train(folder, watch)
        with open(work / "ended.npz", "wb") as file:
            np.savez(file, **ended)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def finished(child: int, seconds: float) -> bool | None:
    """Whether a child ended well within some seconds; None if it still runs."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.002)
    return None


def result(work: Path) -> dict[str, np.ndarray]:
    """What the last child ended in."""
    with np.load(work / "ended.npz", allow_pickle=False) as file:
        return dict(file)


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Whether two results agree in every bit."""
    return a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in a)


def newest(folder: Path) -> int:
    """The update after which the newest whole checkpoint was made."""
    return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    work = Path(tempfile.mkdtemp())
    try:
        found = measure(options.kills, draw, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print("| " + " | ".join(found) + " |")
    print("|" + " --: |" * len(found))
    print("| " + " | ".join(map(str, found.values())) + " |")
    if options.json:
        options.json.write_text(json.dumps(found))
    raise SystemExit(1 if found["lost runs"] else 0)


def measure(wanted: int, draw: random.Random, work: Path) -> dict[str, int]:
    """Kills as often as wanted, over as many runs as that takes; every other run is watched."""
    watches = [None, mmap.mmap(-1, 8)]
    expected = []
    for watch in watches:
        child, reader = fork(work, None, watch)
        assert finished(child, 600), "the run that is left alone failed"
        os.close(reader)
        expected.append(result(work))
    kills = runs = lost = writing = worst = 0
    while kills < wanted:
        watch, folder = watches[runs % 2], work / f"run-{runs}"
        while True:
            if watch:
                watch[:8] = struct.pack("q", 0)  # a child that is killed at once has made no update
            child, reader = fork(work, folder, watch)
            os.read(reader, 2)
            ended = finished(child, draw.uniform(0, LONGEST) if kills < wanted else 600)
            if ended is None:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                kills += 1
                writing += any("tmp" in path.name for path in folder.glob("*"))
                if watch:
                    worst = max(worst, struct.unpack("q", watch[:8])[0] - newest(folder))
            os.close(reader)
            if ended is not None:
                break
        lost += not (ended and same(result(work), expected[runs % 2]))
        shutil.rmtree(folder)
        runs += 1
    return {
        "kills": kills,
        "of them while writing": writing,
        "runs": runs,
        "lost runs": lost,
        "updates between checkpoints": EVERY,
        "lost updates at worst": worst,
    }


if __name__ == "__main__":
    main()
