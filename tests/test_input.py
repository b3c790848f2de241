"""Batches from grain and from anything else: their position is kept, and absent examples count for nothing."""

import os
import subprocess
import sys

import chex
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from internals import Record

import jgd

X = np.random.default_rng(0).normal(size=(23, 3)).astype(np.float32)
Y = (X @ [1.0, -2.0, 3.0] + 0.5).astype(np.float32)
PARAMS = {"w": np.zeros(3, np.float32), "b": np.float32(0)}


def squared(params, x, y):
    return 0.5 * (x @ params["w"] + params["b"] - y) ** 2


METHOD = jgd.descent(squared, optax.adam(0.1))


def dataset():
    """Five batches an epoch, the last of three."""
    source = [(X[i], Y[i]) for i in range(23)]
    return grain.MapDataset.source(source).seed(3).shuffle().batch(5)


def loader():
    source = [(X[i], Y[i]) for i in range(23)]
    sampler = grain.samplers.IndexSampler(23, shuffle=True, seed=4, num_epochs=1)
    return grain.DataLoader(data_source=source, sampler=sampler, operations=[grain.transforms.Batch(5)])


def forever():
    return iter(dataset().repeat().to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


class OneWay:
    """Batches without a position: the order is all there is."""

    def __iter__(self):
        return iter([(X[i : i + 5], Y[i : i + 5]) for i in range(0, 23, 5)])


class Shorter(OneWay):
    def __iter__(self):
        return iter(list(super().__iter__())[:2])


def fit(data, **options):
    options = dict(epochs=3, callback=None) | options
    if options.get("steps"):
        del options["epochs"]
    return jgd.fit(METHOD, PARAMS, data, batch_size=None, key=jax.random.key(0), **options)


SOURCES = {
    "map": dataset,
    "iter": lambda: dataset().to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)),
    "loader": loader,
    "one way": OneWay,
}


class Died(Exception):
    pass


def dies_at(step):
    def callback(state, info):
        if int(state.step) == step:
            raise Died

    return callback


class TestPosition:
    @pytest.mark.sample(lambda source, at: (at == 8) == (list(SOURCES.values()).index(source) % 2 == 0))
    @pytest.mark.parametrize("at", [5, 8])
    @pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
    def test_a_run_goes_on_where_its_data_stood(self, tmp_path, source, at):
        watched = dict(callback=lambda state, info: None)
        whole = fit(source(), **watched)
        assert int(whole.state.step) == 15
        every = jgd.Checkpoint(tmp_path / "run", every=1)
        with pytest.raises(Died):
            fit(source(), checkpoint=every, callback=dies_at(at + 1))
        chex.assert_trees_all_equal(fit(source(), checkpoint=every, **watched), whole)

    def test_an_iterator_is_put_there_and_not_walked(self, tmp_path):
        whole = fit(forever(), steps=12)
        fit(forever(), steps=7, checkpoint=tmp_path)
        iterator, read = forever(), []

        class Counted:
            def __iter__(self):
                return self

            def __next__(self):
                read.append(1)
                return next(iterator)

            def get_state(self):
                return iterator.get_state()

            def set_state(self, state):
                iterator.set_state(state)

        chex.assert_trees_all_equal(fit(Counted(), steps=12, checkpoint=tmp_path), whole)
        assert len(read) == 5

    def test_more_epochs(self, tmp_path):
        fit(dataset(), epochs=2, checkpoint=tmp_path)
        chex.assert_trees_all_equal(fit(dataset(), checkpoint=tmp_path), fit(dataset()))

    def test_fewer_epochs(self, tmp_path):
        fit(dataset(), epochs=2, checkpoint=tmp_path)
        with pytest.raises(ValueError, match="has made 10 updates already, more than `epochs`=1"):
            fit(dataset(), epochs=1, checkpoint=tmp_path)

    def test_data_that_lost_its_position(self, tmp_path):
        fit(dataset(), epochs=1, steps=3, checkpoint=tmp_path)
        with pytest.raises(
            ValueError, match="position of an iterator with `set_state`, but `data` is now OneWay"
        ):
            fit(OneWay(), checkpoint=tmp_path)

    def test_data_that_became_shorter(self, tmp_path):
        fit(OneWay(), epochs=None, steps=4, checkpoint=tmp_path)
        with pytest.raises(ValueError, match="fewer than the 4 batches that it had given"):
            fit(Shorter(), checkpoint=tmp_path)


class TestAbsentExamples:
    @pytest.mark.parametrize(
        ("reduce", "derivative"),
        [
            pytest.param(jgd.mean, "reverse", id="mean"),
            pytest.param(jgd.sum, "reverse", id="sum"),
            pytest.param(jgd.clipped_sum, "reverse", id="clipped_sum"),
            pytest.param(None, "forward", id="forward"),  # which knows the batch's gradient alone
        ],
    )
    def test_weight_zero_is_not_there(self, reduce, derivative):
        if reduce is jgd.clipped_sum:

            def reduce(grads, weights=None):
                return jgd.clipped_sum(grads, max_norm=1.0, weights=weights)

        method = jgd.descent(squared, optax.sgd(0.1), reduce=reduce, derivative=derivative)
        state = method.init(PARAMS)
        filled = (np.concatenate([X[:3], np.full((2, 3), np.inf)]), np.concatenate([Y[:3], np.zeros(2)]))
        if derivative == "forward":
            filled = (np.concatenate([X[:3], X[:2]]), np.concatenate([Y[:3], Y[:2]]))
        weights = jnp.array([1.0, 1.0, 1.0, 0.0, 0.0])
        got, saw = method.step(state, *(jnp.asarray(x, jnp.float32) for x in filled), weights=weights)
        expected, seen = method.step(state, X[:3], Y[:3])
        chex.assert_trees_all_close(got, expected, rtol=1e-5)
        chex.assert_trees_all_close(saw, seen, rtol=1e-5)

    def test_a_reduction_that_cannot_tell(self):
        method = jgd.descent(squared, optax.sgd(0.1), reduce=lambda grads: jgd.mean(grads))
        with pytest.raises(
            TypeError, match="some examples of this batch are absent, so `reduce` must take `weights`"
        ):
            method.step(method.init(PARAMS), X, Y, weights=jnp.ones(23))

    def test_a_derivative_that_cannot_tell(self):
        method = jgd.descent(
            squared, optax.sgd(0.1), derivative=jax.value_and_grad(lambda p, x, y: 0.0 * p["b"])
        )
        with pytest.raises(ValueError, match="`derivative` that is a function cannot be told which"):
            method.step(method.init(PARAMS), X, Y, weights=jnp.ones(23))


ON_MESHES = """
import jax, numpy as np, jax.numpy as jnp, optax, jgd, pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

devices = np.array(jax.devices())
mesh = Mesh(devices, ("batch",))
whole = NamedSharding(mesh, P())

# The gradient of w @ onehot is onehot: the parameters count how often each example was seen.
counting = jgd.ascent(lambda counts, onehot: counts @ onehot, optax.sgd(1.0), reduce=jgd.sum)
batches = [np.eye(23, dtype=np.float32)[i : i + 5] for i in range(0, 23, 5)]
start = jax.device_put(jnp.zeros(23), whole)
key = jax.random.key(0)
for data, batch_size in ((batches, None), (np.eye(23, dtype=np.float32), 5), (np.eye(23, dtype=np.float32), None)):
    for callback in (None, lambda state, info: None):
        fit = jgd.fit(counting, start, data, batch_size=batch_size, epochs=2, key=key, callback=callback)
        np.testing.assert_array_equal(fit.params, np.full(23, 2.0))
        assert fit.params.sharding.device_set == set(mesh.devices.flat)

x = np.random.default_rng(0).normal(size=(24, 6)).astype(np.float32)
y = x.sum(1)
method = jgd.descent(lambda w, x, y: 0.5 * (x @ w - y) ** 2, optax.adam(0.1))
plain = jgd.fit(method, jnp.zeros(6), (x, y), batch_size=7, epochs=3, key=key)
placed = tuple(jax.device_put(a, NamedSharding(mesh, P("batch"))) for a in (x, y))
for params, data in ((jax.device_put(jnp.zeros(6), whole), (x, y)), (jnp.zeros(6), placed)):
    fit = jgd.fit(method, params, data, batch_size=7, epochs=3, key=key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), fit, plain)

scaled = jgd.descent(lambda w, s, x, y: 0.5 * s * (x @ w - y) ** 2, optax.adam(0.1), in_axes=(None, None, 1, 0))
shared = [(np.float32(1), x[i : i + 7].T, y[i : i + 7]) for i in range(0, 24, 7)]
on_mesh = jgd.fit(scaled, jax.device_put(jnp.zeros(6), whole), shared, batch_size=None, epochs=2, key=key)
alone = jgd.fit(scaled, jnp.zeros(6), shared, batch_size=None, epochs=2, key=key)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), on_mesh, alone)

# Batches that lie on the mesh stay there: nothing comes back to the host.
spread = NamedSharding(mesh, P("batch"))
batches = [(jax.device_put(x[i : i + 8], spread), jax.device_put(y[i : i + 8], spread)) for i in range(0, 24, 8)]
unplaced = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 24, 8)]
alone = jgd.fit(method, jnp.zeros(6), unplaced, batch_size=None, epochs=2, key=key)
with pytest.MonkeyPatch.context() as patch:
    patch.delattr("jax.make_array_from_process_local_data")
    fit = jgd.fit(method, jax.device_put(jnp.zeros(6), whole), batches, batch_size=None, epochs=2, key=key)
    with pytest.raises(AttributeError):
        jgd.fit(method, jax.device_put(jnp.zeros(6), whole), unplaced, batch_size=None, epochs=2, key=key)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), fit, alone)

other = NamedSharding(Mesh(devices[:2], ("batch",)), P("batch"))
with pytest.raises(ValueError, match=r"`params` lies on the mesh {'batch': 4} .*, but `data\\[0\\]` on {'batch': 2}"):
    jgd.fit(method, jax.device_put(jnp.zeros(6), whole), (jax.device_put(x, other), y), batch_size=4, epochs=1, key=key)
with pytest.raises(ValueError, match=r"must have a common axis of examples to be laid out on a mesh"):
    jgd.fit(method, jax.device_put(jnp.zeros(6), whole), [(x, y[:5])], batch_size=None, epochs=1, key=key)
"""


def test_batches_that_a_mesh_does_not_divide():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", ON_MESHES],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_next_batch_is_made_before_anyone_waits():
    made, waited = [], []

    def batches():
        for i in range(6):
            made.append(i)
            yield X[:5], Y[:5]

    def look(record):
        waited.append(len(made))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Record, "wait", look)
        fit(batches(), epochs=1)
    assert waited == [2, 3, 4, 5, 6, 6]
