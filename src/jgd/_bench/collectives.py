"""What the devices of a mesh send each other in a compiled program, read off its optimized HLO."""

import functools
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(")
_CALLED = re.compile(r"(?:to_apply|calls|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"([a-z]+)(\d+)?\w*\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective operation: its kind, its result's bytes on each device, and how often it runs."""

    kind: str
    bytes: int
    times: int


def collectives(hlo: str, *, branches: bool = True) -> list[Collective]:
    """The collectives of an optimized program, `jax.jit(f).lower(...).compile().as_text()`.

    What stands in a loop runs once for each step; of a `cond`, every branch is counted, or none without `branches`.
    """
    lines = _computations(hlo)

    @functools.cache
    def of(name: str) -> tuple[Collective, ...]:
        found: list[Collective] = []
        for line in lines.get(name, ()):
            instruction = _INSTRUCTION.match(line)
            if instruction is None:
                continue
            shape, operation = instruction.groups()
            kind = operation.removesuffix("-start")
            if kind in KINDS:
                found.append(Collective(kind, _bytes(shape), 1))
                continue
            trips = _TRIPS.search(line)
            times = int(trips.group(1)) if trips else 1
            taken = _BRANCHES.search(line)
            called = _CALLED.findall(line) + (re.findall(r"[\w.\-]+", taken.group(1)) if taken else [])
            if operation == "conditional" and not branches:
                continue
            found += [c._replace(times=c.times * times) for inner in called for c in of(inner)]
        return tuple(found)

    entry = next(name for name in lines if name.startswith("ENTRY "))
    return list(of(entry))


def traffic(found: Iterable[Collective]) -> tuple[int, int]:
    """How many collectives run, and the bytes of their results on each device."""
    found = list(found)
    return sum(c.times for c in found), sum(c.times * c.bytes for c in found)


def largest_array(hlo: str) -> int:
    """The elements of the largest array that any instruction makes on one device."""
    matches = (_INSTRUCTION.match(line) for line in hlo.splitlines())
    shapes = [m.group(1) for m in matches if m is not None]
    return max(_elements(dims) for shape in shapes for _, _, dims in _ARRAY.findall(shape))


def _computations(hlo: str) -> dict[str, list[str]]:
    """The lines of each computation; the entry's stand under its name with `ENTRY ` in front, too."""
    lines: dict[str, list[str]] = {}
    current: list[str] = []
    for line in hlo.splitlines():
        header = _COMPUTATION.match(line)
        if header is not None:
            current = lines[header.group(1)] = []
            if line.startswith("ENTRY "):
                lines["ENTRY "] = current
        else:
            current.append(line)
    return lines


def _bytes(shape: str) -> int:
    width = lambda kind, bits: {"pred": 8}.get(kind, int(bits or 8)) // 8
    return sum(width(kind, bits) * _elements(dims) for kind, bits, dims in _ARRAY.findall(shape))


def _elements(dims: str) -> int:
    return math.prod(int(d) for d in dims.split(",") if d)
