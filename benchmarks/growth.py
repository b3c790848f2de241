"""How time and memory grow with the examples, the width, the length and the depth: lines, slopes, a picture.

    python benchmarks/growth.py             # some five minutes on two cores
    python benchmarks/growth.py --render    # from the stored figures, without measuring

The clipped sum with norms, by `jgd` and by `vmap(grad)`, beside the plain gradient. It writes `growth.json`,
`growth.svg` and the table of docs/benchmarks.md.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import page

from jgd._bench.growth import SWEEPS, Line, lines
from jgd._bench.measure import environment
from jgd._demo.growth import draw
from jgd._demo.style import RC

HERE = Path(__file__).parent


def table(found: list[Line]) -> str:
    """A row for each sweep and method, with both slopes and what the largest size costs."""
    rows = [["size", "by", "from", "to", "time there", "slope", "memory there", "slope"]]
    for line in found:
        time, memory = f"{1e3 * line.seconds[-1]:.2f} ms", f"{line.bytes[-1] / 2**20:.1f} MiB"
        slopes = f"{line.time_slope:.2f}", f"{line.memory_slope:.2f}"
        ends = str(line.sizes[0]), str(line.sizes[-1])
        rows.append([line.sweep, line.method, *ends, time, slopes[0], memory, slopes[1]])
    return page.markdown(rows, 2)


def picture(file: Path, found: list[Line]) -> None:
    """The picture of all lines."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(RC):
        figure = Figure(figsize=(9.6, 3 * len({line.sweep for line in found})))
        FigureCanvasSVG(figure)
        draw(found, figure)
        figure.savefig(file, metadata={"Date": None})


def main() -> int:
    """Measures or renders, as told."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweeps", nargs="+", choices=list(SWEEPS), default=list(SWEEPS), metavar="NAME")
    parser.add_argument("--repeats", type=int, default=20, help="runs of each program, at most (default: 20)")
    parser.add_argument("--seconds", type=float, default=2.0, help="a program rests after these (default: 2)")
    parser.add_argument("--json", type=Path, default=HERE / "growth.json", metavar="FILE")
    parser.add_argument("--page", type=Path, default=page.PAGE, metavar="FILE", help="whose table is written")
    parser.add_argument("--render", action="store_true", help="from the stored figures, without measuring")
    args = parser.parse_args()
    page.split(args.page, "growth")  # a page that cannot be written should fail now
    if args.render:
        found = [Line(**line) for line in json.loads(args.json.read_text())["lines"]]
    else:
        say = lambda text: print(text, file=sys.stderr, flush=True)
        found = []
        for name in args.sweeps:
            found += lines(SWEEPS[name], repeats=args.repeats, seconds=args.seconds, say=say)
        record = {"environment": environment(), "lines": [asdict(line) for line in found]}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    page.put(args.page, "growth", table(found))
    picture(args.json.with_suffix(".svg"), found)
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
