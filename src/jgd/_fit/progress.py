"""The progress bar, which nothing imports unless it is asked for."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

from jgd._errors import require

Report = Callable[[int, jax.Array], None]  # how many updates are made, and the value that the last one saw

_REFRESH_SECONDS = 0.1


@contextmanager
def bar(total: int | None) -> Iterator[Report]:
    """A bar on the terminal with an estimate of the time left; the function it gives moves it.

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
        made, shown = 0, time.monotonic()

        def report(done: int, value: jax.Array) -> None:
            nonlocal made, shown
            made = done
            # Reading the value waits for the device, without which the bar would run ahead of the work.
            if done == total or time.monotonic() - shown > _REFRESH_SECONDS:
                progress.update(task, completed=done, value=f"{float(value):.5g}")
                shown = time.monotonic()

        yield report
        progress.update(task, completed=made)
