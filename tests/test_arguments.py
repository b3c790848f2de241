"""What `per_example_grad` takes: `argnums`, `in_axes`, kinds of callables, numbers and arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import problem
from strategies import STRATEGIES, close, every_strategy, gradients, squared_error

import jgd


@every_strategy
def test_auxiliary_output(strategy, x64):
    case = problem("auxiliary_output")
    grads = gradients(case, strategy)
    assert grads.aux["prediction"].shape == (5, 3)
    assert grads.aux["count"].dtype == jnp.int32 and grads.aux["count"].shape == (5,)


@every_strategy
@pytest.mark.parametrize("argnums", [2, -1, (0, 2), (2, 0), (-1,)])
def test_argnums(argnums, strategy, x64):
    rng = np.random.default_rng(0)
    w, x, b = rng.normal(size=(4, 3)), rng.normal(size=(5, 4)), {"b": rng.normal(size=3)}
    loss = lambda w, x, b: jnp.sum(jnp.sin(x @ w + b["b"]))
    axes = (None, 0, None)
    grads = jgd.per_example_grad(loss, argnums=argnums, in_axes=axes, strategy=strategy)(w, x, b)
    want = jax.vmap(jax.grad(loss, argnums), axes)(w, x, b)
    close(jgd.materialize(grads), want)
    close(jgd.sum(grads), jax.tree.map(lambda x: x.sum(0), want))


@every_strategy
@pytest.mark.parametrize(
    "axes",
    [
        (None, 0, 0, None),
        [None, 0, {"y": 0, "z": 0}, None],
        (None, 0, {"y": 0, "z": None}, 0),
        (None, 1, 0, 0),
    ],
)
def test_in_axes(axes, strategy, x64):
    rng = np.random.default_rng(0)
    loss = lambda w, x, e, s: jnp.sum(jnp.sin(x @ w * e["y"] + e["z"].sum())) + s.sum()
    w, x, y, z, s = (rng.normal(size=shape) for shape in ((5, 3), (5, 5), (5, 3), (5,), (5,)))
    args = (w, x, {"y": y, "z": z}, s)
    grads = jgd.per_example_grad(loss, in_axes=axes, strategy=strategy)(*args)
    close(jgd.materialize(grads), jax.vmap(jax.grad(loss), tuple(axes))(*args))


def test_in_axes_as_one_number(x64):
    rng = np.random.default_rng(0)
    loss = lambda w, x, y: jnp.sum(jnp.sin(x @ w) * y)
    w, x, y = rng.normal(size=(4, 3)), rng.normal(size=(4, 5)), rng.normal(size=(3, 5))
    grads = jgd.per_example_grad(loss, in_axes=1)(w, x, y)
    close(jgd.materialize(grads), jax.vmap(jax.grad(loss), (None, 1, 1))(w, x, y))


@every_strategy
@pytest.mark.parametrize("kind", ["bound", "partial", "lambda", "callable", "jitted", "checkpointed"])
def test_kinds_of_callables(kind, strategy, example, x64):
    class Model:
        def loss(self, p, x, y):
            return squared_error(p, x, y)

        __call__ = loss

    losses = {
        "bound": Model().loss,
        "partial": functools.partial(lambda scale, p, x, y: scale * squared_error(p, x, y), 1.0),
        "lambda": lambda p, x, y: squared_error(p, x, y),
        "callable": Model(),
        "jitted": jax.jit(squared_error),
        "checkpointed": jax.checkpoint(squared_error),
    }
    blocks = jax.vmap(jax.grad(squared_error), (None, 0, 0))(*example)
    for _ in range(2):
        close(jgd.materialize(jgd.per_example_grad(losses[kind], strategy=strategy)(*example)), blocks)


@every_strategy
def test_a_python_float_as_parameter(strategy):
    grads = jgd.per_example_grad(lambda p, x: p * p * x, strategy=strategy)(
        1.5, np.arange(3, dtype=np.float32)
    )
    close(jgd.norms(grads), np.array([0.0, 3.0, 6.0]), 1e-6)
    assert jgd.sum(grads).shape == ()
    close(jgd.sum(grads), np.float32(9.0), 1e-6)


@every_strategy
def test_numpy_arguments(strategy, example):
    params, x, y = jax.tree.map(np.float32, example)
    grads = jgd.per_example_grad(squared_error, strategy=strategy)(params, x, y)
    close(jgd.materialize(grads), jax.vmap(jax.grad(squared_error), (None, 0, 0))(params, x, y), 1e-6)
    close(jgd.sum(grads, [1, 0, 2, 0, 0]), jgd.sum(grads, jnp.array([1.0, 0, 2, 0, 0])), 1e-6)


def test_a_leaf_without_elements(x64):
    loss = lambda p, x: jnp.sum(jnp.sin(x @ p["w"])) + jnp.sum(p["empty"]) * x[0]
    params = {"w": np.ones((3, 2)), "empty": np.ones((0, 4))}
    x = np.random.default_rng(0).normal(size=(5, 3))
    want = jax.vmap(jax.grad(loss), (None, 0))(params, x)
    for strategy in STRATEGIES:
        grads = jgd.per_example_grad(loss, strategy=strategy)(params, x)
        for reduction in (jgd.norms, jgd.sum, jgd.gram, jgd.variance, jgd.materialize):
            close(reduction(grads), reduction(want))
