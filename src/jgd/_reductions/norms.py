"""Norms, and what needs no more than them: clipped sums and the noise scale."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jgd import _clipping
from jgd._clipping import root, total
from jgd._errors import describe, is_concrete
from jgd._gradients import PerExampleGrads
from jgd._mesh import like_examples, like_leaves, like_scalars, placed_by
from jgd._reductions.arguments import Weights, at_least_two, form_of, weights_of
from jgd._weighing import squared_norms


class NoiseScale(NamedTuple):
    """The simple noise scale and its two parts, each a scalar.

    Attributes:
        noise_scale: tr Σ / ‖G‖², in examples: the batch size at which noise and signal are equal.
        trace_covariance: the unbiased estimate of tr Σ, the summed variance of one example's gradient.
        squared_norm: the unbiased estimate of ‖G‖², the true gradient's squared norm; it can come out negative.
    """

    noise_scale: Float[Array, ""]
    trace_covariance: Float[Array, ""]
    squared_norm: Float[Array, ""]


def norms(grads: PerExampleGrads | PyTree[Float[Array, "B ..."]], *, per_leaf: bool = False) -> Any:
    """The Euclidean norm of each gradient, ‖g_i‖, or of each leaf of it.

    Args:
        grads: the gradients.
        per_leaf: whether to give the norms of the leaves apart.

    Returns:
        `(B,)`; with `per_leaf`, a pytree like the parameters of `(B,)`. At least float32. A gradient that is
        not finite has a norm that is not finite.

    Cost: below the plain gradient's: it needs no product that makes a weight's gradient where one example
    meets a parameter once. The derivative of a norm at a zero gradient is taken as 0.
    """
    form, treedef = form_of(grads)
    return jax.tree.unflatten(treedef, _leaf_norms(form)) if per_leaf else _norms(form)


def clipped_sum(
    grads: PerExampleGrads | PyTree[Float[Array, "B ..."]],
    max_norm: float | Float[Array, ""],
    *,
    weights: Weights | None = None,
    return_norms: bool = False,
) -> Any:
    """The sum of the gradients, each scaled down to norm C at most: Σ w_i min(1, C/‖g_i‖) g_i.

    Args:
        grads: the gradients.
        max_norm: C, at least 0; inf clips nothing.
        weights: `(B,)`, applied after the clipping; weight 0 means absent.
        return_norms: whether to give the norms as well, before clipping and without the weights: what `jgd.norms`
            gives. In microbatches that saves it the pass of its own.

    Returns:
        A pytree like the parameters, in their dtypes. An example whose gradient is not finite contributes
        nothing. Without weights, one example changes the result by at most C. With `return_norms`, the pair of
        that and the norms, `(B,)`.

    Raises:
        ValueError: `max_norm` is negative or nan, or `weights` is not `(B,)`.
        TypeError: `max_norm` or `weights` are not numbers.

    Cost: about the plain gradient's in all, with the pass that made `grads`.
    Source: Abadi et al., "Deep learning with differential privacy", 2016.
    """
    if not isinstance(max_norm, int | float) and not hasattr(max_norm, "dtype"):
        raise TypeError(f"`max_norm` must be one number, got {describe(max_norm)}")
    if jnp.ndim(max_norm) != 0:
        raise ValueError(f"`max_norm` must be one number, got an array of shape {jnp.shape(max_norm)}")
    if is_concrete(max_norm) and not float(max_norm) >= 0:
        raise ValueError(f"`max_norm` must be at least 0, got {max_norm}")
    form, treedef = form_of(grads)
    sums, norms = _clipped_sum(form, max_norm, weights_of(weights, form.size))
    clipped = jax.tree.unflatten(treedef, sums)
    return (clipped, norms) if return_norms else clipped


def noise_scale(grads: PerExampleGrads | PyTree[Float[Array, "B ..."]]) -> NoiseScale:
    """Estimates how noisy the gradient is: tr Σ, ‖G‖² and their ratio, the simple noise scale.

    With s the mean of ‖g_i‖² and m = ‖ḡ‖², tr Σ = (s − m)·B/(B − 1) and ‖G‖² = m − tr Σ/B: both unbiased.
    Their ratio is not; average the two parts over steps before dividing.

    Raises:
        ValueError: there are fewer than two examples.

    Cost: norms and one sum. Source: McCandlish et al., "An empirical model of large-batch training", 2018.
    """
    form, _ = form_of(grads)
    at_least_two(form.size, "the noise scale")
    return _noise_scale(form)


@jax.jit
@placed_by(like_examples)
def _leaf_norms(form):
    return [root(square) for square in squared_norms(form)]


@jax.jit
@placed_by(like_examples)
def _norms(form):
    return root(total(squared_norms(form), form.size))


@jax.jit
@placed_by(lambda *args: (like_leaves(*args), like_examples(*args)))
def _clipped_sum(form, max_norm, weights):
    sums, norms = form.walk(lambda form, w: _clipping.clipped_sum(form, max_norm, w), weights)
    return [x.astype(like.dtype) for x, like in zip(sums, form.like, strict=True)], norms


@jax.jit
@placed_by(like_scalars)
def _noise_scale(form):
    size = form.size
    squares, square_sum = form.squares_and_sum()
    mean_square, square_mean = jnp.mean(total(squares, size)), square_sum / size**2
    trace = (mean_square - square_mean) * (size / (size - 1))
    signal = square_mean - trace / size
    return NoiseScale(trace / signal, trace, signal)
