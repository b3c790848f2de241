"""Models from flax (linen, nnx), equinox and haiku, unchanged: a loss of one example is all it takes."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import jgd

Loss = Callable[..., jax.Array]
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def linen() -> tuple[Loss, Any]:
    """A flax module, by `apply`."""
    model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(10)])
    params = model.init(jax.random.key(0), jnp.zeros(64))
    return lambda params, x, y: cross_entropy(model.apply(params, x), y), params


def nnx_model() -> tuple[Loss, Any]:
    """A flax nnx module: what trains is split off, and merged back inside the loss."""
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(64, 32, rngs=rngs), nnx.relu, nnx.Linear(32, 10, rngs=rngs))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return lambda params, x, y: cross_entropy(nnx.merge(graph, params, rest)(x), y), params


def equinox() -> tuple[Loss, Any]:
    """An equinox module: its arrays are the parameters, the rest is combined back inside the loss."""
    model = eqx.nn.MLP(64, 10, 32, depth=1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return lambda params, x, y: cross_entropy(eqx.combine(params, static)(x), y), params


def haiku() -> tuple[Loss, Any]:
    """A haiku function, transformed."""
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([32, 10])(x)))
    params = model.init(jax.random.key(0), jnp.zeros(64))
    return lambda params, x, y: cross_entropy(model.apply(params, x), y), params


images, digits = load_digits(return_X_y=True)
x, y = jnp.asarray(images / 16, jnp.float32), jnp.asarray(digits)
for build in (linen, nnx_model, equinox, haiku):
    loss, params = build()
    norms = jgd.norms(jgd.per_example_grad(loss)(params, x[:64], y[:64]))
    blocks = jax.vmap(jax.grad(loss), (None, 0, 0))(params, x[:64], y[:64])
    assert jnp.allclose(norms, jax.vmap(optax.tree.norm)(blocks), rtol=1e-4)

    method = jgd.descent(loss, optax.adam(3e-3))
    result = jgd.fit(method, params, (x, y), batch_size=32, epochs=10, key=jax.random.key(1))
    first, last = result.history.value[:10].mean(), result.history.value[-10:].mean()
    print(f"{build.__name__:>9}: norms {norms.min():.2f} to {norms.max():.2f}, loss {first:.2f} → {last:.3f}")
    assert last < 0.2 < first
