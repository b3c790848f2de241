"""Complex activations: real gradients by every path, and what is said of a complex parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES, B, Draw, Problem, problem
from cases.complex import energy, spun
from internals import SECOND_PASS, forced
from jax import lax

import jgd

WEIGHTS = np.array([1.5, 0.0, 0.5, 2.0, 1.0])
COMPLEX = [name for name, build in CASES.items() if build.__module__ == "cases.complex"]


def every_reduction(grads, key, direction):
    scale = jgd.noise_scale(grads)
    return {
        "materialize": jgd.materialize(grads),
        "sum": jgd.sum(grads),
        "weighted_sum": jgd.sum(grads, WEIGHTS),
        "norms": jgd.norms(grads),
        "leaf_norms": jgd.norms(grads, per_leaf=True),
        "clipped_sum": jgd.clipped_sum(grads, 1.0),
        "weighted_clipped_sum": jgd.clipped_sum(grads, 1.0, weights=WEIGHTS),
        "gram": jgd.gram(grads),
        "dot": jgd.dot(grads, direction),
        "second_moment": jgd.second_moment(grads),
        "weighted_variance": jgd.variance(grads, WEIGHTS),
        "variance": jgd.variance(grads),
        "noise_scale": (scale.trace_covariance, scale.squared_norm),
        "project": jgd.project(grads, key, 3),
    }


def check(case, key, direction, **options):
    blocks = oracle.vmap_of_grad(case)
    want = oracle.answers(blocks, blocks, WEIGHTS, 1.0, direction)
    want["project"] = jgd.project(jax.tree.map(jnp.asarray, blocks), key, 3)

    def answers(params, batch):
        grads = jgd.per_example_grad(case.loss, **options)(params, *batch)
        return every_reduction(grads, key, direction)

    got = jax.jit(answers)(case.params, case.batch)
    assert not any(jnp.iscomplexobj(x) for x in jax.tree.leaves(got))
    for quantity in got:
        oracle.assert_close(got[quantity], want[quantity], 1e-9, what=quantity)


@pytest.mark.sample(lambda name: COMPLEX.index(name) % 3 == 0)
@pytest.mark.parametrize("name", COMPLEX)
def test_every_reduction_in_one_program(name, key, x64):
    """What a scan's backward pass makes of complex numbers is asked for only inside of one program."""
    case = problem(name)
    check(case, key, jax.tree.map(np.cos, case.params), strategy="factored")


MICRO = ("tied_complex_and_real_uses", "complex_stacked_layers", "complex_lookups")


@pytest.mark.sample(
    lambda name, strategy: (strategy is SECOND_PASS) == (name == MICRO[2]) and name != MICRO[1]
)
@pytest.mark.parametrize("name", MICRO)
@pytest.mark.parametrize("strategy", ["factored", SECOND_PASS])
def test_microbatches_and_second_passes(name, strategy, key, x64):
    case = problem(name)
    check(case, key, jax.tree.map(np.cos, case.params), strategy=strategy, microbatch_size=2)


@pytest.mark.sample(lambda name, method: COMPLEX.index(name) % 4 == (0 if method == "pairs" else 2))
@pytest.mark.parametrize("method", ["pairs", "block"])
@pytest.mark.parametrize("name", COMPLEX)
def test_each_method(name, method, x64):
    case = problem(name)
    grads = jgd.per_example_grad(case.loss, strategy="factored")(case.params, *case.batch)
    norms = np.linalg.norm(oracle.matrix(oracle.vmap_of_grad(case)), axis=1)
    np.testing.assert_allclose(jgd.norms(forced(grads, method)), norms, rtol=1e-9)


def test_complex_numbers_keep_a_leaf_to_its_factors(x64):
    """Neither a cast nor a conjugate of it makes a leaf one that a rule does not know."""
    for name in ("cast_to_complex_through_views", "complex_lookups", "complex_stacked_layers"):
        case = problem(name)
        plan = jgd.per_example_grad(case.loss, strategy="factored")(case.params, *case.batch)._form.plan
        assert len(plan.factored) == len(plan.program.param_avals)


def test_the_gradient_of_the_issue_is_real(key):
    x, w = jax.random.normal(key, (8, 64)), jax.random.normal(jax.random.key(1), (64, 64))
    loss = lambda w, x: jnp.sum(jnp.abs(jnp.fft.fft(x) @ w))
    norms = jgd.norms(jgd.per_example_grad(loss)(w, x))
    assert norms.dtype == jnp.float32
    blocks = jax.vmap(jax.grad(loss), (None, 0))(w, x)
    np.testing.assert_allclose(norms, jnp.linalg.norm(blocks.reshape(8, -1), axis=1), rtol=1e-5)


# Complex parameters


def test_a_complex_parameter_is_refused_with_advice_that_works(key, x64):
    draw = Draw(0)
    w, x = jnp.asarray(draw(4, 3) + 1j * draw(4, 3)), jnp.asarray(draw(B, 2, 4))
    loss = lambda w, x: energy(spun(x) @ w) + energy(x @ jnp.conj(w))
    with pytest.raises(TypeError, match=r"must be real.*\(w.real, w.imag\).*jax.lax.complex"):
        jgd.per_example_grad(loss)(w, x)
    by_parts = lambda parts, x: loss(jax.lax.complex(*parts), x)
    case = Problem(by_parts, (w.real, w.imag), (x,))
    check(case, key, (draw(4, 3), draw(4, 3)), strategy="factored")
    real, imag = jgd.materialize(jgd.per_example_grad(by_parts)((w.real, w.imag), x))
    complex_one = jax.vmap(jax.grad(loss), (None, 0))(w, x)
    np.testing.assert_allclose(complex_one, real - 1j * imag, rtol=1e-9)


# Outputs that are wider than what made them


@pytest.mark.sample(lambda positions, dtype: (positions == ()) == (dtype == jnp.bfloat16))
@pytest.mark.parametrize("positions", [(), (3,)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_an_output_that_is_wider_than_the_leaf(dtype, positions, key, x64):
    """By `preferred_element_type`: its δ is as wide."""
    draw = Draw(3)
    w, x = jnp.asarray(draw(4, 3), dtype), jnp.asarray(draw(B, *positions, 4), dtype)

    def loss(w, x):
        dims = (((x.ndim - 1,), (0,)), ((), ()))
        return jnp.sum(jnp.sin(lax.dot_general(x, w, dims, preferred_element_type=jnp.float64)))

    exact = Problem(loss, w.astype(jnp.float64), (x.astype(jnp.float64),))
    blocks, direction = oracle.vmap_of_grad(exact), draw(4, 3)
    want = oracle.answers(blocks, blocks, WEIGHTS, 1.0, direction)
    for ask in (every_reduction, jax.jit(every_reduction)):
        got = ask(jgd.per_example_grad(loss, strategy="factored")(w, x), key, direction)
        assert got["sum"].dtype == dtype and got["variance"].dtype == jnp.promote_types(dtype, jnp.float32)
        for quantity in set(got) - {"project"}:
            of_leaves = quantity not in ("norms", "leaf_norms", "gram", "dot", "noise_scale")
            tolerance = 1e-2 if dtype == jnp.bfloat16 and of_leaves else 1e-5
            oracle.assert_close(got[quantity], want[quantity], tolerance, what=quantity)
