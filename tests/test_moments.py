"""The spread of outer products where the difference of two sums cannot be trusted: its value and its derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from internals import Outer, moments

B, SCALE = 5, 3.0


def spread(left, right, weights):
    """SCALE · Σ w (g − mean)² as one writes it; an absent example's factors are no numbers."""
    w = jnp.ones(B) if weights is None else jnp.asarray(weights)
    share = w[:, None, None, None]
    g = jnp.where(share != 0, left[:, :, 0, :, None] * right[:, :, 0, None, :], 0)
    mean = (share * g).sum(0) / w.sum()
    return SCALE * (share * (g - mean) ** 2).sum(0)


SHAPES = [(1, 1, 1), (1, 1, 9), (1, 7, 5), (2, 3, 1), (3, 1, 4)]


# Each shape once, between them each tile with each noise, with and without weights.
CHOSEN = [(7, 1, True), (1 << 18, 1e-6, True), (7, 1e-6, False), (1 << 18, 1, False), (7, 1e-6, True)]


@pytest.mark.sample(
    lambda tile, noise, weights, shape: (tile, noise, weights is None) == CHOSEN[SHAPES.index(shape)]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weights", [None, np.array([0.5, 0, 1, 2, 0.3])], ids=["plain", "weighted"])
@pytest.mark.parametrize("noise", [1, 1e-6])
@pytest.mark.parametrize("tile", [7, 1 << 18])
def test_a_spread_whose_sums_cancel(tile, noise, weights, shape, monkeypatch, x64):
    monkeypatch.setattr(moments, "_TILE", tile)
    n, p, q = shape
    rng = np.random.default_rng(0)
    left, right = (1 + noise * rng.normal(size=(B, n, 1, width)) for width in (p, q))
    asked = None if weights is None else jnp.asarray(weights)
    made = jax.jit(lambda *sides: moments.spread_of_outer(Outer(*sides), asked, SCALE))
    want = spread(left, right, weights)
    slope = jax.grad(lambda *sides: spread(*sides, weights).sum(), argnums=(0, 1))(left, right)
    broken = left if weights is None else left + np.where(weights == 0, np.nan, 0)[:, None, None, None]
    oracle.assert_close(made(broken, right), want, 1e-6)
    oracle.assert_close(jax.grad(lambda *s: made(*s).sum(), argnums=(0, 1))(broken, right), slope, 1e-5)
    two = jax.vmap(made)(jnp.stack([broken, 2 * broken]), jnp.stack([right, right]))
    oracle.assert_close(two[1], 4 * want, 1e-6)
