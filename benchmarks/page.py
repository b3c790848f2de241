"""From a record of measurements to what one reads: the tables of `docs/benchmarks.md`, a picture, a summary."""

from pathlib import Path
from typing import Any

import judge

from jgd._bench.command import absences, geometric_mean, ratios, short
from jgd._bench.measure import BASELINE, Missing

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
COLORS = {
    "jgd": "#2563a8", "jgd autotuned": "#7fb2e5", "jgd second pass": "#1b9aaa", "vmap(grad)": "#d9680f",
    "microbatch 1": "#2e8b57", "microbatch 4": "#9bc8ab",
    "jax_privacy": "#7b52ab", "jax_privacy 1": "#a88acb", "jax_privacy 4": "#cdbbe2",
}  # fmt: skip


def put(file: Path, script: str, text: str) -> None:
    """Puts what a script has to say between its markers in a page."""
    before, _, after = split(file, script)
    file.write_text(f"{before}{text}{after}")


def split(file: Path, script: str) -> tuple[str, str, str]:
    """A page up to a script's part, with the marker; that part; and the rest of the page.

    Raises:
        ValueError: the markers are not there.
    """
    begin, end = f"<!-- {script}: begin, by benchmarks/{script}.py -->\n", f"\n<!-- {script}: end -->"
    before, found, rest = file.read_text().partition(begin)
    inside, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"{file} lacks the markers {begin.strip()} and {end.strip()}")
    return before + begin, inside, end + after


def render(record: dict[str, Any]) -> str:
    """All tables, in Markdown."""
    where = record["environment"]
    device = f"{where['cores']} CPU cores" if where["platform"] == "cpu" else where["device"]
    parts = [f"Measured on {device}, jax {where['jax']}, jgd {where['jgd']}, float32."]
    parts += ["### Targets", targets(record)]
    present = dict.fromkeys(m["quantity"] for m in record["measurements"] if m["method"] != BASELINE)
    for quantity in present:
        parts += [f"### {quantity}", quantity_table(record, quantity)]
    if "peers" in record:
        parts += ["### Peers in PyTorch", peers_table(record["peers"])]
    missing = [*record.get("missing", []), *record.get("peers", {}).get("missing", [])]
    if missing:
        lines = absences([Missing(**m) for m in missing])
        parts += ["### Absent", "\n".join(f"- {line.removeprefix('Absent: ')}" for line in lines)]
    return "\n\n".join(parts)


def markdown(table: list[list[str]], named: int = 1) -> str:
    """A table whose first columns name the row."""
    rule = ["---"] * named + ["--:"] * (len(table[0]) - named)
    return "\n".join(f"| {' | '.join(row)} |" for row in (table[0], rule, *table[1:]))


def targets(record: dict[str, Any]) -> str:
    """Each target, what was measured, and whether it is met."""
    table = [["quantity", "by", "what", "target", "measured", "worst model", ""]]
    for v in judge.verdicts(record):
        mark = "met" if v.met else "**missed**"
        table.append([v.quantity, v.method, v.what, f"≤ {v.target:.2f}×", f"{short(v.got)}×", v.where, mark])
    return markdown(table, 3)


def quantity_table(record: dict[str, Any], quantity: str) -> str:
    """A row for each model: what every method costs, and what `jgd` costs beside the best other and to build."""
    cells = {(m["model"], m["quantity"], m["method"]): m for m in record["measurements"]}
    models = list(dict.fromkeys(m["model"] for m in record["measurements"]))
    methods = list(dict.fromkeys(m for _, q, m in cells if q == quantity and m != BASELINE))
    judged = {(row.model, row.method): row for row in judge.rows(record) if row.quantity == quantity}
    own = [method for method in methods if method in judge.OWN]
    extra = [*(f"{method} to the best other" for method in own), "building, jgd"] if judged else []
    table = [["model", BASELINE, *methods, *extra]]
    for model in models:
        base = cells[model, "sum", BASELINE]
        line = [model, f"{1e3 * base['minimum_seconds']:.2f} ms, {base['temporary_bytes'] / 2**20:.1f} MiB"]
        found = [cells.get((model, quantity, method)) for method in methods]
        for method, m in zip(methods, found, strict=True):
            text = "—" if m is None else ratios(m["time_ratio"], m["memory_ratio"])
            row = judged.get((model, method))
            line.append(f"**{text}**" if row is not None and "time" in row.missed() else text)
        table.append(line + (_judged([judged.get((model, method)) for method in own]) if judged else []))
    mean = ["**mean**", ""]
    for method in methods:
        have = [cells[m, quantity, method] for m in models if (m, quantity, method) in cells]
        times, memories = ([m[of] for m in have] for of in ("time_ratio", "memory_ratio"))
        mean.append(ratios(geometric_mean(times), geometric_mean(memories)))
    return markdown([*table, mean + [""] * (len(table[0]) - len(mean))])


def _judged(rows: list[judge.Row | None]) -> list[str]:
    """Each method's time to the best other's, and what the first costs to build."""
    star = lambda row, text, what: f"**{text}**" if what in row.missed() else text
    others = [
        "—"
        if row is None or row.to_other is None
        else star(row, f"{short(row.to_other)}×", "other") + f" ({row.other})"
        for row in rows
    ]
    return [*others, "—" if rows[0] is None else star(rows[0], f"{short(rows[0].build)}×", "build")]


def peers_table(peers: dict[str, Any]) -> str:
    """A row for each model, a column for each peer and quantity; a dash for what is absent."""
    found = peers["measurements"]
    if not found:
        return "None could be measured; the reasons are below."
    cells = {(m["model"], m["quantity"], m["method"]): m for m in found}
    columns = list(dict.fromkeys((q, m) for _, q, m in cells if m != BASELINE))
    table = [["model", f"{BASELINE}, PyTorch", *(f"{quantity}, {method}" for quantity, method in columns)]]
    for model in dict.fromkeys(m["model"] for m in found):
        base = cells[model, "sum", BASELINE]
        times = [cells.get((model, *column)) for column in columns]
        shown = ["—" if m is None else f"{short(m['time_ratio'])}×" for m in times]
        table.append([model, f"{1e3 * base['minimum_seconds']:.2f} ms", *shown])
    versions = ", ".join(f"{name} {version}" for name, version in peers["environment"].items())
    return f"{markdown(table)}\n\nTime to that of the plain gradient in PyTorch; {versions}."


def summary(record: dict[str, Any]) -> str:
    """How many targets are met, and which are not."""
    found = judge.verdicts(record)
    missed = [v for v in found if not v.met]
    lines = [f"{len(found) - len(missed)} of {len(found)} targets met"]
    for v in missed:
        where = f" ({v.where})" if v.where else ""
        lines.append(
            f"missed: {v.quantity} by {v.method}, {v.what}: {short(v.got)}× for {short(v.target)}×{where}"
        )
    return "\n".join(lines)


def draw(file: Path, record: dict[str, Any]) -> None:
    """A panel for each quantity: the time of each method on each model, on a logarithmic axis."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    found = [m for m in record["measurements"] if m["method"] != BASELINE and m["quantity"] != "sum"]
    quantities, models = (list(dict.fromkeys(m[of] for m in found)) for of in ("quantity", "model"))
    columns = min(3, len(quantities))
    rows = -(-len(quantities) // columns)
    with mpl.rc_context({"svg.hashsalt": "jgd", "font.size": 9, "axes.axisbelow": True}):
        figure = Figure(
            figsize=(3.6 * columns + 1, (0.32 * len(models) + 1) * rows + 0.5), layout="constrained"
        )
        FigureCanvasSVG(figure)
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for axes in grid[len(quantities) :]:
            axes.set_visible(False)
        for axes, quantity in zip(grid, quantities, strict=False):
            _panel(axes, [m for m in found if m["quantity"] == quantity], models)
            axes.set_title(quantity, loc="left", fontweight="bold")
        handles = [
            mpl.lines.Line2D([], [], marker="o", ls="", color=color, label=method)
            for method, color in COLORS.items()
            if any(m["method"] == method for m in found)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
        figure.supxlabel("time, × plain gradient")
        figure.savefig(file, metadata={"Date": None})


def _panel(axes: Any, found: list[dict[str, Any]], models: list[str]) -> None:
    axes.axvline(1, color="#1f2933", lw=1)
    axes.grid(axis="x", color="#e4e7eb")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(models)), models)
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.spines[["top", "right"]].set_visible(False)
    for method, color in reversed(COLORS.items()):  # jgd on top
        own = [m for m in found if m["method"] == method]
        axes.plot(
            [m["time_ratio"] for m in own], [models.index(m["model"]) for m in own], "o", color=color,
            ms=7 if method == "jgd" else 5, mec="white", mew=0.6,
        )  # fmt: skip
