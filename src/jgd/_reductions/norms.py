"""Norms, and what needs no more than them: clipped sums and the noise scale."""

from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jgd import _clipping
from jgd._gradients import PerExampleGrads
from jgd._mesh import like_examples, like_leaves, like_scalars, placed_by
from jgd._reductions.arguments import (
    Weights,
    at_hand,
    at_least_two,
    form_of,
    grouping_of,
    max_norms_of,
    one_less,
    shares_of,
    weights_of,
)
from jgd._weights import around_mean
from jgd._weights import norms as norms_of_groups


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


Grads = PerExampleGrads | PyTree[Float[Array, "B ..."]]


@overload
def norms(grads: Grads, *, per_leaf: Literal[False] = False, groups: None = None) -> Float[Array, "B"]: ...


@overload
def norms(grads: Grads, *, per_leaf: Literal[True], groups: None = None) -> PyTree[Float[Array, "B"]]: ...


@overload
def norms(grads: Grads, *, per_leaf: Literal[False] = False, groups: Any) -> PyTree[Float[Array, "B"]]: ...


@overload
def norms(grads: Grads, *, per_leaf: bool, groups: None = None) -> Any: ...


def norms(grads: Grads, *, per_leaf: bool = False, groups: Any = None) -> Any:
    """The Euclidean norm of each gradient, ‖g_i‖, or of each leaf or group of leaves of it.

    Args:
        grads: the gradients.
        per_leaf: whether to give the norm of each leaf.
        groups: a pytree prefix of the parameters: each of its leaves stands for a group of parameters with one
            norm. Only its structure counts, so `{"encoder": ..., "head": ...}` will do, as will a `max_norm` of
            `jgd.clipped_sum`.

    Returns:
        `(B,)`; with `per_leaf`, a pytree like the parameters of `(B,)`, with `groups` one like `groups`. At least
        float32. A gradient that is not finite has a norm that is not finite. Squares may leave the range of that dtype:
        the norms do not. Examples that fill a batch up have norms like the others: leave theirs out.

    Raises:
        ValueError: `groups` is no prefix of the parameters, or is given beside `per_leaf`.

    Example:
        >>> import jax.numpy as jnp, jgd
        >>> grads = {"w": jnp.array([[3.0, 4.0]]), "b": jnp.array([12.0])}
        >>> jgd.norms(grads)
        Array([13.], dtype=float32)
        >>> jgd.norms({"layer": grads, "scale": jnp.array([2.0])}, groups={"layer": ..., "scale": ...})
        {'layer': Array([13.], dtype=float32), 'scale': Array([2.], dtype=float32)}

    Cost: below the plain gradient's: it needs no product that makes a weight's gradient where one example
    meets a parameter once. The derivative of a norm at a zero gradient is taken as 0.
    """
    form, treedef = form_of(grads)
    if per_leaf and groups is not None:
        raise ValueError("`per_leaf` is one group for each leaf already: give it or `groups`, not both")
    if per_leaf:
        return jax.tree.unflatten(treedef, _norms(form, tuple((leaf,) for leaf in range(treedef.num_leaves))))
    grouping = grouping_of(0 if groups is None else groups, treedef, "groups")
    return jax.tree.unflatten(grouping.treedef, _norms(form, grouping.groups))


Number = float | Float[Array, ""]


@overload
def clipped_sum(
    grads: Grads,
    max_norm: Number | PyTree[Number],
    *,
    weights: Weights | None = None,
    return_norms: Literal[False] = False,
) -> PyTree[Float[Array, "..."]]: ...


@overload
def clipped_sum(
    grads: Grads, max_norm: Number, *, weights: Weights | None = None, return_norms: Literal[True]
) -> tuple[PyTree[Float[Array, "..."]], Float[Array, "B"]]: ...


@overload
def clipped_sum(
    grads: Grads,
    max_norm: PyTree[Number],
    *,
    weights: Weights | None = None,
    return_norms: Literal[True],
) -> tuple[PyTree[Float[Array, "..."]], PyTree[Float[Array, "B"]]]: ...


@overload
def clipped_sum(
    grads: Grads,
    max_norm: Number | PyTree[Number],
    *,
    weights: Weights | None = None,
    return_norms: bool,
) -> Any: ...


def clipped_sum(
    grads: Grads,
    max_norm: Number | PyTree[Number],
    *,
    weights: Weights | None = None,
    return_norms: bool = False,
) -> Any:
    """The sum of the gradients, each scaled down to norm C at most: Σ w_i min(1, C/‖g_i‖) g_i.

    A gradient that is a sum over positions is rounded, by more than its last digits where they cancel. ‖g_i‖ is taken
    larger by that rounding, so that no clipped gradient is longer than C by more than 1e-5 of it.

    Args:
        grads: the gradients.
        max_norm: C, at least 0; inf clips nothing. Or a pytree prefix of the parameters, one C_k for each group k of
            parameters: each is clipped to its own norm, Σ w_i min(1, C_k/‖g_ik‖) g_ik, as in per-layer clipping.
        weights: `(B,)`, applied after the clipping; weight 0 means absent.
        return_norms: whether to give the norms as well, before clipping and without the weights: what `jgd.norms`
            gives, with `groups=max_norm` where that is a pytree. In microbatches that saves it the pass of its own.

    Returns:
        A pytree like the parameters, in their dtypes. An example whose gradient is not finite, in whatever group,
        contributes nothing. Without weights, one example changes the result by at most C, or √(Σ C_k²). With
        `return_norms`, the pair of that and the norms: `(B,)`, or a pytree like `max_norm` of them.

    Raises:
        ValueError: `max_norm` is negative or nan, or no prefix of the parameters, or `weights` is not `(B,)`.
        TypeError: `max_norm` or `weights` are not numbers.

    Example:
        >>> import jax.numpy as jnp, jgd
        >>> grads = {"w": jnp.array([[3.0, 4.0], [0.6, 0.8]]), "b": jnp.array([12.0, 1.0])}
        >>> jgd.clipped_sum(grads, {"w": 1.0, "b": 2.0})
        {'b': Array(3., dtype=float32), 'w': Array([1.2, 1.6], dtype=float32)}

    Cost: about the plain gradient's in all, with the pass that made `grads`. Groups cost no more operations, but time
    to compile: where each of 69 leaves is a group, three times as much. Weighted sums that are second backward passes,
    see `max_memory` of `jgd.per_example_grad`, are one pass for each group.
    Source: Abadi et al., "Deep learning with differential privacy", 2016; McMahan et al., "Learning differentially
    private recurrent language models", 2018, for norms of each layer's own.
    """
    form, treedef = form_of(grads)
    max_norms, grouping = max_norms_of(max_norm, treedef)
    max_norms = [at_hand(x, form) for x in max_norms]
    sums, norms = _clipped_sum(form, max_norms, grouping.groups, weights_of(weights, form.size))
    clipped = jax.tree.unflatten(treedef, sums)
    return (clipped, jax.tree.unflatten(grouping.treedef, norms)) if return_norms else clipped


def noise_scale(
    grads: PerExampleGrads | PyTree[Float[Array, "B ..."]], weights: Weights | None = None
) -> NoiseScale:
    """Estimates how noisy the gradient is: tr Σ, ‖G‖² and their ratio, the simple noise scale.

    tr Σ = Σ ‖g_i − ḡ‖²/(B − 1) and ‖G‖² = ‖ḡ‖² − tr Σ/B, both unbiased.
    Their ratio is not; average the two parts over steps before dividing.

    Args:
        grads: the gradients.
        weights: `(B,)`, of which s_i are the shares w_i/Σ w_j: then ḡ = Σ s_i g_i, tr Σ = Σ s_i ‖g_i − ḡ‖²/(1 − Σ s_i²)
            and ‖G‖² = ‖ḡ‖² − tr Σ · Σ s_i². Weight 0 means absent, as in a batch that is filled up: weights of 0 and 1
            give what the examples present would give.

    Returns:
        Three scalars, nan where weights leave one example.

    Raises:
        ValueError: there are fewer than two examples, or `weights` is not `(B,)`, is all 0, or is negative somewhere.

    Cost: norms and one sum; where the gradients are so alike that Σ ‖g_i‖² and ‖ḡ‖² nearly cancel, also the deviations
    from the mean, a few columns of all gradients at a time.
    Source: McCandlish et al., "An empirical model of large-batch training", 2018.
    """
    form, _ = form_of(grads)
    at_least_two(form.size, "the noise scale")
    if weights is None:
        return _noise_scale(form)
    return _noise_scale_of_weighted(form, weights_of(weights, form.size, divides=True, may_be_negative=False))


@placed_by(like_examples)
def _norms_of_groups(form, groups):
    return norms_of_groups(form, groups)


@placed_by(lambda *args: (like_leaves(*args), like_examples(*args)))
def _clipped_sum_of_groups(form, max_norms, groups, weights):
    clip = lambda form, w: _clipping.clipped_sum_of_groups(form, max_norms, groups, w)
    sums, norms = form.map_microbatches(clip, weights)
    return [x.astype(like.dtype) for x, like in zip(sums, form.leaf_structs, strict=True)], norms


_norms = jax.jit(_norms_of_groups, static_argnums=1)
_clipped_sum = jax.jit(_clipped_sum_of_groups, static_argnums=2)


@jax.jit
@placed_by(like_scalars)
def _noise_scale(form):
    size = form.size
    deviation, of_sum = form.deviation_and_squared_sum()
    trace = deviation / (size - 1)
    signal = of_sum / float(size) ** 2 - trace / size
    return NoiseScale(trace / signal, trace, signal)


@jax.jit
@placed_by(like_scalars)
def _noise_scale_of_weighted(form, weights):
    share = shares_of(weights, form)
    around = around_mean(form, share)
    trace = around.deviation / one_less(share)
    signal = around.squared_mean - trace * jnp.sum(jnp.square(share))
    return NoiseScale(trace / signal, trace, signal)
