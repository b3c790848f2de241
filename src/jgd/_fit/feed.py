"""Batches that someone else makes, one for each step: a list, a generator, a loader; laid out on a mesh."""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jgd._errors import describe
from jgd._fit.batch import Batch
from jgd._fit.data import leaf_axes, splat
from jgd._fit.placement import axes_of, lies_on
from jgd._fit.position import Position, add_to_digest, stream_at
from jgd._fit.processes import gathered, several
from jgd._fit.schedule import Length
from jgd._fit.stream import Drawn, like_of, stream_of

# Batches about which processes agree at once, so that not every step waits for a message.
_AGREED_AT_ONCE = 8


class LoaderFeed:
    """The batches of `data`, walked once an epoch, or as often as `steps` needs, from a position on.

    On a mesh they are laid out by `sharding`; several processes have batches of their own, which together make one.
    No more are drawn than are asked for, save that several processes agree on some at a time. What is drawn and not
    used, a stream gives again.
    """

    def __init__(
        self,
        data: Iterable[Any],
        length: Length,
        position: Position | None,
        *,
        in_axes: Any = None,
        keep_position: bool = False,
        sharding: NamedSharding | None = None,
    ) -> None:
        self._data, self._length, self._in_axes, self._sharding = data, length, in_axes, sharding
        self._keep = keep_position
        self._wanted = None if length.steps is None else length.steps // length.inner_steps
        self._structure: Any = None
        self._last: Drawn | None = None
        self._own: deque[bool] = deque()  # of the batches given out: whether this process has a share in it
        if position is None:
            self._stream = stream_of(data, keep_state=keep_position)
            self._position = Position(before=self._stream.given.used)
            _check_kept(self._stream.state())
        else:
            self._stream, self._last = stream_at(data, position, keep_state=keep_position)
            self._position = position
        self._is_first = True

    def __iter__(self) -> Iterator[Batch]:
        """The batches that are left.

        Raises:
            ValueError: they have run out, or one is of another structure than the first.
        """
        while self._position.epoch != self._length.epochs and self._position.steps != self._wanted:
            for batch in self._epoch():
                yield batch
                if batch.position.steps == self._wanted:
                    return
            at = self._position
            if at.place == 0:
                raise ValueError(
                    f"`data` gave no batch in epoch {at.epoch + 1}, after {at.steps} in all: an iterator can be "
                    "walked only once. Give what starts anew each time, such as a list or a data loader, or ask for "
                    "less"
                )
            self._position = at._replace(epoch=at.epoch + 1, place=0, state=None)
            if self._position.epoch != self._length.epochs:
                self._stream = stream_of(self._data, keep_state=self._keep)

    def like(self) -> Any:
        """The shapes and dtypes of a batch, of which none is lost; None where there is no batch to be had."""
        return like_of(self._stream)

    def use(self) -> None:
        """Says that the oldest batch that was given out was trained on to its end."""
        if self._own.popleft():
            self._stream.use()

    def close(self) -> None:
        """Gives the stream back what was drawn and not used."""
        self._stream.give_back()
        self._own.clear()

    def _draw(self) -> Drawn | None:
        drawn = self._stream.draw()
        if drawn is None:
            return None
        self._last, structure = drawn, jax.tree.structure(drawn.element)
        if self._structure is not None and self._structure != structure:
            raise ValueError(
                f"`data` gave a batch of structure {structure}, and before one of {self._structure}: all batches "
                "of a run must have one structure, and differ at most in how many examples they hold"
            )
        if self._is_first:
            _check_kept(drawn.state)
        self._structure, self._is_first = structure, False
        return drawn

    def _moved(self, drawn: Drawn | None) -> Position:
        """Where the loader stands after one more step, with or without a batch of this process."""
        at = self._position._replace(steps=self._position.steps + 1)
        if drawn is not None:
            at = at._replace(place=at.place + 1, drawn=at.drawn + 1)
        if self._keep and drawn is not None:
            if drawn.state is not None:
                at = at._replace(state=drawn.state, digest=None)
            elif not isinstance(self._data, list):
                at = at._replace(digest=add_to_digest(at.digest, drawn.element))
        self._position = at
        self._own.append(drawn is not None)
        return at

    def _epoch(self) -> Iterator[Batch]:
        if self._sharding is None:
            while (drawn := self._draw()) is not None:
                yield Batch(splat(drawn.element), self._moved(drawn), size=_size(drawn, self._in_axes))
            return
        yield from self._on_mesh(self._sharding)

    def _on_mesh(self, sharding: NamedSharding) -> Iterator[Batch]:
        """Batches of all processes, as long as any has one: all make as many steps.

        What a process or a device lacks is absent: examples that were there are repeated, with weight 0. Batches
        that lie on the mesh already stay as they are.
        """
        full, lacks = 0, None
        for column, drawn in self._agreed(sharding):
            if drawn is not None and _is_on(drawn, sharding):
                yield Batch(splat(drawn.element), self._moved(drawn))
                continue
            full = max(full, -(-int(column.max()) // _shards(sharding)) * _shards(sharding))
            if drawn is not None:
                lacks = local = _local(drawn, self._in_axes)
            elif lacks is not None or self._last is not None:
                lacks = lacks or _local(self._last, self._in_axes)  # type: ignore
                local = lacks._replace(size=0)
            else:
                raise ValueError(
                    f"`data` gave process {jax.process_index()} no batch at all, and others some: there are more "
                    "processes than batches of examples. Use fewer processes, or share the examples out anew"
                )
            yield _global(local, full, np.maximum(column, 0), sharding)._replace(position=self._moved(drawn))

    def _agreed(self, sharding: NamedSharding) -> Iterator[tuple[np.ndarray, Drawn | None]]:
        """The sizes of the batches that make the next one, -1 where a process has none, and that of this process."""
        if not several():
            while (drawn := self._draw()) is not None:
                size = 0 if _is_on(drawn, sharding) else _local(drawn, self._in_axes).size
                yield np.array([size]), drawn
            return
        while True:
            left = _AGREED_AT_ONCE
            if self._wanted is not None:
                left = min(left, self._wanted - self._position.steps)
            some: list[Drawn] = []
            while len(some) < left and (drawn := self._draw()) is not None:
                some.append(drawn)
            sizes = np.full(_AGREED_AT_ONCE, -1, np.int32)
            sizes[: len(some)] = [
                0 if _is_on(one, sharding) else _local(one, self._in_axes).size for one in some
            ]
            for column in gathered(sizes).T[:left]:
                if (column < 0).all():
                    return
                yield column, some.pop(0) if some else None


def _check_kept(state: Any) -> None:
    """Raises what keeps a state from being kept, before any update."""
    if isinstance(state, Exception):
        raise state


class _Local(NamedTuple):
    """A batch of this process as it lies in memory, where each leaf has its examples, and how many they are."""

    leaves: list[np.ndarray]
    treedef: Any
    axes: list[int | None]
    size: int


def _shards(sharding: NamedSharding) -> int:
    """The devices of this process that share out a batch."""
    return (
        math.prod(sharding.mesh.shape[axis] for axis in axes_of(sharding.spec[0])) // jax.process_count() or 1
    )


def _is_on(drawn: Drawn, sharding: NamedSharding) -> bool:
    return any(lies_on(leaf) == sharding.mesh for leaf in jax.tree.leaves(drawn.element))


def _size(drawn: Drawn, in_axes: Any) -> int | None:
    """How many examples a batch holds; None where that cannot be told, and the step says what is wrong."""
    args = splat(drawn.element)
    try:
        axes = leaf_axes(args, in_axes)
    except ValueError:
        return None
    for x, axis in zip(jax.tree.leaves(args), axes, strict=True):
        if axis is not None and -np.ndim(x) <= axis < np.ndim(x):
            return np.shape(x)[axis]
    return None


def _local(drawn: Drawn, in_axes: Any) -> _Local:
    args = splat(drawn.element)
    leaves, treedef = jax.tree.flatten(args)
    arrays, axes = [np.asarray(leaf) for leaf in leaves], leaf_axes(args, in_axes)
    mapped = [(x, axis) for x, axis in zip(arrays, axes, strict=True) if axis is not None]
    sizes = {x.shape[axis] if -x.ndim <= axis < x.ndim else None for x, axis in mapped}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(
            "the leaves of a batch of `data` must have a common axis of examples to be laid out on a mesh, got "
            f"{', '.join(map(describe, arrays))}"
        )
    return _Local(arrays, treedef, axes, sizes.pop() or 0)


def _global(local: _Local, full: int, sizes: np.ndarray, sharding: NamedSharding) -> Batch:
    """The batch of all processes, of which each has `full` rows; `sizes` says how many of these are examples."""
    if not sizes.any():
        full, sharding = 0, NamedSharding(sharding.mesh, PartitionSpec(None))  # no examples, nor padding
    index = np.arange(full)

    def shared(x: np.ndarray, axis: int | None) -> jax.Array:
        if axis is None:
            return jax.device_put(x, NamedSharding(sharding.mesh, PartitionSpec()))
        if x.shape[axis] == 0 and full:
            x = np.zeros((*x.shape[: axis % x.ndim], full, *x.shape[axis % x.ndim + 1 :]), x.dtype)
        elif x.shape[axis] != full:
            x = np.take(x, index % max(x.shape[axis], 1), axis)
        spec = PartitionSpec(*[None] * (axis % x.ndim), *sharding.spec)
        return jax.make_array_from_process_local_data(NamedSharding(sharding.mesh, spec), x)

    leaves = [shared(x, axis) for x, axis in zip(local.leaves, local.axes, strict=True)]
    args, size = jax.tree.unflatten(local.treedef, leaves), int(sizes.sum())
    if (sizes == full).all():
        return Batch(args, size=size)
    present = np.concatenate([full * rank + np.arange(own) for rank, own in enumerate(sizes)])
    return Batch(args, weights=shared((index < local.size).astype(np.float32), 0), size=size, present=present)
