"""Dtypes of what is computed, whatever `jax_numpy_dtype_promotion` is set to: that option is for the user's code."""

import functools
from typing import Any

import jax
import jax.numpy as jnp


def common_dtype(*of: Any) -> Any:
    """The narrowest dtype that holds all of these dtypes, or arrays."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, (getattr(x, "dtype", x) for x in of))


def accumulation_dtype(*of: Any) -> Any:
    """The dtype that numbers of these dtypes, or arrays, are accumulated in: float32, or wider."""
    return common_dtype(*of, jnp.float32)


def add(x: jax.Array, y: jax.Array) -> jax.Array:
    """x + y, in the narrowest dtype that holds both."""
    dtype = common_dtype(x, y)
    return x.astype(dtype) + y.astype(dtype)
