"""Losses and reductions that take a key are given another one at each update."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jgd

X = jnp.arange(12.0).reshape(6, 2) / 6
KEY = jax.random.key(3)
SGD = optax.sgd(0.1)


def dropped(w, x, *, key):
    """Its gradient is the mask times x."""
    return jnp.sum(w * x * jax.random.bernoulli(key, 0.5, x.shape))


def noisy(grads, key, *, scale=1.0):
    return jnp.zeros(2) + scale * jax.random.normal(key, (2,))


def weighted_noise(grads, weights=None, *, key):
    return jgd.mean(grads, weights) + jax.random.normal(key, (2,))


def private(loss=lambda w, x: w @ x, reduce=noisy):
    return jgd.descent(loss, SGD, reduce=reduce)


def seen(method, **options):
    """The parameters after every update, and the result."""
    path = []
    options = {"batch_size": 2, "epochs": 2, "key": KEY} | options
    result = jgd.fit(method, jnp.zeros(2), X, callback=lambda state, _: path.append(state.params), **options)
    return np.array(path), result


def test_another_key_at_each_update():
    moves = np.diff(np.concatenate([np.zeros((1, 2)), seen(private())[0]]), axis=0) / -0.1
    assert len(np.unique(moves.round(4), axis=0)) == 6
    assert np.abs(moves).max() < 6 and np.abs(moves).min() > 1e-4


def test_a_key_that_is_bound_stays():
    moves = np.diff(seen(private(reduce=functools.partial(noisy, key=KEY)))[0], axis=0)
    np.testing.assert_allclose(moves, np.broadcast_to(moves[0], moves.shape), rtol=1e-4)


def test_another_key_for_each_example():
    method = jgd.descent(dropped, optax.sgd(1.0), reduce=jgd.sum)
    rows = jnp.ones((64, 2))
    state, info = method.step(method.init(jnp.zeros(2)), rows, key=KEY)
    kept = -np.asarray(state.params)
    assert kept.min() > 16 and kept.max() < 48  # of 64, were it one mask all or none
    again, _ = method.step(method.init(jnp.zeros(2)), rows, key=KEY)
    other, _ = method.step(method.init(jnp.zeros(2)), rows, key=jax.random.key(4))
    assert (again.params == state.params).all() and (other.params != state.params).any()
    assert info.value == 0


@pytest.mark.parametrize("derivative", ["reverse", "forward", "finite_difference"])
def test_each_derivative_sees_the_same_masks(derivative):
    method = jgd.descent(dropped, SGD, derivative=derivative)
    got, _ = method.step(method.init(jnp.zeros(2)), X, key=KEY)
    own = jax.random.split(KEY)[0]
    masks = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (2,)))(jax.random.split(own, 6))
    np.testing.assert_allclose(got.params, -0.1 * jnp.mean(X * masks, axis=0), rtol=1e-3)


def test_a_derivative_of_the_batch_may_take_a_key():
    def value_and_grad(w, x, *, key):
        return jnp.mean(x @ w), jnp.mean(x, axis=0) + jax.random.normal(key, (2,))

    path, _ = seen(jgd.descent(lambda w, x: w @ x, SGD, derivative=value_and_grad), batch_size=None, epochs=3)
    moves = np.diff(path, axis=0)
    assert np.abs(moves[0] - moves[1]).max() > 1e-3


@pytest.mark.sample(lambda loss, options: loss is dropped)
@pytest.mark.parametrize("loss", [dropped, lambda w, x: w @ x])
@pytest.mark.parametrize("options", [{}, {"inner_steps": 3}, {"batch_size": 4}, {"batch_size": None}])
def test_both_ways_to_run_draw_the_same(loss, options):
    options = {"batch_size": 2, "epochs": 3, "key": KEY} | options
    method = private(loss)
    compiled = jgd.fit(method, jnp.zeros(2), X, **options)
    watched = jgd.fit(method, jnp.zeros(2), X, callback=lambda *_: None, **options)
    np.testing.assert_array_equal(compiled.params, watched.params)
    under_jit = jax.jit(lambda key: jgd.fit(method, jnp.zeros(2), X, **options | {"key": key}).params)(KEY)
    np.testing.assert_allclose(under_jit, compiled.params, rtol=1e-5)


def test_a_loader_and_many_runs_at_once():
    batches = [X[:3], X[3:]]
    run = lambda seed: jgd.fit(
        private(), jnp.zeros(2), batches, batch_size=None, epochs=2, key=jax.random.key(seed)
    )
    assert (run(0).params == run(0).params).all() and (run(0).params != run(1).params).any()
    of = lambda key: jgd.fit(private(dropped), jnp.zeros(2), X, batch_size=2, epochs=1, key=key).params
    keys = jax.random.split(KEY, 3)
    np.testing.assert_allclose(jax.vmap(of)(keys), jnp.stack([of(key) for key in keys]), rtol=1e-5)


def test_a_run_that_goes_on_draws_what_one_that_never_stopped_does(tmp_path):
    method, stop = private(dropped), lambda state, _: int(state.step) == 5
    whole = jgd.fit(method, jnp.zeros(2), X, batch_size=2, epochs=4, key=KEY)
    options = {"batch_size": 2, "key": KEY, "checkpoint": tmp_path}
    jgd.fit(method, jnp.zeros(2), X, epochs=4, callback=stop, **options)
    again = jgd.fit(private(dropped), jnp.zeros(2), X, epochs=4, **options)
    np.testing.assert_array_equal(again.params, whole.params)


def test_an_order_key_is_no_update_key():
    keys = [jax.random.fold_in(KEY, epoch) for epoch in range(50)]
    own = [jgd._methods.method.key_of_update(KEY, jnp.int32(step)) for step in range(50)]
    bits = np.array([jax.random.key_data(key) for key in keys + own])
    assert len(np.unique(bits, axis=0)) == 100


def test_absent_examples_and_line_searches():
    method = jgd.descent(lambda w, x: w @ x, SGD, reduce=weighted_noise)
    start = method.init(jnp.zeros(2))
    got, _ = method.step(start, X, weights=jnp.ones(6).at[3].set(0), key=KEY)
    noise = jax.random.normal(jax.random.split(KEY)[1], (2,))
    np.testing.assert_allclose(
        got.params, -0.1 * (jnp.mean(jnp.delete(X, 3, axis=0), axis=0) + noise), rtol=1e-5
    )
    search = jgd.descent(lambda w, x, *, key: jnp.sum((w - x + jax.random.normal(key)) ** 2), optax.lbfgs())
    result = jgd.fit(search, jnp.zeros(2), X, batch_size=None, steps=5, key=KEY)
    assert np.isfinite(result.params).all()


def test_two_players_take_keys():
    game = jgd.descent_ascent(lambda p, x, *, key: p[0] * p[1] + x * jax.random.normal(key) * p[0], SGD, SGD)
    run = lambda key: jgd.fit(
        game, (jnp.ones(()), jnp.ones(())), jnp.ones(4), batch_size=2, epochs=2, key=key
    )
    assert run(KEY).params != run(jax.random.key(4)).params


def test_other_arguments_that_are_called_key():
    """A batch's own, and one with a default."""
    method = jgd.descent(lambda w, x, key: w @ x * jax.random.uniform(key), SGD)
    jgd.fit(method, jnp.zeros(2), (X, jax.random.split(KEY, 6)), batch_size=2, epochs=1, key=KEY)
    method = jgd.descent(lambda w, x, *, key=2.0: key * (w @ x), SGD)
    state, _ = method.step(method.init(jnp.zeros(2)), X)
    np.testing.assert_allclose(state.params, -0.2 * jnp.mean(X, axis=0), rtol=1e-6)
    optional = jgd.descent(lambda w, x, *, key=None: w @ x * jax.random.uniform(key), SGD)
    optional.step(optional.init(jnp.zeros(2)), X, key=KEY)


def test_keys_that_are_missing_or_not_wanted():
    for method, who in ((private(), "`reduce`"), (jgd.descent(dropped, SGD), "the loss")):
        with pytest.raises(ValueError, match=f"`key` is missing: {who} takes one"):
            method.step(method.init(jnp.zeros(2)), X)
    method = jgd.descent(lambda w, x: w @ x, SGD)
    with pytest.raises(ValueError, match="neither the loss nor `reduce` takes one"):
        method.step(method.init(jnp.zeros(2)), X, key=KEY)


def test_axes_of_a_keyed_loss():
    for axes in (0, (None, 0), None):
        method = jgd.descent(dropped, SGD, in_axes=axes)
        got, _ = method.step(method.init(jnp.zeros(2)), X, key=KEY)
        want, _ = jgd.descent(dropped, SGD).step(method.init(jnp.zeros(2)), X, key=KEY)
        np.testing.assert_array_equal(got.params, want.params)
    with pytest.raises(ValueError, match="give a tuple"):
        jgd.descent(dropped, SGD, in_axes=1)
