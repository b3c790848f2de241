"""What a loss means is kept: signed zeros, slopes at kinks, custom derivatives, branches not taken."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import B, Draw
from jax import lax
from rule_problems import WEIGHTS, cubed, every_reduction, gradients, made

import jgd

# Numbers that JAX takes care to keep


def test_minus_zero_stays_minus_zero(x64):
    def loss(p, x):
        h = x * p["scale"] + p["shift"]
        return jnp.sum(jnp.where(jnp.signbit(h), 2.0 * h + 1.0, 3.0 * h + 5.0))

    params = {"scale": jnp.array([-1.0, 1.0]), "shift": jnp.array([-0.0, -0.0])}
    problem = made(loss, params, np.array([[0.0, -0.0], [1.0, -2.0], [-3.0, 0.0]]))
    grads = gradients(problem)
    np.testing.assert_array_equal(grads.values, jax.vmap(loss, (None, 0))(params, *problem.batch))
    np.testing.assert_array_equal(grads.values[0], 2.0)
    oracle.assert_close(jgd.materialize(grads), oracle.vmap_of_grad(problem), 1e-15)


def test_relu_has_no_slope_at_zero(x64):
    loss = lambda p, x: jnp.sum(jax.nn.relu(x @ p["w"] + p["b"]))
    problem = made(loss, {"w": np.ones((2, 3)), "b": np.zeros(3)}, np.array([[1.0, -1.0], [0.0, 0.0]]))
    grads = gradients(problem)
    for reduced in (jgd.materialize(grads), jgd.norms(grads), jgd.sum(grads), jgd.gram(grads)):
        assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(reduced))


@pytest.mark.parametrize("inside", ["plain", "scan", "checkpoint", "cond"])
def test_a_custom_vjp_whose_backward_is_not_linear(inside, x64):
    def loss(p, x):
        if inside == "scan":
            return jnp.sum(jnp.sin(lax.scan(lambda h, x: (cubed(h + x, p), None), x[0], x)[0]))
        body = lambda x: cubed(jnp.sin(x), p)
        if inside == "checkpoint":
            body = jax.checkpoint(body)
        if inside == "cond":
            return jnp.sum(jnp.sin(lax.cond(x[0, 0] > 0, body, lambda x: x * p, x)))
        return jnp.sum(jnp.sin(body(x)) * jnp.arange(1.0, 4))

    draw = Draw(3)
    problem = made(loss, draw(3), draw(B, 2, 3))
    blocks = oracle.vmap_of_grad(problem)
    arguments = {"weights": WEIGHTS, "max_norm": 0.5, "direction": draw(3)}
    want = oracle.answers(blocks, blocks, **arguments)
    for quantity, got in jax.jit(every_reduction)(gradients(problem), arguments).items():
        oracle.assert_close(got, want[quantity], 1e-9, what=quantity)


# Branches: one that was not taken has no part, whatever its derivative would be


def singular(p, x):
    """Fine above 0 alone."""
    return jnp.sum(p["opaque"] / x + jnp.log(x) ** p["power"] + jnp.sqrt(x) * p["power"])


def in_a_cond(p, x):
    return lax.cond(jnp.all(x > 1), lambda x: singular(p, x), lambda x: jnp.sum(jnp.sin(x * p["opaque"])), x)


def in_a_scan(p, x):
    step = lambda h, x: (h + in_a_cond(p, x[None]), None)
    return lax.scan(step, 0.0, x)[0]


def of_missing_data(p, x):
    """An example may hold nan, which its branch does not look at."""
    known = lambda x: jnp.sum(jnp.tanh(x @ p["matrix"])) + jnp.sum(x * p["opaque"])
    return lax.cond(jnp.all(x > 1), known, lambda x: jnp.sum(jnp.sin(p["opaque"])), x)


@pytest.mark.parametrize("loss", [in_a_cond, in_a_scan, of_missing_data])
def test_a_branch_not_taken_has_no_part(loss, x64):
    params = {"opaque": np.array([0.7]), "power": np.array([2.5]), "matrix": np.ones((3, 2))}
    x = np.array([[1.5, 2.0, 3.0], [-1.0, -2.0, 0.0], [2.0, 0.0, 1.5], [np.nan, 1.0, 1.0], [4.0, 1.1, 1.2]])
    problem = made(loss, params, x if loss is of_missing_data else np.nan_to_num(x))
    blocks = oracle.vmap_of_grad(problem)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(blocks))
    arguments = {"weights": WEIGHTS, "max_norm": 1.0, "direction": jax.tree.map(np.ones_like, params)}
    want = oracle.answers(blocks, blocks, **arguments)
    for quantity, got in jax.jit(every_reduction)(gradients(problem), arguments).items():
        oracle.assert_close(got, want[quantity], 1e-9, what=quantity)
