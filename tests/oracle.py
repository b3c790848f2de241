"""What every reduction must answer, in NumPy and float64, from gradients that JAX's own transforms give.

Nothing of jgd is imported here.
"""

import functools
import math
from typing import Any

import jax
import numpy as np
from cases import B, Problem


def vmap_of_grad(problem: Problem) -> Any:
    """The gradients as arrays with a leading axis of examples."""
    grad = jax.grad(problem.loss, has_aux=problem.has_aux)
    out = jax.jit(jax.vmap(grad, problem.in_axes))(problem.params, *problem.batch)
    return jax.tree.map(np.asarray, out[0] if problem.has_aux else out)


def loop_of_value_and_grad(problem: Problem) -> Any:
    """`((losses, aux), gradients)`, one example after the other; aux is None without `has_aux`."""
    step = _step(problem.loss, problem.has_aux)
    outs = [step(problem.params, *_example(problem, i)) for i in range(B)]
    if not problem.has_aux:
        outs = [((value, None), grad) for value, grad in outs]
    return jax.tree.map(lambda *x: np.stack(x), *outs)


@functools.lru_cache(maxsize=1)
def _step(loss: Any, has_aux: bool) -> Any:
    """Compiled once for the batches of one problem."""
    return jax.jit(jax.value_and_grad(loss, has_aux=has_aux))


def _example(problem: Problem, index: int) -> tuple[Any, ...]:
    def take(axis, tree):
        return (
            tree
            if axis is None
            else jax.tree.map(lambda x: x[(slice(None),) * (axis % x.ndim) + (index,)], tree)
        )

    axes = tuple(problem.in_axes)[1:]
    return jax.tree.map(take, axes, tuple(problem.batch), is_leaf=lambda x: x is None)


def answers(blocks: Any, other: Any, weights: np.ndarray, max_norm: float, direction: Any) -> dict[str, Any]:
    """Every reduction of the gradients in `blocks`, by name; the trees come in float64."""
    blocks, other, direction = (jax.tree.map(np.float64, tree) for tree in (blocks, other, direction))
    rows, others = matrix(blocks), matrix(other)
    norms = np.linalg.norm(rows, axis=1)
    share = weights / weights.sum()
    unit = np.where(norms > max_norm, max_norm / np.where(norms > max_norm, norms, 1), 1)
    trace = rows.var(axis=0, ddof=1).sum()
    signal = np.sum(rows.mean(axis=0) ** 2) - trace / len(rows)
    return {
        "materialize": blocks,
        "sum": weighted(np.ones(len(rows)), blocks),
        "weighted_sum": weighted(weights, blocks),
        "mean": weighted(np.full(len(rows), 1 / len(rows)), blocks),
        "weighted_mean": weighted(share, blocks),
        "norms": norms,
        "leaf_norms": jax.tree.map(lambda x: np.linalg.norm(_rows(x), axis=1), blocks),
        "dot": rows @ matrix(jax.tree.map(lambda x: x[None], direction))[0],
        "gram": rows @ rows.T,
        "cross_gram": rows @ others.T,
        "clipped_sum": weighted(unit, blocks),
        "weighted_clipped_sum": weighted(weights * unit, blocks),
        "second_moment": jax.tree.map(lambda x: np.mean(x**2, axis=0), blocks),
        "weighted_second_moment": weighted(share, jax.tree.map(np.square, blocks)),
        "variance": jax.tree.map(lambda x: np.var(x, axis=0, ddof=1), blocks),
        "weighted_variance": _weighted_variance(share, blocks),
        "noise_scale": (trace, signal),
    }


def matrix(blocks: Any) -> np.ndarray:
    """The `(B, P)` Jacobian."""
    return np.concatenate([_rows(x) for x in jax.tree.leaves(blocks)], axis=1)


def _rows(x: np.ndarray) -> np.ndarray:
    """One row an example, even where there is none."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


def weighted(weights: np.ndarray, blocks: Any) -> Any:
    """Σ w_i g_i over the examples whose weight is not zero."""
    present = weights != 0
    return jax.tree.map(lambda x: np.tensordot(weights[present], x[present], axes=1), blocks)


def _weighted_variance(share: np.ndarray, blocks: Any) -> Any:
    """The textbook's unbiased weighted variance, by its pairs: Σ_ij w_i w_j (g_i − g_j)² / 2 / (1 − Σ w²)."""

    def leaf(x):
        pairs = np.square(x[:, None] - x[None])
        return np.einsum("i,j,ij...->...", share, share, pairs) / 2 / (1 - np.sum(share**2))

    return jax.tree.map(leaf, blocks)


def assert_close(got: Any, want: Any, tolerance: float, *, what: str = "") -> None:
    """Compares two pytrees: each leaf within `tolerance` of the largest number in the whole answer."""
    assert jax.tree.structure(got) == jax.tree.structure(want), what
    scale = max([float(np.max(np.abs(x), initial=0)) for x in jax.tree.leaves(want)], default=0.0)
    for (path, x), y in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert not np.iscomplexobj(x), f"{what}{jax.tree_util.keystr(path)} is complex"
        x = np.asarray(x, np.float64)
        assert x.shape == np.shape(y), (
            f"{what}{jax.tree_util.keystr(path)}: shape {x.shape}, not {np.shape(y)}"
        )
        np.testing.assert_allclose(
            x, y, rtol=0, atol=tolerance * scale + 1e-14, err_msg=f"{what}{jax.tree_util.keystr(path)}"
        )
