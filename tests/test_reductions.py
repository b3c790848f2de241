"""Every reduction, of every case, by every strategy, against NumPy on the gradients of `vmap(grad)` in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jgd
import oracle
from cases import CASES, B, problem

STRATEGIES = ("auto", "factored", "materialized")
WEIGHTS = np.array([1.5, 0.0, 0.5, 2.0, 1.0])
EAGER = ("mlp_classifier", "conv2d_all_options", "tied_embedding_and_head", "nested_scans", "auxiliary_output")
NARROW = (*EAGER, "recurrence", "embedding_repeated_indices", "layer_norm", "weight_normalisation", "physics_informed")


@functools.lru_cache(maxsize=2)
def solved(name, dtype, solve_in=None):
    """A case with a second batch, the arguments of the reductions, and the oracle's answers in float64."""
    with jax.enable_x64(True):
        exact = problem(name, dtype)
        exact_other = dataclasses.replace(exact, batch=problem(name, dtype, batch_seed=1).batch)
        wide = lambda p: p if solve_in is None else dataclasses.replace(p, params=_cast(p.params), batch=_cast(p.batch))
        blocks = oracle.vmap_of_grad(wide(exact))
        other = oracle.vmap_of_grad(wide(exact_other))
    norms = np.linalg.norm(oracle.matrix(blocks), axis=1)
    rng = np.random.default_rng(0)
    arguments = {
        "weights": WEIGHTS,
        "max_norm": 0.9 * np.median(norms),
        "direction": jax.tree.map(lambda x: rng.normal(size=x.shape[1:]), blocks),
    }
    return exact, exact_other, blocks, arguments, oracle.answers(blocks, other, **arguments)


def _cast(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def ask(grads, other, key, weights, max_norm, direction):
    """All the reductions, by the oracle's names."""
    scale = jgd.noise_scale(grads)
    return {
        "materialize": jgd.materialize(grads),
        "sum": jgd.sum(grads),
        "weighted_sum": jgd.sum(grads, weights),
        "mean": jgd.mean(grads),
        "weighted_mean": jgd.mean(grads, weights),
        "norms": jgd.norms(grads),
        "leaf_norms": jgd.norms(grads, per_leaf=True),
        "dot": jgd.dot(grads, direction),
        "gram": jgd.gram(grads),
        "cross_gram": jgd.gram(grads, other),
        "clipped_sum": jgd.clipped_sum(grads, max_norm),
        "weighted_clipped_sum": jgd.clipped_sum(grads, max_norm, weights=weights),
        "second_moment": jgd.second_moment(grads),
        "weighted_second_moment": jgd.second_moment(grads, weights),
        "variance": jgd.variance(grads),
        "weighted_variance": jgd.variance(grads, weights),
        "noise_scale": (scale.trace_covariance, scale.squared_norm),
    }, (jgd.project(grads, key, 3), scale.noise_scale)


def gradients(case, strategy):
    return jgd.per_example_grad(case.loss, strategy=strategy, **case.options)(case.params, *case.batch)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", CASES)
def test_every_reduction_of_every_case_by_every_strategy(name, strategy, key, x64):
    case, other, blocks, arguments, want = solved(name, jnp.float64)
    grads = gradients(case, strategy)
    # jgd's own arithmetic promotes no ranks; the losses were traced before, and may.
    with jax.numpy_rank_promotion("raise"):
        got, (projection, ratio) = jax.jit(ask)(grads, gradients(other, strategy), key, **arguments)
    assert got.keys() == want.keys()
    for quantity in want:
        oracle.assert_close(got[quantity], want[quantity], 1e-9, what=quantity)
    oracle.assert_close(projection, jgd.project(blocks, key, 3), 1e-9, what="project")
    np.testing.assert_allclose(ratio, np.divide(*got["noise_scale"]), rtol=1e-12)
