"""Questions to ask of gradients by name, the names being the oracle's, and the comparison of the answers."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from cases import Problem

import jgd


def ask(grads: Any, names: Sequence[str], weights: Any, max_norm: Any, direction: Any) -> dict[str, Any]:
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


def compare(got: dict[str, Any], want: dict[str, Any], tolerance: float) -> None:
    """Each answer with the oracle's of its name."""
    for quantity, answer in got.items():
        oracle.assert_close(answer, want[quantity], tolerance, what=quantity)


# What is asked of each of many losses, and the weights: an example is absent.
ASKED = (
    "sum", "norms", "leaf_norms", "weighted_clipped_sum", "gram", "second_moment", "variance", "weighted_variance",
    "dot", "materialize",
)  # fmt: skip
WEIGHTS = np.array([1.5, 0.0, 0.5, 2.0, 1.0])


def check_asked(problem: Problem, microbatch_size: int | None) -> None:
    """All of it, by factors in one program, against the oracle in float64."""
    given = (WEIGHTS, 0.5, problem.params)
    grads = jgd.per_example_grad(problem.loss, strategy="factored", microbatch_size=microbatch_size)
    got = jax.jit(lambda p, *batch: ask(grads(p, *batch), ASKED, *given))(problem.params, *problem.batch)
    blocks = oracle.vmap_of_grad(problem)
    compare(got, oracle.answers(blocks, blocks, *given), 1e-9)


def wave(x: jax.Array) -> jax.Array:
    """A number from an array, whose derivative is different everywhere."""
    return jnp.sum(jnp.sin(jnp.cos(jnp.arange(x.size)).reshape(x.shape) * x + 0.1 * jnp.sum(x)))
