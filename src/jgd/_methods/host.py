"""Memory that the host hands over: JAX reads NumPy's in place on a CPU, while its owner writes the next batch to it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgd._errors import describe, is_concrete, leaf_name


def owned(tree: Any) -> Any:
    """`tree` with copies of its NumPy arrays, which their owner may then write to."""
    return jax.tree.map(lambda x: x.copy() if isinstance(x, np.ndarray) else x, tree)


def owned_batch(element: Any) -> Any:
    """What a loader gave, with copies of all arrays that may lie in memory which the loader writes to again.

    Those are arrays of any library, and arrays of JAX that lie on a CPU: `jnp.asarray` and dlpack make them of
    another library's memory without a copy. Each copy is done when this returns.

    Raises:
        TypeError: a leaf is not an array of numbers.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(element)
    copies = [_copied(leaf, path) for path, leaf in leaves]
    jax.block_until_ready([x for x in copies if isinstance(x, jax.Array) and is_concrete(x)])
    return jax.tree.unflatten(treedef, copies)


def _copied(leaf: Any, path: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return _copy_of_jax_array(leaf)
    if isinstance(leaf, bool | int | float | complex):
        return leaf
    try:
        copy = np.array(leaf, copy=True)
    except Exception as error:
        # Not every dtype is NumPy's: torch's bfloat16 has this way alone.
        if not hasattr(leaf, "__dlpack__"):
            raise _no_array(leaf, path) from error
        copy = np.array(jnp.from_dlpack(leaf), copy=True)
    if copy.dtype.kind in "OSUMmV" and not jnp.issubdtype(copy.dtype, jnp.number):
        raise _no_array(leaf, path)
    return copy


def _copy_of_jax_array(x: jax.Array) -> Any:
    if not is_concrete(x) or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x
    if any(device.platform != "cpu" for device in x.sharding.device_set):
        return x
    if len(x.sharding.device_set) > 1:
        return jnp.copy(x)
    copy = np.array(x, copy=True)
    return jax.device_put(copy, x.sharding) if x.committed else copy


def _no_array(leaf: Any, path: Any) -> TypeError:
    name = leaf_name("batch", path)
    return TypeError(f"`data` gave a batch of which {name} is {describe(leaf)}, not an array of numbers")
