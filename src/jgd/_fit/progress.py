"""The progress bar, which nothing imports unless it is asked for."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jgd._errors import require
from jgd._methods.method import StepInfo

_REFRESH_SECONDS = 0.1


@contextmanager
def bar(total: int | None) -> Iterator[Callable[[StepInfo], None]]:
    """A bar on the terminal with an estimate of the time left; the function it gives counts one update.

    Raises:
        ImportError: `rich` is not installed.
    """
    rich = require("rich.progress", "demo")
    columns = [
        rich.TextColumn("value {task.fields[value]}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn("updates"),
        rich.TimeElapsedColumn(),
        rich.TextColumn("left"),
        rich.TimeRemainingColumn(),
    ]
    with rich.Progress(*columns) as progress:
        task = progress.add_task("", total=total, value="-")
        done, shown = 0, time.monotonic()

        def advance(info: StepInfo) -> None:
            nonlocal done, shown
            done += 1
            # Reading the value waits for the device, without which the bar would run ahead of the work.
            if done == total or time.monotonic() - shown > _REFRESH_SECONDS:
                progress.update(task, completed=done, value=f"{float(info.value):.5g}")
                shown = time.monotonic()

        yield advance
        progress.update(task, completed=done)
