"""The tour in the terminal: rich where there is one, plain text where there is not."""

import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from jgd._demo.section import Section, Table
from jgd._demo.tour import STOPS, Stop, Visit
from jgd._errors import require

WIDTH = 100


class Screen(Protocol):
    """Where the tour is shown."""

    def entering(self, stop: Stop) -> None:
        """Says what is being computed."""

    def show(self, visit: Visit) -> None:
        """Shows a section."""

    def say(self, text: str) -> None:
        """Shows one line."""


class PlainScreen:
    """Text without colours or cursor movements."""

    def entering(self, stop: Stop) -> None:
        """Plain text has no use for it: the section itself follows."""

    def show(self, visit: Visit) -> None:
        """Title, claim, checks and tables as text."""
        section = visit.section
        print(f"\n{section.title}\n{'=' * len(section.title)}")
        print("\n".join(textwrap.wrap(section.claim, WIDTH)) + "\n")
        for check in section.checks:
            lines = textwrap.wrap(check.statement, WIDTH - 8, subsequent_indent=" " * 8)
            print(f"  {'holds' if check.holds else 'FAILS'} " + "\n".join(lines))
        for table in section.tables:
            print("\n" + "\n".join("  " + line for line in _plain_table(table)))
        print(f"\n  ({visit.seconds:.1f} s)", flush=True)

    def say(self, text: str) -> None:
        """One line."""
        print(text, flush=True)


class RichScreen:
    """Colours, tables, and a line that says what is being computed."""

    def __init__(self) -> None:
        self._console = require("rich.console", "demo").Console(highlight=False)
        self._status = self._console.status("")
        self._entered = 0

    def entering(self, stop: Stop) -> None:
        """Turns the status line to the next section."""
        self._entered += 1
        self._status.update(f"[bold]{self._entered}/{len(STOPS)}[/] {stop.name} …")
        self._status.start()

    def show(self, visit: Visit) -> None:
        """Title, claim, checks and tables."""
        self._status.stop()
        from rich.markup import escape
        from rich.padding import Padding
        from rich.text import Text

        section, out = visit.section, self._console
        out.rule(f"[bold]{escape(section.title)}[/] [dim]{visit.seconds:.1f} s[/]", align="left")
        out.print(Padding(Text(section.claim, style="italic"), (0, 2, 1, 2)))
        for check in section.checks:
            mark = Text("✓ " if check.holds else "✗ ", style="bold green" if check.holds else "bold red")
            out.print(Padding(mark + Text(check.statement), (0, 2)))
        for table in section.tables:
            out.print(Padding(_rich_table(table), (1, 2, 0, 2)))
        out.print()

    def say(self, text: str) -> None:
        """One line."""
        self._console.print(text, markup=False)

    def close(self) -> None:
        """Gives the cursor back."""
        self._status.stop()


@contextmanager
def open_screen() -> Iterator[Screen]:
    """The screen that standard output allows."""
    if not sys.stdout.isatty():
        yield PlainScreen()
        return
    screen = RichScreen()
    try:
        yield screen
    finally:
        screen.close()


def summary(sections: Sequence[Section]) -> str:
    """How many checks held, in one line."""
    checks = [check for section in sections for check in section.checks]
    held = sum(check.holds for check in checks)
    return f"{held} of {len(checks)} checks hold" + (
        "." if held == len(checks) else "; the others are marked."
    )


def _plain_table(table: Table) -> list[str]:
    lines = [table.columns, *table.rows]
    widths = [max(len(line[k]) for line in lines) for k in range(len(table.columns))]
    rows = []
    for first, *figures in lines:
        rows.append(
            "  ".join(
                [first.ljust(widths[0]), *(f.rjust(w) for f, w in zip(figures, widths[1:], strict=True))]
            )
        )
    return [table.caption, rows[0], "-" * len(rows[0]), *rows[1:]]


def _rich_table(table: Table):
    from rich import box
    from rich.table import Table as RichTable

    rich = RichTable(title=table.caption, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for k, column in enumerate(table.columns):
        rich.add_column(column, justify="right" if k else "left")
    for row in table.rows:
        rich.add_row(*row)
    return rich
