"""Stochastic, mini-batch and full batch: three roads to one published answer."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import jgd
from jgd._demo import data, style
from jgd._demo.section import Check, Picture, Section, Table
from jgd._demo.walk import recorded

# scikit-learn's example "Ordinary Least Squares": diabetes, feature 2, the last 20 patients held out.
SLOPE, TEST_MSE, R2 = 938.2379, 2548.07, 0.47
HELD_OUT = 20
FEATURE = 2
TOLERANCE = 0.01  # relative, of the slope and of the test error: when a regime counts as having arrived


class Regime(NamedTuple):
    """How often to update, and how far. `rate` is for a sum over the batch, so that every example weighs "
    "the same."""

    name: str
    batch_size: int | None
    rate: Callable[[Any], Any] | float
    epochs: int


def regimes(quick: bool) -> tuple[Regime, ...]:
    """The three, each with the rate that suits it.

    The feature is standardised, so the mean cost curves alike in every direction, with curvature 1. Single
    examples pull about its minimum, and only a rate that falls as 1/t averages them; all examples together
    allow a constant rate.
    """
    epochs, train = (30 if quick else 60), len(data.diabetes().y) - HELD_OUT
    return (
        Regime("stochastic, 1", 1, lambda t: 1 / (t + 10), epochs),
        Regime("mini-batch, 32", 32, lambda t: 1 / (32 * (t + 1)), epochs),
        Regime("full batch", None, 0.5 / train, 30),
    )


@dataclass(frozen=True)
class Split:
    """The training data with the feature standardised, and the test data as they are."""

    x: np.ndarray
    y: np.ndarray
    center: float
    scale: float
    test_x: np.ndarray
    test_y: np.ndarray

    def line(self, path: Any) -> tuple[np.ndarray, np.ndarray]:
        """Slope and intercept for the feature as it is published."""
        slope = np.asarray(path["slope"], np.float64) / self.scale
        return slope, np.asarray(path["intercept"], np.float64) - slope * self.center

    def test_mse(self, slope: np.ndarray, intercept: np.ndarray) -> np.ndarray:
        """Mean squared error on the held-out patients, for one line or many."""
        predicted = np.multiply.outer(slope, self.test_x) + np.asarray(intercept)[..., None]
        return np.mean((predicted - self.test_y) ** 2, axis=-1)

    def r2(self, test_mse: np.ndarray) -> np.ndarray:
        """The coefficient of determination on the held-out patients."""
        return 1 - test_mse / np.var(self.test_y)


@dataclass(frozen=True)
class Run:
    """One regime's way to the answer; every array has an entry before the first update and one after each."""

    regime: Regime
    seen: np.ndarray  # examples
    slope: np.ndarray
    test_mse: np.ndarray
    cost: np.ndarray  # half the mean squared error on the training data, above its least
    r2: float
    arrived: int  # the first update from which on slope and test error stay within the tolerance
    seconds: float  # for that many updates, compiled: their share of the whole run's


def split() -> Split:
    """The published split."""
    x, y = data.diabetes()
    feature = x[:, FEATURE]
    train, test = slice(None, -HELD_OUT), slice(-HELD_OUT, None)
    center, scale = feature[train].mean(), feature[train].std()
    return Split((feature[train] - center) / scale, y[train], center, scale, feature[test], y[test])


def line_loss(params, x, y):
    """Half the squared error of a line, for one example."""
    return 0.5 * (params["slope"] * x + params["intercept"] - y) ** 2


def run(regime: Regime, at: Split, key: jax.Array) -> Run:
    """Trains under one regime, and times it as far as it needed to go."""
    size = regime.batch_size or len(at.y)
    updates = regime.epochs * -(-len(at.y) // size)
    recorder = recorded(optax.sgd(regime.rate), steps=updates)
    method = jgd.descent(line_loss, recorder, total="sum")
    path = _train(method, regime, at, key).state.opt_state.path

    slope, intercept = at.line(path)
    test_mse = at.test_mse(slope, intercept)
    seen = np.concatenate([[0], np.cumsum(_batch_lengths(len(at.y), size, regime.epochs))])
    away = np.maximum(np.abs(slope / SLOPE - 1), np.abs(test_mse / TEST_MSE - 1)) > TOLERANCE
    arrived = int(np.max(np.nonzero(away)[0], initial=-1)) + 1
    return Run(
        regime,
        seen=seen,
        slope=slope,
        test_mse=test_mse,
        cost=_excess_cost(path, at),
        r2=float(at.r2(test_mse[-1])),
        arrived=arrived,
        seconds=_seconds(method, regime, at, key) * arrived / updates,
    )


def section(quick: bool) -> Section:
    """Trains under the three regimes and sets them side by side."""
    at = split()
    runs = [run(regime, at, jax.random.key(0)) for regime in regimes(quick)]
    rows = tuple(
        (
            r.regime.name,
            f"{r.slope[-1]:.4f}",
            f"{r.test_mse[-1]:.2f}",
            f"{r.r2:.2f}",
            f"{r.arrived:,}",
            f"{r.seen[r.arrived]:,}",
            f"{1e3 * r.seconds:.1f} ms",
        )
        for r in runs
    )
    return Section(
        title="Three regimes, one answer",
        claim=(
            "Updating after every example, after every few, or after all of them: each reaches the "
            "published least-squares answer."
        ),
        text=(
            f"One measurement of 422 patients (their body mass index, standardised) predicts how their "
            f"diabetes progresses; 20 patients are held out. scikit-learn's example publishes slope "
            f"{SLOPE}, test error {TEST_MSE} and R² {R2}. The three calls of jgd.fit differ in batch_size "
            f"(1, 32, None) and in the rate: it falls as 1/t where examples come singly or in small "
            f"batches, because they disagree; all of them together allow a constant rate.",
            f"To arrive is to come within {TOLERANCE:.0%} of the published slope and test error and to "
            f"stay there. The time is the compiled run's, as far as there. With one feature and a "
            f"well-scaled problem the full batch has an easy life; per example seen the others are ahead "
            f"early on.",
        ),
        checks=tuple(
            Check(
                f"{r.regime.name}: slope {r.slope[-1]:.4f} ({SLOPE}), test error {r.test_mse[-1]:.2f} "
                f"({TEST_MSE}), R² {r.r2:.2f} ({R2})",
                _reached(r),
            )
            for r in runs
        ),
        tables=(
            Table(
                "The end of each run, and what it took to arrive",
                ("regime", "slope", "test MSE", "R²", "updates", "examples seen", "time"),
                (("published", f"{SLOPE}", f"{TEST_MSE}", f"{R2}", "", "", ""), *rows),
            ),
        ),
        pictures=(
            Picture(
                "How far the cost on the training data is above its least, against updates made and "
                "against examples seen.",
                partial(_draw, runs),
            ),
        ),
    )


def _reached(r: Run) -> bool:
    close = (
        abs(r.slope[-1] / SLOPE - 1) < TOLERANCE / 2 and abs(r.test_mse[-1] / TEST_MSE - 1) < TOLERANCE / 2
    )
    return bool(close and round(r.r2, 2) == R2)


def _train(method: Any, regime: Regime, at: Split, key: jax.Array) -> Any:
    start = {"slope": np.float32(0), "intercept": np.float32(0)}
    batch = at.x.astype(np.float32), at.y.astype(np.float32)
    return jgd.fit(method, start, batch, batch_size=regime.batch_size, epochs=regime.epochs, key=key)


def _seconds(method: Any, regime: Regime, at: Split, key: jax.Array) -> float:
    """The least time of some runs of a method that is compiled."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(_train(method, regime, at, key).params)
        times.append(time.perf_counter() - start)
    return min(times)


def _batch_lengths(examples: int, size: int, epochs: int) -> np.ndarray:
    whole, rest = divmod(examples, size)
    return np.tile([size] * whole + [rest] * (rest > 0), epochs)


def _excess_cost(path: Any, at: Split) -> np.ndarray:
    # On standardised inputs the cost is a bowl: its height above the least is half the squared distance.
    best = np.mean(at.x * at.y), np.mean(at.y)
    found = np.asarray(path["slope"], np.float64), np.asarray(path["intercept"], np.float64)
    return 0.5 * ((found[0] - best[0]) ** 2 + (found[1] - best[1]) ** 2)


def _draw(runs: list[Run], figure: Any) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    for r, color in zip(runs, (style.ORANGE, style.BLUE, style.GREEN), strict=True):
        shown = np.unique(np.geomspace(1, len(r.cost) - 1, 1500).astype(int))
        for axes, x in ((left, np.arange(len(r.cost))), (right, r.seen)):
            axes.loglog(x[shown], r.cost[shown], color=color, label=r.regime.name, lw=1.3)
            axes.plot(x[r.arrived], r.cost[r.arrived], "o", color=color, ms=7, mec="white", zorder=3)
    left.set(title="Against updates", xlabel="updates", ylabel="cost above its least", ylim=(1e-4, None))
    right.set(title="Against examples seen", xlabel="examples seen")
    left.legend(fontsize=9)
    right.annotate(
        "dots: arrived to stay",
        (0.98, 0.95),
        xycoords="axes fraction",
        ha="right",
        color=style.FAINT,
        fontsize=9,
    )
