"""Batches that are filled up: with weights of 0 for what fills them, answers are those of the examples present."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import Draw
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of

import jgd

B, PRESENT = 8, 6
WEIGHTS = np.array([1.0] * PRESENT + [0.0] * (B - PRESENT), np.float32)
OTHERS = np.array([0.5, 0, 2, 1, 0, 3, 1, 1], np.float32)


def loss(p, x):
    return jnp.sum(jnp.tanh(x @ p["w"]) ** 2 + p["b"])


def problem(dtype=np.float64):
    draw = Draw(1)
    return {"w": jnp.asarray(draw(6, 4), dtype), "b": jnp.asarray(draw(4), dtype)}, jnp.asarray(
        draw(B, 6), dtype
    )


FORMS = {
    "factored": {"strategy": "factored"},
    "materialized": {"strategy": "materialized"},
    "microbatched": {"microbatch_size": 3},
}


def rows_of(params, x):
    return oracle.matrix(jax.vmap(jax.grad(loss), (None, 0))(params, x))


def expected(rows, weights):
    """The closed form, in float64."""
    share = np.float64(weights) / np.float64(weights).sum()
    present = share > 0
    rows, share = np.float64(rows)[present], share[present]
    mean = share @ rows
    trace = share @ np.square(rows - mean).sum(axis=1) / (1 - np.sum(share**2))
    signal = mean @ mean - trace * np.sum(share**2)
    return trace / signal, trace, signal


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weights", [WEIGHTS, OTHERS], ids=["padded", "weighted"])
def test_a_noise_scale_of_weighted_examples(form, weights, x64):
    params, x = problem()
    x = x.at[weights == 0].set(jnp.nan)
    ask = lambda p, x, w: jgd.noise_scale(jgd.per_example_grad(loss, **FORMS[form])(p, x), w)
    want = expected(rows_of(params, x), weights)
    for asked in (ask, jax.jit(ask)):
        np.testing.assert_allclose(asked(params, x, weights), want, rtol=1e-9)
    blocks = jax.vmap(jax.grad(loss), (None, 0))(params, x)
    np.testing.assert_allclose(jgd.noise_scale(blocks, weights), want, rtol=1e-9)


def test_weights_of_0_and_1_are_the_examples_present(x64):
    params, x = problem()
    grads = jgd.per_example_grad(loss)
    got = jgd.noise_scale(grads(params, x), WEIGHTS)
    np.testing.assert_allclose(got, jgd.noise_scale(grads(params, x[:PRESENT])), rtol=1e-9)
    equal = jgd.noise_scale(grads(params, x), np.full(B, 3.0))
    np.testing.assert_allclose(equal, jgd.noise_scale(grads(params, x)), rtol=1e-9)


def test_gradients_that_are_nearly_the_same():
    rows = (1000 + 0.01 * np.asarray(Draw(2)(B, 300))).astype(np.float32)
    got = jgd.noise_scale(jnp.asarray(rows), OTHERS)
    np.testing.assert_allclose(got, expected(rows, OTHERS), rtol=1e-3)


def test_on_a_mesh():
    params, x = problem(np.float32)
    mesh = mesh_of(4)
    x = jax.device_put(x, NamedSharding(mesh, P("data")))
    params = jax.device_put(params, NamedSharding(mesh, P()))
    got = jax.jit(lambda p, x: jgd.noise_scale(jgd.per_example_grad(loss)(p, x), WEIGHTS))(params, x)
    np.testing.assert_allclose(got, expected(rows_of(params, x), WEIGHTS), rtol=1e-4)


def test_its_derivatives(x64):
    params, x = problem()

    def trace(params, weights, of):
        return jnp.log(of(params, weights)[1])

    def by_hand(params, weights):
        blocks = jax.tree.leaves(jax.vmap(jax.grad(loss), (None, 0))(params, x))
        rows = jnp.concatenate([leaf.reshape(B, -1) for leaf in blocks], axis=1)
        share = weights / weights.sum()
        mean = share @ rows
        trace = share @ jnp.square(rows - mean).sum(axis=1) / (1 - jnp.sum(share**2))
        return None, trace

    ours = lambda params, weights: jgd.noise_scale(jgd.per_example_grad(loss)(params, x), weights)
    weights = jnp.asarray(OTHERS, jnp.float64)
    got, want = (jax.grad(trace, argnums=(0, 1))(params, weights, of) for of in (ours, by_hand))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-12)


def test_what_is_not_defined():
    params, x = problem(np.float32)
    grads = jgd.per_example_grad(loss)(params, x)
    one = np.eye(B, dtype=np.float32)[2]
    assert np.isnan(jgd.noise_scale(grads, one)).all()
    with pytest.raises(ValueError, match="all 0"):
        jgd.noise_scale(grads, np.zeros(B))
    with pytest.raises(ValueError, match="negative"):
        jgd.noise_scale(grads, -WEIGHTS)
    with pytest.raises(ValueError, match="shape"):
        jgd.noise_scale(grads, WEIGHTS[:3])
