"""What every test runs under: the CPU, quick compilation, reproducible random examples."""

import gc
import importlib.metadata
import inspect
import itertools
import os
import zlib

# Read when jax first makes a backend. The tests compile much and compute little.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    )
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        # Half the time: XLA's former way to emit loops. Later versions refuse the flag, and test the other way.
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
if "device_count" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += (
        " --xla_force_host_platform_device_count=8"  # for tests/test_mesh.py; others use one
    )

import hypothesis
import jax
import jaxtyping
import numpy as np
import pytest

if os.environ.get(
    "JGD_SHAPES"
):  # the shapes of what is public are checked at each call; before jgd is imported
    public = [
        "jgd._reductions",
        "jgd._methods",
        "jgd._fit.history",
        "jgd._demo.policies",
        "jgd._demo.cartpole",
    ]
    jaxtyping.install_import_hook(public, "beartype.beartype")

# Tracing makes many objects and few cycles: collecting seldom saves a tenth of the time.
gc.set_threshold(200_000, 20, 50)

hypothesis.settings.register_profile(
    "default",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=7,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.register_profile("search", deadline=None, max_examples=500)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a test with `sample(chosen)`, the parameters that `chosen` says no to are slow.

    CI asks these too: `pytest -m "sample and slow"`. With `JGD_SHARE=3` that is a third of them, by their names,
    which is what CI has time for.
    """
    share = int(os.environ.get("JGD_SHARE", "1"))
    for item in items:
        for marker in item.iter_markers("sample"):
            for chosen in marker.args:
                names = inspect.signature(chosen).parameters
                if not chosen(**{name: item.callspec.params[name] for name in names}):
                    item.add_marker(pytest.mark.slow)
        markers = {marker.name for marker in item.iter_markers()}
        if {"sample", "slow"} <= markers and zlib.crc32(item.nodeid.encode()) % share:
            item.add_marker(pytest.mark.skip(reason="not of this share"))


@pytest.fixture
def x64():
    """Float64 for one test, where exactness is asked for."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def forget():
    """What is compiled for one constant is not for another."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture
def example():
    """Parameters, inputs and targets of `strategies.squared_error`, for five examples."""
    rng = np.random.default_rng(0)
    return {"w": rng.normal(size=(4, 3))}, rng.normal(size=(5, 4)), rng.normal(size=(5, 3))


@pytest.fixture
def folder(tmp_path):
    """Where a run may be kept; nothing is there yet."""
    return tmp_path / "run"


_finished = itertools.count(1)


@pytest.fixture(autouse=True)
def forget_compiled_functions():
    """Drops what was compiled, now and then: it fills memory, and the memory maps that a process may have."""
    yield
    if next(_finished) % 40 == 0:
        jax.clear_caches()
