"""Descent-ascent: one player minimises, the other maximises."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

import jgd
from jgd._demo import style
from jgd._demo.section import Check, Picture, Section, Table, figures
from jgd._demo.walk import walk

RATE = 0.2
STEPS = 400
SHOWN = 60  # of the steps, in the plane: the outward spiral soon dwarfs the other
START = (1.0, 1.0)

PLAIN = "simultaneous gradient steps"
OPTIMISTIC = "optimistic gradient steps"


def bilinear(players, payoff):
    """f(x, y) = payoff · x · y: x minimises it, y maximises it, and the saddle is at (0, 0)."""
    x, y = players
    return payoff * x * y


def play(optimizer: Callable[[], optax.GradientTransformation], *, steps: int) -> np.ndarray:
    """Where the two players stand before the first step and after each, `(steps + 1, 2)`."""
    method = jgd.descent_ascent(bilinear, optimizer(), optimizer())
    start = tuple(jnp.asarray(z, jnp.float32) for z in START)
    return np.stack(walk(method, start, jnp.ones(1), steps=steps), axis=1)


def section(quick: bool) -> Section:
    """Plays the game x·y by two optimizers from the same start."""
    del quick
    paths = {
        PLAIN: play(lambda: optax.sgd(RATE), steps=STEPS),
        OPTIMISTIC: play(lambda: optax.optimistic_gradient_descent(RATE), steps=STEPS),
    }
    distance = {name: np.linalg.norm(path, axis=1) for name, path in paths.items()}
    predicted = distance[PLAIN][0] * (1 + RATE**2) ** (np.arange(STEPS + 1) / 2)
    error = float(np.max(np.abs(distance[PLAIN] / predicted - 1)))
    marks = [0, STEPS // 10, STEPS // 2, STEPS]
    return Section(
        title="Descent-ascent finds a saddle",
        claim=(
            "Where one player minimises and the other maximises, plain simultaneous steps circle outwards; "
            "optimistic gradients find the saddle."
        ),
        text=(
            "The game is f(x, y) = x · y. The gradient is always at a right angle to the way to the "
            "saddle, so each plain step of rate η multiplies the distance by exactly √(1 + η²). An "
            "optimistic step extrapolates: it adds the change since the last gradient.",
        ),
        checks=(
            Check(
                f"Plain steps leave as predicted, from {distance[PLAIN][0]:.2f} to "
                f"{distance[PLAIN][-1]:.2f} away (to {error:.0e} of the formula)",
                error < 1e-3,
            ),
            Check(
                f"Optimistic steps arrive: {distance[OPTIMISTIC][-1]:.0e} from the saddle after {STEPS} "
                f"steps",
                bool(distance[OPTIMISTIC][-1] < 1e-2 * distance[OPTIMISTIC][0]),
            ),
        ),
        tables=(
            Table(
                "Distance from the saddle",
                ("steps", *(str(n) for n in marks)),
                tuple((name, *(figures(d[n]) for n in marks)) for name, d in distance.items()),
            ),
        ),
        pictures=(
            Picture(
                "The same start, the same rate. Left: the players' moves in the plane. Right: their "
                "distance from the saddle.",
                partial(_draw, paths, distance),
            ),
        ),
    )


def _draw(paths: dict[str, np.ndarray], distance: dict[str, np.ndarray], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    for name, color in ((PLAIN, style.ORANGE), (OPTIMISTIC, style.BLUE)):
        left.plot(*paths[name][: SHOWN + 1].T, color=color, lw=1.3)
        right.semilogy(distance[name], color=color, label=name)
    left.plot(*START, "o", color=style.INK, ms=5)
    left.annotate("start", START, (6, -14), textcoords="offset points")
    left.plot(0, 0, "*", color=style.RED, ms=12, zorder=3)
    left.set(title="f(x, y) = x y", xlabel="x, which minimises", ylabel="y, which maximises")
    left.set_aspect("equal", adjustable="datalim")
    right.set(title="Distance from the saddle", xlabel="steps", ylabel="√(x² + y²)")
    right.legend(fontsize=9)
