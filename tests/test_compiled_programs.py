"""What compiled programs hold and cost, what a second call compiles, and what stays alive after it."""

import gc
import math
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import B, Draw
from compilations import compilations
from jax import lax
from rule_problems import WEIGHTS

import jgd


def _matrix(rng, *shape):
    return jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5, jnp.float32)


def mlp(rng, size=16):
    def loss(p, x, y):
        return -jax.nn.log_softmax(jax.nn.relu(jax.nn.relu(x @ p[0]) @ p[1]) @ p[2])[y]

    params = [_matrix(rng, 40, 64), _matrix(rng, 64, 48), _matrix(rng, 48, 10)]
    return loss, params, (_matrix(rng, size, 40), jnp.asarray(rng.integers(10, size=size)))


def transformer(rng, size=16, d=32, t=3):
    def loss(p, tokens):
        x = p["table"][tokens[:-1]]
        for q, k, v, out, up, down in p["layers"]:
            h = jax.nn.standardize(x)
            x = x + jax.nn.softmax((h @ q) @ (h @ k).T) @ (h @ v) @ out
            x = x + jax.nn.gelu(jax.nn.standardize(x) @ up) @ down
        return -jnp.mean(jax.nn.log_softmax(x @ p["table"].T)[jnp.arange(t), tokens[1:]])

    shapes = [(d, d)] * 4 + [(d, 4 * d), (4 * d, d)]
    params = {"table": _matrix(rng, 40, d), "layers": [[_matrix(rng, *s) for s in shapes] for _ in range(1)]}
    return loss, params, (jnp.asarray(rng.integers(40, size=(size, t + 1))),)


def gru(rng, size=16, d=32, t=4):
    def loss(p, xs):
        def step(h, x):
            r, z = jnp.split(jax.nn.sigmoid(x @ p["gates_x"] + h @ p["gates_h"]), 2)
            return z * h + (1 - z) * jnp.tanh(x @ p["x"] + (r * h) @ p["h"]), None

        return jnp.sum(lax.scan(step, jnp.zeros(d), xs)[0] ** 2)

    params = {
        "gates_x": _matrix(rng, d, 2 * d), "gates_h": _matrix(rng, d, 2 * d),
        "x": _matrix(rng, d, d), "h": _matrix(rng, d, d),
    }  # fmt: skip
    return loss, params, (_matrix(rng, size, t, d),)


def embedding(rng, size=16):
    def loss(p, ix, y):
        return -jax.nn.log_softmax(jnp.mean(p["table"][ix], 0) @ p["head"])[y]

    params = {"table": _matrix(rng, 500, 16), "head": _matrix(rng, 16, 40)}
    batch = jnp.asarray(rng.integers(500, size=(size, 6))), jnp.asarray(rng.integers(40, size=size))
    return loss, params, batch


def norms_and_clipped_sum(loss, strategy):
    def both(params, *batch):
        grads = jgd.per_example_grad(loss, strategy=strategy)(params, *batch)
        return jgd.norms(grads), jgd.clipped_sum(grads, 1.0)

    return both


def largest_array(fun, *args):
    """The elements of the largest array in the compiled program."""
    text = jax.jit(fun).lower(*args).compile().as_text()
    shapes = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]*)\]", text)
    return max(math.prod(int(n) for n in shape.split(",") if n) for shape in shapes)


@pytest.mark.sample(lambda model: model is not transformer)
@pytest.mark.parametrize("model", [mlp, transformer, gru, embedding])
def test_no_program_holds_a_block_of_all_examples_gradients(model):
    loss, params, batch = model(np.random.default_rng(0))
    size = batch[0].shape[0]
    plan = jgd.per_example_grad(loss, strategy="factored")(params, *batch)._form.plan
    assert len(plan.factored) == len(plan.program.param_avals)
    smallest = size * min(leaf.size for leaf in jax.tree.leaves(params))
    largest = max(leaf.size for leaf in jax.tree.leaves(params))
    assert smallest > largest  # or the parameters themselves would be taken for a block
    assert largest_array(norms_and_clipped_sum(loss, "factored"), params, *batch) < smallest
    # The measure sees a block where there is one.
    assert largest_array(norms_and_clipped_sum(loss, "materialized"), params, *batch) >= size * largest


def flops(fun, *args):
    return jax.jit(fun).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.sample(lambda model: model is not transformer)
@pytest.mark.parametrize("model", [mlp, transformer, gru])
def test_several_reductions_share_one_forward_and_one_backward_pass(model):
    loss, params, batch = model(np.random.default_rng(0))
    questions = {
        "norms": jgd.norms,
        "clipped_sum": lambda grads: jgd.clipped_sum(grads, 1.0),
        "noise_scale": jgd.noise_scale,
    }
    ask = lambda names: (
        lambda params, *batch: [
            questions[name](jgd.per_example_grad(loss, strategy="factored")(params, *batch)) for name in names
        ]
    )
    apart = {name: flops(ask([name]), params, *batch) for name in questions}
    together = flops(ask(list(questions)), params, *batch)
    # Norms cost little but the pass. What the others add to it is a sum each, and that alone is added.
    added = sum(apart[name] - apart["norms"] for name in ("clipped_sum", "noise_scale"))
    assert together < 1.01 * (apart["norms"] + added)
    assert together < 0.8 * sum(apart.values())  # also counted: the deviations that a branch makes if need be


# The second call


def test_the_second_call_compiles_nothing(x64):
    calls = []

    def loss(p, x):
        calls.append(None)
        return jnp.sum(jnp.sin(x @ p))

    draw = Draw(0)
    params, batch = jnp.asarray(draw(4, 3)), [jnp.asarray(draw(B, 2, 4)) for _ in range(2)]
    weights = jnp.asarray(WEIGHTS)

    def ask(x):
        grads = jgd.per_example_grad(loss, strategy="factored")(params, x)
        return (
            jgd.norms(grads), jgd.clipped_sum(grads, 1.0), jgd.gram(grads), jgd.sum(grads, weights),
            jgd.dot(grads, params), jgd.variance(grads), jgd.noise_scale(grads),
        )  # fmt: skip

    first = ask(batch[0])
    with compilations() as made:
        ask(batch[1])
        again = ask(batch[0])
    assert not made and len(calls) == 3
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("options", [{}, {"max_memory": 1 << 20}])
def test_what_a_loss_closes_over_goes_with_it(options):
    def asked():
        closed = jnp.ones((3, 3))
        loss = lambda w, x: jnp.sum(jnp.tanh(x @ w @ closed))
        gradients = jgd.per_example_grad(loss, strategy="factored", **options)
        jgd.norms(gradients(jnp.ones((4, 3)), jnp.ones((B, 4))))
        return weakref.ref(closed)

    found = asked()
    gc.collect()
    assert found() is None
