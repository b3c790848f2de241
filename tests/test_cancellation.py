"""Positions that cancel each other: norms by pairs of positions are small differences of large numbers then."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import Draw, Problem
from internals import form_of, norms
from jax import lax

import jgd

B, T, D = 6, 16, 48
SIGNS = np.where(np.arange(T) % 2 == 0, 1.0, -1.0)


def offset(draw, spread):
    """Examples whose positions are all but the same."""
    return draw(B, 1, D, scale=1.0) + spread * draw(B, T, D, scale=1.0)


def product(p, x):
    return jnp.sum(SIGNS.astype(x.dtype)[:, None] * (x @ p["w"]) * p["w"][0]) / T


def tied(p, x):
    """Two uses of one weight, which cancel."""
    signs = SIGNS.astype(x.dtype)[:, None]
    return jnp.sum(signs * (jnp.tanh(x @ p["w"]) + x @ p["w"]))


def in_steps(p, x):
    step = lambda total, pair: (total + pair[1] * jnp.sum(pair[0] @ p["w"]), None)
    return lax.scan(step, jnp.zeros((), x.dtype), (x, SIGNS.astype(x.dtype)))[0]


def stacked(p, x):
    h, _ = lax.scan(lambda h, w: (h @ w, None), x, jnp.stack([p["w"], p["w"].T]))
    return jnp.sum(SIGNS.astype(x.dtype)[:, None] * h)


def layers(p, x):
    h, _ = lax.scan(lambda h, w: (h @ w, None), x, p["layers"])
    return jnp.sum(SIGNS.astype(x.dtype)[:, None] * h)


def looked_up(p, x):
    """The same row with either sign, read beside data that is all but the same."""
    rows = p["w"][jnp.zeros(T, jnp.int32) + (x[0, 0] > 0)]
    return jnp.sum(SIGNS.astype(x.dtype)[:, None] * rows * x)


LOSSES = (product, tied, in_steps, stacked, layers, looked_up)


def problem_of(loss, dtype, spread):
    draw = Draw(5)
    arrays = {"w": draw(D, D, scale=0.2), "layers": draw(2, D, D, scale=0.2)}
    del arrays["w" if loss is layers else "layers"]
    x = offset(draw, spread)
    # The numbers are those that float32 has, whatever they are computed in.
    exact = lambda x: jnp.asarray(np.asarray(x, np.float32), dtype)
    return Problem(loss, jax.tree.map(exact, arrays), (exact(x),))


def norms_in_64_bits(loss, spread):
    with jax.enable_x64(True):
        blocks = oracle.vmap_of_grad(problem_of(loss, jnp.float64, spread))
    return np.linalg.norm(oracle.matrix(blocks), axis=1)


@pytest.mark.sample(lambda spread, compiled: compiled == (spread == 1e-4))
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("spread", [1e-4, 1e-2])
@pytest.mark.parametrize("compiled", [False, True])
def test_norms_have_as_many_digits_as_those_of_the_gradients(loss, spread, compiled):
    want, problem = norms_in_64_bits(loss, spread), problem_of(loss, jnp.float32, spread)
    ours = lambda params, x: jgd.norms(jgd.per_example_grad(loss, strategy="factored")(params, x))
    got = (jax.jit(ours) if compiled else ours)(problem.params, *problem.batch)
    blocks = np.linalg.norm(oracle.matrix(oracle.vmap_of_grad(problem)), axis=1)
    own = np.max(np.abs(blocks / want - 1))
    np.testing.assert_allclose(got, want, rtol=max(1e-3, 10 * own))


@pytest.mark.parametrize("loss", [product, in_steps, layers])
def test_no_clipped_gradient_is_longer_than_the_bound(loss):
    # But for what the sum itself rounds, where 1e-4 is left of what it adds up.
    problem = problem_of(loss, jnp.float32, 1e-4)
    bound = float(0.5 * norms_in_64_bits(loss, 1e-4).min())
    for x in problem.batch[0]:
        grads = jgd.per_example_grad(loss, strategy="factored")(problem.params, x[None])
        clipped = jax.tree.leaves(jgd.clipped_sum(grads, bound))
        assert np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in clipped)) <= bound * (1 + 1e-4)


@pytest.mark.parametrize("loss", [product, layers])
def test_derivatives_of_norms(loss):
    """By the parameters, in one program: of those that are computed again as well."""
    problem = problem_of(loss, jnp.float32, 1e-4)
    curved = lambda p, x: jnp.sin(loss(p, x))

    def penalty(gradients, params, x):
        return jnp.sum(jgd.norms(gradients(params, x)))

    ours = jgd.per_example_grad(curved, strategy="factored")
    plain = jax.vmap(jax.grad(curved), (None, 0))
    got, want = (
        jax.jit(jax.grad(functools.partial(penalty, each)))(problem.params, *problem.batch)
        for each in (ours, plain)
    )
    oracle.assert_close(got, jax.tree.map(np.asarray, want), 2e-3)


def test_under_vmap():
    problem = problem_of(product, jnp.float32, 1e-4)
    several = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), problem.params)
    ours = lambda p: jgd.norms(jgd.per_example_grad(product, strategy="factored")(p, *problem.batch))
    want = [norms_in_64_bits(product, 1e-4)]
    np.testing.assert_allclose(jax.vmap(ours)(several)[0], want[0], rtol=1e-3)


def test_a_sum_of_examples_that_cancel():
    """‖Σ g_i‖² of the noise scale, from pairs of examples, where these cancel too."""
    draw = Draw(7)
    x = draw(1, D, scale=1.0) + 1e-4 * draw(2 * B, D, scale=1.0)
    y = np.where(np.arange(2 * B) % 2 == 0, 1.0, -1.0)
    loss = lambda w, x, y: y * jnp.sum(jnp.tanh(x @ w))
    w, x = np.asarray(draw(D, D, scale=0.1), np.float32), np.asarray(x, np.float32)
    with jax.enable_x64(True):
        wide = [jnp.asarray(a, jnp.float64) for a in (w, x, y)]
        exact = np.linalg.norm(
            jax.grad(lambda w: jnp.sum(jax.vmap(loss, (None, 0, 0))(w, *wide[1:])))(wide[0])
        )
    grads = jgd.per_example_grad(loss, strategy="factored")(w, x, np.asarray(y, np.float32))
    _, total = form_of(grads).deviation_and_squared_sum()
    np.testing.assert_allclose(np.sqrt(total), exact, rtol=1e-3)


@pytest.mark.parametrize("positions", [2, 16, 200])
def test_ordinary_data_are_not_computed_again(positions, monkeypatch):
    with_digits, asked = norms.with_digits, []
    keep = lambda again, held, made, trusted: (
        asked.append(trusted),
        with_digits(again, held, made, trusted),
    )[1]
    monkeypatch.setattr(norms, "with_digits", keep)
    jax.clear_caches()
    draw = Draw(1)
    w, x = jnp.asarray(draw(256, 300), jnp.float32), jnp.asarray(draw(B, positions, 256), jnp.float32)
    loss = lambda w, x: jnp.sum(jnp.sin(x @ w))
    with jax.disable_jit():
        form = form_of(jgd.per_example_grad(loss, strategy="factored")(w, x))
        form.norms(((0,),))
    ((_, part),) = form._parts()
    assert len(asked) == (part.rules.method == "pairs")
    assert all(map(jnp.all, asked))
