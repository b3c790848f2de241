"""Batch statistics and natural gradients, against their definitions in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from cases import Draw
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of

import jgd

B = 8
PADDED = np.array([1.0] * 6 + [0.0] * 2, np.float32)
OTHERS = np.array([0.5, 0, 2, 1, 0, 3, 1, 1], np.float32)
FORMS = {
    "factored": {"strategy": "factored"},
    "materialized": {"strategy": "materialized"},
    "microbatched": {"microbatch_size": 3},
}


def loss(p, x):
    return jnp.sum(jnp.tanh(x @ p["w"]) ** 2 + p["b"])


def problem(dtype=np.float64):
    draw = Draw(1)
    params = {"w": jnp.asarray(draw(6, 4), dtype), "b": jnp.asarray(draw(4), dtype)}
    return params, jnp.asarray(draw(B, 6), dtype)


def rows_of(params, x):
    return np.float64(oracle.matrix(jax.vmap(jax.grad(loss), (None, 0))(params, x)))


def defined(rows, weights):
    """Each by its definition; for weights of 0 and 1 that of the examples present."""
    share = np.float64(weights) / np.float64(weights).sum()
    rows, share = rows[share > 0], share[share > 0]
    mean, kappa = share @ rows, np.sum(share**2)
    square, inner = mean @ mean, rows @ mean
    unbiased = 1 - kappa
    trace = share @ np.sum((rows - mean) ** 2, axis=1) / unbiased
    beside = rows - np.outer(inner / square, mean)
    return {
        "trace_covariance": trace,
        "squared_norm": square - trace * kappa,
        "noise_scale": trace / (square - trace * kappa),
        "norm_test": trace * kappa / square,
        "inner_product_test": share @ (inner - square) ** 2 / unbiased * kappa / square**2,
        "orthogonality_test": share @ np.sum(beside**2, axis=1) / unbiased * kappa / square,
        "gradient_diversity": share @ np.sum(rows**2, axis=1) * kappa / square,
        "m_coherence": square / (share @ np.sum(rows**2, axis=1) * kappa),
    }


def check(statistics, want, rtol):
    for name, value in want.items():
        np.testing.assert_allclose(getattr(statistics, name), value, rtol=rtol, err_msg=name)


@pytest.mark.sample(lambda form, weights: form == "microbatched" or weights is OTHERS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weights", [None, PADDED, OTHERS], ids=["all", "padded", "weighted"])
def test_each_by_its_definition(form, weights, x64):
    params, x = problem()
    if weights is not None:
        x = x.at[weights == 0].set(jnp.nan)
    ask = lambda p, x: jgd.batch_statistics(jgd.per_example_grad(loss, **FORMS[form])(p, x), weights)
    want = defined(rows_of(params, x), np.ones(B) if weights is None else weights)
    for asked in (ask, jax.jit(ask)):
        check(asked(params, x), want, 1e-8)


def test_they_are_those_of_the_examples_present(x64):
    params, x = problem()
    grads = jgd.per_example_grad(loss)
    np.testing.assert_allclose(
        jgd.batch_statistics(grads(params, x), PADDED), jgd.batch_statistics(grads(params, x[:6])), rtol=1e-9
    )
    scale = jgd.noise_scale(grads(params, x))
    statistics = jgd.batch_statistics(grads(params, x))
    np.testing.assert_allclose(
        scale, (statistics.noise_scale, statistics.trace_covariance, statistics.squared_norm), rtol=1e-9
    )


def test_on_a_mesh():
    params, x = problem(np.float32)
    mesh = mesh_of(4)
    put = lambda tree, *spec: jax.device_put(tree, NamedSharding(mesh, P(*spec)))
    ask = jax.jit(lambda p, x: jgd.batch_statistics(jgd.per_example_grad(loss)(p, x)))
    check(ask(put(params), put(x, "data")), defined(rows_of(params, x), np.ones(B)), 1e-3)


def test_the_limits():
    """Of gradients that are all the same, and of orthogonal ones."""
    same = jgd.batch_statistics(jnp.ones((B, 3)))
    np.testing.assert_allclose(
        (same.gradient_diversity, same.m_coherence, same.norm_test), (1 / B, B, 0), atol=1e-6
    )
    apart = jgd.batch_statistics(jnp.eye(B))
    np.testing.assert_allclose((apart.gradient_diversity, apart.m_coherence), (1, 1), rtol=1e-6)
    np.testing.assert_allclose((apart.norm_test, apart.inner_product_test), (1, 0), atol=1e-6)
    line = jgd.batch_statistics(jnp.asarray(Draw(1)(B, 1), jnp.float32))
    assert line.orthogonality_test <= 1e-5 * line.norm_test


@pytest.mark.parametrize("scale", [1e-15, 1e12])
def test_gradients_whose_fourth_powers_leave_float32(scale):
    rows = np.float32(scale * Draw(6)(B, 300))
    check(jgd.batch_statistics(jnp.asarray(rows)), defined(np.float64(rows), np.ones(B)), 1e-4)


def test_running_means_of_a_linear_regression_are_the_closed_form():
    """x ~ N(0, I), y = ⟨w, x⟩ + σε: G = v − w =: d, and tr Σ = (n + 1)‖d‖² + nσ²."""
    n, sigma, steps, size = 4, 0.5, 4000, 8
    d = jnp.array([0.3, -0.2, 0.1, 0.4])

    def step(state, key):
        one, other = jax.random.split(key)
        x = jax.random.normal(one, (size, n))
        y = sigma * jax.random.normal(other, (size,))
        grads = jgd.per_example_grad(lambda v, x, y: 0.5 * (x @ v - y) ** 2)(d, x, y)
        means, state = jgd.smoothed(jgd.batch_statistics(grads), state, 0.9995)
        return state, means

    keys = jax.random.split(jax.random.key(0), steps + 1)
    state, _ = step(None, keys[0])
    _, means = jax.jit(lambda state, keys: jax.lax.scan(step, state, keys))(state, keys[1:])
    last = jax.tree.map(lambda x: x[-1], means)
    square = float(d @ d)
    trace = (n + 1) * square + n * sigma**2
    np.testing.assert_allclose(last.trace_covariance, trace, rtol=0.05)
    np.testing.assert_allclose(last.squared_norm, square, rtol=0.05)
    np.testing.assert_allclose(last.noise_scale, trace / square, rtol=0.08)
    assert (last.mean_square - last.squared_mean) > 0


def test_running_means_start_where_they_are():
    first, second = (jgd.batch_statistics(jnp.asarray(Draw(k)(B, 3), jnp.float32)) for k in (1, 2))
    means, state = jgd.smoothed(first, None, 0.9)
    np.testing.assert_allclose(means, first, rtol=1e-6)
    means, _ = jgd.smoothed(second, state, 0.9)
    want = (0.9 * np.array(first) + np.array(second)) / 1.9
    np.testing.assert_allclose(means, want, rtol=1e-5)
    with pytest.raises(ValueError, match="`decay`"):
        jgd.smoothed(first, None, 1.0)
    with pytest.raises(ValueError, match="at least two"):
        jgd.batch_statistics(jnp.ones((1, 3)))


# Natural gradients


def by_parameters(rows, residuals, damping, weights, *, centred):
    """The same from P equations, in float64."""
    root = np.sqrt(weights)
    share = weights / weights.sum()
    if centred:
        rows, residuals = rows - share @ rows, residuals - share @ residuals
    rows, residuals = root[:, None] * rows, root * residuals
    return np.linalg.solve(rows.T @ rows + damping * np.eye(rows.shape[1]), rows.T @ residuals)


@pytest.mark.sample(lambda centred, form, weights: form == "factored")
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weights", [None, PADDED, OTHERS], ids=["all", "padded", "weighted"])
def test_a_natural_gradient_by_either_system(form, weights, centred, x64):
    params, x = problem()
    residuals = jnp.asarray(Draw(7)(B))
    present = np.ones(B, bool) if weights is None else weights != 0
    ask = lambda p, x: jgd.natural_gradient(
        jgd.per_example_grad(loss, **FORMS[form])(p, x),
        residuals,
        damping=0.3,
        centred=centred,
        weights=weights,
    )
    given = np.ones(B) if weights is None else np.float64(weights)
    want = by_parameters(
        rows_of(params, x)[present], np.asarray(residuals)[present], 0.3, given[present], centred=centred
    )
    bad = x if weights is None else x.at[weights == 0].set(jnp.nan)
    for asked in (ask, jax.jit(ask)):
        got = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(asked(params, bad))])
        np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-12)


def test_gauss_newton_solves_least_squares_in_one_step(x64):
    draw = Draw(3)
    x, y = jnp.asarray(draw(20, 3)), jnp.asarray(draw(20))
    outputs = jgd.per_example_grad(lambda w, x: x @ w)(jnp.ones(3), x)
    step = jgd.natural_gradient(outputs, x @ jnp.ones(3) - y, damping=1e-10)
    np.testing.assert_allclose(jnp.ones(3) - step, np.linalg.lstsq(x, y, rcond=None)[0], rtol=1e-5)


def test_as_the_reduction_of_a_method():
    x, y = jnp.asarray(Draw(3)(20, 3), jnp.float32), jnp.asarray(Draw(4)(20), jnp.float32)
    natural = functools.partial(jgd.natural_gradient, damping=10.0)
    method = jgd.descent(lambda w, x, y: 0.5 * (x @ w - y) ** 2, optax.sgd(0.5), reduce=natural)
    result = jgd.fit(method, jnp.zeros(3), (x, y), batch_size=None, epochs=100, key=jax.random.key(0))
    total = lambda w: float(jnp.sum((x @ w - y) ** 2))
    least = total(jnp.linalg.lstsq(x, y)[0])
    assert total(result.params) - least < 0.2 * (total(jnp.zeros(3)) - least)
    method.step(result.state, x, y, weights=jnp.ones(20).at[0].set(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -1.0}, "`damping` must be one number"),
        ({"damping": float("nan")}, "`damping` must be one number"),
        ({"damping": jnp.ones(2)}, "`damping` must be one number"),
        ({"damping": 1.0, "residuals": jnp.ones(3)}, "`residuals` must have shape"),
        ({"damping": 1.0, "weights": -np.ones(B)}, "`weights` must not be negative"),
        ({"damping": 1.0, "centred": True}, "give `residuals`"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        jgd.natural_gradient(jnp.ones((B, 3)), **options)


@pytest.mark.parametrize("scale", [1e-25, 1e-10, 1.0, 10.0, 100.0, 1e6])
def test_more_examples_than_parameters_in_float32(scale):
    """Most directions of the Gram matrix hold nothing but rounding, which a small damping must not blow up."""
    draw = Draw(5)
    rows, residuals = np.float32(scale * draw(64, 8)), np.float32(draw(64))
    want = by_parameters(np.float64(rows), np.float64(residuals), 1e-3, np.ones(64), centred=False)
    got = jgd.natural_gradient(jnp.asarray(rows), jnp.asarray(residuals), damping=1e-3)
    assert np.max(np.abs(got - want)) < 1e-4 * np.max(np.abs(want))


def test_a_natural_gradient_on_explicit_axes():
    params, x = problem(np.float32)
    mesh = mesh_of(4, kind=AxisType.Explicit)
    put = lambda tree, *spec: jax.device_put(tree, NamedSharding(mesh, P(*spec)))
    for weights in (None, OTHERS):
        ask = lambda p, x, w: jgd.natural_gradient(
            jgd.per_example_grad(loss, strategy="factored")(p, x), damping=0.3, weights=w
        )
        got = jax.jit(ask)(put(params), put(x, "data"), weights if weights is None else put(weights, "data"))
        want = ask(params, x, weights)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), got, want)


def test_the_derivative_of_a_natural_gradient(x64):
    params, x = problem()
    of = lambda solve: jax.grad(lambda b: jnp.sum(jnp.sin(solve(b))))(params["b"])
    power = lambda p, x: loss(p, x) ** 2

    def ours(b):
        return jgd.natural_gradient(jgd.per_example_grad(power)(params | {"b": b}, x), damping=0.3)["w"]

    def by_hand(b):
        blocks = jax.vmap(jax.grad(power), (None, 0))(params | {"b": b}, x)
        rows = jnp.concatenate([leaf.reshape(B, -1) for leaf in jax.tree.leaves(blocks)], axis=1)
        made = rows.T @ jnp.linalg.solve(rows @ rows.T + 0.3 * jnp.eye(B), jnp.ones(B))
        return made[4:].reshape(6, 4)  # behind b

    np.testing.assert_allclose(of(ours), of(by_hand), rtol=1e-6)


LENGTHS = {  # of the rows' singular values
    "decaying": np.logspace(0, -6, 64),
    "two of a kind": np.r_[np.ones(32), np.zeros(32)],
    "few large ones": np.r_[np.ones(32), np.full(32, 10**-2.6)],
}


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e8])
@pytest.mark.parametrize("kind", LENGTHS)
def test_directions_that_the_gram_matrix_hardly_resolves(kind, scale):
    """They count as much as the others where the damping is not smaller than the rounding."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, 64)))[0] for n in (64, 500))
    rows = np.float32(scale * (left * LENGTHS[kind]) @ right.T)
    residuals = np.float32(rng.normal(size=64))
    wide = np.float64(rows)
    for share in (1e-4, 1e-2, 1.0):
        damping = np.float32(max(share * scale**2, 1e-30))
        want = wide.T @ np.linalg.solve(wide @ wide.T + np.float64(damping) * np.eye(64), residuals)
        got = np.float64(jgd.natural_gradient(jnp.asarray(rows), jnp.asarray(residuals), damping=damping))
        allowed = 2e-6 + 4 * np.finfo(np.float32).eps / share  # a solver in float32 has some 1 eps
        assert np.linalg.norm(got - want) < allowed * np.linalg.norm(want)
