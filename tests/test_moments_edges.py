"""Moments in few bits, of numbers that are not finite, and by weights of either sign."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import B, Draw
from internals import moments, tiles
from rule_problems import WEIGHTS, dense, gradients

import jgd


@pytest.mark.sample(lambda tile, positions: (tile == 1) == (positions == 40))
@pytest.mark.parametrize("weights", [None, np.float64, np.float16])
@pytest.mark.parametrize("positions", [1, 40])
@pytest.mark.parametrize("tile", [1, 2])
def test_moments_in_fewer_bits_than_the_weights(tile, positions, weights, monkeypatch, forget, x64):
    monkeypatch.setattr(tiles, "tile_of", lambda size, elements: min(tile, size))
    problem = dense(Draw(0), positions)
    narrow = dataclasses.replace(
        problem, params=problem.params.astype(jnp.float32), batch=(problem.batch[0].astype(jnp.float32),)
    )
    grads, blocks = gradients(narrow), np.asarray(oracle.vmap_of_grad(problem))
    w = np.ones(B) if weights is None else WEIGHTS
    share = (w / w.sum())[:, None, None]
    spread = (share * (blocks - (share * blocks).sum(0)) ** 2).sum(0) / (1 - np.square(share).sum())
    asked = None if weights is None else jnp.asarray(WEIGHTS.astype(weights))
    oracle.assert_close(jgd.second_moment(grads, asked), (share * blocks**2).sum(0), 1e-5)
    oracle.assert_close(jgd.variance(grads, asked), spread, 1e-5)


@pytest.mark.parametrize("tile", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "broken", [{}, {0: np.inf}, {2: -np.inf}, {4: np.inf}, {1: np.nan}, {0: np.inf, 4: np.nan}]
)
def test_moments_of_what_is_not_finite(broken, tile, x64):
    """Wherever it lies among the tiles, an infinite gradient makes the second moment inf and the variance nan."""
    grads = np.array(Draw(0)(5, 2))
    for example, value in broken.items():
        grads[example, 1] = value
    cut = [jnp.asarray(grads[i : i + tile]) for i in range(0, 5, tile)]
    each = [moments.spread_of(x, None, one_device=True) for x in cut]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *each)
    for whole in (functools.reduce(moments.joined, each), moments.joined_all(stacked)):
        np.testing.assert_allclose(moments.square_around_zero(whole), np.square(grads).sum(0), rtol=1e-12)
        with np.errstate(invalid="ignore"):
            spread = 5 * np.var(grads, axis=0)
        np.testing.assert_allclose(moments.square_around_mean(whole), spread, rtol=1e-12)


@pytest.mark.parametrize("weights", [None, np.array([1.0, 0, 1, 1], np.float32)], ids=["", "weights"])
@pytest.mark.parametrize(
    "held",
    [{"strategy": "factored"}, {"strategy": "materialized"}, {"microbatch_size": 1}, {"microbatch_size": 3}],
    ids=str,
)
def test_a_variance_beyond_float32_is_infinite(held, weights):
    x, y = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    x[0, 0], y[0, 0] = 1e10, 3e10
    grads = jgd.per_example_grad(lambda w, x, y: jnp.sum((x @ w) * y), **held)(jnp.zeros((3, 3)), x, y)
    variance = np.asarray(jgd.variance(grads, weights))
    assert np.isposinf(variance[0, 0])
    assert np.all(np.isfinite(variance.reshape(-1)[1:]))


def test_a_variance_by_weights_that_leave_one_example():
    assert np.isnan(jgd.variance([jnp.arange(3.0)], jnp.array([2.0, 0.0, 0.0]))[0])
