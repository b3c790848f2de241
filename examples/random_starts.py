"""64 nets trained at once from random starts: a convex loss forgets where it started, another does not.

`jax.vmap` over keys turns one `jgd.fit` into 64. Draws `random_starts.png`, or the file named as argument.
"""

import sys

import jax
import jax.numpy as jnp
import matplotlib as mpl
import optax
from sklearn.datasets import make_moons

import jgd

mpl.use("Agg")
import matplotlib.pyplot as plt

RUNS, UPDATES, HIDDEN = 64, 1500, 3

x, label = make_moons(200, noise=0.15, random_state=0)
data = (jnp.asarray(x, jnp.float32), jnp.asarray(label, jnp.float32))


def line(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """The logit of logistic regression: its loss is convex."""
    return x @ params["w"] + params["b"]


def net(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """The logit of a net with three hidden units: its loss is not convex."""
    return jnp.tanh(x @ params["inner"] + params["shift"]) @ params["w"] + params["b"]


SHAPES = {
    line: {"w": (2,), "b": ()},
    net: {"inner": (2, HIDDEN), "shift": (HIDDEN,), "w": (HIDDEN,), "b": ()},
}


def train(model, key: jax.Array) -> jax.Array:
    """The losses of one run, from weights drawn from a normal distribution."""
    shapes = SHAPES[model]
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    start = {name: 2 * jax.random.normal(keys[name], shape) for name, shape in shapes.items()}
    loss = lambda params, x, label: optax.sigmoid_binary_cross_entropy(model(params, x), label)
    method = jgd.descent(loss, optax.adam(0.05))
    return jgd.fit(method, start, data, batch_size=None, steps=UPDATES, key=key).history.value


figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
spread = {}
for model, panel, title in zip((line, net), axes, ("convex: a line", "not convex: a net"), strict=True):
    keys = jax.random.split(jax.random.key(0), RUNS)
    losses = jax.jit(jax.vmap(lambda key, model=model: train(model, key)))(keys)
    last = losses[:, -1]
    spread[model] = last.max() - last.min()
    print(
        f"{title}: {RUNS} runs end between {last.min():.4f} and {last.max():.4f}, spread {spread[model]:.1e}"
    )
    panel.loglog(jnp.arange(1, UPDATES + 1), losses.T, color="tab:blue", alpha=0.2, linewidth=1)
    panel.set(title=title, xlabel="updates")
axes[0].set_ylabel("loss")
figure.tight_layout()
file = sys.argv[1] if len(sys.argv) > 1 else "random_starts.png"
figure.savefig(file, dpi=120)
print(f"wrote {file}")
assert spread[line] < 1e-4, spread
assert spread[net] > 1e-2, spread
