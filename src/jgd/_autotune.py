"""What the clock says of a loss's plans: the programs to time, and the choice among the few best plans."""

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jgd._clipping import clipped_sum
from jgd._clock import time_interleaved
from jgd._engine.blocks import blocks_at_once
from jgd._engine.plan import PLANNED, SECOND_PASS, Variant, plan_of
from jgd._engine.residuals import Model
from jgd._engine.shares import factor_bytes
from jgd._engine.trace import TracedLoss
from jgd._errors import is_concrete
from jgd._execution import Execution, Strategy
from jgd._memory import may_use_second_pass
from jgd._mesh import explicit_mesh

_REPEATS, _SECONDS = 7, 1.0  # runs of each plan, at most; one that took so long in all rests

# A plan must be quicker than the planner's by this factor: less is noise.
_GAIN = 0.97

# How many times larger than the factors the blocks of all examples may be, and still be tried.
_MATERIALIZED_ABOVE = 4

# Into how many microbatches a batch is tried: their arrays may stay in a cache where the batch's do not.
_DIVISIONS = (2, 4)


Question = Callable[[Any], Any]  # of gradients, to what is asked of them


@dataclass(frozen=True)
class Reduced:
    """The question of a method: its reduction, with what else it asks. It is remembered as the reduction is."""

    reduce: Callable[[Any], Any]

    def __call__(self, grads: Any) -> Any:
        return self.reduce(grads), grads.values, grads.aux


def clipped_sum_with_norms(grads: Any) -> Any:
    """What is timed where nothing else is said."""
    return grads._form.map_microbatches(lambda form, weights: clipped_sum(form, 1.0, weights), None)


class CompiledProgram(NamedTuple):
    """A compiled program with its arguments."""

    run: Callable[[], Any]  # returns when the result is there
    temporary_bytes: int


def compiled_program(
    compute: Callable[[Model, list[Any]], Any], model: Model, batch: list[Any]
) -> CompiledProgram:
    """Compiles a program for concrete arguments; inside of a trace as well as outside."""
    compiled = jax.jit(compute).lower(model, batch).compile()
    memory = compiled.memory_analysis()

    def run() -> Any:
        with jax.disable_jit(False):  # what is compiled cannot run without, even where that is told
            return jax.block_until_ready(compiled(model, batch))

    return CompiledProgram(run, int(getattr(memory, "temp_size_in_bytes", 0)))


def autotuned(
    program: TracedLoss,
    hold: Callable[[Execution, Model, list[Any]], Any],
    model: Model,
    batch: list[Any],
    *,
    question: Question,
    planned: Execution,
    divide: bool,
    max_memory: int | None = None,
) -> Execution:
    """The choice by which the answer to the question is there first; remembered.

    Timed on the arguments where they are concrete, elsewhere on small numbers of their shapes. Over several devices
    nothing is timed, and the planner's choice stands: there each process would have to come to the same one.

    Args:
        program: the traced loss.
        hold: makes the gradients that the question is of.
        model: the parameters and what else all examples share.
        batch: the examples.
        question: what is timed, with the pass before it.
        planned: what stands where the clock finds nothing quicker; no more examples go at a time.
        divide: whether fewer at a time may be tried.
        max_memory: no choice may need more temporary bytes than this; where there is such a limit, a second backward
            pass is tried as well.
    """
    if planned.strategy != "auto" or not _on_one_device([*model.params, *batch]):
        return planned

    def ask(choice: Execution, model: Model, batch: list[Any]) -> Any:
        return question(hold(choice, model, batch))

    def choose() -> Execution:
        others = _candidates(program, planned.microbatch_size, divide=divide)
        if max_memory is not None and may_use_second_pass(program, model, batch):
            others += [
                Execution(SECOND_PASS, size) for size in sorted({planned.microbatch_size, batch[0].shape[0]})
            ]
        if not others:
            return planned
        with jax.ensure_compile_time_eval():  # a trace may be under way
            known = Model(*([_concrete(x) for x in leaves] for leaves in model))
            examples = [_concrete(x) for x in batch]
        asked = {choice: functools.partial(ask, choice) for choice in (*others, planned)}
        if not all(map(is_concrete, jax.make_jaxpr(asked[planned])(known, examples).consts)):
            raise ValueError(
                "`autotune` times its question apart from the trace under way, but the question closes over a traced "
                "value: make that an argument of the loss, or give a question without it"
            )
        return _first(asked, planned, known, examples, max_memory)

    kept_by = question.reduce if isinstance(question, Reduced) else question
    key = type(question), planned, divide, max_memory
    try:
        chosen = program.once("quickest", weakref.WeakKeyDictionary).setdefault(kept_by, {})
    except TypeError:  # not hashable, or not weakly referable
        chosen = {}
    if key not in chosen:
        chosen[key] = planned  # for a question that itself asks for gradients
        try:
            chosen[key] = choose()
        except BaseException:
            del chosen[key]
            raise
    return chosen[key]


def _on_one_device(arrays: list[Any]) -> bool:
    placed = [x.sharding.device_set for x in arrays if isinstance(x, jax.Array) and is_concrete(x)]
    meshed = explicit_mesh(arrays) is not None or not jax.sharding.get_abstract_mesh().empty
    return not meshed and jax.process_count() == 1 and all(len(devices) == 1 for devices in placed)


def _candidates(program: TracedLoss, size: int, *, divide: bool) -> list[Execution]:
    """What may be quicker than the planner's choice."""
    at_once = blocks_at_once(program, size, 1)
    if at_once == size:
        return []
    as_factors = at_once is None
    parameters = sum(x.size for x in program.param_avals)
    different: dict[Any, Variant] = {}
    for variant in (PLANNED, Variant(near="block"), Variant(near="pairs"), Variant(keeps=False)):
        plan = plan_of(program, variant)
        different.setdefault((tuple(part.rules.method for part in plan.parts), plan.kept), variant)
    choices = [
        Execution(variant, size) for variant in different.values() if variant != PLANNED or not as_factors
    ]
    by_name: list[Strategy] = ["auto"] if as_factors else []
    if 4 * parameters <= _MATERIALIZED_ABOVE * factor_bytes(plan_of(program, PLANNED)):
        by_name.append("materialized")
        choices.append(Execution("materialized", size))
    sizes = [size // parts for parts in _DIVISIONS if divide and size % parts == 0]
    return [*choices, *(Execution(name, some) for name in by_name for some in sizes)]


def _first(
    asked: dict[Execution, Callable[..., Any]],
    planned: Execution,
    model: Model,
    batch: list[Any],
    max_memory: int | None,
) -> Execution:
    """The choice whose program is the quickest; the planned one unless another is so by more than noise."""
    runs: dict[Execution, Callable[[], Any]] = {}
    for choice, compute in asked.items():
        try:
            made = compiled_program(compute, model, batch)
            made.run()
        except jax.errors.JaxRuntimeError:  # it may need more memory than there is
            continue
        if choice == planned or max_memory is None or made.temporary_bytes <= max_memory:
            runs[choice] = made.run
    if planned not in runs:
        return planned
    times = time_interleaved(runs, repeats=_REPEATS, seconds=_SECONDS)
    best = min(runs, key=lambda choice: min(times[choice]))
    return best if min(times[best]) < _GAIN * min(times[planned]) else planned


def _concrete(x: Any) -> Any:
    """`x`, or small numbers in its place where it is traced."""
    if is_concrete(x):
        return x
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros(x.shape, x.dtype)
    steps = jnp.sin(jnp.arange(x.size, dtype=jnp.float32))
    return (0.1 * steps).reshape(x.shape).astype(x.dtype)
