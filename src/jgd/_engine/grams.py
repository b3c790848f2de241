"""⟨g_i, g'_j⟩ for all pairs of examples, in one part: from the blocks, the factors, or the rows looked up.

`theirs` None means the same gradients on both sides. Half of the pairs would be enough then, but two products
of half the size take longer than the whole one.

Over several devices the rows stay where their examples are, and the other batch comes by, a few columns at a time:
no device holds the others' gradients.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jgd._engine import lookups
from jgd._engine.dtypes import accumulation_dtype
from jgd._engine.factors import Outer, Rows, add, contract
from jgd._engine.tiles import fold_tiles, tile_of
from jgd._mesh import everywhere, varying

# Elements of the gradients that are built at once: enough for the products of pairs to run at full speed.
_TILE = 1 << 20


def of_blocks(ours: jax.Array, theirs: jax.Array | None = None, *, num_shards: int = 1) -> jax.Array:
    """From flat gradients, `(B, size)` and `(B', size)`; `num_shards` says how many devices may hold a batch."""
    theirs = ours if theirs is None else theirs
    if num_shards == 1:
        return contract("is,js->ij", ours, theirs)
    width = max(1, min(ours.shape[1], _TILE // theirs.shape[0]))
    columns = lambda blocks, _: contract("is,js->ij", blocks[0], everywhere(blocks[1], 0))
    return fold_tiles(columns, [ours, theirs], 1, ours.shape[1], width)


def of_factors(
    ours: Sequence[Outer | Rows], theirs: Sequence[Outer | Rows] | None = None, *, rows: int
) -> jax.Array:
    """From the factors of one part, each with a leading axis of examples; `rows` is the size of p."""
    first = ours[0]
    if len(ours) == 1 and isinstance(first, Rows):
        other = None if theirs is None else theirs[0]
        assert not isinstance(other, Outer)
        return lookups.gram(first, other, rows)
    if len(ours) == 1 and isinstance(first, Outer) and first.left.shape[2] == 1:
        return _of_outer(first, first if theirs is None else theirs[0])
    return of_columns(ours, theirs, rows)


def _of_outer(a: Outer, b: Outer | Rows) -> jax.Array:
    """From one position each: the products of both sides, multiplied."""
    assert isinstance(b, Outer)
    left = contract("intp,jntp->nij", a.left, b.left)
    return jnp.sum(left * contract("intq,jntq->nij", a.right, b.right), axis=0)


def of_columns(
    ours: Sequence[Outer | Rows], theirs: Sequence[Outer | Rows] | None, p: int, *, tile: int | None = None
) -> jax.Array:
    """From the gradients at a few places of p at a time: no more of them is ever built. Positions are summed first."""
    sides = [ours] if theirs is None else [ours, theirs]
    sizes = [side[0].right.shape[0] for side in sides]
    return _folded(sides, p, lambda so_far, *flat: so_far + of_blocks(*flat), (sizes[0], sizes[-1]), tile)


def deviation_of_columns(made: Sequence[Outer | Rows], p: int, *, tile: int) -> jax.Array:
    """Σ ‖g_i − ḡ‖²."""

    def join(so_far: jax.Array, flat: jax.Array) -> jax.Array:
        return so_far + jnp.sum(jnp.square(flat - jnp.mean(flat, axis=0)))

    return _folded([made], p, join, (), tile)


def _folded(
    sides: Sequence[Sequence[Outer | Rows]],
    p: int,
    join: Callable[..., jax.Array],
    shape: tuple[int, ...],
    tile: int | None,
) -> jax.Array:
    """Joins what `join` makes of zeros and the flat gradients of each side, at a few places of p after the other."""
    size, n, _, q = sides[0][0].right.shape
    # A divisor of p where one is near: else the factors would have to be copied, padded.
    width = tile_of(p, size * n * q, tile or _TILE) if p else 1
    count = math.ceil(p / width)

    def at(factor: Outer | Rows, start: jax.Array) -> jax.Array:
        if isinstance(factor, Rows):
            inside = (factor.index >= start) & (factor.index < start + width)
            place = lambda index, right: (
                jnp.zeros((1, width, right.shape[2]), accumulation_dtype(right))
                .at[:, index]
                .add(right.astype(accumulation_dtype(right)), mode="drop")
            )
            return jax.vmap(place)(jnp.where(inside, factor.index - start, width), factor.right)
        left = jax.lax.dynamic_slice_in_dim(factor.left, start, width, 3)
        return contract("intp,intq->inpq", left, factor.right)

    def step(so_far: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        blocks = [add([at(factor, start) for factor in side]) for side in padded]
        return join(so_far, *(block.reshape(block.shape[0], -1) for block in blocks)), None

    padded = [[_padded(factor, width * count) for factor in side] for side in sides]
    # In the products' dtype: an operand may be wider than the cotangent.
    made = jax.eval_shape(lambda: step(jnp.zeros(shape), jnp.zeros((), jnp.int32))[0])
    start = varying(jnp.zeros(shape, made.dtype), padded)
    return jax.lax.scan(step, start, width * jnp.arange(count))[0]


def _padded(factor: Outer | Rows, p: int) -> Outer | Rows:
    if not isinstance(factor, Outer) or factor.left.shape[3] == p:
        return factor
    return Outer(jnp.pad(factor.left, [(0, 0)] * 3 + [(0, p - factor.left.shape[3])]), factor.right)
