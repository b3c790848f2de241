"""Models without positions: dense layers, and a bag of embeddings."""

import itertools
from typing import Any

import jax

from jgd._bench.models.layers import affine, cross_entropy, dense, new_keys
from jgd._bench.models.model import Model


def mlp_loss(params: Any, x: jax.Array, label: jax.Array) -> jax.Array:
    """Dense layers with relu between them."""
    for layer in params[:-1]:
        x = jax.nn.relu(affine(layer, x))
    return cross_entropy(affine(params[-1], x), label)


def mlp(name: str, small: bool) -> Model:
    """784-1024-1024-10 on 128 examples."""
    widths, size = ((32, 64, 64, 10), 8) if small else ((784, 1024, 1024, 10), 128)
    return mlp_of(name, widths, size)


def mlp_of(name: str, widths: tuple[int, ...], size: int) -> Model:
    """Layers of the widths given."""
    keys = new_keys(0)
    params = [dense(keys, i, o) for i, o in itertools.pairwise(widths)]
    batch = (jax.random.normal(keys(), (size, widths[0])), jax.random.randint(keys(), (size,), 0, widths[-1]))
    return Model(name, mlp_loss, params, batch)


def bag_loss(params: Any, tokens: jax.Array, label: jax.Array) -> jax.Array:
    """The mean of the tokens' embeddings, and a linear classifier on it."""
    return cross_entropy(affine(params["head"], params["embedding"][tokens].mean(0)), label)


def bag(name: str, small: bool) -> Model:
    """A vocabulary of 50,000, width 64, 40 tokens, 4 classes, 128 examples."""
    vocabulary, d, length, size = (50, 4, 6, 5) if small else (50_000, 64, 40, 128)
    return bag_of(name, vocabulary=vocabulary, d=d, length=length, size=size)


def bag_of(name: str, *, vocabulary: int, d: int, length: int, size: int) -> Model:
    """A bag of embeddings of the sizes given, and four classes."""
    keys = new_keys(4)
    params = {"embedding": jax.random.normal(keys(), (vocabulary, d)), "head": dense(keys, d, 4)}
    tokens = jax.random.randint(keys(), (size, length), 0, vocabulary)
    return Model(name, bag_loss, params, (tokens, jax.random.randint(keys(), (size,), 0, 4)))
