"""What the models are made of: random weights, and the layers that several of them have."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Keys = Callable[[], jax.Array]

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def new_keys(seed: int) -> Keys:
    """A source of keys: each call gives another."""
    keys = iter(jax.random.split(jax.random.key(seed), 512))
    return lambda: next(keys)


def matrix(key: jax.Array, *shape: int) -> jax.Array:
    """Weights whose products keep the scale of what goes in: the last axis is the output's."""
    fan_in = functools.reduce(lambda a, b: a * b, shape[:-1], 1)
    return jax.random.normal(key, shape) * fan_in**-0.5


def dense(keys: Keys, inputs: int, outputs: int) -> dict[str, jax.Array]:
    """Weights and a bias."""
    return {"w": matrix(keys(), inputs, outputs), "b": jnp.zeros(outputs)}


def affine(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """x W + b."""
    return x @ layer["w"] + layer["b"]


def norm(d: int) -> dict[str, jax.Array]:
    """Scale and bias of a normalisation over d channels."""
    return {"scale": jnp.ones(d), "bias": jnp.zeros(d)}


def normalize(layer: dict[str, jax.Array], x: jax.Array, groups: int = 1) -> jax.Array:
    """Each position's channels to mean 0 and variance 1; in groups, those of all positions of an image together."""
    if groups == 1:
        normal = jax.nn.standardize(x, axis=-1, epsilon=1e-5)
    else:
        grouped = x.reshape(*x.shape[:-1], groups, -1)
        normal = jax.nn.standardize(grouped, axis=(0, 1, 2, 4), epsilon=1e-5).reshape(x.shape)
    return normal * layer["scale"] + layer["bias"]


def convolution(kernel: jax.Array, x: jax.Array, *, stride: int = 1, groups: int = 1) -> jax.Array:
    """A convolution of one image, `(1, height, width, channels)`, padded so that stride 1 keeps its size."""
    padding = "SAME" if kernel.shape[0] % 2 else "VALID"  # an even window tiles the image
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=numbers, feature_group_count=groups
    )


def attend(
    queries: jax.Array, keys: jax.Array, values: jax.Array, heads: int, *, causal: bool = True
) -> jax.Array:
    """Attention of one sequence, `(T, d)` in and out."""
    q, k, v = (x.reshape(x.shape[0], heads, -1) for x in (queries, keys, values))
    scores = jnp.einsum("thc,shc->hts", q, k) * q.shape[-1] ** -0.5
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[1:], bool)), scores, -jnp.inf)
    return jnp.einsum("hts,shc->thc", jax.nn.softmax(scores, axis=-1), v).reshape(queries.shape)


def transformer_layer(keys: Keys, d: int) -> dict[str, Any]:
    """The parameters of `transform`."""
    projections = {part: dense(keys, d, d) for part in ("query", "key", "value", "out")}
    feed_forward = {"up": dense(keys, d, 4 * d), "down": dense(keys, 4 * d, d)}
    return {"norm_attention": norm(d), **projections, "norm_mlp": norm(d), **feed_forward}


def transform(layer: dict[str, Any], x: jax.Array, heads: int, *, causal: bool = True) -> jax.Array:
    """Attention, then two dense layers, each normalised before and added to what came in."""
    h = normalize(layer["norm_attention"], x)
    q, k, v = (affine(layer[name], h) for name in ("query", "key", "value"))
    x = x + affine(layer["out"], attend(q, k, v, heads, causal=causal))
    return x + affine(layer["down"], jax.nn.gelu(affine(layer["up"], normalize(layer["norm_mlp"], x))))
