"""Reductions of a part whose rows were looked up: no table is built but the answer's, and that once.

`Rows` come with a leading axis of examples: the row of each lookup, `(B, T)`, and its δ, `(B, 1, T, Q)`. A lookup
that met no row has the number of the rows, and adds nothing.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jgd._engine.batch_sums import mask_rows, scale_rows
from jgd._engine.dtypes import accumulation_dtype
from jgd._engine.factors import Rows, by_row, sum_squares
from jgd._engine.moments import inverse
from jgd._engine.tiles import fold_tiles, tile_of
from jgd._mesh import everywhere, varying

_DISTANCES = 16  # between sorted lookups that are compared before a check whether any pair is left

# Numbers that stay in a core's cache while rows are added to them in any order; and columns that fill one line of it.
_CACHED, _NARROW = 1 << 16, 16


def weighted_sum(made: Rows, weights: jax.Array | None, rows: int) -> jax.Array:
    """Σ w_i g_i, `(rows, Q)`, on one device."""
    table = _empty(made, rows, 0 if weights is None else 3, one_device=True)
    right = made.right if weights is None else scale_rows(weights, made.right)
    return table.at[made.index].add(right[:, 0].astype(table.dtype), mode="drop")


def _empty(made: Rows, rows: int, number: int, *, one_device: bool) -> jax.Array:
    """A table of zeros; of several in one program each asks for a `number` of its own.

    XLA would make one table for all of them, and copy it for each to be written into: it must not see that they are
    equal. A row's number is never below 0, which is known here alone. Over several devices it would have to be sent.
    """
    shape, dtype = (rows, made.right.shape[3]), accumulation_dtype(made.right)
    if not one_device or made.index.size == 0:
        return jnp.zeros(shape, dtype)
    some = made.index.reshape(-1)[number % made.index.size]
    return jnp.broadcast_to(jnp.minimum(some, 0).astype(dtype), shape)


def second_moment(made: Rows, weights: jax.Array, scale: Any, rows: int, *, one_device: bool) -> jax.Array:
    """scale · Σ w_i g_i², `(rows, Q)`: the rows that were met are scaled, not the table."""
    right = mask_rows(weights != 0, made.right)
    first, total = by_row(made._replace(right=right), rows, apart=True)
    share = jnp.where(first & (weights != 0)[:, None], weights[:, None], 0)
    table = _empty(made, rows, 1, one_device=one_device)
    return table.at[made.index].add((share[:, :, None] * jnp.square(total)) * scale, mode="drop")


def spread(made: Rows, weights: jax.Array, scale: Any, rows: int, *, one_device: bool) -> jax.Array:
    """scale · Σ w_i (g_i − ḡ)², `(rows, Q)`, ḡ the weighted mean.

    An example that did not look up a row deviates there by ḡ.
    """
    present, weight = weights != 0, jnp.sum(weights)
    first, total = by_row(made._replace(right=mask_rows(present, made.right)), rows, apart=True)
    share = jnp.where(first & present[:, None], weights[:, None], 0).reshape(-1, 1)
    number, places = _numbered(made.index, rows)
    total = total.reshape(share.shape[0], total.shape[2])
    summed = lambda x: jnp.zeros((places.size, x.shape[1]), x.dtype).at[number].add(x, mode="drop")
    mean = summed(share * total) * inverse(weight)
    near = jnp.take(mean, number, axis=0, mode="fill", fill_value=0)
    # What is left of the weight rounds: where every example met the row, it is 0.
    met = summed((share != 0).astype(jnp.int32)) == jnp.sum(present)
    unmet = jnp.where(met, 0, weight - summed(share))
    made_of = (summed(share * jnp.square(total - near)) + unmet * jnp.square(mean)) * scale
    if places.size == rows:
        return made_of
    return _empty(made, rows, 2, one_device=one_device).at[places].set(made_of, mode="drop")


def squared_sum(made: Rows, rows: int, *, in_cache: bool) -> jax.Array:
    """‖Σ g_i‖²; a few columns at a time, where what rows are added to is then `in_cache`."""
    number, places = _numbered(made.index, rows)

    def of_columns(some: jax.Array, count: int) -> jax.Array:
        some = some.reshape(number.size, count).astype(accumulation_dtype(some))
        total = jnp.zeros((places.size, count), some.dtype).at[number].add(some, mode="drop")
        return sum_squares(mask_rows(places < rows, total))

    columns = made.right.shape[3]
    width = tile_of(columns, places.size, _CACHED if in_cache else None)
    return fold_tiles(of_columns, made.right, 3, columns, max(width, min(columns, _NARROW)))


def gram(ours: Rows, theirs: Rows | None, rows: int) -> jax.Array:
    """⟨g_i, g'_j⟩, from the rows that both examples looked up; `theirs` None means `ours` on both sides.

    The lookups of one row by one example are added up. Then all are sorted by row, so that the partners of each lie
    next to it, at distances below the number of examples. Mostly there are none.
    """
    indices, rights = [], []
    for made in [ours] if theirs is None else [ours, theirs]:
        first, total = by_row(made, rows)
        # Grouped by row they mix examples of all devices, so each device gets them all, once.
        indices.append(everywhere(jnp.where(first, made.index, rows), 0))
        rights.append(everywhere(total, 0))
    lengths = [index.shape for index in indices]
    owners = [
        jnp.repeat(jnp.arange(size) + before, length)
        for (size, length), before in zip(lengths, (0, lengths[0][0]), strict=False)
    ]
    size, flat = (
        sum(size for size, _ in lengths),
        lambda parts: jnp.concatenate([x.reshape(-1) for x in parts]),
    )
    index, owner = flat(indices), jnp.concatenate(owners)
    right = jnp.concatenate([x.reshape(-1, x.shape[2]) for x in rights])
    order = _by_group(_representative(index, rows))
    total = _partners(index[order], owner[order], right[order], rows, size)
    # A gradient that is not finite has no finite inner product, with rows that it does not meet either.
    finite = jnp.concatenate([jnp.all(jnp.isfinite(x), axis=(1, 2)) for x in rights])
    total = jnp.where((finite[:, None] & finite[None, :]) | ~jnp.isfinite(total), total, jnp.nan)
    return total if theirs is None else total[: lengths[0][0], lengths[0][0] :]


def _partners(index: jax.Array, owner: jax.Array, right: jax.Array, rows: int, size: int) -> jax.Array:
    """Adds up the products of lookups of the same row, which stand together, one distance after the other."""
    place = jnp.arange(index.size)
    beyond = lambda x, distance: jnp.roll(x, -distance, axis=0)

    def meets(distance: jax.Array) -> jax.Array:
        return (index == beyond(index, distance)) & (index < rows) & (place + distance < index.size)

    def at(total: jax.Array, distance: jax.Array) -> tuple[jax.Array, None]:
        pairs = meets(distance)

        def add() -> jax.Array:
            products = jnp.where(pairs, jnp.sum(right * beyond(right, distance), axis=1), 0)
            return total.at[owner, beyond(owner, distance)].add(products)

        return jax.lax.cond(jnp.any(pairs), add, lambda: total), None

    def some(total: jax.Array, nearest: jax.Array) -> tuple[jax.Array, None]:
        each = nearest + jnp.arange(_DISTANCES)
        # A row's lookups stand together: where none has a partner at a distance, none has one beyond it.
        more = jnp.any(meets(nearest))
        return jax.lax.cond(more, lambda: jax.lax.scan(at, total, each)[0], lambda: total), None

    own = jnp.where(index < rows, jnp.sum(jnp.square(right), axis=1), 0)
    diagonal = jnp.zeros(size, right.dtype).at[owner].add(own)
    nearest = 1 + _DISTANCES * jnp.arange(math.ceil((size - 1) / _DISTANCES))
    above = jax.lax.scan(some, varying(jnp.zeros((size, size), right.dtype), right), nearest)[0]
    return above + above.T + jnp.diag(diagonal)


def _numbered(index: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """A number for each lookup's row, and the rows by number: only those met, where the table has more."""
    flat = index.reshape(-1)
    if rows <= flat.size:
        return flat, jnp.arange(rows)
    number = _representative(flat, rows)
    return number, jnp.where(number == jnp.arange(flat.size), flat, rows)


def _representative(flat: jax.Array, rows: int) -> jax.Array:
    """For each lookup, the place of one of the same row. A table of integers finds it far quicker than a sort."""
    place = jnp.arange(flat.size)
    return jnp.zeros(rows + 1, place.dtype).at[flat].set(place)[flat]


def _by_group(number: jax.Array) -> jax.Array:
    """An order that brings equal numbers, each below how many there are, together."""
    size = number.size
    if size**2 > jnp.iinfo(number.dtype).max:
        return jnp.argsort(number)
    return (
        jnp.sort(number * size + jnp.arange(size)) % size
    )  # one sort of plain integers is several times faster
