"""Models of images: convolutional nets of three kinds, and a vision transformer."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from jgd._bench.models.layers import (
    Keys,
    affine,
    convolution,
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


def _labelled(keys: Keys, size: int, side: int) -> tuple[jax.Array, jax.Array]:
    """Random images of three channels, and labels of ten classes."""
    return jax.random.normal(keys(), (size, side, side, 3)), jax.random.randint(keys(), (size,), 0, 10)


def cnn_loss(params: Any, image: jax.Array, label: jax.Array) -> jax.Array:
    """3×3 convolutions with relu, 2×2 mean pooling between them, a mean over positions, a linear head."""
    x = image[None]
    for k, layer in enumerate(params["convolutions"]):
        if k:
            _, height, width, channels = x.shape
            x = x.reshape(1, height // 2, 2, width // 2, 2, channels).mean((2, 4))
        x = jax.nn.relu(convolution(layer["w"], x) + layer["b"])
    return cross_entropy(affine(params["head"], x.mean((0, 1, 2))), label)


def cnn(name: str, small: bool, size: int) -> Model:
    """Channels 3-32-64-128 on 32×32 images."""
    channels, side, size = ((3, 4, 8, 8), 8, 4) if small else ((3, 32, 64, 128), 32, size)
    keys = new_keys(1)
    convolutions = [
        {"w": matrix(keys(), 3, 3, i, o), "b": jnp.zeros(o)} for i, o in itertools.pairwise(channels)
    ]
    params = {"convolutions": convolutions, "head": dense(keys, channels[-1], 10)}
    return Model(name, cnn_loss, params, _labelled(keys, size, side))


def residual_loss(params: Any, image: jax.Array, label: jax.Array, *, groups: int) -> jax.Array:
    """Blocks of two normalised convolutions; where a block changes the size, a 1×1 convolution is its skip."""
    x = convolution(params["stem"], image[None])
    for block in params["blocks"]:
        stride = 2 if "skip" in block else 1
        h = jax.nn.relu(normalize(block["norm_first"], x, groups))
        skip = convolution(block["skip"], h, stride=stride) if "skip" in block else x
        h = convolution(block["first"], h, stride=stride)
        h = jax.nn.relu(normalize(block["norm_second"], h, groups))
        x = skip + convolution(block["second"], h)
    x = jax.nn.relu(normalize(params["norm"], x, groups))
    return cross_entropy(affine(params["head"], x.mean((0, 1, 2))), label)


def residual(name: str, small: bool) -> Model:
    """Channels 32-32-64-128 on 32×32 images, normalised in groups of an example's own channels; 16 examples."""
    channels, side, size, groups = ((4, 4, 8), 8, 3, 2) if small else ((32, 32, 64, 128), 32, 16, 8)
    return residual_of(name, channels, side=side, size=size, groups=groups)


def residual_of(name: str, channels: tuple[int, ...], *, side: int, size: int, groups: int) -> Model:
    """A residual net whose stem and blocks have the channels given; a block that changes them halves the sides."""
    keys = new_keys(6)

    def block(i: int, o: int) -> dict[str, Any]:
        kernels = {"first": matrix(keys(), 3, 3, i, o), "second": matrix(keys(), 3, 3, o, o)}
        skip = {"skip": matrix(keys(), 1, 1, i, o)} if i != o else {}
        return {"norm_first": norm(i), "norm_second": norm(o), **kernels, **skip}

    params = {
        "stem": matrix(keys(), 3, 3, 3, channels[0]),
        "blocks": [block(i, o) for i, o in itertools.pairwise(channels)],
        "norm": norm(channels[-1]),
        "head": dense(keys, channels[-1], 10),
    }
    return Model(name, functools.partial(residual_loss, groups=groups), params, _labelled(keys, size, side))


def convnext_loss(params: Any, image: jax.Array, label: jax.Array) -> jax.Array:
    """Stages of blocks: a depthwise 7×7 convolution, a layer norm, two dense layers, a scale for each channel."""
    x = image[None]
    for stage in params["stages"]:
        patch = stage["patch"].shape[0]
        x = normalize(stage["norm"], convolution(stage["patch"], x, stride=patch))
        for block in stage["blocks"]:
            h = convolution(block["depthwise"], x, groups=x.shape[-1]) + block["bias"]
            h = jax.nn.gelu(affine(block["up"], normalize(block["norm"], h)))
            x = x + block["scale"] * affine(block["down"], h)
    return cross_entropy(affine(params["head"], normalize(params["norm"], x.mean((0, 1, 2)))), label)


def convnext(name: str, small: bool) -> Model:
    """Two stages of two blocks, 48 channels on 16×16 positions and 96 on 8×8, of 32×32 images; 16 examples."""
    channels, depth, side, size = ((3, 4, 6), 1, 16, 3) if small else ((3, 48, 96), 2, 32, 16)
    keys = new_keys(7)

    def block(d: int) -> dict[str, Any]:
        spatial = {"depthwise": matrix(keys(), 7, 7, 1, d), "bias": jnp.zeros(d), "norm": norm(d)}
        return {
            **spatial,
            "up": dense(keys, d, 4 * d),
            "down": dense(keys, 4 * d, d),
            "scale": jnp.full(d, 0.1),
        }

    stages = [
        {"patch": matrix(keys(), 2, 2, i, o), "norm": norm(o), "blocks": [block(o) for _ in range(depth)]}
        for i, o in itertools.pairwise(channels)
    ]
    params = {"stages": stages, "norm": norm(channels[-1]), "head": dense(keys, channels[-1], 10)}
    return Model(name, convnext_loss, params, _labelled(keys, size, side))


def vit_loss(params: Any, image: jax.Array, label: jax.Array, *, heads: int) -> jax.Array:
    """Patches by a convolution and a class token, learned positions, transformer layers, a head on the token."""
    kernel = params["patch"]["w"]
    patches = convolution(kernel, image[None], stride=kernel.shape[0]) + params["patch"]["b"]
    x = jnp.concatenate([params["class"][None], patches.reshape(-1, kernel.shape[-1])]) + params["positions"]
    for layer in params["layers"]:
        x = transform(layer, x, heads, causal=False)
    return cross_entropy(affine(params["head"], normalize(params["norm"], x[0])), label)


def vit(name: str, small: bool) -> Model:
    """Width 128, 4 layers, 4×4 patches of 32×32 images: 65 positions; 16 examples."""
    d, layers, side, patch, size, heads = (8, 1, 8, 4, 3, 2) if small else (128, 4, 32, 4, 16, 4)
    return vit_of(name, d=d, layers=layers, side=side, patch=patch, size=size, heads=heads)


def vit_of(name: str, *, d: int, layers: int, side: int, patch: int, size: int, heads: int) -> Model:
    """A vision transformer of the sizes given."""
    keys = new_keys(8)
    params = {
        "patch": {"w": matrix(keys(), patch, patch, 3, d), "b": jnp.zeros(d)},
        "class": 0.1 * jax.random.normal(keys(), (d,)),
        "positions": 0.1 * jax.random.normal(keys(), ((side // patch) ** 2 + 1, d)),
        "layers": [transformer_layer(keys, d) for _ in range(layers)],
        "norm": norm(d),
        "head": dense(keys, d, 10),
    }
    return Model(name, functools.partial(vit_loss, heads=heads), params, _labelled(keys, size, side))
