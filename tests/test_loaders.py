"""What a loader hands over: copied, in its order, none lost, and nothing of what fills a batch up is seen."""

import functools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from loaders import (
    BATCHES,
    EXAMPLES,
    KEY,
    LOADERS,
    SIZE,
    Died,
    Shuffling,
    Stateful,
    batches,
    dies_at,
    fit,
    memory_map,
    rows,
    watch,
)
from meshes import mesh_of

import jgd

PLACES = {"one device": lambda: jnp.zeros(EXAMPLES), "mesh": lambda: on_mesh(4)}


def on_mesh(devices):
    return jax.device_put(jnp.zeros(EXAMPLES), NamedSharding(mesh_of(devices), P()))


@pytest.fixture(params=PLACES.values(), ids=PLACES.keys())
def start(request):
    return request.param()


class TestMemoryBelongsToTheLoader:
    @pytest.mark.parametrize("watched", [False, True])
    def test_a_buffer_that_is_refilled(self, watched):
        # So much work that a step still reads its batch when the next is asked for.
        def batches():
            buffer = np.empty((256, 512), np.float32)
            for i in range(12):
                buffer[:] = 0.001 * i
                yield buffer

        heavy = jgd.descent(lambda w, x: jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w) ** 2), optax.sgd(0.0))
        w = 0.05 * jnp.eye(512) + 0.01
        callback = watch if watched else None
        got = jgd.fit(heavy, w, batches(), batch_size=None, epochs=1, key=KEY, callback=callback)
        for i, value in enumerate(got.history.value):
            x = np.full(512, 0.001 * i)
            expected = np.sum(np.tanh(np.tanh(x @ np.float64(w)) @ np.float64(w)) ** 2)
            np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)

    def test_by_steps(self):
        heavy = jgd.descent(lambda w, x: jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w) ** 2), optax.sgd(0.0))
        state, buffer, values = (
            heavy.init(0.05 * np.eye(512, dtype=np.float32)),
            np.empty((256, 512), np.float32),
            [],
        )
        weights = np.ones(256, np.float32)
        for i in range(12):
            buffer[:], weights[:] = 0.01 * i, 1
            state, info = heavy.step(state, buffer, weights=weights)
            buffer[:] = weights[:] = np.nan
            values.append(info.value)
        x = 0.01 * np.arange(12.0)
        np.testing.assert_allclose(values, 512 * np.tanh(0.05 * np.tanh(0.05 * x)) ** 2, rtol=1e-3, atol=1e-9)

    def test_initial_values_belong_to_the_caller(self):
        params = np.ones((64, 64), np.float32)
        state = jgd.descent(lambda w, x: jnp.sum(w * x), optax.sgd(0.0)).init(params)
        params[:] = 0
        np.testing.assert_array_equal(state.params, 1)

    @pytest.mark.parametrize("batch_size", [None, 64])
    def test_arrays_belong_to_the_caller_when_fit_returns(self, batch_size):
        x = np.full((256, 512), 0.01, np.float32)
        heavy = jgd.descent(lambda w, x: jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w) ** 2), optax.sgd(0.0))
        got = jgd.fit(heavy, 0.05 * jnp.eye(512), x, batch_size=batch_size, epochs=8, key=KEY).history.value
        x[:] = np.nan
        np.testing.assert_allclose(got, 512 * np.tanh(0.05 * np.tanh(0.05 * 0.01)) ** 2, rtol=1e-3)

    @pytest.mark.parametrize("name", LOADERS)
    def test_every_kind_is_seen_as_often_as_it_should(self, name, start):
        np.testing.assert_array_equal(fit(LOADERS[name](), start).params, np.full(EXAMPLES, 3.0))

    def test_a_memory_map(self, tmp_path, start):
        np.testing.assert_array_equal(fit(memory_map(tmp_path), start).params, np.full(EXAMPLES, 3.0))


class TestStreams:
    @pytest.mark.parametrize("kind", ["generator", "list iterator", "grain", "own"])
    def test_shared_by_two_calls(self, kind, start):
        make = {
            "generator": lambda: (x for x in batches()),
            "list iterator": lambda: iter(batches()),
            "grain": lambda: iter(LOADERS["grain"]()),
            "own": lambda: iter(Stateful()),
        }[kind]
        whole, stream = fit(make(), start, steps=8), make()
        first = fit(stream, start, steps=3)
        assert float(first.params.sum()) == 3 * SIZE
        second = fit(stream, first.state, steps=5)
        chex.assert_trees_all_equal(second.params, whole.params)
        np.testing.assert_array_equal(second.params, np.ones(EXAMPLES))
        assert next(stream, None) is None

    def test_no_more_is_drawn_than_is_asked_for(self, start):
        drawn = []
        stream = (drawn.append(i) or x for i, x in enumerate(batches()))
        fit(stream, start, steps=3)
        assert drawn == [0, 1, 2]
        fit(stream, start, steps=3, callback=lambda state, info: True)
        assert drawn == [0, 1, 2, 3]

    @pytest.mark.parametrize("keep", [1, 5])
    def test_a_live_stream_goes_on_where_it_stands(self, tmp_path, start, keep):
        stream = (x for x in batches())
        fit(stream, start, steps=keep, checkpoint=tmp_path)
        np.testing.assert_array_equal(
            fit(stream, start, steps=8, checkpoint=tmp_path).params, np.ones(EXAMPLES)
        )

    def test_what_a_stream_gave_before_the_run(self, tmp_path):
        def program(steps):
            stream = (x for x in batches())
            first = fit(stream, steps=2)
            return first.params + fit(stream, steps=steps, checkpoint=tmp_path).params

        program(3)
        np.testing.assert_array_equal(program(6), np.ones(EXAMPLES))  # a stream made anew is walked to both

    def test_two_kept_runs_share_a_stream(self, tmp_path):
        def program(steps):
            stream = (x for x in batches())
            return [
                fit(stream, steps=n, checkpoint=tmp_path / str(k)).params for k, n in enumerate((3, steps))
            ]

        first, _ = program(2)
        again, second = program(5)
        np.testing.assert_array_equal(again, first)
        np.testing.assert_array_equal(again + second, np.ones(EXAMPLES))

    def test_a_stream_that_has_gone_too_far(self, tmp_path):
        stream = (x for x in batches())
        fit(stream, steps=2, checkpoint=tmp_path)
        fit(stream, steps=2)
        with pytest.raises(
            ValueError, match=r"has given 4 batches already, and the run .* stands after batch 2"
        ):
            fit(stream, steps=8, checkpoint=tmp_path)

    def test_a_batch_that_no_update_was_made_from_is_not_lost(self):
        stream = (x for x in batches())
        with pytest.raises(Died):
            fit(stream, epochs=1, callback=dies_at(3))
        assert float(fit(stream, epochs=1).params.sum()) == (BATCHES - 2) * SIZE  # the third is made again

    def test_a_loader_that_starts_anew_when_it_ended(self):
        class Restarts:
            def __iter__(self):
                self.left = iter(batches())
                return self

            def __next__(self):
                return next(self.left)

        loader = Restarts()
        for _ in range(2):
            np.testing.assert_array_equal(fit(loader, epochs=1).params, np.ones(EXAMPLES))


class TestOddLoaders:
    @pytest.mark.parametrize("data", [lambda: (x for x in batches()), lambda: iter(batches())])
    def test_an_iterator_for_two_epochs(self, data):
        with pytest.raises(ValueError, match="can be walked only once, but `epochs` is 2"):
            fit(data(), epochs=2)

    def test_nothing_in_the_second_epoch(self, start):
        class Once:
            def __init__(self):
                self.left = iter(batches())

            def __iter__(self):
                return iter(list(self.left))

        with pytest.raises(ValueError, match="gave no batch in epoch 2, after 8 in all"):
            fit(Once(), start, epochs=2)

    def test_it_ends_early(self, start):
        np.testing.assert_array_equal(
            fit(batches()[:5], start, steps=10).params, np.repeat([2.0, 0.0], [5 * SIZE, 3 * SIZE])
        )

    def test_it_raises_midway(self, tmp_path, start):
        class Breaks:
            def __iter__(self):
                yield from batches()[:5]
                raise OSError("the disk is gone")

        every = jgd.Checkpoint(tmp_path, every=2)
        with pytest.raises(OSError, match="the disk is gone"):
            fit(Breaks(), start, checkpoint=every)

        class Whole:
            def __iter__(self):
                return iter(batches())

        np.testing.assert_array_equal(fit(Whole(), start, checkpoint=every).params, np.full(EXAMPLES, 3.0))

    def test_another_structure(self, start):
        data = [rows(range(3)), {"row": rows(range(3, 6))}]
        with pytest.raises(
            ValueError, match=r"gave a batch of structure .* all batches of a run must have one"
        ):
            fit(data, start, epochs=1)

    @pytest.mark.parametrize(
        "leaf",
        ["text", b"raw", object(), np.array(["a"]), np.array([None])],
        ids=["text", "bytes", "object", "texts", "objects"],
    )
    def test_no_array_of_numbers(self, leaf):
        with pytest.raises(
            TypeError, match=r"gave a batch of which `batch\[1\]` is .*, not an array of numbers"
        ):
            fit([(rows([0]), leaf)], epochs=1)

    @pytest.mark.parametrize("reduce", ["sum", "clipped_sum"])
    def test_empty_batches(self, reduce, start):
        clip = functools.partial(jgd.clipped_sum, max_norm=10.0)
        how = {"sum": dict(total="sum"), "clipped_sum": dict(reduce=clip)}[reduce]
        method = jgd.ascent(lambda c, row: c @ row, optax.sgd(1.0), **how)
        data = [rows([0, 1]), rows([]), rows([2, 3, 4]), rows([])]
        got = fit(data, start, method=method, check_finite=True, epochs=2)
        np.testing.assert_array_equal(got.params, np.repeat([2.0, 0.0], [5, EXAMPLES - 5]))
        values = np.asarray(got.history.value)
        assert (
            np.isfinite(values[[0, 2, 4, 6]]).all() and (got.history.grad_norm[np.array([1, 3])] == 0).all()
        )
        if reduce == "sum":
            assert (values[[1, 3]] == 0).all()

    def test_a_mean_of_nothing_is_refused(self, start):
        method = jgd.ascent(lambda c, row: c @ row, optax.sgd(1.0))
        with pytest.raises(
            ValueError, match="holds no examples: the mean over an empty batch is not defined"
        ):
            fit([rows([0]), rows([])], start, method=method, epochs=1)

    def test_an_update_from_nothing_with_a_line_search(self):
        method = jgd.descent(lambda w, x: jnp.sum((w - x) ** 2), optax.lbfgs(), total="sum")
        state = method.init(jnp.ones(3))
        state, info = method.step(state, jnp.zeros((0, 3)))
        np.testing.assert_array_equal(state.params, np.ones(3))
        assert info.value == 0 and info.grad_norm == 0


def test_copies_that_fill_a_batch_up_are_not_seen():
    method = jgd.ascent(lambda c, row, i: (c @ row, {"id": i}), optax.sgd(1.0), reduce=jgd.sum, has_aux=True)
    ids, data = [], [(rows(range(5)), np.arange(5)), (rows(range(5, 13)), np.arange(5, 13))]
    see = lambda state, info: ids.append(np.asarray(info.aux["id"]).tolist())
    fit(data, on_mesh(8), method=method, epochs=1, callback=see)
    assert ids == [list(range(5)), list(range(5, 13))]


@pytest.mark.parametrize("data", [rows(range(8)), batches()], ids=["arrays", "batches"])
def test_warnings_filters_are_left_alone(data, monkeypatch):
    """They are the whole process's: threads that put them aside and back leave each other's behind."""
    changed, change = [], warnings.filterwarnings

    def filterwarnings(*args, **options):
        changed.append(args)
        change(*args, **options)

    monkeypatch.setattr(warnings, "filterwarnings", filterwarnings)
    fit(data, batch_size=None if isinstance(data, list) else 3)
    assert not changed


class TestTorch:
    """Its `DataLoader` with workers; not a test dependency, as its wheels are large."""

    @pytest.fixture
    def torch(self):
        return pytest.importorskip("torch", reason="torch is not installed, so its DataLoader is not tested")

    @pytest.fixture
    def loader(self, torch):
        def make(workers=0):
            # Forked workers would inherit JAX's threads.
            context = dict(multiprocessing_context="spawn") if workers else {}
            data = torch.utils.data.TensorDataset(torch.from_numpy(rows(range(EXAMPLES))))
            generator = torch.Generator().manual_seed(1)
            return torch.utils.data.DataLoader(
                data, SIZE, shuffle=True, generator=generator, num_workers=workers, **context
            )

        return make

    method = jgd.ascent(lambda c, row: c @ row[0], optax.sgd(1.0), reduce=jgd.sum)

    def test_a_loader(self, loader, start):
        got = fit(loader(), start, method=self.method)
        np.testing.assert_array_equal(got.params, np.full(EXAMPLES, 3.0))

    def test_it_is_resumed(self, loader, tmp_path):
        every = jgd.Checkpoint(tmp_path, every=1)
        whole = fit(loader(), method=self.method, callback=watch)
        with pytest.raises(Died):
            fit(loader(), method=self.method, checkpoint=every, callback=dies_at(14))
        again = fit(loader(), method=self.method, checkpoint=every, callback=watch)
        chex.assert_trees_all_equal(again, whole)

    def test_half_precision(self, torch):
        data = [torch.from_numpy(x).to(torch.bfloat16) for x in batches()]
        np.testing.assert_array_equal(fit(data).params, np.full(EXAMPLES, 3.0))

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")
    def test_workers(self, loader, start):
        got = fit(loader(2), start, method=self.method)
        np.testing.assert_array_equal(got.params, np.full(EXAMPLES, 3.0))


def test_shuffling_loaders_differ_between_epochs():
    first, second = (np.concatenate(list(loader)) for loader in [Shuffling()] for _ in range(2))
    assert (first != second).any()
