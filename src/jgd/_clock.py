"""The clock: programs that take turns. It needs no JAX: the peers in PyTorch are timed by it too."""

import random
import time
from collections.abc import Callable, Mapping
from typing import Any


def time_interleaved(
    programs: Mapping[Any, Callable[[], Any]], *, repeats: int = 20, seconds: float = 5.0
) -> dict[Any, list[float]]:
    """The seconds of each run of each program, after one that warms up.

    The programs take turns, in an order that changes from round to round, so that what else the machine does
    falls on all of them alike.

    Args:
        programs: what to run; a program returns when its result is there.
        repeats: runs of each, at most.
        seconds: a program that has taken this long in all runs no more; each runs once at least.

    Raises:
        ValueError: `repeats` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"`repeats` must be at least 1, got {repeats}")
    times: dict[Any, list[float]] = {name: [] for name in programs}
    for run in programs.values():
        run()
    order, shuffle = list(programs), random.Random(0).shuffle
    for _ in range(repeats):
        shuffle(order)
        for name in order:
            if sum(times[name]) > seconds:
                continue
            start = time.perf_counter()
            programs[name]()
            times[name].append(time.perf_counter() - start)
    return times
