"""Convolutions with the kernel as the parameter: any layout, strides, padding, dilations, feature groups.

The groups are n, the output's positions t, the window and the channels in a group p, the channels out of a
group q. `left` is the input's patches; the gradient itself needs none: for each place in the window it is one
product of the input, shifted to that place, with the cotangent. Where windows do not overlap, patches are the input in
another order, and the gradient is one product.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jgd._engine.batch_sums import scaled
from jgd._engine.dtypes import accumulation_dtype
from jgd._engine.factors import Full, Layout, Outer, contract, group, inner_product, split_axes
from jgd._engine.jaxprs import prim
from jgd._engine.norms import product_of_lengths
from jgd._engine.rules.rule import Rule, SiteData
from jgd._engine.sites import Site
from jgd._engine.views import View
from jgd._mesh import varying

_AT_ONCE = 3  # places in the window; it divides most windows


@dataclass(frozen=True)
class Convolution(Rule):
    """The gradient at a convolution's kernel.

    Attributes:
        params: the equation's parameters.
        kernel: the kernel's shape.
        out: the output's shape.
        lengths: of the loops around.
        stepping: which of them step through the kernel.
        n_order, p_order: the order in memory of the axes of n and p.
    """

    params: tuple[tuple[str, Any], ...]
    kernel: tuple[int, ...]
    out: tuple[int, ...]
    lengths: tuple[int, ...]
    stepping: tuple[int, ...]
    n_order: tuple[int, ...]
    p_order: tuple[int, ...]

    @property
    def is_linear(self) -> bool:
        return True

    @property
    def is_product(self) -> bool:
        return True

    @property
    def dot_builds_gradient(self) -> bool:
        return True

    @property
    def is_wrong_when_sharded(self) -> bool:
        return self.groups > 1

    @property
    def groups(self) -> int:
        """The number of feature groups."""
        return self._param("feature_group_count")

    @property
    def _is_apart(self) -> bool:
        """Whether no two windows overlap."""
        each = zip(self._window, self._param("window_strides"), self._param("rhs_dilation"), strict=True)
        return all(
            (size - 1) * dilation < stride and (dilation == 1 or size == 1) for size, stride, dilation in each
        )

    @property
    def _window(self) -> list[int]:
        return [self.kernel[d] for d in self._param("dimension_numbers").rhs_spec[2:]]

    def _param(self, name: str) -> Any:
        return dict(self.params)[name]

    def factor(self, data: SiteData) -> Outer:
        """Patches and the cotangent."""
        padded = self._padded(data.values[0])
        if self._is_apart:
            slices = self._patches(padded)
        else:
            slices = jnp.stack([self._shifted(padded, place) for place in self._places()], axis=-1)
        slices = slices.reshape(*slices.shape[:-1], *self._window)  # steps.., groups, t, channels, window..
        depth = len(self.stepping) + 1
        left = slices.transpose(*self.n_order, depth, *(depth + 1 + i for i in self.p_order))
        right = self._right(data.cotangent)
        right = right.transpose(*self.n_order, depth, depth + 1)
        n, t = math.prod(left.shape[:depth]), left.shape[depth]
        return Outer(
            left.reshape(n, t, math.prod(left.shape[depth + 1 :])), right.reshape(n, t, right.shape[-1])
        )

    def native(self, data: SiteData) -> jax.Array:
        """The gradient, one product for each place in the window: (window, steps.., groups, channels, q).

        Where windows do not overlap, it is one product: (steps.., groups, channels, window, q).
        """
        if not self._is_apart:
            return self._of_places(self._product(data))
        patches, right = self._patches(self._padded(data.values[0])), self._right(data.cotangent)
        each = patches.shape[-2:]
        left = patches.reshape(*patches.shape[:-2], math.prod(each))
        made = contract("...tp,...tq->...pq", left, right, precision=None)
        return made.reshape(*made.shape[:-2], *each, made.shape[-1])

    def to_leaf_order(self, native: jax.Array) -> jax.Array:
        depth = len(self.stepping) + 1
        stacked = native if self._is_apart else jnp.moveaxis(native, 0, -2)
        stacked = stacked.reshape(*stacked.shape[: depth + 1], *self._window, stacked.shape[-1])
        made = stacked.transpose(*self.n_order, *(depth + i for i in self.p_order), stacked.ndim - 1)
        return self.layout.flatten(made.reshape(math.prod(made.shape[:depth]), -1, made.shape[-1]))

    def dot(self, data: SiteData, direction: jax.Array) -> jax.Array:
        return inner_product(self.gradient(data), direction)

    def batch_factor(self, data: SiteData, weights: jax.Array | None) -> Full:
        """By the transpose of the convolution of the whole batch."""
        x, cotangent = data.values[0], data.cotangent
        if weights is not None:
            cotangent = scaled(cotangent, self.depth, weights)
        # A convolution accumulates in the dtype of its operands.
        cotangent = cotangent.astype(accumulation_dtype(cotangent))
        x = x.astype(cotangent.dtype)

        # Where real and imaginary parts are taken apart, the dtype is theirs.
        params = dict(self.params) | {"preferred_element_type": cotangent.dtype}

        def convolve(kernel: jax.Array, x: jax.Array) -> jax.Array:
            return prim.conv_general_dilated_p.bind(x, kernel.astype(x.dtype), **params)

        outputs = jax.vmap(convolve, in_axes=(None, 0))  # over the examples
        for i in reversed(range(self.depth)):
            outputs = jax.vmap(outputs, in_axes=(0 if i in self.stepping else None, 0))
        steps = [self.lengths[i] for i in self.stepping]
        like = jnp.zeros((*steps, *self.kernel), accumulation_dtype(cotangent))
        like = varying(like, (x, cotangent))
        (total,) = jax.linear_transpose(lambda kernel: outputs(kernel, x), like)(cotangent)
        return Full(self._in_leaf_order(total))

    def _in_leaf_order(self, kernel: jax.Array) -> jax.Array:
        """An array like the kernel, the stepping loops' axes leading, flat in the order of the leaf's memory."""
        lead = len(self.stepping)
        out_channel, in_channel, *window = (lead + d for d in self._param("dimension_numbers").rhs_spec)
        each = kernel.shape[out_channel] // self.groups
        apart = jnp.moveaxis(kernel, out_channel, -1)
        moved = lambda d: d - (d > out_channel)
        apart = apart.transpose(*range(lead), moved(in_channel), *map(moved, window), apart.ndim - 1)
        apart = apart.reshape(*apart.shape[:-1], self.groups, each)  # steps.., channels, window.., groups, q
        n_axes = [*range(lead), apart.ndim - 2]
        p_axes = [lead + i for i in range(1 + len(window))]
        ordered = [n_axes[i] for i in self.n_order] + [p_axes[i] for i in self.p_order] + [apart.ndim - 1]
        n, p, q = self.layout.sizes()
        return self.layout.flatten(apart.transpose(ordered).reshape(n, p, q))

    def of_pieces(self, fun: Callable[[jax.Array], Any], data: SiteData) -> Any:
        """`fun` of the gradient at each place in the window. No more is built than a few places."""
        if self._is_apart:
            return super().of_pieces(fun, data)
        product = self._product(data)
        return self._of_places(lambda place: fun(product(place)))

    def sum_bound(self, data: SiteData) -> jax.Array:
        """Every number is in at most as many patches as the window has places."""
        lengths = product_of_lengths(data.values[0], data.cotangent, sorted(self.stepping))
        return lengths * math.sqrt(math.prod(self._window))

    def _product(self, data: SiteData) -> Callable[[jax.Array], jax.Array]:
        """The gradient at one place in the window, as a function of the place."""
        right = self._right(data.cotangent)
        padded = self._padded(data.values[0])
        spec = "...tc,...tq->...cq"
        return lambda place: contract(spec, self._shifted(padded, place), right, precision=None)

    def _of_places(self, fun: Callable[[jax.Array], Any]) -> Any:
        """`fun` of each place in the window, some at a time: all at once would take a copy of the input for each."""
        places = jnp.asarray(self._places())
        step = lambda _, place: (None, fun(place))
        return lax.scan(step, None, places, unroll=min(_AT_ONCE, len(places)))[1]

    def _patches(self, padded: jax.Array) -> jax.Array:
        """What each window sees, where they do not overlap: (stepping loops.., groups, t, channels, window)."""
        first, depth = len(self.stepping), self.depth
        numbers, strides = self._param("dimension_numbers"), self._param("window_strides")
        out = [self.out[d] for d in numbers.out_spec[2:]]
        lead, space = padded.shape[: depth + 2], padded.shape[depth + 2 :]
        each = lead[depth + 1] // self.groups
        # Up to where the last stride ends, which may be before or behind the end.
        rest = [(0, o * stride - size, 0) for o, stride, size in zip(out, strides, space, strict=True)]
        padded = lax.pad(padded, jnp.zeros((), padded.dtype), [(0, 0, 0)] * len(lead) + rest)
        pairs = [n for pair in zip(out, strides, strict=True) for n in pair]
        split = padded.reshape(*lead[: depth + 1], self.groups, each, *pairs)
        for i, size in enumerate(self._window):
            split = lax.slice_in_dim(split, 0, size, axis=depth + 4 + 2 * i)
        outside, within = range(depth + 3, split.ndim, 2), range(depth + 4, split.ndim, 2)
        axes = [*range(first), depth + 1, *range(first, depth + 1), *outside, depth + 2, *within]
        split = split.transpose(axes)
        places = math.prod(self._window)
        return split.reshape(*split.shape[: first + 1], -1, each, places)

    def _places(self) -> np.ndarray:
        """Where the places in the window begin in the padded input."""
        dilation = self._param("rhs_dilation")
        steps = (range(0, size * d, d) for size, d in zip(self._window, dilation, strict=True))
        places = list(itertools.product(*steps))  # one, of no numbers, where there are no spatial axes
        return np.array(places, np.int32).reshape(len(places), len(self._window))

    def _right(self, delta: jax.Array) -> jax.Array:
        """The cotangent as (stepping loops.., groups, t, channels out of a group)."""
        steps, shared = self._outside()
        depth = len(steps) + len(shared)
        spec = self._param("dimension_numbers").out_spec
        channels = depth + spec[1]
        each = delta.shape[channels] // self.groups
        split = delta.reshape(*delta.shape[:channels], self.groups, each, *delta.shape[channels + 1 :])
        moved = lambda d: depth + d + (1 if depth + d > channels else 0)
        positions = [*shared, moved(spec[0]), *(moved(d) for d in spec[2:])]
        right = split.transpose(*steps, channels, *positions, channels + 1)
        return right.reshape(*right.shape[: len(steps) + 1], -1, right.shape[-1])

    def _outside(self) -> tuple[list[int], list[int]]:
        """The loops' axes: those of loops that step through the kernel, and those of loops that share it."""
        axes = range(self.depth)
        return [i for i in axes if i in self.stepping], [i for i in axes if i not in self.stepping]

    def _padded(self, x: jax.Array) -> jax.Array:
        """The input dilated and padded, as the convolution sees it: (loops.., batch, channels, space)."""
        steps, shared = self._outside()
        depth = len(steps) + len(shared)
        x = x.transpose(*steps, *shared, *(depth + d for d in self._param("dimension_numbers").lhs_spec))
        space = [
            (low, high, dilation - 1)
            for (low, high), dilation in zip(self._param("padding"), self._param("lhs_dilation"), strict=True)
        ]
        return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0)] * (depth + 2) + space)

    def _shifted(self, padded: jax.Array, place: jax.Array | np.ndarray) -> jax.Array:
        """The input that the cotangent meets at one place in the window: (stepping loops.., groups, t, channels)."""
        first, depth = len(self.stepping), self.depth
        numbers, strides = self._param("dimension_numbers"), self._param("window_strides")
        out = [self.out[d] for d in numbers.out_spec[2:]]
        sizes = [(o - 1) * stride + 1 for o, stride in zip(out, strides, strict=True)]
        lead = padded.shape[: depth + 2]
        piece = lax.dynamic_slice(padded, [*np.zeros(len(lead), place.dtype), *place], [*lead, *sizes])
        piece = lax.slice(piece, [0] * piece.ndim, piece.shape, [*[1] * len(lead), *strides])
        each = lead[depth + 1] // self.groups
        split = piece.reshape(*lead[: depth + 1], self.groups, each, *out)
        axes = [*range(first), depth + 1, *range(first, depth + 1), *range(depth + 3, split.ndim), depth + 2]
        piece = split.transpose(axes)
        return piece.reshape(*piece.shape[: first + 1], -1, piece.shape[-1])


def match(site: Site, position: int, view: View) -> Convolution | None:
    """The rule of a convolution's kernel."""
    params = site.eqn_params
    if position != 1 or params["batch_group_count"] != 1 or not site.is_data(0):
        return None
    out = site.outputs[0].aval.shape
    if 0 in out:  # the window is larger than what it slides over
        return None
    around, own = split_axes(view, site.loops)
    if any(stride == 0 and size > 1 for size, stride in own):
        return None
    groups = params["feature_group_count"]
    out_channel, in_channel, *window = params["dimension_numbers"].rhs_spec
    out_size, out_stride = own[out_channel]
    each = out_size // groups
    stepping = [(i, axis) for i, axis in enumerate(around) if axis[1] != 0]
    # In the arrays above: the stepping loops, groups | positions | channels in, window | channels out.
    n_order, n = group(
        [*enumerate(axis for _, axis in stepping), (len(stepping), (groups, out_stride * each))]
    )
    p_order, p = group([(0, own[in_channel]), *((1 + k, own[d]) for k, d in enumerate(window))])
    steps = tuple(i for i, _ in stepping)
    lengths = tuple(length for _, length in site.loops)
    spec = params["dimension_numbers"].out_spec
    positions = math.prod(out[d] for d in (spec[0], *spec[2:]))
    positions *= math.prod(length for i, length in enumerate(lengths) if i not in steps)
    return Convolution(
        Layout(n, p, ((each, out_stride),)), positions, len(lengths), tuple(params.items()),
        tuple(site.inputs[1].aval.shape), tuple(out), lengths, steps, n_order, p_order,
    )  # fmt: skip
