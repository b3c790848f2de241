"""What a clipped sum does with gradients in any form: the norms, the factors, the sum."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jgd._dtypes import add
from jgd._weighing import linear, sums


def total(squares: list[jax.Array], size: int) -> jax.Array:
    """‖g_i‖² of the leaves' own."""
    return functools.reduce(add, squares, jnp.zeros(size, jnp.float32))


def root(square: jax.Array) -> jax.Array:
    """√x whose derivative at 0 is 0, so that a penalty on norms trains past a zero gradient."""
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), square)


def clipped_sum(form: Any, max_norm: Any, weights: jax.Array | None) -> tuple[list[jax.Array], jax.Array]:
    """Σ w_i min(1, C/‖g_i‖) g_i, in the accumulators' dtypes, and the ‖g_i‖.

    A gradient that is not finite adds nothing.
    """
    form = form.for_norms_and_sums()
    norm = root(total(form.squared_norms(), form.size))
    inside = norm <= max_norm
    factor = jnp.where(inside, 1, max_norm / jnp.where(inside, 1, norm))
    factor = jnp.where(jnp.isfinite(norm), factor, 0)
    if weights is not None:
        factor = factor * weights
    return linear(sums, form, factor), norm
