"""Gradients whose squares leave float32, and differences of large numbers between examples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import Draw, Problem
from internals import gradients as gradients_module

import jgd

B, T, D = 5, 4, 6

EXACT = {"b": 2.0**-90, "a": 2.0**84}  # factors whose squares leave float32, of gradients that are ordinary


def dense(p, x):
    return jnp.sum(jnp.tanh(x @ p["w"]) @ p["v"])


def one_position(p, x):
    return jnp.sum(jnp.tanh(x[0] @ p["w"]) @ p["v"])


def looked_up(p, x):
    return jnp.sum(jnp.tanh(p["w"][jnp.array([0, 2, 2])] * x[:3]) @ p["v"])


def convolved(p, x):
    h = jax.lax.conv_general_dilated(x[None, None], p["w"][None, None], (1, 1), "SAME")
    return jnp.sum(jnp.tanh(h[0, 0]) @ p["v"])


def computed(p, x):
    return jnp.sum(jnp.tanh(x @ jnp.exp(p["w"])) @ p["v"])


LOSSES = (dense, looked_up, convolved, computed)
OF_SQUARES = (
    "where no norm is a sum over pairs of positions, none is computed again: all would have to stay for it"
)


def problem_of(loss, scale):
    draw = Draw(11)
    params = {"w": draw(D, D, scale=0.3), "v": draw(D, 2, scale=0.3)}
    x = draw(B, T, D, scale=1.0)
    x[1] = 0.0
    exact = lambda x: jnp.asarray(x, jnp.float32)
    return Problem(lambda p, x: scale * loss(p, x), jax.tree.map(exact, params), (exact(x),))


def norms_by_leaf(problem):
    """In float64, of the gradients that float32 gives."""
    blocks = jax.vmap(jax.grad(problem.loss), (None, 0))(problem.params, *problem.batch)
    return {k: np.linalg.norm(np.asarray(x, np.float64).reshape(B, -1), axis=1) for k, x in blocks.items()}


@pytest.mark.parametrize(
    "loss", [*LOSSES, pytest.param(one_position, marks=pytest.mark.xfail(strict=True, reason=OF_SQUARES))]
)
@pytest.mark.parametrize("scale", [2.0**-84, 2.0**84])
@pytest.mark.parametrize("way", ["factored", "jitted", "microbatched"])
def test_norms_have_the_range_of_their_dtype(loss, scale, way):
    problem = problem_of(loss, scale)
    by_leaf = norms_by_leaf(problem)
    microbatch_size = 2 if way == "microbatched" else None
    make = jgd.per_example_grad(problem.loss, strategy="factored", microbatch_size=microbatch_size)

    def ask(params, x):
        grads = make(params, x)
        return jgd.norms(grads), jgd.norms(grads, per_leaf=True)

    norms, each = (jax.jit(ask) if way == "jitted" else ask)(problem.params, *problem.batch)
    want = np.sqrt(sum(np.square(x) for x in by_leaf.values()))
    np.testing.assert_allclose(norms, want, rtol=1e-5)
    for name, x in by_leaf.items():
        np.testing.assert_allclose(each[name], x, rtol=1e-5)


@pytest.mark.parametrize("large", [True, False])
def test_factors_out_of_range_of_gradients_that_are_not(large):
    up, down = (EXACT["a"], EXACT["b"]) if large else (EXACT["b"], EXACT["a"])
    loss = lambda w, x: jnp.sum(jnp.sum((x * up) @ w) * down)
    x, w = jnp.ones((B, T, D)), jnp.ones((D, D))
    want = T * D * up * down
    grads = jgd.per_example_grad(loss, strategy="factored")(w, x)
    np.testing.assert_allclose(jgd.norms(grads), want, rtol=1e-5)
    np.testing.assert_allclose(jgd.clipped_sum(grads, want / 2), B * want / 2 / D, rtol=1e-5)


def test_a_large_example_is_clipped_and_not_dropped():
    blocks = jnp.asarray([[3e25, 4e25], [0.3, 0.4]], jnp.float32)
    clipped, norms = jgd.clipped_sum({"w": blocks}, 1.0, return_norms=True)
    np.testing.assert_allclose(norms, [5e25, 0.5], rtol=1e-6)
    np.testing.assert_allclose(clipped["w"], [0.9, 1.2], rtol=1e-6)


def test_what_is_not_finite_itself_has_no_finite_norm():
    grads = {"w": jnp.asarray([[jnp.inf, 1.0], [jnp.nan, 1.0], [1.0, 0.0]], jnp.float32)}
    norms = jgd.norms(grads)
    assert np.isfinite(norms).tolist() == [False, False, True]
    np.testing.assert_allclose(jgd.clipped_sum(grads, 0.5)["w"], [0.5, 0.0])


def test_examples_without_a_gradient_are_not_computed_again(monkeypatch):
    trusted, asked = gradients_module.trusted, []
    monkeypatch.setattr(gradients_module, "trusted", lambda *args: asked.append(trusted(*args)) or asked[-1])
    jax.clear_caches()
    hinge = lambda w, x: jnp.sum(jax.nn.relu(jnp.sum(jnp.sin(x @ w)) - 100.0))
    with jax.disable_jit():
        norms = jgd.norms(jgd.per_example_grad(hinge, strategy="factored")(jnp.eye(D), jnp.ones((B, T, D))))
    np.testing.assert_array_equal(norms, 0)
    assert len(asked) == 1
    assert jnp.all(asked[0])


def test_the_derivative_of_a_norm_out_of_range():
    draw = Draw(3)
    w, x = jnp.asarray(draw(D, D), jnp.float32), jnp.asarray(draw(B, T, D), jnp.float32)
    scale = 2.0**84

    def penalty(scale, w):
        loss = lambda w, x: scale * jnp.sum(jnp.tanh(x @ w))
        return jnp.sum(jgd.norms(jgd.per_example_grad(loss, strategy="factored")(w, x)))

    got, want = jax.grad(functools.partial(penalty, scale))(w), jax.grad(functools.partial(penalty, 1.0))(w)
    oracle.assert_close(np.asarray(got, np.float64) / scale, np.asarray(want), 1e-4)


@pytest.mark.parametrize("spread", [1.0, 0.01])
@pytest.mark.parametrize(
    "options", [dict(strategy="factored"), dict(strategy="materialized"), dict(microbatch_size=8)]
)
def test_a_noise_scale_of_gradients_that_are_nearly_the_same(spread, options):
    draw = Draw(2)
    x = np.asarray(1000 + spread * draw(32, 20, scale=1.0), np.float32)
    scale = jgd.noise_scale(jgd.per_example_grad(lambda w, x: jnp.sum(w * x), **options)(jnp.zeros(20), x))
    wide = x.astype(np.float64)
    trace = np.sum(np.var(wide, axis=0, ddof=1))
    np.testing.assert_allclose(scale.trace_covariance, trace, rtol=1e-3)
    np.testing.assert_allclose(scale.squared_norm, np.sum(wide.mean(0) ** 2) - trace / 32, rtol=1e-5)


def test_the_parts_of_the_noise_scale_are_unbiased():
    """Over 4,000 batches of 8 gradients of a known mean and covariance."""
    mean, deviations = np.array([1.0, -0.5, 0.25]), np.array([0.5, 1.0, 2.0])
    gradients = mean + deviations * np.random.default_rng(0).normal(size=(4000, 8, 3))
    scale = jax.vmap(jgd.noise_scale)(jnp.asarray(gradients, jnp.float32))
    for got, want in (
        (scale.trace_covariance, np.sum(deviations**2)),
        (scale.squared_norm, np.sum(mean**2)),
    ):
        error = np.std(got) / np.sqrt(len(gradients))
        assert abs(np.mean(got) - want) < 4 * error < 0.1 * want


@pytest.mark.parametrize("reduction", [jgd.second_moment, jgd.variance])
def test_an_infinite_lookup_stays_in_its_row(reduction):
    draw = Draw(4)
    table, ids = jnp.asarray(draw(10, 4), jnp.float32), jnp.array([[1, 2, 3], [1, 1, 5], [2, 7, 7]])
    x = jnp.ones((3, 3)).at[0, 1].set(jnp.inf)
    loss = lambda table, ids, x: jnp.sum(jnp.sin(table[ids]) * x[:, None])
    got = reduction(jgd.per_example_grad(loss, strategy="factored")(table, ids, x))
    want = reduction(jax.vmap(jax.grad(loss), (None, 0, 0))(table, ids, x))
    assert np.isfinite(want).sum() == 36
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_traced_negative_bound_gives_nan():
    blocks = {"w": jnp.ones((2, 3))}
    assert np.all(np.isnan(jax.jit(lambda bound: jgd.clipped_sum(blocks, bound))(-1.0)["w"]))
