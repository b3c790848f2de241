"""Training: the three regimes, what each epoch sees, and what can be watched."""

import functools
import sys
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compilations import compilations
from internals import fit_module
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of
from regressions import PARAMS, counting, method, regression, squared

import jgd


@pytest.mark.parametrize(
    "batch_size, optimizer, epochs",
    [
        (1, optax.sgd(optax.exponential_decay(0.05, 2000, 0.05, staircase=False)), 300),
        (8, optax.sgd(optax.exponential_decay(0.2, 500, 0.2)), 300),
        (None, optax.sgd(0.5), 300),
    ],
    ids=["stochastic", "mini-batch", "full batch"],
)
def test_the_three_regimes_reach_the_least_squares_answer(key, batch_size, optimizer, epochs):
    x, y = regression()
    fit = jgd.fit(
        jgd.descent(squared, optimizer), PARAMS, (x, y), batch_size=batch_size, epochs=epochs, key=key
    )
    (*w, b), *_ = np.linalg.lstsq(np.c_[x, np.ones(len(x))], y)
    np.testing.assert_allclose(fit.params["w"], w, atol=2e-3)
    np.testing.assert_allclose(fit.params["b"], b, atol=2e-3)
    updates = epochs * -(-23 // (batch_size or 23))
    assert fit.history.value.shape == fit.history.grad_norm.shape == (updates,)
    assert int(fit.state.step) == updates


class TestWhatAnEpochSees:
    @pytest.mark.parametrize("watched", [False, True])
    @pytest.mark.parametrize("batch_size", [1, 5, 7, 10, 22, 23, None])
    def test_every_example_once(self, key, batch_size, watched):
        fit = jgd.fit(
            counting(), jnp.zeros(23), jnp.eye(23), batch_size=batch_size, epochs=3, key=key,
            callback=(lambda state, info: None) if watched else None,
        )  # fmt: skip
        np.testing.assert_array_equal(fit.params, np.full(23, 3))

    def test_the_last_small_batch_weighs_its_examples_by_their_mean(self, key):
        fit = jgd.fit(counting(jgd.mean), jnp.zeros(7), jnp.eye(7), batch_size=5, epochs=1, key=key)
        np.testing.assert_allclose(sorted(np.asarray(fit.params)), [0.2] * 5 + [0.5] * 2, rtol=1e-6)

    @pytest.mark.parametrize("steps", [0, 1, 4, 5, 6, 13, 15])
    def test_steps_count_updates_and_may_end_within_an_epoch(self, key, steps):
        ended = jgd.fit(counting(), jnp.zeros(23), jnp.eye(23), batch_size=5, steps=steps, key=key)
        seen = []
        jgd.fit(
            counting(), jnp.zeros(23), jnp.eye(23), batch_size=5, epochs=3, key=key,
            callback=lambda state, info: seen.append(state.params),
        )  # fmt: skip
        assert int(ended.state.step) == steps == ended.history.value.size
        np.testing.assert_array_equal(ended.params, [jnp.zeros(23), *seen][steps])

    def test_orders_differ_between_epochs_and_keys(self, key):
        def order(key, epochs):
            _, _, history = jgd.fit(
                jgd.descent(lambda w, i: 0 * w + i, optax.sgd(0.0)), jnp.zeros(()), jnp.arange(23.0),
                batch_size=1, epochs=epochs, key=key,
            )  # fmt: skip
            return np.asarray(history.value).reshape(epochs, 23)

        first, second = order(key, 2)
        assert sorted(first) == sorted(second) == list(range(23))
        assert (first != second).any() and (first != np.arange(23)).any()
        assert (order(jax.random.key(1), 1)[0] != first).any()
        np.testing.assert_array_equal(order(key, 1)[0], first)

    @pytest.mark.parametrize("watched", [False, True])
    def test_inner_steps_stay_with_a_batch(self, key, watched):
        fit = jgd.fit(
            jgd.descent(lambda w, i: 0 * w + i, optax.sgd(0.0)), jnp.zeros(()), jnp.arange(5.0), batch_size=2,
            steps=15, inner_steps=3, key=key, callback=(lambda state, info: None) if watched else None,
        )  # fmt: skip
        values = np.asarray(fit.history.value).reshape(5, 3)
        assert (values == values[:, :1]).all() and len(set(values[:3, 0])) == 3
        assert int(fit.state.step) == 15

    def test_inner_steps_are_updates_of_their_own(self, key):
        x, y = regression()
        repeated = jgd.fit(method(), PARAMS, (x, y), batch_size=None, steps=12, inner_steps=4, key=key)
        plain = jgd.fit(method(), PARAMS, (x, y), batch_size=None, steps=12, key=key)
        chex.assert_trees_all_close(repeated, plain, rtol=1e-6)


class TestTheSameAsStepping:
    # The last two keep a copy of the parameters, whose memory must not be given away twice.
    @pytest.mark.parametrize("name", ["adamw", "lbfgs", "schedule_free"])
    def test_full_batch(self, key, name):
        optimizers = {
            "adamw": optax.adamw(0.1),
            "lbfgs": optax.lbfgs(),
            "schedule_free": optax.contrib.schedule_free_sgd(0.1),
        }
        data, stepper = regression(), jgd.descent(squared, optimizers[name])
        state, values = stepper.init(PARAMS), []
        for _ in range(7):
            state, info = stepper.step(state, *data)
            values.append(info.value)
        fit = jgd.fit(stepper, PARAMS, data, batch_size=None, steps=7, key=key)
        chex.assert_trees_all_close(fit.state, state, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(fit.history.value, values, rtol=1e-4)

    def test_watched_and_compiled_take_the_same_batches(self, key):
        data, seen = regression(), []
        watched = jgd.fit(
            method(), PARAMS, data, batch_size=4, steps=14, key=key,
            callback=lambda state, info: seen.append((int(state.step), float(info.value))),
        )  # fmt: skip
        compiled = jgd.fit(method(), PARAMS, data, batch_size=4, steps=14, key=key)
        chex.assert_trees_all_close(watched, compiled, rtol=1e-5, atol=1e-6)
        assert [step for step, _ in seen] == list(range(1, 15))
        np.testing.assert_allclose([value for _, value in seen], compiled.history.value, rtol=1e-5)

    def test_going_on_from_a_state(self, key):
        data = regression()
        optimizer = jgd.descent(squared, optax.adam(0.1))
        half = jgd.fit(optimizer, PARAMS, data, batch_size=None, steps=5, key=key)
        whole = jgd.fit(optimizer, PARAMS, data, batch_size=None, steps=10, key=key)
        on = jgd.fit(optimizer, half.state, data, batch_size=None, steps=5, key=key)
        chex.assert_trees_all_close(on.state, whole.state, rtol=1e-6)
        assert int(half.state.step) == 5, "the state it went on from is left intact"

    def test_params_are_left_intact(self, key):
        params = {"w": jnp.ones(3), "b": jnp.ones(())}
        jgd.fit(method(), params, regression(), batch_size=4, epochs=2, key=key)
        chex.assert_trees_all_equal(params, {"w": jnp.ones(3), "b": jnp.ones(())})

    def test_a_state_with_a_key(self, key):
        # The noise keeps a PRNG key.
        optimizer = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), optax.adam(0.1), optax.ema(0.5))
        fit = jgd.fit(jgd.descent(squared, optimizer), PARAMS, regression(), batch_size=4, steps=20, key=key)
        assert np.isfinite(fit.history.value).all()


class TestReproducible:
    @pytest.mark.parametrize("batch_size", [1, 4, None])
    def test_same_key_same_bits(self, batch_size):
        def run(seed):
            return jgd.fit(
                method(), PARAMS, regression(), batch_size=batch_size, epochs=3, key=jax.random.key(seed)
            )

        chex.assert_trees_all_equal(run(0), run(0))
        other = run(1).history.value
        assert (other == run(0).history.value).all() == (batch_size is None)

    def test_vmap_over_keys_is_as_many_runs_apart(self, key):
        data, trained = regression(), method()

        def run(key):
            init_key, fit_key = jax.random.split(key)
            params = {"w": jax.random.normal(init_key, 3), "b": jnp.zeros(())}
            return jgd.fit(trained, params, data, batch_size=5, epochs=2, key=fit_key)

        keys = jax.random.split(key, 4)
        together = jax.vmap(run)(keys)
        assert together.history.value.shape == (4, 10)
        for k in range(4):
            chex.assert_trees_all_close(
                jax.tree.map(lambda x, k=k: x[k], together), run(keys[k]), rtol=1e-5, atol=1e-6
            )
        chex.assert_trees_all_close(jax.jit(jax.vmap(run))(keys), together, rtol=1e-5, atol=1e-6)

    def test_vmap_over_learning_rates(self, key):
        data = regression()

        def run(rate):
            return jgd.fit(method(rate), PARAMS, data, batch_size=5, epochs=2, key=key).params

        together = jax.vmap(run)(jnp.array([0.1, 0.01]))
        chex.assert_trees_all_close(jax.tree.map(lambda x: x[1], together), run(0.01), rtol=1e-5, atol=1e-6)

    def test_the_second_call_traces_nothing(self, key):
        optimizer = optax.adam(0.1)
        update = chex.assert_max_traces(optimizer.update, n=2)  # a whole batch, and the smaller last one
        counted = jgd.descent(squared, optax.GradientTransformation(optimizer.init, update))
        for seed in range(3):
            jgd.fit(counted, PARAMS, regression(), batch_size=5, epochs=4, key=jax.random.key(seed))


class TestData:
    def test_a_generator_of_the_same_batches(self, key):
        x, y = regression()
        order = np.concatenate([jax.random.permutation(jax.random.fold_in(key, k), 23) for k in range(2)])
        arrays = jgd.fit(method(), PARAMS, (x, y), batch_size=23 - 3, epochs=2, key=key)
        pieces = [order[:20], order[20:23], order[23:43], order[43:]]
        batches = ((x[i], y[i]) for i in pieces)
        made = jgd.fit(method(), PARAMS, batches, batch_size=None, epochs=1, key=key)
        chex.assert_trees_all_close(made, arrays, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        "epochs, steps, updates", [(3, None, 6), (None, 5, 5), (0, None, 0), (None, 0, 0)]
    )
    def test_a_list_of_batches_is_walked_again(self, key, epochs, steps, updates):
        x, y = regression(8)
        batches = [(x[:4], y[:4]), (x[4:], y[4:])]
        fit = jgd.fit(method(), PARAMS, batches, batch_size=None, epochs=epochs, steps=steps, key=key)
        assert int(fit.state.step) == fit.history.value.size == updates

    def test_an_iterable_with_inner_steps_inside_jit(self, key):
        x, y = regression(8)

        def run(params):
            return jgd.fit(method(), params, [(x, y)], batch_size=None, steps=6, inner_steps=3, key=key)

        chex.assert_trees_all_close(jax.jit(run)(PARAMS), run(PARAMS), rtol=1e-5)

    def test_grain(self, key):
        grain = pytest.importorskip("grain")
        x, y = regression()
        rows = [{"x": x[i], "y": y[i]} for i in range(23)]
        loader = grain.MapDataset.source(rows).shuffle(seed=1).batch(5)
        one = jgd.descent(lambda p, example: squared(p, example["x"], example["y"]), optax.sgd(0.1))
        fit = jgd.fit(one, PARAMS, loader, batch_size=None, epochs=2, key=key)
        assert int(fit.state.step) == 2 * len(loader)
        assert fit.history.value[-1] < fit.history.value[0]

    def test_a_tuple_holds_the_arguments_and_anything_else_is_one(self, key):
        class Example(NamedTuple):
            x: jax.Array
            y: jax.Array

        x, y = regression()
        expected = jgd.fit(method(), PARAMS, (x, y), batch_size=5, epochs=1, key=key)
        single = jgd.descent(lambda p, e: squared(p, e["x"], e["y"]), optax.sgd(0.1))
        named = jgd.descent(lambda p, e: squared(p, e.x, e.y), optax.sgd(0.1))
        for one, data in [(single, {"x": x, "y": y}), (single, ({"x": x, "y": y},)), (named, Example(x, y))]:
            fit = jgd.fit(one, PARAMS, data, batch_size=5, epochs=1, key=key)
            chex.assert_trees_all_close(fit, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("batch_size", [5, None])
    def test_shared_arguments_and_other_axes(self, key, batch_size):
        x, y = regression()

        def scaled(p, extra, x, y):
            return extra["scale"] @ jnp.ones(2) * squared(p, x, y)

        shared = jgd.descent(scaled, optax.sgd(0.05), in_axes=(None, None, -1, 0))
        data = ({"scale": jnp.ones(2)}, x.T, y)
        fit = jgd.fit(shared, PARAMS, data, batch_size=batch_size, epochs=2, key=key)
        expected = jgd.fit(method(), PARAMS, (x, y), batch_size=batch_size, epochs=2, key=key)
        chex.assert_trees_all_close(fit.params, expected.params, rtol=1e-5, atol=1e-6)

    def test_examples_that_carry_keys(self, key):
        noisy = jgd.descent(lambda w, k, y: 0.5 * (w + jax.random.normal(k) - y) ** 2, optax.sgd(0.1))
        data = (jax.random.split(key, 23), jnp.ones(23))
        fit = jgd.fit(noisy, jnp.zeros(()), data, batch_size=5, epochs=2, key=key)
        assert np.isfinite(fit.history.value).all()


class TestWatching:
    def test_a_callback_that_returns_true_ends_it(self, key):
        fit = jgd.fit(
            method(), PARAMS, regression(), batch_size=4, epochs=9, key=key, inner_steps=2,
            callback=lambda state, info: int(state.step) == 5,
        )  # fmt: skip
        assert int(fit.state.step) == fit.history.value.size == 5

    def test_a_callback_may_keep_every_state(self, key):
        states = []
        jgd.fit(
            method(), PARAMS, regression(), batch_size=4, steps=5, key=key,
            callback=lambda state, info: states.append(state),
        )  # fmt: skip
        norms = [float(optax.tree.norm(s.params)) for s in states]
        assert len(set(norms)) == 5

    @pytest.mark.parametrize("as_batches", [False, True])
    def test_progress_counts_to_the_end(self, key, capsys, as_batches):
        data = [regression()] * 6 if as_batches else regression()
        fit = jgd.fit(
            method(), PARAMS, data, batch_size=None if as_batches else 4, epochs=1, key=key, progress=True
        )
        shown = capsys.readouterr().out
        assert "6/6" in shown and f"{float(fit.history.value[-1]):.5g}" in shown

    def test_progress_without_rich(self, key, monkeypatch):
        monkeypatch.setitem(sys.modules, "rich", None)
        monkeypatch.setitem(sys.modules, "rich.progress", None)
        with pytest.raises(ImportError, match=r"pip install 'jgd\[demo\]'"):
            jgd.fit(method(), PARAMS, regression(), batch_size=4, epochs=1, key=key, progress=True)

    @pytest.mark.parametrize("watched", [False, True])
    def test_a_run_that_diverges(self, key, watched):
        callback = (lambda state, info: None) if watched else None
        run = dict(batch_size=4, epochs=60, key=key, callback=callback)
        silent = jgd.fit(method(30.0), PARAMS, regression(), **run).history
        bad = int(np.argmin(np.isfinite(silent.value) & np.isfinite(silent.grad_norm))) + 1
        assert bad > 1
        with pytest.raises(
            FloatingPointError, match=rf"^update {bad} met a value of .* learning rate"
        ) as caught:
            jgd.fit(method(30.0), PARAMS, regression(), **run, check_finite=True)
        error = caught.value
        assert error.history.value.size == bad
        np.testing.assert_array_equal(np.isfinite(error.history.grad_norm[:-1]), True)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(error.state))
        # The last state before the update, or before its epoch of 6.
        assert int(error.state.step) == (bad - 1 if watched else (bad - 1) // 6 * 6)

    @pytest.mark.parametrize("watched", [False, True])
    def test_an_update_that_overflows_at_the_very_end(self, key, watched):
        explode = jgd.descent(lambda w, x: 1e10 * w * x, optax.sgd(1e30))
        callback = (lambda state, info: None) if watched else None
        with pytest.raises(
            FloatingPointError, match=r"update 1 met .* and left parameters that are not finite"
        ):
            jgd.fit(
                explode, jnp.zeros(()), jnp.ones(4), batch_size=None, steps=1, key=key, callback=callback,
                check_finite=True,
            )  # fmt: skip

    def test_a_run_that_stays_finite_is_the_same_checked(self, key):
        run = dict(batch_size=4, steps=20, key=key)
        chex.assert_trees_all_close(
            jgd.fit(method(), PARAMS, regression(), **run, check_finite=True),
            jgd.fit(method(), PARAMS, regression(), **run), rtol=1e-5, atol=1e-6,
        )  # fmt: skip


# Convolutions on a CPU, which crawl in compiled loops


def convolved(side):
    def loss(w, x):
        return jnp.sum(jnp.tanh(jax.lax.conv(x[None], w, (1, 1), "SAME")))

    draw = np.random.default_rng(0)
    w = jnp.asarray(draw.normal(size=(8, 3, 3, 3)), jnp.float32)
    return (
        jgd.descent(loss, optax.sgd(1e-4)),
        w,
        jnp.asarray(draw.normal(size=(9, 3, side, side)), jnp.float32),
    )


@pytest.mark.parametrize(("side", "loops"), [(4, 1), (64, 0)])
def test_large_convolutions_are_not_put_into_a_loop(side, loops, monkeypatch):
    calls, original = [], fit_module.run_epochs
    monkeypatch.setattr(fit_module, "run_epochs", lambda *a, **k: calls.append(0) or original(*a, **k))
    method, w, x = convolved(side)
    options = {"batch_size": 4, "epochs": 2, "key": jax.random.key(0)}
    result = jgd.fit(method, w, x, **options)
    assert len(calls) == loops and result.history.value.shape == (6,)
    watched = jgd.fit(method, w, x, **options, callback=lambda *_: None)
    np.testing.assert_allclose(watched.params, result.params, rtol=1e-5)
    if not loops:
        np.testing.assert_array_equal(watched.params, result.params)
        inside = jax.jit(lambda x: jgd.fit(method, w, x, **options).params)(x)
        np.testing.assert_allclose(inside, result.params, rtol=1e-4)


# Meshes whose axes are explicit, as `jax.make_mesh` makes them


@functools.cache
def alone(batch_size):
    x, y = regression()
    return jgd.fit(
        jgd.descent(squared, optax.adam(0.1)), PARAMS, (x[:16], y[:16]), batch_size=batch_size, epochs=2,
        key=jax.random.key(0),
    ).params  # fmt: skip


@pytest.mark.sample(lambda where, batch_size, callback: batch_size == 6 or where == "sharded")
@pytest.mark.parametrize("callback", [None, lambda *_: None], ids=["compiled", "watched"])
@pytest.mark.parametrize("batch_size", [4, None, 6])
@pytest.mark.parametrize("where", ["host", "replicated", "sharded", "another axis"])
def test_explicit_meshes(where, batch_size, callback):
    mesh = mesh_of(*((2, 2) if where == "another axis" else (4,)), kind=AxisType.Explicit)
    put = lambda tree, *spec: jax.device_put(tree, NamedSharding(mesh, P(*spec)))
    data = tuple(np.asarray(x)[:16] for x in regression())
    if where != "host":
        data = put(data) if where == "replicated" else put(data, "data")
    method = jgd.descent(squared, optax.adam(0.1))
    result = jgd.fit(
        method, put(PARAMS), data, batch_size=batch_size, epochs=2, key=jax.random.key(0), callback=callback
    )
    for got, want in zip(jax.tree.leaves(result.params), jax.tree.leaves(alone(batch_size)), strict=True):
        assert got.sharding.mesh == mesh
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_another_length_compiles_nothing():
    x, y = regression()
    train = jgd.descent(squared, optax.adam(0.1))
    run = lambda **length: jgd.fit(train, PARAMS, (x, y), batch_size=8, key=jax.random.key(0), **length)
    first = run(steps=40)
    with compilations() as made:
        longer, epochs, none = run(steps=90), run(epochs=7), run(steps=0)
    assert not made
    np.testing.assert_array_equal(longer.history.value[:40], first.history.value)
    assert epochs.history.grad_norm.shape == epochs.history.value.shape != (0,)
    assert none.history.value.shape == (0,)
