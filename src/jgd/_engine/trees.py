"""What belongs to the values of a region and of those inside it, as a tree of arrays.

A tree is what a region has, then, for each of its nested operations, a tree for each region of that. What lies
inside a scan has the steps as a leading axis.
"""

from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp

from jgd._engine.regions import Nested, Region, Site, Value, has_part

Tree = tuple[tuple[Any, ...], tuple[tuple[Any, ...], ...]]


def taps_of(region: Region) -> Sequence[Value]:
    """The values that a region taps."""
    return region.taps


def records_of(region: Region) -> Sequence[Value]:
    """The values that a region keeps for its sites."""
    return region.records


def batch_axes(region: Region, of: Callable[[Region], Sequence[Value]], depth: int = 0) -> Tree:
    """Where the examples' axis lies in a tree of a batch: behind the steps of the scans around, as a scan leaves it."""
    inner = tuple(
        tuple(batch_axes(r, of, depth if op.loop is None else depth + 1) for r in op.regions)
        for op in region.ops
        if isinstance(op, Nested)
    )
    return tuple(depth for _ in of(region)), inner


def zeros(region: Region, of: Callable[[Region], Sequence[Value]], lead: tuple[int, ...] = ()) -> Tree:
    """A tree of zeros for what each region has of values."""
    own = tuple(_zero(value.aval, lead) for value in of(region))
    inner = tuple(
        tuple(zeros(r, of, lead if op.loop is None else (*lead, op.loop[1])) for r in op.regions)
        for op in region.ops
        if isinstance(op, Nested)
    )
    return own, inner


def _zero(aval: jax.ShapeDtypeStruct, lead: tuple[int, ...]) -> jax.Array:
    shape = (*lead, *aval.shape)
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        like: Any = aval
        return jnp.broadcast_to(jax.random.key(0, impl=jax.random.key_impl(like)), shape)
    return jnp.zeros(shape, aval.dtype)


def bumps_of(region: Region, chosen: Callable[[Site, int], bool], lead: tuple[int, ...] = ()) -> Tree:
    """A tree of zeros to add to each chosen parameter operand of a site; None for those not chosen."""
    own = tuple(
        _zero(op.inputs[i].aval, lead) if chosen(op, i) else None
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
    """The chosen operands of a tree like that of `bumps_of`: site, position, and what the tree has of it."""
    own, inner = iter(tree[0]), iter(tree[1])
    for op in region.ops:
        if isinstance(op, Nested):
            for r, part in zip(op.regions, next(inner), strict=True):
                yield from bumped(r, part)
        elif isinstance(op, Site):
            each = [(op, i, next(own)) for i in op.params]
            yield from (found for found in each if found[2] is not None)


def picked(region: Region, tree: Tree, leaves: Set[int]) -> list[Any]:
    """From a tree like the taps, what belongs to the sites of some leaves, in the order of `replay`'s outputs."""
    inner, found = iter(tree[1]), []
    for op in region.ops:
        if isinstance(op, Nested):
            parts = next(inner)
            if has_part(op, leaves):
                found += [
                    x for r, part in zip(op.regions, parts, strict=True) for x in picked(r, part, leaves)
                ]
        elif isinstance(op, Site) and has_part(op, leaves):
            found += [tree[0][region.delta_at(op.outputs[i])] for i in op.tapped]
    return found
