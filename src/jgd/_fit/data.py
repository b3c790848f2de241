"""What `fit` trains on: arrays that hold all the examples, or batches that someone else makes."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import tree_flatten_with_path

from jgd._errors import common_length, describe, leaf_name
from jgd._fit.placement import axes_of


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Examples:
    """All examples as arrays: the arguments of the loss after the parameters."""

    args: tuple[Any, ...]
    axes: tuple[int | None, ...] = field(metadata={"static": True})  # of each leaf: where its examples lie
    size: int = field(metadata={"static": True})
    sharding: NamedSharding | None = field(default=None, metadata={"static": True})  # of a batch's examples

    def take(self, index: jax.Array | np.ndarray | None = None) -> tuple[Any, ...]:
        """The arguments for the batch of these examples, or of all; shared arguments as they are."""
        leaves, treedef = jax.tree.flatten(self.args)
        chosen = [self._chosen(leaf, axis, index) for leaf, axis in zip(leaves, self.axes, strict=True)]
        return jax.tree.unflatten(treedef, chosen)

    def _chosen(self, leaf: jax.Array, axis: int | None, index: Any) -> jax.Array:
        if axis is None:
            return leaf
        if self.is_typed:
            return self._placed(leaf, axis % leaf.ndim, index)
        if index is not None:
            leaf = jnp.take(leaf, index, axis=axis, mode="clip")
        if self.sharding is None:
            return leaf
        spec = PartitionSpec(*[None] * (axis % leaf.ndim), *self.sharding.spec)
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(self.sharding.mesh, spec))

    @property
    def is_typed(self) -> bool:
        """Whether where a batch lies is part of its type: on explicit axes of a mesh."""
        if self.sharding is None:
            return False
        of = dict(zip(self.sharding.mesh.axis_names, self.sharding.mesh.axis_types, strict=True))
        return any(of[axis] == AxisType.Explicit for axis in axes_of(self.sharding.spec[0]))

    def _placed(self, leaf: jax.Array, axis: int, index: Any) -> jax.Array:
        """The same on explicit axes. Where their devices do not divide the batch, each has all of it."""
        assert self.sharding is not None
        mesh, size = self.sharding.mesh, leaf.shape[axis] if index is None else index.shape[0]
        axes = axes_of(self.sharding.spec[0])
        divides = size % math.prod(mesh.shape[name] for name in axes) == 0
        spec = PartitionSpec(*[None] * axis, axes if divides else None)
        if index is None:
            return jax.sharding.reshard(leaf, NamedSharding(mesh, spec))
        place = (*[slice(None)] * axis, index)
        return leaf.at[place].get(mode="clip", out_sharding=NamedSharding(mesh, spec))


def splat(element: Any) -> tuple[Any, ...]:
    """The arguments of the loss: a plain tuple holds them, anything else is the only one."""
    return element if type(element) is tuple else (element,)


def is_batches(data: Any) -> bool:
    """Whether `data` is an iterable of batches: a list, an iterator, a loader; not a pytree of arrays."""
    if isinstance(data, list):
        return True
    is_array = hasattr(data, "dtype") or hasattr(data, "__array__")
    is_leaf = jax.tree_util.all_leaves([data])
    return is_leaf and not is_array and isinstance(data, Iterable)


def examples_of(data: Any, in_axes: Any) -> Examples:
    """The arrays of `data` on the device, and where the examples lie in each.

    Raises:
        TypeError: a leaf is not an array.
        ValueError: the leaves disagree in length, are empty, or do not fit `in_axes`.
    """
    args = splat(data)
    axes = leaf_axes(args, in_axes)
    leaves, lengths = [], {}
    for (path, leaf), axis in zip(tree_flatten_with_path(args)[0], axes, strict=True):
        name = leaf_name("data", path if type(data) is tuple else path[1:])
        array = _as_array(leaf, name)
        leaves.append(array)
        if axis is None:
            continue
        if not -array.ndim <= axis < array.ndim:
            raise ValueError(
                f"{name} is {describe(array)} and has no axis {axis} to hold the examples; an argument that "
                "every example shares gets None in the method's `in_axes`"
            )
        lengths[name] = array.shape[axis]
    if leaves and not lengths:
        raise ValueError(
            f"`data` holds no examples: the method's `in_axes`={in_axes!r} maps no array, so that every argument is "
            "shared by all examples; give the axis of the examples in place of a None"
        )
    args = jax.tree.unflatten(jax.tree.structure(args), leaves)
    hint = "; an argument that every example shares gets None in the method's `in_axes`"
    return Examples(args, tuple(axes), common_length(lengths, "`data`", hint=hint))


def leaf_axes(args: tuple[Any, ...], in_axes: Any) -> list[int | None]:
    """Where each leaf of the arguments has its examples; None for one that all share.

    Raises:
        ValueError: `in_axes` does not fit the arguments.
    """

    def is_none(x: Any) -> bool:
        return x is None

    if in_axes is None or isinstance(in_axes, int):
        return [in_axes or 0] * len(jax.tree.leaves(args))
    if not isinstance(in_axes, Sequence) or len(in_axes) != 1 + len(args):
        raise ValueError(
            "the method's `in_axes` must be an int or a tuple with one entry for the parameters and one for "
            f"each of the {len(args)} arguments in `data`, got {in_axes!r}"
        )
    of_leaves = lambda axis, arg: [axis] * len(jax.tree.leaves(arg))  # of a None in the data there are none
    try:
        spread = jax.tree.map(of_leaves, tuple(in_axes[1:]), args, is_leaf=is_none)
    except ValueError as error:
        raise ValueError(
            f"the method's `in_axes`={in_axes!r} does not fit `data`, of structure {jax.tree.structure(args)}"
        ) from error
    return jax.tree.leaves(spread, is_leaf=is_none)


def _as_array(leaf: Any, name: str) -> jax.Array:
    try:
        return jnp.asarray(leaf)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} is {describe(leaf)}, not an array of numbers") from error
