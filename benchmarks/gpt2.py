"""Clipped gradients of a transformer of GPT-2's 124 million parameters, against its plain gradient.

    python benchmarks/gpt2.py             # some two minutes on two cores, and 3 GiB
    python benchmarks/gpt2.py --render    # from the stored figures, without measuring

Random weights, 8 examples of 128 tokens, a scan over stacked layers with `jax.checkpoint`. Each program runs in a
process of its own, so that the peak of its resident memory is its own; the processes take turns, and a program's
time is the least of all its runs. Of `vmap(grad)` only the compiled program is asked what it would need.
"""

import argparse
import functools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import page

OURS = {"jgd": None, "jgd, 4 examples at a time": 4}  # name: microbatch_size
PROGRAMS = ("plain gradient", *OURS, "vmap(grad)")
ONLY_COMPILED = ("vmap(grad)",)
SIZES = {"d": 768, "layers": 12, "length": 128, "vocabulary": 50257, "size": 8, "heads": 12}
SMALL = {"d": 32, "layers": 2, "length": 16, "vocabulary": 101, "size": 3, "heads": 2}
TARGET = 1.3
STORED = Path(__file__).parent / "gpt2.json"


def program(name: str, small: bool) -> tuple[Any, Callable[..., Any]]:
    """The model, and what is measured of it."""
    import jgd
    from jgd._bench.models import Model
    from jgd._bench.models.sequences import gpt_of
    from jgd._bench.quantities import METHODS, QUANTITIES, plain

    model: Model = gpt_of("GPT-2", **(SMALL if small else SIZES))
    if name == "plain gradient":
        return model, plain(model)
    if name in OURS:
        make = jgd.per_example_grad(model.loss, in_axes=model.in_axes, microbatch_size=OURS[name])
        return model, lambda params, *batch: QUANTITIES["clipped_sum"](make(params, *batch))
    return model, METHODS[name](model, "clipped_sum")


def measure_here(name: str, *, runs: int, small: bool) -> dict[str, Any]:
    """Compiles one program and, where it is one to run, runs it: in this process, whose peak it reports."""
    import jax

    from jgd._bench.measure import compile_program

    model, function = program(name, small)
    args = jax.block_until_ready((model.params, *model.batch))
    before = _peak_bytes()
    compiled = compile_program(function, *args)
    seconds = []
    for _ in range(0 if name in ONLY_COMPILED else runs + 1):
        start = time.perf_counter()
        compiled.run()
        seconds.append(time.perf_counter() - start)
    return {
        "program": name,
        "parameters": model.num_params,
        "seconds": seconds[1:],  # the first run warms up
        "peak_resident_bytes": _peak_bytes() if seconds else None,
        "resident_bytes_before": before,
        "argument_bytes": sum(x.nbytes for x in jax.tree.leaves(args)),
        "temporary_bytes": compiled.temporary_bytes,
        "output_bytes": compiled.output_bytes,
        "trace_seconds": compiled.trace_seconds,
        "compile_seconds": compiled.compile_seconds,
    }


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def measure_apart(name: str, *, runs: int, small: bool) -> dict[str, Any]:
    """The same in a process of its own.

    Raises:
        RuntimeError: it failed; the message ends with what it said.
    """
    command = [sys.executable, __file__, "--one", name, "--runs", str(runs)] + ["--small"] * small
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{name}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def combine(rounds: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """One record for each program: all its times, its highest peak."""
    found: dict[str, dict[str, Any]] = {}
    for record in rounds:
        seen = found.setdefault(record["program"], record)
        if seen is not record:
            seen["seconds"] += record["seconds"]
            seen["peak_resident_bytes"] = max(seen["peak_resident_bytes"], record["peak_resident_bytes"])
    return found


def report(found: dict[str, dict[str, Any]]) -> str:
    """The figures in words, and whether they meet the target."""
    plain, gib = found["plain gradient"], lambda n: f"{n / 2**30:.2f} GiB"
    lines = [f"{plain['parameters']:,} parameters"]
    for name, record in found.items():
        needs = record["argument_bytes"] + record["temporary_bytes"] + record["output_bytes"]
        line = (
            f"{name}: by XLA's account {gib(needs)} in all, {gib(record['temporary_bytes'])} of it temporary"
        )
        if record["seconds"]:
            line += (
                f"; {min(record['seconds']):.2f} s, peak resident memory {gib(record['peak_resident_bytes'])}"
            )
        else:
            line += "; not run"
        lines.append(line)
    for name in (name for name in OURS if name in found):
        time_ratio, memory_ratio = ratios(found, name)
        met = max(time_ratio, memory_ratio) <= TARGET
        lines.append(
            f"{name}, to plain: time {time_ratio:.2f}×, peak resident memory {memory_ratio:.2f}× "
            f"(target {TARGET}× both: {'met' if met else 'missed'})"
        )
    return "\n".join(lines)


def ratios(found: dict[str, dict[str, Any]], name: str) -> tuple[float, float]:
    """Of time and of peak resident memory, ours to the plain gradient's."""
    ours, plain = found[name], found["plain gradient"]
    peak = ours["peak_resident_bytes"] / plain["peak_resident_bytes"]
    return min(ours["seconds"]) / min(plain["seconds"]), peak


def main() -> int:
    """Measures everything, or, as one of its own child processes, one program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--one", choices=PROGRAMS, help="measure this program, in this process")
    parser.add_argument("--runs", type=int, default=2, help="of each process (default: 2)")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each program (default: 2)")
    parser.add_argument("--small", action="store_true", help="a tiny model: to see that it works")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help=f"the stored figures (default: {STORED.name})"
    )
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="where they are put (default: docs/benchmarks.md)"
    )
    parser.add_argument("--render", action="store_true", help="from the stored figures, without measuring")
    args = parser.parse_args()
    if args.render:
        found = json.loads((args.json or STORED).read_text())
        store(found, args)
        print(report(found))
        return 0
    if not args.one and (args.page or not args.small):
        page.split(args.page or page.PAGE, "gpt2")  # a page that cannot be written should fail now
    measure = functools.partial(measure_apart, runs=args.runs, small=args.small)
    if args.one:
        print(json.dumps(measure_here(args.one, runs=args.runs, small=args.small)))
        return 0
    rounds = []
    for number in range(args.rounds):
        for name in PROGRAMS:
            if number == 0 or name not in ONLY_COMPILED:
                print(f"round {number + 1}: {name}", file=sys.stderr, flush=True)
                rounds.append(measure(name))
    found = combine(rounds)
    store(found, args)
    print(report(found))
    return 0


def store(found: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    """Writes the figures and the page, which a tiny model's do not belong into unless they are named."""
    file = args.json or (None if args.small else STORED)
    if file and not args.render:
        file.write_text(json.dumps(found, indent=1) + "\n")
    if args.page or not args.small:
        page.put(args.page or page.PAGE, "gpt2", page_text(found))


def page_text(found: dict[str, dict[str, Any]]) -> str:
    """The report as a list in Markdown."""
    return "\n".join(f"- {line}" for line in report(found).splitlines())


if __name__ == "__main__":
    sys.exit(main())
