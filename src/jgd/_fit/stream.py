"""An iterator of batches, and how many it has given: what was drawn and not used is drawn again first."""

import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

from jgd._fit.plain import encoded
from jgd._fit.traced import shape_of
from jgd._methods.host import owned_batch


class Drawn(NamedTuple):
    """A batch as the loader gave it, copied.

    Attributes:
        element: the batch.
        state: where the iterator stood after it, as `encoded` writes it, or the error that says why it cannot be
            kept; None for an iterator that does not say.
    """

    element: Any
    state: Any = None


@dataclass(eq=False)
class Given:
    """What an iterator has given so far.

    Attributes:
        used: how many batches runs have trained on, or passed by.
        waiting: batches that were drawn and not used.
        exhausted: whether the iterator has ended; some start anew then.
        like: the shapes and dtypes of a batch, once there was one.
    """

    used: int = 0
    waiting: deque[Drawn] = field(default_factory=deque)
    exhausted: bool = False
    like: Any = None


class Stream:
    """Draws batches from an iterator. A batch counts as given once it was used."""

    def __init__(self, iterator: Iterator[Any], given: Given, *, keep_state: bool) -> None:
        self.iterator, self.given, self._keep_state = iterator, given, keep_state
        self.first: Any = None  # the state that the iterator had before it was put elsewhere
        self._out: deque[Drawn] = deque()

    @property
    def has_state(self) -> bool:
        """Whether the iterator says where it stands, and can be put there."""
        return hasattr(self.iterator, "get_state") and hasattr(self.iterator, "set_state")

    def draw(self) -> Drawn | None:
        """The next batch, a copy; None at the end."""
        if self.given.waiting:
            drawn = self.given.waiting.popleft()
        else:
            try:
                element = next(self.iterator)
            except StopIteration:
                self.given.exhausted = True
                return None
            self.given.exhausted = False  # where it had ended, its `iter` has put it back to its start
            drawn = Drawn(owned_batch(element), self.state())
        self._out.append(drawn)
        if self._keep_state and self.given.like is None:
            self.given.like = jax.tree.map(shape_of, drawn.element)
        return drawn

    def state(self) -> Any:
        """Where the iterator stands, as JSON, or why that cannot be kept: it may be a part of what changes later."""
        if not (self._keep_state and self.has_state):
            return None
        try:
            return encoded(self.iterator.get_state(), "get_state()")  # type: ignore
        except TypeError as error:
            return error

    def use(self) -> None:
        """Counts the oldest batch that was drawn as given."""
        self._out.popleft()
        self.given.used += 1

    def give_back(self) -> None:
        """Keeps the batches that were drawn and not used, for whoever draws next."""
        self.given.waiting.extendleft(reversed(self._out))
        self._out.clear()


# What the iterators of this process have given, by their identity. A reference that is weak where it can be keeps the
# number from passing to another object; builtin iterators take none and are held until they end.
_KNOWN: dict[int, tuple[Any, Given]] = {}


def is_stream(data: Any) -> bool:
    """Whether `data` is its own iterator: what it gave to one call, it does not give to the next."""
    return hasattr(data, "__next__") and (id(data) in _KNOWN or iter(data) is data)


def stream_of(data: Any, *, keep_state: bool) -> Stream:
    """The batches of a walk over `data`: from its start, or from where the last call has left a stream."""
    if not is_stream(data):
        return Stream(iter(data), Given(), keep_state=keep_state)
    if id(data) not in _KNOWN:
        _KNOWN[id(data)] = (_reference(data), Given())
    given = _KNOWN[id(data)][1]
    if given.exhausted:
        iter(data)  # which starts some loaders anew
    return Stream(data, given, keep_state=keep_state)


def like_of(stream: Stream) -> Any:
    """The shapes and dtypes of a batch that a stream gives; None where there is none to be had."""
    if stream.given.like is None:
        stream.draw()
        stream.give_back()
    if stream.given.like is None and stream.first is not None:  # it was put to its end
        iterator: Any = stream.iterator
        state = iterator.get_state()
        iterator.set_state(stream.first)
        stream.draw()
        stream.give_back()
        stream.given.waiting.clear()
        iterator.set_state(state)
    return stream.given.like


def _reference(data: Any) -> Any:
    number = id(data)
    try:
        return weakref.ref(data, lambda _: _KNOWN.pop(number, None))
    except TypeError:
        return data
