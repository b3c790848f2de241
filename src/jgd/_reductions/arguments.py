"""The checks that the reductions share, made before anything runs."""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_flatten_with_path
from jaxtyping import Array, Real

from jgd._engine.dtypes import accumulation_dtype
from jgd._engine.gradients import Gradients
from jgd._engine.norms import Groups
from jgd._errors import describe, is_concrete, leaf_name
from jgd._gradients import held_form


def form_of(grads: Any) -> tuple[Gradients, Any]:
    """How gradients are held, and the pytree that they make."""
    return held_form(grads)


# Anything that makes an array of B numbers.
Weights = Real[Array, "B"] | Real[np.ndarray, "B"] | Sequence[float | int]


def weights_of(
    weights: Any, size: int, *, divides: bool = False, may_be_negative: bool = True
) -> jax.Array | None:
    """The weights as an array of floats, at least float32, or None for none.

    Raises:
        ValueError: they are not `(B,)`, or one is negative that may not be; or, where their sum `divides`, there is no
            example or they are all 0.
        TypeError: they are not real numbers.
    """
    if divides and size == 0:
        raise ValueError("`grads` holds no examples: the mean over an empty batch is not defined")
    if weights is None:
        return None
    known = all(map(is_concrete, jax.tree.leaves(weights)))
    # What a jitted function closes over can be looked at too.
    with jax.ensure_compile_time_eval() if known else contextlib.nullcontext():
        try:
            array = jnp.asarray(weights)
        except TypeError as error:
            raise TypeError(
                f"`weights` must be an array of {size} numbers, got {describe(weights)}"
            ) from error
        if array.shape != (size,):
            raise ValueError(f"`weights` must have shape ({size},), one for each example, got {array.shape}")
        if jnp.iscomplexobj(array):
            raise TypeError(f"`weights` must be real numbers, got {describe(array)}")
        if not may_be_negative and known and bool(jnp.any(array < 0)):
            raise ValueError(
                f"`weights` must not be negative, a moment is a mean of squares, got {float(jnp.min(array))}"
            )
        wide = array.dtype if jnp.issubdtype(array.dtype, jnp.floating) else jnp.float32
        array = array.astype(accumulation_dtype(wide))
        if divides and known and not bool(jnp.any(array != 0)):
            raise ValueError("`weights` are all 0, so every example is absent: their mean is not defined")
    return array


def direction_of(direction: Any, like: list[Any], treedef: Any) -> list[jax.Array]:
    """The leaves of `direction`, which must be shaped like one gradient.

    Raises:
        ValueError: its structure or a leaf's shape differs from the parameters'.
        TypeError: a leaf is complex.
    """
    paths, structure = tree_flatten_with_path(direction)
    if structure != treedef:
        raise ValueError(f"`direction` must be a pytree like the parameters, {treedef}, got {structure}")
    for (path, leaf), expected in zip(paths, like, strict=True):
        if jnp.shape(leaf) != expected.shape:
            raise ValueError(
                f"{leaf_name('direction', path)} has shape {jnp.shape(leaf)}, but the parameter's is {expected.shape}"
            )
        if jnp.iscomplexobj(leaf):
            raise TypeError(
                f"{leaf_name('direction', path)} is {describe(leaf)}, but gradients are real, so a direction must be: "
                "give its real part, and its imaginary part to a second call"
            )
    return [jnp.asarray(leaf) for _, leaf in paths]


class Grouping(NamedTuple):
    """Groups of the parameters' leaves, one for each leaf of a pytree prefix of the parameters.

    Attributes:
        groups: the leaves of each group, by their numbers.
        entries: what the prefix holds for each group, with the path to it.
        treedef: the prefix's structure.
    """

    groups: Groups
    entries: list[tuple[Any, Any]]
    treedef: Any


def grouping_of(prefix: Any, treedef: Any, argument: str) -> Grouping:
    """The groups that a pytree prefix makes of the leaves of parameters of structure `treedef`.

    Raises:
        ValueError: it is no prefix of them.
    """
    entries, structure = tree_flatten_with_path(prefix)
    if structure == jax.tree.structure(0):
        return Grouping((tuple(range(treedef.num_leaves)),), entries, structure)
    try:
        subtrees = structure.flatten_up_to(jax.tree.unflatten(treedef, range(treedef.num_leaves)))
    except ValueError as error:
        raise ValueError(
            f"`{argument}` must be a pytree prefix of the parameters, with one entry for each group of leaves that "
            f"has a norm of its own. The parameters are {treedef}, `{argument}` is {structure}"
        ) from error
    groups = tuple(tuple(jax.tree.leaves(subtree)) for subtree in subtrees)
    return Grouping(groups, entries, structure)


def max_norms_of(max_norm: Any, treedef: Any) -> tuple[list[Any], Grouping]:
    """The norms to clip to, and the group of leaves that each is for.

    Raises:
        ValueError: `max_norm` is no prefix of the parameters, or an entry is negative, nan, or an array of several.
        TypeError: an entry is no number.
    """
    if max_norm is None:
        raise TypeError("`max_norm` must be one number, or a pytree of them, got None")
    grouping = grouping_of(max_norm, treedef, "max_norm")
    for path, entry in grouping.entries:
        name = leaf_name("max_norm", path)
        if not isinstance(entry, int | float) and not hasattr(entry, "dtype"):
            raise TypeError(f"{name} must be one number, got {describe(entry)}")
        if jnp.ndim(entry) != 0:
            raise ValueError(f"{name} must be one number, got an array of shape {jnp.shape(entry)}")
        if is_concrete(entry) and not float(entry) >= 0:
            raise ValueError(f"{name} must be at least 0, got {entry}")
    # JAX has no integers for large ones.
    as_float = lambda x: float(x) if isinstance(x, int) else x
    return [as_float(entry) for _, entry in grouping.entries], grouping


def at_hand(number: Any, form: Gradients) -> Any:
    """A Python float as an array that is on the device already where the same was there before.

    Where gradients are traced it stays what it is, for the program to hold.
    """
    traced = not all(is_concrete(x) for x in jax.tree.leaves(form))
    return (
        number
        if traced or not isinstance(number, float)
        else _constant(number, jax.dtypes.canonicalize_dtype(float))
    )


@functools.lru_cache(maxsize=64)
def _constant(number: float, dtype: Any) -> jax.Array:
    del dtype  # which JAX chooses as long as its configuration is the same
    return jnp.asarray(number)


def shares_of(weights: jax.Array, form: Gradients) -> jax.Array:
    """w_i / Σ w_i, whose sum neither overflows nor vanishes, with as many digits as the gradients have."""
    weights = weights.astype(accumulation_dtype(weights, *form.leaf_structs))
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(weights)))
    # By powers of two, which round nothing. A division by the largest would need its inverse, which may be denormal.
    step = jnp.where(largest > 2.0**64, 2.0**-64, jnp.where(largest < 2.0**-64, 2.0**64, 1.0))
    scaled = weights * step.astype(weights.dtype)
    return scaled / jnp.sum(scaled)


def one_less(share: jax.Array) -> jax.Array:
    """1 − Σ s_i² of shares, by which a weighted variance is divided; nan where they leave one example alone."""
    # By the shares of all others: where one dominates, the difference would have no digits left.
    before = jnp.cumsum(share)[:-1]
    behind = jnp.cumsum(share[::-1])[:-1][::-1]
    made = jnp.sum(share[1:] * before) + jnp.sum(share[:-1] * behind)
    return jnp.where(made == 0, jnp.nan, made)  # not defined, and not inf


def at_least_two(size: int, what: str) -> None:
    """Raises ValueError where there are too few examples for an unbiased estimate."""
    if size < 2:
        raise ValueError(f"{what} needs at least two examples, `grads` holds {size}")
