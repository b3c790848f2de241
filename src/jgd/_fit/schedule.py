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
    def batches(self) -> int:
        """The number of batches, the smaller one included."""
        return self.whole + (self.rest > 0)


@dataclass(frozen=True)
class Schedule:
    """Epochs that are all alike, up to a number of batches: the last may end early."""

    epoch: Pass
    batches: int

    @property
    def updates(self) -> int:
        """The number of updates."""
        return self.batches * self.epoch.inner_steps


def length_of(epochs: Any, steps: Any, inner_steps: Any) -> Length:
    """Checks how long to train.

    Raises:
        TypeError: a count is not an int.
        ValueError: neither or both of `epochs` and `steps`; a count out of range.
    """
    inner_steps = count(inner_steps, "inner_steps", least=1)
    if (epochs is None) == (steps is None):
        got = "neither" if epochs is None else f"epochs={epochs!r} and steps={steps!r}"
        raise ValueError(f"give exactly one of `epochs` and `steps` (a number of updates), got {got}")
    if epochs is not None:
        return Length(count(epochs, "epochs", least=0), None, inner_steps)
    steps = count(steps, "steps", least=0)
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
    batch_size = count(batch_size, "batch_size", least=1, hint="; None takes all examples at once")
    if batch_size > size:
        raise ValueError(
            f"`batch_size`={batch_size} is larger than `data`, which holds {size} examples; None takes all "
            "of them at once"
        )
    epoch = Pass(batch_size, size // batch_size, size % batch_size, length.inner_steps)
    if length.steps is None:
        return Schedule(epoch, (length.epochs or 0) * epoch.batches)
    return Schedule(epoch, length.steps // length.inner_steps)


def count(value: Any, argument: str, *, least: int, hint: str = "") -> int:
    """An argument that counts something, as an int.

    Raises:
        TypeError: it is not an int.
        ValueError: it is below `least`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"`{argument}` must be an int, got {describe(value)}{hint}")
    if number < least:
        raise ValueError(f"`{argument}` must be at least {least}, got {number}{hint}")
    return number
