"""The suite: losses of ONE example as pure functions, with random weights and a random batch.

`MODELS` maps a name to a function that builds the model, so that nothing is allocated before it is asked for.
Every model also comes `small`, for tests.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax


@dataclass(frozen=True)
class Model:
    """A loss of one example with parameters and a batch to measure it on.

    Attributes:
        name: what tables call it.
        loss: `loss(params, *example)` to a scalar.
        params: the parameters.
        batch: the loss's other arguments, with a leading axis of examples where they are mapped.
        in_axes: as `jgd.per_example_grad` takes it; None maps everything but the parameters.
    """

    name: str
    loss: Callable[..., Any]
    params: Any
    batch: tuple[Any, ...]
    in_axes: tuple[Any, ...] | None = None

    @property
    def axes(self) -> tuple[Any, ...]:
        """What `jax.vmap` takes: an entry for each argument."""
        return self.in_axes or (None, *(0 for _ in self.batch))

    @property
    def num_params(self) -> int:
        """The number of parameters, P."""
        return sum(x.size for x in jax.tree.leaves(self.params))


Keys = Callable[[], jax.Array]


def _keys(seed: int) -> Keys:
    keys = iter(jax.random.split(jax.random.key(seed), 128))
    return lambda: next(keys)


def _matrix(key: jax.Array, *shape: int) -> jax.Array:
    """Weights whose products keep the scale of what goes in: the last axis is the output's."""
    fan_in = functools.reduce(lambda a, b: a * b, shape[:-1], 1)
    return jax.random.normal(key, shape) * fan_in**-0.5


def _dense(keys: Keys, inputs: int, outputs: int) -> dict[str, jax.Array]:
    return {"w": _matrix(keys(), inputs, outputs), "b": jnp.zeros(outputs)}


def _affine(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ layer["w"] + layer["b"]


_cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def mlp_loss(params: Any, x: jax.Array, label: jax.Array) -> jax.Array:
    """Dense layers with relu between them."""
    for layer in params[:-1]:
        x = jax.nn.relu(_affine(layer, x))
    return _cross_entropy(_affine(params[-1], x), label)


def mlp(name: str, small: bool) -> Model:
    """784-1024-1024-10 on 128 examples."""
    widths, size = ((32, 64, 64, 10), 8) if small else ((784, 1024, 1024, 10), 128)
    keys = _keys(0)
    params = [_dense(keys, i, o) for i, o in itertools.pairwise(widths)]
    batch = (jax.random.normal(keys(), (size, widths[0])), jax.random.randint(keys(), (size,), 0, widths[-1]))
    return Model(name, mlp_loss, params, batch)


def cnn_loss(params: Any, image: jax.Array, label: jax.Array) -> jax.Array:
    """3×3 convolutions with relu, 2×2 mean pooling between them, a mean over positions, a linear head."""
    x = image[None]
    for k, layer in enumerate(params["convolutions"]):
        if k:
            _, height, width, channels = x.shape
            x = x.reshape(1, height // 2, 2, width // 2, 2, channels).mean((2, 4))
        x = jax.lax.conv_general_dilated(
            x, layer["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + layer["b"])
    return _cross_entropy(_affine(params["head"], x.mean((0, 1, 2))), label)


def cnn(name: str, small: bool, size: int) -> Model:
    """Channels 3-32-64-128 on 32×32 images."""
    channels, side, size = ((3, 4, 8, 8), 8, 4) if small else ((3, 32, 64, 128), 32, size)
    keys = _keys(1)
    convolutions = [
        {"w": _matrix(keys(), 3, 3, i, o), "b": jnp.zeros(o)} for i, o in itertools.pairwise(channels)
    ]
    params = {"convolutions": convolutions, "head": _dense(keys, channels[-1], 10)}
    images = jax.random.normal(keys(), (size, side, side, channels[0]))
    return Model(name, cnn_loss, params, (images, jax.random.randint(keys(), (size,), 0, 10)))


def _normalize(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jax.nn.standardize(x, axis=-1, epsilon=1e-5) * layer["scale"] + layer["bias"]


def _attend(queries: jax.Array, keys: jax.Array, values: jax.Array, heads: int) -> jax.Array:
    """Causal attention of one sequence, `(T, d)` in and out."""
    q, k, v = (x.reshape(x.shape[0], heads, -1) for x in (queries, keys, values))
    scores = jnp.einsum("thc,shc->hts", q, k) * q.shape[-1] ** -0.5
    visible = jnp.tril(jnp.ones(scores.shape[1:], bool))
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("hts,shc->thc", weights, v).reshape(queries.shape)


def transformer_loss(params: Any, tokens: jax.Array, *, heads: int) -> jax.Array:
    """A causal language model: normalised before each sublayer, the head not tied to the embedding."""
    inputs, targets = tokens[:-1], tokens[1:]
    x = params["embedding"][inputs] + params["positions"]
    for layer in params["layers"]:
        h = _normalize(layer["norm_attention"], x)
        q, k, v = (_affine(layer[name], h) for name in ("query", "key", "value"))
        x = x + _affine(layer["out"], _attend(q, k, v, heads))
        h = jax.nn.gelu(_affine(layer["up"], _normalize(layer["norm_mlp"], x)))
        x = x + _affine(layer["down"], h)
    logits = _normalize(params["norm"], x) @ params["head"]
    return _cross_entropy(logits, targets).mean()


def _norm(d: int) -> dict[str, jax.Array]:
    return {"scale": jnp.ones(d), "bias": jnp.zeros(d)}


def _transformer_layer(keys: Keys, d: int) -> dict[str, Any]:
    projections = {part: _dense(keys, d, d) for part in ("query", "key", "value", "out")}
    feed_forward = {"up": _dense(keys, d, 4 * d), "down": _dense(keys, 4 * d, d)}
    return {"norm_attention": _norm(d), **projections, "norm_mlp": _norm(d), **feed_forward}


def transformer(name: str, small: bool) -> Model:
    """Width 256, 4 layers, 128 tokens of a vocabulary of 4096, 8 examples."""
    d, layers, length, vocabulary, size, heads = (16, 2, 8, 32, 4, 2) if small else (256, 4, 128, 4096, 8, 4)
    keys = _keys(2)
    params = {
        "embedding": jax.random.normal(keys(), (vocabulary, d)),
        "positions": 0.1 * jax.random.normal(keys(), (length, d)),
        "layers": [_transformer_layer(keys, d) for _ in range(layers)],
        "norm": _norm(d),
        "head": _matrix(keys(), d, vocabulary),
    }
    tokens = jax.random.randint(keys(), (size, length + 1), 0, vocabulary)
    return Model(name, functools.partial(transformer_loss, heads=heads), params, (tokens,))


def gru_loss(params: Any, sequence: jax.Array, label: jax.Array) -> jax.Array:
    """A gated recurrent unit by `lax.scan`, and a linear head on its last state."""

    def step(state: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
        gates = jax.nn.sigmoid(_affine(params["gates_in"], x) + state @ params["gates_state"])
        reset, update = jnp.split(gates, 2)
        candidate = jnp.tanh(_affine(params["candidate_in"], x) + reset * (state @ params["candidate_state"]))
        return (1 - update) * state + update * candidate, None

    start = jnp.zeros(params["candidate_state"].shape[0])
    last, _ = jax.lax.scan(step, start, sequence)
    return _cross_entropy(_affine(params["head"], last), label)


def gru(name: str, small: bool) -> Model:
    """Width 128, 32 steps, 128 examples."""
    d, length, size = (8, 5, 4) if small else (128, 32, 128)
    keys = _keys(3)
    params = {
        "gates_in": _dense(keys, d, 2 * d),
        "gates_state": _matrix(keys(), d, 2 * d),
        "candidate_in": _dense(keys, d, d),
        "candidate_state": _matrix(keys(), d, d),
        "head": _dense(keys, d, 10),
    }
    sequences = jax.random.normal(keys(), (size, length, d))
    return Model(name, gru_loss, params, (sequences, jax.random.randint(keys(), (size,), 0, 10)))


def bag_loss(params: Any, tokens: jax.Array, label: jax.Array) -> jax.Array:
    """The mean of the tokens' embeddings, and a linear classifier on it."""
    return _cross_entropy(_affine(params["head"], params["embedding"][tokens].mean(0)), label)


def bag(name: str, small: bool) -> Model:
    """A vocabulary of 50,000, width 64, 40 tokens, 4 classes, 128 examples."""
    vocabulary, d, length, size = (50, 4, 6, 5) if small else (50_000, 64, 40, 128)
    keys = _keys(4)
    params = {"embedding": jax.random.normal(keys(), (vocabulary, d)), "head": _dense(keys, d, 4)}
    tokens = jax.random.randint(keys(), (size, length), 0, vocabulary)
    return Model(name, bag_loss, params, (tokens, jax.random.randint(keys(), (size,), 0, 4)))


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
        x = x + _adapted(layer["out"], _attend(query, key, value, heads))
        h = jax.nn.standardize(x, axis=-1, epsilon=1e-5)
        x = x + _adapted(layer["down"], jax.nn.gelu(_adapted(layer["up"], h)))
    return _cross_entropy(x.mean(0) @ base["head"], label)


def adapters(name: str, small: bool) -> Model:
    """Adapters of rank 4 on 2 frozen layers of width 256, 64 positions, 16 examples; the base is shared."""
    d, rank, layers, length, size, heads = (8, 2, 1, 5, 4, 2) if small else (256, 4, 2, 64, 16, 4)
    shapes = dict.fromkeys(("query", "key", "value", "out"), (d, d)) | {"up": (d, 4 * d), "down": (4 * d, d)}
    keys = _keys(5)
    base = {
        "layers": [{part: _matrix(keys(), *shape) for part, shape in shapes.items()} for _ in range(layers)],
        "head": _matrix(keys(), d, 10),
    }
    params = [
        {
            part: {"a": _matrix(keys(), i, rank), "b": 0.1 * _matrix(keys(), rank, o)}
            for part, (i, o) in shapes.items()
        }
        for _ in range(layers)
    ]
    batch = (base, jax.random.normal(keys(), (size, length, d)), jax.random.randint(keys(), (size,), 0, 10))
    return Model(name, functools.partial(adapters_loss, heads=heads), params, batch, (None, None, 0, 0))


MODELS: dict[str, Callable[[str, bool], Model]] = {
    "mlp": mlp,
    "cnn": functools.partial(cnn, size=32),
    "cnn-128": functools.partial(cnn, size=128),
    "transformer": transformer,
    "gru": gru,
    "bag": bag,
    "adapters": adapters,
}


def build(name: str, *, small: bool = False) -> Model:
    """A model of the suite, by its name.

    Raises:
        ValueError: there is no model of that name.
    """
    if name not in MODELS:
        raise ValueError(f"`name` must be one of {', '.join(MODELS)}, got {name!r}")
    return MODELS[name](name, small)
