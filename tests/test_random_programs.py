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


def ask(grads, names, weights, max_norm, direction):
    """The reductions of these names; the names are the oracle's."""
    questions = {
        "sum": lambda: jgd.sum(grads),
        "norms": lambda: jgd.norms(grads),
        "weighted_clipped_sum": lambda: jgd.clipped_sum(grads, max_norm, weights=weights),
        "weighted_variance": lambda: jgd.variance(grads, weights),
        "variance": lambda: jgd.variance(grads),
        "materialize": lambda: jgd.materialize(grads),
        "leaf_norms": lambda: jgd.norms(grads, per_leaf=True),
        "dot": lambda: jgd.dot(grads, direction),
        "gram": lambda: jgd.gram(grads),
        "second_moment": lambda: jgd.second_moment(grads),
        "weighted_sum": lambda: jgd.sum(grads, weights),
        "clipped_sum": lambda: jgd.clipped_sum(grads, max_norm),
    }
    return {name: questions[name]() for name in names}


QUARTERS = (
    ("sum", "norms", "weighted_clipped_sum"),
    ("weighted_sum", "weighted_variance", "variance"),
    ("materialize", "leaf_norms", "dot"),
    ("clipped_sum", "gram", "second_moment"),
)
ALL = tuple(name for quarter in QUARTERS for name in quarter)


def compare(seed, names):
    """Puts one random program to the test: False where it has no finite gradients to compare."""
    problem, text = random_program(seed)
    blocks = oracle.vmap_of_grad(problem)
    if not all(np.all(np.isfinite(x)) for x in jax.tree.leaves(blocks)):
        return False
    rng = np.random.default_rng(0)
    norms = np.linalg.norm(oracle.matrix(blocks), axis=1)
    arguments = {
        "weights": WEIGHTS,
        "max_norm": max(0.9 * np.median(norms), 1e-3),
        "direction": jax.tree.map(lambda x: rng.normal(size=x.shape[1:]), blocks),
    }

    @jax.jit
    def answers(params, batch, arguments):
        grads = jgd.per_example_grad(problem.loss, strategy="factored")(params, *batch)
        return ask(grads, names, **arguments)

    want = oracle.answers(blocks, blocks, **arguments)
    for quantity, got in answers(problem.params, problem.batch, arguments).items():
        try:
            oracle.assert_close(got, want[quantity], TOLERANCE, what=quantity)
        except AssertionError as error:
            raise AssertionError(f"{text}\n{error}") from None
    return True


def search(part, number, names):
    """Many random programs. Shrinking a seed would make nothing simpler, so there is none."""

    @hypothesis.settings(max_examples=number, phases=[hypothesis.Phase.generate])
    @hypothesis.given(st.integers(0, 2**32 - 1))
    def test(seed):
        hypothesis.assume(compare([part, seed], names))

    test()


@pytest.fixture(autouse=True)
def forget_the_programs():
    yield
    jax.clear_caches()
    gc.collect()


@pytest.mark.parametrize("part", range(10))
def test_random_programs(part, x64):
    search(part, 15, QUARTERS[part % 4])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(100, 140))
def test_many_random_programs(part, x64):
    search(part, 50, ALL)
