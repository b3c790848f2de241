"""Loaders of the kinds that people have, all of the same eight batches an epoch, and a run that counts its examples."""

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jgd

BATCHES, SIZE = 8, 3
EXAMPLES = BATCHES * SIZE
KEY = jax.random.key(0)


def rows(order):
    """One-hot rows: the gradient of w · row is the row, so that parameters count how often each was seen."""
    return np.eye(EXAMPLES, dtype=np.float32)[np.asarray(order, int)]


def batches(order=range(EXAMPLES)):
    return [rows(list(order)[i : i + SIZE]) for i in range(0, EXAMPLES, SIZE)]


def refilled():
    """A generator that fills one buffer anew for each batch."""
    buffer = np.empty((SIZE, EXAMPLES), np.float32)
    for batch in batches():
        buffer[:] = batch
        yield buffer
    buffer[:] = np.nan


class Refilled:
    """The same as a loader that can be walked again."""

    def __iter__(self):
        return refilled()


class RefilledJax:
    """JAX's arrays of a buffer's own memory."""

    def __iter__(self):
        buffer = np.empty((SIZE, EXAMPLES), np.float32)
        for batch in batches():
            buffer[:] = batch
            yield jnp.asarray(buffer)
        buffer[:] = np.nan


class Views:
    """Read-only views of one memory, as tf.data's `as_numpy_iterator` yields them."""

    def __iter__(self):
        memory = bytearray(SIZE * EXAMPLES * 4)
        for batch in batches():
            memory[:] = batch.tobytes()
            view = np.frombuffer(memory, np.float32).reshape(SIZE, EXAMPLES)
            view.flags.writeable = False
            yield view


class Shuffling:
    """Draws an order for each walk from a generator of its own."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)

    def __iter__(self):
        yield from batches(self.rng.permutation(EXAMPLES))


class Stateful:
    """Its iterator says where it stands; its order is another in each walk."""

    def __init__(self, kind=lambda x: x):
        self.rng, self.kind = np.random.default_rng(1), kind

    def __iter__(self):
        return Iterator(self.rng.permutation(EXAMPLES), self.kind)


class Iterator:
    def __init__(self, order, kind):
        self.order, self.kind, self.at = order, kind, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == BATCHES:
            raise StopIteration
        self.at += 1
        return batches(self.order)[self.at - 1]

    def get_state(self):
        return {"order": self.order, "at": self.kind(self.at), 3: (np.int64(7), b"\x00", None, 0.1)}

    def set_state(self, state):
        assert state[3] == (7, b"\x00", None, 0.1) and type(state[3][0]) is np.int64
        assert type(state["at"]) is type(self.kind(1))
        self.order = state["order"]
        self.at = int(np.asarray(jax.tree.leaves(state["at"])[0]).item())


class Uneven:
    """Batches of one, two and three examples, the longest first or last."""

    def __iter__(self):
        at = 0
        for size in (1, 3, 2, 3, 3, 1, 2, 3, 3, 2, 1):
            yield rows(range(at, at + size))
            at += size


def dataset():
    return grain.MapDataset.source(rows(range(EXAMPLES))).seed(3).shuffle().batch(SIZE)


def memory_map(folder):
    """Batches that are slices of a file in memory."""
    path = folder / "rows.npy"
    if not path.exists():
        np.save(path, rows(range(EXAMPLES)))
    mapped = np.load(path, mmap_mode="r")
    return [mapped[i : i + SIZE] for i in range(0, EXAMPLES, SIZE)]


LOADERS = {
    "list": batches,
    "refilled": Refilled,
    "refilled jax": RefilledJax,
    "views": Views,
    "shuffling": Shuffling,
    "stateful": Stateful,
    "uneven": Uneven,
    "grain": dataset,
    "grain iterator": lambda: dataset().to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    ),
}


def counting(**options):
    return jgd.ascent(lambda counts, row: counts @ row, optax.sgd(1.0), reduce=jgd.sum, **options)


METHOD = counting()


def order_of(seen):
    """A loss whose value tells which example was seen: of batches of one, the history is the order."""
    return jgd.descent(lambda w, i: 0 * w + i, optax.sgd(0.0), in_axes=seen)


def fit(data, start=None, method=METHOD, **options):
    options = dict(batch_size=None, key=KEY) | options
    if "steps" not in options:
        options = dict(epochs=3) | options
    return jgd.fit(method, jnp.zeros(EXAMPLES) if start is None else start, data, **options)


class Died(Exception):
    pass


def dies_at(step):
    def callback(state, info):
        if int(state.step) == step:
            raise Died

    return callback


def watch(state, info):
    pass
