"""Natural gradients in the space of the examples: one small system, and one weighted sum."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Real

from jgd._errors import describe, is_concrete
from jgd._gradients import PerExampleGrads
from jgd._mesh import like_scalars, placed_by
from jgd._reductions.arguments import Weights, form_of, weights_of
from jgd._reductions.linear import sum as sum_
from jgd._reductions.pairs import gram

# Roundings of the largest eigenvalue below which others are not told from 0.
_RESOLVED = 8


def natural_gradient(
    grads: PerExampleGrads | PyTree[Float[Array, "B ..."]],
    residuals: Real[Array, "B"] | None = None,
    *,
    damping: float | jax.Array,
    centred: bool = False,
    weights: Weights | None = None,
) -> PyTree[Float[Array, "..."]]:
    """Jᵀ (J Jᵀ + λ)⁻¹ r, with the gradients as the rows of J: a damped Gauss-Newton or natural gradient step.

    It equals (Jᵀ J + λ)⁻¹ Jᵀ r, a system of P equations, by one of B. With gradients of a model's outputs and r its
    residuals, that is Gauss-Newton; with those of log-likelihoods and r = 1, the gradient preconditioned by the
    empirical Fisher matrix. As a reduction of a method: `reduce=functools.partial(jgd.natural_gradient, damping=1e-3)`.

    Args:
        grads: the gradients, of the outputs or of the losses.
        residuals: r, `(B,)`; None for ones.
        damping: λ, at least 0.
        centred: whether to take the mean gradient off each row, and the mean off r, as stochastic reconfiguration does.
        weights: `(B,)`, at least 0: of example i the row and r_i are multiplied by √w_i; weight 0 means absent.

    Returns:
        A pytree like the parameters, in their dtypes. Directions in which J Jᵀ + λ is below 8 roundings of the largest
        eigenvalue are left out, as for a pseudo-inverse; of more than P examples so are those that must be 0. nan where
        J Jᵀ leaves the range of its dtype.

    Raises:
        ValueError: `damping` is negative or no single number, `residuals` or `weights` are not `(B,)`, or `centred`
            without `residuals`: the mean of ones taken off leaves nothing.

    Cost: one Gram matrix, its eigenvalues and eigenvectors, some 10 B³ operations, and one weighted sum.
    Source: Ren and Goldfarb, "Efficient subsampled Gauss-Newton and natural gradient methods", 2019; for centred rows
    Sorella, "Green function Monte Carlo with stochastic reconfiguration", 1998.
    """
    form, _ = form_of(grads)
    if jnp.ndim(damping) != 0 or (is_concrete(damping) and not float(damping) >= 0):
        raise ValueError(f"`damping` must be one number of at least 0, got {describe(damping)}")
    if residuals is not None and jnp.shape(residuals) != (form.size,):
        raise ValueError(
            f"`residuals` must have shape ({form.size},), one for each example, got {jnp.shape(residuals)}"
        )
    if centred and residuals is None:
        raise ValueError(
            "`centred` takes the mean off the residuals too, which of ones leaves nothing: give `residuals`, such as "
            "`grads.values`"
        )
    if weights is not None:
        weights = weights_of(weights, form.size, divides=True, may_be_negative=False)
    rank = sum(math.prod(x.shape) for x in form.leaf_structs)
    return sum_(grads, _coefficients(gram(grads), residuals, damping, weights, centred, rank))


@placed_by(like_scalars)
def _solved(
    pairs: jax.Array, residuals: Any, damping: Any, weights: Any, centred: bool, rank: int
) -> jax.Array:
    """The weights of the sum: √W (√W K √W + λ)⁻¹ √W r, with the mean by W taken off on both sides if `centred`.

    K has at most that rank.
    """
    size = pairs.shape[0]
    dtype = pairs.dtype
    scale = jnp.ones(size, dtype) if weights is None else jnp.sqrt(weights).astype(dtype)
    right = jnp.ones(size, dtype) if residuals is None else jnp.asarray(residuals, dtype)
    present = scale != 0
    pairs = jnp.where(present[:, None] & present, pairs, 0)
    right = jnp.where(present, right, 0)
    take_off = lambda x: x
    if centred:
        share = jnp.square(scale) / jnp.sum(jnp.square(scale))
        take_off = lambda x: x - jnp.tensordot(share, x, 1)
        pairs = take_off(take_off(pairs).T).T
        right = take_off(right)
    weighted, damping = scale[:, None] * pairs * scale, jnp.asarray(damping, dtype)
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(weighted))  # in rising order
    largest, total = jnp.max(values, initial=0), jnp.maximum(values, 0) + damping
    # Rounding leaves something in directions that hold nothing, which a damping that is not large would blow up.
    holds = jnp.arange(size) >= size - jnp.minimum(rank, jnp.sum(present) - centred)
    known = (holds | (damping >= largest)) & (total > _RESOLVED * jnp.finfo(dtype).eps * largest)
    known = known | jnp.isnan(total)
    inverse = jnp.where(known, 1 / jnp.where(known, total, 1), 0)
    solve = lambda _, right: vectors @ (inverse * (vectors.T @ right))
    system = lambda x: weighted @ x + damping * x
    made = scale * jax.lax.custom_linear_solve(system, scale * right, solve, symmetric=True)
    if centred:  # the transpose of what was taken off the rows
        made = made - share * jnp.sum(made)
    return jnp.where(present, made, 0)


_coefficients = jax.jit(_solved, static_argnums=(4, 5))
