"""Weights as something to differentiate by: an example of weight 0 is absent, but its derivative is what it would add.

Sums leave an absent example out, whatever it holds: where they look for weights of 0, JAX finds no derivative.
Reweighting needs it (Ren et al., "Learning to reweight examples for robust deep learning", 2018): it starts from
weights of 0, where the derivative says which examples to take in.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from jgd._engine.factors import sum_squares
from jgd._engine.gradients import Gradients
from jgd._engine.moments import deviation_of
from jgd._engine.norms import Groups, all_together


def linear_in_weights(
    question: Callable[[Any, Any], list[jax.Array]], form: Any, weights: Any
) -> list[jax.Array]:
    """`question(form, weights)`, which is linear in the weights, or without them where they are None.

    Its derivative by a weight of 0 is what that example would add, and 0 where its gradient is not finite. By the
    parameters that example has none, whatever it holds.
    """
    return question(form, None) if weights is None else _linear(question, True, form, weights)


def linear_of_present(question: Callable[[Any, Any], list[jax.Array]], form: Any, weights: Any) -> Any:
    """The same, where the gradients of examples with weight 0 are finite, or have no derivative."""
    return _linear(question, False, form, weights)


def spreads(form: Gradients, weights: Any, scale: Any) -> list[jax.Array]:
    """`form.spreads(weights, scale)`, with such a derivative; `scale` only scales."""
    if weights is None:
        return form.spreads(None, scale)
    return [x * scale for x in _spreads(form, weights)]


def sums(form: Gradients, weights: jax.Array | None) -> list[jax.Array]:
    """Σ w_i g_i in the accumulators' dtypes, a microbatch at a time where that is how they are made."""
    return form.map_microbatches(lambda form, w: (form.weighted_sum(w), ()), weights)[0]


def second_moments(form: Gradients, weights: jax.Array | None, scale: float = 1) -> list[jax.Array]:
    """scale · Σ w_i g_i², likewise."""
    return form.map_microbatches(lambda form, w: (form.second_moments(w, scale), ()), weights)[0]


def norms(form: Gradients, groups: Groups) -> list[jax.Array]:
    """‖g_i‖ of each group of leaves, likewise."""
    return form.map_microbatches(lambda form, _: ((), [norm.length for norm in form.norms(groups)]), None)[1]


class AroundMean(NamedTuple):
    """Of weighted gradients, whose weights s_i add up to 1.

    Attributes:
        mean: ḡ = Σ s_i g_i, in the accumulators' dtypes.
        squared_mean: ‖ḡ‖².
        mean_square: Σ s_i ‖g_i‖².
        deviation: Σ s_i ‖g_i − ḡ‖².
    """

    mean: list[jax.Array]
    squared_mean: jax.Array
    mean_square: jax.Array
    deviation: jax.Array


def around_mean(form: Gradients, share: jax.Array) -> AroundMean:
    """The mean, and how far the gradients are from it, of one walk; of another only where these are nearly the same."""
    whole = all_together(form.leaf_structs)

    def sums_and_squares(form: Any, w: jax.Array) -> tuple[list[jax.Array], tuple[()]]:
        (norm,) = form.norms(whole)
        squares = jnp.where(w != 0, jnp.square(norm.length), 0)
        return [*form.weighted_sum(w), jnp.sum(w * squares)], ()

    walk = lambda form, w: form.map_microbatches(sums_and_squares, w)[0]
    *mean, mean_square = linear_in_weights(walk, form, share)
    squared_mean = jnp.sum(jnp.stack([sum_squares(x) for x in mean]))
    itself = lambda: jnp.sum(jnp.stack([jnp.sum(x) for x in spreads(form, share, 1)]))
    return AroundMean(mean, squared_mean, mean_square, deviation_of(mean_square, squared_mean, 1, itself))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _linear(question: Callable[..., Any], replaces: bool, form: Any, weights: jax.Array) -> list[jax.Array]:
    del replaces
    return question(form, weights)


@functools.partial(_linear.defjvp, symbolic_zeros=True)
def _linear_jvp(question: Callable[..., Any], replaces: bool, primals: Any, tangents: Any) -> Any:
    (form, weights), (form_moves, weights_move) = primals, tangents
    # A cotangent of 0 is not enough for an absent example: the pass would multiply it by what is not finite.
    replaces = replaces and moves(form_moves)
    of = lambda form: question(form.with_present(weights != 0) if replaces else form, weights)
    made, moved = along(of, form, form_moves)
    if moves(weights_move):
        # What is linear has the same derivative everywhere: here, where nobody is absent who need not be.
        everyone = ((weights != 0) | _is_finite(form)).astype(weights.dtype)
        _, by_weights = jax.jvp(functools.partial(question, form), (everyone,), (weights_move,))
        moved = list(map(jnp.add, moved, by_weights))
    return made, moved


@jax.custom_jvp
def _spreads(form: Any, weights: jax.Array) -> list[jax.Array]:
    return form.spreads(weights)


@functools.partial(_spreads.defjvp, symbolic_zeros=True)
def _spreads_jvp(primals: Any, tangents: Any) -> Any:
    (form, weights), (form_moves, weights_move) = primals, tangents
    is_present, replaces = weights != 0, moves(form_moves)
    spreads_of = lambda form, weights: (form.with_present(is_present) if replaces else form).spreads(weights)
    if not moves(weights_move):
        return along(lambda form: spreads_of(form, weights), form, form_moves)
    present = weights_move * is_present.astype(weights.dtype)
    made, moved = along(lambda both: spreads_of(*both), (form, weights), (form_moves, present))
    # Of those who are absent (g − ḡ)² is added, from its three terms.
    absent = ((weights == 0) & _is_finite(form)).astype(weights.dtype)
    mean = [x / jnp.sum(weights) for x in sums(form, weights)]
    weights_move = weights_move * absent
    of_each = lambda question: jax.jvp(functools.partial(question, form), (absent,), (weights_move,))[1]
    terms = zip(of_each(second_moments), of_each(sums), mean, strict=True)
    added = [second - 2 * c * first + jnp.square(c) * jnp.sum(weights_move) for second, first, c in terms]
    return made, list(map(jnp.add, moved, added))


def _is_finite(form: Gradients) -> jax.Array:
    """Whether each gradient is finite."""
    (norm,) = norms(form, all_together(form.leaf_structs))
    return jnp.isfinite(norm)


def along(
    fun: Callable[[Any], list[jax.Array]], x: Any, tangents: Any
) -> tuple[list[jax.Array], list[jax.Array]]:
    """What `fun` makes of a pytree, and how that moves with it."""
    if not moves(tangents):
        made = fun(x)
        return made, list(map(jnp.zeros_like, made))
    leaves, treedef = jax.tree.flatten(tangents, is_leaf=_is_zero)
    leaves = [_zero(move) if _is_zero(move) else move for move in leaves]
    return jax.jvp(fun, (x,), (jax.tree.unflatten(treedef, leaves),))


def moves(tangents: Any) -> bool:
    """Whether any leaf of these tangents, which a rule with symbolic zeros got, is more than such a zero."""
    return not all(map(_is_zero, jax.tree.leaves(tangents, is_leaf=_is_zero)))


def _is_zero(move: Any) -> bool:
    return isinstance(move, SymbolicZero)


def _zero(move: Any) -> Any:
    """What stands for no move in `jax.jvp`: of integers it is an array without content."""
    return (
        np.zeros(move.shape, move.dtype)
        if move.dtype == jax.dtypes.float0
        else jnp.zeros(move.shape, move.dtype)
    )
