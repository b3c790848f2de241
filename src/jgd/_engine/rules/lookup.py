"""Lookups of rows: `gather` and `dynamic_slice` of a parameter by indices that depend on the example.

The gradient is the cotangent, added to the rows that were looked up. `left` would be the one-hot of the indices; only
the row numbers are kept. Loops that step through the parameter choose rows too. A window, several rows that follow each
other along an axis, is as many lookups, one for each of its places.

Ids are of any integer type and may lie out of bounds. These are treated as JAX's derivative treats them: a lookup that
clamps adds the cotangent to the row at the edge, any other adds it nowhere, whatever was read in the row's place.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import GatherScatterMode

from jgd._engine.batch_sums import along, scaled
from jgd._engine.factors import AxisGrouping, DistinctRows, Layout, Rows, group, product, split_axes
from jgd._engine.rules.rule import Rule, SiteData
from jgd._engine.sites import Site
from jgd._engine.views import View

_MOST_ROWS = np.iinfo(np.int32).max  # that int32 can number, with one number left for no row

# Where the number of a row comes from: a step of a loop, by the loop's axis; a constant; an operand of the equation,
# or one place along its last axis.
Source = tuple[str, int] | tuple[str, int, int]


class Window(NamedTuple):
    """How many rows that follow each other are looked up along an axis of p, and by which axis of the positions."""

    size: int = 1
    position: int = -1


@dataclass(frozen=True)
class Lookup(Rule):
    """Rows of a parameter, by one or several of its axes.

    Attributes:
        sources: where the index along each axis of p comes from; of a window, its first.
        windows: the window along each axis of p.
        lengths: the sizes of the positions: the loops', then those of the indices, then the windows'.
        right: how the cotangent becomes rows.
        clamps: whether an id out of bounds means the nearest row, not none.
    """

    sources: tuple[Source, ...]
    windows: tuple[Window, ...]
    lengths: tuple[int, ...]
    right: AxisGrouping
    clamps: bool

    @property
    def is_linear(self) -> bool:
        return True

    @property
    def folds_batch(self) -> bool:
        return True

    @property
    def is_lookup(self) -> bool:
        return True

    def factor(self, data: SiteData) -> Rows:
        number, valid = jnp.zeros(self.lengths, jnp.int32), jnp.ones(self.lengths, bool)
        for source, window, (size, _) in zip(self.sources, self.windows, self.layout.p, strict=True):
            first = self._index(source, size, data)
            inside = _within(first, size - window.size + 1)
            valid, first = valid & (inside == first), inside.astype(jnp.int32)
            number = number * size + first + self._along(window.position, window.size)
        cotangent = self.right(data.cotangent)
        rows, kind = product(self.layout.p), DistinctRows if self._are_distinct else Rows
        if self.clamps:
            return kind(number.reshape(-1), cotangent, rows)
        # A value that was filled in may have a cotangent that is not finite. It must reach no sum, not even times 0.
        valid = valid.reshape(-1)
        met = jnp.where(valid[None, :, None], cotangent, jnp.zeros((), cotangent.dtype))
        return kind(jnp.where(valid, number.reshape(-1), rows), met, rows)

    @property
    def _are_distinct(self) -> bool:
        """Whether no two positions can meet the same row: each is a step through the parameter, or in a window."""
        known = {source[1] for source in self.sources if source[0] == "loop"}
        known |= {window.position for window in self.windows}
        return all(size == 1 or i in known for i, size in enumerate(self.lengths))

    def _along(self, position: int, size: int) -> jax.Array:
        """0, 1, 2, ... along one axis of the positions; 0 where there is none."""
        if position < 0:
            return jnp.zeros((), jnp.int32)
        return along(jnp.arange(size, dtype=jnp.int32), position, len(self.lengths))

    def _index(self, source: Source, size: int, data: SiteData) -> jax.Array:
        kind, number, *place = source
        if kind == "loop":
            return self._along(number, size)
        if kind == "constant":
            return jnp.broadcast_to(jnp.asarray(number), self.lengths)
        index = data.values[number][..., place[0]] if place else data.values[number]
        return index.reshape(*index.shape, *(1,) * (len(self.lengths) - index.ndim))

    def batch_factor(self, data: SiteData, weights: jax.Array | None) -> Rows:
        if weights is not None:
            scale = lambda x: scaled(x, self.depth, weights)
            data = SiteData(data.values, [scale(x) for x in data.cotangents])
        each = jax.vmap(self.factor, in_axes=self.depth)(
            data
        )  # whose rows, of all examples, are not distinct
        columns = each.right.shape[-1]
        return Rows(each.index.reshape(-1), each.right.reshape(1, -1, columns), product(self.layout.p))


def match_gather(site: Site, position: int, view: View) -> Lookup | None:
    """Rows of a parameter, or windows, by one or several of its axes."""
    params = site.eqn_params
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    operand, indexed = site.inputs[0].aval, numbers.start_index_map
    if position != 0 or numbers.operand_batching_dims or not site.is_data(1):
        return None
    if any(sizes[d] != operand.shape[d] for d in range(operand.ndim) if d not in indexed):
        return None
    mode = GatherScatterMode.from_any(params["mode"])
    if mode not in (
        GatherScatterMode.CLIP,
        GatherScatterMode.FILL_OR_DROP,
        GatherScatterMode.PROMISE_IN_BOUNDS,
    ):
        return None
    kept = [d for d in range(operand.ndim) if d not in numbers.collapsed_slice_dims]
    where = dict(zip(kept, numbers.offset_dims, strict=True))  # of each axis of the row, in the output
    batch = [i for i in range(site.outputs[0].aval.ndim) if i not in numbers.offset_dims]
    sources = [("operand", 1, i) for i in range(len(indexed))]
    windows = {d: sizes[d] for d in indexed if sizes[d] > 1}
    return _rows(site, view, indexed, sources, where, batch, windows, clamps=mode == GatherScatterMode.CLIP)


def match_dynamic_slice(site: Site, position: int, view: View) -> Lookup | None:
    """A row of a parameter, or a window, along one or several of its axes."""
    operand, sizes = site.inputs[0].aval, site.eqn_params["slice_sizes"]
    indexed = [d for d in range(operand.ndim) if sizes[d] != operand.shape[d]]
    if position != 0 or 0 in sizes:
        return None
    sources: list[Source] = []
    for d in indexed:
        start = site.inputs[1 + d]
        if start.literal is None and not site.is_data(1 + d):
            return None
        sources.append(("operand", 1 + d) if start.literal is None else ("constant", int(start.literal)))
    where = {d: d for d in range(operand.ndim)}
    windows = {d: sizes[d] for d in indexed if sizes[d] > 1}
    return _rows(site, view, indexed, sources, where, [], windows, clamps=True)


def _rows(
    site: Site,
    view: View,
    indexed: Sequence[int],
    indices: Sequence[Source],
    where: dict[int, int],
    batch: Sequence[int],
    windows: dict[int, int],
    *,
    clamps: bool,
) -> Lookup | None:
    """The rule of a lookup along the axes `indexed`, whose row axes lie in the output as `where` says.

    Along those that `windows` has a size for, several rows are looked up. None where the rows are too many for their
    numbers.
    """
    around, own = split_axes(view, site.loops)
    depth = len(around)
    stepping = [(i, axis) for i, axis in enumerate(around) if axis[1] != 0]
    chosen = [(depth + k, own[d]) for k, d in enumerate(indexed)]
    if any(axis[1] == 0 and axis[0] > 1 for _, axis in chosen):
        return None
    order, p = group([*stepping, *chosen])  # below `depth` a loop's number, above it an index's
    sources = tuple(("loop", i) if i < depth else indices[i - depth] for i in order)
    spread = [depth + where[d] for d in where if d not in indexed and own[d][1] == 0 and own[d][0] > 1]
    row = [(depth + where[d], own[d]) for d in where if d not in indexed and depth + where[d] not in spread]
    right_q, q = group(row)
    behind = (*batch, *(where[d] for d in windows))
    positions = (*range(depth), *(depth + i for i in behind))
    number = {d: depth + len(batch) + i for i, d in enumerate(windows)}
    window_of = lambda d: Window(windows[d], number[d]) if d in windows else Window()
    right = AxisGrouping(tuple(spread), ((), positions, right_q))
    if product(p) > _MOST_ROWS:
        return None
    lengths = tuple(length for _, length in site.loops) + tuple(site.outputs[0].aval.shape[i] for i in behind)
    each = tuple(Window() if i < depth else window_of(indexed[i - depth]) for i in order)
    return Lookup(Layout((), p, q), math.prod(lengths), depth, sources, each, lengths, right, clamps)


def _within(index: jax.Array, size: int) -> jax.Array:
    """The nearest id within bounds. A bound that the ids' dtype cannot hold does not restrict them."""
    last = min(size - 1, int(jnp.iinfo(index.dtype).max))
    return jnp.clip(index, jnp.zeros((), index.dtype), jnp.asarray(last, index.dtype))
