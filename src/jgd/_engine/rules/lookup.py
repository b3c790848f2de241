"""Lookups of rows: `gather` and `dynamic_slice` of a parameter by indices that depend on the example.

The gradient is δ, added to the rows that were looked up. `left` would be the one-hot of the indices; only the
row numbers are kept. Loops that step through the parameter choose rows too.

Ids are of any integer type, and may lie out of bounds. What is done with those is what JAX's derivative does: a
lookup that clamps adds δ to the row at the edge, any other adds it nowhere, whatever was read in the row's place.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import GatherScatterMode

from jgd._engine.factors import Arrangement, Rows, Shape, group, product, split_axes
from jgd._engine.regions import Side, Site
from jgd._engine.uses import SiteData, Use
from jgd._engine.views import View

_MOST_ROWS = np.iinfo(np.int32).max  # that row numbers can tell apart, beside the one of no row


def match_gather(site: Site, position: int, view: View) -> Use | None:
    """Whole rows of a parameter, by one or several of its axes."""
    params = site.eqn.params
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    operand, indices = site.inputs[0].aval, site.inputs[1]
    indexed = numbers.start_index_map
    if position != 0 or numbers.operand_batching_dims or indices.side != Side.DATA:
        return None
    if any(sizes[d] != (1 if d in indexed else operand.shape[d]) for d in range(operand.ndim)):
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

    def looked_up(data: SiteData) -> list[jax.Array]:
        return [data.values[1][..., i] for i in range(len(indexed))]

    return _rows(site, view, indexed, where, batch, looked_up, clamps=mode == GatherScatterMode.CLIP)


def match_dynamic_slice(site: Site, position: int, view: View) -> Use | None:
    """One row of a parameter, along one or several of its axes."""
    operand, sizes = site.inputs[0].aval, site.eqn.params["slice_sizes"]
    indexed = [d for d in range(operand.ndim) if sizes[d] != operand.shape[d]]
    starts = [site.inputs[1 + d] for d in indexed]
    if position != 0 or any(sizes[d] != 1 for d in indexed):
        return None
    if any(x.side != Side.DATA and x.literal is None for x in starts):
        return None
    where = {d: d for d in range(operand.ndim)}

    def looked_up(data: SiteData) -> list[jax.Array]:
        given = [data.values.get(1 + d, x.literal) for d, x in zip(indexed, starts, strict=True)]
        lengths = tuple(length for _, length in site.loops)
        return [jnp.broadcast_to(jnp.asarray(x), lengths) for x in given]

    return _rows(site, view, indexed, where, [], looked_up, clamps=True)


def _rows(
    site: Site,
    view: View,
    indexed: Sequence[int],
    where: dict[int, int],
    batch: Sequence[int],
    looked_up: Callable[[SiteData], list[jax.Array]],
    *,
    clamps: bool,
) -> Use | None:
    """The use of a lookup along the axes `indexed`, whose row axes lie in the output as `where` says.

    None where the rows are too many for their numbers.
    """
    around, own = split_axes(view, site.loops)
    depth = len(around)
    stepping = [(i, axis) for i, axis in enumerate(around) if axis[1] != 0]
    chosen = [(depth + k, own[d]) for k, d in enumerate(indexed)]
    if any(axis[1] == 0 and axis[0] > 1 for _, axis in chosen):
        return None
    sources, p = group([*stepping, *chosen])  # below `depth` a loop's number, above it an index's
    spread = [depth + where[d] for d in where if d not in indexed and own[d][1] == 0 and own[d][0] > 1]
    row = [(depth + where[d], own[d]) for d in where if d not in indexed and depth + where[d] not in spread]
    right_q, q = group(row)
    positions = (*range(depth), *(depth + i for i in batch))
    right = Arrangement(tuple(spread), ((), positions, right_q))
    shape = Shape((), p, q)
    rows = product(p)
    if rows > _MOST_ROWS:
        return None
    lengths = [length for _, length in site.loops] + [site.outputs[0].aval.shape[i] for i in batch]

    def factor(data: SiteData) -> Rows:
        indices = looked_up(data)
        number, valid = jnp.zeros(lengths, jnp.int32), jnp.ones(lengths, bool)
        for source, (size, _) in zip(sources, p, strict=True):
            if source < depth:
                steps = jnp.arange(size, dtype=jnp.int32)
                index = steps.reshape([-1 if i == source else 1 for i in range(len(lengths))])
            else:
                index = indices[source - depth]
                inside = _within(index, size)
                valid, index = valid & (inside == index), inside.astype(jnp.int32)
            number = number * size + index
        delta = right(data.deltas[0])
        if clamps:
            return Rows(number.reshape(-1), delta, rows)
        # What was filled, not read, may have a δ that is not finite: it must reach no sum, not even times 0.
        valid = valid.reshape(-1)
        met = jnp.where(valid[None, :, None], delta, jnp.zeros((), delta.dtype))
        return Rows(jnp.where(valid, number.reshape(-1), rows), met, rows)

    count = math.prod(lengths)
    return Use("lookup", site, 0, view.leaf, view.offset, shape.axes, shape, count, factor)


def _within(index: jax.Array, size: int) -> jax.Array:
    """The nearest id within bounds, in the ids' own dtype: a bound that it cannot hold is no bound of theirs."""
    last = min(size - 1, int(jnp.iinfo(index.dtype).max))
    return jnp.clip(index, jnp.zeros((), index.dtype), jnp.asarray(last, index.dtype))
