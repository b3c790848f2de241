"""Batches that someone else makes, and where what makes them stands: a list, a generator, a grain loader."""

import base64
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jgd._errors import describe
from jgd._fit.data import leaf_axes, splat
from jgd._fit.placement import axes_of, lies_on
from jgd._fit.processes import gathered, several
from jgd._fit.schedule import Length
from jgd._fit.stepwise import Batch

# Batches about which processes agree at once, so that not every step waits for a message.
_AGREED_AT_ONCE = 8


def batches_of_iterable(
    data: Iterable[Any],
    length: Length,
    position: Any = None,
    *,
    in_axes: Any = None,
    keep_position: bool = False,
    sharding: NamedSharding | None = None,
) -> Iterator[Batch]:
    """The batches of `data`, walked once an epoch, or as often as `steps` needs, from a position on.

    On a mesh they are laid out by `sharding`; several processes have batches of their own, which together make one.

    Raises:
        ValueError: the batches have run out.
    """
    wanted = None if length.steps is None else length.steps // length.inner_steps
    epoch, place, made, state = position or (0, 0, 0, None)
    while epoch != length.epochs and made != wanted:
        batches: Iterator[Batch] = _epoch(data, place, state, keep_position)
        if sharding is not None:
            batches = _together(batches, in_axes, sharding)
        for batch in batches:
            place, made = place + 1, made + 1
            yield batch._replace(position=[epoch, place, made, batch.position])
            if made == wanted:
                return
        if place == 0:
            raise ValueError(
                f"`data` gave no batch in epoch {epoch + 1}, after {made} in all: an iterator can be walked "
                "only once. Give what starts anew each time, such as a list or a data loader, or ask for less"
            )
        epoch, place, state = epoch + 1, 0, None


def _epoch(data: Iterable[Any], place: int, state: Any, keep_position: bool) -> Iterator[Batch]:
    """The batches of this process, from number `place` of an epoch on."""
    iterator = _iterator_at(data, place, state)
    for element in iterator:
        yield Batch(splat(element), _state_of(iterator) if keep_position else None)


class _Local(NamedTuple):
    """A batch of this process as it lies in memory, where each leaf has its examples, and how many they are."""

    leaves: list[np.ndarray]
    treedef: Any
    axes: list[int | None]
    size: int


def _together(batches: Iterator[Batch], in_axes: Any, sharding: NamedSharding) -> Iterator[Batch]:
    """Batches of all processes, as long as any has one: all make as many steps.

    What a process or a device lacks is absent: examples that were there are repeated, with weight 0. Batches that
    lie on the mesh already stay as they are.
    """
    first = next(batches, None)
    if first is not None:
        batches = itertools.chain([first], batches)
        if any(lies_on(leaf) == sharding.mesh for leaf in jax.tree.leaves(first.args)):
            yield from batches
            return
    shards = (
        math.prod(sharding.mesh.shape[axis] for axis in axes_of(sharding.spec[0])) // jax.process_count() or 1
    )
    full, last, state = 0, None, None
    while True:
        some = [
            (_local(batch, in_axes), batch.position) for batch in itertools.islice(batches, _AGREED_AT_ONCE)
        ]
        sizes = np.zeros(_AGREED_AT_ONCE, np.int32)
        sizes[: len(some)] = [local.size for local, _ in some]
        everywhere = gathered(sizes)
        full = max(full, -(-int(everywhere.max()) // shards) * shards)
        for column in everywhere.T:
            if not column.any():
                return
            if some:
                last, state = some.pop(0)
            elif last is None:
                raise ValueError(
                    f"`data` gave process {jax.process_index()} no batch at all, and others some: there are more "
                    "processes than batches of examples. Use fewer processes, or share the examples out anew"
                )
            else:
                last = last._replace(size=0)
            yield _global(last, full, bool((column < full).any()), sharding)._replace(position=state)


def _local(batch: Batch, in_axes: Any) -> _Local:
    leaves, treedef = jax.tree.flatten(batch.args)
    arrays, axes = [np.asarray(leaf) for leaf in leaves], leaf_axes(batch.args, in_axes)
    mapped = [(x, axis) for x, axis in zip(arrays, axes, strict=True) if axis is not None]
    sizes = {x.shape[axis] if -x.ndim <= axis < x.ndim else None for x, axis in mapped}
    if len(sizes) != 1 or sizes & {None, 0}:
        raise ValueError(
            "the leaves of a batch of `data` must have a common axis of examples to be laid out on a mesh, got "
            f"{', '.join(map(describe, arrays))}"
        )
    return _Local(arrays, treedef, axes, sizes.pop() or 0)


def _global(local: _Local, full: int, some_absent: bool, sharding: NamedSharding) -> Batch:
    index = np.arange(full)

    def shared(x: np.ndarray, axis: int | None) -> jax.Array:
        if axis is None:
            return jax.device_put(x, NamedSharding(sharding.mesh, PartitionSpec()))
        if x.shape[axis] != full:
            x = np.take(x, index % x.shape[axis], axis)
        spec = PartitionSpec(*[None] * (axis % x.ndim), *sharding.spec)
        return jax.make_array_from_process_local_data(NamedSharding(sharding.mesh, spec), x)

    leaves = [shared(x, axis) for x, axis in zip(local.leaves, local.axes, strict=True)]
    weights = shared((index < local.size).astype(np.float32), 0) if some_absent else None
    return Batch(jax.tree.unflatten(local.treedef, leaves), None, weights)


def _iterator_at(data: Iterable[Any], place: int, state: Any) -> Any:
    """An iterator from batch `place` of an epoch on: put there if it can be, else walked there."""
    iterator: Any = iter(data)
    if state is not None:
        if not hasattr(iterator, "set_state"):
            raise ValueError(
                f"`checkpoint` has the position of an iterator with `set_state`, but `data` is now "
                f"{type(data).__name__}, without; go on with the loader that the run began with"
            )
        iterator.set_state(_decoded(state))
        return iterator
    if sum(1 for _ in itertools.islice(iterator, place)) < place and not several():
        raise ValueError(
            f"`data` gave fewer than the {place} batches that this epoch had when the checkpoint was made"
        )
    return iterator


def _state_of(iterator: Any) -> Any:
    """Where an iterator stands, in JSON; None for one that cannot say."""
    if not (hasattr(iterator, "get_state") and hasattr(iterator, "set_state")):
        return None
    state = iterator.get_state()
    return {"bytes": base64.b64encode(state).decode()} if isinstance(state, bytes) else {"json": state}


def _decoded(state: dict[str, Any]) -> Any:
    return base64.b64decode(state["bytes"]) if "bytes" in state else state["json"]
