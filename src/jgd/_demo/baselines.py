"""The baseline of least variance, from the norms of single episodes' scores."""

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

import jgd
from jgd._demo import style
from jgd._demo.cartpole import Episode
from jgd._demo.policies import (
    RETURN_UNIT,
    least_variance_baseline,
    play_many,
    returns_of,
    scores,
    train_cartpole,
)
from jgd._demo.section import Check, Picture, Section, Table, figures

STAGES = (0, 5, 10)  # updates after which the variance is measured


class Variances(NamedTuple):
    """tr Σ of one episode's gradient under three baselines, measured on episodes that chose none of them."""

    baselines: dict[str, float]
    traces: dict[str, float]
    grid: np.ndarray  # other baselines,
    grid_traces: np.ndarray  # and theirs

    def ratio(self, to: str) -> float:
        """The variance under the baseline of least variance, relative to that under another."""
        return self.traces["least variance"] / self.traces[to]


def gradient_variance(params: Any, key: jax.Array, *, episodes: int) -> Variances:
    """Estimates the baselines on one set of episodes, and the variance of the gradient on another."""
    fitting, measuring = (play_many(params, jax.random.fold_in(key, k), episodes) for k in range(2))
    _, norms = _scores_and_norms(params, fitting)
    baselines = {
        "none": 0.0,
        "mean return": float(np.mean(returns_of(fitting))),
        "least variance": least_variance_baseline(norms, returns_of(fitting)),
    }
    grid = np.linspace(0, 2 * baselines["least variance"], 41, dtype=np.float32)
    each, _ = _scores_and_norms(params, measuring)
    trace = partial(_trace_of_covariance, each, returns_of(measuring))
    return Variances(
        baselines,
        traces={name: float(trace(np.float32(b))) for name, b in baselines.items()},
        grid=grid,
        grid_traces=np.array([trace(b) for b in grid]),
    )


def section(quick: bool) -> Section:
    """Measures the variance of the policy gradient under three baselines, at three stages of a training."""
    episodes = 1024 if quick else 2048
    policies = train_cartpole(1, updates=max(STAGES)).policies
    found = {n: gradient_variance(policies[n], jax.random.key(2), episodes=episodes) for n in STAGES}
    falls = [v.ratio("none") for v in found.values()]
    gains = [v.ratio("mean return") for v in found.values()]
    rows = tuple(
        (
            f"after {n} updates",
            *(f"{b:.0f}" for b in list(v.baselines.values())[1:]),
            *(figures(v.traces[name]) for name in v.traces),
            f"{v.ratio('none'):.2f}",
            f"{v.ratio('mean return'):.2f}",
        )
        for n, v in found.items()
    )
    columns = ("policy", "mean return", "best b", "no b", "b = mean", "best b", "to no b", "to mean")
    return Section(
        title="The norms of single gradients give the baseline of least variance",
        claim=(
            "A baseline b subtracted from the returns leaves the mean of the policy gradient as it is and "
            "changes its variance; per-example norms tell which b is best."
        ),
        text=(
            "The variance is least at b = Σ‖s‖²R / Σ‖s‖², with R an episode's return and s its score, the "
            "gradient of its log-likelihood; jgd.norms gives ‖s‖ for every episode. The baselines are "
            f"fitted on {episodes} episodes of CartPole, the variance is measured by jgd.noise_scale on "
            f"{episodes} others, for three policies on the way from knowing nothing to balancing the pole.",
        ),
        checks=(
            Check(
                f"The best baseline cuts the gradient's variance to between {min(falls):.2f} and "
                f"{max(falls):.2f} of what it is without",
                max(falls) < 1,
            ),
            Check(
                f"and to between {min(gains):.2f} and {max(gains):.2f} of what the mean return leaves",
                # Late in training the two baselines nearly agree: which comes out ahead is luck.
                bool(np.mean(gains) < 1),
            ),
        ),
        tables=(
            Table(
                "The two baselines; tr Σ of one episode's gradient under each; the best's ratios",
                columns,
                rows,
            ),
        ),
        pictures=(
            Picture(
                "The variance of the gradient as the baseline changes, relative to no baseline: a parabola "
                "at every stage of the training.",
                partial(_draw, found),
                (9.0, 3.4),
            ),
        ),
    )


@jax.jit
def _scores_and_norms(params: Any, episodes: Episode) -> tuple[Any, jax.Array]:
    grads = scores(params, episodes)
    return jgd.materialize(grads), jgd.norms(grads)


@jax.jit
def _trace_of_covariance(each: Any, returns: jax.Array, baseline: Any) -> jax.Array:
    advantage = (returns - baseline) / RETURN_UNIT
    grads = jax.tree.map(lambda s: s * advantage.reshape(-1, *[1] * (s.ndim - 1)), each)
    return jgd.noise_scale(grads).trace_covariance


def _draw(found: dict[int, Any], figure: Any) -> None:
    marks = {
        "none": ("o", style.RED),
        "mean return": ("s", style.ORANGE),
        "least variance": ("D", style.BLUE),
    }
    for axes, (n, v) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        unit = v.traces["none"]
        axes.plot(v.grid, v.grid_traces / unit, color=style.FAINT, lw=1.4)
        for name, (marker, color) in marks.items():
            axes.plot(
                v.baselines[name], v.traces[name] / unit, marker, color=color, ms=8, label=name, zorder=3
            )
        axes.set(title=f"after {n} updates", xlabel="baseline, in steps", ylim=(0, 1.15))
    figure.axes[0].set_ylabel("variance, relative to no baseline")
    figure.axes[0].legend(fontsize=9)
