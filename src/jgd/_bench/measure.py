"""Programs measured side by side in one process: their time, and what XLA says of their memory."""

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax

import jgd
from jgd._bench.models import Model
from jgd._bench.quantities import METHODS, Absent, plain
from jgd._clock import time_interleaved

BASELINE = "plain gradient"


@dataclass(frozen=True)
class Built:
    """A compiled function with the arguments it is run on.

    Attributes:
        run: runs it and waits for the result, which it returns.
        temporary_bytes: what XLA allocates beside arguments and results while it runs.
        output_bytes: the results.
        flops: XLA's count for the compiled program; it counts the body of a loop once.
        trace_seconds: tracing and lowering.
        compile_seconds: XLA's compilation.
        text: the compiled program in words.
    """

    run: Callable[[], Any]
    temporary_bytes: int
    output_bytes: int
    flops: float
    trace_seconds: float
    compile_seconds: float
    text: Callable[[], str]

    @property
    def peak_bytes(self) -> int:
        """What it needs beside its arguments."""
        return self.temporary_bytes + self.output_bytes


@dataclass(frozen=True)
class Measurement:
    """One program's time and memory, and both relative to the baseline measured beside it."""

    model: str
    quantity: str
    method: str
    minimum_seconds: float
    median_seconds: float
    runs: int
    temporary_bytes: int
    output_bytes: int
    flops: float
    trace_seconds: float
    compile_seconds: float
    time_ratio: float  # of minima
    median_ratio: float
    memory_ratio: float  # of temporary bytes
    peak_ratio: float  # of temporary and output bytes


@dataclass(frozen=True)
class Missing:
    """What was asked for and could not be measured, and why."""

    model: str
    quantity: str
    method: str
    why: str


def compile_program(function: Callable[..., Any], *args: Any) -> Built:
    """Compiles a function for its arguments, and asks XLA what it will need."""
    start = time.perf_counter()
    lowered = jax.jit(function).lower(*args)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return Built(
        run=lambda: jax.block_until_ready(compiled(*args)),
        temporary_bytes=int(getattr(memory, "temp_size_in_bytes", 0)),
        output_bytes=int(getattr(memory, "output_size_in_bytes", 0)),
        flops=float((cost or {}).get("flops", float("nan"))),
        trace_seconds=traced - start,
        compile_seconds=done - traced,
        text=lambda: compiled.as_text() or "",
    )


def measure(
    model: Model,
    quantities: Sequence[str],
    methods: Sequence[str],
    *,
    repeats: int = 20,
    seconds: float = 5.0,
    from_scratch: bool = False,
    builds: int = 1,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[list[Measurement], list[Missing]]:
    """Measures every method's every quantity on one model, beside the plain gradient.

    Args:
        model: the loss, its parameters and its batch.
        quantities: names out of `quantities.QUANTITIES`.
        methods: names out of `quantities.METHODS`.
        repeats: as for `time_interleaved`, like `seconds`.
        from_scratch: whether to empty JAX's caches before each compilation, so that none profits from what another
            has traced, and all their times can be compared.
        builds: how many times the plain gradient and `jgd`'s own programs are built, in turns; the least times count.
        say: told what is being compiled.

    Returns:
        A measurement for the plain gradient, then one for each method and quantity that it has; and what is missing.
    """
    args = jax.device_put((model.params, *model.batch))
    programs: dict[tuple[str, str], Built] = {}
    missing = []

    def built(quantity: str, method: str) -> Built:
        nonlocal model
        say(f"{model.name}: compiling {quantity} by {method}")
        if from_scratch:
            jax.clear_caches()
            model = replace(model, loss=_renamed(model.loss))
        function = plain(model) if method == BASELINE else METHODS[method](model, quantity)
        return compile_program(function, *args)

    for quantity, method in [("sum", BASELINE), *((q, m) for q in quantities for m in methods)]:
        try:
            programs[quantity, method] = _fitting(built(quantity, method))
        except Absent as error:
            missing.append(Missing(model.name, quantity, method, str(error)))
    for _ in range(builds - 1):
        for name in programs:
            if name[1] in (BASELINE, "jgd"):
                programs[name] = _sooner(programs[name], built(*name))
    base = "sum", BASELINE
    if base not in programs:
        why = "there is no plain gradient to measure it against"
        return [], missing + [Missing(model.name, *name, why) for name in programs]
    say(f"{model.name}: measuring {len(programs)} programs")
    runs = {name: program.run for name, program in programs.items()}
    times = time_interleaved(runs, repeats=repeats, seconds=seconds)
    found = [
        _measurement(model.name, *name, program, times[name], programs[base], times[base])
        for name, program in programs.items()
    ]
    return found, missing


def _sooner(program: Built, again: Built) -> Built:
    """A program with the least times that it took to build, of two."""
    return replace(
        program,
        trace_seconds=min(program.trace_seconds, again.trace_seconds),
        compile_seconds=min(program.compile_seconds, again.compile_seconds),
    )


def _renamed(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The same loss as a function that no cache has seen."""
    return lambda *args: loss(*args)


def _fitting(program: Built) -> Built:
    """The program, where the memory that it needs is there.

    Raises:
        Absent: it is not. Running it might end the process.
    """
    if jax.default_backend() == "cpu" and program.peak_bytes > free_bytes():
        raise Absent(f"it needs {program.peak_bytes / 2**30:.1f} GiB, more than is free")
    return program


def free_bytes() -> float:
    """The memory that programs can have on this machine now, so far as it says."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf


def _measurement(
    model: str,
    quantity: str,
    method: str,
    program: Built,
    times: list[float],
    base: Built,
    base_times: list[float],
) -> Measurement:
    return Measurement(
        model=model,
        quantity=quantity,
        method=method,
        minimum_seconds=min(times),
        median_seconds=statistics.median(times),
        runs=len(times),
        temporary_bytes=program.temporary_bytes,
        output_bytes=program.output_bytes,
        flops=program.flops,
        trace_seconds=program.trace_seconds,
        compile_seconds=program.compile_seconds,
        time_ratio=min(times) / min(base_times),
        median_ratio=statistics.median(times) / statistics.median(base_times),
        memory_ratio=program.temporary_bytes / max(base.temporary_bytes, 1),
        peak_ratio=program.peak_bytes / max(base.peak_bytes, 1),
    )


def environment() -> dict[str, Any]:
    """What the figures belong to: the device, the versions."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jgd": jgd.__version__,
    }


def to_json(measurements: Sequence[Measurement], missing: Sequence[Missing] = (), **settings: Any) -> str:
    """The measurements with their environment and settings, and what is missing, as JSON."""
    record = {
        "environment": environment(),
        "settings": settings,
        "measurements": [asdict(m) for m in measurements],
        "missing": [asdict(m) for m in missing],
    }
    return json.dumps(record, indent=1) + "\n"
