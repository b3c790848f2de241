"""`jgd demo`: runs the tour, shows it, and writes the report."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from jgd._errors import require

NEEDS = ("sklearn", "matplotlib", "rich")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `jgd demo`."""
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("jgd-report"),
        help="where report.html goes; made if it is not there (default: %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="smaller sizes: under 30 seconds on two cores")


def run(args: argparse.Namespace) -> int:
    """Runs the tour.

    Returns:
        0 where every check of the tour held, 1 where one did not, 2 where `--out` cannot be written to.

    Raises:
        ImportError: the extra `demo` is not installed.
    """
    for module in NEEDS:
        require(module, "demo")
    try:
        directory = _writable(args.out)
    except OSError as error:
        print(f"jgd demo: error: {error}", file=sys.stderr)
        return 2
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]

    from jgd._demo import report, terminal, tour

    start = time.perf_counter()
    visits = []
    with terminal.open_screen() as screen:
        for visit in tour.run(quick=args.quick, entering=screen.entering):
            visits.append(visit)
            screen.show(visit)
        path = directory / "report.html"
        report.write(path, report.render(visits))
        sections = [visit.section for visit in visits]
        screen.say(f"\n{terminal.summary(sections)} {time.perf_counter() - start:.0f} s in all.")
        screen.say(f"The report, to open in a browser: {path}")
    return 0 if all(section.holds for section in sections) else 1


def _writable(directory: Path) -> Path:
    """The directory, made if need be and tried, so that nothing runs whose report could not be kept.

    Raises:
        OSError: it is a file, or cannot be made or written to.
    """
    if directory.exists() and not directory.is_dir():
        raise OSError(
            f"`--out` must be a directory, but {directory} is a file; name another, or move the file away"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise OSError(
            f"`--out` {directory} cannot be written to ({error.strerror}); name another directory"
        ) from error
    return directory
