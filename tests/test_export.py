"""Every case and method lowers for the machines that the tests do not have, and nothing calls back to the host."""

import functools
import itertools
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
DTYPES = ("float32", "bfloat16")
PLACES = ("alone", "sharded")
FEW = {
    ("mlp_classifier", "float32", "alone"),
    ("tied_embedding_and_head", "bfloat16", "sharded"),
    ("conv2d_all_options", "bfloat16", "alone"),
    ("recurrence", "float32", "sharded"),
}
# Kernels whose examples' gradients XLA's partitioner gets wrong: `jgd` refuses them, sums apart.
NO_EXAMPLES_SHARDED = ("generated_kernel", "standardised_kernel")
NOTHING_SHARDED = ("batch_groups",)


def ask_norms(grads, weights, key):
    return [
        jgd.norms(grads), jgd.clipped_sum(grads, 0.5, weights=weights), jgd.mean(grads), jgd.variance(grads),
        jgd.project(grads, key, 3),
    ]  # fmt: skip


def ask_pairs(grads, weights, key):
    return [
        jgd.second_moment(grads, weights), jgd.gram(grads), jgd.noise_scale(grads), jgd.materialize(grads),
        jgd.dot(grads, jax.tree.map(jnp.ones_like, jgd.sum(grads))),
    ]  # fmt: skip


def ask_sums(grads, weights, key):
    return [jgd.sum(grads), jgd.mean(grads, weights)]


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


def cells():
    """Each case in both dtypes, alone and sharded; in each, half of the reductions.

    Which half alternates along both, so that alone and sharded every reduction of every case is lowered.
    """
    for name, (k, dtype), (j, where) in itertools.product(CASES, enumerate(DTYPES), enumerate(PLACES)):
        ask = (ask_norms, ask_pairs)[(k + j) % 2]
        if where == "sharded" and name in NO_EXAMPLES_SHARDED:
            ask = ask_sums
        if where == "alone" or name not in NOTHING_SHARDED:
            yield pytest.param(
                name, dtype, where, ask, marks=() if (name, dtype, where) in FEW else pytest.mark.slow,
                id=f"{name}-{dtype}-{where}",
            )  # fmt: skip


@pytest.mark.parametrize(("name", "dtype", "where", "ask"), list(cells()))
def test_every_case_lowers(name, dtype, where, ask, key):
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
