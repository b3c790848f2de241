"""The sum of the examples' gradients is the gradient of the summed cost, and so for the mean: to rounding."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jgd
from jgd._demo import data, style
from jgd._demo.section import Check, Picture, Section, Table

# Both sides add the same N numbers, in different orders. The worst case of rounding grows with N, the usual
# case with its logarithm: a handful of units in the last place of Σ|g_i|.
ROUNDING_UNITS = 16


class Problem(NamedTuple):
    """A loss of one example, parameters and data, in float64 numpy."""

    name: str
    model: str
    loss: Callable[..., jax.Array]
    params: Any
    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Agreement:
    """How far two gradients are apart, at most over their entries."""

    problem: str
    model: str
    dtype: str
    examples: int
    parameters: int
    largest: float  # entry of Σ g_i
    sum_difference: float  # of Σ g_i and the gradient of the summed cost
    mean_difference: float  # of the means
    units: float  # sum_difference in units of rounding: machine epsilon × the largest entry of Σ|g_i|


def linear_loss(params, x, y):
    """Half the squared error of a linear model."""
    return 0.5 * (x @ params["w"] + params["b"] - y) ** 2


def logistic_loss(params, x, y):
    """The cross-entropy of a linear classifier of two classes."""
    return optax.sigmoid_binary_cross_entropy(x @ params["w"] + params["b"], y)


def network_loss(params, x, y):
    """The cross-entropy of a network with one hidden layer, over ten classes."""
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["v"] + params["c"], y)


def problems() -> tuple[Problem, ...]:
    """Linear regression on diabetes, a network on digits, logistic regression on breast_cancer."""
    diabetes, digits, cancer = data.diabetes(), data.digits(), data.breast_cancer()
    rng = np.random.default_rng(0)
    width = 32
    network = {
        "w": rng.normal(size=(64, width)) / 8,
        "b": np.zeros(width),
        "v": rng.normal(size=(width, 10)) / np.sqrt(width),
        "c": np.zeros(10),
    }
    linear = lambda d: {"w": rng.normal(size=d) * 0.1, "b": np.array(0.5)}
    return (
        Problem("diabetes", "linear regression", linear_loss, linear(10), diabetes.x, diabetes.y),
        Problem("digits", "network 64-32-10", network_loss, network, digits.x, digits.y),
        Problem("breast_cancer", "logistic regression", logistic_loss, linear(30), cancer.x, cancer.y),
    )


def agreement(problem: Problem, dtype: str) -> Agreement:
    """Compares Σ g_i and ḡ with the gradients that `jax.grad` takes of the summed and of the mean cost."""
    with jax.enable_x64(dtype == "float64"):
        params = jax.tree.map(partial(jnp.asarray, dtype=dtype), problem.params)
        x = jnp.asarray(problem.x, dtype)
        y = jnp.asarray(problem.y, dtype if np.issubdtype(problem.y.dtype, np.floating) else "int32")

        grads = jgd.per_example_grad(problem.loss)(params, x, y)
        costs = lambda params: jax.vmap(problem.loss, (None, 0, 0))(params, x, y)
        of_sum = jax.grad(lambda params: jnp.sum(costs(params)))(params)
        of_mean = jax.grad(lambda params: jnp.mean(costs(params)))(params)

        ours = jgd.sum(grads)
        absolute = jax.tree.map(lambda g: jnp.sum(jnp.abs(g), axis=0), jgd.materialize(grads))
        difference = _largest(jax.tree.map(jnp.subtract, ours, of_sum))
        return Agreement(
            problem.name,
            problem.model,
            dtype,
            examples=len(grads),
            parameters=sum(p.size for p in jax.tree.leaves(params)),
            largest=_largest(ours),
            sum_difference=difference,
            mean_difference=_largest(jax.tree.map(jnp.subtract, jgd.mean(grads), of_mean)),
            units=difference / (float(jnp.finfo(dtype).eps) * _largest(absolute)),
        )


def plane() -> tuple[np.ndarray, np.ndarray]:
    """Gradients in two dimensions, slope and intercept, `(422, 2)`, and the gradient of the mean cost, `(2,)`.

    The model predicts the mean target for everyone; its feature is the body mass index of diabetes, standardised.
    """
    x, y = data.diabetes()
    feature, y = data.standardized(x[:-20, 2]), y[:-20]
    params = {"slope": jnp.zeros(()), "intercept": jnp.asarray(y.mean(), jnp.float32)}
    loss = lambda p, x, y: 0.5 * (p["slope"] * x + p["intercept"] - y) ** 2
    batch = jnp.asarray(feature, jnp.float32), jnp.asarray(y, jnp.float32)
    each = jgd.materialize(jgd.per_example_grad(loss)(params, *batch))
    whole = jax.grad(lambda p: jnp.mean(jax.vmap(loss, (None, 0, 0))(p, *batch)))(params)
    names = ("slope", "intercept")
    return np.stack([each[n] for n in names], axis=1), np.stack([whole[n] for n in names])


def section(quick: bool) -> Section:
    """Compares the two gradients on three data sets in two precisions, and draws one case in the plane."""
    del quick
    found = [agreement(problem, dtype) for problem in problems() for dtype in ("float32", "float64")]
    worst = {d: max((a for a in found if a.dtype == d), key=lambda a: a.units) for d in ("float32", "float64")}
    checks = [
        Check(
            f"In {dtype} the two differ by at most {a.units:.1f} units of rounding (on {a.problem}; allowed: {ROUNDING_UNITS})",
            a.units <= ROUNDING_UNITS,
        )
        for dtype, a in worst.items()
    ]
    rows = tuple(
        (f"{a.problem}, {a.model}", a.dtype, f"{a.examples} × {a.parameters}", f"{a.largest:.3g}",
         f"{a.sum_difference:.1e}", f"{a.mean_difference:.1e}", f"{a.units:.1f}")
        for a in found
    )  # fmt: skip
    each, whole = plane()
    return Section(
        title="The gradient of a batch is the sum of its examples' gradients",
        claim="Differentiation is linear: adding the gradients of single examples gives the gradient of the summed cost, "
        "and averaging them that of the mean, to rounding.",
        text=(
            "Each row compares jgd.sum and jgd.mean of the per-example gradients with what jax.grad gives for the summed and "
            "the mean cost. They add the same numbers in another order, so they may differ in the last digits only: a unit "
            "of rounding is the machine's epsilon times the largest entry of Σ|g_i|.",
        ),
        checks=tuple(checks),
        tables=(
            Table(
                "Largest difference of an entry",
                ("data, model", "dtype", "B × P", "largest entry of Σ g", "sums differ by", "means differ by", "units of rounding"),
                rows,
            ),
        ),
        pictures=(
            Picture(
                "Two parameters, slope and intercept, for 422 patients. Left: each example's gradient, and their mean. Right: the "
                "same gradients, each divided by 422, laid head to tail in the order of the data; however they wander, they end "
                "where the gradient of the mean cost points.",
                partial(_draw_plane, each, whole),
                (9.6, 4.4),
            ),
        ),
    )


def _largest(tree: Any) -> float:
    return float(max(jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree)))


def _draw_plane(each: np.ndarray, whole: np.ndarray, figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    zero = np.zeros(len(each))
    left.quiver(zero, zero, *each.T, angles="xy", scale_units="xy", scale=1, color=style.BLUE, alpha=0.22, width=0.003)
    left.quiver(0, 0, *whole, angles="xy", scale_units="xy", scale=1, color=style.ORANGE, width=0.014, zorder=3)
    left.set_title("One gradient for each example, and their mean")
    wide, high = 1.1 * np.quantile(np.abs(each), 0.995, axis=0)
    left.set(xlim=(-wide, wide), ylim=(-high, high))

    path = np.concatenate([np.zeros((1, 2)), np.cumsum(each / len(each), axis=0)])
    right.plot(*path.T, color=style.BLUE, lw=1.1, label="Σ g_i / 422, head to tail")
    right.quiver(0, 0, *whole, angles="xy", scale_units="xy", scale=1, color=style.ORANGE, width=0.012, zorder=3)
    right.plot(*whole, "o", mfc="none", mec=style.RED, ms=11, mew=1.8, label="gradient of the mean cost")
    right.set_title("Laid head to tail, they arrive")
    right.legend(loc="best", fontsize=9)
    for axes in (left, right):
        axes.axhline(0, color=style.FAINT, lw=0.8)
        axes.axvline(0, color=style.FAINT, lw=0.8)
        axes.set(xlabel="∂ / ∂ slope", ylabel="∂ / ∂ intercept")
