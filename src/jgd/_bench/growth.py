"""How time and memory grow with one size of a problem: a line on logarithmic axes, and its slope."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jgd._bench.measure import BASELINE, measure
from jgd._bench.models import Model
from jgd._bench.models.sequences import transformer_of
from jgd._bench.models.vectors import mlp_of

METHODS = ("jgd", "vmap(grad)")
QUANTITY = "clipped_sum"


@dataclass(frozen=True)
class Sweep:
    """Models that differ in one size.

    Attributes:
        name: what the size is called, as on an axis.
        model: the model of a size.
        sizes: the sizes, rising.
    """

    name: str
    model: Callable[[int], Model]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Line:
    """What one method costs along a sweep.

    Attributes:
        sweep: the sweep's name.
        method: "plain gradient", or a method's clipped sum with norms.
        sizes: the sizes that were measured.
        seconds: the least time at each size.
        bytes: temporary memory and results at each size.
    """

    sweep: str
    method: str
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    bytes: tuple[int, ...]

    @property
    def time_slope(self) -> float:
        """The exponent k of the power law size^k that fits the times best."""
        return slope(self.sizes, self.seconds)

    @property
    def memory_slope(self) -> float:
        """The same of the memory."""
        return slope(self.sizes, self.bytes)


SWEEPS: Mapping[str, Sweep] = {
    "B": Sweep("examples, B", lambda size: mlp_of("mlp", (256, 256, 256, 10), size), (16, 32, 64, 128, 256)),
    "width": Sweep(
        "width (P grows with its square)",
        lambda width: mlp_of("mlp", (width, width, width, 10), 32),
        (64, 128, 256, 512, 1024),
    ),
    "T": Sweep(
        "length, T",
        lambda length: transformer_of("transformer", 64, 2, length, 256, 8, 4),
        (16, 32, 64, 128, 256),
    ),
    "depth": Sweep(
        "layers", lambda layers: transformer_of("transformer", 64, layers, 64, 256, 8, 4), (1, 2, 4, 8)
    ),
}


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of the straight line that fits log(values) over log(sizes) best, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def lines(
    sweep: Sweep, *, repeats: int = 20, seconds: float = 2.0, say: Callable[[str], None] = lambda _: None
) -> list[Line]:
    """Measures the plain gradient and the clipped sum by each method along a sweep.

    A method ends where it cannot be measured, such as for want of memory; a line has the sizes before.
    """
    found: dict[str, list[tuple[int, float, int]]] = {}
    for size in sweep.sizes:
        say(f"{sweep.name}: {size}")
        measurements, _ = measure(sweep.model(size), [QUANTITY], METHODS, repeats=repeats, seconds=seconds)
        for m in measurements:
            point = size, m.minimum_seconds, m.temporary_bytes + m.output_bytes
            found.setdefault(m.method, []).append(point)
    order = (BASELINE, *METHODS)
    return [
        Line(sweep.name, method, *(tuple(column) for column in zip(*found[method], strict=True)))
        for method in order
        if len(found.get(method, ())) > 1
    ]
