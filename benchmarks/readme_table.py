"""Puts some columns of the stored figures into the README, between its markers; all are in `docs/benchmarks.md`.

    python benchmarks/run.py
    python benchmarks/readme_table.py benchmarks/cpu.json

`--check` changes nothing, and fails where the README's table is not the file's.
"""

import argparse
import json
import sys
from pathlib import Path

from jgd._bench.command import table
from jgd._bench.measure import BASELINE, Measurement

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- bench: begin, by benchmarks/readme_table.py -->", "<!-- bench: end -->"


SHOWN = {
    "jgd": ("sum", "norms", "clipped_sum", "variance", "gram", "all"),
    "jgd autotuned": ("norms", "clipped_sum"),
    "vmap(grad)": ("sum", "norms", "clipped_sum"),
}


def render(record: dict) -> str:
    """The table in Markdown, a row for each model, and a line that says where it was measured."""
    found = [Measurement(**m) for m in record["measurements"]]
    columns = table([m for m in found if m.method == BASELINE or m.quantity in SHOWN.get(m.method, ())])
    names = [BASELINE, *(f"{quantity}, {by}" for quantity, by, *_ in columns[2:])]
    lines = [["", *names], ["---"] + ["--:"] * len(names)]
    for model, *cells in zip(columns[0][2:], *(column[2:] for column in columns[1:]), strict=True):
        lines.append([f"**{model}**" if model == "mean" else model, *cells])
    where = record["environment"]
    device = f"{where['cores']} CPU cores" if where["platform"] == "cpu" else where["device"]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{body}\n\nMeasured on {device}, jax {where['jax']}, jgd {where['jgd']}, float32."


def main() -> int:
    """Writes or checks the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="what `benchmarks/run.py` or `jgd bench --json` wrote")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    before, rest = README.read_text().split(BEGIN)
    _, after = rest.split(END)
    text = f"{before}{BEGIN}\n{render(json.loads(args.file.read_text()))}\n{END}{after}"
    if args.check:
        return int(text != README.read_text())
    README.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
