"""Puts a random program to the test: every reduction against `vmap(grad)` in float64."""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
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
    if not _check_once(program, names):
        return False
    if program.change is not None:
        program.change()
        try:
            _check_once(program, names[:1])  # what is stale is so for every question
        except AssertionError as error:
            raise AssertionError(f"after the change: {error}") from None
    return True


def gradients(problem: Problem) -> Any:
    """By `vmap(grad)`, of the loss as it is now."""
    afresh = lambda *args: problem.loss(*args)
    try:
        return oracle.vmap_of_grad(Problem(afresh, problem.params, problem.batch))
    except Exception as error:
        raise Refused(f"{type(error).__name__}: {error}") from None


def is_finite(blocks: Any) -> bool:
    return all(np.all(np.isfinite(x)) for x in jax.tree.leaves(blocks))


def _check_once(program: Program, names: Sequence[str]) -> bool:
    problem, rng = program.problem, np.random.default_rng(0)
    size = len(problem.batch[0])
    arguments = {
        "weights": WEIGHTS[:size],
        "max_norm": 1.0,
        "direction": jax.tree.map(lambda x: rng.normal(size=x.shape), problem.params),
    }
    if size < 3:  # a variance of what is there needs two examples of a weight, a mean one
        names = [name for name in names if "variance" not in name and (size or "moment" not in name)]
    if program.mode == "jit, with what is wanted":
        blocks, arguments["max_norm"], got = _together(problem, names, arguments)
        if not is_finite(blocks):
            return False
    else:
        blocks = gradients(problem)
        if not is_finite(blocks):
            return False
        arguments["max_norm"] = _max_norm(np, blocks)
        got = _answers(program, problem, names, arguments)
    compare(got, _wanted(blocks, arguments, size), TOLERANCE)
    return True


def _max_norm(numpy: Any, blocks: Any) -> Any:
    """A norm that some examples exceed, and others do not; `numpy` is NumPy, or JAX's."""
    squares = sum(numpy.sum(x * x, axis=tuple(range(1, x.ndim))) for x in jax.tree.leaves(blocks))
    return numpy.maximum(0.9 * numpy.mean(numpy.sqrt(squares)), 1e-3) if len(squares) else 1.0


def _together(problem: Problem, names: Sequence[str], arguments: dict[str, Any]) -> Any:
    """The gradients by `vmap(grad)`, what they are clipped to, and the answers, of one program.

    It takes two thirds of the time of two programs, for XLA makes once what both need.
    """
    afresh = lambda *args: problem.loss(*args)

    def both(params: Any, batch: Any, arguments: Any) -> Any:
        try:
            blocks = jax.vmap(jax.grad(afresh), (None, *(0 for _ in batch)))(params, *batch)
        except Exception as error:
            raise Refused(f"{type(error).__name__}: {error}") from None
        max_norm = _max_norm(jnp, blocks)
        grads = jgd.per_example_grad(afresh, strategy="factored")(params, *batch)
        return blocks, max_norm, ask(grads, names, **(arguments | {"max_norm": max_norm}))

    blocks, max_norm, got = jax.jit(both)(problem.params, problem.batch, arguments)
    return jax.tree.map(np.asarray, blocks), float(max_norm), got


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
