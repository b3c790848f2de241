"""Several processes joined on this machine train what one trains; one that dies ends the others."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

PROCESS = Path(__file__).parent / "process.py"


def start(job, processes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    jobs = [job | {"rank": rank, "processes": processes, "port": port} for rank in range(processes)]
    return [
        subprocess.Popen(
            [sys.executable, PROCESS, json.dumps(one)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for one in jobs
    ]


def results(job, processes, tmp_path):
    out = tmp_path / f"{processes}.npz"
    running = start(job | {"out": str(out)}, processes)
    said = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0] * processes, "\n".join(said)
    with np.load(out) as file:
        return dict(file)


def assert_close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.sample
def test_two_processes_train_what_one_does(tmp_path):
    job = {"data": ["arrays", "share"], "epochs": 3}
    one = results(job, 1, tmp_path)
    two = results(job | {"folder": str(tmp_path / "run")}, 2, tmp_path)
    assert_close(two, one)


@pytest.mark.slow
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_four_processes_train_what_one_does(tmp_path, reduce):
    job = {"data": ["arrays", "share"], "epochs": 3, "reduce": reduce}
    assert_close(results(job, 4, tmp_path), results(job, 1, tmp_path))


@pytest.mark.slow
def test_a_run_of_two_goes_on(tmp_path):
    job = {"data": ["arrays", "share", "lonely"]}
    kept = {"folder": str(tmp_path / "run")}
    whole = results(job | {"epochs": 4}, 2, tmp_path)
    results(job | kept | {"epochs": 2}, 2, tmp_path)
    on = results(job | kept | {"epochs": 4}, 2, tmp_path)
    assert on.keys() == whole.keys()
    for name in whole:
        np.testing.assert_array_equal(on[name], whole[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("data", ["arrays", "share"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_the_others(tmp_path, rank, data):
    job = {"data": [data], "epochs": 100000, "dies": {"rank": rank, "step": 20}, "out": str(tmp_path / "x")}
    running = start(job, 2)
    running[rank].communicate(timeout=200)
    died = time.monotonic()
    said = running[1 - rank].communicate(timeout=100)[0]
    assert running[1 - rank].returncode not in (0, 17)
    assert f"process {1 - rank} of 2 stops, as another process of this run has died" in said or (
        "JAX distributed service detected fatal errors" in said  # the coordinator itself is gone
    ), said
    assert time.monotonic() - died < 60  # ten seconds, and what a busy machine adds
