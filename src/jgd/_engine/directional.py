"""⟨G, V⟩ of one example's gradient, as factors, with a direction in its own dtype."""

import jax
import jax.numpy as jnp

from jgd._engine.factors import Factor, Full, Rows, contract


def along(factor: Factor, direction: jax.Array) -> jax.Array:
    """⟨G, V⟩ with a `(N, P, Q)` direction of any dtype, whose digits all count."""
    exact = jax.lax.Precision.HIGHEST
    if isinstance(factor, Full):
        raise TypeError("a gradient that is there has its inner product with a flat direction")
    if isinstance(factor, Rows):
        picked = jnp.take(direction[0], factor.index, axis=0, mode="fill", fill_value=0)
        met = (factor.index < factor.rows)[:, None]  # what met no row may be nan
        return inner_product(jnp.where(met, factor.right[0], 0), picked)
    if direction.shape[1] >= direction.shape[2]:  # the shorter side is what stays
        return inner_product(factor.right, contract("ntp,npq->ntq", factor.left, direction, exact))
    return inner_product(factor.left, contract("ntq,npq->ntp", factor.right, direction, exact))


def inner_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Σ a·b of two arrays of one shape, in at least float32; of complex numbers its real part."""
    dtype = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    product = a.reshape(-1).astype(dtype) * b.reshape(-1).astype(dtype)
    return jnp.sum(jnp.real(product))
