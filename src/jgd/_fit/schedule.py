"""How many updates a fit makes, and from which examples. Static and hashable, to key a compilation."""

import operator
from dataclasses import dataclass
from typing import Any

from jgd._errors import describe


@dataclass(frozen=True)
class Length:
    """How long to train: one of `epochs` and `steps` is given, the other is None."""

    epochs: int | None
    steps: int | None
    inner_steps: int


@dataclass(frozen=True)
class Pass:
    """One walk over the examples: whole batches first, then the smaller one that is left."""

    batch_size: int
    whole: int
    rest: int
    inner_steps: int

    @property
    def updates(self) -> int:
        """The number of updates."""
        return (self.whole + (self.rest > 0)) * self.inner_steps


@dataclass(frozen=True)
class Schedule:
    """Whole epochs, all alike, and the part of another that a number of steps may end in."""

    epoch: Pass
    epochs: int
    last: Pass | None

    @property
    def updates(self) -> int:
        """The number of updates."""
        return self.epochs * self.epoch.updates + (self.last.updates if self.last else 0)

    @property
    def passes(self) -> list[Pass]:
        """The walks over the examples, in order."""
        return [self.epoch] * self.epochs + ([self.last] if self.last else [])


def length_of(epochs: Any, steps: Any, inner_steps: Any) -> Length:
    """Checks how long to train.

    Raises:
        TypeError: a count is not an int.
        ValueError: neither or both of `epochs` and `steps`; a count out of range.
    """
    inner_steps = _count(inner_steps, "inner_steps", least=1)
    if (epochs is None) == (steps is None):
        got = "neither" if epochs is None else f"epochs={epochs!r} and steps={steps!r}"
        raise ValueError(f"give exactly one of `epochs` and `steps` (a number of updates), got {got}")
    if epochs is not None:
        return Length(_count(epochs, "epochs", least=0), None, inner_steps)
    steps = _count(steps, "steps", least=0)
    if steps % inner_steps:
        raise ValueError(
            f"`steps` counts updates, of which each batch makes `inner_steps`={inner_steps}: it must be a "
            f"multiple of that, got {steps}"
        )
    return Length(None, steps, inner_steps)


def schedule_of(length: Length, size: int, batch_size: Any) -> Schedule:
    """The walks over `size` examples.

    Raises:
        TypeError: `batch_size` is not an int.
        ValueError: it is below 1, or above the number of examples.
    """
    if batch_size is None:
        batch_size = size
    batch_size = _count(batch_size, "batch_size", least=1, hint="; None takes all examples at once")
    if batch_size > size:
        raise ValueError(
            f"`batch_size`={batch_size} is larger than `data`, which holds {size} examples; None takes all "
            "of them at once"
        )
    inner = length.inner_steps
    epoch = Pass(batch_size, size // batch_size, size % batch_size, inner)
    if length.steps is None:
        return Schedule(epoch, length.epochs or 0, None)
    epochs, left = divmod(length.steps, epoch.updates)
    # Less than an epoch is left, so the smaller batch that ends one is not part of it.
    return Schedule(epoch, epochs, Pass(batch_size, left // inner, 0, inner) if left else None)


def _count(value: Any, argument: str, *, least: int, hint: str = "") -> int:
    try:
        count = operator.index(value)
    except TypeError:
        count = None
    if count is None or isinstance(value, bool):
        raise TypeError(f"`{argument}` must be an int, got {describe(value)}{hint}")
    if count < least:
        raise ValueError(f"`{argument}` must be at least {least}, got {count}{hint}")
    return count
