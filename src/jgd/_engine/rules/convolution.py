"""Convolutions with the kernel as the parameter: any layout, strides, padding, dilations, feature groups.

The groups are n, the output's positions t, the window and the channels in a group p, the channels out of a
group q. `left` is the input's patches; the gradient itself needs none: for each place in the window it is one
product of the input, shifted to that place, with δ.
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

from jgd._engine.factors import Outer, Shape, contract, group, split_axes
from jgd._engine.regions import Side, Site
from jgd._engine.uses import SiteData, Use
from jgd._engine.views import View

_AT_ONCE = 3  # places in the window; it divides most windows


def match(site: Site, position: int, view: View) -> Use | None:
    """The factors of a convolution's kernel."""
    params = site.eqn.params
    if position != 1 or params["batch_group_count"] != 1 or site.inputs[0].side != Side.DATA:
        return None
    if 0 in site.outputs[0].aval.shape:  # the window is larger than what it slides over
        return None
    around, own = split_axes(view, site.loops)
    if any(stride == 0 and size > 1 for size, stride in own):
        return None
    groups = params["feature_group_count"]
    out_channel, in_channel, *window = params["dimension_numbers"].rhs_spec
    out_size, out_stride = own[out_channel]
    each = out_size // groups
    stepping = [(i, axis) for i, axis in enumerate(around) if axis[1] != 0]
    # In the arrays below: the stepping loops, groups | positions | channels in, window | channels out.
    n_order, n = group(
        [*enumerate(axis for _, axis in stepping), (len(stepping), (groups, out_stride * each))]
    )
    p_order, p = group([(0, own[in_channel]), *((1 + k, own[d]) for k, d in enumerate(window))])
    shape = Shape(n, p, ((each, out_stride),))
    geometry = _Geometry(params, site, tuple(i for i, _ in stepping), n_order, p_order)
    positions = geometry.positions()
    return Use(
        "convolution", site, position, view.leaf, view.offset, shape.axes, shape, positions,
        geometry.factor, geometry.block, geometry.arrange, geometry.square,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Geometry:
    """How input and δ of one convolution become patches and factors."""

    params: Any
    site: Site
    stepping: tuple[int, ...]  # the loops that step through the kernel
    n_order: tuple[int, ...]
    p_order: tuple[int, ...]

    @property
    def groups(self) -> int:
        return self.params["feature_group_count"]

    @property
    def window(self) -> list[int]:
        return [self.site.inputs[1].aval.shape[d] for d in self.params["dimension_numbers"].rhs_spec[2:]]

    def positions(self) -> int:
        """T: the output's positions, and the steps that share the kernel."""
        out, spec = self.site.outputs[0].aval.shape, self.params["dimension_numbers"].out_spec
        total = out[spec[0]]
        for d in spec[2:]:
            total *= out[d]
        for i, (_, length) in enumerate(self.site.loops):
            total *= 1 if i in self.stepping else length
        return total

    def factor(self, data: SiteData) -> Outer:
        """Patches and δ."""
        padded = self._padded(data.values[0])
        slices = jnp.stack([self._shifted(padded, place) for place in self._places()], axis=-1)
        slices = slices.reshape(*slices.shape[:-1], *self.window)  # steps.., groups, t, channels, window..
        depth = len(self.stepping) + 1
        left = slices.transpose(*self.n_order, depth, *(depth + 1 + i for i in self.p_order))
        right = self._right(data.deltas[0])
        right = right.transpose(*self.n_order, depth, depth + 1)
        n, t = math.prod(left.shape[:depth]), left.shape[depth]
        return Outer(
            left.reshape(n, t, math.prod(left.shape[depth + 1 :])), right.reshape(n, t, right.shape[-1])
        )

    def block(self, data: SiteData) -> jax.Array:
        """The gradient, one product for each place in the window: (window, steps.., groups, channels, q)."""
        return self._of_places(self._product(data))

    def arrange(self, block: jax.Array) -> jax.Array:
        """The gradient's block as `(N, P, Q)`."""
        depth = len(self.stepping) + 1
        stacked = jnp.moveaxis(block, 0, -2)
        stacked = stacked.reshape(*stacked.shape[: depth + 1], *self.window, stacked.shape[-1])
        made = stacked.transpose(*self.n_order, *(depth + i for i in self.p_order), stacked.ndim - 1)
        return made.reshape(math.prod(made.shape[:depth]), -1, made.shape[-1])

    def square(self, data: SiteData) -> jax.Array:
        """The gradient's squared norm, of which no more than one place in the window is ever built."""
        product = self._product(data)
        square = lambda place: jnp.sum(jnp.square(product(place)))
        return jnp.sum(self._of_places(square))

    def _product(self, data: SiteData) -> Callable[[jax.Array], jax.Array]:
        """The gradient at one place in the window, as a function of the place."""
        right = self._right(data.deltas[0])
        padded = self._padded(data.values[0])
        return lambda place: contract("...tc,...tq->...cq", self._shifted(padded, place), right)

    def _of_places(self, fun: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """`fun` of each place in the window, some at a time: all at once would take a copy of the input for each."""
        places = jnp.asarray(self._places())
        step = lambda _, place: (None, fun(place))
        return lax.scan(step, None, places, unroll=min(_AT_ONCE, len(places)))[1]

    def _places(self) -> np.ndarray:
        """Where the places in the window begin in the padded input."""
        dilation = self.params["rhs_dilation"]
        steps = (range(0, size * d, d) for size, d in zip(self.window, dilation, strict=True))
        places = list(itertools.product(*steps))  # one, of no numbers, where there are no spatial axes
        return np.array(places, np.int32).reshape(len(places), len(self.window))

    def _right(self, delta: jax.Array) -> jax.Array:
        """δ as (stepping loops.., groups, t, channels out of a group)."""
        steps, shared = self._outside()
        depth = len(steps) + len(shared)
        spec = self.params["dimension_numbers"].out_spec
        channels = depth + spec[1]
        each = delta.shape[channels] // self.groups
        split = delta.reshape(*delta.shape[:channels], self.groups, each, *delta.shape[channels + 1 :])
        moved = lambda d: depth + d + (1 if depth + d > channels else 0)
        positions = [*shared, moved(spec[0]), *(moved(d) for d in spec[2:])]
        right = split.transpose(*steps, channels, *positions, channels + 1)
        return right.reshape(*right.shape[: len(steps) + 1], -1, right.shape[-1])

    def _outside(self) -> tuple[list[int], list[int]]:
        """The axes around one convolution's own: those that step through the kernel, and those that share it."""
        axes = range(len(self.site.loops))
        return [i for i in axes if i in self.stepping], [i for i in axes if i not in self.stepping]

    def _padded(self, x: jax.Array) -> jax.Array:
        """The input dilated and padded, as the convolution sees it: (loops.., batch, channels, space)."""
        steps, shared = self._outside()
        depth = len(steps) + len(shared)
        x = x.transpose(*steps, *shared, *(depth + d for d in self.params["dimension_numbers"].lhs_spec))
        space = [
            (low, high, dilation - 1)
            for (low, high), dilation in zip(self.params["padding"], self.params["lhs_dilation"], strict=True)
        ]
        return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0)] * (depth + 2) + space)

    def _shifted(self, padded: jax.Array, place: jax.Array | np.ndarray) -> jax.Array:
        """The input that δ meets at one place in the window: (stepping loops.., groups, t, channels)."""
        first, depth = len(self.stepping), len(self.site.loops)
        numbers, strides = self.params["dimension_numbers"], self.params["window_strides"]
        out = [self.site.outputs[0].aval.shape[d] for d in numbers.out_spec[2:]]
        sizes = [(o - 1) * stride + 1 for o, stride in zip(out, strides, strict=True)]
        lead = padded.shape[: depth + 2]
        piece = lax.dynamic_slice(padded, [*np.zeros(len(lead), place.dtype), *place], [*lead, *sizes])
        piece = lax.slice(piece, [0] * piece.ndim, piece.shape, [*[1] * len(lead), *strides])
        each = lead[depth + 1] // self.groups
        split = piece.reshape(*lead[: depth + 1], self.groups, each, *out)
        axes = [*range(first), depth + 1, *range(first, depth + 1), *range(depth + 3, split.ndim), depth + 2]
        piece = split.transpose(axes)
        return piece.reshape(*piece.shape[: first + 1], -1, piece.shape[-1])
