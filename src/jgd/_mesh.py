"""What the library needs to know of meshes: which axes an array may lie over, and of which kind they are.

JAX has three kinds of mesh axes. Over *automatic* ones the compiler places what is computed, and a trace knows the
mesh but not the placement. Over *explicit* ones the placement is part of an array's type: the engine, which folds
the batch into products in many ways, leaves them to the compiler and types only what it returns. Over *manual*
ones, inside of `jax.shard_map`, each device sees its own part; there the reductions are of that part.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jgd._errors import is_concrete, leaf_name


def num_shards(x: Any, axis: int) -> int:
    """Into how many shards an axis of `x` may be cut by the mesh: exactly where that is known, else at most."""
    sharding = jax.typeof(x).sharding
    mesh = sharding.mesh
    open_to = (*mesh.auto_axes, *_names(sharding.spec[axis]))
    return math.prod(size for name, size in mesh.shape.items() if name in open_to)


def everywhere(x: Any, axis: int) -> Any:
    """`x` with an axis that lies whole on every device, wherever the compiler would have put it."""
    mesh = jax.typeof(x).sharding.mesh
    if not mesh.auto_axes:
        return x
    spec = [None if i == axis else PartitionSpec.UNCONSTRAINED for i in range(x.ndim)]
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))


class Placement(NamedTuple):
    """Over which explicit axes gradients lie: their examples, and each leaf of one of them."""

    examples: Any
    leaves: list[PartitionSpec]


def spec_of(x: Any) -> PartitionSpec:
    """Over which explicit axes an array lies."""
    return jax.typeof(x).sharding.spec


def explicit_mesh(tree: Any) -> Any:
    """The mesh with explicit axes that a trace or the arrays of `tree` are on; None where there is none."""
    meshes = [jax.sharding.get_abstract_mesh()]
    meshes += [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    return next((mesh for mesh in meshes if mesh.explicit_axes), None)


def compiler_places(tree: Any) -> Any:
    """A context in which the compiler places what the arrays of `tree` would have typed."""
    mesh = explicit_mesh(tree)
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(_automatic(mesh))


def unplaced(tree: Any) -> Any:
    """`tree` with the shapes of arrays in the place of those that lie over explicit axes."""
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type)
    return jax.tree.map(lambda x: x if explicit_mesh([x]) is None else shape(jax.typeof(x)), tree)


def placed_by(specs: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function leave explicit axes to the compiler; what it returns is typed by `specs`.

    Args:
        specs: of the function's output and arguments, the output's specs, as a tree or a prefix of it.
    """

    def decorate(fun: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fun)
        def wrapped(*args: Any) -> Any:
            # What refuses promotions is meant for the user's code, which is traced by now.
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                return placed(*args)

        def placed(*args: Any) -> Any:
            mesh = explicit_mesh(args)
            if mesh is None:
                return fun(*args)
            free = _automatic(mesh)
            with jax.sharding.use_abstract_mesh(free):
                out = fun(*jax.tree.map(lambda x: _moved(x, free, PartitionSpec()), args))
            return jax.tree.map(
                lambda spec, part: jax.tree.map(lambda x: _moved(x, mesh, spec), part),
                specs(out, *args),
                out,
                is_leaf=lambda x: isinstance(x, PartitionSpec),
            )

        return wrapped

    return decorate


def like_examples(out: Any, form: Any, *_: Any) -> Any:
    """The specs of arrays that have the gradients' examples as their leading axis."""
    del out
    return PartitionSpec(form.placement.examples)


def like_leaves(out: Any, form: Any, *_: Any) -> Any:
    """The specs of leaves shaped like one gradient's."""
    del out
    return form.placement.leaves


def like_blocks(out: Any, form: Any, *_: Any) -> Any:
    """The specs of leaves with the examples as another leading axis."""
    del out
    examples, leaves = form.placement
    return [with_examples(examples, leaf) for leaf in leaves]


def with_examples(examples: Any, leaf: PartitionSpec) -> PartitionSpec:
    """The spec of a block: a leaf's axes, save those of the mesh that the examples lie over."""
    used = set(_names(examples))
    kept = [tuple(name for name in _names(axis) if name not in used) or None for axis in leaf]
    return PartitionSpec(examples, *kept)


def like_scalars(out: Any, *_: Any) -> Any:
    """The specs of what is the same everywhere."""
    del out
    return PartitionSpec()


def _names(axis: Any) -> tuple[str, ...]:
    return () if axis is None else axis if isinstance(axis, tuple) else (axis,)


def _automatic(mesh: Any) -> Any:
    return mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto))


def _moved(x: Any, mesh: Any, spec: PartitionSpec) -> Any:
    """An array as `mesh` types it; on automatic axes it stays where it lies."""
    return jax.sharding.reshard(x, NamedSharding(mesh, spec)) if isinstance(x, jax.Array) else x


def manual_type(x: Any) -> Any:
    """How an array differs along manual axes; None outside of `jax.shard_map`, or where JAX keeps no count."""
    if not jax.sharding.get_abstract_mesh().manual_axes or isinstance(x, jax.ShapeDtypeStruct):
        return None
    return jax.typeof(x).manual_axis_type


def shape_like(x: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """A shape with the dtype of `x`, and differing from device to device as `x` does."""
    kind = manual_type(x)
    if kind is None:
        return jax.ShapeDtypeStruct(shape, x.dtype)
    sharding = NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec())
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding, manual_axis_type=kind)


def varying(tree: Any, like: Any) -> Any:
    """`tree`, marked as different from device to device along the manual axes along which `like` is.

    Inside of `jax.shard_map` the derivative with respect to what is the same everywhere is summed over the devices.
    The gradients of a device's own examples are not to be.
    """
    axes: set[str] = set()
    for x in jax.tree.leaves(like):
        kind = manual_type(x)
        axes |= set() if kind is None else kind.varying
    return jax.tree.map(lambda x: _vary(x, axes), tree) if axes else tree


def _vary(x: Any, axes: set[str]) -> Any:
    missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def check_one_place(arrays: list[tuple[str, Any, Any]]) -> None:
    """Raises ValueError where arrays were spread over meshes of different devices, or put on different ones."""
    first = alone = None
    for argument, path, x in arrays:
        sharding = x.sharding if isinstance(x, jax.Array) and is_concrete(x) else None
        if not isinstance(sharding, NamedSharding):
            if sharding is None or not x.committed or len(sharding.device_set) != 1:
                continue
            (device,) = sharding.device_set
            alone = alone or (argument, path, device)
            if device != alone[2]:
                raise ValueError(
                    f"arrays lie on different devices: {leaf_name(*alone[:2])} on {alone[2]}, "
                    f"{leaf_name(argument, path)} on {device}; `jax.device_put` them on one"
                )
            continue
        first = first or (argument, path, sharding)
        if sharding is not first[2] and sharding.device_set != first[2].device_set:
            raise ValueError(
                f"arrays lie on different meshes: {leaf_name(*first[:2])} on {_devices_of(first[2])}, "
                f"{leaf_name(argument, path)} on {_devices_of(sharding)}; `jax.device_put` them on one mesh"
            )


def _devices_of(sharding: NamedSharding) -> str:
    numbers = sorted(device.id for device in sharding.device_set)
    return f"{dict(sharding.mesh.shape)}, devices {', '.join(map(str, numbers))}"
