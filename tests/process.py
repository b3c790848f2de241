"""One process of several, for `test_processes.py`: trains as it is told, and leaves what it ended in."""

import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jgd

SIZE, BATCH = 23, 8
rng = np.random.default_rng(0)
X = rng.normal(size=(SIZE, 4)).astype(np.float32)
Y = rng.normal(size=SIZE).astype(np.float32)
PARAMS = {"w": rng.normal(size=(4, 8)).astype(np.float32), "v": np.ones(8, np.float32)}


def loss(p, x, y):
    return 0.5 * (jnp.tanh(x @ p["w"]) @ p["v"] - y) ** 2


class Share:
    """The batches of this process: every n-th example of each of the common batches, which 23 do not fill."""

    def __init__(self, rank, processes):
        self.rank, self.processes = rank, processes

    def __iter__(self):
        for start in range(0, SIZE, BATCH):
            mine = slice(start + self.rank, min(start + BATCH, SIZE), self.processes)
            if len(X[mine]):
                yield X[mine], Y[mine]


class Lonely:
    """Of another length in each process: the process of rank 1 has one batch less."""

    def __init__(self, rank, processes):
        self.batches = list(Share(rank, processes))[: 3 - rank]

    def __iter__(self):
        return iter(self.batches)


def callback_of(dies, rank):
    def callback(state, info):
        if rank == dies["rank"] and int(state.step) == dies["step"]:
            os._exit(17)

    return callback


def main():
    job = json.loads(sys.argv[1])
    rank, processes = job["rank"], job["processes"]
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"127.0.0.1:{job['port']}",
            processes,
            rank,
            heartbeat_timeout_seconds=10,
            shutdown_timeout_seconds=10,
        )
    reduce = {"mean": jgd.mean, "sum": jgd.sum}[job.get("reduce", "mean")]
    method = jgd.descent(loss, optax.adam(0.05), reduce=reduce)
    results = {}
    for name in job["data"]:
        data = {"arrays": (X, Y), "share": Share(rank, processes), "lonely": Lonely(rank, processes)}[name]
        result = jgd.fit(
            method,
            PARAMS,
            data,
            batch_size=BATCH if name == "arrays" else None,
            epochs=job["epochs"],
            key=jax.random.key(0),
            checkpoint=jgd.Checkpoint(f"{job['folder']}/{name}", every=2) if "folder" in job else None,
            callback=callback_of(job["dies"], rank) if "dies" in job else None,
        )
        leaves = jax.device_get(jax.tree.leaves(result))
        results |= {f"{name}-{k:03}": leaf for k, leaf in enumerate(leaves)}
    if rank == 0:
        np.savez(job["out"], **results)


main()
