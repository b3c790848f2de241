"""What the tests reach of the library beside its public names: where one of these moves, it moves here alone."""

# ruff: noqa: F401

from jgd import _clock as clock_module
from jgd import _gradients as gradients_module
from jgd import _timed as timed
from jgd import _versions as versions
from jgd import _whole as whole
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
from jgd._engine import devices, dots, jaxprs, leading, lookups, moments, program, rules, tiles, views
from jgd._engine.devices import DEVICES, Device
from jgd._engine.examples import pass_over
from jgd._engine.factored import Factored
from jgd._engine.factors import Outer
from jgd._engine.jaxprs import prim, trace_jaxpr
from jgd._engine.parts import Part
from jgd._engine.plan import AGAIN, Variant, goes_again, plan_of
from jgd._engine.program import trace
from jgd._engine.stored import stored
from jgd._engine.views import View, overlap
from jgd._engine.work import Work, work_of
from jgd._errors import require
from jgd._fit import manifest
from jgd._fit.chunks import Chunks
from jgd._fit.lock import Lock
from jgd._fit.plain import decoded, encoded
from jgd._fit.stepwise import _Record as Record
from jgd._gradients import held_as
from jgd._loss import bind
from jgd._materialized import Materialized
from jgd._whole import Choice
