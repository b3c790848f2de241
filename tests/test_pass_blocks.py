"""Leaves whose gradients the backward pass itself makes, one block an example."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import B, Draw
from internals import form_of
from jax import lax
from rule_problems import WEIGHTS, every_reduction, gradients, made

import jgd


def normalized(params, x):
    """Norms with scale and bias in a scan over layers; a gain inside of a branch; a shift carried by every step."""

    def layer(h, own):
        h = jax.nn.standardize(h, axis=-1) * own["scale"] + own["bias"] + params["carried"]
        return jnp.sin(h @ own["w"]), None

    h, _ = lax.scan(layer, x / params["gain"], params["layers"])
    h = lax.cond(x[0, 0] > 0, lambda h: h * params["branched"], lambda h: h, h)
    return jnp.sum((h + params["each"]) ** 2)


def masked(params, x):
    """The bias meets the matrix where no gradient flows: in a mask, in what is logged, in each step of a scan."""

    def step(h, bias):
        return jnp.tanh(h + bias) * jnp.sum(params["w"] @ bias > 0), None

    h = jnp.tanh(x @ params["w"] + params["bias"]) * (params["w"] @ params["bias"] > 0)
    h, _ = lax.scan(step, h, params["steps"])
    return jnp.sum(h * x), params["w"] @ params["bias"]


def test_what_is_made_in_the_pass_may_meet_a_matrix_without_a_gradient(x64):
    draw = Draw(3)
    params = {"w": jnp.asarray(draw(3, 3)), "bias": jnp.asarray(draw(3)), "steps": jnp.asarray(draw(2, 3))}
    x = jnp.asarray(draw(B, 6, 3))
    ours = jgd.per_example_grad(masked, has_aux=True, strategy="factored")(params, x)
    assert len(form_of(ours).residuals.blocks) == 2
    _, aux = jax.vmap(masked, in_axes=(None, 0))(params, x)
    oracle.assert_close(ours.aux, aux, 1e-9)
    blocks = oracle.vmap_of_grad(made(lambda *args: masked(*args)[0], params, x))
    arguments = {"weights": WEIGHTS, "max_norm": 1.0, "direction": jax.tree.map(np.ones_like, params)}
    want = oracle.answers(blocks, blocks, **arguments)
    for quantity, got in jax.jit(every_reduction)(ours, arguments).items():
        oracle.assert_close(got, want[quantity], 1e-9, what=quantity)


@pytest.mark.parametrize("broken", [False, True])
def test_what_is_spread_over_positions_is_made_in_the_pass(broken, x64):
    draw = Draw(3)
    layers = {"scale": draw(2, 3), "bias": draw(2, 3), "w": draw(2, 3, 3)}
    single = {name: 2 + draw(3) for name in ("gain", "branched", "carried")}
    problem = made(normalized, {"layers": layers, "each": draw(6, 3)} | single, draw(B, 6, 3))
    grads = gradients(problem)
    plan = form_of(grads).plan
    beside = {plan.program.param_paths[leaf] for leaf in form_of(grads).residuals.blocks}
    assert beside == {"['gain']", "['layers']['scale']", "['layers']['bias']"}
    blocks = oracle.vmap_of_grad(problem)
    direction = jax.tree.map(lambda x: Draw(1)(*x.shape), problem.params)
    arguments = {"weights": WEIGHTS, "max_norm": 1.0, "direction": direction}
    want = oracle.answers(blocks, blocks, **arguments)
    if broken:  # the second example has weight 0
        (x,) = problem.batch
        grads = gradients(dataclasses.replace(problem, batch=(x.at[1].set(jnp.nan),)))
    got = jax.jit(every_reduction)(grads, arguments)
    for quantity in [name for name in got if name.startswith("weighted")] if broken else got:
        oracle.assert_close(got[quantity], want[quantity], 1e-9, what=quantity)
