"""What a section of the tour is: a claim, what was computed, and how it is drawn. The terminal and the "
"report render it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """One statement with its measured figures, and whether they bear it out."""

    statement: str
    holds: bool


@dataclass(frozen=True)
class Table:
    """Rows of text under a caption; the first column names the row, the others hold figures."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Picture:
    """A picture that draws itself on an empty matplotlib figure of the given size, in inches."""

    caption: str
    draw: Callable[[Any], None]
    size: tuple[float, float] = (9.0, 3.8)


@dataclass(frozen=True)
class Section:
    """One stop of the tour.

    Attributes:
        title: a few words.
        claim: what is shown, in one sentence.
        text: how it is shown; paragraphs of plain text.
        checks: what was measured, and whether the claim held.
        tables: figures to read.
        pictures: figures to look at.
    """

    title: str
    claim: str
    text: tuple[str, ...]
    checks: tuple[Check, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether every check does."""
        return all(check.holds for check in self.checks)


def figures(value: float) -> str:
    """Three significant figures, or all the digits before the point: 0.000293, 71.4, 5,321."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
