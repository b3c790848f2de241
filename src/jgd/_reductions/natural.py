"""Natural gradients in the space of the examples: one small system, and one weighted sum."""

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
        A pytree like the parameters, in their dtypes. What the precision of J Jᵀ does not resolve, directions in which
        it is below B roundings of its largest eigenvalue, is left out, as for a pseudo-inverse: where P < B, most are.

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
    return sum_(grads, _coefficients(gram(grads), residuals, damping, weights, centred))


@placed_by(like_scalars)
def _solved(pairs: jax.Array, residuals: Any, damping: Any, weights: Any, centred: bool) -> jax.Array:
    """The weights of the sum: √W (√W K √W + λ)⁻¹ √W r, with the mean by W taken off on both sides if `centred`."""
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
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(weighted))
    known = values > size * jnp.finfo(dtype).eps * jnp.max(jnp.abs(values), initial=0)
    inverse = jnp.where(known, 1 / jnp.where(known, values + damping, 1), 0)
    # Rounding leaves something in directions that are not known, which a small damping would blow up.
    solve = lambda _, right: vectors @ (inverse * (vectors.T @ right))
    system = lambda x: weighted @ x + damping * x
    made = scale * jax.lax.custom_linear_solve(system, scale * right, solve, symmetric=True)
    if centred:  # the transpose of what was taken off the rows
        made = made - share * jnp.sum(made)
    return jnp.where(present, made, 0)


_coefficients = jax.jit(_solved, static_argnums=4)
