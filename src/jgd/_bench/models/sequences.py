"""Models of sequences: language models with and without scanned layers, a recurrence, adapters."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jgd._bench.models.layers import (
    affine,
    attend,
    cross_entropy,
    dense,
    matrix,
    new_keys,
    norm,
    normalize,
    transform,
    transformer_layer,
)
from jgd._bench.models.model import Model


def transformer_loss(params: Any, tokens: jax.Array, *, heads: int) -> jax.Array:
    """A causal language model: normalised before each sublayer, the head not tied to the embedding."""
    inputs, targets = tokens[:-1], tokens[1:]
    x = params["embedding"][inputs] + params["positions"]
    for layer in params["layers"]:
        x = transform(layer, x, heads)
    logits = normalize(params["norm"], x) @ params["head"]
    return cross_entropy(logits, targets).mean()


def transformer(name: str, small: bool) -> Model:
    """Width 256, 4 layers, 128 tokens of a vocabulary of 4096, 8 examples."""
    d, layers, length, vocabulary, size, heads = (16, 1, 8, 32, 4, 2) if small else (256, 4, 128, 4096, 8, 4)
    return transformer_of(name, d, layers, length, vocabulary, size, heads)


def transformer_of(
    name: str, d: int, layers: int, length: int, vocabulary: int, size: int, heads: int
) -> Model:
    """A causal language model of the sizes given."""
    keys = new_keys(2)
    params = {
        "embedding": jax.random.normal(keys(), (vocabulary, d)),
        "positions": 0.1 * jax.random.normal(keys(), (length, d)),
        "layers": [transformer_layer(keys, d) for _ in range(layers)],
        "norm": norm(d),
        "head": matrix(keys(), d, vocabulary),
    }
    tokens = jax.random.randint(keys(), (size, length + 1), 0, vocabulary)
    return Model(name, functools.partial(transformer_loss, heads=heads), params, (tokens,))


def gpt_loss(params: Any, tokens: jax.Array, *, heads: int) -> jax.Array:
    """GPT-2: the head is the embedding, and a scan goes over the stacked layers, each computed anew on the way back."""
    inputs, targets = tokens[:-1], tokens[1:]
    x = params["embedding"][inputs] + params["positions"]

    @functools.partial(jax.checkpoint, prevent_cse=False)  # a scan keeps the passes apart by itself
    def layer(x: jax.Array, own: Any) -> tuple[jax.Array, None]:
        q, k, v = jnp.split(affine(own["qkv"], normalize(own["norm_attention"], x)), 3, axis=-1)
        x = x + affine(own["out"], attend(q, k, v, heads))
        return x + affine(own["down"], jax.nn.gelu(affine(own["up"], normalize(own["norm_mlp"], x)))), None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    logits = normalize(params["norm"], x) @ params["embedding"].T
    return cross_entropy(logits, targets).mean()


def gpt(name: str, small: bool) -> Model:
    """Width 192, 6 layers, 64 tokens of a vocabulary of 2048, 8 examples."""
    d, layers, length, vocabulary, size, heads = (8, 2, 5, 16, 3, 2) if small else (192, 6, 64, 2048, 8, 6)
    return gpt_of(name, d=d, layers=layers, length=length, vocabulary=vocabulary, size=size, heads=heads)


def gpt_of(name: str, *, d: int, layers: int, length: int, vocabulary: int, size: int, heads: int) -> Model:
    """GPT-2 in the sizes given, with random weights."""
    keys = new_keys(9)

    def stacked(inputs: int, outputs: int) -> dict[str, jax.Array]:
        w = jax.random.normal(keys(), (layers, inputs, outputs)) * inputs**-0.5
        return {"w": w, "b": jnp.zeros((layers, outputs))}

    def stacked_norm() -> dict[str, jax.Array]:
        return {"scale": jnp.ones((layers, d)), "bias": jnp.zeros((layers, d))}

    params = {
        "embedding": 0.1 * jax.random.normal(keys(), (vocabulary, d)),
        "positions": 0.1 * jax.random.normal(keys(), (length, d)),
        "layers": {
            "norm_attention": stacked_norm(),
            "qkv": stacked(d, 3 * d),
            "out": stacked(d, d),
            "norm_mlp": stacked_norm(),
            "up": stacked(d, 4 * d),
            "down": stacked(4 * d, d),
        },
        "norm": norm(d),
    }
    tokens = jax.random.randint(keys(), (size, length + 1), 0, vocabulary)
    return Model(name, functools.partial(gpt_loss, heads=heads), params, (tokens,))


def gru_loss(params: Any, sequence: jax.Array, label: jax.Array) -> jax.Array:
    """A gated recurrent unit by `lax.scan`, and a linear head on its last state."""

    def step(state: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
        gates = jax.nn.sigmoid(affine(params["gates_in"], x) + state @ params["gates_state"])
        reset, update = jnp.split(gates, 2)
        candidate = jnp.tanh(affine(params["candidate_in"], x) + reset * (state @ params["candidate_state"]))
        return (1 - update) * state + update * candidate, None

    start = jnp.zeros(params["candidate_state"].shape[0])
    last, _ = jax.lax.scan(step, start, sequence)
    return cross_entropy(affine(params["head"], last), label)


def gru(name: str, small: bool) -> Model:
    """Width 128, 32 steps, 128 examples."""
    d, length, size = (8, 5, 4) if small else (128, 32, 128)
    return gru_of(name, d=d, length=length, size=size)


def gru_of(name: str, *, d: int, length: int, size: int) -> Model:
    """A gated recurrent unit of the sizes given."""
    keys = new_keys(3)
    params = {
        "gates_in": dense(keys, d, 2 * d),
        "gates_state": matrix(keys(), d, 2 * d),
        "candidate_in": dense(keys, d, d),
        "candidate_state": matrix(keys(), d, d),
        "head": dense(keys, d, 10),
    }
    sequences = jax.random.normal(keys(), (size, length, d))
    return Model(name, gru_loss, params, (sequences, jax.random.randint(keys(), (size,), 0, 10)))


def _adapted(weights: tuple[jax.Array, jax.Array, jax.Array], x: jax.Array) -> jax.Array:
    frozen, a, b = weights
    return x @ frozen + x @ a @ b


def adapters_loss(params: Any, base: Any, sequence: jax.Array, label: jax.Array, *, heads: int) -> jax.Array:
    """A frozen encoder whose projections are x W + (x A) B, and a frozen head on the mean of its outputs."""
    x = sequence
    for frozen, trained in zip(base["layers"], params, strict=True):
        layer = {part: (frozen[part], trained[part]["a"], trained[part]["b"]) for part in frozen}
        h = jax.nn.standardize(x, axis=-1, epsilon=1e-5)
        query, key, value = (_adapted(layer[part], h) for part in ("query", "key", "value"))
        x = x + _adapted(layer["out"], attend(query, key, value, heads))
        h = jax.nn.standardize(x, axis=-1, epsilon=1e-5)
        x = x + _adapted(layer["down"], jax.nn.gelu(_adapted(layer["up"], h)))
    return cross_entropy(x.mean(0) @ base["head"], label)


def adapters(name: str, small: bool) -> Model:
    """Adapters of rank 4 on 2 frozen layers of width 256, 64 positions, 16 examples; the base is shared."""
    d, rank, layers, length, size, heads = (8, 2, 1, 5, 4, 2) if small else (256, 4, 2, 64, 16, 4)
    return adapters_of(name, d=d, rank=rank, layers=layers, length=length, size=size, heads=heads)


def adapters_of(name: str, *, d: int, rank: int, layers: int, length: int, size: int, heads: int) -> Model:
    """Adapters on a frozen encoder of the sizes given."""
    shapes = dict.fromkeys(("query", "key", "value", "out"), (d, d)) | {"up": (d, 4 * d), "down": (4 * d, d)}
    keys = new_keys(5)
    base = {
        "layers": [{part: matrix(keys(), *shape) for part, shape in shapes.items()} for _ in range(layers)],
        "head": matrix(keys(), d, 10),
    }
    params = [
        {
            part: {"a": matrix(keys(), i, rank), "b": 0.1 * matrix(keys(), rank, o)}
            for part, (i, o) in shapes.items()
        }
        for _ in range(layers)
    ]
    batch = (base, jax.random.normal(keys(), (size, length, d)), jax.random.randint(keys(), (size,), 0, 10))
    return Model(name, functools.partial(adapters_loss, heads=heads), params, batch, (None, None, 0, 0))
