"""Plans chosen by predicted time and by the clock: what decides, what is remembered, that the answers stay the same."""

import dataclasses
import functools
import gc
import importlib
import re
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from cases import problem
from internals import DEVICES, SECOND_PASS, Device, Execution, Variant, devices, form_of, gradients_module
from internals import timed as _autotune
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of

import jgd

# Both methods of one product are predicted to take about as long.
POSITIONS, SIDE = 24, 64


PLANNED, BLOCK, HELD = (Execution(s, 8) for s in ("auto", Variant(near="block"), "materialized"))


def loss(w, x):
    return jnp.sum(jnp.tanh(x @ w))


def arguments(size=8):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(SIDE, SIDE)) / 8, jnp.float32), jnp.asarray(
        rng.normal(size=(size, POSITIONS, SIDE)), jnp.float32
    )


def renamed():
    """The loss as a function, and no cache that has seen what it traces to."""
    jax.clear_caches()
    return lambda *args: loss(*args)


@pytest.fixture
def clock(monkeypatch):
    """A clock that makes one strategy the quickest, and counts how often it was asked."""
    clock = type("Clock", (), {"best": PLANNED, "calls": [], "gain": 0.5})()

    def time_interleaved(programs, **_):
        clock.calls = [*clock.calls, list(programs)]
        for run in programs.values():
            run()
        return {name: [clock.gain if name == clock.best else 1.0] for name in programs}

    monkeypatch.setattr(_autotune, "time_interleaved", time_interleaved)
    return clock


def method_of(grads):
    return form_of(grads).plan.parts[0].rules.method


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        (Device(1e9, 1e9, 1e9, 1e15), "pairs"),  # 2·T²·2·S operations against 2·T·S²: fewer
        (Device(1e9, 1e8, 1e8, 1e15), "block"),  # slow small products
        (Device(1e12, 1e11, 1e11, 1e9), "pairs"),  # slow memory: the block is written and read
    ],
)
def test_the_device_decides(row, rule, monkeypatch):
    monkeypatch.setitem(devices.DEVICES, jax.default_backend(), row)
    (only,) = jgd.explain(renamed(), *arguments()).rows
    assert only.rule == rule and "predicted time" in only.why


def test_every_row_is_a_device():
    assert DEVICES.keys() == {"cpu", "gpu", "tpu"}
    assert all(row.large >= row.small > 0 and row.bandwidth > 0 for row in DEVICES.values())
    assert devices.device_of("another") == DEVICES["gpu"]


def test_the_arguments_say_the_platform_and_a_trace_the_default_one(monkeypatch):
    w, x = arguments()
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    plans = []
    grads = jgd.per_example_grad(loss, strategy="factored")
    plans.append(grads(w, x)._form.plan)
    jax.jit(lambda w, x: plans.append(grads(w, x)._form.plan))(w, x)
    assert [plan.program.platform for plan in plans] == ["cpu", "tpu"]
    assert plans[0].device == DEVICES["cpu"] and plans[1].device == DEVICES["tpu"]


@pytest.mark.sample(lambda best: best == BLOCK)
@pytest.mark.parametrize("best", [PLANNED, BLOCK, HELD])
def test_the_quickest_is_taken_remembered_and_answers_the_same(best, clock):
    clock.best = best
    w, x = arguments()
    own = renamed()
    tuned, planned = (
        jgd.per_example_grad(own, autotune=True),
        jgd.per_example_grad(own, strategy="factored"),
    )
    grads, want = tuned(w, x), planned(w, x)
    assert {PLANNED, BLOCK, HELD} <= set(clock.calls[0])
    if best == HELD:
        assert type(form_of(grads)).__name__ == "DenseGradients"
    else:
        assert (method_of(grads) == method_of(want)) == (best == PLANNED)
    for reduction in (jgd.norms, functools.partial(jgd.clipped_sum, max_norm=1.0), jgd.gram, jgd.variance):
        oracle.assert_close(reduction(grads), reduction(want), 1e-5)
    tuned(w, x)
    assert len(clock.calls) == 1
    tuned(w, x[:6])
    assert len(clock.calls) == 2


def test_a_gain_that_noise_could_make_changes_nothing(clock):
    clock.best, clock.gain = BLOCK, 0.98
    own = renamed()
    grads = jgd.per_example_grad(own, autotune=True)(*arguments())
    assert method_of(grads) == method_of(jgd.per_example_grad(own, strategy="factored")(*arguments()))


@pytest.mark.sample(lambda wrap: wrap == "scan")
@pytest.mark.parametrize("wrap", ["jit", "vmap", "scan"])
def test_it_times_while_tracing(wrap, clock):
    clock.best = BLOCK
    w, x = arguments(16)
    grads = jgd.per_example_grad(renamed(), autotune=True)
    ask = lambda x: jgd.norms(grads(w, x))
    some = x.reshape(2, 8, *x.shape[1:])
    asked = {
        "jit": lambda: jax.jit(jax.vmap(ask))(some),
        "vmap": lambda: jax.vmap(ask)(some),
        "scan": lambda: jax.lax.scan(lambda c, x: (c, ask(x)), 0, some)[1],
    }
    want = jgd.norms(jgd.per_example_grad(loss, strategy="materialized")(w, x))
    oracle.assert_close(asked[wrap]().reshape(-1), want, 1e-5)
    assert len(clock.calls) == 1


def test_by_the_real_clock_with_integers_keys_and_a_shared_argument():
    def own(params, token, key, scale):
        x = params["table"][token] + 0.01 * jax.random.normal(key, (POSITIONS, SIDE))
        return scale * loss(params["w"], x)

    w, _ = arguments()
    params = {"w": w, "table": jnp.ones((50, SIDE)) * 0.1}
    batch = jnp.arange(8 * POSITIONS).reshape(8, POSITIONS) % 50, jax.random.split(jax.random.key(0), 8), 2.0
    axes = (None, 0, 0, None)
    grads = jgd.per_example_grad(own, in_axes=axes, autotune=True)
    want = jgd.per_example_grad(own, in_axes=axes, strategy="materialized")(params, *batch)
    got = jax.jit(lambda params, *batch: jgd.clipped_sum(grads(params, *batch), 1.0))(params, *batch)
    oracle.assert_close(got, jgd.clipped_sum(want, 1.0), 1e-5)


def test_float64_answers_by_every_plan_agree_to_rounding(x64):
    case = problem("tied_embedding_and_head", jnp.float64)
    for strategy in (Variant(near="pairs"), Variant(near="block"), Variant("block", keeps=False)):
        calls = functools.partial(jgd.per_example_grad, case.loss, **case.options)
        want = calls(strategy="materialized")(case.params, *case.batch)
        # The clock's choice reaches the pass as a strategy.
        chosen = calls(strategy="factored")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                gradients_module,
                "autotuned",
                lambda *_, planned, strategy=strategy, **__: planned._replace(strategy=strategy),
            )
            chosen = calls(autotune=True)(case.params, *case.batch)
        assert form_of(chosen).plan.program is not None
        oracle.assert_close(jgd.norms(chosen), jgd.norms(want), 1e-11)
        oracle.assert_close(jgd.clipped_sum(chosen, 0.5), jgd.clipped_sum(want, 0.5), 1e-11)


def test_microbatches_and_memory_are_tuned_at_their_size(clock):
    w, x = arguments(8)
    grads = jgd.per_example_grad(renamed(), microbatch_size=3, autotune=True)(w, x)
    assert form_of(grads).microbatch_size == 3 and {c.microbatch_size for c in clock.calls[0]} == {3}
    clock.best = HELD
    own = renamed()
    most = 2 * 4 * SIDE * SIDE  # less than the blocks of the 8 examples
    limited = jgd.per_example_grad(own, max_memory=most, autotune=True)(w, x)
    assert form_of(limited).size == 8 and all(HELD not in names for names in clock.calls[1:])
    oracle.assert_close(jgd.norms(limited), jgd.norms(jgd.per_example_grad(loss)(w, x)), 1e-5)
    clock.best = Execution(SECOND_PASS, 8)
    again = jgd.per_example_grad(renamed(), max_memory=10**7, autotune=True)(w, x)
    assert form_of(again).strategy == SECOND_PASS and all(
        clock.best not in names for names in clock.calls[:-1]
    )
    want = jgd.per_example_grad(loss)(w, x)
    oracle.assert_close(jgd.clipped_sum(again, 1.0), jgd.clipped_sum(want, 1.0), 1e-5)


@pytest.mark.sample(lambda best: best.strategy == "materialized")
@pytest.mark.parametrize("best", [Execution("auto", 4), Execution("auto", 2), Execution("materialized", 2)])
def test_fewer_at_a_time_is_tried(best, clock):
    clock.best = best
    w, x = arguments(8)
    own = renamed()
    grads = jgd.per_example_grad(own, autotune=True)(w, x)
    want = jgd.per_example_grad(own, strategy="materialized")(w, x)
    assert best in clock.calls[0]
    assert (form_of(grads).strategy, form_of(grads).microbatch_size) == best
    oracle.assert_close(grads.values, want.values, 1e-5)
    for reduction in (jgd.norms, functools.partial(jgd.clipped_sum, max_norm=1.0), jgd.gram, jgd.variance):
        oracle.assert_close(reduction(grads), reduction(want), 1e-5)


def test_what_is_timed_is_the_question(clock):
    seen = []

    def question(grads):
        seen.append(len(grads))
        return jgd.second_moment(grads), grads.values

    own, (w, x) = renamed(), arguments(8)
    tuned = jgd.per_example_grad(own, autotune=question)
    tuned(w, x)
    assert len(clock.calls) == 1 and seen == [8] * len(clock.calls[0])
    tuned(w, x)
    jax.jit(lambda w, x: question(tuned(w, x)))(w, x)
    assert len(clock.calls) == 1
    jgd.per_example_grad(own, autotune=jgd.norms)(w, x)  # another question may have another answer
    assert len(clock.calls) == 2


def test_the_question_is_of_the_whole_batch(clock):
    w, x = arguments(8)
    weights = jnp.arange(8.0)
    for options in ({"microbatch_size": 3}, {"max_memory": 10**6}):
        jgd.per_example_grad(renamed(), autotune=lambda grads: jgd.mean(grads, weights), **options)(w, x)
    assert len(clock.calls) == 2


def test_a_question_without_hash_is_timed_each_time(clock):
    @dataclasses.dataclass
    class Question:
        max_norm: float

        def __call__(self, grads):
            return jgd.clipped_sum(grads, self.max_norm)

    w, x = arguments()
    tuned = jgd.per_example_grad(renamed(), autotune=Question(1.0))
    method = jgd.descent(renamed(), optax.sgd(0.1), reduce=Question(1.0), autotune=True)
    for number in (1, 3):
        tuned(w, x)
        assert len(clock.calls) == number
        method.step(method.init(w), x)


def test_what_is_remembered_goes_with_the_loss(clock):
    own = renamed()
    grads = jgd.per_example_grad(own, autotune=lambda grads: (jgd.norms(grads), own and grads.values))
    grads(*arguments())
    gone = weakref.ref(own)
    del own, grads
    gc.collect()
    assert len(clock.calls) == 1 and gone() is None


def test_a_question_may_ask_for_gradients_itself(clock):
    w, x = arguments()
    kernel = lambda grads: jgd.gram(grads, tuned(w, x[:4]))
    tuned = jgd.per_example_grad(renamed(), autotune=kernel)
    want = jgd.per_example_grad(loss)
    oracle.assert_close(kernel(tuned(w, x)), jgd.gram(want(w, x), want(w, x[:4])), 1e-5)


def test_a_question_that_closes_over_a_traced_value_is_an_error():
    def ask(w, x, weights):
        return jgd.per_example_grad(loss, autotune=lambda g: jgd.mean(g, weights))(w, x).values

    with pytest.raises(ValueError, match="the question closes over a traced value"):
        jax.jit(ask)(*arguments(), jnp.ones(8))


def test_a_plan_that_needs_more_memory_than_there_is_is_left_out(clock, monkeypatch):
    made = _autotune.compiled_program

    def compiled_program(compute, *args):
        if len(asked := [*tried, compute]) == 1:
            tried[:] = asked
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")
        return made(compute, *args)

    tried = []
    monkeypatch.setattr(_autotune, "compiled_program", compiled_program)
    jgd.per_example_grad(renamed(), autotune=True)(*arguments())
    (names,) = clock.calls
    assert tried and BLOCK not in names and PLANNED in names


def test_it_is_a_bool_or_a_function():
    with pytest.raises(TypeError, match="`autotune` must be a bool, or the function"):
        jgd.per_example_grad(loss, autotune="norms")


def test_over_several_devices_the_prediction_decides(clock):
    w, x = arguments()
    x = jax.device_put(x, NamedSharding(mesh_of(4, 1), P("data")))
    w = jax.device_put(w, NamedSharding(mesh_of(4, 1), P()))
    clock.best = Execution("auto", 2)
    got = jgd.norms(jgd.per_example_grad(renamed(), autotune=True)(w, x))
    tuned = jgd.per_example_grad(loss, autotune=True)
    tuned(*arguments())  # what the clock says of one device is nothing to several
    assert len(clock.calls) == 1 and type(tuned(w, x)._form).__name__ == "FactoredGradients"
    assert len(clock.calls) == 1
    oracle.assert_close(got, jgd.norms(jgd.per_example_grad(loss)(*arguments())), 1e-5)


def test_methods_take_it(clock):
    own = renamed()
    clock.best = BLOCK
    reduce = functools.partial(jgd.clipped_sum, max_norm=1.0)
    make = functools.partial(jgd.descent, own, optax.sgd(0.1), reduce=reduce)
    w, x = arguments()
    tuned, plain = make(autotune=True), make()
    oracle.assert_close(tuned.step(tuned.init(w), x)[0].params, plain.step(plain.init(w), x)[0].params, 1e-6)
    assert len(clock.calls) == 1
    again = make(autotune=True)  # the same question of the same loss
    again.step(again.init(w), x)
    assert len(clock.calls) == 1
    with pytest.raises(ValueError, match="`autotune` belong to derivative='reverse'"):
        jgd.ascent(own, optax.sgd(0.1), derivative="forward", autotune=True)


def test_what_is_compiled_is_timed_without_jit_too(clock):
    own, args = renamed(), arguments()
    with jax.disable_jit():
        got = jgd.norms(jgd.per_example_grad(own, autotune=True)(*args))
        assert jgd.explain(own, *args, measure=True).measured_norms > 0
    assert len(clock.calls) == 1
    oracle.assert_close(got, jgd.norms(jgd.per_example_grad(own)(*args)), 1e-5)


@pytest.mark.parametrize("strategy", ["factored", "materialized"])
def test_a_strategy_beside_it_is_an_error(strategy):
    with pytest.raises(ValueError, match=f"`strategy` must be 'auto' beside it, got '{strategy}'"):
        jgd.per_example_grad(loss, strategy=strategy, autotune=True)


def test_explain_measures_beside_what_it_predicts():
    args = arguments()
    silent, spoken = jgd.explain(loss, *args), jgd.explain(loss, *args, measure=True)
    assert silent.measured_norms is None and "Measured" not in str(silent)
    assert spoken.measured_norms > 0 and spoken.measured_clipped_sum > 0
    assert (spoken.norms, spoken.rows) == (silent.norms, silent.rows)
    assert f"Measured: {spoken.measured_norms:.2f}×, {spoken.measured_clipped_sum:.2f}×." in str(spoken)


def test_explain_does_not_measure_shapes():
    shapes = jax.eval_shape(arguments)
    with pytest.raises(ValueError, match="`measure=True` runs the loss, but `params`"):
        jgd.explain(loss, *shapes, measure=True)
    with pytest.raises(ValueError, match=re.escape("float32[64,64] without numbers")):
        jax.jit(lambda w, x: jgd.explain(loss, w, x, measure=True).norms)(*arguments())


@pytest.fixture
def calibrate(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    return importlib.import_module("calibrate")


@pytest.mark.slow
@pytest.mark.sample
def test_the_calibration_measures_every_constant(calibrate):
    row = calibrate.measure(repeats=2, seconds=0.1)
    assert all(0 < value < 1e16 for value in row)


def test_the_calibration_prints_a_row(calibrate, monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "measure", lambda *_: Device(4e11, 2e11, 3e11, 1e10, 16 << 20))
    monkeypatch.setattr("sys.argv", ["calibrate.py"])
    calibrate.main()
    out = capsys.readouterr().out
    assert (
        '"cpu": Device(large=400e9, small=200e9, half=300e9, bandwidth=10e9, cache=16 << 20)' in out
        and "×" in out
    )
