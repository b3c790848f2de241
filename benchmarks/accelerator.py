"""The claims on an accelerator: some minutes on one GPU, without a network.

    PYTHONPATH=src python benchmarks/accelerator.py                 # all parts; what is done is printed as it comes
    PYTHONPATH=src python benchmarks/accelerator.py --parts times --models vit gpt
    PYTHONPATH=src python benchmarks/accelerator.py --small         # tiny sizes, on whatever there is
    python benchmarks/accelerator.py --render                       # the page, from the stored figures

The parts: `constants` measures the row of the table of devices; `times` compares norms and clipped sums with the plain
gradient and with what one would write otherwise; `precision` says what the formats of products do to the answers;
`correctness` puts every reduction of the cases of tests/ to the device, in four formats, against float64 on the host.

Every model, and every share of the cases, is asked in a process of its own, so that one that fails costs only itself.
With `--jobs N` so many of them compile at the same time; whatever the number, one at a time is timed. A persistent
compilation cache (JAX_COMPILATION_CACHE_DIR) is used where one is set: then times to compile say nothing.
"""

import argparse
import dataclasses
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STORED = HERE / "gpu.json"
PAGE = HERE.parent / "docs" / "accelerator.md"
PARTS = ("constants", "times", "precision", "correctness")
# tf32 is float32 in the device's default precision of products.
FORMATS = ("float32", "float64", "tf32", "bfloat16")
FLOORS = {"float64": 1e-11, "tf32": 4 * 2.0**-10}  # errors that are allowed whatever those of vmap(grad) are
GRADIENT = "plain gradient"
OURS = ("norms", "clipped_sum")
COLUMNS = (
    *((quantity, method) for method in ("jgd", "vmap(grad)") for quantity in OURS),
    ("clipped_sum", "microbatch 4"),
    ("clipped_sum", "jax_privacy"),
)


# The models


def in_bfloat16(model: Any) -> Any:
    """The same model computing in bfloat16; its parameters stay in float32."""
    import jax
    import jax.numpy as jnp

    half = lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x

    def loss(params: Any, *example: Any) -> jax.Array:
        return model.loss(*jax.tree.map(half, (params, *example))).astype(jnp.float32)

    return dataclasses.replace(model, loss=loss)


def _models() -> dict[str, Callable[[], Any]]:
    from jgd._bench.models import images, sequences, vectors

    return {
        "mlp": lambda: vectors.mlp_of("mlp", (4096, 4096, 4096, 4096), 512),
        "residual": lambda: images.residual_of(
            "residual", (64, 64, 128, 256, 512), side=64, size=128, groups=8
        ),
        "vit": lambda: images.vit_of("vit", d=384, layers=12, side=224, patch=16, size=32, heads=6),
        "gpt": lambda: in_bfloat16(
            sequences.gpt_of("gpt", d=768, layers=12, length=512, vocabulary=50257, size=8, heads=12)
        ),
        "bag": lambda: vectors.bag_of("bag", vocabulary=1_000_000, d=64, length=40, size=256),
        "adapters": lambda: sequences.adapters_of(
            "adapters", d=1024, rank=8, layers=10, length=256, size=16, heads=16
        ),
        "gru": lambda: sequences.gru_of("gru", d=256, length=256, size=128),
    }


MODELS = ("mlp", "residual", "vit", "gpt", "bag", "adapters", "gru")


def model_of(name: str, small: bool) -> Any:
    """A model in the size for accelerators, or in that of the tests."""
    from jgd._bench.models import build

    if not small:
        return _models()[name]()
    model = build(name, small=True)
    return in_bfloat16(model) if name == "gpt" else model


# What one process does. It prints a line of JSON for each thing that it finds.


def say(**found: Any) -> None:
    """A finding, for the process that waits for it."""
    print(json.dumps(found), flush=True)


def wait_for_turn() -> None:
    """Until no other process times anything."""
    say(ready=True)
    sys.stdin.readline()


def find_constants(args: argparse.Namespace) -> None:
    """The device's row, and the one that is stored."""
    import calibrate
    import jax

    from jgd._engine.devices import device_of

    device = jax.devices()[0]
    wait_for_turn()
    row = calibrate.measure(30, 0.2 if args.small else 2.0)
    stored = device_of(device.platform)
    say(
        part="constants",
        row=row._asdict(),
        stored=stored._asdict(),
        text=calibrate.text(row, device.device_kind, device.platform),
    )


def find_times(args: argparse.Namespace, name: str) -> None:
    """All programs of a model, compiled first, then timed in turns."""
    import jax

    from jgd._bench.measure import compile_program
    from jgd._bench.quantities import METHODS, Absent, plain
    from jgd._clock import time_interleaved

    model = model_of(name, args.small)
    arguments = jax.block_until_ready(jax.device_put((model.params, *model.batch)))
    free = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 16 << 30)
    programs, built = {}, {}
    for quantity, method in (("sum", GRADIENT), *COLUMNS):
        label = {"part": "times", "model": name, "quantity": quantity, "method": method}
        try:
            function = plain(model) if method == GRADIENT else METHODS[method](model, quantity)
            program = compile_program(function, *arguments)
        except Absent as error:
            say(**label, missing=str(error))
            continue
        except Exception as error:  # a compiler's failure is a finding
            say(**label, missing=f"{type(error).__name__}: {str(error)[:300]}")
            continue
        if program.peak_bytes > 0.6 * free:
            say(**label, missing=f"it needs {program.peak_bytes / 2**30:.0f} GiB")
            continue
        programs[quantity, method] = program.run
        built[quantity, method] = label | {
            "temporary_bytes": program.temporary_bytes,
            "output_bytes": program.output_bytes,
            "trace_seconds": program.trace_seconds,
            "compile_seconds": program.compile_seconds,
        }
        if args.hlo and method in (GRADIENT, "jgd"):
            Path(args.hlo, f"{name}.{quantity}.txt").write_text(program.text())
    wait_for_turn()
    for label, run in list(programs.items()):
        try:
            run()
        except Exception as error:
            say(**built[label], missing=f"{type(error).__name__}: {str(error)[:300]}")
            del programs[label]
    times = time_interleaved(programs, repeats=3 if args.small else 30, seconds=args.seconds)
    for label, seconds in times.items():
        say(**built[label], seconds=sorted(seconds), parameters=model.num_params, examples=model.size)
    if args.profile:
        for label, run in programs.items():
            if label[1] in (GRADIENT, "jgd"):
                say(part="kernels", model=name, quantity=label[0], kernels=kernels_of(run))


def kernels_of(run: Callable[[], Any], most: int = 25) -> list[Any]:
    """`(name, microseconds a run, launches a run)` of what the device did longest, and of all of it together."""
    import jax

    runs, found, total = 3, {}, [0.0, 0]
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(runs):
                run()
        for file in Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
                if "device:" not in plane.name.lower() or "cpu" in plane.name.lower():
                    continue
                for line in plane.lines:
                    if not line.name.startswith("Stream"):
                        continue
                    for event in line.events:
                        each = found.setdefault(event.name, [0.0, 0])
                        for sums in (each, total):
                            sums[0] += event.duration_ns / 1e3 / runs
                            sums[1] += 1 / runs
    longest = sorted(found.items(), key=lambda item: -item[1][0])[:most]
    return [("all", *total), *((name, *sums) for name, sums in longest)]


def find_precision(args: argparse.Namespace, name: str) -> None:
    """Errors of norms, of the Gram matrix and of the clipped sum, against float64 on the device, by format."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jgd
    from jgd._bench.models import build

    model = build(name, small=args.small)
    rows = lambda x: np.float64(x).reshape(x.shape[0], -1)
    matrix = lambda tree: np.concatenate([rows(x) for x in jax.tree.leaves(tree)], axis=1)
    flat = lambda tree: np.concatenate([np.float64(x).ravel() for x in jax.tree.leaves(tree)])

    def by_vmap(loss: Any, *args: Any) -> np.ndarray:
        return matrix(jax.jit(lambda p, *batch: jax.vmap(jax.grad(loss), model.axes)(p, *batch))(*args))

    def answers(blocks: np.ndarray, bound: float) -> tuple[np.ndarray, ...]:
        norms = np.linalg.norm(blocks, axis=1)
        return norms, blocks @ blocks.T, (np.minimum(1, bound / norms)[:, None] * blocks).sum(0)

    def by_jgd(loss: Any, bound: float, *args: Any) -> tuple[np.ndarray, ...]:
        def ask(*args: Any) -> Any:
            grads = jgd.per_example_grad(loss, in_axes=model.in_axes)(*args)
            return jgd.norms(grads), jgd.gram(grads), jgd.clipped_sum(grads, bound)

        norms, gram, clipped = jax.jit(ask)(*args)
        return np.float64(norms), np.float64(gram), flat(clipped)

    arguments = (model.params, *model.batch)
    with jax.enable_x64(True):
        wide = lambda x: jnp.asarray(x, jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
        exact = by_vmap(model.loss, *jax.tree.map(wide, arguments))
    bound = float(np.median(np.linalg.norm(exact, axis=1)))
    norms, gram, clipped = answers(exact, bound)
    for kind in ("float32", "tf32", "bfloat16"):
        loss = in_bfloat16(model).loss if kind == "bfloat16" else model.loss
        with jax.default_matmul_precision("highest" if kind == "float32" else None):
            made = {
                "jgd": by_jgd(loss, bound, *arguments),
                "vmap(grad)": answers(by_vmap(loss, *arguments), bound),
            }
        errors = {
            by: {
                "norms": float(np.max(np.abs(n - norms) / norms)),
                "gram": float(np.max(np.abs(g - gram) / (norms[:, None] * norms))),
                "clipped sum": float(np.linalg.norm(c - clipped) / np.linalg.norm(clipped)),
                "longer than the bound": float(np.max(norms * np.minimum(1, bound / n)) / bound - 1),
            }
            for by, (n, g, c) in made.items()
        }
        say(part="precision", model=name, format=kind, errors=errors)


def find_correctness(args: argparse.Namespace, share: int, shares: int) -> None:
    """Every reduction of a share of the cases, until the time is up."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    import accuracy
    import jax
    import jax.numpy as jnp
    import numpy as np
    import test_accuracy
    from meshes import widened

    import jgd

    cases = [name for name in test_accuracy.CASES if name not in test_accuracy.DRAWS]
    cases = [name for name in cases if name not in test_accuracy.NO_WIDE_INTEGERS]
    asked = [
        (name, FORMATS[(number + turn) % len(FORMATS)])
        for turn in range(len(FORMATS))
        for number, name in enumerate(cases)
    ]
    asked = asked[:: max(1, len(asked) // 16)] if args.small else asked
    host = jax.devices("cpu")[0]
    for name, kind in asked[share::shares]:
        if time.time() > args.until:
            break
        dtype = "float32" if kind == "tf32" else kind
        if name in test_accuracy.NOT_IN.get(dtype, ()):
            continue
        try:
            with (
                jax.enable_x64(kind == "float64"),
                jax.default_matmul_precision(None if kind == "tf32" else "highest"),
            ):
                problem, _ = widened(name, jnp.dtype(dtype))
                with jax.default_device(host):
                    exact = accuracy.exact_gradients(
                        dataclasses.replace(
                            problem,
                            **jax.device_put({"params": problem.params, "batch": problem.batch}, host),
                        )
                    )
                question = accuracy.question_of(problem, exact)
                gradients = jgd.per_example_grad(problem.loss, strategy="factored", **problem.options)
                ask = jax.jit(lambda q, p, *b, of=gradients: accuracy.ask(of(p, *b), q))
                got = jax.tree.map(np.asarray, ask(question, problem.params, *problem.batch))
                floor = FLOORS.get(kind) or accuracy.floor_of(dtype)
                excess = accuracy.excess(got, problem, exact, question, floor)
        except Exception as error:
            say(
                part="correctness",
                case=name,
                format=kind,
                failed=f"{type(error).__name__}: {str(error)[:500]}",
            )
            continue
        even = name in test_accuracy.EVEN
        wrong = {
            reduction: of
            for reduction, of in excess.items()
            if not of[0] <= 1 and not (even and reduction == "noise_scale")
        }
        say(part="correctness", case=name, format=kind, reductions=len(excess), wrong=wrong)


# The process that starts the others


class Workers:
    """Processes of this script: some compile at a time, one at a time has its turn."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.found: list[dict[str, Any]] = []
        self.turn = threading.Lock()

    def run(self, tasks: list[str], jobs: int) -> None:
        """All tasks; what they find is in `found`."""
        waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
        for task in tasks:
            waiting.put(task)

        def work() -> None:
            while True:
                try:
                    task = waiting.get_nowait()
                except queue.Empty:
                    return
                self.one(task)

        threads = [threading.Thread(target=work) for _ in range(jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def one(self, task: str) -> None:
        """One task in a process of its own."""
        command = [sys.executable, __file__, "--one", task, "--seconds", str(self.args.seconds)]
        command += ["--small"] * self.args.small + ["--profile"] * self.args.profile
        command += ["--hlo", self.args.hlo] if self.args.hlo else []
        command += ["--until", str(self.args.until)]
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONWARNINGS": "ignore"}
        if task.startswith("correctness") and self.args.environment["platform"] == "gpu":
            # Hundreds of programs that run once: XLA's first choice of kernels, not the quickest of all it times.
            flags = os.environ.get("XLA_FLAGS", "")
            environment["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
            assert process.stdin is not None and process.stdout is not None
            held = False
            try:
                for line in process.stdout:
                    if not line.startswith("{"):
                        continue
                    finding = json.loads(line)
                    if "ready" not in finding:
                        self.record(finding)
                        continue
                    self.turn.acquire()
                    held = True
                    process.stdin.write("go\n")
                    process.stdin.flush()
            finally:
                if held:
                    self.turn.release()
            if process.wait() != 0:
                errors.seek(0)
                self.record({"part": "failed", "task": task, "said": errors.read()[-1500:]})

    def record(self, finding: dict[str, Any]) -> None:
        """Prints a finding, and stores all that there are."""
        self.found.append(finding)
        print(f"{time.time() - self.args.started:5.0f} s  {line_of(finding)}", flush=True)
        if self.args.json:
            whole = {"environment": self.args.environment, "found": self.found}
            self.args.json.write_text(json.dumps(whole, indent=1) + "\n")


def line_of(finding: dict[str, Any]) -> str:
    """A finding in a line or two."""
    match finding["part"]:
        case "constants":
            return f"constants\n{finding['text']}"
        case "times":
            what = f"{finding['model']}: {finding['quantity']} by {finding['method']}"
            if "missing" in finding:
                return f"{what}: missing: {finding['missing']}"
            middle = 1e3 * statistics.median_high(finding["seconds"])
            build = finding["trace_seconds"] + finding["compile_seconds"]
            return f"{what}: {middle:.3f} ms, {finding['temporary_bytes'] / 2**20:.0f} MiB, built in {build:.1f} s"
        case "kernels":
            lines = [
                f"    {time:9.1f} µs {count:6.1f} × {name[:110]}" for name, time, count in finding["kernels"]
            ]
            return "\n".join([f"{finding['model']}: kernels of {finding['quantity']}", *lines])
        case "precision":
            return f"precision of {finding['model']} in {finding['format']}: {json.dumps(finding['errors'])}"
        case "correctness":
            state = finding.get("failed") or finding["wrong"] or "right"
            return f"{finding['case']} in {finding['format']}: {state}"
    return json.dumps(finding)


# What one reads


def tables(record: dict[str, Any]) -> str:
    """All tables, in Markdown."""
    import page

    found = record["found"]
    of = lambda part: [x for x in found if x["part"] == part]
    where = record["environment"]
    parts = [f"Measured on {where['device']}, jax {where['jax']}."]
    if of("times"):
        builds = where["jobs"] == 1 and not where["cached"]
        parts += ["### Time and memory", page.markdown(_times(of("times"), builds=builds))]
    if of("constants"):
        row = of("constants")[-1]
        parts += ["### Constants", f"```python\n{row['text'].strip()}\n```"]
    if of("precision"):
        parts += ["### Precision", page.markdown(_errors(of("precision")), 3)]
    if of("correctness"):
        parts += ["### Correctness", "\n".join(_correctness_lines(of("correctness")))]
    return "\n\n".join(parts)


def _times(found: list[dict[str, Any]], *, builds: bool) -> list[list[str]]:
    """Time, and temporary memory where the plain gradient needs enough of it for a ratio to say something."""
    rows = [["model", "plain, ms", *(f"{q} by {m}" for q, m in COLUMNS), *["built"] * builds]]
    seen: dict[str, dict[Any, Any]] = {}
    for x in found:
        seen.setdefault(x["model"], {})[x["quantity"], x["method"]] = x
    ratios: dict[Any, list[float]] = {}
    for model, cells in seen.items():
        base = cells.get(("sum", GRADIENT), {})
        if "seconds" not in base:
            continue
        row = [model, f"{1e3 * statistics.median_high(base['seconds']):.2f}"]
        for column in COLUMNS:
            cell = cells.get(column, {})
            if "seconds" not in cell:
                row.append("–")
                continue
            ratio = statistics.median_high(cell["seconds"]) / statistics.median_high(base["seconds"])
            memory = cell["temporary_bytes"] / max(base["temporary_bytes"], 1)
            ratios.setdefault(column, []).append(ratio)
            row.append(f"{ratio:.2f}×" + (f", {memory:.2f}×" if base["temporary_bytes"] >= 1 << 20 else ""))
        build = lambda x: x["trace_seconds"] + x["compile_seconds"]
        ours = cells.get(("clipped_sum", "jgd"), {})
        if builds:
            row.append(f"{build(ours) / build(base):.1f}×" if "seconds" in ours else "–")
        rows.append(row)
    everywhere = lambda column: len(ratios.get(column, [])) == len(seen)
    means = [f"{statistics.geometric_mean(ratios[c]):.2f}×" if everywhere(c) else "–" for c in COLUMNS]
    return [*rows, ["mean", "", *means, *[""] * builds]]


def _errors(found: list[dict[str, Any]]) -> list[list[str]]:
    names = list(found[0]["errors"]["jgd"])
    each = ((x["model"], x["format"], by, errors) for x in found for by, errors in x["errors"].items())
    rows = [[*who, *(f"{errors[name]:.1e}" for name in names)] for *who, errors in each]
    return [["model", "format", "by", *names], *rows]


def _correctness_lines(found: list[dict[str, Any]]) -> Iterator[str]:
    for kind in FORMATS:
        each = [x for x in found if x["format"] == kind]
        wrong = [x for x in each if x.get("wrong")]
        failed = [x for x in each if "failed" in x]
        asked = sum(x.get("reductions", 0) for x in each)
        yield f"- {kind}: {len(each)} cases, {asked} answers; {len(wrong)} cases wrong, {len(failed)} failed"
        for x in failed:
            yield f"  - {x['case']}: {x['failed'].splitlines()[0]}"
        for x in wrong:
            yield f"  - {x['case']}: {', '.join(x['wrong'])}"


def main() -> int:
    """Measures, or, as one of its own child processes, does one task."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile at a time (default: 1)")
    parser.add_argument("--seconds", type=float, default=2.0, help="a program rests after these (default: 2)")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for the cases (default: 120)")
    parser.add_argument("--small", action="store_true", help="tiny sizes: to see that it works")
    parser.add_argument("--profile", action="store_true", help="also say in which kernels the time goes")
    parser.add_argument("--hlo", metavar="FOLDER", help="where to write the compiled programs")
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"the figures (default: {STORED.name})")
    parser.add_argument("--render", action="store_true", help="from the stored figures, without measuring")
    parser.add_argument("--one", metavar="TASK", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        part, _, what = args.one.partition(":")
        if part == "environment":
            from jgd._bench.measure import environment

            say(**environment())
        elif part == "constants":
            find_constants(args)
        elif part == "correctness":
            find_correctness(args, *map(int, what.split("/")))
        else:
            {"times": find_times, "precision": find_precision}[part](args, what)
        return 0
    if args.render:
        import page

        record = json.loads((args.json or STORED).read_text())
        page.put(PAGE, "accelerator", tables(record))
        return 0
    args.json = args.json or (None if args.small else STORED)
    args.started = time.time()
    args.environment = json.loads(
        subprocess.run(
            [sys.executable, __file__, "--one", "environment"],
            capture_output=True, text=True, check=True,
        ).stdout.splitlines()[-1]
    )  # fmt: skip
    args.environment |= {"jobs": args.jobs, "cached": "JAX_COMPILATION_CACHE_DIR" in os.environ}
    print(args.environment, flush=True)
    workers = Workers(args)
    if "constants" in args.parts:
        workers.run(["constants"], 1)
    if "times" in args.parts:
        workers.run([f"times:{name}" for name in args.models], args.jobs)
    if "precision" in args.parts:
        workers.run([f"precision:{name}" for name in ("mlp", "cnn", "transformer")], args.jobs)
    if "correctness" in args.parts:
        args.until = time.time() + args.limit
        workers.run([f"correctness:{k}/{args.jobs}" for k in range(args.jobs)], args.jobs)
    print("\n" + tables({"environment": args.environment, "found": workers.found}))
    return int(any(x["part"] == "failed" or x.get("wrong") for x in workers.found))


if __name__ == "__main__":
    sys.exit(main())
