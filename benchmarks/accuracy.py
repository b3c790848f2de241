"""How accurate every reduction is on numbers that are hard, beside `vmap(grad)` in the same dtype: docs/accuracy.md.

    python benchmarks/accuracy.py             # a few minutes on two cores; writes the page's tables
    python benchmarks/accuracy.py --print     # prints them, and writes nothing

Losses, inputs and measures are those of tests/test_accuracy.py. It needs a checkout with its tests.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import page

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "accuracy.md"

REDUCTIONS = {
    "sum, mean": ("sum", "weighted_sum", "mean", "weighted_mean"),
    "norms": ("norms", "leaf_norms", "group_norms"),
    "clipped_sum": ("clipped_sum", "weighted_clipped_sum", "group_clipped_sum"),
    "dot": ("dot",),
    "gram": ("gram",),
    "second_moment": ("second_moment", "weighted_second_moment"),
    "variance": ("variance", "weighted_variance"),
    "noise_scale": ("noise_scale",),
    "project": ("project",),
}
INPUTS = {
    "ordinary": ("ordinary",),
    "cancelling 1e-2": ("cancelling 1e-2",),
    "cancelling 1e-4": ("cancelling 1e-4",),
    "offset 1e3 ± 1": ("offset 1e3 ± 1",),
    "scales 1e±6": ("params 1e-6", "params 1e6", "data 1e-6", "data 1e6", "loss 1e-6", "loss 1e6"),
}
SCALES_OF_FLOAT16 = "scales 1e±1"


def measured(dtype: str) -> dict[tuple[str, str], tuple[float, float]]:
    """By reduction and kind of input, the largest errors over all losses: by jgd, and by `vmap(grad)`."""
    import accuracy
    from accuracy_losses import KINDS, LOSSES, problem_of

    import jgd

    worst: dict[tuple[str, str], tuple[float, float]] = {}
    for name, loss in LOSSES.items():
        gradients = jgd.per_example_grad(loss, strategy="factored")
        ask = jax.jit(
            lambda question, params, *batch, of=gradients: accuracy.ask(of(params, *batch), question)
        )
        for kind, members in INPUTS.items():
            for member in members:
                problem = problem_of(name, KINDS[member], jnp.dtype(dtype))
                exact = accuracy.exact_gradients(problem)
                question = accuracy.question_of(problem, exact)
                got = jax.tree.map(np.asarray, ask(question, problem.params, *problem.batch))
                own = accuracy.answers(accuracy.gradients(problem), question)
                ours, theirs = (accuracy.errors(x, exact, question) for x in (got, own))
                for reduction, names in REDUCTIONS.items():
                    largest = lambda found, names=names: max(float(np.max(found[name])) for name in names)
                    before = worst.get((reduction, kind), (0.0, 0.0))
                    worst[reduction, kind] = (max(before[0], largest(ours)), max(before[1], largest(theirs)))
        print(dtype, name, file=sys.stderr, flush=True)
    return worst


def table(dtype: str, worst: dict[tuple[str, str], tuple[float, float]]) -> str:
    """A row for each reduction and kind of input."""
    rows = [["reduction", "input", "jgd", "vmap(grad)", "ratio"]]
    for (reduction, kind), (ours, theirs) in worst.items():
        if dtype == "float16" and kind == "scales 1e±6":
            kind = SCALES_OF_FLOAT16
        ratio = f"{ours / theirs:.1f}" if theirs else "–"
        rows.append([reduction, kind, f"{ours:.1e}", f"{theirs:.1e}", ratio])
    return f"### {dtype}\n\n{page.markdown(rows, 2)}"


def main() -> int:
    """Measures, and writes or prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--print", action="store_true", help="print the tables, and write nothing")
    args = parser.parse_args()
    page.split(PAGE, "accuracy")  # a page that cannot be written should fail now
    sys.path.insert(0, str(ROOT / "tests"))
    tables = [table(dtype, measured(dtype)) for dtype in ("float32", "bfloat16", "float16")]
    where = f"Measured on {jax.devices()[0].platform.upper()}, jax {jax.__version__}."
    text = "\n\n".join([where, *tables])
    print(text)
    if not args.print:
        page.put(PAGE, "accuracy", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
