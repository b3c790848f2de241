"""Every case and method lowers for the machines that the tests do not have, and nothing calls back to the host."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of, placed, widened

import jgd

PLATFORMS = ("cuda", "tpu")
FEW = {
    ("mlp_classifier", "float32", "alone"),
    ("tied_embedding_and_head", "bfloat16", "sharded"),
    ("conv2d_all_options", "bfloat16", "alone"),
    ("recurrence", "float32", "sharded"),
}


def ask(grads, weights, key):
    """Every reduction."""
    return [
        jgd.norms(grads), jgd.clipped_sum(grads, 0.5, weights=weights), jgd.mean(grads), jgd.variance(grads),
        jgd.second_moment(grads, weights), jgd.gram(grads), jgd.noise_scale(grads), jgd.project(grads, key, 3),
        jgd.dot(grads, jax.tree.map(jnp.ones_like, jgd.sum(grads))), jgd.materialize(grads),
    ]  # fmt: skip


def shapes(tree):
    """Shapes, dtypes and placements: nothing is run."""
    lies = lambda x: x.sharding if isinstance(x.sharding, NamedSharding) else None
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies(x)), tree)


def host_calls(text):
    """What a program in StableHLO asks of the host."""
    targets = re.findall(r"custom_call @([\w.]+)", text)
    streams = re.findall(r"stablehlo\.(?:send|recv|infeed|outfeed)", text)
    return [t for t in targets if "callback" in t.lower() or "host" in t.lower()] + streams


def lowers(fun, *args, devices=1):
    """Lowers a function for every platform and looks for the host in what comes out."""
    exported = export.export(jax.jit(fun), platforms=PLATFORMS)(*shapes(args))
    assert exported.platforms == PLATFORMS and exported.nr_devices == devices
    assert host_calls(exported.mlir_module()) == []


@pytest.mark.parametrize(
    ("name", "dtype", "where"),
    [
        pytest.param(name, dtype, where, marks=() if (name, dtype, where) in FEW else pytest.mark.slow)
        for name in CASES
        for dtype in ("float32", "bfloat16")
        for where in ("alone", "sharded")
    ],
)
def test_every_case_lowers(name, dtype, where, key):
    case, axes = widened(name, jnp.dtype(dtype))
    params, batch = (case.params, case.batch) if where == "alone" else placed(case, axes, "sharded")
    gradients = jgd.per_example_grad(case.loss, strategy="factored", **case.options)
    reduced = lambda params, *batch: ask(gradients(params, *batch), jnp.ones(8), key)
    lowers(reduced, params, *batch, devices=1 if where == "alone" else 8)


def loss(params, x, y):
    return 0.5 * jnp.sum((jnp.tanh(x @ params["w"] + params["b"]) - y) ** 2)


def game(params, x, y):
    return loss(params[0], x, y) - loss(params[1], x, y)


METHODS = {
    "descent": jgd.descent(loss, optax.adam(0.1)),
    "clipped": jgd.descent(loss, optax.sgd(0.1), reduce=functools.partial(jgd.clipped_sum, max_norm=1.0)),
    "line_search": jgd.descent(loss, optax.lbfgs()),
    "forward": jgd.descent(loss, optax.sgd(0.1), derivative="forward"),
    "finite_difference": jgd.descent(loss, optax.sgd(0.1), derivative="finite_difference"),
    "ascent": jgd.ascent(loss, optax.sgd(0.1, momentum=0.9)),
    "descent_ascent": jgd.descent_ascent(game, optax.sgd(0.1), optax.sgd(0.1)),
}


@pytest.mark.parametrize(
    ("dtype", "where"),
    [
        ("float32", "sharded"),
        ("bfloat16", "alone"),
        pytest.param("float32", "alone", marks=pytest.mark.slow),
        pytest.param("bfloat16", "sharded", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_lowers(name, dtype, where):
    params = {"w": jnp.ones((4, 2), dtype), "b": jnp.ones(2, dtype)}
    params = (params, params) if name == "descent_ascent" else params
    batch = jnp.ones((8, 4), dtype), jnp.ones((8, 2), dtype)
    if where == "sharded":
        mesh = mesh_of(8)
        params = jax.device_put(params, NamedSharding(mesh, P()))
        batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
    method = METHODS[name]
    lowers(method.step, method.init(params), *batch, devices=1 if where == "alone" else 8)


def test_a_call_to_the_host_is_found():
    def silent(x):
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    assert host_calls(jax.jit(silent).lower(jnp.ones(3)).as_text())
    assert not host_calls(jax.jit(jnp.sin).lower(jnp.ones(3)).as_text())
