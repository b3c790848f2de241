"""How far the answers of a reduction are from the exact ones, and how far those of `vmap(grad)` are.

The exact answers are NumPy's, in float64, from the gradients of `vmap(grad)` of the same program in float64 at the
same inputs, which are rounded to the dtype at hand before. The measure is what is left if all is exact but the
gradients: those of `vmap(grad)` in that dtype, reduced by NumPy in float64. Nothing here computes an error by jgd.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from cases import Draw, Problem

import jgd

DTYPES = ("float32", "bfloat16", "float16")
KEY, DIM = 3, 5  # of the random projections


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Question:
    """What the reductions take beside the gradients.

    `bounds` is a prefix of the parameters: one bound for each child of their root.
    """

    weights: np.ndarray
    max_norm: float
    bounds: Any
    direction: Any


def ask(grads: Any, question: Question) -> dict[str, Any]:
    """Every reduction, by name."""
    weights = jnp.asarray(question.weights, jnp.result_type(float))
    noise = jgd.noise_scale(grads)
    return {
        "sum": jgd.sum(grads),
        "weighted_sum": jgd.sum(grads, weights),
        "mean": jgd.mean(grads),
        "weighted_mean": jgd.mean(grads, weights),
        "norms": jgd.norms(grads),
        "leaf_norms": jgd.norms(grads, per_leaf=True),
        "group_norms": jgd.norms(grads, groups=question.bounds),
        "dot": jgd.dot(grads, question.direction),
        "gram": jgd.gram(grads),
        "clipped_sum": jgd.clipped_sum(grads, question.max_norm),
        "weighted_clipped_sum": jgd.clipped_sum(grads, question.max_norm, weights=weights),
        "group_clipped_sum": jgd.clipped_sum(grads, question.bounds),
        "second_moment": jgd.second_moment(grads),
        "weighted_second_moment": jgd.second_moment(grads, weights),
        "variance": jgd.variance(grads),
        "weighted_variance": jgd.variance(grads, weights),
        "noise_scale": (noise.trace_covariance, noise.squared_norm, noise.noise_scale),
        "project": jgd.project(grads, jax.random.key(KEY), DIM),
    }


def gradients(problem: Problem) -> Any:
    """`vmap(grad)` in the problem's dtype; of a loss without options it is compiled once for all inputs."""
    if problem.options:
        return oracle.vmap_of_grad(problem)
    return jax.tree.map(np.asarray, _by_vmap(problem.loss)(problem.params, *problem.batch))


@functools.lru_cache(maxsize=64)
def _by_vmap(loss: Any) -> Any:
    return jax.jit(lambda params, *batch: jax.vmap(jax.grad(loss), (None, *[0] * len(batch)))(params, *batch))


def exact_gradients(problem: Problem) -> Any:
    """`vmap(grad)` in float64, of the numbers that the problem has in its own dtype."""
    with jax.enable_x64(True):
        return gradients(
            dataclasses.replace(problem, params=_wide(problem.params), batch=_wide(problem.batch))
        )


def _wide(tree: Any) -> Any:
    wide = lambda x: jnp.asarray(x, jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return jax.tree.map(wide, tree)


def question_of(problem: Problem, blocks: Any, seed: int = 11) -> Question:
    """Weights of which some are 0, bounds that clip about half of the examples, a random direction."""
    draw, size = Draw(seed), len(jax.tree.leaves(blocks)[0])
    weights = draw.uniform(size, low=0.1, high=2.0) * (draw.uniform(size, low=0, high=1) < 0.8)
    bound = lambda x: float(np.float32(0.9 * np.median(lengths(x))) or 1)
    direction = jax.tree.map(lambda x: jnp.asarray(draw(*x.shape), x.dtype), problem.params)
    return Question(np.float32(weights), bound(blocks), _of_children(bound, blocks), direction)


def _of_children(fun: Callable[[Any], Any], tree: Any) -> Any:
    """The tree with one leaf for each child of its root."""
    return jax.tree.map(fun, tree, is_leaf=lambda x: x is not tree)


def lengths(tree: Any) -> np.ndarray:
    leaves = [np.float64(x).reshape(len(x), -1) for x in jax.tree.leaves(tree)]
    return np.linalg.norm(np.concatenate(leaves, axis=1), axis=1) if leaves else np.zeros(1)


def answers(blocks: Any, question: Question) -> dict[str, Any]:
    """The answers that these gradients give, in float64."""
    blocks = jax.tree.map(np.float64, blocks)
    made = oracle.answers(blocks, blocks, np.float64(question.weights), question.max_norm, question.direction)
    trace, signal = made["noise_scale"]
    children, bounds = _children(blocks), _children(question.bounds)
    size = len(jax.tree.leaves(blocks)[0])
    norms = [lengths(child) if jax.tree.leaves(child) else np.zeros(size) for child in children]
    clipped = [
        oracle.weighted(np.minimum(1, bound / np.where(norm > 0, norm, bound)), child)
        for bound, norm, child in zip(bounds, norms, children, strict=True)
    ]
    structure = jax.tree.structure(blocks, is_leaf=lambda x: x is not blocks)
    return made | {
        "noise_scale": (trace, signal, trace / signal if signal else 0.0),
        "group_norms": jax.tree.unflatten(structure, norms),
        "group_clipped_sum": jax.tree.unflatten(structure, clipped),
        "project": oracle.matrix(blocks) @ _directions(_shapes(blocks)),
    }


def _children(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda x: x is not tree)


def _shapes(blocks: Any) -> Any:
    shapes = [x.shape[1:] for x in jax.tree.leaves(blocks)]
    return jax.tree.structure(blocks), tuple(shapes)


@functools.cache
def _directions(shapes: Any) -> np.ndarray:
    """`(P, DIM)`: the projections of the unit vectors, all of which are ±1/√DIM."""
    structure, shapes = shapes
    sizes = [math.prod(shape) for shape in shapes]
    rows = np.split(np.eye(sum(sizes), dtype=np.float32), np.cumsum(sizes)[:-1], axis=1)
    units = [jnp.asarray(x.reshape(-1, *shape)) for x, shape in zip(rows, shapes, strict=True)]
    made = np.asarray(jgd.project(jax.tree.unflatten(structure, units), jax.random.key(KEY), DIM), np.float64)
    return np.sign(made) / math.sqrt(DIM)


def scales(blocks: Any, question: Question) -> dict[str, Any]:
    """What an error is to be compared with, for each answer; each broadcasts to its answer.

    A sum's is the largest Σ |w_i||g_i| of the leaf, a moment's the largest of the leaf, a norm's the norm, that of an
    inner product the product of the norms, the squared mean's that of the mean before the noise is taken off.
    """
    blocks = jax.tree.map(np.float64, blocks)
    want = answers(blocks, question)
    size = len(jax.tree.leaves(blocks)[0])
    norms = lengths(blocks)
    absolute = answers(jax.tree.map(np.abs, blocks), question)
    largest = lambda tree: jax.tree.map(lambda x: np.max(x, initial=0), tree)
    of_sums = [name for name in want if name.endswith(("sum", "mean"))]
    of_moments = [name for name in want if name.endswith(("second_moment", "variance"))]
    trace, signal, ratio = want["noise_scale"]
    square = signal + trace / size
    long = np.sqrt(sum(np.sum(np.square(np.float64(x))) for x in jax.tree.leaves(question.direction)))
    whole = jax.tree.map(lambda x: np.where(x > 0, x, np.max(x, initial=0)), want["leaf_norms"])
    return (
        {name: largest(absolute[name]) for name in of_sums}
        | {name: largest(want[name]) for name in of_moments}
        | {
            "norms": np.where(norms > 0, norms, norms.max()),
            "leaf_norms": whole,
            "group_norms": jax.tree.map(lambda x: np.where(x > 0, x, x.max()), want["group_norms"]),
            "dot": norms * long,
            "gram": norms[:, None] * norms,
            "noise_scale": (trace, square, abs(ratio) * (1 + square / abs(signal)) if signal else 0.0),
            "project": norms[:, None],
        }
    )


def slacks(blocks: Any, question: Question) -> dict[str, Any]:
    """What is no error: the variance of equal gradients is 0, but for the square of a few roundings of float32."""
    want = answers(blocks, question)
    few = (4 * float(np.finfo(np.float32).eps)) ** 2
    square = few * np.mean(np.square(want["norms"]))
    of_leaf = jax.tree.map(lambda x: few * np.max(x, initial=0), want["second_moment"])
    _, signal, _ = want["noise_scale"]
    return {
        "variance": of_leaf,
        "weighted_variance": of_leaf,
        "noise_scale": (square, square, square / abs(signal) if signal else 0.0),
    }


def errors(got: Any, blocks: Any, question: Question) -> dict[str, Any]:
    """The largest error of each reduction, each leaf by itself, as shares of the scale.

    Args:
        got: the answers.
        blocks: the exact gradients.
        question: what was asked.
    """
    want, scale, slack = (made(blocks, question) for made in (answers, scales, slacks))

    def leaf(x: Any, y: Any, scale: Any, slack: Any = 0.0) -> float:
        x = np.asarray(x, np.float64)
        assert x.shape == np.shape(y), (x.shape, np.shape(y))
        scale = np.broadcast_to(scale, x.shape)
        wrong = np.maximum(np.abs(x - y) - slack, 0)
        share = np.where(scale > 0, wrong / np.where(scale > 0, scale, 1), np.where(wrong > 0, np.inf, 0))
        return float(np.max(np.where(np.isfinite(x), share, np.inf), initial=0))

    trees = lambda name: (got[name], want[name], scale[name], *([slack[name]] if name in slack else []))
    each = {name: jax.tree.map(leaf, *trees(name)) for name in scale}
    return {name: np.asarray(jax.tree.leaves(made)) for name, made in each.items()}


def floor_of(dtype: str, condition: float = 1.0) -> float:
    """The error that is allowed whatever the measure is: some roundings, more where the numbers cancel.

    In half precision the answers themselves are rounded.
    """
    eps = float(jnp.finfo(dtype).eps)
    return max(1e-5, 2 * eps * condition) if dtype == "float32" else 4 * eps


def excess(
    got: dict[str, Any], problem: Problem, exact: Any, question: Question, floor: float
) -> dict[str, Any]:
    """By reduction, the worst leaf's error as a share of what is allowed, beside the error and the measure."""
    own = errors(answers(gradients(problem), question), exact, question)
    found = {}
    for name, error in errors(got, exact, question).items():
        if error.size:
            share = error / np.maximum(floor, 10 * own[name])
            worst = int(np.argmax(share))
            found[name] = (float(share[worst]), float(error[worst]), float(own[name][worst]))
    return found


def check(found: dict[str, Any]) -> None:
    """Whether every error is allowed."""
    wrong = [
        f"{name}: error {error:.1e}, of the gradients of vmap(grad) {own:.1e}"
        for name, (share, error, own) in found.items()
        if not share <= 1
    ]
    assert not wrong, "; ".join(wrong)
