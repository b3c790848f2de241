"""What checkpoints, progress and history cost together: the digits classifier at batch 64, with and without.

`python benchmarks/machinery.py` makes the figures of docs/scaling.md. The runs take turns, so that what else the
machine does falls on both alike.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jgd


def loss(params: dict[str, jax.Array], pixels: jax.Array, digit: jax.Array) -> jax.Array:
    """The cross-entropy of ONE image."""
    logits = jnp.tanh(pixels @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, digit)


def clocks() -> np.ndarray:
    """The time on the wall, and that of the processors, which others on the machine disturb less."""
    return np.array([time.perf_counter(), time.process_time()])


def initial(width: int) -> dict[str, jax.Array]:
    """Random parameters of a classifier with one hidden layer."""
    shapes = {"w1": (64, width), "b1": (width,), "w2": (width, 10), "b2": (10,)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: jax.random.normal(key, shape) / 8
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, nargs="+", default=[2000, 6000], help="of runs of each length")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=5.0, help="from one checkpoint to the next")
    parser.add_argument("--width", type=int, default=4096, help="of the net that a loader feeds")
    options = parser.parse_args()
    images, digits = load_digits(return_X_y=True)
    data = jnp.asarray(images / 16, jnp.float32), jnp.asarray(digits, jnp.int32)
    params = initial(32)
    method = jgd.descent(loss, optax.adam(1e-3))

    def run(
        epochs: int,
        data: object = data,
        params: object = params,
        batch_size: int | None = 64,
        **machinery: object,
    ) -> np.ndarray:
        began = clocks()
        with contextlib.redirect_stdout(io.StringIO()):
            result = jgd.fit(
                method, params, data, batch_size=batch_size, epochs=epochs, key=jax.random.key(1), **machinery
            )
        jax.block_until_ready(result)
        return clocks() - began

    def kept(epochs: int) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            plan = jgd.Checkpoint(Path(folder) / "run", seconds=options.seconds)
            return run(epochs, checkpoint=plan, progress=True)

    best = []
    for epochs in options.epochs:
        kept(epochs)  # compiles, and imports the store
        run(epochs)
        bare, full = [], []
        for _ in range(options.repeats):
            bare.append(run(epochs))
            full.append(kept(epochs))
        updates = epochs * -(-len(digits) // 64)
        best.append((updates, min(bare, key=tuple)[0], min(full, key=tuple)[0]))
        print(f"{updates} updates a run, {options.repeats} runs of each kind, in turns")
        for name, a, b in zip(("wall", "processor"), np.transpose(bare), np.transpose(full), strict=True):
            print(
                f"{name} time: {1e6 * min(a) / updates:.1f} µs an update at best without, "
                f"{1e6 * min(b) / updates:.1f} with; ratio of the best {min(b) / min(a):.3f}, "
                f"median of the ratios {statistics.median(b / a):.3f}"
            )
    if len(best) > 1:
        (few, bare, full), (many, more_bare, more_full) = best[0], best[-1]
        without, within = (
            (many_ - few_) / (many - few) for few_, many_ in ((bare, more_bare), (full, more_full))
        )
        print(
            f"an update more costs {1e6 * without:.1f} µs without, {1e6 * within:.1f} with, ratio "
            f"{within / without:.3f}; and a run {full - bare - few * (within - without):.2f} s more, however long"
        )

    # Fed by a loader: the same batches from memory and by grain, for a step that takes longer than to make one.
    source = [(x, y) for x, y in zip(np.asarray(data[0]), np.asarray(data[1]), strict=True)]
    loader = grain.MapDataset.source(source).batch(64)
    batches, wide = list(loader), initial(options.width)
    fed: dict[str, list[float]] = {"memory": [], "grain": [], "grain alone": []}
    for _ in range(options.repeats):
        for name, made in (("memory", batches), ("grain", loader)):
            fed[name].append(run(2, made, wide, None)[0] / 2 / len(batches))
        began = time.perf_counter()
        for _ in loader:
            pass
        fed["grain alone"].append((time.perf_counter() - began) / len(batches))
    said = ", ".join(f"{name} {1e3 * statistics.median(times):.2f}" for name, times in fed.items())
    print(f"ms a step of a net of width {options.width}, median: {said}")


if __name__ == "__main__":
    main()
