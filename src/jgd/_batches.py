"""`shard_batch`: a batch of any length over the devices of a mesh."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import tree_flatten_with_path

from jgd._errors import common_length, describe, leaf_name


def shard_batch(batch: Any, mesh: Mesh, axis: str | tuple[str, ...]) -> tuple[Any, jax.Array]:
    """Spreads a batch over an axis of a mesh, padded with absent examples where the axis does not divide it.

    Args:
        batch: a pytree of arrays, NumPy's or JAX's, with the examples as the leading axis of each.
        mesh: the mesh.
        axis: the name of the mesh's axis to spread the examples over, or a tuple of several.

    Returns:
        The batch with its leading axis over `axis`, of length B rounded up to a multiple of the devices on it, and
        the weights to give to the reductions: `(that length,)` in float32, 1 for each example of the batch and 0 for
        the padding, which repeats the last example. What takes no weights, `jgd.norms` for one, answers for the
        padding as well, at the end.

    Raises:
        ValueError: the mesh has no axis of that name; the leaves disagree in length or are empty.
        TypeError: a leaf is not an array of numbers with a leading axis.

    Example:
        >>> import jax, jax.numpy as jnp, jgd
        >>> mesh = jax.make_mesh((1,), ("data",))
        >>> (x, y), weights = jgd.shard_batch((jnp.ones((6, 3)), jnp.ones(6)), mesh, "data")
        >>> grads = jgd.per_example_grad(lambda w, x, y: (x @ w - y) ** 2)(jnp.zeros(3), x, y)
        >>> jgd.sum(grads, weights)
        Array([-12., -12., -12.], dtype=float32)

    Cost: a copy of the batch.
    """
    names = axis if isinstance(axis, tuple) else (axis,)
    for name in names:
        if name not in mesh.axis_names:
            raise ValueError(
                f"`axis` is {name!r}, but `mesh` has the axes {', '.join(map(repr, mesh.axis_names))}"
            )
    paths, treedef = tree_flatten_with_path(batch)
    lengths = {leaf_name("batch", path): _length(leaf, leaf_name("batch", path)) for path, leaf in paths}
    size = common_length(lengths, "`batch`")
    devices = math.prod(mesh.shape[name] for name in names)
    padded = -(-size // devices) * devices
    spread = NamedSharding(mesh, PartitionSpec(axis))
    leaves = [jax.device_put(_padded(leaf, padded - size), spread) for _, leaf in paths]
    weights = np.arange(padded) < size
    return jax.tree.unflatten(treedef, leaves), jax.device_put(weights.astype(np.float32), spread)


def _length(leaf: Any, name: str) -> int:
    if not isinstance(leaf, jax.Array | np.ndarray) or leaf.ndim == 0 or leaf.dtype.kind in "OSU":
        raise TypeError(
            f"{name} is {describe(leaf)}, not an array of numbers with a leading axis of examples"
        )
    return leaf.shape[0]


def _padded(leaf: Any, missing: int) -> Any:
    """The leaf with its last example repeated: an example at which the loss is as good as anywhere."""
    if not missing:
        return leaf
    module = jnp if isinstance(leaf, jax.Array) else np
    return module.concatenate([leaf, module.repeat(leaf[-1:], missing, axis=0)])
