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
    # One draw of bytes for both: each draw is hundreds of instructions to compile, and a model has many leaves.
    bits = jax.random.bits(jax.random.fold_in(key, leaf), (dim, rows + columns), jnp.uint8)
    signs = 1 - 2 * (bits & 1).astype(jnp.float32)
    return signs[:, :rows], signs[:, rows:]
