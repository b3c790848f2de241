"""What a clipped sum does with gradients in any form: the norms, the factors, the sum."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jgd._engine.gradients import HeldGradients
from jgd._engine.norms import Groups, all_together
from jgd._weights import linear_in_weights, sums


def clipped_sum(
    form: HeldGradients, max_norm: Any, weights: jax.Array | None
) -> tuple[list[jax.Array], jax.Array]:
    """Σ w_i min(1, C/‖g_i‖) g_i, in the accumulators' dtypes, and the ‖g_i‖.

    A gradient that is not finite adds nothing.
    """
    sums, (norm,) = clipped_sum_of_groups(form, [max_norm], all_together(form.leaf_structs), weights)
    return sums, norm


def clipped_sum_of_groups(
    form: HeldGradients, max_norms: Sequence[Any], groups: Groups, weights: jax.Array | None
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Σ w_i min(1, C_k/‖g_ik‖) g_ik for the leaves of each group k, in the accumulators' dtypes, and all ‖g_ik‖.

    A gradient that is not finite, in whatever group, adds nothing to any.
    """
    form = form.for_norms_and_sums()
    each = form.norms(groups)
    norms, bounds = [norm.length for norm in each], [norm.at_most() for norm in each]
    finite = functools.reduce(jnp.logical_and, map(jnp.isfinite, norms), jnp.ones(form.size, bool))
    # Each group asks for a sum of all leaves. Those of other groups are dead code, which XLA drops. Tracing does not
    # drop it, so that several groups share one trace.
    weighted_sum = _weighted_sum if len(groups) == 1 else _traced_once
    clipped: dict[int, jax.Array] = {}
    for max_norm, bound, group in zip(max_norms, bounds, groups, strict=True):
        if not group:
            continue
        # Of a traced one nothing can be refused: a negative bound makes nan, not a step the other way.
        max_norm = jnp.where(jnp.asarray(max_norm) >= 0, max_norm, jnp.nan)
        # The sum over an example's positions is rounded: not even so is it longer than the bound.
        inside = bound <= max_norm
        # Not by a norm that is not finite, which the derivative would keep.
        factor = jnp.where(inside, 1, max_norm / jnp.where(inside | ~finite, 1, bound))
        factor = jnp.where(finite, factor, 0)
        made = weighted_sum(form, factor if weights is None else factor * weights)
        clipped.update({leaf: made[leaf] for leaf in group})
    return [clipped[leaf] for leaf in range(len(form.leaf_structs))], norms


def _weighted_sum(form: HeldGradients, factor: jax.Array) -> list[jax.Array]:
    return linear_in_weights(sums, form, factor)


_traced_once = jax.jit(_weighted_sum, inline=True)
