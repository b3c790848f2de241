"""The whole table: every model, quantity and method, and the peers in PyTorch, by one command.

    python benchmarks/run.py            # measures, and writes cpu.json, cpu.svg, the tables of docs/benchmarks.md
    python benchmarks/run.py --check    # measures, writes nothing, says what got worse than the stored figures
    python benchmarks/run.py --render   # measures nothing: draws picture and tables from the stored figures

It needs the extra `bench`: pip install -e '.[bench]'. The peers get an environment of their own,
`benchmarks/.venv-torch`; `--no-peers` leaves them out. Each model is measured by `jgd bench` in a process of its
own. `--check` exits with 1 where a ratio got worse; targets that are missed never do: the page judges those.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import judge
import page
import peers

from jgd._bench.models import MODELS
from jgd._bench.quantities import METHODS, QUANTITIES

HERE = Path(__file__).parent
TOO_LONG = "its process took too long"


def measure(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """One model's record, by `jgd bench` in a process of its own; where that dies, all of it is missing."""
    slow = [method for method in args.methods if method not in judge.OWN and is_too_slow(model, method, args)]
    why = f"a process that runs it twice took more than {args.patience:g} s"
    missing = [
        {"model": model, "quantity": q, "method": m, "why": why} for q in args.quantities for m in slow
    ]
    methods = [method for method in args.methods if method not in slow]
    programs = 1 + len(args.quantities) * len(methods)
    record = bench(model, args.quantities, methods, args, limit=programs * args.patience)
    if isinstance(record, str):
        names = [(q, m) for q in args.quantities for m in methods]
        missing += [{"model": model, "quantity": q, "method": m, "why": record} for q, m in names]
        record = {"environment": {}, "settings": {}, "measurements": [], "missing": []}
    record["missing"] = missing + record["missing"]
    return record


def is_too_slow(model: str, method: str, args: argparse.Namespace) -> bool:
    """Whether a method is to be given up. It is tried apart: a program that runs cannot be stopped from inside."""
    quantity = "clipped_sum" if "clipped_sum" in args.quantities else args.quantities[0]
    once = argparse.Namespace(repeats=1, seconds=0, builds=1, small=args.small)
    return bench(model, [quantity], [method], once, limit=args.patience) == TOO_LONG


def bench(
    model: str, quantities: list[str], methods: list[str], args: argparse.Namespace, *, limit: float
) -> dict[str, Any] | str:
    """What `jgd bench` writes in a process of its own; a reason where it writes nothing."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "record.json"
        command = [sys.executable, "-m", "jgd", "bench", "--models", model, "--json", file]
        command += ["--quantities", *quantities, "--methods", *methods]
        command += ["--repeats", args.repeats, "--seconds", args.seconds, *["--small"] * args.small]
        command += ["--builds", args.builds]
        try:
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return TOO_LONG
        if done.returncode == 0:
            return json.loads(file.read_text())
    said = (done.stderr.strip().splitlines() or ["nothing"])[-1][:200]
    return f"its process ended with status {done.returncode}: {said}"


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    """The records of all models as one, and the peers'."""
    record: dict[str, Any] = {"environment": {}, "settings": {}, "measurements": [], "missing": []}
    for model in args.models:
        print(model, file=sys.stderr, flush=True)
        part = measure(model, args)
        record["environment"] |= part["environment"]
        record["settings"] |= part["settings"]
        record["measurements"] += part["measurements"]
        record["missing"] += part["missing"]
    if not args.no_peers:
        print("peers in PyTorch", file=sys.stderr, flush=True)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        record["peers"] = peers.measure(
            args.models, repeats=args.repeats, seconds=args.seconds, threads=cores, small=args.small
        )
    return record


def merged(stored: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """The record, with the models of the stored one that were not measured now, where they are comparable.

    They are where they belong to the same environment and settings.
    """
    if any(stored.get(part) != record[part] for part in ("environment", "settings")):
        return record
    now = {m["model"] for m in (*record["measurements"], *record["missing"])}
    kept = lambda part: [m for m in stored.get(part, []) if m["model"] not in now]
    both = record | {part: kept(part) + record[part] for part in ("measurements", "missing")}
    if "peers" in stored and not record.get("peers", {}).get("measurements"):
        both["peers"] = stored["peers"]
    order = {name: k for k, name in enumerate(MODELS)}
    both["measurements"].sort(key=lambda m: order[m["model"]])  # stable: within a model as it was
    return both


def compare(stored: dict[str, Any], record: dict[str, Any], *, tolerance: float) -> int:
    """Prints what got worse; the exit status."""
    changes = list(judge.worse(stored, record, time=tolerance))
    if stored["environment"] != record["environment"]:
        print(f"stored in another environment: {stored['environment']}")
    for line in (*judge.unmatched(stored, record), *changes):
        print(line)
    print(f"{len(changes)} ratios got worse" if changes else "no ratio got worse")
    return int(bool(changes))


def main() -> int:
    """Measures, compares or renders, as told."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = lambda option, known: parser.add_argument(
        option, nargs="+", choices=list(known), default=list(known), metavar="NAME"
    )
    names("--models", MODELS)
    names("--quantities", QUANTITIES)
    names("--methods", METHODS)
    parser.add_argument("--repeats", type=int, default=10, help="runs of each program, at most (default: 10)")
    parser.add_argument(
        "--seconds", type=float, default=2.5, help="a program rests after these (default: 2.5)"
    )
    parser.add_argument(
        "--builds", type=int, default=3, help="how often jgd's programs are built (default: 3)"
    )
    parser.add_argument(
        "--patience", type=float, default=60.0, help="seconds after which a method is given up (default: 60)"
    )
    parser.add_argument("--small", action="store_true", help="tiny sizes: to see that it works")
    parser.add_argument("--no-peers", action="store_true", help="without PyTorch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the stored figures (default: cpu.json)")
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="where they are put (default: docs/benchmarks.md)"
    )
    parser.add_argument("--check", action="store_true", help="compare with the stored figures; write nothing")
    parser.add_argument(
        "--tolerance", type=float, default=0.15, help="by what share a time may grow (default: 0.15)"
    )
    parser.add_argument("--render", action="store_true", help="from the stored figures, without measuring")
    args = parser.parse_args()
    file, text = args.json or HERE / "cpu.json", args.page or page.PAGE
    stored = json.loads(file.read_text()) if file.exists() else None
    if stored is None and (args.check or args.render):
        parser.error(f"`--json` {file}: no figures are stored there")
    if args.check and stored["settings"].get("small", False) != args.small:
        parser.error(f"`--check`: the figures in {file} are of another size of models; see `--small`")
    if not args.check and (args.page or not args.small):
        page.split(text, "run")  # a page that cannot be written should fail now
    record = stored if args.render else measure_all(args)
    if args.check:
        return compare(stored, record, tolerance=args.tolerance)
    if not args.render and (args.json or not args.small):  # tiny models are stored only where it is asked for
        record = merged(stored, record) if stored else record
        file.write_text(json.dumps(record, indent=1) + "\n")
    if args.page or not args.small:
        page.put(text, "run", page.render(record))
    if args.json or not args.small:
        page.draw(file.with_suffix(".svg"), record)
    print(page.summary(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
