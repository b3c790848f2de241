"""Ascent maximises: rewards of a bandit, and the time for which a pole stays up."""

import time
from functools import partial
from typing import Any

import jax
import numpy as np

import jgd
from jgd._demo import style
from jgd._demo.policies import (
    ARMS,
    Training,
    bandit_objective,
    learn_bandit,
    train_cartpole,
)
from jgd._demo.section import Check, Picture, Section

SOLVED = 475  # the mean return over 100 episodes at which CartPole-v1 counts as solved


def score_identity_error() -> float:
    """How far Σ_a π(a) r(a) ∇ log π(a), over all arms, is from the gradient of the expected reward."""
    logits = np.linspace(-1, 1, len(ARMS), dtype=np.float32)
    grads = jgd.per_example_grad(bandit_objective)(logits, np.arange(len(ARMS), dtype=np.int32), ARMS)
    by_scores = jgd.mean(grads, weights=jax.nn.softmax(logits))
    expected = jax.grad(lambda logits: jax.nn.softmax(logits) @ ARMS)(logits)
    return float(np.max(np.abs(np.asarray(by_scores) - np.asarray(expected))))


def section(quick: bool) -> Section:
    """Trains a policy for a bandit and one for CartPole."""
    bandit = learn_bandit(jax.random.key(0), updates=300)
    error = score_identity_error()
    start = time.perf_counter()
    training = train_cartpole(1, updates=60 if quick else 100)
    seconds = time.perf_counter() - start
    score = training.evaluation.mean()
    return Section(
        title="Ascent maximises",
        claim=(
            "jgd.ascent climbs an objective as it is written: no minus sign in the loss, none in the "
            "learning rate."
        ),
        text=(
            "A policy's expected reward cannot be differentiated through the actions, but the mean over "
            "actions of reward × log π has the same gradient: each action, or each whole episode, is an "
            "example. The bandit has ten arms. CartPole is CartPole-v1's physics written in JAX, 32 "
            "episodes played side by side for each update of a small network.",
        ),
        checks=(
            Check(
                f"Over all arms, the scores add up to the exact gradient of the reward (largest difference "
                f"{error:.0e})",
                error < 1e-6,
            ),
            Check(
                f"The bandit's expected reward rises from {bandit[0]:.2f} to {bandit[-1]:.2f}; the best "
                f"arm pays {ARMS.max():.2f}",
                bool(bandit[-1] > 0.95 * ARMS.max()),
            ),
            Check(
                f"CartPole: a mean return of {score:.1f} over 100 new episodes ({SOLVED} counts as solved, "
                f"500 is the most), after {len(training.returns)} updates in {seconds:.1f} s, compilation "
                f"included",
                bool(score >= SOLVED),
            ),
        ),
        pictures=(
            Picture(
                "Left: expected reward of the bandit's policy. Right: CartPole; the line is the mean "
                "return of the episodes that an update learns from, the band runs from the shortest "
                "episode to the longest.",
                partial(_draw_learning, bandit, training),
            ),
        ),
    )


def _draw_learning(bandit: np.ndarray, training: Training, figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    left.plot(bandit, color=style.BLUE)
    left.axhline(ARMS.max(), color=style.FAINT, ls="--", lw=1.2)
    left.annotate(
        "best arm",
        (len(bandit), ARMS.max()),
        (0, 4),
        textcoords="offset points",
        ha="right",
        color=style.FAINT,
    )
    left.set(title="Bandit of ten arms", xlabel="updates", ylabel="expected reward", ylim=(0.8, 2.15))

    returns = training.returns
    updates = np.arange(len(returns))
    right.fill_between(updates, returns.min(axis=1), returns.max(axis=1), color=style.BLUE, alpha=0.15, lw=0)
    right.plot(updates, returns.mean(axis=1), color=style.BLUE)
    right.axhline(SOLVED, color=style.FAINT, ls="--", lw=1.2)
    right.annotate(
        "solved: 475",
        (len(returns), SOLVED),
        (0, -13),
        textcoords="offset points",
        ha="right",
        color=style.FAINT,
    )
    right.set(
        title="CartPole", xlabel="updates, of 32 episodes each", ylabel="return, in steps", ylim=(0, 515)
    )
