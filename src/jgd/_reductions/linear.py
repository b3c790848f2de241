"""Linear questions: Jᵀw and Jv, with J the `(B, P)` Jacobian of the per-example losses."""

import jax
from jaxtyping import Array, Float, PyTree

from jgd._gradients import PerExampleGrads
from jgd._mesh import like_blocks, like_examples, like_leaves, placed_by
from jgd._reductions.arguments import Weights, direction_of, form_of, shares_of, weights_of
from jgd._weights import linear_in_weights, sums


def materialize(grads: PerExampleGrads | PyTree[Float[Array, "B ..."]]) -> PyTree[Float[Array, "B ..."]]:
    """The gradients themselves, g_i, as a pytree like the parameters with a leading axis B.

    Returns:
        For each leaf of shape s, an array `(B, *s)` in the parameters' dtype.

    Cost: B·P numbers, which the other reductions avoid.
    """
    form, treedef = form_of(grads)
    return jax.tree.unflatten(treedef, _materialize(form))


def sum(
    grads: PerExampleGrads | PyTree[Float[Array, "B ..."]], weights: Weights | None = None
) -> PyTree[Float[Array, "..."]]:
    """The weighted sum Σ w_i g_i; without weights it is `jax.grad` of the summed loss.

    Args:
        grads: the gradients.
        weights: `(B,)`. Weight 0 means absent: nothing is contributed, even where the gradient is not finite. The
            derivative by such a weight is what the example would add; 0, where its gradient is not finite.

    Returns:
        A pytree like the parameters, in their dtypes, accumulated in at least float32.

    Raises:
        ValueError: `weights` is not `(B,)`.

    Cost: the products that make the weights' gradients in the plain backward pass.
    """
    form, treedef = form_of(grads)
    return jax.tree.unflatten(treedef, _weighted_sum(form, weights_of(weights, form.size)))


def mean(
    grads: PerExampleGrads | PyTree[Float[Array, "B ..."]], weights: Weights | None = None
) -> PyTree[Float[Array, "..."]]:
    """The weighted mean Σ w_i g_i / Σ w_i; without weights it is `jax.grad` of the mean loss.

    Args and cost as for `jgd.sum`. Of traced weights the values cannot be checked: all 0 gives nan.

    Raises:
        ValueError: there are no examples, or `weights` is not `(B,)` or is all 0.
    """
    form, treedef = form_of(grads)
    weights = weights_of(weights, form.size, divides=True)
    return jax.tree.unflatten(treedef, _weighted_mean(form, weights))


def dot(
    grads: PerExampleGrads | PyTree[Float[Array, "B ..."]], direction: PyTree[Float[Array, "..."]]
) -> Float[Array, "B"]:
    """The inner product of each gradient with a direction, ⟨g_i, v⟩: the loss's slope along v at each example.

    Args:
        grads: the gradients.
        direction: a pytree with the parameters' structure and shapes, of real numbers. It is not rounded to the
            parameters' dtype.

    Returns:
        `(B,)`, accumulated in at least float32, or in the direction's dtype where that is wider. Examples that fill a
        batch up have products like the others.

    Raises:
        ValueError: `direction` is of another structure or shape.
        TypeError: `direction` is complex.

    Cost: about a forward pass; for parameters that meet data in a way that no rule knows, their gradients, a tile
    at a time, or for large ones one product more.
    """
    form, treedef = form_of(grads)
    return _dot(form, direction_of(direction, form.leaf_structs, treedef))


@jax.jit
@placed_by(like_blocks)
def _materialize(form):
    return form.materialize()


@jax.jit
@placed_by(like_leaves)
def _weighted_sum(form, weights):
    return [
        x.astype(like.dtype)
        for x, like in zip(linear_in_weights(sums, form, weights), form.leaf_structs, strict=True)
    ]


@jax.jit
@placed_by(like_leaves)
def _weighted_mean(form, weights):
    if weights is None:
        # Not by weights of 1/B: the sum may be asked for beside the mean, and is then shared.
        made = [x / form.size for x in sums(form, None)]
    else:
        made = linear_in_weights(sums, form, shares_of(weights, form))
    return [x.astype(like.dtype) for x, like in zip(made, form.leaf_structs, strict=True)]


@jax.jit
@placed_by(like_examples)
def _dot(form, direction):
    return form.map_microbatches(lambda form, _: ((), form.dot(direction)), None)[1]
