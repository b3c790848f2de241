"""Losses that `jax.vmap(jax.grad)` accepts, and `jax.jit` does not."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import B, Draw
from jax import lax

import jgd

WEIGHTS = np.array([1.5, 0.0, 0.5, 2.0, 1.0])


def total_of_two_dtypes(p, x):
    """An operand in float64, and an initial value in float32."""
    return jnp.sin(lax.reduce(jnp.tanh(x @ p["w"]) * p["s"], jnp.float32(0), lax.add, (0,)))


def with_an_integer_and_auxiliary(p, x, k):
    value = total_of_two_dtypes(p, x) * k
    return value, {"twice": 2 * value, "count": k}


@pytest.fixture
def made(x64):
    draw = Draw(0)
    p, x = {"w": jnp.asarray(draw(4, 3)), "s": jnp.asarray(draw(3))}, jnp.asarray(draw(B, 4))
    return p, x, jnp.asarray(draw.integers(5, B)) + 1


@pytest.mark.parametrize("options", [{}, {"strategy": "factored"}, {"microbatch_size": 2}], ids=str)
def test_a_reduction_of_two_dtypes(options, made):
    p, x, k = made
    with pytest.raises(TypeError):
        jax.jit(total_of_two_dtypes)(p, x[0])
    plain = lambda p, x, k: (
        jnp.sin(jnp.sum(jnp.tanh(x @ p["w"]) * p["s"])) * k  # pyright: ignore[reportReturnType]
    )
    values, blocks = jax.vmap(jax.value_and_grad(plain), (None, 0, 0))(p, x, k)
    direction = jax.tree.map(np.cos, p)
    want = oracle.answers(blocks, blocks, WEIGHTS, 0.5, direction)
    grads = jgd.per_example_grad(with_an_integer_and_auxiliary, has_aux=True, **options)(p, x, k)
    got = {
        "materialize": jgd.materialize(grads),
        "norms": jgd.norms(grads),
        "weighted_sum": jgd.sum(grads, WEIGHTS),
        "clipped_sum": jgd.clipped_sum(grads, 0.5),
        "gram": jgd.gram(grads),
        "dot": jgd.dot(grads, direction),
        "variance": jgd.variance(grads),
    }
    for quantity in got:
        oracle.assert_close(got[quantity], want[quantity], 1e-9, what=quantity)
    np.testing.assert_allclose(grads.values, values, rtol=1e-12)
    np.testing.assert_array_equal(grads.aux["count"], k)
    np.testing.assert_allclose(grads.aux["twice"], 2 * values, rtol=1e-12)


def test_derivatives_of_the_answers_by_all_arguments(made):
    p, x, _ = made

    def by_us(p, x):
        grads = jgd.per_example_grad(total_of_two_dtypes)(p, x)
        return jnp.sum(jgd.norms(grads)) + jnp.sum(grads.values)

    def plain(p, x):
        loss = lambda p, x: jnp.sin(jnp.sum(jnp.tanh(x @ p["w"]) * p["s"]))
        values, blocks = jax.vmap(jax.value_and_grad(loss), (None, 0))(p, x)
        return jnp.sum(jgd.norms(blocks)) + jnp.sum(values)

    oracle.assert_close(jax.grad(by_us, (0, 1))(p, x), jax.grad(plain, (0, 1))(p, x), 1e-9)


def test_what_neither_accepts_keeps_its_own_error():
    with pytest.raises(TypeError, match="`loss` must return a floating-point scalar"):
        jgd.per_example_grad(lambda p, x: p * x)(jnp.ones(3), jnp.ones((B, 3)))
