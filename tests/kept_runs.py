"""A small run that is kept in a folder, ways to end it, and what lies there."""

from pathlib import Path

import jax
import numpy as np
import optax

import jgd


def squared(params, x, y):
    return 0.5 * (x @ params["w"] + params["b"] - y) ** 2


PARAMS = {"w": np.zeros(3, np.float32), "b": np.float32(0)}


X = np.random.default_rng(0).normal(size=(23, 3)).astype(np.float32)


Y = (X @ [1.0, -2.0, 3.0] + 0.5).astype(np.float32)


METHOD = jgd.descent(squared, optax.adam(0.1))


class Died(Exception):
    """The end of a run that nobody planned."""


def run(checkpoint=None, *, method=METHOD, params=PARAMS, data=(X, Y), seed=0, **options):
    options = dict(batch_size=5, epochs=4, callback=None) | options  # 5 updates an epoch, 20 in all
    if options.get("steps"):
        del options["epochs"]
    return jgd.fit(method, params, data, key=jax.random.key(seed), checkpoint=checkpoint, **options)


def dies_after(updates, error=Died):
    made = []

    def callback(state, info):
        made.append(info)
        if len(made) == updates:
            raise error

    return callback


def kept(folder):
    names = (
        path.name.split("-") for path in Path(folder).iterdir() if path.is_dir() and "." not in path.name
    )
    return sorted(int(name[1]) for name in names)


def at(folder, updates):
    """The checkpoint after so many updates; a name that nothing has where there is none."""
    return next(Path(folder).glob(f"update-{updates}-????????????"), Path(folder) / "none")


def contents(folder):
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.name != "jgd.lock")
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def kept_run(folder, **options):
    """A run of two epochs, kept after updates 5 and 10."""
    return run(jgd.Checkpoint(folder, every=5), epochs=2, **options)
