"""A small problem for the methods, and the walk of some steps on it."""

import jax
import jax.numpy as jnp
import numpy as np


def loss(params, x, y):
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return 0.5 * (hidden @ params["v"] - y) ** 2


def batch_loss(params, x, y):
    return jnp.mean(jax.vmap(loss, (None, 0, 0))(params, x, y))


def problem(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 4)), "b": rng.normal(size=4), "v": rng.normal(size=4)}
    x = rng.normal(size=(7, 3))
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), (params, (x, np.sin(x.sum(1)))))


def walk(method, params, batch, steps=5):
    state, infos = method.init(params), []
    for _ in range(steps):
        state, info = method.step(state, *batch)
        infos.append(info)
    return state, infos
