"""What the clock says of a loss's plans: the programs to time, and the choice among the few best plans."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jgd._clipping import clipped_sum, root, total
from jgd._clock import time_interleaved
from jgd._engine.examples import Model
from jgd._engine.plan import MATERIALIZED_BELOW, PLANNED, Variant, plan_of
from jgd._engine.program import Program
from jgd._engine.shares import factor_bytes
from jgd._errors import is_concrete
from jgd._whole import Strategy, gradients_of, values_of

_REPEATS, _SECONDS = 7, 1.0  # runs of each plan, at most; one that took so long in all rests

# A plan must be quicker than the planner's by this factor: less is noise.
_GAIN = 0.97

# How many times larger than the factors the blocks of all examples may be, and still be tried.
_MATERIALIZED_ABOVE = 4

Asked = Callable[[Program, Strategy, list[Any], list[Any], list[Any]], Any]


def plain_gradient(program: Program, strategy: Strategy, params: Any, constants: Any, batch: Any) -> Any:
    """The gradient of the summed loss, by `jax.grad`."""
    del strategy
    summed = lambda params: jnp.sum(values_of(program, Model(params, constants), batch)[0])
    return jax.grad(summed)(params)


def norms_alone(program: Program, strategy: Strategy, params: Any, constants: Any, batch: Any) -> Any:
    """The norms, with the pass before."""
    form = gradients_of(program, strategy, params, constants, batch)[2]
    return root(total(form.squared_norms(), form.size))


def norms_and_clipped_sum(
    program: Program, strategy: Strategy, params: Any, constants: Any, batch: Any
) -> Any:
    """The clipped sum and the norms, with the pass before."""
    form = gradients_of(program, strategy, params, constants, batch)[2]
    return clipped_sum(form, 1.0, None), root(total(form.squared_norms(), form.size))


class Ready(NamedTuple):
    """A compiled program with its arguments."""

    run: Callable[[], Any]  # returns when the result is there
    temporary_bytes: int


def ready(asked: Asked, program: Program, strategy: Strategy, model: Model, batch: list[Any]) -> Ready:
    """Compiles a program for concrete arguments; inside of a trace as well as outside."""
    compiled = jax.jit(asked, static_argnums=(0, 1)).lower(program, strategy, *model, batch).compile()
    memory = compiled.memory_analysis()

    def run() -> Any:
        with jax.disable_jit(False):  # what is compiled cannot run without, even where that is told
            return jax.block_until_ready(compiled(*model, batch))

    return Ready(run, int(getattr(memory, "temp_size_in_bytes", 0)))


def quickest(
    program: Program, model: Model, batch: list[Any], size: int, max_memory: int | None = None
) -> Strategy:
    """The plan by which the norms and the clipped sum of `size` examples are there first; remembered.

    Timed on the arguments where they are concrete, elsewhere on small numbers of their shapes. Over several devices
    nothing is timed, and the planner's choice stands: there each process would have to come to the same one.
    """

    def choose() -> Strategy:
        alone = _on_one_device([*model.params, *batch])
        others = _candidates(program, size) if alone else []
        return _timed(program, others, model, batch, size, max_memory) if others else "auto"

    return program.once(("quickest", size, max_memory), choose)


def _on_one_device(arrays: list[Any]) -> bool:
    placed = [x.sharding.device_set for x in arrays if isinstance(x, jax.Array) and is_concrete(x)]
    return jax.sharding.get_abstract_mesh().empty and all(len(devices) == 1 for devices in placed)


def _candidates(program: Program, size: int) -> list[Strategy]:
    """The strategies that may be quicker than the planner's choice."""
    parameters = sum(x.size for x in program.param_avals)
    if size * parameters <= MATERIALIZED_BELOW:
        return []
    different: dict[Any, Variant] = {}
    for variant in (PLANNED, Variant(near="block"), Variant(near="pairs"), Variant(keeps=False)):
        plan = plan_of(program, variant)
        different.setdefault((tuple(part.method for part in plan.parts), plan.kept), variant)
    strategies: list[Strategy] = [variant for variant in different.values() if variant != PLANNED]
    if 4 * parameters <= _MATERIALIZED_ABOVE * factor_bytes(plan_of(program, PLANNED)):
        strategies.append("materialized")
    return strategies


def _timed(
    program: Program,
    others: list[Strategy],
    model: Model,
    batch: list[Any],
    size: int,
    max_memory: int | None,
) -> Strategy:
    with jax.ensure_compile_time_eval():  # a trace may be under way
        model = Model([_concrete(x) for x in model.params], [_concrete(x) for x in model.constants])
        batch = [_concrete(x, size) for x in batch]
    runs: dict[Strategy, Callable[[], Any]] = {}
    for strategy in ("auto", *others):
        made = ready(norms_and_clipped_sum, program, strategy, model, batch)
        if strategy == "auto" or max_memory is None or made.temporary_bytes <= max_memory:
            runs[strategy] = made.run
    times = time_interleaved(runs, repeats=_REPEATS, seconds=_SECONDS)
    best = min(runs, key=lambda strategy: min(times[strategy]))
    return best if min(times[best]) < _GAIN * min(times["auto"]) else "auto"


def _concrete(x: Any, size: int | None = None) -> Any:
    """`x`, or its first examples, or small numbers in their place where it is traced."""
    if is_concrete(x):
        return x if size is None else x[:size]
    shape = x.shape if size is None else (size, *x.shape[1:])
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros(shape, x.dtype)
    steps = jnp.sin(jnp.arange(jnp.zeros(shape).size, dtype=jnp.float32))
    return (0.1 * steps).reshape(shape).astype(x.dtype)
