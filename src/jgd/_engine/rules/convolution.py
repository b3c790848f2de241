"""Convolutions with the kernel as the parameter: any layout, strides, padding, dilations, feature groups.

The groups are n, the output's positions t, the window and the channels in a group p, the channels out of a
group q. `left` is the input's patches; the gradient itself needs none: for each place in the window it is one
product of the input, shifted to that place, with δ.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jgd._engine.factors import Outer, Shape, contract, group, split_axes
from jgd._engine.regions import Side, Site
from jgd._engine.uses import SiteData, Use
from jgd._engine.views import View


def match(site: Site, position: int, view: View) -> Use | None:
    """The factors of a convolution's kernel."""
    params = site.eqn.params
    if position != 1 or params["batch_group_count"] != 1 or site.inputs[0].side != Side.DATA:
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
        slices = jnp.stack(
            list(self._shifted(data.values[0])), axis=-1
        )  # (steps.., groups, t, channels, window)
        slices = slices.reshape(*slices.shape[:-1], *self.window)
        depth = len(self.stepping) + 1
        left = slices.transpose(*self.n_order, depth, *(depth + 1 + i for i in self.p_order))
        right = self._right(data.deltas[0])
        right = right.transpose(*self.n_order, depth, depth + 1)
        n, t = math.prod(left.shape[:depth]), left.shape[depth]
        return Outer(left.reshape(n, t, -1), right.reshape(n, t, -1))

    def block(self, data: SiteData) -> jax.Array:
        """The gradient, one product for each place in the window: (window, steps.., groups, channels, q)."""
        return jnp.stack(list(self._products(data)))

    def arrange(self, block: jax.Array) -> jax.Array:
        """The gradient's block as `(N, P, Q)`."""
        depth = len(self.stepping) + 1
        stacked = jnp.moveaxis(block, 0, -2)
        stacked = stacked.reshape(*stacked.shape[: depth + 1], *self.window, stacked.shape[-1])
        made = stacked.transpose(*self.n_order, *(depth + i for i in self.p_order), stacked.ndim - 1)
        return made.reshape(math.prod(made.shape[:depth]), -1, made.shape[-1])

    def square(self, data: SiteData) -> jax.Array:
        """The gradient's squared norm, of which no more than one place in the window is ever built."""
        return functools.reduce(jnp.add, (jnp.sum(jnp.square(product)) for product in self._products(data)))

    def _products(self, data: SiteData) -> Iterator[jax.Array]:
        right = self._right(data.deltas[0])
        return (contract("...tc,...tq->...cq", left, right) for left in self._shifted(data.values[0]))

    def _right(self, delta: jax.Array) -> jax.Array:
        """δ as (stepping loops.., groups, t, channels out of a group)."""
        steps, shared = self._outside()
        depth = len(steps) + len(shared)
        spec = self.params["dimension_numbers"].out_spec
        channels = depth + spec[1]
        split = delta.reshape(*delta.shape[:channels], self.groups, -1, *delta.shape[channels + 1 :])
        moved = lambda d: depth + d + (1 if depth + d > channels else 0)
        positions = [*shared, moved(spec[0]), *(moved(d) for d in spec[2:])]
        right = split.transpose(*steps, channels, *positions, channels + 1)
        return right.reshape(*right.shape[: len(steps) + 1], -1, right.shape[-1])

    def _outside(self) -> tuple[list[int], list[int]]:
        """The axes around one convolution's own: those that step through the kernel, and those that share it."""
        axes = range(len(self.site.loops))
        return [i for i in axes if i in self.stepping], [i for i in axes if i not in self.stepping]

    def _shifted(self, x: jax.Array) -> Iterator[jax.Array]:
        """For each place in the window, the input that δ meets there: (stepping loops.., groups, t, channels)."""
        steps, shared = self._outside()
        depth = len(steps) + len(shared)
        numbers = self.params["dimension_numbers"]
        x = self._padded(x.transpose(*steps, *shared, *(depth + d for d in numbers.lhs_spec)), depth)
        out = [self.site.outputs[0].aval.shape[d] for d in numbers.out_spec[2:]]
        stride, dilation = self.params["window_strides"], self.params["rhs_dilation"]
        lead, first = depth + 2, len(steps)
        for place in itertools.product(*(range(size) for size in self.window)):
            starts = [k * d for k, d in zip(place, dilation, strict=True)]
            limits = [s + (o - 1) * w + 1 for s, o, w in zip(starts, out, stride, strict=True)]
            piece = lax.slice(
                x, (0,) * lead + tuple(starts), x.shape[:lead] + tuple(limits), (1,) * lead + tuple(stride)
            )
            split = piece.reshape(*piece.shape[: depth + 1], self.groups, -1, *out)
            axes = [
                *range(first),
                depth + 1,
                *range(first, depth + 1),
                *range(depth + 3, split.ndim),
                depth + 2,
            ]
            piece = split.transpose(axes)
            yield piece.reshape(*piece.shape[: first + 1], -1, piece.shape[-1])

    def _padded(self, x: jax.Array, depth: int) -> jax.Array:
        """The input dilated and padded, as the convolution sees it: (loops.., batch, channels, space)."""
        space = [
            (low, high, dilation - 1)
            for (low, high), dilation in zip(self.params["padding"], self.params["lhs_dilation"], strict=True)
        ]
        return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0)] * (depth + 2) + space)
