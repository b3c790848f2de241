"""What the figures are held to: the targets, and the last figures that were stored."""

import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

BASELINE = "plain gradient"
OWN = ("jgd", "jgd autotuned")  # what is judged


class Target(NamedTuple):
    """The most that a quantity may cost, in units of the plain gradient."""

    time_mean: float  # geometric mean over the models
    time_worst: float
    memory_mean: float


TARGETS = {
    "norms": Target(0.85, 1.10, 1.10),
    "noise_scale": Target(0.85, 1.10, 1.10),
    "clipped_sum": Target(1.00, 1.20, 1.15),
    "second_moment": Target(1.4, 2.0, 1.4),
    "variance": Target(1.4, 2.0, 1.4),
    "gram": Target(1.2, 2.0, 1.4),
    "all": Target(1.8, 3.0, 1.8),
}
TO_BEST_OTHER = 1.05  # of the fastest other method in JAX, on every model
BUILD = 2.5  # tracing and compiling, of the plain gradient's, on every model


class Row(NamedTuple):
    """What one quantity of one model costs here, in units of the plain gradient and of the best other method."""

    method: str  # one of `OWN`
    model: str
    quantity: str
    time: float
    memory: float
    build: float  # tracing and compiling
    other: str | None  # the fastest other method
    to_other: float | None  # this time to that one's

    def missed(self) -> list[str]:
        """What on this row alone is dearer than its target."""
        found = []
        if self.time > TARGETS[self.quantity].time_worst:
            found.append("time")
        if self.method == "jgd" and self.build > BUILD:  # tuning compiles a dozen programs, and is asked for
            found.append("build")
        if self.to_other is not None and self.to_other > TO_BEST_OTHER:
            found.append("other")
        return found


class Verdict(NamedTuple):
    """One target, and what was measured of it."""

    method: str
    quantity: str
    what: str
    target: float
    got: float
    where: str  # the model that is worst, or ""

    @property
    def met(self) -> bool:
        """Whether it is at most the target."""
        return self.got <= self.target


def rows(record: dict[str, Any]) -> list[Row]:
    """This library's rows in a record of measurements, of the quantities that have a target."""
    measurements = record["measurements"]
    base = {m["model"]: m for m in measurements if m["method"] == BASELINE}
    build = lambda m: m["trace_seconds"] + m["compile_seconds"]
    found = []
    for m in measurements:
        if m["method"] not in OWN or m["quantity"] not in TARGETS:
            continue
        others = [
            x
            for x in measurements
            if (x["model"], x["quantity"]) == (m["model"], m["quantity"])
            and x["method"] != BASELINE
            and not x["method"].startswith("jgd")
        ]
        best = min(others, key=lambda x: x["minimum_seconds"], default=None)
        name = best and best["method"]
        to_best = best and m["minimum_seconds"] / best["minimum_seconds"]
        built = build(m) / build(base[m["model"]])
        own = m["method"], m["model"], m["quantity"], m["time_ratio"], m["memory_ratio"]
        found.append(Row(*own, built, name, to_best))
    return found


def verdicts(record: dict[str, Any]) -> list[Verdict]:
    """Every target against the figures, quantity by quantity."""
    everything = rows(record)
    return [
        verdict
        for quantity in TARGETS
        for method in OWN
        for verdict in _verdicts([r for r in everything if (r.method, r.quantity) == (method, quantity)])
    ]


def _verdicts(own: list[Row]) -> Iterator[Verdict]:
    """The targets of one quantity by one method, against its rows."""
    if not own:
        return
    name = own[0].method, own[0].quantity
    target = TARGETS[own[0].quantity]
    mean = lambda ratios: statistics.geometric_mean([max(ratio, 1e-3) for ratio in ratios])

    def worst(what: str, most: float, among: list[Row], field: str) -> Verdict:
        row = max(among, key=lambda row: getattr(row, field))
        return Verdict(*name, what, most, getattr(row, field), row.model)

    yield Verdict(*name, "time, mean", target.time_mean, mean([r.time for r in own]), "")
    yield worst("time, worst model", target.time_worst, own, "time")
    yield Verdict(*name, "temporary memory, mean", target.memory_mean, mean([r.memory for r in own]), "")
    against = [r for r in own if r.to_other is not None]
    if against:
        yield worst("to the best other", TO_BEST_OTHER, against, "to_other")
    if own[0].method == "jgd":
        yield worst("tracing and compiling", BUILD, own, "build")


class Change(NamedTuple):
    """A figure that is worse than the one that was stored."""

    model: str
    quantity: str
    what: str
    before: float
    now: float

    def __str__(self) -> str:
        return (
            f"{self.model}, {self.quantity}: {self.what} {self.before:.2f}× → {self.now:.2f}× "
            f"(+{100 * (self.now / self.before - 1):.0f} %)"
        )


def worse(
    stored: dict[str, Any], record: dict[str, Any], *, time: float = 0.15, memory: float = 0.02
) -> Iterator[Change]:
    """The ratios of `jgd` that grew by more than a share: of time, which is noisy, and of memory, which is not."""
    key = lambda m: (m["model"], m["quantity"])
    before = {key(m): m for m in stored["measurements"] if m["method"] == "jgd"}
    for m in record["measurements"]:
        old = before.get(key(m)) if m["method"] == "jgd" else None
        if old is None:
            continue
        for what, field, share in (
            ("time", "time_ratio", time),
            ("temporary memory", "memory_ratio", memory),
        ):
            if m[field] > old[field] * (1 + share):
                yield Change(*key(m), what, old[field], m[field])


def unmatched(stored: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """What there is on one side only, of `jgd`'s, so that it could not be compared; only models that both have."""
    have = [
        {(m["model"], m["quantity"]) for m in r["measurements"] if m["method"] == "jgd"}
        for r in (stored, record)
    ]
    return [f"{model}, {quantity}: not stored" for model, quantity in sorted(have[1] - have[0])]
