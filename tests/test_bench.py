"""The benchmark: its methods agree, its clock counts, its table says what was measured."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest
from internals import (
    BASELINE,
    METHODS,
    MODELS,
    QUANTITIES,
    Absent,
    Measurement,
    build,
    by_jgd,
    by_vmap,
    compile_program,
    measure,
    measuring,
    plain,
    time_interleaved,
)
from internals import bench_command as command
from internals import clock_module as clock

ROOT = Path(__file__).parent.parent

# One size of the convolutional net is enough: `small` makes them the same.
DISTINCT = [name for name in MODELS if name != "cnn-128"]


FEW = ("cnn",)
OFTEN = ("mlp", "gpt", "bag")  # by CI


def marks_of(name):
    return () if name in FEW else [pytest.mark.slow] + [pytest.mark.sample] * (name in OFTEN)


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks_of(name)) for name in DISTINCT])
def test_all_quantities_are_those_of_the_formulas(name, x64):
    model = build(name, small=True)
    ours = jax.jit(by_jgd(model, "all"))(model.params, *model.batch)
    by_hand = jax.jit(by_vmap(model, "all"))(model.params, *model.batch)
    assert len(ours) == len(QUANTITIES) - 1
    chex.assert_trees_all_close(ours, by_hand, rtol=1e-8, atol=1e-10)


EVERY = [name for name in QUANTITIES if name not in ("gram", "all")]


@pytest.mark.sample(lambda name, method: name == "bag" or method == "jax_privacy 4")
@pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated:DeprecationWarning")  # jax_privacy's call
@pytest.mark.parametrize(
    ("name", "method", "quantities"),
    [
        ("mlp", "microbatch 4", EVERY),
        ("mlp", "jax_privacy 4", ["clipped_sum"]),
        ("bag", "microbatch 1", EVERY),
        ("bag", "jax_privacy 1", ["clipped_sum"]),
        ("gpt", "jgd second pass", ["clipped_sum"]),
        ("adapters", "microbatch 1", ["clipped_sum"]),  # some arguments are shared
        ("adapters", "jax_privacy", ["clipped_sum"]),
    ],
)
def test_the_other_methods_compute_the_same_quantities(name, method, quantities):
    model = build(name, small=True)

    def compute(make):
        return {quantity: make(model, quantity)(model.params, *model.batch) for quantity in quantities}

    theirs, expected = (jax.jit(compute, static_argnums=0)(make) for make in (METHODS[method], by_vmap))
    chex.assert_trees_all_close(theirs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "quantities", "why"),
    [
        ("microbatch 1", ["gram", "all"], "all pairs of examples"),
        ("microbatch 4", EVERY, "5 examples are not made of several microbatches of 4"),
        ("jax_privacy 4", ["clipped_sum"], "5 examples are not made of several microbatches of 4"),
        ("jgd second pass", [name for name in QUANTITIES if name != "clipped_sum"], "only a weighted sum"),
        ("jax_privacy", [name for name in QUANTITIES if name != "clipped_sum"], "no such function"),
    ],
)
def test_what_a_method_does_not_compute_it_says(method, quantities, why):
    for quantity in quantities:
        with pytest.raises(Absent, match=why):
            METHODS[method](build("bag", small=True), quantity)


def test_the_baseline_is_the_gradient_of_the_summed_loss():
    model = build("bag", small=True)
    expected = jax.tree.map(jnp.zeros_like, model.params)
    for tokens, label in zip(*model.batch, strict=True):
        expected = jax.tree.map(jnp.add, expected, jax.grad(model.loss)(model.params, tokens, label))
    chex.assert_trees_all_close(plain(model)(model.params, *model.batch), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "size", "params"),
    [
        ("mlp", 128, 784 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 * 10 + 10),
        ("cnn", 32, 9 * (3 * 32 + 32 * 64 + 64 * 128) + 32 + 64 + 128 + 128 * 10 + 10),
        ("cnn-128", 128, 9 * (3 * 32 + 32 * 64 + 64 * 128) + 32 + 64 + 128 + 128 * 10 + 10),
        (
            "residual",
            16,
            9 * (3 * 32 + 2 * 32**2 + 32 * 64 + 64**2 + 64 * 128 + 128**2)
            + 32 * 64
            + 64 * 128
            + 2 * (32 + 32 + 32 + 64 + 64 + 128 + 128)
            + 128 * 10
            + 10,
        ),
        (
            "convnext",
            16,
            4 * (3 * 48 + 48 * 96)
            + 2 * (48 + 96)
            + 2 * (8 * 48**2 + 58 * 48)
            + 2 * (8 * 96**2 + 58 * 96)
            + 2 * 96
            + 96 * 10
            + 10,
        ),
        ("vit", 16, 49 * 128 + 66 * 128 + 4 * (12 * 128**2 + 13 * 128) + 2 * 128 + 128 * 10 + 10),
        ("gpt", 8, (2048 + 64) * 192 + 6 * (12 * 192**2 + 13 * 192) + 2 * 192),
        ("transformer", 8, 2 * 4096 * 256 + 128 * 256 + 4 * (12 * 256**2 + 13 * 256) + 2 * 256),
        ("gru", 128, 6 * 128**2 + 3 * 128 + 128 * 10 + 10),
        ("bag", 128, 50_000 * 64 + 64 * 4 + 4),
        ("adapters", 16, 2 * 4 * (4 * 2 * 256 + 2 * (256 + 1024))),
    ],
)
def test_the_suite_has_the_sizes_it_is_named_for(name, size, params):
    held = {}

    def build_it():
        held["model"] = build(name)
        return ()

    jax.eval_shape(build_it)  # shapes only: nothing large is made
    assert held["model"].num_params == params
    assert held["model"].size == size
    mapped = [x for x, axis in zip(held["model"].batch, held["model"].axes[1:], strict=True) if axis == 0]
    assert {leaf.shape[0] for leaf in jax.tree.leaves(mapped)} == {size}


def test_build_names_the_models_it_knows():
    with pytest.raises(ValueError, match=r"`name` must be one of mlp.*got 'lenet'"):
        build("lenet")


def test_a_compiled_program_reports_what_is_known_of_a_product():
    program = compile_program(jnp.matmul, jnp.ones((32, 64)), jnp.ones((64, 16)))
    assert program.output_bytes == 32 * 16 * 4
    assert program.flops == pytest.approx(2 * 32 * 64 * 16, rel=0.05)
    assert program.trace_seconds > 0 and program.compile_seconds > 0
    assert jnp.array_equal(program.run(), jnp.full((32, 16), 64.0))


def test_programs_take_turns_and_a_slow_one_rests():
    calls = []
    programs = {
        "quick": lambda: calls.append("quick"),
        "other": lambda: calls.append("other"),
        "slow": lambda: (calls.append("slow"), time.sleep(0.02)),
    }
    times = time_interleaved(programs, repeats=10, seconds=0.03)
    assert {name: len(runs) for name, runs in times.items()} == {"quick": 10, "other": 10, "slow": 2}
    assert calls[:3] == ["quick", "other", "slow"]  # the warm-up, which is not timed
    assert calls.count("quick") == 11
    assert min(times["slow"]) >= 0.02 > max(times["quick"])
    last_rounds = calls[-8:]
    assert all({*last_rounds[k : k + 2]} == {"quick", "other"} for k in range(0, 8, 2))
    assert len({tuple(last_rounds[k : k + 2]) for k in range(0, 8, 2)}) > 1  # the order changes


def test_the_clock_runs_where_no_package_is_installed():
    subprocess.run([sys.executable, "-I", "-S", clock.__file__], check=True)


def test_no_repeats_is_an_error():
    with pytest.raises(ValueError, match="`repeats` must be at least 1, got 0"):
        time_interleaved({}, repeats=0)


def test_ratios_are_to_the_plain_gradient_measured_beside():
    (base, *rest), missing = measure(build("mlp", small=True), ["norms"], ["jgd", "vmap(grad)"], repeats=3)
    assert not missing
    assert (base.method, base.time_ratio, base.memory_ratio, base.peak_ratio) == (BASELINE, 1, 1, 1)
    assert [(m.quantity, m.method) for m in rest] == [("norms", "jgd"), ("norms", "vmap(grad)")]
    for m in rest:
        assert m.time_ratio == m.minimum_seconds / base.minimum_seconds
        assert m.memory_ratio == m.temporary_bytes / base.temporary_bytes
        assert m.runs == 3


def test_what_cannot_be_measured_is_said_to_be_missing_and_why(monkeypatch):
    model = build("mlp", small=True)
    # Room for the parameters' gradient, and not for that of each of the eight examples.
    monkeypatch.setattr(measuring, "free_bytes", lambda: 3 * 4 * model.num_params)
    found, missing = measure(model, ["gram"], ["jgd", "vmap(grad)", "microbatch 4", "jax_privacy"], repeats=1)
    assert [(m.quantity, m.method) for m in found] == [("sum", BASELINE), ("gram", "jgd")]
    assert {(m.model, m.quantity) for m in missing} == {("mlp", "gram")}
    assert {m.method: m.why for m in missing} == {
        "vmap(grad)": "it needs 0.0 GiB, more than is free",
        "microbatch 4": "all pairs of examples are needed at once",
        "jax_privacy": "the library has no such function",
    }


def test_without_the_plain_gradient_all_is_missing(monkeypatch):
    monkeypatch.setattr(measuring, "free_bytes", lambda: 100)
    found, missing = measure(build("bag", small=True), ["norms"], ["jgd"], repeats=1)
    assert not found
    assert [(m.quantity, m.method) for m in missing] == [("sum", BASELINE), ("norms", "jgd")]


def test_a_measurement_from_scratch_traces_what_was_traced_before():
    original, traced = build("mlp", small=True), []

    def loss(*args):
        traced.append(1)
        return original.loss(*args)

    model = dataclasses.replace(original, loss=loss)
    for from_scratch, builds, times in ((False, 1, 3), (True, 1, 3), (True, 3, 9)):
        traced.clear()
        measure(model, ["norms", "sum"], ["jgd"], repeats=1, from_scratch=from_scratch, builds=builds)
        assert len(traced) == times


def test_of_several_builds_the_least_times_count(monkeypatch):
    original, taken = measuring.compile_program, iter([3.0, 2.0, 1.0, 4.0])

    def timed(function, *args):
        seconds = next(taken)
        return dataclasses.replace(original(function, *args), trace_seconds=seconds, compile_seconds=-seconds)

    monkeypatch.setattr(measuring, "compile_program", timed)
    found, _ = measure(build("mlp", small=True), ["norms"], ["jgd"], repeats=1, builds=2)
    assert [(m.trace_seconds, m.compile_seconds) for m in found] == [(1, -3), (2, -4)]


def _measurement(model, quantity, method, time_ratio, memory_ratio):
    return Measurement(
        model=model, quantity=quantity, method=method, minimum_seconds=2e-3, median_seconds=2e-3, runs=1,
        temporary_bytes=2**20, output_bytes=0, flops=0.0, trace_seconds=0.0, compile_seconds=0.0,
        time_ratio=time_ratio, median_ratio=time_ratio, memory_ratio=memory_ratio, peak_ratio=1.0,
    )  # fmt: skip


def test_the_table_has_every_ratio_and_their_geometric_means():
    found = [
        _measurement("a", "sum", BASELINE, 1, 1),
        _measurement("a", "norms", "jgd", 0.5, 2),
        _measurement("b", "sum", BASELINE, 1, 1),
        _measurement("b", "norms", "jgd", 2, 8),
    ]
    assert command.table(found) == [
        ["quantity", "by", "a", "b", "mean"],
        ["", BASELINE, "2.00 ms, 1.0 MiB", "2.00 ms, 1.0 MiB", ""],
        ["norms", "jgd", "0.50×, 2.00×", "2.00×, 8.00×", "1.00×, 4.00×"],
    ]


def test_the_command_prints_a_table_and_writes_what_it_measured(tmp_path, capsys):
    file = tmp_path / "bench.json"
    options = ["--models", "bag", "--quantities", "norms", "--methods", "jgd", "--repeats", "2", "--small"]
    assert command.main([*options, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "bag" in printed and "plain gradient" in printed and "norms" in printed
    record = json.loads(file.read_text())
    assert record["environment"]["jax"] == jax.__version__
    assert record["settings"] == {"repeats": 2, "seconds": 5.0, "builds": 1, "small": True}
    fields = {field.name for field in dataclasses.fields(Measurement)}
    assert [set(m) == fields for m in record["measurements"]] == [True, True]


@pytest.fixture
def readme_table():
    """The script that puts the table into the README, as a module."""
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "benchmarks" / "readme_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_script_turns_the_table_on_its_side(readme_table):
    found = [
        _measurement("a", "sum", BASELINE, 1, 1),
        _measurement("a", "norms", "jgd", 0.5, 2),
        _measurement("b", "sum", BASELINE, 1, 1),
        _measurement("b", "norms", "jgd", 2, 8),
    ]
    where = {"platform": "cpu", "device": "cpu", "cores": 4, "jax": "1.2", "jgd": "3.4"}
    record = {"environment": where, "measurements": [dataclasses.asdict(m) for m in found]}
    assert readme_table.render(record).splitlines() == [
        "|  | plain gradient | norms, jgd |",
        "| --- | --: | --: |",
        "| a | 2.00 ms, 1.0 MiB | 0.50×, 2.00× |",
        "| b | 2.00 ms, 1.0 MiB | 2.00×, 8.00× |",
        "| **mean** |  | 1.00×, 4.00× |",
        "",
        "Measured on 4 CPU cores, jax 1.2, jgd 3.4, float32.",
    ]


def test_the_readme_has_the_table_of_the_measurements_that_are_kept(readme_table):
    inside = readme_table.README.read_text().split(readme_table.BEGIN)[1].split(readme_table.END)[0]
    file = ROOT / "benchmarks" / "cpu.json"
    kept = readme_table.render(json.loads(file.read_text())) if file.exists() else ""
    assert inside.strip() == kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repeats", "0"], "`--repeats` must be at least 1, got 0"),
        (["--json", "no-such-folder/b.json"], "`--json` names a folder that is not there"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_runs(options, message, capsys):
    assert command.main(["--models", "mlp", "--small", *options]) == 2
    assert message in capsys.readouterr().err
