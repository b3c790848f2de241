"""What tests put to every strategy: a few cases, reductions that between them take every way, comparison."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jgd

STRATEGIES = ("auto", "factored", "materialized")


FEW = ("tied_embedding_and_head", "stacked_layers_on_positions", "conv2d_same")


# "auto" is one of the other two; test_reductions puts it to every case.
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES[1:])


def few_cases(test):
    """Puts a test to a few cases, the first of which the default run asks by every strategy."""
    some = pytest.mark.sample(lambda name, strategy: strategy == "factored" or name == FEW[0])
    return some(pytest.mark.parametrize("name", FEW)(test))


def gradients(case, strategy="auto"):
    return jgd.per_example_grad(case.loss, strategy=strategy, **case.options)(case.params, *case.batch)


def several(grads):
    """Reductions that between them take every way through the factors."""
    return (
        jgd.norms(grads),
        jgd.clipped_sum(grads, 0.5),
        jgd.gram(grads),
        jgd.variance(grads),
        jgd.materialize(grads),
        grads.values,
    )


def close(got, want, tolerance=1e-10):
    oracle.assert_close(got, jax.tree.map(np.asarray, want), tolerance)


def row(tree, k):
    return jax.tree.map(lambda x: x[k], tree)


def squared_error(p, x, y):
    return 0.5 * jnp.sum(jnp.square(jnp.tanh(x @ p["w"]) - y))
