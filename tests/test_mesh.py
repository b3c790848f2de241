"""Many devices: every reduction and method gives one device's answer, and sends no more than the plain gradient."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from cases import CASES, problem
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import jgd
from jgd._bench.collectives import collectives, largest_array, traffic
from jgd._bench.models import build
from jgd._bench.quantities import by_jgd, plain
from jgd._engine import tiles

B = 8  # of the cases' examples, on as many devices
WEIGHTS = np.array([1.5, 0.0, 0.5, 2.0, 1.0, 0.0, 0.0, 3.0])
PLACEMENTS = ("replicated", "sharded", "explicit")

# One case for each way through the engine; the others behind `slow`.
FEW = {
    "relu_mlp_on_positions": "sharded",
    "conv2d_all_options": "replicated",
    "tied_embedding_and_head": "explicit",
    "recurrence": "sharded",
    "weight_normalisation": "replicated",
    "custom_vjp_on_data_and_on_parameters": "explicit",
}


def mesh_of(*shape, kind=AxisType.Auto):
    names = ("data", "model")[: len(shape)]
    return Mesh(np.array(jax.devices()[: math.prod(shape)]).reshape(shape), names, axis_types=(kind,) * len(shape))


def widened(name):
    """The case with eight examples in the place of five."""
    case, other = problem(name), problem(name, batch_seed=1)
    axes = tuple(case.in_axes)[1:]
    join = lambda axis, a, b: a if axis is None else jax.tree.map(lambda x, y: _first(jnp.concatenate([x, y], axis), axis), a, b)
    batch = tuple(join(axis, a, b) for axis, a, b in zip(axes, case.batch, other.batch, strict=True))
    return dataclasses.replace(case, batch=batch), axes


def _first(x, axis):
    return jax.lax.slice_in_dim(x, 0, B, axis=axis)


def placed(case, axes, placement):
    """The arguments of a case on a mesh: parameters on every device, or each over as many axes as divide it."""
    shape = (8,) if placement == "replicated" else (4, 2)
    mesh = mesh_of(*shape, kind=AxisType.Explicit if placement == "explicit" else AxisType.Auto)
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))

    def leaf(x):
        spec = [None] * x.ndim
        if placement != "replicated":
            for name in ("model", "data"):
                free = [d for d in range(x.ndim) if spec[d] is None and x.shape[d] % mesh.shape[name] == 0 != x.shape[d]]
                if free:
                    spec[free[-1]] = name
        return put(x, P(*spec))

    def argument(axis, x):
        if axis is None:
            return put(x, P())
        return jax.tree.map(lambda x: put(x, P(*(None,) * (axis % x.ndim), "data")), x)

    return jax.tree.map(leaf, case.params), tuple(map(argument, axes, case.batch))


def asked(case, strategy="factored"):
    """Reductions that between them take every way through the factors, as one function of the arguments."""

    def ask(params, *batch):
        grads = jgd.per_example_grad(case.loss, strategy=strategy, **case.options)(params, *batch)
        scale = jgd.noise_scale(grads)
        return {
            "norms": jgd.norms(grads),
            "sum": jgd.sum(grads),
            "weighted_clipped_sum": jgd.clipped_sum(grads, 0.5, weights=jnp.asarray(WEIGHTS)),
            "weighted_mean": jgd.mean(grads, jnp.asarray(WEIGHTS)),
            "gram": jgd.gram(grads),
            "dot": jgd.dot(grads, jax.tree.map(jnp.ones_like, params)),
            "variance": jgd.variance(grads),
            "noise_scale": (scale.trace_covariance, scale.squared_norm),
        }

    return ask


def wanted(case):
    blocks = oracle.vmap_of_grad(case)
    ones = jax.tree.map(lambda x: np.ones(x.shape), case.params)
    return oracle.answers(blocks, blocks, WEIGHTS, 0.5, ones)


def check(got, want, tolerance=1e-9):
    for quantity in got:
        oracle.assert_close(got[quantity], want[quantity], tolerance, what=quantity)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of two or three examples of most leaves."""
    jax.clear_caches()
    monkeypatch.setattr(tiles, "TILE", 40)
    yield
    jax.clear_caches()


@pytest.mark.parametrize(
    ("name", "placement"),
    [
        pytest.param(name, p, marks=() if FEW.get(name) == p else pytest.mark.slow)
        for name in CASES
        for p in PLACEMENTS
    ],
)
def test_every_reduction_gives_one_devices_answer(name, placement, x64, small_tiles):
    case, axes = widened(name)
    params, batch = placed(case, axes, placement)
    check(jax.jit(asked(case))(params, *batch), wanted(case))
