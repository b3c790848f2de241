"""Lookups of rows: `gather` and `dynamic_slice` of a parameter by indices that depend on the example.

The gradient is δ, added to the rows that were looked up. `left` would be the one-hot of the indices; only the
row numbers are kept. Loops that step through the parameter choose rows too.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.lax import GatherScatterMode

from jgd._engine.factors import Arrangement, Rows, Shape, group, product, split_axes
from jgd._engine.regions import Side, Site
from jgd._engine.uses import SiteData, Use
from jgd._engine.views import View


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
    """The use of a lookup along the axes `indexed`, whose row axes lie in the output as `where` says."""
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

    def factor(data: SiteData) -> Rows:
        indices = looked_up(data)
        number, valid = jnp.zeros(indices[0].shape, jnp.int32), jnp.ones(indices[0].shape, bool)
        for source, (size, _) in zip(sources, p, strict=True):
            if source < depth:
                steps = jnp.arange(size).reshape([-1 if i == source else 1 for i in range(number.ndim)])
                index = jnp.broadcast_to(steps, number.shape)
            else:
                index = indices[source - depth]
                valid &= (index >= 0) & (index < size)
                index = jnp.clip(index, 0, size - 1)
            number = number * size + index.astype(jnp.int32)
        delta = right(data.deltas[0])
        number, valid = number.reshape(-1), valid.reshape(-1)
        # A row out of bounds was filled, not read, where it was not clamped: it has no part in the gradient.
        return Rows(number if clamps else jnp.where(valid, number, rows), delta, rows)

    count = 1
    for i in positions:
        count *= site.loops[i][1] if i < depth else site.outputs[0].aval.shape[i - depth]
    return Use("lookup", site, 0, view.leaf, view.offset, shape.axes, shape, count, factor)
