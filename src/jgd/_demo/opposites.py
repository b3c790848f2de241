"""Descent on f and ascent on −f walk the same path, whatever the optimizer."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import optax

import jgd
from jgd._demo import data, style
from jgd._demo.section import Check, Picture, Section, Table
from jgd._demo.sums import logistic_loss
from jgd._demo.walk import walk

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(0.5),
    "sgd, momentum 0.9": lambda: optax.sgd(0.1, momentum=0.9),
    "adam": lambda: optax.adam(0.01),
    "adamw, weight decay 0.5": lambda: optax.adamw(0.01, weight_decay=0.5),
}
DECAYED = "adamw, weight decay 0.5"
QUICK = ("sgd, momentum 0.9", DECAYED)


class Pair(NamedTuple):
    """The parameters at every update, `(steps + 1, P)`, by descent on f and by ascent on −f."""

    descent: np.ndarray
    ascent: np.ndarray


def objective(params, x, y):
    """−f: the log-likelihood of one example under logistic regression."""
    return -logistic_loss(params, x, y)


def batch() -> tuple[Any, Any]:
    """breast_cancer in float32."""
    x, y = data.breast_cancer()
    return x.astype(np.float32), y.astype(np.float32)


def start() -> dict[str, Any]:
    """Small weights, not zero, so that weight decay has something to act on from the start."""
    return {"w": np.linspace(-0.3, 0.3, 30, dtype=np.float32), "b": np.float32(0)}


def pair(optimizer: Callable[[], optax.GradientTransformation], *, steps: int) -> Pair:
    """Walks both ways from the same start."""
    methods = jgd.descent(logistic_loss, optimizer()), jgd.ascent(objective, optimizer())
    return Pair(*(_flat(walk(method, start(), *batch(), steps=steps)) for method in methods))


def negative_rate(*, steps: int) -> np.ndarray:
    """The trap: to climb −f by a descent whose learning rate is negative, with the same weight decay."""
    return _flat(
        walk(jgd.descent(objective, optax.adamw(-0.01, weight_decay=0.5)), start(), *batch(), steps=steps)
    )


def costs(path: np.ndarray) -> np.ndarray:
    """f, averaged over the data, at each point of a path."""
    x, y = data.breast_cancer()
    logits = x @ path[:, 1:].T.astype(np.float64) + path[:, 0]
    return np.mean(np.logaddexp(0, logits) - y[:, None] * logits, axis=0)


def section(quick: bool) -> Section:
    """Walks both ways with four optimizers, and shows where the usual shortcut goes."""
    steps = 200 if quick else 600
    pairs = {name: pair(OPTIMIZERS[name], steps=steps) for name in (QUICK if quick else OPTIMIZERS)}
    apart = {name: float(np.max(np.abs(p.descent - p.ascent))) for name, p in pairs.items()}
    trap = negative_rate(steps=steps)
    rows = tuple(
        (
            name,
            f"{costs(p.descent)[0]:.3f}",
            f"{costs(p.descent)[-1]:.4f}",
            f"{costs(p.ascent)[-1]:.4f}",
            f"{apart[name]:.1e}",
        )
        for name, p in pairs.items()
    )
    lengths = {"ascent on −f": _length(pairs[DECAYED].ascent), "negative learning rate": _length(trap)}
    return Section(
        title="Descent on f is ascent on −f",
        claim="Both walk the same path, also with momentum and with weight decay.",
        text=(
            f"Logistic regression on breast_cancer: descent minimises the cross-entropy f, ascent "
            f"maximises the log-likelihood −f, each for {steps} updates on all 569 examples. jgd.ascent "
            f"negates the gradient before the optimizer sees it; the optimizer is the same.",
            "The usual shortcut, to negate the learning rate instead, turns weight decay round with it: "
            "the weights are driven away from zero.",
        ),
        checks=(
            Check(
                f"Over {len(pairs)} optimizers and {steps} updates the two paths are nowhere further apart "
                f"than {max(apart.values()):.0e}",
                max(apart.values()) < 1e-6,
            ),
            Check(
                f"With weight decay, a negative learning rate ends at weights of length "
                f"{lengths['negative learning rate'][-1]:.2f}, ascent at {lengths['ascent on −f'][-1]:.2f}",
                bool(lengths["negative learning rate"][-1] > 1.1 * lengths["ascent on −f"][-1]),
            ),
        ),
        tables=(
            Table(
                "f at the start, and where the two end",
                ("optimizer", "start", "descent on f", "ascent on −f", "largest distance of a parameter"),
                rows,
            ),
        ),
        pictures=(
            Picture(
                "Left: f along both paths; the dots are ascent's. Right: the length of the weights under "
                "adamw with weight decay 0.5.",
                partial(_draw, {n: (costs(p.descent), costs(p.ascent)) for n, p in pairs.items()}, lengths),
            ),
        ),
    )


def _flat(path: dict[str, Any]) -> np.ndarray:
    return np.concatenate([np.asarray(path["b"])[:, None], np.asarray(path["w"])], axis=1)


def _length(path: np.ndarray) -> np.ndarray:
    return np.linalg.norm(path[:, 1:], axis=1)


def _draw(
    curves: dict[str, tuple[np.ndarray, np.ndarray]], lengths: dict[str, np.ndarray], figure: Any
) -> None:
    left, right = figure.subplots(1, 2)
    for (name, (down, up)), color in zip(
        curves.items(), (style.BLUE, style.ORANGE, style.GREEN, style.PURPLE), strict=False
    ):
        left.loglog(np.arange(1, len(down)), down[1:], color=color, label=name)
        points = np.unique(np.geomspace(1, len(up) - 1, 18).astype(int))
        left.plot(points, up[points], "o", color=color, ms=4)
    left.set(title="The same path", xlabel="updates", ylabel="f, mean cross-entropy")
    left.legend(fontsize=9)
    for (name, length), color in zip(lengths.items(), (style.BLUE, style.RED), strict=True):
        right.plot(length, color=color, label=name)
    right.set(title="The trap of a negative learning rate", xlabel="updates", ylabel="‖w‖", ylim=(0, None))
    right.legend(fontsize=9)
