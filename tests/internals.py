"""What the tests reach of the library beside its public names: where one of these moves, it moves here alone."""

# ruff: noqa: F401

import dataclasses

from jgd import _autotune as timed
from jgd import _clock as clock_module
from jgd import _execution as whole
from jgd import _gradients as gradients_module
from jgd._bench import command as bench_command
from jgd._bench import growth
from jgd._bench import measure as measuring
from jgd._bench.collectives import collectives, largest_array, traffic
from jgd._bench.measure import BASELINE, Measurement, compile_program, measure
from jgd._bench.models import MODELS, build
from jgd._bench.models.vectors import mlp_of
from jgd._bench.quantities import METHODS, QUANTITIES, Absent, by_jgd, by_vmap, plain
from jgd._clock import time_interleaved
from jgd._demo import (
    ascent,
    baselines,
    cartpole,
    games,
    opposites,
    policies,
    prices,
    regimes,
    repeats,
    style,
    terminal,
    tour,
)
from jgd._demo import command as demo_command
from jgd._demo import data as demo_data
from jgd._demo import report as demo_report
from jgd._demo import sums as demo_sums
from jgd._demo.section import Check, Picture, Section, Table
from jgd._demo.tour import Stop, Visit
from jgd._demo.walk import recorded
from jgd._engine import (
    batch_sums,
    computed_leaves,
    devices,
    factors,
    jaxprs,
    lookups,
    moments,
    norms,
    part_gradients,
    rules,
    tiles,
    versions,
    views,
)
from jgd._engine import trace as trace_module
from jgd._engine.calls import bind
from jgd._engine.computed_leaves import ComputedLeaves
from jgd._engine.devices import DEVICES, Device
from jgd._engine.factors import Outer
from jgd._engine.flops import Work, work_of
from jgd._engine.gradients import DenseGradients, FactoredGradients
from jgd._engine.jaxprs import prim, trace_jaxpr
from jgd._engine.parts import PartRules
from jgd._engine.plan import PLANNED, SECOND_PASS, Variant, has_second_pass, plan_of
from jgd._engine.residuals import pass_over
from jgd._engine.stored import stored
from jgd._engine.trace import trace
from jgd._engine.views import View, overlap
from jgd._errors import require
from jgd._execution import Execution
from jgd._fit import fit as fit_module
from jgd._fit import manifest
from jgd._fit.dispatcher import Dispatcher
from jgd._fit.lock import Lock
from jgd._fit.plain import decoded, encoded
from jgd._fit.stepwise import _Record as Record
from jgd._gradients import PerExampleGrads, held_as


def rules_of(plan):
    """The names of the rules that a plan has: of what is taken apart into real parts, the rule inside."""
    each = [rule for part in plan.parts for rule in part.rules.rules]
    return {type(getattr(rule, "rule", rule)).__name__ for rule in each}


def forced(grads, method):
    """The gradients, with every norm by this method where it is open, and none made by the pass itself."""
    form = form_of(grads)

    def by_method(part):
        open_to = method if method in part.rules.costs else "block"
        return dataclasses.replace(part, rules=dataclasses.replace(part.rules, method=open_to))

    plan = dataclasses.replace(form.plan, parts=tuple(map(by_method, form.plan.parts)))
    residuals = form.residuals._replace(squares={})
    return held_as(grads, dataclasses.replace(form, plan=plan, residuals=residuals))


def form_of(grads: PerExampleGrads):
    """How the gradients are held: the engine's factors, blocks, or what makes them a microbatch at a time."""
    return grads._form


def sums_of(grads: PerExampleGrads):
    """What the pass has made of all examples together."""
    return grads._sums


def with_form(grads: PerExampleGrads, form) -> PerExampleGrads:
    """The same gradients, held in a form whose leaves have the shapes of this one's."""
    return dataclasses.replace(grads, _form=form)
