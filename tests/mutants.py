"""Mutants of the rules, the reductions and the masks: `python tests/mutants.py --count 200 --seed 0`.

A mutant is the library with one small change: an operator, a constant, a comparison, a branch, a call or a keyword
that is left out, two arguments or axes swapped. The tests of its room must fail. The survivors are listed with what
was changed: each wants a test that kills it, or is another way to write the same: those are in `tests/mutants.md`.
"""

import argparse
import ast
import concurrent.futures
import copy
import difflib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "jgd"
MUTATED = ("_engine", "_reductions", "_clipping.py", "_microbatched.py", "_weights.py")

# The tests of a room, the first that fits; those that are likeliest to fail come first.
_ENGINE = (
    "test_rule_methods.py",
    "test_tiles.py",
    "test_pass_blocks.py",
    "test_scan_reductions.py",
    "test_views.py",
    "test_moments_edges.py",
    "test_loss_semantics.py",
    "test_compiled_programs.py",
)
_TRANSFORMS = (
    "test_batch_edges.py",
    "test_arguments.py",
    "test_reduction_derivatives.py",
    "test_transforms.py",
)
_ALL = (*_ENGINE, "test_random_programs.py", *_TRANSFORMS, "test_caches.py", "test_microbatches.py")
ROOMS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("_clipping.py", ("test_groups.py", "test_reductions.py", *_ENGINE, *_TRANSFORMS)),
    (
        "_reductions/",
        (
            "test_reductions.py",
            "test_groups.py",
            *_ENGINE,
            "test_bad_input.py",
            *_TRANSFORMS,
            "test_microbatches.py",
        ),
    ),
    ("_microbatched.py", ("test_microbatches.py", "test_reductions.py", *_TRANSFORMS)),
    (
        "_weights.py",
        ("test_reduction_derivatives.py", "test_batch_edges.py", "test_reductions.py", "test_methods.py"),
    ),
    ("_engine/xla_workarounds.py", ("test_mesh.py", *_ENGINE)),
    ("_engine/shares.py", ("test_mesh.py", "test_explain.py")),
    ("_engine/devices.py", ("test_explain.py", "test_work.py", *_ENGINE)),
    ("_engine/costs.py", ("test_explain.py", "test_work.py", *_ENGINE)),
    ("_engine/flops.py", ("test_work.py", "test_explain.py")),
    ("_engine/blocks.py", ("test_blocks.py", "test_explain.py")),
    ("_engine/fingerprint.py", ("test_caches.py", "test_stale.py", *_ENGINE)),
    ("_engine/dense.py", ("test_custom_derivatives.py", *_ALL)),
    ("_engine/differentiated.py", ("test_custom_derivatives.py", *_ALL)),
    ("_engine/gradients.py", (*_ALL, "test_mesh_sums.py", "test_mesh.py")),
    ("_engine/views.py", ("test_views.py", *_ENGINE, "test_random_programs.py", *_TRANSFORMS)),
    ("_engine/moments.py", ("test_moments.py", "test_moments_edges.py", *_ENGINE, *_TRANSFORMS)),
    ("_engine/", _ALL),
)
TIMEOUT = 1200  # seconds for all tests of a room; a mutant that hangs is killed as well


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    path: str  # inside of the package
    line: int
    what: str
    source: str  # of the whole file, changed

    @property
    def tests(self) -> tuple[str, ...]:
        return next(tests for prefix, tests in ROOMS if self.path.startswith(prefix))


OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip


def changes_of(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What may stand in a node's place."""

    def changed(**fields: object) -> ast.AST:
        made = copy.deepcopy(node)
        for name, value in fields.items():
            setattr(made, name, value)
        return made

    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield "operator", changed(op=OPERATORS[type(node.op)]())
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        yield "comparison", changed(ops=[COMPARISONS[type(node.ops[0])](), *node.ops[1:]])
    elif isinstance(node, ast.BoolOp):
        yield "and/or", changed(op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        yield "condition left out", node.values[0]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield "not/minus left out", node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield "constant", ast.Constant(node.value + 1)
    elif isinstance(node, ast.IfExp):
        yield "always", node.body
        yield "never", node.orelse
    elif isinstance(node, ast.If):
        yield "always", changed(test=ast.Constant(True))
        yield "never", changed(test=ast.Constant(False))
    elif isinstance(node, ast.comprehension) and node.ifs:
        yield "filter left out", changed(ifs=node.ifs[1:])
    elif isinstance(node, ast.Tuple) and len(node.elts) == 2 and isinstance(node.ctx, ast.Load):
        yield "swapped", changed(elts=node.elts[::-1])
    elif isinstance(node, ast.Call):
        plain = not any(isinstance(x, ast.Starred) for x in node.args)
        if plain and node.args:
            yield "call left out", node.args[-1] if isinstance(node.func, ast.Call) else node.args[0]
        if plain and len(node.args) > 1:
            yield "arguments swapped", changed(args=[node.args[1], node.args[0], *node.args[2:]])
        for k, keyword in enumerate(node.keywords):
            if keyword.arg is not None:
                yield f"{keyword.arg}= left out", changed(keywords=node.keywords[:k] + node.keywords[k + 1 :])


# Where a change says nothing about the answers.
SKIPPED = (ast.Raise, ast.Import, ast.ImportFrom, ast.JoinedStr, ast.Assert)


def places_in(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Every place of a node in its parent, but for annotations, decorators, defaults' types, messages."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list", "bases", "type_params"):
            continue
        if isinstance(value, list):
            for k, item in enumerate(value):
                if isinstance(item, ast.AST) and not isinstance(item, SKIPPED):
                    yield tree, name, k
                    yield from places_in(item)
        elif isinstance(value, ast.AST) and not isinstance(value, SKIPPED):
            yield tree, name, None
            yield from places_in(value)


def mutants_of(path: Path) -> list[Mutant]:
    text = path.read_text()
    tree = ast.parse(text)
    before = ast.unparse(tree)
    found = []
    for parent, name, k in places_in(tree):
        held = getattr(parent, name)
        node = held if k is None else held[k]
        for what, other in changes_of(node):
            if k is None:
                setattr(parent, name, other)
            else:
                held[k] = other
            source = ast.unparse(ast.fix_missing_locations(tree))
            if source != before:
                line = getattr(node, "lineno", getattr(getattr(node, "target", None), "lineno", 0))
                found.append(Mutant(path.relative_to(PACKAGE).as_posix(), line, what, source))
            if k is None:
                setattr(parent, name, node)
            else:
                held[k] = node
    return found


def all_mutants() -> list[Mutant]:
    paths = [
        p
        for name in MUTATED
        for p in ([PACKAGE / name] if name.endswith(".py") else (PACKAGE / name).rglob("*.py"))
    ]
    return [mutant for path in sorted(paths) for mutant in mutants_of(path)]


def difference(mutant: Mutant) -> str:
    before = ast.unparse(ast.parse((PACKAGE / mutant.path).read_text())).splitlines()
    lines = difflib.unified_diff(before, mutant.source.splitlines(), n=0, lineterm="")
    return "\n".join(line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---"))


def fate_of(mutant: Mutant) -> str:
    """ "survives", or which test killed it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        (source / "jgd" / mutant.path).write_text(mutant.source)
        tests = [str(ROOT / "tests" / name) for name in mutant.tests]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]
        inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment = {**inherited, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return "killed: it hangs"
    if done.returncode == 0:
        return "survives"
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return f"killed: {failed[0][:150] if failed else (done.stdout + done.stderr).strip()[-150:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="how many of the drawn to pass over")
    parser.add_argument("--room", default="", help="only files whose path begins so, as _engine/rules")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="print what is drawn, and run nothing")
    parser.add_argument("--json", type=Path, help="a file to write the fates to")
    given = parser.parse_args()
    everyone = [mutant for mutant in all_mutants() if mutant.path.startswith(given.room)]
    drawn = random.Random(given.seed).sample(everyone, min(given.count, len(everyone)))
    chosen = list(enumerate(drawn))[given.first :]
    print(f"{len(drawn)} of {len(everyone)} mutants, seed {given.seed}", flush=True)
    if given.list:
        for number, mutant in chosen:
            print(f"{number}: {mutant.path}:{mutant.line}, {mutant.what}\n{difference(mutant)}")
        return 0
    started, fates = time.monotonic(), {}
    with concurrent.futures.ThreadPoolExecutor(given.processes) as pool:
        running = {pool.submit(fate_of, mutant): (number, mutant) for number, mutant in chosen}
        for done in concurrent.futures.as_completed(running):
            number, mutant = running[done]
            fates[number] = done.result()
            print(f"{number}: {mutant.path}:{mutant.line}, {mutant.what}: {fates[number]}", flush=True)
            if fates[number] == "survives":
                print(difference(mutant), flush=True)
    survivors = [number for number, fate in fates.items() if fate == "survives"]
    print(
        f"{len(fates)} mutants in {time.monotonic() - started:.0f} s, {len(survivors)} survive: {sorted(survivors)}"
    )
    if given.json:
        rows = [{**vars(drawn[k]), "number": k, "fate": fate} for k, fate in sorted(fates.items())]
        given.json.write_text(
            json.dumps([{k: v for k, v in row.items() if k != "source"} for row in rows], indent=1)
        )
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
