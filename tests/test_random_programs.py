"""Random losses, every reduction of which must agree with `vmap(grad)` in float64.

To look at one program, read the seed off the failure: `print(programs.random_program([0, 123])[1])`.
"""

import gc

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import oracle
import pytest
from programs import random_program

import jgd

WEIGHTS = np.array([1.5, 0.0, 0.5, 2.0, 1.0])
TOLERANCE = 1e-9


@jax.jit
def ask(grads, weights, max_norm, direction):
    """Every reduction that needs no key, by the oracle's names."""
    return {
        "materialize": jgd.materialize(grads),
        "sum": jgd.sum(grads),
        "weighted_sum": jgd.sum(grads, weights),
        "norms": jgd.norms(grads),
        "leaf_norms": jgd.norms(grads, per_leaf=True),
        "dot": jgd.dot(grads, direction),
        "gram": jgd.gram(grads),
        "clipped_sum": jgd.clipped_sum(grads, max_norm),
        "second_moment": jgd.second_moment(grads),
        "weighted_variance": jgd.variance(grads, weights),
    }


def compare(seed):
    """Puts one random program to the test."""
    problem, text = random_program(seed)
    blocks = oracle.vmap_of_grad(problem)
    hypothesis.assume(all(np.all(np.isfinite(x)) for x in jax.tree.leaves(blocks)))
    rng = np.random.default_rng(0)
    norms = np.linalg.norm(oracle.matrix(blocks), axis=1)
    arguments = {
        "weights": WEIGHTS,
        "max_norm": max(0.9 * np.median(norms), 1e-3),
        "direction": jax.tree.map(lambda x: rng.normal(size=x.shape[1:]), blocks),
    }
    want = oracle.answers(blocks, blocks, **arguments)
    grads = jgd.per_example_grad(problem.loss, strategy="factored")(problem.params, *problem.batch)
    got = ask(grads, **arguments)
    for quantity in got:
        try:
            oracle.assert_close(got[quantity], want[quantity], TOLERANCE, what=quantity)
        except AssertionError as error:
            raise AssertionError(f"{text}\n{error}") from None


def search(part, number):
    """Many random programs. Shrinking a seed would make nothing simpler, so there is none."""

    @hypothesis.settings(max_examples=number, phases=[hypothesis.Phase.generate])
    @hypothesis.given(st.integers(0, 2**32 - 1))
    def test(seed):
        compare([part, seed])

    test()


@pytest.fixture(autouse=True)
def forget_the_programs():
    yield
    jax.clear_caches()
    gc.collect()


@pytest.mark.parametrize("part", range(10))
def test_random_programs(part, x64):
    search(part, 15)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(100, 140))
def test_many_random_programs(part, x64):
    search(part, 50)
