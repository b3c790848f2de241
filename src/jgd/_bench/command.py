"""`jgd bench`: the suite from the command line."""

import argparse
import importlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jgd._bench.measure import BASELINE, Measurement, Missing, environment, measure, to_json
from jgd._bench.models import MODELS, build
from jgd._bench.quantities import METHODS, QUANTITIES

_DEFAULT_QUANTITIES = ("sum", "norms", "clipped_sum")
_DEFAULT_METHODS = ("jgd", "vmap(grad)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `jgd bench` to a parser."""

    def some_of(option: str, names: Sequence[str], default: Sequence[str], note: str = "") -> None:
        usual = "all" if list(default) == list(names) else " ".join(default)
        text = f"any of {', '.join(names)}{note} (default: {usual})"
        parser.add_argument(
            option, nargs="+", choices=names, default=list(default), metavar="NAME", help=text
        )

    some_of("--models", list(MODELS), list(MODELS))
    some_of("--quantities", list(QUANTITIES), _DEFAULT_QUANTITIES, "; clipped_sum comes with its norms")
    some_of("--methods", list(METHODS), _DEFAULT_METHODS)
    parser.add_argument("--repeats", type=int, default=20, help="runs of each program, at most (default: 20)")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="a program that took this long in all rests (default: 5)"
    )
    parser.add_argument(
        "--builds",
        type=int,
        default=1,
        help="how often jgd's programs are built, for the least time (default: 1)",
    )
    parser.add_argument(
        "--small", action="store_true", help="tiny sizes: to see that it works, not to compare"
    )
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement to FILE")


def run(args: argparse.Namespace) -> int:
    """Measures, prints a table, writes the JSON where asked to; the exit status is 0."""
    for option in ("repeats", "builds"):
        if vars(args)[option] < 1:
            print(f"jgd bench: `--{option}` must be at least 1, got {vars(args)[option]}", file=sys.stderr)
            return 2
    if args.json and not args.json.parent.is_dir():
        print(f"jgd bench: `--json` names a folder that is not there: {args.json.parent}", file=sys.stderr)
        return 2
    found: list[Measurement] = []
    missing: list[Missing] = []
    for name in args.models:
        started = time.perf_counter()
        measured = measure(
            build(name, small=args.small), args.quantities, args.methods,
            repeats=args.repeats, seconds=args.seconds, from_scratch=not args.small, builds=args.builds, say=_say,
        )  # fmt: skip
        found += measured[0]
        missing += measured[1]
        if not sys.stderr.isatty():
            print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    _say("")
    if args.json:
        asked = ("repeats", "seconds", "builds", "small")
        settings = {option: vars(args)[option] for option in asked}
        args.json.write_text(to_json(found, missing, **settings))
    rows = table(found)
    _print_table(rows, markdown=args.markdown)
    print(f"\nTime (fastest run), temporary memory; both relative to the plain gradient's.\n{_where()}")
    if any(m.method == BASELINE and m.minimum_seconds < _SHORT for m in found):
        print("~ is for a plain gradient of less than a millisecond: such ratios say little.")
    for line in absences(missing):
        print(line)
    return 0


def absences(missing: Sequence[Missing]) -> list[str]:
    """What is missing, a line for each method, reason and set of models."""
    models: dict[tuple[str, str, str], list[str]] = {}
    for m in missing:
        models.setdefault((m.method, m.why, m.quantity), []).append(m.model)
    quantities: dict[tuple[str, str, str], list[str]] = {}
    for (method, why, quantity), names in models.items():
        quantities.setdefault((method, why, ", ".join(names)), []).append(quantity)
    return [
        f"Absent: {', '.join(of)} by {method} on {names}: {why}."
        for (method, why, names), of in quantities.items()
    ]


def _say(text: str) -> None:
    """One line of progress, written over the last one; nothing where no one watches."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _where() -> str:
    facts = environment()
    return f"{facts['device']}, {facts['cores']} cores, jax {facts['jax']}, jgd {facts['jgd']}"


def table(found: Sequence[Measurement]) -> list[list[str]]:
    """A row for each quantity and method: time and memory ratio on each model, then their geometric means.

    Returns:
        Rows of cells, the header first; the next one has the plain gradient's milliseconds and MiB. What is missing
        is a dash, and has no part in the mean.
    """
    models = list(dict.fromkeys(m.model for m in found))
    cells = {(m.quantity, m.method, m.model): m for m in found}
    base = [cells["sum", BASELINE, model] for model in models]
    rows = [["quantity", "by", *models, "mean"]]
    absolute = [f"{m.minimum_seconds * 1e3:.2f} ms, {m.temporary_bytes / 2**20:.1f} MiB" for m in base]
    rows.append(["", BASELINE, *absolute, ""])
    for quantity, method in dict.fromkeys((m.quantity, m.method) for m in found if m.method != BASELINE):
        row = [cells.get((quantity, method, model)) for model in models]
        body = ["—" if m is None else _cell(m) for m in row]
        there = [m for m in row if m is not None]
        means = (geometric_mean([getattr(m, of) for m in there]) for of in ("time_ratio", "memory_ratio"))
        rows.append([quantity, method, *body, ratios(*means)])
    return rows


_SHORT = 1e-3  # seconds


def _cell(m: Measurement) -> str:
    is_short = m.minimum_seconds < _SHORT * m.time_ratio
    return f"{'~' if is_short else ''}{ratios(m.time_ratio, m.memory_ratio)}"


def geometric_mean(ratios: Sequence[float]) -> float:
    """The geometric mean of ratios, a memory of nothing counted as a thousandth."""
    return statistics.geometric_mean([max(ratio, 1e-3) for ratio in ratios])


def ratios(time: float, memory: float) -> str:
    """The two ratios of a cell."""
    return f"{short(time)}×, {short(memory)}×"


def short(ratio: float) -> str:
    """A ratio in three figures or so."""
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def _print_table(rows: list[list[str]], *, markdown: bool) -> None:
    """In Markdown, by rich where a terminal is there for it, or as plain text in columns."""
    if markdown:
        print(_markdown(rows))
    elif sys.stdout.isatty() and importlib.util.find_spec("rich"):
        console, tables = importlib.import_module("rich.console"), importlib.import_module("rich.table")
        for quantity, turned in _by_quantity(rows):
            drawn = tables.Table(title=quantity, title_justify="left")
            for k, name in enumerate(turned[0]):
                drawn.add_column(name, justify="left" if k == 0 else "right")
            for row in turned[1:]:
                drawn.add_row(*row)
            console.Console().print(drawn)
    else:
        print("\n\n".join(_columns(turned) for _, turned in _by_quantity(rows)))


def _by_quantity(rows: list[list[str]]) -> list[tuple[str, list[list[str]]]]:
    """A table for each quantity, narrow enough for 80 columns: a row for each model, a column for each method."""
    header, base, *others = rows
    made = []
    for quantity in dict.fromkeys(row[0] for row in others):
        columns = [[quantity, *header[2:]], [base[1], *base[2:]]]
        columns += [[row[1], *row[2:]] for row in others if row[0] == quantity]
        made.append((quantity, [list(row) for row in zip(*columns, strict=True)]))
    return made


def _columns(rows: list[list[str]]) -> str:
    """The rows as text in columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        measured = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *measured]).rstrip())
    return "\n".join(lines)


def _markdown(rows: list[list[str]]) -> str:
    lines = [" | ".join(row) for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
    return "\n".join(f"| {line} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m jgd._bench.command`."""
    parser = argparse.ArgumentParser(prog="jgd bench", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
