"""Trees of arrays, one array for each value of some kind in a region and in the regions inside it.

A tree is a pair: the arrays of the region itself, and for each of its nested operations a tuple with a tree for each
region of that. Arrays inside a scan have the steps as a leading axis.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jgd._engine.sites import Nested, Region, Site, Value

Tree = tuple[tuple[Any, ...], tuple[tuple[Any, ...], ...]]


def taps_of(region: Region) -> Sequence[Value]:
    """The values that a region taps."""
    return region.taps


def residuals_of(region: Region) -> Sequence[Value]:
    """The values that a region keeps for the rules of its sites."""
    return region.residuals


def batch_axes(region: Region, of: Callable[[Region], Sequence[Value]], depth: int = 0) -> Tree:
    """Where the examples' axis lies in a tree of a batch: behind the steps of the scans around, as a scan leaves it."""
    inner = tuple(
        tuple(batch_axes(r, of, depth if op.loop is None else depth + 1) for r in op.regions)
        for op in region.ops
        if isinstance(op, Nested)
    )
    return tuple(depth for _ in of(region)), inner


def zeros(region: Region, of: Callable[[Region], Sequence[Value]]) -> Tree:
    """A tree of zeros for the values that `of` selects in each region."""
    return filled(region, of, 0)


def filled(
    region: Region, of: Callable[[Region], Sequence[Value]], number: int, lead: tuple[int, ...] = ()
) -> Tree:
    """A tree of one `number` for the values that `of` selects in each region."""
    own = tuple(_filled(value.aval, lead, number) for value in of(region))
    inner = tuple(
        tuple(filled(r, of, number, lead if op.loop is None else (*lead, op.loop[1])) for r in op.regions)
        for op in region.ops
        if isinstance(op, Nested)
    )
    return own, inner


def _filled(aval: jax.ShapeDtypeStruct, lead: tuple[int, ...], number: int) -> jax.Array:
    shape = (*lead, *aval.shape)
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        like: Any = aval
        return jnp.broadcast_to(jax.random.key(0, impl=jax.random.key_impl(like)), shape)
    return jnp.full(shape, number, aval.dtype)


def bumps_of(region: Region, chosen: Callable[[Site, int], bool], lead: tuple[int, ...] = ()) -> Tree:
    """A tree of zeros, one array like each chosen parameter operand of a site; None for those not chosen."""
    own = tuple(
        _filled(op.inputs[i].aval, lead, 0) if chosen(op, i) else None
        for op in region.ops
        if isinstance(op, Site)
        for i in op.params
    )
    inner = tuple(
        tuple(bumps_of(r, chosen, lead if op.loop is None else (*lead, op.loop[1])) for r in op.regions)
        for op in region.ops
        if isinstance(op, Nested)
    )
    return own, inner


def bumped(region: Region, tree: Tree) -> Iterator[tuple[Site, int, Any]]:
    """The chosen operands of a tree like that of `bumps_of`: site, position, and the array in the tree."""
    own, inner = iter(tree[0]), iter(tree[1])
    for op in region.ops:
        if isinstance(op, Nested):
            for r, part in zip(op.regions, next(inner), strict=True):
                yield from bumped(r, part)
        elif isinstance(op, Site):
            each = [(op, i, next(own)) for i in op.params]
            yield from (found for found in each if found[2] is not None)
