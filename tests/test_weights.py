"""Weights at the edges: one that dominates, sums out of range, negative and complex ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jgd

BLOCKS = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
GRADS = jnp.asarray(BLOCKS)


def variance_of(weights):
    """The textbook's, in 64 bits: by all pairs, Σ_ij w_i w_j (g_i − g_j)² / 2 / (V₁² − V₂)."""
    w, g = np.asarray(weights, np.float64), np.asarray(BLOCKS, np.float64)
    pairs = np.einsum("i,j,ijk->k", w, w, np.square(g[:, None] - g[None])) / 2
    others = w.sum() - w if w.max() < 1e4 else np.array([np.delete(w, i).sum() for i in range(len(w))])
    return pairs / np.sum(w * others)


@pytest.mark.parametrize("weight", [1.0, 1e3, 1e5, 1e8])
def test_the_variance_where_one_weight_dominates(weight):
    weights = np.array([1.0, weight, 0.5, 2.0, 1.0], np.float32)
    np.testing.assert_allclose(jgd.variance(GRADS, weights), variance_of(weights), rtol=1e-5)


@pytest.mark.parametrize("scale", [1e38, 1e-37])
def test_weights_whose_sum_is_out_of_range(scale):
    weights = np.array([1.0, 2.0, 3.0, 2.0, 1.0]) * scale
    weights = weights.astype(np.float32)
    exact = weights.astype(np.float64)
    share = exact / exact.sum()
    np.testing.assert_allclose(jgd.mean(GRADS, weights), share @ BLOCKS, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jgd.second_moment(GRADS, weights), share @ BLOCKS**2, rtol=1e-5)
    np.testing.assert_allclose(jgd.variance(GRADS, weights), variance_of(share), rtol=1e-5)


def test_the_derivative_of_a_mean_by_its_weights():
    weights = jnp.asarray([1.0, 2.0, 3.0, 2.0, 1.0])
    ours = jax.grad(lambda w: jnp.sum(jnp.sin(jgd.mean(GRADS, w))))(weights)
    plain = jax.grad(lambda w: jnp.sum(jnp.sin(w / jnp.sum(w) @ GRADS)))(weights)
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("moment", [jgd.second_moment, jgd.variance])
def test_negative_weights_of_a_moment_are_refused(moment):
    with pytest.raises(ValueError, match=r"`weights` must not be negative, .*, got -2.0"):
        moment(GRADS, jnp.asarray([1.0, -2.0, 1.0, 1.0, 1.0]))


def test_negative_weights_of_a_sum_are_signs():
    weights = np.array([1.0, -2.0, 1.0, 0.0, 1.0], np.float32)
    np.testing.assert_allclose(jgd.sum(GRADS, weights), weights @ BLOCKS, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", [jgd.sum, jgd.mean, jgd.second_moment, jgd.variance])
def test_complex_weights_are_refused(reduction):
    with pytest.raises(TypeError, match="`weights` must be real numbers, got complex64"):
        reduction(GRADS, jnp.ones(5, jnp.complex64))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scale", [1e-4, 300.0])
def test_moments_of_half_precision_stay_in_range(dtype, scale):
    grads = (GRADS * scale).astype(dtype)
    exact = np.asarray(grads, np.float64)
    got = jgd.second_moment(grads)
    assert got.dtype == jnp.float32 and jgd.variance(grads).dtype == jnp.float32
    np.testing.assert_allclose(got, np.mean(exact**2, axis=0), rtol=1e-5)
    np.testing.assert_allclose(jgd.variance(grads), np.var(exact, axis=0, ddof=1), rtol=1e-4)


def test_an_integer_bound_beyond_all_of_jax():
    np.testing.assert_allclose(jgd.clipped_sum(GRADS, 10**30), BLOCKS.sum(0), rtol=1e-5, atol=1e-6)


def test_the_derivative_by_the_bound_beside_an_example_that_is_not_finite():
    grads = GRADS.at[2].set(jnp.nan)
    slope = jax.grad(lambda c: jnp.sum(jgd.clipped_sum(grads, c)))(0.5)
    units = BLOCKS / np.linalg.norm(BLOCKS, axis=1, keepdims=True)
    np.testing.assert_allclose(slope, np.delete(units, 2, 0).sum(), rtol=1e-5)
