"""How many updates a fit makes, and from which examples."""

import operator
from dataclasses import dataclass
from typing import Any

from jgd._errors import describe


@dataclass(frozen=True)
class Length:
    """How long to train: exactly one of the two is given."""

    epochs: int | None
    steps: int | None
    inner_steps: int


@dataclass(frozen=True)
class Pass:
    """One walk over the examples: whole batches first, then the smaller one that is left. Static, so hashable."""

    batch_size: int
    whole: int
    rest: int
    inner_steps: int

    @property
    def updates(self) -> int:
        """The number of updates."""
        return (self.whole + (self.rest > 0)) * self.inner_steps


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
            f"`steps` counts updates and each batch makes `inner_steps`={inner_steps} of them: it must be a multiple, "
            f"got {steps}"
        )
    return Length(None, steps, inner_steps)


def passes_of(length: Length, size: int, batch_size: Any) -> tuple[Pass, int, Pass | None]:
    """One epoch, how many of them, and the part of another that `steps` may end in.

    Raises:
        TypeError: `batch_size` is not an int.
        ValueError: it is below 1, or above the number of examples.
    """
    if batch_size is None:
        batch_size = size
    batch_size = _count(batch_size, "batch_size", least=1, hint="; None takes all examples at once")
    if batch_size > size:
        raise ValueError(
            f"`batch_size`={batch_size} is larger than `data`, which holds {size} examples; None takes all of them"
        )
    inner = length.inner_steps
    epoch = Pass(batch_size, size // batch_size, size % batch_size, inner)
    if length.epochs is not None:
        return epoch, length.epochs, None
    assert length.steps is not None
    epochs, left = divmod(length.steps, epoch.updates)
    # What is left is less than an epoch, so the smaller last batch, which ends one, is never part of it.
    return epoch, epochs, Pass(batch_size, left // inner, 0, inner) if left else None


def _count(value: Any, argument: str, *, least: int, hint: str = "") -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"`{argument}` must be an int, got {describe(value)}{hint}") from None
    if count < least:
        raise ValueError(f"`{argument}` must be at least {least}, got {count}{hint}")
    return count
