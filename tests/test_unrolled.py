"""A weight that is used many times, as in a loop that Python unrolls: its uses' factors are joined to one."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import Draw, Problem
from internals import forced, form_of
from jax import lax
from questions import WEIGHTS, check_asked, wave

import jgd

B, STEPS = len(WEIGHTS), 9


def steps(p, xs):
    h = jnp.zeros(4)
    for x in xs:
        h = jnp.tanh(h @ p["w"] + x @ p["u"])
    return wave(h)


def both_sides(p, xs):
    """The weight and its transpose in turns."""
    h = jnp.ones(4)
    for k, x in enumerate(xs):
        h = jnp.sin((h @ p["w"] if k % 2 else p["w"] @ h) + x[:4])
    return wave(h)


def with_positions(p, xs):
    h = xs[:, :4]
    for _ in range(STEPS):
        h = jnp.tanh(h @ p["w"])
    return wave(h)


def with_a_lookup(p, xs):
    """And one use that is no product."""
    return with_positions(p, xs) + wave(p["w"][jnp.argsort(xs[:, 0])[:3] % 4])


def in_blocks(p, xs):
    """Of three-dimensional weights."""
    h = xs[:, :4].reshape(-1, 2, 2)
    for _ in range(STEPS):
        h = jnp.sin(jnp.einsum("tnp,npq->tnq", h, p["v"]))
    return wave(h)


def kernel(p, xs):
    """Of convolutions, whose factors are patches: larger than what they are made of."""
    h = xs[None, :, :2]
    for _ in range(STEPS):
        h = jnp.tanh(
            lax.conv_general_dilated(h, p["v"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        )
    return wave(h)


LOSSES = {f.__name__: f for f in (steps, both_sides, with_positions, with_a_lookup, in_blocks, kernel)}


def problem(name):
    draw = Draw(5)
    shapes = {"w": (4, 4), "u": (5, 4), "v": (2, 2, 2)}
    used = {"steps": "wu", "in_blocks": "v", "kernel": "v"}.get(name, "w")
    params = {k: jnp.asarray(draw(*shapes[k])) for k in used}
    return Problem(LOSSES[name], params, (jnp.asarray(draw(B, STEPS, 5)),))


@pytest.mark.sample(lambda name, microbatch_size: microbatch_size is None)
@pytest.mark.parametrize("microbatch_size", [None, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_every_question(name, microbatch_size, x64):
    check_asked(problem(name), microbatch_size)


@pytest.mark.sample(lambda name, method: name in ("steps", "both_sides"))
@pytest.mark.parametrize("method", ["pairs", "block"])
@pytest.mark.parametrize("name", LOSSES)
def test_norms_by_either_method(name, method, x64):
    of = problem(name)
    grads = forced(jgd.per_example_grad(of.loss, strategy="factored")(of.params, *of.batch), method)
    want = np.linalg.norm(oracle.matrix(oracle.vmap_of_grad(of)), axis=1)
    np.testing.assert_allclose(jgd.norms(grads), want, rtol=1e-9)


@pytest.mark.parametrize(("name", "stacked"), [("steps", True), ("with_positions", True), ("kernel", False)])
def test_which_are_joined(name, stacked):
    of = problem(name)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), of.params)
    grads = jgd.per_example_grad(of.loss, strategy="factored")(params, jnp.asarray(of.batch[0], jnp.float32))
    rules = [part.rules for part in form_of(grads).plan.parts]
    assert {one.is_stacked for one in rules if len(one.rules) >= STEPS} == {stacked}


def test_its_sum_is_one_product():
    """Each example's blocks, and the sum: not one for each use."""
    of = problem("steps")
    ask = lambda p, xs: jgd.clipped_sum(jgd.per_example_grad(of.loss, strategy="factored")(p, xs), 1.0)
    text = str(jax.make_jaxpr(ask)(of.params, *of.batch))
    products = text.count("dot_general")
    assert products < 2 * 2 * STEPS + 16  # those of the passes themselves, and a few
