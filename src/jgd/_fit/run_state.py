"""Where a run stands between two updates: what a checkpoint holds."""

from collections.abc import Callable
from typing import NamedTuple

from jgd._fit.history import History
from jgd._fit.position import Position
from jgd._methods.method import MethodState


class RunState(NamedTuple):
    """Where a run stands between two updates.

    Attributes:
        state: the method's state.
        history: gives what the updates so far saw; it may have room for more.
        batches: how many batches were trained on to their end.
        position: where the loader stands after the last of these; None for arrays, and before the first.
        repeats: how many of its `inner_steps` the next batch has had, where a callback stopped amid them.
    """

    state: MethodState
    history: Callable[[], History]
    batches: int = 0
    position: Position | None = None
    repeats: int = 0
