"""What others make per-example gradients with in PyTorch, on three architectures of the suite.

`benchmarks/run.py` runs it in an environment of its own; it prints JSON. Times are relative to the plain gradient
of the same model in PyTorch, measured beside them, as for JAX: the programs take turns, and the least time counts.
"""

import argparse
import json
import runpy
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch_models import PROBLEMS, Problem

# By its path: there is neither jgd nor JAX in this environment.
CLOCK = Path(__file__).parents[1] / "src/jgd/_clock.py"
time_interleaved = runpy.run_path(str(CLOCK))["time_interleaved"]

MAX_NORM = 1.0
BASELINE = "plain gradient"


def plain(problem: Problem, model: nn.Module) -> Callable[[], Any]:
    """The gradient of the summed loss."""

    def run() -> Any:
        model.zero_grad()
        problem.losses(model(problem.inputs), problem.targets).sum().backward()
        return [p.grad for p in model.parameters()]

    return run


def norms_of(blocks: list[torch.Tensor]) -> torch.Tensor:
    """`(B,)`: the norms of gradients that are held."""
    return torch.stack([g.flatten(1).norm(dim=1) for g in blocks]).norm(dim=0)


def clip(blocks: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The clipped sum and the norms, from every example's gradient."""
    norms = norms_of(blocks)
    factor = (MAX_NORM / norms).clamp(max=1)
    return [torch.einsum("i,i...", factor, g) for g in blocks], norms


def answer(blocks: list[torch.Tensor], quantity: str) -> Any:
    """The quantity, from every example's gradient."""
    return norms_of(blocks) if quantity == "norms" else clip(blocks)


def torch_func(problem: Problem, model: nn.Module, quantity: str) -> Callable[[], Any]:
    """`vmap(grad)` of the functional model."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        outputs = torch.func.functional_call(model, params, (x[None],))
        return problem.losses(outputs, y[None])[0]

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def run() -> Any:
        return answer(list(gradients(params, problem.inputs, problem.targets).values()), quantity)

    return run


def opacus_hooks(problem: Problem, model: nn.Module, quantity: str) -> Callable[[], Any]:
    """Opacus's gradient samples, by hooks on the layers that it knows."""
    from opacus import GradSampleModule

    wrapped = GradSampleModule(model, loss_reduction="sum")

    def run() -> Any:
        wrapped.zero_grad()
        problem.losses(wrapped(problem.inputs), problem.targets).sum().backward()
        return answer([p.grad_sample for p in wrapped.parameters()], quantity)

    return run


def opacus_ghost(problem: Problem, model: nn.Module, quantity: str) -> Callable[[], Any]:
    """Opacus's norms without samples, then a second backward pass of the reweighted loss."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        model, max_grad_norm=MAX_NORM, use_ghost_clipping=True, loss_reduction="sum"
    )

    def run() -> Any:
        wrapped.zero_grad()
        losses = problem.losses(wrapped(problem.inputs), problem.targets)
        losses.sum().backward(retain_graph=quantity != "norms")
        norms = wrapped.get_norm_sample()
        if quantity == "norms":
            return norms
        wrapped.zero_grad()
        wrapped.disable_hooks()
        (wrapped.get_clipping_coef().detach() * losses).sum().backward()
        wrapped.enable_hooks()
        return [p.grad for p in wrapped.parameters()], norms

    return run


def backpack_norms(problem: Problem, model: nn.Module, quantity: str) -> Callable[[], Any]:
    """BackPACK's squared norms of each parameter's gradient."""
    if quantity != "norms":
        raise NotImplementedError("it has norms only")
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    extended = extend(model)

    def run() -> Any:
        extended.zero_grad()
        losses = problem.losses(extended(problem.inputs), problem.targets)
        with backpack(BatchL2Grad()):
            losses.sum().backward()
        left_out = [name for name, p in extended.named_parameters() if not hasattr(p, "batch_l2")]
        if left_out:
            raise NotImplementedError(
                f"it has no norms of {', '.join(left_out[:3])} and so on: {len(left_out)} parameters"
            )
        return torch.stack([p.batch_l2 for p in extended.parameters()]).sum(0).sqrt()

    return run


METHODS = {
    "torch.func": torch_func,
    "Opacus hooks": opacus_hooks,
    "Opacus ghost": opacus_ghost,
    "BackPACK": backpack_norms,
}
QUANTITIES = ("norms", "clipped_sum")


def by_hand(problem: Problem, model: nn.Module) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Clipped sum and norms, one example after another: what the methods must agree with."""
    blocks = []
    for k in range(len(problem.inputs)):
        model.zero_grad()
        problem.losses(model(problem.inputs[k : k + 1]), problem.targets[k : k + 1]).sum().backward()
        blocks.append([p.grad.detach().clone() for p in model.parameters()])
    return clip([torch.stack(each) for each in zip(*blocks, strict=True)])


def measure(name: str, *, small: bool, repeats: int, seconds: float) -> tuple[list[Any], list[Any]]:
    """Every method's times on one model, each checked against the gradients one by one before."""
    torch.manual_seed(0)
    problem = PROBLEMS[name](small)
    reference = problem.make()
    state = reference.state_dict()
    expected = by_hand(problem, reference)
    programs, missing = {("sum", BASELINE): plain(problem, reference)}, []
    for method, make in METHODS.items():
        for quantity in QUANTITIES:
            model = problem.make()
            model.load_state_dict(state)
            try:
                run = make(problem, model, quantity)
                check(run(), expected, quantity)
                programs[quantity, method] = run
            except Exception as error:  # whatever a peer has to say against a model is the finding
                why = f"{type(error).__name__}: {error}".split("\n")[0][:200]
                missing.append({"model": name, "quantity": quantity, "method": method, "why": why})
    times = time_interleaved(programs, repeats=repeats, seconds=seconds)
    base, size = times["sum", BASELINE], sum(p.numel() for p in reference.parameters())
    found = [
        {
            "model": name, "quantity": quantity, "method": method, "parameters": size, "runs": len(t),
            "minimum_seconds": min(t), "median_seconds": statistics.median(t), "time_ratio": min(t) / min(base),
        }
        for (quantity, method), t in times.items()
    ]  # fmt: skip
    return found, missing


def check(made: Any, expected: Any, quantity: str) -> None:
    """Refuses to time what is not the answer."""
    total, norms = (expected[0], made) if quantity == "norms" else made
    for name, ours, theirs in [("norms", [expected[1]], [norms]), ("clipped sum", expected[0], total)]:
        for a, b in zip(ours, theirs, strict=True):
            if not torch.allclose(a, b, rtol=1e-3, atol=1e-4):
                raise ArithmeticError(f"its {name} differ by {(a - b).abs().max():.2g}")


def main() -> None:
    """Measures and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    measurements, missing = [], []
    for name in args.models:
        print(name, file=sys.stderr, flush=True)
        found = measure(name, small=args.small, repeats=args.repeats, seconds=args.seconds)
        measurements += found[0]
        missing += found[1]
    from importlib.metadata import version

    packages = ("torch", "opacus", "backpack-for-pytorch")
    environment = {package: version(package) for package in packages} | {"threads": args.threads}
    print(json.dumps({"environment": environment, "measurements": measurements, "missing": missing}))


if __name__ == "__main__":
    main()
