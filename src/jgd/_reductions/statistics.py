"""What a batch says about its own size: how much of its gradient is noise, and how far the examples agree."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jgd._engine.norms import root
from jgd._gradients import PerExampleGrads
from jgd._mesh import like_scalars, placed_by
from jgd._reductions.arguments import Weights, at_least_two, form_of, one_less, shares_of, weights_of
from jgd._weights import around_mean, sums


class BatchStatistics(NamedTuple):
    """Five numbers of a batch, from which the tests and ratios of the literature follow; each a scalar.

    With ḡ the mean of B gradients, or the mean by weights, of which the s_i are the shares; without weights s_i = 1/B.
    Means over several batches are those of the numbers, see `jgd.smoothed`: then numerators and denominators of the
    ratios are averaged apart.

    Attributes:
        trace_covariance: tr Σ, the unbiased estimate of the summed variance of one example's gradient.
        variance_along_mean: the unbiased variance of ⟨g_i, ḡ/‖ḡ‖⟩ over the examples, a part of tr Σ; 0 where ḡ is.
        squared_mean: ‖ḡ‖².
        mean_square: Σ s_i ‖g_i‖².
        share: Σ s_i², which is 1/B without weights.
    """

    trace_covariance: Float[Array, ""]
    variance_along_mean: Float[Array, ""]
    squared_mean: Float[Array, ""]
    mean_square: Float[Array, ""]
    share: Float[Array, ""]

    @property
    def squared_norm(self) -> jax.Array:
        """The unbiased estimate of ‖G‖², the true gradient's squared norm, ‖ḡ‖² − tr Σ/B; it can be negative."""
        return self.squared_mean - self.trace_covariance * self.share

    @property
    def noise_scale(self) -> jax.Array:
        """tr Σ/‖G‖², in examples: the batch size at which noise and signal are equal (McCandlish et al., 2018)."""
        return self.trace_covariance / self.squared_norm

    @property
    def norm_test(self) -> jax.Array:
        """tr Σ/(B ‖ḡ‖²): the batch is large enough while that is at most θ² (Byrd et al., 2012)."""
        return self.trace_covariance * self.share / self.squared_mean

    @property
    def inner_product_test(self) -> jax.Array:
        """Var ⟨g_i, ḡ⟩/(B ‖ḡ‖⁴), at most θ²: ḡ is a direction of descent (Bollapragada, Byrd and Nocedal, 2018)."""
        return self.variance_along_mean * self.share / self.squared_mean

    @property
    def orthogonality_test(self) -> jax.Array:
        """Σ ‖g_i − (⟨g_i, ḡ⟩/‖ḡ‖²) ḡ‖²/((B − 1) B ‖ḡ‖²), at most ν² (the same): the rest of the norm test."""
        return jnp.maximum(self.norm_test - self.inner_product_test, 0)

    @property
    def gradient_diversity(self) -> jax.Array:
        """Σ ‖g_i‖²/‖Σ g_i‖²: from 1/B, where all agree, through 1, where they are orthogonal (Yin et al., 2018)."""
        return self.mean_square * self.share / self.squared_mean

    @property
    def m_coherence(self) -> jax.Array:
        """‖Σ g_i‖²/Σ ‖g_i‖², the inverse: in how many examples one helps, itself included (Chatterjee et al., 2020)."""
        return self.squared_mean / (self.mean_square * self.share)


def batch_statistics(
    grads: PerExampleGrads | PyTree[Float[Array, "B ..."]], weights: Weights | None = None
) -> BatchStatistics:
    """How much of a batch's gradient is noise, and how far its examples agree: all that batch sizes are chosen by.

    Args:
        grads: the gradients.
        weights: `(B,)`; weight 0 means absent: weights of 0 and 1 give what the examples present would give.

    Returns:
        A `BatchStatistics`: a named tuple of five scalars, with `noise_scale`, `norm_test`, `inner_product_test`,
        `orthogonality_test`, `gradient_diversity` and `m_coherence` as properties. nan where weights leave one example.

    Raises:
        ValueError: there are fewer than two examples, or `weights` is not `(B,)`, is all 0, or is negative somewhere.

    Example:
        >>> import jax.numpy as jnp, jgd
        >>> statistics = jgd.batch_statistics(jnp.array([[1.0, 1.0], [1.0, -1.0]]))
        >>> float(statistics.gradient_diversity), float(statistics.m_coherence), float(statistics.norm_test)
        (1.0, 1.0, 1.0)

    Cost: that of `jgd.noise_scale` and one `jgd.dot`, of one forward and backward pass.
    """
    form, _ = form_of(grads)
    at_least_two(form.size, "the batch's statistics")
    if weights is not None:
        weights = weights_of(weights, form.size, divides=True, may_be_negative=False)
    return BatchStatistics(*_batch_statistics(form, weights))


class Running(NamedTuple):
    """Sums of statistics over steps, each weighed by how long ago it was, and the sum of these weights."""

    sums: BatchStatistics
    weight: jax.Array

    @property
    def means(self) -> BatchStatistics:
        """The weighted means."""
        return BatchStatistics(*(x / self.weight for x in self.sums))

    def after(self, statistics: BatchStatistics, decay: Any) -> "Running":
        """The sums with one more step's."""
        step = lambda old, new: decay * old + (1 - decay) * new
        return Running(
            BatchStatistics(*map(step, self.sums, statistics)), step(self.weight, jnp.ones_like(self.weight))
        )


def smoothed(
    statistics: BatchStatistics, state: Running | None, decay: float | jax.Array
) -> tuple[BatchStatistics, Running]:
    """Running means of statistics over steps: exponential, and not drawn towards their start.

    A ratio of one batch's estimates is biased and noisy, so numerators and denominators are averaged before they are
    divided, as McCandlish et al. do.

    Args:
        statistics: of this step.
        state: what the last call returned beside the means; None at the first.
        decay: the weight of what was before, from 0 (this step alone) to below 1.

    Returns:
        The means so far, a `BatchStatistics`, and the state, a pytree that a `lax.scan` can carry.

    Raises:
        ValueError: `decay` is not in [0, 1).
    """
    if isinstance(decay, int | float) and not 0 <= decay < 1:
        raise ValueError(f"`decay` must be at least 0 and below 1, got {decay!r}")
    if state is None:
        zeros = BatchStatistics(*map(jnp.zeros_like, statistics))
        state = Running(zeros, jnp.zeros_like(statistics.share))
    state = state.after(statistics, decay)
    return state.means, state


@jax.jit
@placed_by(like_scalars)
def _batch_statistics(form, weights):
    if weights is None:
        deviation, of_sum = form.deviation_and_squared_sum()
        share = jnp.full(form.size, 1 / form.size, deviation.dtype)
        deviation, squared_mean = deviation / form.size, of_sum / float(form.size) ** 2
        mean_square = deviation + squared_mean
        mean = [x / form.size for x in sums(form, None)]
    else:
        share = shares_of(weights, form)
        mean, squared_mean, mean_square, deviation = around_mean(form, share)
    products = form.map_microbatches(lambda form, _: ((), form.dot(mean)), None)[1]
    # In units of ‖ḡ‖: of products of two gradients the squares would leave the range soon.
    norm = root(squared_mean)
    apart = jnp.where(share != 0, (products - squared_mean) / jnp.where(norm > 0, norm, 1), 0)
    unbiased = one_less(share)
    along = jnp.sum(share * jnp.square(apart)) / unbiased
    return deviation / unbiased, along, squared_mean, mean_square, jnp.sum(jnp.square(share))
