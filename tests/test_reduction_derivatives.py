"""Derivatives of the reductions: by parameters, by weights, and of what a pass makes."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import problem
from internals import sums_of
from strategies import FEW, close, every_strategy, few_cases, squared_error

import jgd


@pytest.mark.sample(lambda name: name != FEW[2])
@every_strategy
@few_cases
def test_a_penalty_on_norms_trains(name, strategy, x64):
    case = problem(name)

    def penalty(p):
        return jnp.sum(jgd.norms(jgd.per_example_grad(case.loss, strategy=strategy)(p, *case.batch)) ** 2)

    def expected(p):
        blocks = jax.vmap(jax.grad(case.loss), case.in_axes)(p, *case.batch)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(blocks))

    close(jax.jit(jax.grad(penalty))(case.params), jax.jit(jax.grad(expected))(case.params), 1e-9)


def weighted(blocks, weights, max_norm):
    """What is asked with weights, from the gradients, so that JAX knows the derivatives by the weights."""
    norm = jnp.sqrt(sum(jnp.sum(x.reshape(len(weights), -1) ** 2, axis=1) for x in jax.tree.leaves(blocks)))
    whole = jnp.sum(weights)
    each = lambda w, of=lambda x: x: jax.tree.map(lambda x: jnp.tensordot(w, of(x), 1), blocks)
    mean = each(weights / whole)
    unbiased = whole - jnp.sum(weights**2) / whole
    deviation = lambda x, m: jnp.tensordot(weights, (x - m) ** 2, 1) / unbiased
    return (
        each(weights),
        mean,
        each(weights / whole, jnp.square),
        jax.tree.map(deviation, blocks, mean),
        each(weights * jnp.minimum(1, max_norm / norm)),
    )


def asked_with_weights(grads, weights, max_norm):
    return (
        jgd.sum(grads, weights),
        jgd.mean(grads, weights),
        jgd.second_moment(grads, weights),
        jgd.variance(grads, weights),
        jgd.clipped_sum(grads, max_norm, weights=weights),
    )


HELD = ({"strategy": "factored"}, {"strategy": "materialized"}, {"microbatch_size": 2})


BY_DEFAULT = {"tied_embedding_and_head": 0, "embedding_repeated_indices": 2, "recurrence": 1}


@pytest.mark.sample(lambda name, held: name in BY_DEFAULT and held is HELD[BY_DEFAULT[name]])
@pytest.mark.parametrize("held", HELD, ids=str)
@pytest.mark.parametrize("name", (*FEW, "embedding_repeated_indices", "weight_normalisation", "recurrence"))
def test_derivatives_by_weights_that_are_partly_0(name, held, x64):
    """Of an absent example too: reweighting starts from weights of 0."""
    case = problem(name)
    blocks = jax.vmap(jax.grad(case.loss), case.in_axes)(case.params, *case.batch)
    size = jax.tree.leaves(blocks)[0].shape[0]
    weights = jnp.where(jnp.arange(size) < size // 2, 0, 1 + jnp.arange(size) / size)
    max_norm = 0.7 * float(jnp.median(jnp.linalg.norm(oracle.matrix(blocks), axis=1)))
    wave = lambda tree: sum(
        jnp.sum(x * jnp.sin(1 + jnp.arange(x.size)).reshape(x.shape)) for x in jax.tree.leaves(tree)
    )

    def ours(weights, max_norm):
        grads = jgd.per_example_grad(case.loss, **case.options, **held)(case.params, *case.batch)
        return [wave(x) for x in asked_with_weights(grads, weights, max_norm)]

    theirs = lambda weights, max_norm: [wave(x) for x in weighted(blocks, weights, max_norm)]
    at = (weights, max_norm)
    want = jax.jacobian(theirs, (0, 1))(*at)
    assert all(np.all(np.abs(by_weights) > 0) for by_weights, _ in want)
    close(jax.jit(jax.jacrev(ours, (0, 1)))(*at), want, 1e-9)
    close(jax.jit(jax.jacfwd(ours, (0, 1)))(*at), want, 1e-9)


@every_strategy
def test_weights_that_are_all_0_can_be_learned(strategy, example, x64):
    """As in "Learning to reweight examples" (Ren et al., 2018): a step with weights of 0, and its derivative."""
    params, x, y = example

    def after(weights, total):
        blocks = total(params, weights)
        stepped = jax.tree.map(lambda p, g: p - 0.1 * g, params, blocks)
        return jnp.sum(jax.vmap(squared_error, (None, 0, 0))(stepped, x[:2], y[:2]))

    ours = lambda p, w: jgd.sum(jgd.per_example_grad(squared_error, strategy=strategy)(p, x, y), w)
    theirs = jax.grad(lambda p, w: jnp.sum(w * jax.vmap(squared_error, (None, 0, 0))(p, x, y)))
    want = jax.grad(after)(jnp.zeros(5), theirs)
    assert np.all(np.abs(want) > 0)
    close(jax.grad(after)(jnp.zeros(5), ours), want)
    close(jax.jit(jax.grad(after), static_argnums=1)(jnp.zeros(5), ours), want)


@pytest.mark.sample(lambda held: held is HELD[0])
@pytest.mark.parametrize("held", HELD, ids=str)
def test_no_derivative_by_the_weight_of_an_absent_example_that_is_not_finite(held, example, x64):
    params, x, y = example
    x = x.copy()
    x[1, 2] = np.nan
    weights = jnp.array([1.0, 0, 2, 0, 1])

    def ask(weights, x, y):
        grads = jgd.per_example_grad(squared_error, **held)(params, x, y)
        return [jnp.sin(z["w"]) for z in asked_with_weights(grads, weights, 0.3)]

    rest = np.array([0, 2, 3, 4])
    want = jax.jit(jax.jacrev(ask))(weights[rest], x[rest], y[rest])
    for jacobian in (jax.jacrev, jax.jacfwd):
        got = jax.jit(jacobian(ask))(weights, x, y)
        close([z[..., rest] for z in got], want, 1e-9)
        assert all(np.all(z[..., 1] == 0) for z in got[:1] + got[4:])
        assert all(np.all(np.isfinite(z)) for z in got)


@pytest.mark.sample(lambda held: held is not HELD[1])
@pytest.mark.parametrize("held", HELD, ids=str)
def test_the_derivative_by_the_parameters_beside_an_absent_example_that_is_not_finite(held, example, x64):
    """JAX multiplies the nan of the example's pass by its cotangent, which is 0: so the pass must not see it."""
    params, x, y = example
    x = x.copy()
    x[1, 2] = np.nan
    weights = jnp.array([1.0, 0, 2, 0, 1])

    def ask(params, weights, x, y):
        grads = jgd.per_example_grad(squared_error, **held)(params, x, y)
        return [jnp.sin(z["w"]) for z in asked_with_weights(grads, weights, 0.3)]

    rest = np.array([0, 2, 3, 4])
    want = jax.jit(jax.jacrev(ask))(params, weights[rest], x[rest], y[rest])
    for jacobian in (jax.jacrev, jax.jacfwd):
        close(jax.jit(jacobian(ask))(params, weights, x, y), want, 1e-9)


@pytest.mark.parametrize("held", HELD, ids=str)
def test_where_nobody_is_present_the_derivative_by_the_parameters_is_0(held, example):
    """Of a loss without a derivative at data of 0, which no example has."""
    params, x, y = example
    loss = lambda p, x, y: squared_error(p, x / jnp.linalg.norm(x), y)

    def after(params):
        grads = jgd.per_example_grad(loss, **held)(params, x, y)
        clipped = jgd.clipped_sum(grads, 0.3, weights=jnp.zeros(5))
        return jnp.sum(jgd.sum(grads, jnp.zeros(5))["w"] ** 2) + jnp.sum(clipped["w"] ** 2)

    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(jax.grad(after)(params)))


def test_the_derivative_of_a_variance_by_weights_that_leave_a_microbatch_empty(example, x64):
    params, x, y = example
    weights = jnp.array([1.0, 0, 2, 3, 0, 1])  # microbatches of two are 0 and 3, 1 and 4, 2 and 5
    x, y = np.concatenate([x, x[:1] + 1]), np.concatenate([y, y[:1]])

    def ask(weights, size):
        grads = jgd.per_example_grad(squared_error, microbatch_size=size)(params, x, y)
        return jnp.sin(jgd.variance(grads, weights)["w"])

    close(jax.jacrev(ask)(weights, 2), jax.jacrev(ask)(weights, None), 1e-9)


@pytest.mark.parametrize("held", HELD, ids=str)
def test_one_example_that_is_left_has_no_variance(held, example):
    """Nor has a parameter that it does not reach."""
    params, x, y = example
    loss = lambda p, x, y: squared_error(p, x, y) + 0 * p["table"][jnp.argmax(x)]
    grads = jgd.per_example_grad(loss, **held)(params | {"table": jnp.ones(10)}, x, y)
    for leaf in jax.tree.leaves(jgd.variance(grads, jnp.array([0.0, 0, 2, 0, 0]))):
        assert np.all(np.isnan(leaf))


@every_strategy
def test_derivatives_of_the_other_reductions(strategy, example, x64):
    params, x, y = example
    direction = jax.tree.map(jnp.ones_like, params)
    asks = [
        lambda g: jgd.norms(g, per_leaf=True)["w"].sum(),
        lambda g: jnp.sin(jgd.gram(g)).sum(),
        lambda g: jnp.sin(jgd.clipped_sum(g, 0.9)["w"]).sum(),
        lambda g: jnp.sqrt(jgd.second_moment(g)["w"]).sum(),
        lambda g: jnp.sqrt(jgd.variance(g)["w"]).sum(),
        lambda g: jgd.noise_scale(g).trace_covariance,
        lambda g: jnp.sin(jgd.dot(g, direction)).sum(),
        lambda g: jnp.sin(jgd.project(g, jax.random.key(1), 3)).sum(),
        lambda g: jnp.sin(jgd.mean(g)["w"]).sum(),
    ]
    total = lambda g: sum((k + 1) * ask(g) for k, ask in enumerate(asks))
    got = jax.grad(lambda p: total(jgd.per_example_grad(squared_error, strategy=strategy)(p, x, y)))(params)
    want = jax.grad(lambda p: total(jax.vmap(jax.grad(squared_error), (None, 0, 0))(p, x, y)))(params)
    close(got, want, 1e-9)


@pytest.mark.sample(lambda positions: positions == 6)
@pytest.mark.parametrize("positions", [1, 6])
def test_derivatives_of_what_the_pass_makes_of_a_scan(positions, x64):
    """First and second, in both directions: of sums, moments and inner products that one program asks for."""
    params = 0.5 * jax.random.normal(jax.random.key(0), (3, 4, 4))
    x = jax.random.normal(jax.random.key(1), (5, positions, 4))

    def loss(w, x):
        return jnp.sum(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0] ** 2)

    def total(grads):
        asked = jgd.mean(grads), jgd.second_moment(grads), jgd.variance(grads), jgd.gram(grads)
        tree = jax.tree.map(lambda x: jnp.sum(jnp.sin(x)), asked)
        return sum(tree) + jgd.noise_scale(grads).trace_covariance

    def ours(p):
        grads = jgd.per_example_grad(loss, strategy="factored")(p, x)
        assert sums_of(grads).parts
        return total(grads)

    theirs = lambda p: total(jax.vmap(jax.grad(loss), (None, 0))(p, x))
    close(jax.jit(jax.grad(ours))(params), jax.jit(jax.grad(theirs))(params), 1e-9)
    along = lambda f: jax.jit(lambda p: jax.jvp(jax.grad(f), (p,), (jnp.cos(p),)))
    close(along(ours)(params), along(theirs)(params), 1e-9)


@every_strategy
def test_a_zero_gradient_gives_no_nan(strategy, x64):
    x = jnp.array([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    loss = lambda p, x: jnp.sum(jnp.sin(x * p))
    ask = jgd.per_example_grad(loss, strategy=strategy)
    params = jnp.array([0.1, 0.2, 0.3])
    grads = ask(params, x)
    assert jgd.norms(grads)[0] == 0
    assert all(
        np.isfinite(t).all()
        for t in jax.tree.leaves((jgd.clipped_sum(grads, 0.0), jgd.clipped_sum(grads, 1.0)))
    )
    for reduction in (lambda g: jgd.norms(g).sum(), lambda g: jgd.clipped_sum(g, 1.0).sum()):
        assert np.isfinite(jax.grad(lambda p, r=reduction: r(ask(p, x)))(params)).all()
