"""Sums over the bits of arrays, wherever their parts lie: two that agree are taken for the same numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgd._errors import describe


def fingerprints(tree: Any) -> list[str]:
    """One for each leaf: its dtype, its shape, and 64 bits that stand for its contents."""
    leaves = jax.tree.leaves(tree)
    sums = np.asarray(_sums(leaves)) if leaves else np.zeros((0, 2))
    return [f"{describe(x)} {int(a):08x}{int(b):08x}" for x, (a, b) in zip(leaves, sums, strict=True)]


@jax.jit
def _sums(leaves: list[jax.Array]) -> jax.Array:
    return sums_of(leaves)


def sums_of(leaves: list[jax.Array]) -> jax.Array:
    """`(leaves, 2)`, in uint32."""
    return jnp.stack([_sum(leaf) for leaf in leaves]) if leaves else jnp.zeros((0, 2), jnp.uint32)


def _sum(x: jax.Array) -> jax.Array:
    """Two sums of hashes of the pair of an element's bits and its place, modulo 2³².

    Integers leave no rounding, so that the order in which devices add does not matter. The hash of the pair sees
    elements that change places.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag])
    words = _words(x)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        # Not by way of a flat array, for which one that lies on several devices would be gathered.
        index = index * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)

    def total(seed: int) -> jax.Array:
        hashed = _mixed(index ^ np.uint32(seed))
        for word in words:
            hashed = _mixed(hashed + word)
        return jnp.sum(hashed, dtype=jnp.uint32)

    return jnp.stack([total(0), total(0x9E3779B9)])


def _words(x: jax.Array) -> list[jax.Array]:
    """The bits of each element in words of 32."""
    if x.dtype.itemsize == 1 and not jnp.issubdtype(x.dtype, jnp.floating):
        return [x.astype(jnp.int32).astype(jnp.uint32)]  # bool and int4 have no bits of their own to look at
    if x.dtype.itemsize == 8:
        halves = jax.lax.bitcast_convert_type(x, jnp.uint32)
        return [halves[..., 0], halves[..., 1]]
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return [jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)]


def _mixed(x: jax.Array) -> jax.Array:
    """The last steps of MurmurHash3: a change of one bit of `x` changes each bit of the result half of the time."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
