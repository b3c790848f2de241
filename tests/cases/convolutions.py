"""Convolutions of every kind: dimensions, layouts, strides, padding, dilations, groups."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from cases import B, case
from cases.dense import squared

# name: (image shape, kernel shape, layouts, arguments of conv_general_dilated)
_LAYERS = {
    "conv1d": ((8, 3), (3, 3, 4), ("NWC", "WIO", "NWC"), {}),
    "conv1d_many_options": (
        (9, 4), (3, 2, 6), ("NWC", "WIO", "NWC"),
        {"window_strides": (2,), "padding": [(2, 1)], "rhs_dilation": (2,), "feature_group_count": 2},
    ),
    "conv1d_channels_first": ((3, 8), (4, 3, 3), ("NCW", "OIW", "NCW"), {"window_strides": (2,)}),
    "conv2d_same": ((6, 5, 3), (3, 2, 3, 4), ("NHWC", "HWIO", "NHWC"), {"padding": "SAME"}),
    "conv2d_valid": ((6, 5, 3), (3, 2, 3, 4), ("NHWC", "HWIO", "NHWC"), {}),
    "conv2d_channels_first": ((3, 6, 5), (4, 3, 3, 2), ("NCHW", "OIHW", "NCHW"), {"padding": "SAME"}),
    "conv2d_mixed_layouts": ((3, 6, 5), (3, 2, 3, 4), ("NCHW", "HWIO", "NHWC"), {"padding": "SAME"}),
    "conv2d_strided_same": (
        (7, 6, 3), (3, 2, 3, 4), ("NHWC", "HWIO", "NHWC"), {"window_strides": (2, 3), "padding": "SAME"},
    ),
    "conv2d_strided_valid": (
        (8, 7, 3), (3, 2, 3, 4), ("NHWC", "HWIO", "NHWC"), {"window_strides": (2, 3)},
    ),
    "conv2d_patches": ((6, 8, 3), (2, 4, 3, 5), ("NHWC", "HWIO", "NHWC"), {"window_strides": (2, 4)}),
    "conv2d_negative_padding": (
        (7, 6, 3), (2, 3, 3, 4), ("NHWC", "HWIO", "NHWC"), {"padding": [(-1, 2), (1, -2)]},
    ),
    "conv2d_dilated_kernel": (
        (8, 7, 2), (3, 2, 2, 3), ("NHWC", "HWIO", "NHWC"), {"rhs_dilation": (2, 3), "padding": "SAME"},
    ),
    "conv2d_dilated_image": (
        (4, 3, 3), (3, 2, 3, 2), ("NHWC", "HWIO", "NHWC"),
        {"lhs_dilation": (2, 3), "padding": [(1, 2), (0, 1)]},
    ),
    "conv2d_all_options": (
        (5, 4, 6), (2, 3, 3, 4), ("NHWC", "HWIO", "NHWC"),
        {"window_strides": (2, 1), "padding": [(2, 2), (3, 0)], "lhs_dilation": (2, 1),
         "rhs_dilation": (2, 2), "feature_group_count": 2},
    ),
    "conv2d_groups": ((5, 4, 6), (2, 3, 2, 9), ("NHWC", "HWIO", "NHWC"), {"feature_group_count": 3}),
    "conv2d_groups_channels_first": (
        (6, 5, 4), (9, 2, 2, 3), ("NCHW", "OIHW", "NCHW"), {"feature_group_count": 3, "padding": "SAME"},
    ),
    "conv2d_depthwise": (
        (5, 4, 3), (3, 2, 1, 3), ("NHWC", "HWIO", "NHWC"), {"feature_group_count": 3, "padding": "SAME"},
    ),
    "conv2d_depthwise_multiplied": (
        (5, 4, 3), (3, 2, 1, 6), ("NHWC", "HWIO", "NHWC"), {"feature_group_count": 3},
    ),
    "conv2d_pointwise": ((5, 4, 3), (1, 1, 3, 2), ("NHWC", "HWIO", "NHWC"), {}),
    "conv2d_pointwise_strided": (
        (5, 4, 3), (1, 1, 3, 2), ("NHWC", "HWIO", "NHWC"), {"window_strides": (2, 3)},
    ),
    "conv2d_whole_image": ((5, 4, 3), (5, 4, 3, 2), ("NHWC", "HWIO", "NHWC"), {}),
    "conv3d": ((4, 5, 3, 2), (2, 3, 2, 2, 3), ("NDHWC", "DHWIO", "NDHWC"), {"padding": "SAME"}),
    "conv3d_strided_grouped": (
        (4, 4, 5, 3), (6, 2, 2, 3, 2), ("NCDHW", "OIDHW", "NCDHW"),
        {"window_strides": (1, 2, 1), "feature_group_count": 2, "rhs_dilation": (2, 1, 1)},
    ),
}  # fmt: skip


def _convolution(draw, image, kernel, layouts, options):
    options = {"window_strides": (1,) * (len(kernel) - 2), "padding": "VALID"} | options

    def loss(p, x):
        y = lax.conv_general_dilated(x[None], p["kernel"], dimension_numbers=layouts, **options)
        channels = [1] * y.ndim
        channels[layouts[2].index("C")] = -1
        y = jnp.tanh(y + p["bias"].reshape(channels))
        return squared(y) + jnp.sum(jnp.sin(y))

    outputs = kernel[layouts[1].index("O")]
    return loss, {"kernel": draw(*kernel), "bias": draw(outputs)}, (draw(B, *image),)


for _name, (_image, _kernel, _layouts, _options) in _LAYERS.items():
    case(
        functools.partial(_convolution, image=_image, kernel=_kernel, layouts=_layouts, options=_options),
        name=_name,
    )


@case
def transposed_convolution(draw):
    def loss(p, x):
        y = lax.conv_transpose(x[None], p, (2, 3), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return squared(jnp.tanh(y))

    return loss, draw(3, 2, 3, 4), (draw(B, 4, 3, 3),)


@case
def transposed_convolution_of_a_forward_kernel(draw):
    """`transpose_kernel` flips and swaps the kernel: a path that reverses axes."""

    def loss(p, x):
        y = lax.conv_transpose(
            x[None], p, (2, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), transpose_kernel=True
        )
        return squared(jnp.tanh(y))

    return loss, draw(3, 2, 4, 3), (draw(B, 4, 3, 3),)


@case
def convolutional_network(draw):
    def loss(p, x, y):
        conv = functools.partial(
            lax.conv_general_dilated, padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(conv(x[None], p["conv1"], (1, 1)) + p["bias1"])
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        x = jax.nn.relu(conv(x, p["conv2"], (2, 2)))
        logits = x.reshape(-1) @ p["head"]
        return jax.nn.logsumexp(logits) - logits[y]

    params = {"conv1": draw(3, 3, 1, 4), "bias1": draw(4), "conv2": draw(2, 2, 4, 5), "head": draw(20, 3)}
    return loss, params, (draw(B, 8, 8, 1), draw.integers(3, B))


@case
def one_kernel_at_two_scales(draw):
    def loss(p, x):
        conv = lambda x: lax.conv_general_dilated(
            x[None], p, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return squared(jnp.tanh(conv(x))) + squared(jnp.sin(conv(x[::2, ::2])))

    return loss, draw(3, 2, 3, 4), (draw(B, 6, 5, 3),)


@case
def generated_kernel(draw):
    """A kernel that other parameters make: a path that is no view."""

    def loss(p, x):
        kernel = jnp.tanh(jnp.einsum("hwk,kio->hwio", p["codes"], p["decoder"]))
        y = lax.conv_general_dilated(
            x[None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return squared(jnp.tanh(y))

    return loss, {"codes": draw(3, 2, 5), "decoder": draw(5, 3, 4)}, (draw(B, 5, 4, 3),)


@case
def standardised_kernel(draw):
    def loss(p, x):
        kernel = (p - p.mean((0, 1, 2))) / jnp.sqrt(p.var((0, 1, 2)) + 1e-3)
        y = lax.conv_general_dilated(
            x[None], kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return squared(jnp.tanh(y))

    return loss, draw(3, 2, 3, 4), (draw(B, 5, 4, 3),)


@case
def kernel_from_the_data(draw):
    """Dynamic filters: the parameter is the image, the data makes the kernel."""

    def loss(p, x):
        y = lax.conv_general_dilated(p[None], x, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return squared(jnp.tanh(y))

    return loss, draw(5, 4, 3), (draw(B, 3, 2, 3, 2),)


@case
def images_as_a_batch_of_frames(draw):
    """The example itself has several images: a batch axis inside the convolution."""

    def loss(p, frames):
        y = lax.conv_general_dilated(frames, p, (1, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return squared(jnp.tanh(y))

    return loss, draw(3, 2, 3, 4), (draw(B, 2, 5, 4, 3),)


@case
def batch_groups(draw):
    def loss(p, frames):
        y = lax.conv_general_dilated(
            frames, p, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), batch_group_count=2
        )
        return squared(jnp.tanh(y))

    return loss, draw(3, 3, 4), (draw(B, 2, 6, 3),)


@case
def convolve_with_a_parameter(draw):
    loss = lambda p, x: squared(jnp.tanh(jnp.convolve(x, p, mode="full")))
    return loss, draw(3), (draw(B, 7),)


@case
def convolution_without_spatial_axes(draw):
    def loss(p, x):
        names = {"dimension_numbers": ("NC", "IO", "NC")}
        y = jnp.tanh(lax.conv_general_dilated(x, p["whole"], (), [], **names))
        return squared(
            jnp.tanh(lax.conv_general_dilated(y, p["groups"], (), [], feature_group_count=2, **names))
        )

    return loss, {"whole": draw(3, 4), "groups": draw(2, 6)}, (draw(B, 7, 3),)
