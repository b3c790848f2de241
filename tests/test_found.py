"""Losses that an attempt to break the engine found, each wrong or refused before it was mended."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from test_custom_derivatives import assert_as_vmap_of_grad

import jgd

pytestmark = pytest.mark.usefixtures("x64")

rng = np.random.default_rng(0)
POINTS, W, V = rng.normal(size=(3, 5)), rng.normal(size=5), rng.normal(size=5)

triples = jax.custom_jvp(lambda z: z)
triples.defjvp(lambda p, t: (3 * p[0], t[0] * p[0]))
product = jax.custom_jvp(lambda a, b: a * b)
product.defjvp(lambda p, t: (3 * p[0] * p[1], 2 * t[0] * p[1] + p[0] * t[1]))


def test_an_output_that_does_not_move_before_a_rule_that_changes_the_value():
    def loss(w, x):
        x, w = jax.lax.sort((x, w), num_keys=1)
        return jnp.sum(jnp.sin(w * triples(x)))

    assert_as_vmap_of_grad(loss, W, (POINTS,))


def test_a_parameter_that_meets_a_dense_one_in_a_rule_that_changes_the_value():
    def loss(p, x):
        stopped = jax.lax.stop_gradient(p["w"])
        return jnp.sum(jnp.sin(x @ product(p["v"], stopped))) + jnp.sum(product(p["w"], x))

    assert_as_vmap_of_grad(loss, {"v": V, "w": W}, (POINTS,))


def test_a_parameter_that_meets_one_that_is_spread_over_positions():
    def loss(p, x):
        return jnp.sum(jnp.sin((x @ product(p["v"], jax.lax.stop_gradient(p["s"]))) * p["s"]))

    params = {"v": rng.normal(size=(6, 5)), "s": W}
    assert_as_vmap_of_grad(loss, params, (rng.normal(size=(3, 300, 6)),), tolerance=1e-11)


@pytest.mark.parametrize("mask", [np.array([True, False, True, True, False]), None])
def test_masks_that_are_concrete(mask):
    loss = lambda p, x, m: jnp.sum(jnp.sin(x[p > 0 if m is None else m] * p[p > 0 if m is None else m]))
    grads = jgd.per_example_grad(loss, in_axes=(None, 0, None))(jnp.array(W), POINTS, mask)
    want = jax.vmap(jax.grad(loss), (None, 0, None))(jnp.array(W), POINTS, mask)
    oracle.assert_close(jgd.materialize(grads), np.asarray(want), 1e-12)


def scales(array, custom):
    f = jax.jit(lambda z: z * array)
    if custom:
        f = jax.custom_jvp(lambda z: z * array)
        f.defjvp(lambda p, t: (p[0] * array, t[0] * array))
    return lambda p, x: jnp.sum(jnp.sin(f(p) * x))


def norms(loss, x, **options):
    return np.asarray(jgd.norms(jgd.per_example_grad(loss, **options)(W, x)))


@pytest.mark.parametrize("custom", [False, True])
def test_an_equal_array_that_changed_since_is_not_read(custom):
    array, others = np.ones(5), rng.normal(size=(4, 5))
    norms(scales(array, custom), POINTS, strategy="factored")
    array *= 5
    got = norms(scales(np.ones(5), custom), others, strategy="factored")
    np.testing.assert_allclose(got, norms(lambda p, x: jnp.sum(jnp.sin(p * x)), others), rtol=1e-12)


def test_gradients_keep_an_array_that_an_inner_function_closes_over():
    array = np.ones(5)
    grads = jgd.per_example_grad(scales(array, False), strategy="factored")(W, POINTS)
    array *= 5
    np.testing.assert_allclose(
        jgd.norms(grads), norms(lambda p, x: jnp.sum(jnp.sin(p * x)), POINTS), rtol=1e-12
    )


def test_a_callback_whose_variable_changed_since_is_not_called():
    def made(n):
        def callback(v):
            return np.asarray(v * n)

        def change(m):
            nonlocal n
            n = m

        def loss(p, x):
            out = jax.ShapeDtypeStruct(x.shape, x.dtype)
            return jnp.sum(jnp.sin(p * jax.pure_callback(callback, out, x, vmap_method="sequential")))

        return loss, change

    first, change = made(1.0)
    norms(first, POINTS)
    change(5.0)
    want = norms(lambda p, x: jnp.sum(jnp.sin(p * x)), POINTS)
    np.testing.assert_allclose(norms(made(1.0)[0], POINTS), want, rtol=1e-12)


def test_rules_that_read_alike_and_use_other_ones():
    """The third derivative of the first function is the third one's rule."""

    def tower(c):
        f, g, h = (jax.custom_jvp(jnp.sin) for _ in range(3))
        h.defjvp(lambda p, t: (jnp.sin(p[0]), c * jnp.cos(p[0]) * t[0]))
        g.defjvp(lambda p, t: (jnp.sin(p[0]), h(p[0]) * t[0]))
        f.defjvp(lambda p, t: (jnp.sin(p[0]), g(p[0]) * t[0]))
        return lambda p, x: jnp.sum(f(p * x))

    def slope(c, gradients):
        return jax.hessian(lambda p: jnp.sum(jgd.norms(gradients(tower(c))(p, POINTS)) ** 2))(jnp.array(W))

    for c in (1.0, 5.0):
        got = slope(c, lambda loss: jgd.per_example_grad(loss, strategy="factored"))
        want = slope(c, lambda loss: jax.vmap(jax.grad(loss), (None, 0)))
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-14)


def test_gradients_with_a_shared_number_cross_a_program():
    of = jgd.per_example_grad(
        lambda p, x, c: jnp.sum(jnp.sin(p * x)) * c, in_axes=(None, 0, None), microbatch_size=2
    )
    grads = of(W, POINTS, 0.5)
    np.testing.assert_allclose(jgd.norms(jax.jit(lambda g: g)(grads)), jgd.norms(grads))


@pytest.mark.parametrize("flag", [True, False])
def test_a_shared_flag_is_one(flag):
    loss = lambda p, x, m: jnp.sum(jnp.sin(p * x) if m is True else jnp.cos(p * x))
    grads = jgd.per_example_grad(loss, in_axes=(None, 0, None))(W, POINTS, flag)
    want = jax.vmap(jax.grad(loss), (None, 0, None))(W, POINTS, flag)
    oracle.assert_close(jgd.materialize(grads), np.asarray(want), 1e-12)


def test_a_reference_that_the_loss_closes_over():
    reference = jax.new_ref(jnp.ones(5))
    loss = lambda p, x: jnp.sum(jnp.sin(p * x * reference[...]))
    np.testing.assert_allclose(norms(loss, POINTS), norms(lambda p, x: jnp.sum(jnp.sin(p * x)), POINTS))
    reference[...] = 2 * jnp.ones(5)
    np.testing.assert_allclose(norms(loss, POINTS), norms(lambda p, x: jnp.sum(jnp.sin(p * x * 2)), POINTS))
