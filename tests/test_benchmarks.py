"""The scripts of `benchmarks/`: what they judge, compare, keep and say; the measuring is `test_bench.py`'s."""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from internals import BASELINE, build, growth, measuring, mlp_of

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = ("run", "judge", "page", "peers", "gpt2", "growth")
WHERE = {"platform": "cpu", "device": "cpu", "cores": 2, "jax": "1.2", "jgd": "3.4"}


@pytest.fixture
def script(monkeypatch):
    """Imports a script by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = {name: sys.modules.pop(name, None) for name in SCRIPTS}
    yield importlib.import_module
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def measured(model, quantity, method, time, *, memory=1.0, build=1.0):
    return {
        "model": model, "quantity": quantity, "method": method, "minimum_seconds": 2e-3 * time,
        "median_seconds": 2e-3 * time, "runs": 3, "temporary_bytes": int(memory * 2**20), "output_bytes": 0,
        "flops": 0.0, "trace_seconds": 0.5 * build, "compile_seconds": 0.5 * build, "time_ratio": time,
        "median_ratio": time, "memory_ratio": memory, "peak_ratio": memory,
    }  # fmt: skip


def record_of(*measurements, **parts):
    return {
        "environment": WHERE,
        "settings": {"repeats": 3},
        "measurements": [*measurements],
        "missing": [],
        **parts,
    }


TWO = record_of(
    measured("a", "sum", BASELINE, 1),
    measured("a", "norms", "jgd", 0.5, memory=1.0, build=2),
    measured("a", "norms", "vmap(grad)", 0.8),
    measured("a", "norms", "microbatch 1", 0.4),
    measured("b", "sum", BASELINE, 1),
    measured("b", "norms", "jgd", 2.0, memory=4.0, build=3),
    measured("b", "norms", "vmap(grad)", 4.0),
)


def test_each_target_is_judged_by_the_mean_or_by_the_worst_model(script):
    judge = script("judge")
    assert [tuple(v)[2:] for v in judge.verdicts(TWO)] == [
        ("time, mean", 0.85, pytest.approx(1.0), ""),
        ("time, worst model", 1.10, 2.0, "b"),
        ("temporary memory, mean", 1.10, pytest.approx(2.0), ""),
        ("to the best other", 1.05, pytest.approx(1.25), "a"),
        ("tracing and compiling", 2.5, pytest.approx(3.0), "b"),
    ]
    assert not any(v.met for v in judge.verdicts(TWO))
    assert [row.missed() for row in judge.rows(TWO)] == [["other"], ["time", "build"]]
    cheap = record_of(measured("a", "sum", BASELINE, 1), measured("a", "norms", "jgd", 0.5))
    assert [v.what for v in judge.verdicts(cheap)] == [
        "time, mean", "time, worst model", "temporary memory, mean", "tracing and compiling",
    ]  # fmt: skip
    assert all(v.met for v in judge.verdicts(cheap))


def test_what_the_clock_chose_is_judged_apart_and_not_for_its_building(script):
    judge, page = script("judge"), script("page")
    tuned = measured("a", "norms", "jgd autotuned", 0.3, build=30)
    record = TWO | {"measurements": [*TWO["measurements"], tuned]}
    found = [v for v in judge.verdicts(record) if v.method == "jgd autotuned"]
    assert [(v.what, v.got) for v in found if v.what.startswith("t")] == [
        ("time, mean", pytest.approx(0.3)), ("time, worst model", 0.3),
        ("temporary memory, mean", pytest.approx(1.0)), ("to the best other", pytest.approx(0.75)),
    ]  # fmt: skip
    assert judge.verdicts(TWO) == [v for v in judge.verdicts(record) if v not in found]
    # It is no other method, to be compared with.
    assert "| **1.25×** (microbatch 1) | 0.75× (microbatch 1) | 2.00× |" in page.render(record)


def test_a_check_finds_what_got_worse_and_by_how_much(script):
    judge = script("judge")
    now = json.loads(json.dumps(TWO))
    assert list(judge.worse(TWO, now)) == []
    ours = {m["model"]: m for m in now["measurements"] if m["method"] == "jgd"}
    ours["a"]["time_ratio"], ours["b"]["time_ratio"] = 0.56, 2.5  # 12 % more, 25 % more
    ours["a"]["memory_ratio"] = 1.05
    assert [str(change) for change in judge.worse(TWO, now)] == [
        "a, norms: temporary memory 1.00× → 1.05× (+5 %)",
        "b, norms: time 2.00× → 2.50× (+25 %)",
    ]
    assert [c.model for c in judge.worse(TWO, now, time=0.3, memory=0.1)] == []
    assert list(judge.worse(now, TWO)) == []  # better is not worse


def test_a_check_exits_with_1_where_a_ratio_got_worse(script, capsys):
    run, now = script("run"), json.loads(json.dumps(TWO))
    assert run.compare(TWO, now, tolerance=0.15) == 0
    assert "no ratio got worse" in capsys.readouterr().out
    now["measurements"][1]["time_ratio"] = 0.7
    now["measurements"].append(measured("b", "gram", "jgd", 1))
    assert run.compare(TWO, now, tolerance=0.15) == 1
    assert capsys.readouterr().out.splitlines() == [
        "b, gram: not stored", "a, norms: time 0.50× → 0.70× (+40 %)", "1 ratios got worse"
    ]  # fmt: skip


def test_models_not_measured_again_are_kept_only_where_they_can_be_compared(script):
    run = script("run")
    stored = record_of(
        measured("mlp", "sum", BASELINE, 1), measured("gru", "sum", BASELINE, 1), peers={"x": 1}
    )
    new = record_of(measured("mlp", "sum", BASELINE, 3))
    both = run.merged(stored, new)
    assert [(m["model"], m["time_ratio"]) for m in both["measurements"]] == [("mlp", 3), ("gru", 1)]
    assert both["peers"] == {"x": 1}
    elsewhere = new | {"environment": WHERE | {"jax": "1.3"}}
    assert run.merged(stored, elsewhere) is elsewhere


@pytest.fixture
def asked(script):
    """What the command line would ask `run.py` for."""
    return script("run").argparse.Namespace(
        quantities=["norms", "gram"], methods=["jgd", "jax_privacy"], models=["mlp"],
        repeats=1, seconds=1.0, builds=1, small=True, no_peers=True, patience=7,
    )  # fmt: skip


def test_a_model_whose_process_dies_is_missing_with_the_reason(script, asked, monkeypatch):
    run = script("run")
    died = subprocess.CompletedProcess([], -9, "", "something\nKilled")
    monkeypatch.setattr(run.subprocess, "run", lambda *args, **options: died)
    record = run.measure_all(asked)
    names = [(m["model"], m["quantity"], m["method"]) for m in record["missing"]]
    assert names == [("mlp", q, m) for q in asked.quantities for m in asked.methods]
    assert {m["why"] for m in record["missing"]} == {"its process ended with status -9: Killed"}


def test_a_method_without_end_is_given_up_and_the_others_are_measured(script, asked, monkeypatch):
    run, limits = script("run"), []

    def start(command, **options):
        limits.append(options["timeout"])
        if "jax_privacy" in command:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        found = record_of(*(measured("mlp", q, "jgd", 1) for q in ("norms", "gram")))
        Path(command[command.index("--json") + 1]).write_text(json.dumps(found))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(run.subprocess, "run", start)
    record = run.measure_all(asked)
    assert [(m["quantity"], m["method"]) for m in record["measurements"]] == [
        ("norms", "jgd"),
        ("gram", "jgd"),
    ]
    assert [(m["quantity"], m["method"]) for m in record["missing"]] == [
        ("norms", "jax_privacy"), ("gram", "jax_privacy"),
    ]  # fmt: skip
    assert {m["why"] for m in record["missing"]} == {"a process that runs it twice took more than 7 s"}
    assert limits == [7, 3 * 7]  # the trial of the other method, then three programs


def test_peers_that_cannot_be_installed_are_all_missing_with_the_reason(script, monkeypatch, tmp_path):
    peers = script("peers")
    monkeypatch.setattr(peers, "ENVIRONMENT", tmp_path / "none")
    monkeypatch.setattr(peers.prepared, "__defaults__", (tmp_path / "none",))
    monkeypatch.setattr(peers.venv, "create", lambda *args, **options: None)
    refuse = subprocess.CompletedProcess([], 1, "", "ERROR: no matching distribution")
    monkeypatch.setattr(peers.subprocess, "run", lambda *args, **options: refuse)
    found = peers.measure(["mlp", "gru"], repeats=1, seconds=1.0, threads=2, small=True)
    assert found["measurements"] == []
    assert {m["model"] for m in found["missing"]} == {"mlp"}  # the peers know no GRU
    assert {m["method"] for m in found["missing"]} == {*peers.METHODS}
    assert all("no matching distribution" in m["why"] for m in found["missing"])


def test_the_page_says_what_is_missed_and_what_is_absent(script):
    page = script("page")
    absent = {"model": "b", "quantity": "norms", "method": "microbatch 1", "why": "5 is odd"}
    text = page.render(TWO | {"missing": [absent]})
    assert "| norms | jgd | time, worst model | ≤ 1.10× | 2.00× | b | **missed** |" in text
    assert (
        "| a | 2.00 ms, 1.0 MiB | 0.50×, 1.00× | 0.80×, 1.00× | 0.40×, 1.00× | **1.25×** (microbatch 1) | 2.00× |"
        in text
    )
    assert (
        "| b | 2.00 ms, 1.0 MiB | **2.00×, 4.00×** | 4.00×, 1.00× | — | 0.50× (vmap(grad)) | **3.00×** |"
        in text
    )
    assert "- norms by microbatch 1 on b: 5 is odd." in text
    assert page.summary(TWO).startswith(
        "0 of 5 targets met\nmissed: norms by jgd, time, mean: 1.00× for 0.85×"
    )


def test_the_picture_is_drawn_twice_alike(script, tmp_path):
    page, files = script("page"), (tmp_path / "1.svg", tmp_path / "2.svg")
    for file in files:
        page.draw(file, TWO)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert b"</svg>" in files[0].read_bytes()


def test_the_page_has_the_tables_of_the_figures_that_are_kept(script):
    page = script("page")
    kept = json.loads((FOLDER / "cpu.json").read_text())
    assert page.split(page.PAGE, "run")[1] == page.render(kept)


def test_the_page_has_the_other_scripts_stored_figures_too(script):
    page, gpt2, sweeps = script("page"), script("gpt2"), script("growth")
    kept = json.loads((FOLDER / "growth.json").read_text())["lines"]
    assert page.split(page.PAGE, "growth")[1] == sweeps.table([growth.Line(**line) for line in kept])
    assert page.split(page.PAGE, "gpt2")[1] == gpt2.page_text(json.loads(gpt2.STORED.read_text()))


def test_what_a_script_says_goes_between_its_own_markers(script, tmp_path):
    page, file = script("page"), tmp_path / "page.md"
    marked = lambda name, text: (
        f"<!-- {name}: begin, by benchmarks/{name}.py -->\n{text}\n<!-- {name}: end -->"
    )
    file.write_text(f"first\n{marked('run', 'old')}\nmiddle\n{marked('growth', '')}\nlast\n")
    page.put(file, "growth", "slopes")
    page.put(file, "run", "new")
    assert file.read_text() == f"first\n{marked('run', 'new')}\nmiddle\n{marked('growth', 'slopes')}\nlast\n"
    with pytest.raises(ValueError, match="lacks the markers <!-- gpt2: begin"):
        page.put(file, "gpt2", "x")


def test_the_peers_measured_models_of_the_same_size():
    found = json.loads((FOLDER / "cpu.json").read_text()).get("peers", {}).get("measurements", [])
    held = {}
    for name in {m["model"] for m in found}:
        jax.eval_shape(lambda name=name: held.setdefault(name, build(name)) and ())
    assert {m["model"]: m["parameters"] for m in found} == {name: m.num_params for name, m in held.items()}


def test_the_large_model_is_reported_by_its_least_time_and_highest_peak(script):
    gpt2 = script("gpt2")
    size = {"parameters": 10, "argument_bytes": 0, "temporary_bytes": 2**30, "output_bytes": 0}
    rounds = [
        {"program": "plain gradient", "seconds": [2.0, 3.0], "peak_resident_bytes": 2**30, **size},
        {"program": "jgd", "seconds": [4.0], "peak_resident_bytes": 2**30, **size},
        {"program": "vmap(grad)", "seconds": [], "peak_resident_bytes": None, **size},
        {"program": "plain gradient", "seconds": [4.0], "peak_resident_bytes": 2**31, **size},
        {"program": "jgd", "seconds": [2.4], "peak_resident_bytes": 2**31, **size},
    ]
    found = gpt2.combine(rounds)
    assert gpt2.ratios(found, "jgd") == (pytest.approx(1.2), 1.0)
    text = gpt2.report(found)
    assert "jgd, to plain: time 1.20×, peak resident memory 1.00× (target 1.3× both: met)" in text
    assert "vmap(grad): by XLA's account 1.00 GiB in all, 1.00 GiB of it temporary; not run" in text


def test_a_slope_is_the_exponent_of_a_power_law():
    sizes = (2, 4, 16)
    line = growth.Line("B", "jgd", sizes, tuple(3e-3 * s**0.5 for s in sizes), tuple(7 * s**2 for s in sizes))
    assert line.time_slope == pytest.approx(0.5) and line.memory_slope == pytest.approx(2)


@pytest.mark.slow
@pytest.mark.sample
def test_a_sweep_measures_each_size_and_ends_a_line_where_memory_ends(monkeypatch):
    sweep = growth.Sweep("width", lambda width: mlp_of("mlp", (width, width, 10), 8), (32, 64, 128))
    room = {"free": 2**40}
    monkeypatch.setattr(measuring, "free_bytes", lambda: room["free"])
    whole = {line.method: line for line in growth.lines(sweep, repeats=1)}
    assert list(whole) == [BASELINE, "jgd", "vmap(grad)"]
    assert {line.sizes for line in whole.values()} == {(32, 64, 128)}
    assert whole["vmap(grad)"].memory_slope > whole["jgd"].memory_slope
    room["free"] = whole["vmap(grad)"].bytes[-1] - 1
    short = {line.method: line.sizes for line in growth.lines(sweep, repeats=1)}
    assert short == {BASELINE: (32, 64, 128), "jgd": (32, 64, 128), "vmap(grad)": (32, 64)}


def test_the_growth_script_renders_the_slopes_that_are_stored(script, tmp_path, monkeypatch, capsys):
    sweep = script("growth")
    line = growth.Line("B", "jgd", (2, 8), (1e-3, 2e-3), (2**20, 2**22))
    record, text = tmp_path / "g.json", tmp_path / "page.md"
    record.write_text(json.dumps({"lines": [dataclasses.asdict(line)]}))
    text.write_text("<!-- growth: begin, by benchmarks/growth.py -->\n\n<!-- growth: end -->\n")
    monkeypatch.setattr(sys, "argv", ["growth.py", "--render", "--json", str(record), "--page", str(text)])
    assert sweep.main() == 0
    row = "| B | jgd | 2 | 8 | 2.00 ms | 0.50 | 4.0 MiB | 1.00 |"
    assert row in text.read_text() and row in capsys.readouterr().out
    assert "</svg>" in (tmp_path / "g.svg").read_text()


@pytest.mark.slow
def test_the_large_model_is_measured_in_processes_of_its_own(tmp_path):
    file = tmp_path / "gpt2.json"
    options = ["--small", "--rounds", "1", "--runs", "1", "--json", file]
    subprocess.run([sys.executable, FOLDER / "gpt2.py", *options], check=True, capture_output=True)
    found = json.loads(file.read_text())
    assert list(found) == ["plain gradient", "jgd", "vmap(grad)"]
    assert found["vmap(grad)"]["temporary_bytes"] > 0 and found["vmap(grad)"]["seconds"] == []
    assert all(found[name]["peak_resident_bytes"] > 2**26 for name in ("plain gradient", "jgd"))
