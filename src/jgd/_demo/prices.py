"""The price of each quantity, measured here and now against the plain gradient."""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgd._bench.measure import BASELINE, Measurement, measure
from jgd._bench.models import Model, cnn_loss, mlp_loss
from jgd._demo import data, style
from jgd._demo.section import Picture, Section, Table

QUANTITIES = ("sum", "norms", "clipped_sum")
METHODS = ("vmap(grad)", "jgd")


def mlp(size: int = 128, width: int = 256) -> Model:
    """Two hidden layers of some width, on the first digits."""
    x, y = data.digits()
    keys = jax.random.split(jax.random.key(0), 3)
    widths = itertools.pairwise((64, width, width, 10))
    params = [_dense(key, i, o) for key, (i, o) in zip(keys, widths, strict=True)]
    batch = jnp.asarray(x[:size], jnp.float32), jnp.asarray(y[:size])
    return Model(f"MLP 64-{width}-{width}-10, {size} digits", mlp_loss, params, batch)


def cnn() -> Model:
    """Channels 1-16-32 on 64 digits."""
    x, y = data.digits()
    keys = jax.random.split(jax.random.key(1), 3)
    convolutions = [
        {"w": jax.random.normal(key, (3, 3, i, o)) / jnp.sqrt(9 * i), "b": jnp.zeros(o)}
        for key, (i, o) in zip(keys[:2], itertools.pairwise((1, 16, 32)), strict=True)
    ]
    params = {"convolutions": convolutions, "head": _dense(keys[2], 32, 10)}
    images = jnp.asarray(x[:64].reshape(64, 8, 8, 1), jnp.float32)
    return Model("CNN 1-16-32, 64 digits", cnn_loss, params, (images, jnp.asarray(y[:64])))


def section(quick: bool) -> Section:
    """Measures three quantities by `vmap(grad)` and by `jgd`, beside the plain gradient."""
    models = (mlp(),) if quick else (mlp(), cnn())
    found = [
        m
        for model in models
        for m in measure(model, QUANTITIES, METHODS, repeats=10 if quick else 30, seconds=1.0)[0]
    ]
    return Section(
        title="What each costs",
        claim=(
            "Time and memory of the plain gradient, of vmap(grad) and of jgd, measured on this machine "
            "just now."
        ),
        text=(
            "The programs are compiled first and then take turns; the time is the least of their runs. "
            "Memory is what XLA allocates for intermediate values. Ratios are to the plain gradient of the "
            "same model: jax.grad of the summed cost. jgd bench measures more models, larger ones, and "
            "other libraries.",
        ),
        tables=tuple(_table(model.name, [m for m in found if m.model == model.name]) for model in models),
        pictures=(
            Picture(
                "Time and memory relative to the plain gradient, which is 1; note the logarithmic axes.",
                partial(_draw, [model.name for model in models], found),
                (9.6, 3.2 * len(models) + 0.4),
            ),
        ),
    )


def _table(name: str, found: list[Measurement]) -> Table:
    rows = tuple(
        (
            f"{m.quantity}, {m.method}",
            f"{1e3 * m.minimum_seconds:.2f} ms",
            f"{m.time_ratio:.2f}×",
            f"{m.temporary_bytes / 2**20:.2f} MiB",
            f"{m.memory_ratio:.2f}×",
        )
        for m in sorted(found, key=lambda m: (m.method != BASELINE, QUANTITIES.index(m.quantity)))
    )
    return Table(name, ("quantity, by", "time", "relative", "memory", "relative"), rows)


def _dense(key: jax.Array, inputs: int, outputs: int) -> dict[str, jax.Array]:
    return {"w": jax.random.normal(key, (inputs, outputs)) / jnp.sqrt(inputs), "b": jnp.zeros(outputs)}


def _draw(models: list[str], found: list[Measurement], figure: Any) -> None:
    colors = {"vmap(grad)": style.ORANGE, "jgd": style.BLUE}
    grid = figure.subplots(len(models), 2, squeeze=False)
    for row, model in zip(grid, models, strict=True):
        for axes, field, title in zip(row, ("time_ratio", "memory_ratio"), ("time", "memory"), strict=True):
            ratios_shown = [getattr(m, field) for m in found if m.model == model]
            for shift, method in ((-0.19, "vmap(grad)"), (0.19, "jgd")):
                ratios = [
                    getattr(m, field)
                    for q in QUANTITIES
                    for m in found
                    if (m.model, m.method, m.quantity) == (model, method, q)
                ]
                bars = axes.bar(
                    np.arange(len(QUANTITIES)) + shift, ratios, 0.36, color=colors[method], label=method
                )
                axes.bar_label(
                    bars,
                    fmt=lambda v: f"{v:.2f}" if v < 10 else f"{v:.0f}",
                    fontsize=9,
                    padding=2,
                    color=style.INK,
                )
            axes.axhline(1, color=style.INK, lw=1)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
            axes.set_ylim(0.5 * min(1, *ratios_shown), 2.2 * max(1, *ratios_shown))
            axes.set_xticks(range(len(QUANTITIES)), QUANTITIES)
            axes.grid(axis="x", visible=False)
            axes.set(title=f"{model}: {title}", ylabel="× plain gradient")
    grid[0, 0].legend(fontsize=9)
