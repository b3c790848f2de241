"""One example again and again before the next: what it does to the rest."""

import operator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import jgd
from jgd._demo import data, style
from jgd._demo.section import Check, Picture, Section, Table
from jgd._demo.walk import recorded, walk

RATE = 0.1
REPEATS = (1, 10, 100)


def softmax_loss(params, x, label):
    """The cross-entropy of a linear classifier, for one example."""
    return optax.softmax_cross_entropy_with_integer_labels(x @ params["w"] + params["b"], label)


def batch() -> tuple[np.ndarray, np.ndarray]:
    """digits in float32."""
    x, y = data.digits()
    return x.astype(np.float32), y.astype(np.int32)


def start() -> dict[str, np.ndarray]:
    """A classifier that knows nothing."""
    return {"w": np.zeros((64, 10), np.float32), "b": np.zeros(10, np.float32)}


class Chase(NamedTuple):
    """Losses while one example is repeated: of the example, and the mean of all others; `(examples, "
    "points)`."""

    updates: np.ndarray
    own: np.ndarray
    rest: np.ndarray


def chase(trained: Any, *, examples: int, updates: int) -> Chase:
    """From a trained classifier, repeats one example; does so for several, each from the same classifier."""
    x, y = batch()
    chosen = np.random.default_rng(1).choice(len(y), examples, replace=False)
    points = _points(updates)
    method = jgd.descent(softmax_loss, optax.sgd(RATE))

    def one(example: Any) -> Any:
        path = walk(method, trained, *example, steps=updates)
        return jax.tree.map(lambda p: p[points], path)

    paths = jax.jit(lambda batch: jax.lax.map(one, batch))((x[chosen, None], y[chosen, None]))
    each = [jax.tree.map(operator.itemgetter(k), paths) for k in range(examples)]
    losses = np.stack([_losses(path, x, y) for path in each])
    own = np.stack([losses[k, :, index] for k, index in enumerate(chosen)])
    return Chase(points, own, (losses.sum(axis=2) - own) / (len(y) - 1))


class Repeated(NamedTuple):
    """The mean loss over all digits, at some updates of a run that makes each update `repeats` times."""

    repeats: int
    updates: np.ndarray
    loss: np.ndarray
    accuracy: float
    params: Any  # at the end


def repeated(repeats: int, *, updates: int) -> Repeated:
    """Trains on one example at a time, each `repeats` times before the next."""
    x, y = batch()
    method = jgd.descent(softmax_loss, recorded(optax.sgd(RATE), steps=updates))
    result = jgd.fit(
        method, start(), (x, y), batch_size=1, inner_steps=repeats, steps=updates, key=jax.random.key(2)
    )
    points = _points(updates)
    path = jax.tree.map(lambda p: p[points], jax.device_get(result.state.opt_state.path))
    losses = np.asarray(_losses(path, x, y)).mean(axis=1)
    labels = np.argmax(x @ np.asarray(result.params["w"]) + np.asarray(result.params["b"]), axis=1)
    return Repeated(repeats, points, losses, float(np.mean(labels == y)), result.params)


def section(quick: bool) -> Section:
    """Repeats single examples, from a trained classifier and while training one."""
    updates = 1700 if quick else 6000
    runs = [repeated(n, updates=updates) for n in REPEATS]
    chased = chase(runs[0].params, examples=32, updates=200)
    own, rest = chased.own.mean(axis=0), chased.rest.mean(axis=0)
    final = [r.loss[-1] for r in runs]
    return Section(
        title="Repeating one example chases that example",
        claim=(
            "Many updates on one example before the next make its own loss small and the loss on all the "
            "others larger."
        ),
        text=(
            "A linear classifier of digits is trained with jgd.fit(batch_size=1, inner_steps=n): every "
            "example is used for n updates in a row. All runs make the same number of updates at the same "
            "rate, and walk the examples in the same order. Then the classifier that saw each example once "
            "(n = 1) is given one example 200 times over; so for each of 32 examples in turn.",
        ),
        checks=(
            Check(
                f"200 updates on one example take its loss from {own[0]:.3f} to {own[-1]:.4f}, and the "
                f"loss on the other 1796 from {rest[0]:.3f} to {rest[-1]:.3f} (means of 32 examples)",
                bool(own[-1] < own[0] and rest[-1] > rest[0]),
            ),
            Check(
                f"After the same {updates:,} updates the loss over all digits is "
                + ", ".join(f"{loss:.2f} with n = {n}" for n, loss in zip(REPEATS, final, strict=True)),
                final == sorted(final),
            ),
        ),
        tables=(
            Table(
                "At the end of each run",
                ("updates in a row on each example", "updates", "examples visited", "loss over all", "right"),
                tuple(
                    (
                        str(r.repeats),
                        f"{updates:,}",
                        f"{updates // r.repeats:,}",
                        f"{r.loss[-1]:.3f}",
                        f"{r.accuracy:.1%}",
                    )
                    for r in runs
                ),
            ),
        ),
        pictures=(
            Picture(
                "Left: one example repeated, from a trained classifier; lines are means over 32 examples, "
                "bands hold the middle 80% of them. Right: training from scratch with each example used n "
                "times in a row.",
                partial(_draw, chased, runs),
            ),
        ),
    )


def _points(updates: int) -> np.ndarray:
    return np.unique(np.concatenate([[0], np.geomspace(1, updates, 60).round()]).astype(int))


@jax.jit
def _losses(path: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """The loss of every example at each point of a path, `(points, N)`."""
    return jax.lax.map(lambda params: jax.vmap(softmax_loss, (None, 0, 0))(params, x, y), path)


def _draw(chased: Chase, runs: list[Repeated], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    for losses, color, label in (
        (chased.own, style.ORANGE, "the repeated example"),
        (chased.rest, style.BLUE, "all the others"),
    ):
        left.fill_between(
            chased.updates, *np.quantile(losses, (0.1, 0.9), axis=0), color=color, alpha=0.15, lw=0
        )
        left.plot(chased.updates, losses.mean(axis=0), color=color, label=label)
    left.set_xscale("symlog")
    left.set(
        title="One example, again and again",
        xlabel="updates on that example",
        ylabel="loss",
        ylim=(0, None),
        xlim=(0, None),
    )
    left.legend(fontsize=9)
    for r, color in zip(runs, (style.GREEN, style.PURPLE, style.RED), strict=True):
        right.semilogx(r.updates[1:], r.loss[1:], color=color, label=f"n = {r.repeats}")
    right.set(
        title="n updates in a row on each example",
        xlabel="updates",
        ylabel="loss over all digits",
        ylim=(0, None),
    )
    right.legend(fontsize=9)
