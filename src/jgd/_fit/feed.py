"""Batches that someone else makes, and where what makes them stands: a list, a generator, a grain loader."""

import base64
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from jgd._fit.data import splat
from jgd._fit.schedule import Length
from jgd._fit.stepwise import Batch


def batches_of_iterable(
    data: Iterable[Any], length: Length, position: Any = None, *, keep_position: bool = False
) -> Iterator[Batch]:
    """The batches of `data`, walked once an epoch, or as often as `steps` needs, from a position on.

    Raises:
        ValueError: the batches have run out.
    """
    wanted = None if length.steps is None else length.steps // length.inner_steps
    epoch, place, made, state = position or (0, 0, 0, None)
    while epoch != length.epochs and made != wanted:
        iterator = _iterator_at(data, place, state)
        for element in iterator:
            place, made = place + 1, made + 1
            at = [epoch, place, made, _state_of(iterator)] if keep_position else None
            yield Batch(splat(element), at)
            if made == wanted:
                return
        if place == 0:
            raise ValueError(
                f"`data` gave no batch in epoch {epoch + 1}, after {made} in all: an iterator can be walked "
                "only once. Give what starts anew each time, such as a list or a data loader, or ask for less"
            )
        epoch, place, state = epoch + 1, 0, None


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
    if sum(1 for _ in itertools.islice(iterator, place)) < place:
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
