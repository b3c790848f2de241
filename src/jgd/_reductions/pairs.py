"""Inner products between the gradients of two batches, and their random projections."""

from typing import Any

import jax
from jaxtyping import Array, Float, PyTree

from jgd._gradients import PerExampleGrads
from jgd._mesh import like_examples, placed_by
from jgd._microbatched import MicrobatchedGradients
from jgd._reductions.arguments import form_of


def gram(grads: PerExampleGrads | PyTree[Float[Array, "B ..."]], other: Any = None) -> Float[Array, "B C"]:
    """All inner products ⟨g_i, g'_j⟩ between the gradients of two batches, or of one with itself: JJ'ᵀ.

    Args:
        grads: the gradients.
        other: gradients of the same loss and parameters' shapes at another batch; None for `grads` itself.

    Returns:
        `(B, B')`, accumulated in at least float32. Examples that fill a batch up have rows and columns like the others.

    Raises:
        ValueError: `other` is shaped like other parameters.
    """
    form, treedef = form_of(grads)
    if other is None:
        return _self_gram(form)
    other_form, other_treedef = form_of(other)
    if treedef != other_treedef:
        raise ValueError(f"`grads` and `other` are of different structure: {treedef} and {other_treedef}")
    for ours, theirs in zip(form.leaf_structs, other_form.leaf_structs, strict=True):
        if ours.shape != theirs.shape:
            raise ValueError(
                f"`grads` and `other` belong to parameters of different shapes: {ours.shape} and {theirs.shape}"
            )
    return _gram(form, other_form)


def project(
    grads: PerExampleGrads | PyTree[Float[Array, "B ..."]], key: jax.Array, dim: int
) -> Float[Array, "B dim"]:
    """A random projection of each gradient that keeps inner products in expectation: E⟨y_i, y_j⟩ = ⟨g_i, g_j⟩.

    Each of the `dim` directions is, leaf by leaf, the outer product of random signs for the rows (every axis but
    the last) and for the columns (the last axis). The same key gives the same projection, for any batch.

    Args:
        grads: the gradients.
        key: a PRNG key.
        dim: the number of dimensions, at least 1. The error of an inner product falls as 1/√dim.

    Returns:
        `(B, dim)`, at least float32. Examples that fill a batch up have rows like the others.

    Raises:
        ValueError: `dim` is below 1.

    Cost: B·P·dim operations at most, B·T·(rows + columns)·dim where the factors allow it.
    """
    if not isinstance(dim, int) or isinstance(dim, bool) or dim < 1:
        raise ValueError(f"`dim` must be an int of at least 1, got {dim!r}")
    form, _ = form_of(grads)
    return _project(form, key, dim)


@jax.jit
@placed_by(like_examples)
def _gram(form, other):
    if isinstance(other, MicrobatchedGradients) and not isinstance(form, MicrobatchedGradients):
        return other.gram(form).T
    return form.gram(other)


@jax.jit
@placed_by(like_examples)
def _self_gram(form):
    return form.self_gram()


@placed_by(like_examples)
def _project_form(form, key, dim):
    return form.map_microbatches(lambda form, _: ((), form.project(key, dim)), None)[1]


_project = jax.jit(_project_form, static_argnums=2)
