"""Where arrays lie: a run whose parameters or examples lie on a mesh puts everything there."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import tree_flatten_with_path

from jgd._errors import is_concrete, leaf_name
from jgd._fit.processes import several


def mesh_of(params: Any, data: Any) -> Mesh | None:
    """The mesh that the arrays lie on; all devices in a row for several processes that have said nothing.

    Raises:
        ValueError: they lie on different meshes.
    """
    found: tuple[str, Mesh] | None = None
    for argument, tree in (("params", params), ("data", data)):
        for path, leaf in tree_flatten_with_path(tree)[0]:
            mesh = lies_on(leaf)
            if mesh is None:
                continue
            name = leaf_name(argument, path)
            if found and found[1] != mesh:
                raise ValueError(
                    f"{found[0]} lies on the mesh {_said(found[1])}, but {name} on {_said(mesh)}: put all arrays of "
                    "a run on one mesh"
                )
            found = found or (name, mesh)
    if found:
        return found[1]
    return Mesh(np.array(jax.devices()), ("batch",)) if several() else None


def on_mesh(tree: Any, mesh: Mesh | None) -> Any:
    """The arrays on the mesh: those that lie there as they are, the others whole on every device."""

    def place(leaf: jax.Array) -> jax.Array:
        if mesh is None or not is_concrete(leaf) or lies_on(leaf) is not None:
            return leaf
        whole = NamedSharding(mesh, PartitionSpec())
        if _is_key(leaf):
            data = jax.device_put(np.asarray(jax.random.key_data(leaf)), whole)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return jax.device_put(np.asarray(leaf), whole)

    return jax.tree.map(place, tree)


def batch_axes(mesh: Mesh, params: Any, data: Any = None) -> tuple[str, ...]:
    """The axes of the mesh that share out the examples: those of the data, else those that no parameter is on."""
    for leaf in jax.tree.leaves(data):
        if lies_on(leaf) is not None and leaf.sharding.spec and leaf.sharding.spec[0] is not None:
            return axes_of(leaf.sharding.spec[0])
    taken = {
        axis
        for leaf in jax.tree.leaves(params)
        if lies_on(leaf) is not None
        for axes in leaf.sharding.spec
        for axis in axes_of(axes)
    }
    return tuple(axis for axis in mesh.axis_names if axis not in taken)


def axes_of(entry: Any) -> tuple[str, ...]:
    """The axes of a mesh that one entry of a partition spec names."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def lies_on(leaf: Any) -> Mesh | None:
    """The mesh that an array was put on; None for one that lies nowhere in particular."""
    if (
        not isinstance(leaf, jax.Array)
        or not is_concrete(leaf)
        or not isinstance(leaf.sharding, NamedSharding)
    ):
        return None
    mesh = leaf.sharding.mesh
    return mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None


def _said(mesh: Mesh) -> str:
    return f"{dict(mesh.shape)} of devices {[device.id for device in mesh.devices.flat][:8]}"


def _is_key(leaf: Any) -> bool:
    return jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
