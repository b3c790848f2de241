"""Differences of large numbers between examples, and numbers that are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Draw
from internals import norms, part_gradients

import jgd


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


def test_an_operand_wider_than_the_output(x64):
    draw = Draw(6)
    w, x = jnp.asarray(draw(6, 6)), jnp.asarray(draw(4, 5, 6))
    narrow = lambda w, x: jnp.einsum("tp,pq->tq", x, w, preferred_element_type=jnp.float32)
    loss = lambda w, x: jnp.sum(jnp.sin(narrow(w, x)))
    flat = np.asarray(jax.vmap(jax.grad(loss), (None, 0))(w, x)).reshape(4, -1)
    grads = jgd.per_example_grad(loss, strategy="factored")(w, x)
    np.testing.assert_allclose(jgd.norms(grads), np.linalg.norm(flat, axis=1), rtol=1e-6)
    np.testing.assert_allclose(jgd.gram(grads), flat @ flat.T, rtol=1e-5)
    trace = np.sum(np.var(flat, axis=0, ddof=1))
    np.testing.assert_allclose(jgd.noise_scale(grads).trace_covariance, trace, rtol=1e-5)


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


# Lengths


SIZES = (0.0, 1e-34, 1e-30, 1e-20, 1e-13, 1e-5, 1.0, 1e5, 1e11, 1e13, 1e20, 1e30, 1e35)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 7, 1000, 5003])
def test_lengths_of_numbers_of_any_size(size, count):
    x = (Draw(count)(count) * size).astype(np.float32)
    want = np.linalg.norm(np.float64(x))
    for length in (norms.length, jax.jit(norms.length)):
        np.testing.assert_allclose(length(x), want, rtol=5e-7)
    slope = jax.jit(jax.grad(norms.length))(x)
    if 1e-30 <= size <= 1e30 or size == 0:
        np.testing.assert_allclose(slope, np.float64(x) / (want or 1), rtol=1e-5, atol=1e-7)


def test_a_length_of_numbers_of_all_sizes():
    x = np.float32([1e-30, 1e-13, 3.0, 1e12, 4e12, 3e12])
    np.testing.assert_allclose(norms.length(x), np.linalg.norm(np.float64(x)), rtol=1e-6)
    for bad in (np.inf, np.nan):
        assert not np.isfinite(jax.jit(norms.length)(np.append(x, np.float32(bad))))


def test_a_gradient_of_0_is_not_computed_again(monkeypatch):
    """The loop looks at an example of which the leaf knows nothing, and goes on."""
    built = []
    by_columns = part_gradients._by_columns
    keep = lambda made, rules: (jax.debug.callback(built.append, 0), by_columns(made, rules))[1]
    monkeypatch.setattr(part_gradients, "_by_columns", keep)
    jax.clear_caches()
    draw = Draw(3)
    w, x = jnp.asarray(draw(16, 12), jnp.float32), jnp.asarray(draw(4, 3, 16), jnp.float32)
    there = jnp.asarray([1.0, 0.0, 1e-25, 0.0], jnp.float32)
    loss = lambda w, x, there: there * jnp.sum(jnp.sin(x @ w))
    grads = jgd.per_example_grad(loss, strategy="factored")(w, x, there)
    got = np.asarray(jgd.norms(grads))
    blocks = jax.vmap(jax.grad(loss), (None, 0, 0))(w, x, there)
    np.testing.assert_allclose(got, np.linalg.norm(np.float64(blocks).reshape(4, -1), axis=1), rtol=1e-5)
    jax.effects_barrier()
    assert len(built) == 1
    jax.clear_caches()


@pytest.mark.parametrize("microbatch_size", [None, 1])
def test_a_finite_gradient_whose_terms_bound_overflows_is_not_dropped(microbatch_size):
    """The largest operand and the largest cotangent are at different positions; the weight is a computed one."""
    w, x = jnp.ones((4, 3)), jnp.zeros((2, 2, 4)).at[:, 0].set(1e25)
    scale = jnp.array([[1e-25, 1e15]] * 2)
    loss = lambda w, x, scale: jnp.sum(scale[:, None] * (x @ (w * jnp.tanh(w))))
    make = jgd.per_example_grad(loss, strategy="factored", microbatch_size=microbatch_size)
    blocks = np.float64(jax.vmap(jax.grad(loss), (None, 0, 0))(w, x, scale))
    want = np.sum(blocks / np.linalg.norm(blocks, axis=(1, 2), keepdims=True), axis=0)
    np.testing.assert_allclose(jgd.clipped_sum(make(w, x, scale), 1.0), want, rtol=1e-5)
