"""Where a run stands between two batches: what a checkpoint holds."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jgd._fit.history import History
from jgd._methods.method import MethodState


class Standing(NamedTuple):
    """Where a run stands between two batches.

    Attributes:
        state: the method's state.
        history: gives what the updates so far saw; it may have room for more.
        batches: how many batches were trained on.
        position: where the iterable that gives the batches stands, in JSON; None for arrays.
    """

    state: MethodState
    history: Callable[[], History]
    batches: int = 0
    position: Any = None
