"""Kills training runs at random moments, starts them again, and compares what they end in, bit by bit.

`python benchmarks/kills.py --kills 200` makes the table of docs/scaling.md: over arrays, a list, a generator, a loader
that refills its buffer, one that shuffles each epoch anew, one that says where it stands, a memory map, grain, and
torch's `DataLoader` where torch is installed, in turns.
"""

import argparse
import importlib.util
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# The children are forked from this process, which has imported everything and started nothing.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import grain
import jax
import numpy as np
import optax
import orbax.checkpoint  # noqa: F401  (the children would each take a second to import it)

import jgd

UPDATES, EVERY = 210, 7


SIZE, BATCH, EPOCHS = 203, 16, 16  # 13 batches an epoch, the last one smaller


def examples() -> tuple[np.ndarray, np.ndarray]:
    """What every kind of loader gives, in one order or another."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(SIZE, 8)).astype(np.float32), rng.normal(size=SIZE).astype(np.float32)


def cut(x: np.ndarray, y: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The batches of an epoch."""
    return [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, SIZE, BATCH)]


def generator() -> Iterator[Any]:
    """One iterator for the whole run."""
    for _ in range(EPOCHS + 1):
        yield from cut(*examples())


class Refilling:
    """Writes each batch to the same memory."""

    def __iter__(self) -> Iterator[Any]:
        """The batches."""
        buffers = np.empty((BATCH, 8), np.float32), np.empty(BATCH, np.float32)
        for batch in cut(*examples()):
            views = tuple(buffer[: len(part)] for buffer, part in zip(buffers, batch, strict=True))
            for view, part in zip(views, batch, strict=True):
                view[:] = part
            yield views


class Shuffling:
    """Draws an order for each walk from a generator of its own."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(1)

    def __iter__(self) -> Iterator[Any]:
        """The batches."""
        order = self.rng.permutation(SIZE)
        x, y = examples()
        yield from cut(x[order], y[order])


class Stateful:
    """One iterator for the whole run, which says where it stands."""

    def __init__(self) -> None:
        self.made = 0

    def __iter__(self) -> "Stateful":
        """Itself."""
        return self

    def __next__(self) -> Any:
        """The next batch; each epoch has an order of its own."""
        epoch, place = divmod(self.made, -(-SIZE // BATCH))
        self.made += 1
        order = np.random.default_rng(epoch).permutation(SIZE)
        x, y = examples()
        return cut(x[order], y[order])[place]

    def get_state(self) -> dict[str, Any]:
        """Where it stands."""
        return {"made": np.int64(self.made), "kind": ("epochs", b"own")}

    def set_state(self, state: dict[str, Any]) -> None:
        """Puts it there."""
        assert state["kind"] == ("epochs", b"own"), state
        self.made = int(state["made"])


def mapped() -> Any:
    """Slices of a file in memory."""
    path = Path(tempfile.gettempdir()) / f"jgd-kills-{os.getuid()}.npy"
    if not path.exists():
        fresh = path.with_suffix(f".{os.getpid()}.npy")
        np.save(fresh, np.column_stack(examples()))
        fresh.replace(path)
    rows = np.load(path, mmap_mode="r")
    return cut(rows[:, :8], rows[:, 8])


def grains() -> Any:
    """A grain data set, shuffled."""
    return grain.MapDataset.source(list(zip(*examples(), strict=True))).seed(3).shuffle().batch(BATCH)


def torches() -> Any:
    """A torch loader, shuffled by a generator of its own."""
    torch = importlib.import_module("torch")
    data = torch.utils.data.TensorDataset(*map(torch.from_numpy, examples()))
    seeded = torch.Generator().manual_seed(1)
    return torch.utils.data.DataLoader(
        data,
        BATCH,
        shuffle=True,
        generator=seeded,
        collate_fn=lambda rows: tuple(map(torch.stack, zip(*rows, strict=True))),
    )


KINDS: dict[str, Callable[[], Any]] = {
    "arrays": examples,
    "arrays, watched": examples,
    "list": lambda: cut(*examples()),
    "generator": generator,
    "refilling": Refilling,
    "shuffling": Shuffling,
    "stateful": Stateful,
    "memory map": mapped,
    "grain": grains,
}
if importlib.util.find_spec("torch"):
    KINDS["torch"] = torches
    import torch  # noqa: F401


def train(folder: Path | None, watch: mmap.mmap | None, kind: str) -> dict[str, np.ndarray]:
    """The run: kept in a folder, or left alone; compiled, or watched by who counts its updates."""
    rng = np.random.default_rng(2)
    params = {"w": rng.normal(size=(8, 16)).astype(np.float32), "v": np.ones(16, np.float32)}

    def loss(p: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
        return 0.5 * (jax.numpy.tanh(x @ p["w"]) @ p["v"] - y) ** 2

    def count(state: jgd.MethodState, info: jgd.StepInfo) -> None:
        if watch:
            watch[:8] = struct.pack("q", int(state.step))

    result = jgd.fit(
        jgd.descent(loss, optax.adam(1e-2)),
        params,
        KINDS[kind](),
        batch_size=BATCH if kind.startswith("arrays") else None,
        steps=UPDATES,
        key=jax.random.key(1),
        checkpoint=jgd.Checkpoint(folder, every=EVERY) if folder else None,
        callback=None if kind == "arrays" else count,
    )
    return {str(k): np.asarray(leaf) for k, leaf in enumerate(jax.tree.leaves(result))}


def fork(work: Path, folder: Path | None, watch: mmap.mmap, kind: str) -> tuple[int, int]:
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
        ended = train(folder, watch, kind)
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
    return max((int(x.name.split("-")[1]) for x in folder.glob("update-*-????????????")), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of data")
    parser.add_argument("--longest", type=float, default=4.0, help="seconds that a run lives, at most")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    work = Path(tempfile.mkdtemp())
    try:
        found = measure(options.kills, options.kinds, options.longest, draw, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print("| " + " | ".join(found) + " |")
    print("|" + " --: |" * len(found))
    print("| " + " | ".join(map(str, found.values())) + " |")
    if options.json:
        options.json.write_text(json.dumps(found))
    raise SystemExit(1 if found["lost runs"] else 0)


def measure(wanted: int, kinds: list[str], longest: float, draw: random.Random, work: Path) -> dict[str, int]:
    """Kills as often as wanted, over as many runs as that takes, each of the next kind of loader."""
    watch, expected = mmap.mmap(-1, 8), {}
    for kind in kinds:
        child, reader = fork(work, None, watch, kind)
        assert finished(child, 600), f"the run of {kind} that is left alone failed"
        os.close(reader)
        expected[kind] = result(work)
    kills = runs = lost = writing = worst = 0
    while kills < wanted:
        kind, folder = kinds[runs % len(kinds)], work / f"run-{runs}"
        while True:
            watch[:8] = struct.pack("q", 0)  # a child that is killed at once has made no update
            child, reader = fork(work, folder, watch, kind)
            os.read(reader, 2)
            ended = finished(child, draw.uniform(0, longest) if kills < wanted else 600)
            if ended is None:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                kills += 1
                writing += any("tmp" in path.name for path in folder.glob("*"))
                worst = max(worst, struct.unpack("q", watch[:8])[0] - newest(folder))
            os.close(reader)
            if ended is not None:
                break
        if not (ended and same(result(work), expected[kind])):
            lost += 1
            print(f"lost: run {runs}, of {kind}")
        shutil.rmtree(folder)
        runs += 1
    return {
        "kills": kills,
        "of them while writing": writing,
        "kinds of data": len(kinds),
        "runs": runs,
        "lost runs": lost,
        "updates between checkpoints": EVERY,
        "lost updates at worst": worst,
    }


if __name__ == "__main__":
    main()
