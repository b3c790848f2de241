"""One program, one process or many: each reads its share of the examples, and the run survives being killed.

Alone: `python examples/many_processes.py`. On this machine, by two: `python examples/many_processes.py --spawn 2`.
On a cluster each process is started with the address of the first, as docs/scaling.md says:
`python examples/many_processes.py --coordinator HOST:1234 --processes 8 --process 3 --folder /shared/run`.
"""

import argparse
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jgd

BATCH, EPOCHS = 64, 12  # examples in a batch of all processes together


def predict(params: dict[str, jax.Array], pixels: jax.Array) -> jax.Array:
    """The ten logits of one image."""
    return jnp.tanh(pixels @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def loss(params: dict[str, jax.Array], pixels: jax.Array, digit: jax.Array) -> jax.Array:
    """The cross-entropy of ONE image."""
    return optax.softmax_cross_entropy_with_integer_labels(predict(params, pixels), digit)


def share_of(images: np.ndarray, digits: np.ndarray) -> grain.MapDataset:
    """The batches of this process: every n-th example of an order that is the same for all, and new each epoch."""
    examples = grain.MapDataset.range(len(images)).seed(0).shuffle().repeat(EPOCHS)
    mine = examples[jax.process_index() :: jax.process_count()]
    return mine.map(lambda i: (images[i], digits[i])).batch(BATCH // jax.process_count())


def train(folder: Path) -> None:
    """Trains, or goes on with what is in the folder; the last small batch is filled with absent examples."""
    images, digits = load_digits(return_X_y=True)
    images, digits = (images / 16).astype(np.float32), digits.astype(np.int32)
    rng = np.random.default_rng(0)
    params = {
        "w1": rng.normal(size=(64, 32), scale=1 / 8).astype(np.float32),
        "b1": np.zeros(32, np.float32),
        "w2": rng.normal(size=(32, 10), scale=32**-0.5).astype(np.float32),
        "b2": np.zeros(10, np.float32),
    }
    method = jgd.descent(loss, optax.adam(3e-3))
    data, key = share_of(images, digits), jax.random.key(0)
    result = jgd.fit(method, params, data, batch_size=None, epochs=1, key=key, checkpoint=folder)
    if jax.process_index() == 0:
        trained = jax.device_get(result.params)
        guesses = jax.vmap(predict, (None, 0))(trained, images).argmax(-1)
        updates, accuracy = len(result.history.value), float(np.mean(guesses == digits))
        print(
            f"{jax.process_count()} processes, {len(jax.devices())} devices: {updates} updates, {accuracy:.3f}"
        )
        assert accuracy > 0.94, accuracy


def spawn(processes: int, folder: Path) -> None:
    """Starts all processes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = [sys.executable, __file__, "--coordinator", address, "--processes", str(processes)]
    ranks = [[*common, "--process", str(rank), "--folder", str(folder)] for rank in range(processes)]
    running = [subprocess.Popen(command) for command in ranks]
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit(f"exit codes {codes}")


def main() -> None:
    """Reads what this process is, and trains."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--spawn", type=int)
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        if options.spawn:
            return spawn(options.spawn, folder)
        if options.coordinator:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            jax.distributed.initialize(options.coordinator, options.processes, options.process)
        train(folder)


if __name__ == "__main__":
    main()
