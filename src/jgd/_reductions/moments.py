"""Elementwise moments of the gradients over the examples."""

import functools

import jax
from jaxtyping import Array, Float, PyTree

from jgd._engine.dtypes import accumulation_dtype
from jgd._gradients import PerExampleGrads
from jgd._mesh import like_leaves, placed_by
from jgd._reductions.arguments import Weights, at_least_two, form_of, one_less, shares_of, weights_of
from jgd._weights import linear_in_weights, second_moments, spreads


def second_moment(
    grads: PerExampleGrads | PyTree[Float[Array, "B ..."]], weights: Weights | None = None
) -> PyTree[Float[Array, "..."]]:
    """The weighted mean of g_i², elementwise: Σ w_i g_i² / Σ w_i, the diagonal of the empirical Fisher.

    Args:
        grads: the gradients.
        weights: `(B,)`; weight 0 means absent.

    Returns:
        A pytree like the parameters, in at least float32: squares leave the range of half precision. Where a gradient
        is infinite it is inf, or nan beside one that is infinite the other way.

    Raises:
        ValueError: there are no examples, or `weights` is not `(B,)`, is all 0, or is negative somewhere.
    """
    form, treedef = form_of(grads)
    return jax.tree.unflatten(treedef, _second_moment(form, _weights_of(weights, form.size)))


def variance(
    grads: PerExampleGrads | PyTree[Float[Array, "B ..."]], weights: Weights | None = None
) -> PyTree[Float[Array, "..."]]:
    """The unbiased variance of the gradients, elementwise: Σ w_i (g_i − ḡ)² / (V₁ − V₂/V₁).

    V₁ = Σ w_i and V₂ = Σ w_i², so that equal weights, and weights of 0 and 1, divide by one less than the
    number of examples present. The deviations are taken before the squares: nothing large cancels.

    Args:
        grads: the gradients.
        weights: `(B,)`; weight 0 means absent.

    Returns:
        A pytree like the parameters, in at least float32.

    Raises:
        ValueError: there are fewer than two examples, or `weights` is not `(B,)`, is all 0, or is negative somewhere.
    """
    form, treedef = form_of(grads)
    at_least_two(form.size, "the variance")
    return jax.tree.unflatten(treedef, _variance(form, _weights_of(weights, form.size)))


def _weights_of(weights, size):
    return weights_of(weights, size, divides=True, may_be_negative=False)


@jax.jit
@placed_by(like_leaves)
def _second_moment(form, weights):
    total, share = (form.size, None) if weights is None else (1, shares_of(weights, form))
    return _wide(linear_in_weights(functools.partial(second_moments, scale=1 / total), form, share), form)


@jax.jit
@placed_by(like_leaves)
def _variance(form, weights):
    if weights is None:
        share, unbiased = None, form.size - 1
    else:
        share = shares_of(weights, form)
        unbiased = one_less(share)
    return _wide(spreads(form, share, 1 / unbiased), form)


def _wide(moments, form):
    return [m.astype(accumulation_dtype(x)) for m, x in zip(moments, form.leaf_structs, strict=True)]
