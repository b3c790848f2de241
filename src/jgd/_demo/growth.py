"""How the cost grows with the number of examples and of parameters, measured here and now."""

from functools import partial
from typing import Any

from jgd._bench.growth import Line, Sweep, lines
from jgd._bench.measure import BASELINE
from jgd._demo import prices, style
from jgd._demo.section import Check, Picture, Section, Table

COLORS = {BASELINE: style.INK, "jgd": style.BLUE, "vmap(grad)": style.ORANGE}


def section(quick: bool) -> Section:
    """Measures the clipped sum by `vmap(grad)` and by `jgd` in a few sizes, beside the plain gradient."""
    sizes = (32, 256) if quick else (16, 64, 256)
    sweeps = [Sweep("examples, B", lambda size: prices.mlp(size=size), sizes)]
    if not quick:
        sweeps.append(Sweep("width", lambda width: prices.mlp(size=64, width=width), (128, 256, 512)))
    found = [line for sweep in sweeps for line in lines(sweep, repeats=10, seconds=0.2)]
    return Section(
        title="How the cost grows",
        claim="The gradients of all examples cost vmap(grad) a copy of the parameters each; jgd holds factors.",
        text=(
            "The sum of the gradients of digits by an MLP of two hidden layers, each gradient clipped to norm 1, "
            "for more examples and for wider layers. Time is the least of a few runs, memory what XLA allocates "
            "for intermediate values and results. A slope of k means: ten times the size, 10^k times the cost. "
            "Width squared is the number of parameters. benchmarks/growth.py has more sizes, sequences and depth.",
        ),
        checks=tuple(_check(sweep, found) for sweep in sweeps),
        tables=(_table(found),),
        pictures=(
            Picture(
                "Time and memory on logarithmic axes; the figures are the slopes.",
                partial(draw, found),
                (9.6, 3.2 * len(sweeps) + 0.4),
            ),
        ),
    )


def _check(sweep: Sweep, found: list[Line]) -> Check:
    most = {line.method: line.bytes[-1] / 2**20 for line in found if line.sweep == sweep.name}
    ours, theirs = most["jgd"], most["vmap(grad)"]
    return Check(
        f"{sweep.name} at {sweep.sizes[-1]}: jgd takes {ours:.1f} MiB, vmap(grad) {theirs:.1f} MiB, "
        f"the plain gradient {most[BASELINE]:.1f} MiB",
        ours < theirs / 4,
    )


def _table(found: list[Line]) -> Table:
    rows = tuple(
        (
            f"{line.sweep}: {line.method}",
            f"{1e3 * line.seconds[0]:.2f} → {1e3 * line.seconds[-1]:.2f} ms",
            f"{line.time_slope:.2f}",
            f"{line.bytes[0] / 2**20:.2f} → {line.bytes[-1] / 2**20:.2f} MiB",
            f"{line.memory_slope:.2f}",
        )
        for line in found
    )
    return Table("From the smallest to the largest size", ("", "time", "slope", "memory", "slope"), rows)


def draw(found: list[Line], figure: Any) -> None:
    """A row of two panels for each sweep: time and memory over size, one line for each method."""
    sweeps = list(dict.fromkeys(line.sweep for line in found))
    grid = figure.subplots(len(sweeps), 2, squeeze=False)
    for row, sweep in zip(grid, sweeps, strict=True):
        for axes, (title, unit) in zip(row, (("time", "ms"), ("memory", "MiB")), strict=True):
            for line in (line for line in found if line.sweep == sweep):
                values, slope = (
                    ([1e3 * s for s in line.seconds], line.time_slope)
                    if title == "time"
                    else ([b / 2**20 for b in line.bytes], line.memory_slope)
                )
                label = f"{line.method}: {slope:.2f}"
                axes.plot(line.sizes, values, "o-", color=COLORS[line.method], label=label, ms=4)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(line.sizes, map(str, line.sizes))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
            axes.set(title=title, xlabel=sweep, ylabel=unit)
            axes.legend(fontsize=8, title="slope", title_fontsize=8)
