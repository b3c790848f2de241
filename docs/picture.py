"""Draws `docs/gradients.png`, the README's picture: single examples' gradients, and three ways to use them.

The model is a line through scikit-learn's diabetes data (feature 2), so that a gradient has two numbers.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import optax
from sklearn.datasets import load_diabetes

import jgd

mpl.use("Agg")
import matplotlib.pyplot as plt

BLUE, ORANGE, GREEN, GREY = "#2f6db5", "#d9782d", "#3a8f5c", "#9aa3ad"


def loss(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Half the squared error of one patient."""
    return 0.5 * (w[0] * x + w[1] - y) ** 2


def gradients(panel, w: jax.Array, data: tuple[jax.Array, jax.Array]) -> None:
    """Every patient's gradient at one point, their mean, and the mean after clipping."""
    grads = jgd.per_example_grad(loss)(w, *data)
    max_norm = float(jnp.median(jgd.norms(grads)))
    g = jgd.materialize(grads)
    panel.scatter(-g[:, 0], -g[:, 1], s=7, color=GREY, alpha=0.7, linewidths=0, label="one patient's")
    arrows = {
        "their mean": (jgd.mean(grads), BLUE),
        "their mean, each clipped to the circle": (jgd.clipped_sum(grads, max_norm) / len(grads), ORANGE),
    }
    for label, (mean, color) in arrows.items():
        panel.annotate(
            "",
            xy=(-mean[0], -mean[1]),
            xytext=(0, 0),
            arrowprops={"arrowstyle": "->", "color": color, "lw": 2},
        )
        panel.plot([], [], color=color, label=label)
    panel.add_patch(plt.Circle((0, 0), max_norm, fill=False, color=ORANGE, linewidth=0.8, linestyle=":"))
    panel.set(title="Negative gradients, at the start", xlabel="slope", ylabel="intercept", aspect="equal")
    panel.set(xlim=(-260, 460), ylim=(-80, 430))
    panel.legend(loc="upper left", fontsize=8, frameon=False)


def regimes(panel, w: jax.Array, data: tuple[jax.Array, jax.Array]) -> None:
    """The path of the parameters when updated after one patient, after 32, after all of them."""
    cost = jax.vmap(lambda w: jax.vmap(loss, (None, 0, 0))(w, *data).mean())
    slopes, intercepts = jnp.meshgrid(jnp.linspace(-15, 75, 80), jnp.linspace(-15, 185, 80))
    costs = cost(jnp.stack([slopes.ravel(), intercepts.ravel()], 1)).reshape(slopes.shape)
    panel.contour(slopes, intercepts, costs, levels=12, colors=GREY, linewidths=0.5)
    for batch_size, rate, color, label in (
        (1, 0.03, GREEN, "after 1 patient"),
        (32, 0.2, ORANGE, "after 32"),
        (None, 0.2, BLUE, "after all"),
    ):
        path = [w]
        jgd.fit(
            jgd.descent(loss, optax.sgd(rate)),
            w,
            data,
            batch_size=batch_size,
            steps=400 if batch_size == 1 else 40,
            key=jax.random.key(0),
            callback=lambda state, _, path=path: path.append(state.params),
        )
        panel.plot(*jnp.stack(path).T, color=color, linewidth=1.4, marker=".", markersize=3, label=label)
    panel.set(title="Paths of descent, by regime", xlabel="slope", ylabel="intercept")
    panel.legend(loc="lower right", fontsize=8, frameon=False)


def main() -> None:
    """Draws both panels."""
    features, disease = load_diabetes(return_X_y=True)
    bmi = jnp.asarray(features[:, 2], jnp.float32)
    data = ((bmi - bmi.mean()) / bmi.std(), jnp.asarray(disease, jnp.float32))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    gradients(left, jnp.zeros(2), data)
    regimes(right, jnp.zeros(2), data)
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(Path(__file__).parent / "gradients.png", dpi=110)


if __name__ == "__main__":
    main()
