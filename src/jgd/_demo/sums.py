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
from jgd._demo.section import Check, Picture, Section, Table, figures

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
    """How far gradients of one batch are apart, at most over their entries.

    The differences are from what `jax.grad` gives for the summed and for the mean cost, and are in units of
    rounding: the machine's epsilon times the largest entry of Σ|g_i| (of that over B for the means).
    """

    problem: str
    model: str
    dtype: str
    examples: int
    parameters: int
    largest: float  # entry of the gradient of the summed cost
    absolute: float  # difference of the gradients that were added up, not in units
    added: float  # the gradients of single examples, each computed and then added up
    sums: float  # jgd.sum
    means: float  # jgd.mean

    @property
    def worst(self) -> float:
        """The largest of the differences, in units of rounding."""
        return max(self.added, self.sums, self.means)


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

    def linear(d):
        return {"w": rng.normal(size=d) * 0.1, "b": np.array(0.5)}

    return (
        Problem("diabetes", "linear regression", linear_loss, linear(10), diabetes.x, diabetes.y),
        Problem("digits", "network 64-32-10", network_loss, network, digits.x, digits.y),
        Problem("breast_cancer", "logistic regression", logistic_loss, linear(30), cancer.x, cancer.y),
    )


def agreement(problem: Problem, dtype: str) -> Agreement:
    """Compares Σ g_i and ḡ with the gradients that `jax.grad` takes of the summed and of the mean cost."""
    targets = dtype if np.issubdtype(problem.y.dtype, np.floating) else np.int32
    params = jax.tree.map(lambda p: p.astype(dtype), problem.params)
    batch = problem.x.astype(dtype), problem.y.astype(targets)

    def examples(params: Any, *batch: Any) -> tuple[Any, Any, Any]:
        grads = jgd.per_example_grad(problem.loss)(params, *batch)
        return jgd.materialize(grads), jgd.sum(grads), jgd.mean(grads)

    def whole(params: Any, *batch: Any) -> tuple[Any, Any]:
        def costs(params):
            return jax.vmap(problem.loss, (None, 0, 0))(params, *batch)

        return jax.grad(lambda p: jnp.sum(costs(p)))(params), jax.grad(lambda p: jnp.mean(costs(p)))(params)

    # Two programs, so that the compiler cannot find out that they are one.
    with jax.enable_x64(dtype == "float64"):
        each, our_sum, our_mean = jax.device_get(jax.jit(examples)(params, *batch))
        of_sum, of_mean = jax.device_get(jax.jit(whole)(params, *batch))
    added = jax.tree.map(lambda g: g.sum(axis=0, dtype=dtype), each)
    unit = float(np.finfo(dtype).eps) * max(np.abs(g).sum(axis=0).max() for g in jax.tree.leaves(each))
    size = len(problem.y)
    return Agreement(
        problem.name,
        problem.model,
        dtype,
        examples=size,
        parameters=sum(p.size for p in jax.tree.leaves(params)),
        largest=_apart(of_sum, jax.tree.map(np.zeros_like, of_sum)),
        absolute=_apart(added, of_sum),
        added=_apart(added, of_sum) / unit,
        sums=_apart(our_sum, of_sum) / unit,
        means=_apart(our_mean, of_mean) / (unit / size),
    )


def plane() -> tuple[np.ndarray, np.ndarray]:
    """Gradients by slope and intercept, `(422, 2)`, and the gradient of the mean cost, `(2,)`.

    The model predicts the mean target for everyone; its feature is the body mass index of diabetes,
    standardised.
    """
    x, y = data.diabetes()
    feature, y = data.standardized(x[:-20, 2]), y[:-20]
    params = {"slope": np.float32(0), "intercept": np.float32(y.mean())}

    def loss(p, x, y):
        return 0.5 * (p["slope"] * x + p["intercept"] - y) ** 2

    batch = feature.astype(np.float32), y.astype(np.float32)
    each = jgd.materialize(jgd.per_example_grad(loss)(params, *batch))
    whole = jax.grad(lambda p: jnp.mean(jax.vmap(loss, (None, 0, 0))(p, *batch)))(params)
    names = ("slope", "intercept")
    return np.stack([each[n] for n in names], axis=1), np.stack([whole[n] for n in names])


def section(quick: bool) -> Section:
    """Compares the two gradients on three data sets in two precisions, and draws one case in the plane."""
    del quick
    found = [agreement(problem, dtype) for problem in problems() for dtype in ("float32", "float64")]
    worst = {
        d: max((a for a in found if a.dtype == d), key=lambda a: a.worst) for d in ("float32", "float64")
    }
    checks = [
        Check(
            f"In {dtype} they differ by at most {a.worst:.1f} units of rounding (on {a.problem}; allowed: "
            f"{ROUNDING_UNITS})",
            a.worst <= ROUNDING_UNITS,
        )
        for dtype, a in worst.items()
    ]
    rows = tuple(
        (
            f"{a.problem}, {a.model}",
            a.dtype,
            f"{a.examples} × {a.parameters}",
            figures(a.largest),
            f"{a.absolute:.1e}",
            f"{a.added:.1f}",
            f"{a.sums:.1f}",
            f"{a.means:.1f}",
        )
        for a in found
    )
    columns = ("data, model", "dtype", "B × P", "entry", "added up", "in units", "jgd.sum", "jgd.mean")
    each, whole = plane()
    return Section(
        title="The gradient of a batch is the sum of its examples' gradients",
        claim=(
            "Differentiation is linear: adding the gradients of single examples gives the gradient of the "
            "summed cost, and averaging them that of the mean, to rounding."
        ),
        text=(
            "Each row computes the gradient of every example, adds them up, and compares the result with "
            "what jax.grad gives for the summed cost; then jgd.sum and jgd.mean, which get there without "
            "the single gradients. The same numbers are added in another order, so the last digits may "
            "differ: a unit of rounding is the machine's epsilon times the largest entry of Σ|g_i|.",
        ),
        checks=tuple(checks),
        tables=(
            Table(
                "Largest entry of jax.grad's gradient, and differences from it; all but the first in units "
                "of rounding",
                columns,
                rows,
            ),
        ),
        pictures=(
            Picture(
                "Two parameters, slope and intercept, for 422 patients. Left: each example's gradient, and "
                "their mean. Right: the same gradients, each divided by 422, laid head to tail in the "
                "order of the data; however they wander, they end where the gradient of the mean cost "
                "points.",
                partial(_draw_plane, each, whole),
                (9.6, 4.4),
            ),
        ),
    )


def _apart(ours: Any, theirs: Any) -> float:
    return max(
        float(np.abs(a - b).max())
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    )


def _draw_plane(each: np.ndarray, whole: np.ndarray, figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    zero = np.zeros(len(each))
    left.quiver(
        zero, zero, *each.T, angles="xy", scale_units="xy", scale=1, color=style.BLUE, alpha=0.22, width=0.003
    )
    left.quiver(
        0, 0, *whole, angles="xy", scale_units="xy", scale=1, color=style.ORANGE, width=0.014, zorder=3
    )
    left.set_title("One gradient for each example, and their mean")
    wide, high = 1.1 * np.quantile(np.abs(each), 0.995, axis=0)
    left.set(xlim=(-wide, wide), ylim=(-high, high))

    path = np.concatenate([np.zeros((1, 2)), np.cumsum(each / len(each), axis=0)])
    right.plot(*path.T, color=style.BLUE, lw=1.1, label="Σ g_i / 422, head to tail")
    right.quiver(
        0, 0, *whole, angles="xy", scale_units="xy", scale=1, color=style.ORANGE, width=0.012, zorder=3
    )
    right.plot(*whole, "o", mfc="none", mec=style.RED, ms=11, mew=1.8, label="gradient of the mean cost")
    right.set_title("Laid head to tail, they arrive")
    right.legend(loc="best", fontsize=9)
    for axes in (left, right):
        axes.axhline(0, color=style.FAINT, lw=0.8)
        axes.axvline(0, color=style.FAINT, lw=0.8)
        axes.set(xlabel="∂ / ∂ slope", ylabel="∂ / ∂ intercept")
