"""A loss and the arguments of one call: which are parameters, which are shared, which hold the batch.

Everything behind this module sees flat lists of leaves, and the batch on axis 0.
"""

import functools
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_flatten_with_path

from jgd._errors import common_length, describe, is_concrete, leaf_name
from jgd._mesh import check_one_place, shape_like, varying

Loss = Callable[..., Any]


@dataclass(frozen=True)
class Signature:
    """How flat leaves make up the arguments of the loss; each leaf has a role and a place."""

    loss: Loss
    argnums: int | tuple[int, ...]
    has_aux: bool
    treedef: Hashable  # of all the arguments
    roles: tuple[
        tuple[str, int], ...
    ]  # of each leaf of them: which list holds it, and where; or a flag itself

    def call(self, params: Sequence[Any], shared: Sequence[Any], example: Sequence[Any]) -> tuple[Any, Any]:
        """The loss of one example, from leaves: `(value, aux)`, with `aux` None unless `has_aux`."""
        leaves = {"params": params, "shared": shared, "batch": example}
        read = lambda role, place: place if role == "flag" else leaves[role][place]
        args = jax.tree.unflatten(self.treedef, [read(*role) for role in self.roles])
        out = self.loss(*args)
        if not self.has_aux:
            return out, None
        if not isinstance(out, tuple | list) or len(out) != 2:
            raise TypeError(
                f"with `has_aux=True` the loss must return a pair `(scalar, aux)`, got {describe(out)}"
            )
        return out[0], out[1]


@dataclass(frozen=True)
class Call:
    """One call of a loss on a batch: what is static in `signature`, the arrays beside it."""

    signature: Signature
    params: Any  # the pytree the gradients are shaped like
    param_leaves: list[Any]
    shared_leaves: list[Any]
    batch_leaves: list[Any]  # axis 0 is the batch
    size: int


def bind(
    loss: Loss, args: Sequence[Any], *, argnums: int | Sequence[int], in_axes: Any, has_aux: bool
) -> Call:
    """Sorts the arguments of `loss` into parameters, shared values and a batch, and checks each.

    Raises:
        TypeError: a leaf of the parameters is not a floating-point array.
        ValueError: `in_axes` does not fit the arguments, the leaves of the batch disagree in length, or arrays lie
            on different meshes.
    """
    chosen = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    for number in chosen:
        if not -len(args) <= number < len(args):
            raise ValueError(
                f"`argnums`={argnums} names argument {number}, but the loss got {len(args)} arguments"
            )
    chosen = tuple(number % len(args) for number in chosen)
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"`argnums`={argnums} names an argument twice")
    axes = _axes_by_argument(args, chosen, in_axes)

    params = args[chosen[0]] if isinstance(argnums, int) else tuple(args[i] for i in chosen)
    by_role: dict[str, list[Any]] = {"params": [], "shared": [], "batch": []}
    roles: list[list[tuple[str, int]]] = [[] for _ in args]
    lengths: dict[str, int] = {}
    placed: list[tuple[str, Any, Any]] = []
    # The parameters' leaves in the order of `argnums`, which is that of the gradients.
    for number in (*chosen, *(i for i in range(len(args)) if i not in chosen)):
        argument = _argument_name(number, chosen, argnums)
        leaves = tree_flatten_with_path(args[number])[0]
        for (path, leaf), axis in zip(leaves, _leaf_axes(axes[number], args[number], number), strict=True):
            _check_alive(leaf, argument, path)
            if number in chosen:
                role, leaf = "params", _check_param(leaf, argument, path)
            elif isinstance(leaf, bool) and axis is None:
                roles[number].append(
                    ("flag", leaf)
                )  # a Python bool is for Python to look at, as under `vmap(grad)`
                continue
            elif axis is None:
                role, leaf = "shared", on_device(leaf)
            else:
                role, name = "batch", leaf_name(argument, path)
                leaf = _batch_first(leaf, axis, name)
                lengths[name] = leaf.shape[0]
            placed.append((argument, path, leaf))
            roles[number].append((role, len(by_role[role])))
            by_role[role].append(leaf)

    signature = Signature(loss, argnums if isinstance(argnums, int) else tuple(argnums), has_aux,
                          jax.tree.structure(tuple(args)), tuple(itertools.chain(*roles)))  # fmt: skip
    if not by_role["params"]:
        raise ValueError("`params` has no leaves: there is nothing to differentiate with respect to")
    if not lengths:
        raise ValueError(_no_batch(args, chosen, axes))
    check_one_place(placed)
    by_role = varying(by_role, by_role)
    hint = "; a leaf that every example shares gets None in `in_axes`"
    size = common_length(lengths, "the batch", hint=hint, may_be_empty=True)
    return Call(signature, params, by_role["params"], by_role["shared"], by_role["batch"], size)


def bind_named(
    loss: Loss,
    args: Sequence[Any],
    named: Mapping[str, Any],
    *,
    argnums: int | Sequence[int],
    in_axes: Any,
    has_aux: bool,
) -> Call:
    """The same where some of the batch's arguments are given by name: mapped over axis 0, as by `jax.vmap`."""
    if not named:
        return bind(loss, args, argnums=argnums, in_axes=in_axes, has_aux=has_aux)
    count, names = len(args), tuple(named)

    def by_place(*args: Any) -> Any:
        return loss(*args[:count], **dict(zip(names, args[count:], strict=True)))

    for number in (argnums,) if isinstance(argnums, int) else argnums:
        if not -count <= number < count:
            raise ValueError(
                f"`argnums`={argnums} names argument {number}, but the loss got {count} arguments by their place and "
                f"{', '.join(names)} by name, which hold the batch: give the parameters by their place"
            )
    # From the end they would be counted among those given by name.
    first = lambda number: number % count
    chosen = first(argnums) if isinstance(argnums, int) else tuple(map(first, argnums))
    own = _axes_by_argument(args, (chosen,) if isinstance(chosen, int) else chosen, in_axes)
    axes = (*own, *[0] * len(names))
    whole = functools.wraps(loss)(by_place)
    return bind(whole, [*args, *named.values()], argnums=chosen, in_axes=axes, has_aux=has_aux)


def example_of(batch_leaves: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of one example, from the leaves of a batch."""
    return [shape_like(leaf, leaf.shape[1:]) for leaf in batch_leaves]


def _no_batch(args: Sequence[Any], chosen: Sequence[int], axes: Sequence[Any]) -> str:
    """Why no argument holds examples, and what to do."""
    others = [number for number in range(len(args)) if number not in chosen]
    if not others:
        return "the loss got no batch: give it at least one argument beside the parameters, with an axis of examples"
    with_leaves = [number for number in others if jax.tree.leaves(args[number])]
    if not with_leaves:
        return (
            "the loss got no batch: every argument beside the parameters is None or a pytree without leaves; at least "
            "one must hold examples, along the axis that `in_axes` names (0 by default)"
        )
    return (
        f"the loss got no batch: `in_axes`={tuple(axes)!r} maps no array, so that every argument is shared by all "
        f"examples; give the axis of the examples in place of a None, as 0 in `in_axes[{with_leaves[0]}]`"
    )


def _argument_name(number: int, chosen: tuple[int, ...], argnums: int | Sequence[int]) -> str:
    if number not in chosen:
        return f"batch[{number - sum(i < number for i in chosen)}]"
    return "params" if isinstance(argnums, int) else f"params[{chosen.index(number)}]"


def _axes_by_argument(args: Sequence[Any], chosen: tuple[int, ...], in_axes: Any) -> list[Any]:
    if in_axes is None:
        return [None if number in chosen else 0 for number in range(len(args))]
    if isinstance(in_axes, int):
        return [None if number in chosen else in_axes for number in range(len(args))]
    if not isinstance(in_axes, tuple | list) or len(in_axes) != len(args):
        raise ValueError(
            f"`in_axes` must be an int or a tuple with one entry for each of the loss's {len(args)} arguments, "
            f"the parameters' included, got {in_axes!r}"
        )
    for number in chosen:
        if jax.tree.leaves(in_axes[number]):
            raise ValueError(
                f"`in_axes[{number}]` is {in_axes[number]!r}, but argument {number} holds the parameters, which "
                "every example shares: make it None"
            )
    return list(in_axes)


def _leaf_axes(axis_tree: Any, arg: Any, number: int) -> list[int | None]:
    is_none = lambda x: x is None
    try:
        spread = jax.tree.map(
            lambda axis, sub: [axis] * len(jax.tree.leaves(sub)), axis_tree, arg, is_leaf=is_none
        )
    except ValueError as error:
        raise ValueError(
            f"`in_axes[{number}]`={axis_tree!r} is not a prefix of argument {number}, a pytree of structure "
            f"{jax.tree.structure(arg)}"
        ) from error
    return jax.tree.leaves(spread, is_leaf=is_none)


def _check_param(leaf: Any, argument: str, path: Any) -> Any:
    if isinstance(leaf, float):
        return jnp.asarray(leaf)
    leaf = on_device(leaf)
    dtype = getattr(leaf, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"{leaf_name(argument, path)} is {describe(leaf)}, but a parameter must be real. Give its two parts as "
            "parameters, `(w.real, w.imag)`, and let the loss join them, `w = jax.lax.complex(*parts)`: then norms "
            "and products are those of real numbers. Their gradients are the real part, and minus the imaginary "
            "part, of what `jax.grad` gives for the complex one. (`eqx.is_inexact_array` keeps complex leaves.)"
        )
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{leaf_name(argument, path)} is {describe(leaf)}, but a parameter must be a floating-point array. "
            "Split the model first, with `eqx.partition(model, eqx.is_inexact_array)` or `nnx.split(model, "
            "nnx.Param, ...)`, and let the loss join the parts"
        )
    return leaf


def _batch_first(leaf: Any, axis: int, name: str) -> Any:
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "ndim"):
        leaf = np.asarray(leaf)
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OSUMm":  # objects, text and dates
        raise TypeError(f"{name} is {describe(leaf)}, not an array; give it `in_axes` None, or leave it out")
    if not -leaf.ndim <= axis < leaf.ndim:
        raise ValueError(
            f"{name} is {describe(leaf)} and has no axis {axis} to hold the examples; a leaf that every example "
            "shares gets None in `in_axes`"
        )
    leaf = on_device(leaf)
    return leaf if axis % leaf.ndim == 0 else jnp.moveaxis(leaf, axis, 0)


def check_alive(tree: Any, argument: str) -> None:
    """Raises ValueError where an array's memory was given away."""
    for path, leaf in tree_flatten_with_path(tree)[0]:
        _check_alive(leaf, argument, path)


def _check_alive(leaf: Any, argument: str, path: Any) -> None:
    if isinstance(leaf, jax.Array) and is_concrete(leaf) and leaf.is_deleted():
        raise ValueError(
            f"{leaf_name(argument, path)} is there no more: it was deleted, or given to a function that "
            "`jax.jit(..., donate_argnums=...)` lets use its memory. Give what that function returned"
        )


def on_device(leaf: Any) -> Any:
    """A NumPy array as JAX takes it, 64 bits only where JAX is told to; anything else as it is.

    It is copied: `jnp.asarray` may share its memory, and what is asked later would be of what it has become.
    """
    numeric = isinstance(leaf, np.ndarray | np.generic) and (
        leaf.dtype == bool or jnp.issubdtype(leaf.dtype, np.number)
    )
    return jnp.array(leaf) if numeric else leaf
