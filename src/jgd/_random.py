"""The random directions of `jgd.project`."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def directions(key: jax.Array, leaf: int, shape: Sequence[int], dim: int) -> tuple[jax.Array, jax.Array]:
    """`dim` random directions for one leaf, each the outer product of two vectors of random signs.

    The leaf is read as a matrix: its last axis makes the columns, all the others the rows. With r and c
    drawn independently, E[(rᵀGc)(rᵀG'c)] = ⟨G, G'⟩, and neither the leaf nor a `(dim, leaf)` block is built.

    Returns:
        signs of shape `(dim, rows)` and `(dim, columns)`, in float32.
    """
    rows, columns = (1, 1) if not shape else (math.prod(shape[:-1]), shape[-1])
    row_key, column_key = jax.random.split(jax.random.fold_in(key, leaf))
    row_signs = jax.random.rademacher(row_key, (dim, rows), jnp.float32)
    return row_signs, jax.random.rademacher(column_key, (dim, columns), jnp.float32)
