"""The order of the tour."""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from jgd._demo import ascent, baselines, games, growth, opposites, prices, regimes, repeats, sums
from jgd._demo.section import Section


class Stop(NamedTuple):
    """A section to come: the name shown while it runs, and what computes it (`quick` or not)."""

    name: str
    compute: Callable[[bool], Section]


STOPS = (
    Stop("sums of gradients", sums.section),
    Stop("three regimes", regimes.section),
    Stop("one example again and again", repeats.section),
    Stop("descent and ascent", opposites.section),
    Stop("ascent: a bandit and CartPole", ascent.section),
    Stop("the baseline of least variance", baselines.section),
    Stop("a saddle", games.section),
    Stop("prices", prices.section),
    Stop("growth", growth.section),
)


class Visit(NamedTuple):
    """A section that has been computed, and the seconds that it took."""

    section: Section
    seconds: float


def run(*, quick: bool, entering: Callable[[Stop], None]) -> Iterator[Visit]:
    """Computes the sections one after another; `entering` is told of each before it starts."""
    for stop in STOPS:
        entering(stop)
        start = time.perf_counter()
        section = stop.compute(quick)
        yield Visit(section, time.perf_counter() - start)
