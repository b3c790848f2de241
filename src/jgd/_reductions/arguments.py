"""The checks that the reductions share, made before anything runs."""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_flatten_with_path
from jaxtyping import Array, Real

from jgd._dtypes import accumulation_dtype
from jgd._errors import describe, is_concrete, leaf_name
from jgd._gradients import held_form


def form_of(grads: Any) -> tuple[Any, Any]:
    """How gradients are held, and the pytree that they make."""
    return held_form(grads)


# Anything that makes an array of B numbers.
Weights = Real[Array, "B"] | Real[np.ndarray, "B"] | Sequence[float | int]


def weights_of(weights: Any, size: int, *, divides: bool = False) -> jax.Array | None:
    """The weights as an array of floats, at least float32, or None for none.

    Raises:
        ValueError: they are not `(B,)`; or, where their sum `divides`, there is no example or they are all 0.
        TypeError: they are not numbers.
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


def at_least_two(size: int, what: str) -> None:
    """Raises ValueError where there are too few examples for an unbiased estimate."""
    if size < 2:
        raise ValueError(f"{what} needs at least two examples, `grads` holds {size}")
