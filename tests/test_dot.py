"""⟨g_i, v⟩: the direction counts with all its digits, and the gradient is the one that `jax.grad` gives."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import B, Draw, Problem
from internals import ComputedLeaves, tiles
from jax import lax

import jgd

FORMS = {
    "factored": {"strategy": "factored"},
    "materialized": {"strategy": "materialized"},
    "microbatched": {"strategy": "factored", "microbatch_size": 2},
    "materialized in microbatches": {"strategy": "materialized", "microbatch_size": 2},
}


# The direction's digits


def dense(p, x):
    return jnp.sum(x @ p)


def dense_of_a_cast(p, x):
    return jnp.sum(x.astype(jnp.float32) @ p.astype(jnp.float32))


def bias(p, x):
    return jnp.sum(x[:, None] * jnp.ones((2, 4, 4), x.dtype) + p)


def convolved(p, x):
    x = jnp.broadcast_to(x[None, :, None], (1, 4, 4))
    kernel = p.reshape(1, 4, 4)
    return jnp.sum(
        lax.conv_general_dilated(x, kernel, (1,), "VALID", dimension_numbers=("NHC", "HIO", "NHC"))
    )


def looked_up(p, x):
    return jnp.sum(p[jnp.arange(4) + 0 * x[0].astype(int)] * x[:, None])


def stacked(p, x):
    step = lambda h, w: (h + jnp.sum(x * w), None)
    return lax.scan(step, jnp.zeros((), x.dtype), p)[0]


def stacked_products(p, x):
    step = lambda h, w: (h + x @ w, None)
    return lax.scan(step, jnp.zeros((), x.dtype), p)[0]


def computed(p, x):
    return jnp.sum(x @ (jnp.eye(4, dtype=p.dtype) @ p))


@jax.custom_vjp
def ruled(p):
    return p


ruled.defvjp(lambda p: (p, None), lambda _, g: (g,))


def of_a_custom_rule(p, x):
    return jnp.sum(x @ ruled(p))


LINEAR = [
    dense, dense_of_a_cast, bias, convolved, looked_up, stacked, stacked_products, computed, of_a_custom_rule,
]  # fmt: skip


@pytest.mark.sample(lambda loss, form: LINEAR.index(loss) % len(FORMS) == list(FORMS).index(form))
@pytest.mark.parametrize("loss", LINEAR)
@pytest.mark.parametrize("form", FORMS)
def test_the_direction_is_not_rounded(loss, form):
    """1.001 and −1, of which half precision makes 1 and −1, meet gradients whose numbers are integers."""
    params, x = (
        jnp.ones((4, 4), jnp.bfloat16),
        jnp.ones((B, 4), jnp.bfloat16) * jnp.arange(1.0, B + 1)[:, None],
    )
    x = x.astype(jnp.bfloat16)
    direction = jnp.where(jnp.arange(16).reshape(4, 4) % 2 == 0, jnp.float32(1.001), -1)
    blocks = np.asarray(jax.vmap(jax.grad(loss), (None, 0))(params, x), np.float64)
    want = np.sum(blocks * np.asarray(direction, np.float64), axis=(1, 2))
    assert np.all(np.abs(want) > 0.007)
    for ask in (jgd.dot, jax.jit(jgd.dot)):
        got = ask(jgd.per_example_grad(loss, **FORMS[form])(params, x), direction)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=2e-4)
    plain = jgd.dot(jax.vmap(jax.grad(loss), (None, 0))(params, x), direction)
    np.testing.assert_allclose(plain, want, rtol=2e-4)


def test_a_wider_direction_counts_in_its_own_dtype(x64):
    params, x = jnp.ones((4, 4), jnp.float32), jnp.ones((B, 4), jnp.float32)
    direction = jnp.where(jnp.arange(16).reshape(4, 4) % 2 == 0, 1 + 1e-10, -1)
    for loss in (dense, bias, computed):
        for options in FORMS.values():
            got = jgd.dot(jgd.per_example_grad(loss, **options)(params, x), direction)
            scale = 2 if loss is bias else 1
            np.testing.assert_allclose(got, np.full(B, scale * 8e-10), rtol=1e-5)


def test_a_complex_direction_is_refused():
    grads = jgd.per_example_grad(dense)(jnp.ones((4, 4)), jnp.ones((B, 4)))
    with pytest.raises(TypeError, match=r"`direction`.*real"):
        jgd.dot(grads, jnp.ones((4, 4), jnp.complex64))


# What the backward pass selects away


def root_of_the_positive(p, x):
    return jnp.sum(jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, jnp.abs(p), 0)), 0) * x)


def root_of_what_was_set(p, x):
    return jnp.sum(jnp.sqrt(jnp.square(p).at[x[0].astype(int)].set(x[0] ** 2 * 0.0))[1:] * (x[1:] + 2))


def root_behind_an_update(p, x):
    made = lax.dynamic_update_slice(jnp.square(p), 0.0 * x[:2], (x[0].astype(int) * 0,))
    return jnp.sum(jnp.where(jnp.arange(6) < 2, 0, jnp.sqrt(made)) * x)


def root_of_a_computed_parameter(p, x):
    masked = jnp.where(jnp.arange(6) < 3, 1, jnp.abs(p))
    return jnp.sum(jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, masked * 2, 0)), 0))


def root_in_a_scan(p, x):
    step = lambda h, x: (h + root_of_the_positive(p, x), None)
    return lax.scan(step, jnp.zeros((), x.dtype), jnp.stack([x, -x]))[0]


def root_in_a_masked_product(p, x):
    """The weights are selected between the leaf and the site."""
    made = x @ jnp.where(jnp.eye(6) > 0, p[:, None], 0)
    return jnp.sum(jnp.where(made > 0, jnp.sqrt(jnp.where(made > 0, made, 0)), 0))


def root_of_a_negative_parameter(p, x):
    """`jax.grad` gives nan here, where a forward derivative is finite: nan is the answer."""
    return jnp.sum(x * jnp.where(p > 0, jnp.sqrt(p), 0))


SELECTING = [
    root_of_the_positive, root_of_what_was_set, root_behind_an_update, root_of_a_computed_parameter,
    root_in_a_scan, root_in_a_masked_product, root_of_a_negative_parameter,
]  # fmt: skip


@pytest.fixture
def nothing_is_small(monkeypatch):
    """Leaves are taken for so large that a forward derivative is worth its check."""
    jax.clear_caches()
    monkeypatch.setattr(tiles, "TILE", 0)
    yield
    jax.clear_caches()


@pytest.mark.sample(lambda loss, strategy: (SELECTING.index(loss) % 2 == 0) == (strategy == "factored"))
@pytest.mark.parametrize("loss", SELECTING)
@pytest.mark.parametrize("strategy", ["factored", "materialized"])
def test_what_the_backward_pass_selects_away_has_no_part(loss, strategy, x64):
    check_against_gradients(loss, strategy)


@pytest.mark.sample(lambda loss: SELECTING.index(loss) % 2 == 1)
@pytest.mark.parametrize("loss", SELECTING)
def test_what_the_backward_pass_selects_away_has_no_part_in_large_leaves(loss, nothing_is_small, x64):
    check_against_gradients(loss, "factored")


def check_against_gradients(loss, strategy):
    draw = Draw(1)
    x = jnp.asarray(draw(B, 6)).at[:, 0].set(0.0).at[:, 1].set(-0.5)
    problem = Problem(loss, jnp.asarray(draw(6)), (x,))
    blocks, direction = oracle.vmap_of_grad(problem), draw(6)
    assert np.all(np.isfinite(blocks)) or loss is root_of_a_negative_parameter
    for ask in (jgd.dot, jax.jit(jgd.dot)):
        grads = jgd.per_example_grad(loss, strategy=strategy)(problem.params, x)
        np.testing.assert_allclose(ask(grads, direction), blocks @ direction, rtol=1e-9)


# Leaves whose gradients would be dear


def low_rank(p, x):
    """Factors carry through the product, but not through the selection."""
    product = p["a"] @ p["b"]
    return jnp.sum(jnp.sin(x @ (p["w"] + jnp.where(product > 0, product, 0))))


def normalised(p, x):
    return jnp.sum(jnp.sin(x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0))))


@pytest.mark.sample(lambda loss: loss is low_rank)
@pytest.mark.parametrize("loss", [low_rank, normalised])
def test_what_is_computed_from_large_leaves_goes_forward_once(loss, nothing_is_small, monkeypatch, x64):
    went = []
    by_tangents = ComputedLeaves._dot_by_tangents
    watched = lambda leaves, direction: went.append(list(leaves.likes)) or by_tangents(leaves, direction)
    monkeypatch.setattr(ComputedLeaves, "_dot_by_tangents", watched)
    draw = Draw(2)
    params = {"w": draw(4, 5), "a": draw(4, 2), "b": draw(2, 5)}
    problem = Problem(loss, jax.tree.map(jnp.asarray, params), (jnp.asarray(draw(B, 3, 4)),))
    blocks = oracle.vmap_of_grad(problem)
    direction = jax.tree.map(lambda x: draw(*x.shape), params)
    want = oracle.answers(blocks, blocks, np.ones(B), 1.0, direction)["dot"]
    grads = jgd.per_example_grad(loss, strategy="factored")(problem.params, *problem.batch)
    np.testing.assert_allclose(jgd.dot(grads, direction), want, rtol=1e-9)
    assert went == [[0, 1] if loss is low_rank else [2]]
    by_params = lambda params: jnp.sum(
        jnp.sin(jgd.dot(jgd.per_example_grad(loss, strategy="factored")(params, *problem.batch), direction))
    )
    plain = lambda params: jnp.sum(
        jnp.sin(jgd.dot(jax.vmap(jax.grad(loss), (None, 0))(params, *problem.batch), direction))
    )
    oracle.assert_close(jax.grad(by_params)(problem.params), jax.grad(plain)(problem.params), 1e-9)
