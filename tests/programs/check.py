"""Puts a random program to the test: every reduction against `vmap(grad)` in float64."""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import oracle
from cases import Problem
from questions import ask, compare

import jgd
from programs.writer import Program

WEIGHTS = np.array([1.5, 0.0, 0.5, 2.0, 1.0])
TOLERANCE = 1e-9
QUARTERS = (
    ("sum", "norms", "weighted_clipped_sum"),
    ("weighted_sum", "weighted_variance", "variance"),
    ("materialize", "leaf_norms", "dot"),
    ("clipped_sum", "gram", "second_moment"),
)
ALL = tuple(name for quarter in QUARTERS for name in quarter)


class Refused(Exception):
    """JAX itself cannot differentiate the program."""


def check(program: Program, names: Sequence[str] = ALL) -> bool:
    """False where the program has no finite gradients to compare.

    Raises:
        AssertionError: an answer is wrong; its message begins with the quantity.
        Refused: there is nothing to compare with.
    """
    try:
        blocks = gradients(program.problem)
    except Exception as error:
        raise Refused(f"{type(error).__name__}: {error}") from None
    if not is_finite(blocks):
        return False
    _check_once(program, blocks, names)
    if program.change is not None:
        program.change()
        blocks = gradients(program.problem)
        if is_finite(blocks):
            try:
                _check_once(program, blocks, names)
            except AssertionError as error:
                raise AssertionError(f"after the change: {error}") from None
    return True


def gradients(problem: Problem) -> Any:
    """By `vmap(grad)`, of the loss as it is now."""
    afresh = lambda *args: problem.loss(*args)
    return oracle.vmap_of_grad(Problem(afresh, problem.params, problem.batch))


def is_finite(blocks: Any) -> bool:
    return all(np.all(np.isfinite(x)) for x in jax.tree.leaves(blocks))


def _check_once(program: Program, blocks: Any, names: Sequence[str]) -> None:
    problem, rng = program.problem, np.random.default_rng(0)
    matrix = oracle.matrix(blocks)
    size = len(matrix)
    norms = np.linalg.norm(matrix, axis=1)
    arguments = {
        "weights": WEIGHTS[:size],
        "max_norm": max(0.9 * np.median(norms), 1e-3) if size else 1.0,
        "direction": jax.tree.map(lambda x: rng.normal(size=x.shape[1:]), blocks),
    }
    if size < 3:  # a variance of what is there needs two examples of a weight, a mean one
        names = [name for name in names if "variance" not in name and (size or "moment" not in name)]
    want = _wanted(blocks, arguments, size)
    compare(_answers(program, problem, names, arguments), want, TOLERANCE)


def _wanted(blocks: Any, arguments: dict[str, Any], size: int) -> dict[str, Any]:
    if not size:
        zeros = jax.tree.map(lambda x: np.zeros(x.shape[1:]), blocks)
        nothing, none = np.zeros(0), jax.tree.map(lambda x: np.zeros(0), blocks)
        sums = dict.fromkeys(("sum", "weighted_sum", "clipped_sum", "weighted_clipped_sum"), zeros)
        rest = {"norms": nothing, "dot": nothing, "gram": np.zeros((0, 0)), "leaf_norms": none}
        return {"materialize": blocks, **sums, **rest}
    with warnings.catch_warnings():  # the variances of few examples, which are not asked for, divide by 0
        warnings.simplefilter("ignore")
        return oracle.answers(blocks, blocks, **arguments)


def _answers(
    program: Program, problem: Problem, names: Sequence[str], arguments: dict[str, Any]
) -> dict[str, Any]:
    # A function of its own each time, as in a notebook's cell: JAX keeps what it compiled by the function.
    small = 2 if program.mode == "microbatches" and len(problem.batch[0]) > 2 else None
    hold = jgd.per_example_grad(problem.loss, strategy="factored", microbatch_size=small)

    def answers(params: Any, batch: Any, arguments: Any) -> dict[str, Any]:
        return ask(hold(params, *batch), names, **arguments)

    if program.mode == "eager":
        return answers(problem.params, problem.batch, arguments)
    if program.mode == "jitted pass":
        grads = jax.jit(lambda params, batch: hold(params, *batch))(problem.params, problem.batch)
        return ask(grads, names, **arguments)
    return jax.jit(answers)(problem.params, problem.batch, arguments)
