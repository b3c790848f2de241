"""What a clipped sum does with gradients in any form: the norms, the factors, the sum."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jgd._engine.gradients import HeldGradients
from jgd._engine.norms import Groups, Norm, all_together
from jgd._weights import along, linear_of_present, moves, sums


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
    clip = _clip if weights is None else _clip_present
    return clip(groups, form, each, list(max_norms), weights), [norm.length for norm in each]


def _clip(
    groups: Groups, form: HeldGradients, each: list[Norm], max_norms: Sequence[Any], weights: jax.Array | None
) -> list[jax.Array]:
    """The sum, by the norms of each group."""
    bounds, finite = [norm.at_most() for norm in each], _are_finite(each, form.size)
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
    return [clipped[leaf] for leaf in range(len(form.leaf_structs))]


_clip_present = jax.custom_jvp(_clip, nondiff_argnums=(0,))


@functools.partial(_clip_present.defjvp, symbolic_zeros=True)
def _clip_present_jvp(groups: Groups, primals: Any, tangents: Any) -> Any:
    (form, each, max_norms, weights), (form_moves, _, max_norm_moves, weights_move) = primals, tangents
    present = _are_finite(each, form.size) & (weights != 0)

    def of_present(form: HeldGradients, max_norms: Sequence[Any]) -> list[jax.Array]:
        # Where others are absent: in the pass, 0 times what is not finite is not 0.
        form = form.with_present(present).for_norms_and_sums()
        return _clip(groups, form, form.norms(groups), max_norms, weights)

    if moves(form_moves):
        of = lambda both: of_present(*both)
        made, moved = along(of, (form, max_norms), (form_moves, max_norm_moves))
    else:
        of = lambda max_norms: _clip(groups, form, each, max_norms, weights)
        made, moved = along(of, max_norms, max_norm_moves)
    if moves(weights_move):
        of_weights = functools.partial(_clip, groups, form, each, max_norms)
        _, by_weights = jax.jvp(of_weights, (weights,), (weights_move,))
        moved = list(map(jnp.add, moved, by_weights))
    return made, moved


def _are_finite(each: Sequence[Norm], size: int) -> jax.Array:
    """Whether an example's gradient is finite in all groups."""
    return functools.reduce(
        jnp.logical_and, [jnp.isfinite(norm.length) for norm in each], jnp.ones(size, bool)
    )


def _weighted_sum(form: HeldGradients, factor: jax.Array) -> list[jax.Array]:
    return linear_of_present(sums, form, factor)


_traced_once = jax.jit(_weighted_sum, inline=True)
