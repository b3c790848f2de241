"""Puts many random programs to the test: `python -m tests.programs --count 10000 --seed 0`.

`--only 17` prints one program and what is wrong with it; `--shrink` finds how much of it can go first.
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401  (sets how XLA compiles)
import jax

from programs.drawing import FEATURES, MENDED
from programs.search import Outcome, outcome_of, search, shrunk
from programs.writer import random_program


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.programs", description=__doc__)
    numbers = lambda text: [int(x) for x in text.split(",") if x]
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="number of the first program")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--features", default="all", help=f"all, none, mended, or some of {', '.join(sorted(FEATURES))}"
    )
    parser.add_argument("--only", type=numbers, help="these programs, each printed")
    parser.add_argument(
        "--without", type=numbers, default=[], help="with --only: steps and operands to leave out"
    )
    parser.add_argument("--plain", type=numbers, default=[], help="with --only: operands to make leaves")
    parser.add_argument("--shrink", action="store_true", help="with --only: leave out what can go")
    parser.add_argument("--json", type=Path, help="a file to write every failure to")
    given = parser.parse_args()
    features = {"all": FEATURES, "none": frozenset(), "mended": MENDED}.get(
        given.features, frozenset(given.features.split(","))
    )
    if features - FEATURES:
        parser.error(f"`--features` knows no {', '.join(sorted(features - FEATURES))}")
    if given.only:
        jax.config.update("jax_enable_x64", True)
        return max([show(given, number, features) for number in given.only])
    return run(given, features)


def run(given: argparse.Namespace, features: frozenset[str]) -> int:
    numbers = range(given.first, given.first + given.count)
    print(
        f"jax {jax.__version__}, programs {numbers.start} to {numbers.stop - 1} of seed {given.seed}",
        flush=True,
    )
    started, results, kinds = time.monotonic(), collections.Counter(), collections.defaultdict(list)
    for done, outcome in enumerate(search(given.seed, numbers, features, given.processes), 1):
        if outcome.is_failure and is_right_by_default(given, outcome):
            outcome = Outcome(outcome.number, "right, with XLA's default loop emitters")
            print(f"{outcome.result}: {line(given, outcome)}", flush=True)
        results[outcome.result] += 1
        if outcome.is_failure:
            kinds[outcome.result, outcome.kind].append(outcome)
            print(
                f"{outcome.result}: {outcome.kind}: {outcome.detail}\n    {line(given, outcome)}", flush=True
            )
        if done % 100 == 0:
            print(f"{done} after {time.monotonic() - started:.0f} s: {dict(results)}", flush=True)
    print(f"\n{sum(results.values())} programs in {time.monotonic() - started:.0f} s: {dict(results)}")
    for (result, kind), found in sorted(kinds.items(), key=lambda x: -len(x[1])):
        print(f"{len(found):6d}  {result}: {kind}    {line(given, found[0])}")
    if given.json:
        given.json.write_text(json.dumps([vars(x) for found in kinds.values() for x in found], indent=1))
    return int(bool(kinds))


def is_right_by_default(given: argparse.Namespace, outcome: Outcome) -> bool:
    """Whether nothing is wrong as users compile it. What compiles quickly here (`conftest`) has errors of its own.

    XLA's former loop emitters drop scattered numbers whose indices are of a dtype that cannot hold the table's size.
    """
    command = [
        sys.executable,
        "-m",
        "tests.programs",
        "--seed",
        str(given.seed),
        "--features",
        given.features,
    ]
    flags = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command += ["--only", str(outcome.number)]
    return subprocess.run(command, env=flags, capture_output=True, check=False).returncode == 0


def line(given: argparse.Namespace, outcome: Outcome) -> str:
    """What to type to see it again."""
    features = "" if given.features == "all" else f" --features {given.features}"
    return f"python -m tests.programs --seed {given.seed}{features} --only {outcome.number} --shrink"


def show(given: argparse.Namespace, number: int, features: frozenset[str]) -> int:
    """One program: what it says, as a jaxpr too, and what is wrong with it."""
    without, plain = given.without, given.plain
    outcome = outcome_of(given.seed, number, features, without, plain)
    if given.shrink and outcome.is_failure:
        without, plain = shrunk(given.seed, outcome, features)
        outcome = outcome_of(given.seed, number, features, without, plain)
    program = random_program([given.seed, number], features, without, plain)
    print(program.text)
    problem = program.problem
    example = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in problem.batch]
    print(jax.make_jaxpr(problem.loss)(problem.params, *example))
    print(f"{outcome.result} {outcome.kind}\n{outcome.detail}")
    left_out = f" --without {','.join(map(str, without))} --plain {','.join(map(str, plain))}"
    print(line(given, outcome).replace(" --shrink", left_out if without or plain else ""))
    return int(outcome.is_failure)


if __name__ == "__main__":
    sys.exit(main())
