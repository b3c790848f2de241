"""Where a loader stands: what a checkpoint keeps of it, and how a run that goes on comes there again."""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jgd._fit.plain import decoded
from jgd._fit.processes import several
from jgd._fit.stream import Drawn, Stream, is_stream, stream_of


class Position(NamedTuple):
    """Where a loader stands between two batches.

    Attributes:
        epoch: how many walks over the loader are done.
        place: how many batches of this walk were drawn, by this process.
        drawn: how many batches were drawn in all walks, by this process.
        steps: how many batches were trained on, in all walks.
        before: how many batches a stream had given before this run began.
        state: what the iterator's `get_state` said, as `encoded` writes it; None for one that has none.
        digest: of the contents of all batches so far, in their order; None where `state` is kept, and for a list.
    """

    epoch: int = 0
    place: int = 0
    drawn: int = 0
    steps: int = 0
    before: int = 0
    state: Any = None
    digest: str | None = None


def add_to_digest(digest: str | None, element: Any) -> str:
    """The digest of the batches so far and one more."""
    added = hashlib.blake2b((digest or "").encode(), digest_size=16)
    leaves, treedef = jax.tree.flatten(element)
    added.update(str(treedef).encode())
    for leaf in leaves:
        array = np.asarray(leaf if not _is_key(leaf) else jax.random.key_data(leaf))
        added.update(f"{array.dtype}{array.shape}".encode())
        added.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return added.hexdigest()


def stream_at(data: Any, position: Position, *, keep_state: bool) -> tuple[Stream, Drawn | None]:
    """The batches from a position on, and the last one that was passed by.

    An iterator with `set_state` is put there. Of anything else the batches of all epochs are drawn again, as a
    loader that shuffles each epoch anew must have drawn them; a list is only counted.

    Raises:
        ValueError: `data` cannot come there, or gave other batches on the way.
    """
    if position.state is not None:
        return _put_there(data, position, keep_state), None
    if is_stream(data):
        return _continued(data, position, keep_state)
    digest, last = None, None
    for epoch in range(position.epoch + 1):
        if isinstance(data, list) and epoch < position.epoch:
            continue
        stream = stream_of(data, keep_state=keep_state)
        place = position.place if epoch == position.epoch else None
        for drawn in _each(stream, place):
            last = drawn
            if position.digest is not None:
                digest = add_to_digest(digest, drawn.element)
        if place is not None:
            _check_reached(stream.given.used, place)
    _check_same(digest, position)
    return stream, last


def _continued(data: Any, position: Position, keep_state: bool) -> tuple[Stream, Drawn | None]:
    """The stream from a position on: what it has given already, to this run or before it, is not drawn again."""
    stream, target = stream_of(data, keep_state=keep_state), position.before + position.drawn
    given = stream.given
    if given.used > target:
        raise ValueError(
            f"`data` is an iterator that has given {given.used} batches already, and the run that `checkpoint` "
            f"keeps stands after batch {target}: make the iterator anew, and it is walked there"
        )
    whole, digest, last = given.used <= position.before, None, None
    while given.used < target:
        is_of_run = given.used >= position.before
        last = next(_each(stream, 1), None)
        if last is None and given.exhausted:
            stream = stream_of(data, keep_state=keep_state)  # some start anew
            last = next(_each(stream, 1), None)
        if last is None:
            _check_reached(given.used, target)
            break
        if is_of_run and position.digest is not None:
            digest = add_to_digest(digest, last.element)
    if whole:
        _check_same(digest, position)
    return stream, last


def _check_reached(given: int, wanted: int) -> None:
    if given < wanted and not several():
        raise ValueError(
            f"`data` gave fewer than the {wanted} batches that it had given when the checkpoint was made"
        )


def _check_same(digest: str | None, position: Position) -> None:
    if digest != position.digest:
        raise ValueError(
            "`data` gave other batches than those that the run in `checkpoint` was trained on, so the run cannot go "
            "on. A loader that draws an order for each walk goes on if it is made anew, with the same seed, in each "
            "program that resumes; or its iterator says where it stands by `get_state` and `set_state`, as grain's "
            "do. For other data, give another folder"
        )


def _put_there(data: Any, position: Position, keep_state: bool) -> Stream:
    for _ in range(0 if is_stream(data) else position.epoch):
        iter(data)  # a loader that draws an order for each walk has drawn as many
    stream = stream_of(data, keep_state=keep_state)
    if not stream.has_state:
        raise ValueError(
            f"`checkpoint` has the position of an iterator with `set_state`, but `data` is now "
            f"{type(data).__name__}, without; go on with the loader that the run began with"
        )
    iterator: Any = stream.iterator
    stream.first = iterator.get_state()
    iterator.set_state(decoded(position.state))
    stream.given.waiting.clear()
    stream.given.used = position.before + position.drawn
    return stream


def _each(stream: Stream, count: int | None = None) -> Iterator[Drawn]:
    """The next batches, at most `count`, passed by."""
    while count is None or count > 0:
        drawn = stream.draw()
        if drawn is None:
            return
        stream.use()
        count = None if count is None else count - 1
        yield drawn


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
