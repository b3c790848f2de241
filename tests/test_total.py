"""How the losses of a batch make the objective is what `total` says, and nothing is inferred from `reduce`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jgd

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(5, 3)), RNG.normal(size=5)
W = RNG.normal(size=3)
WEIGHTS = np.array([0.5, 0.0, 2.0, 1.0, 1.5])
TOTALS = {"mean": jnp.mean, "sum": jnp.sum}

pytestmark = pytest.mark.usefixtures("x64")


def loss(w, x, y):
    return jnp.sin(x @ w - y) + (x @ w) ** 2


def losses(w):
    """By NumPy: nothing of the library, nor of JAX."""
    return np.sin(X @ w - Y) + (X @ w) ** 2


def gradients(w):
    return (np.cos(X @ w - Y) + 2 * (X @ w))[:, None] * X


def summed(grads, weights=None):
    return jgd.sum(grads, weights)


def spy():
    """An optimizer that leaves the parameters alone, and keeps what it is told."""

    def update(updates, state, params=None, *, value, grad, value_fn):
        return jnp.zeros_like(updates), (updates, value, grad, value_fn(params), value_fn(2 * params))

    zero = jnp.zeros(())
    return optax.GradientTransformationExtraArgs(lambda p: (p, zero, p, zero, zero), update)


def told(make=jgd.descent, weights=None, **options):
    method = make(loss, spy(), **options)
    state, info = method.step(method.init(jnp.asarray(W)), jnp.asarray(X), jnp.asarray(Y), weights=weights)
    return info, state.opt_state


def of_batch(total, values, weights=None):
    if weights is None:
        return values.mean(0) if total == "mean" else values.sum(0)
    return np.tensordot(weights, values, 1) / (weights.sum() if total == "mean" else 1)


def close(got, want, tolerance=1e-12):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


REDUCTIONS = {
    "default": (None, of_batch),
    "mean": (jgd.mean, lambda _, *args: of_batch("mean", *args)),
    "sum": (jgd.sum, lambda _, *args: of_batch("sum", *args)),
    "partial": (functools.partial(jgd.sum), lambda _, *args: of_batch("sum", *args)),
    "own": (summed, lambda _, *args: of_batch("sum", *args)),
}


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize("total", TOTALS)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_it_decides_the_value_whatever_the_reduction_is(name, total, weights):
    reduce, gradient = REDUCTIONS[name]
    info, (updates, value, grad, again, elsewhere) = told(total=total, reduce=reduce, weights=weights)
    want = of_batch(total, losses(W), weights)
    close([info.value, value, again], [want] * 3)
    close(elsewhere, of_batch(total, losses(2 * W), weights))
    want = gradient(total, gradients(W), weights)
    close(updates, want)
    close(grad, want)
    close(info.grad_norm, np.linalg.norm(want))


def test_by_default_it_is_the_mean():
    info, (updates, *_) = told()
    close(info.value, losses(W).mean())
    close(updates, gradients(W).mean(0))


@pytest.mark.parametrize("total", TOTALS)
@pytest.mark.parametrize(
    ("derivative", "tolerance"),
    [("reverse", 1e-12), ("forward", 1e-12), ("finite_difference", 1e-8), ("callable", 1e-12)],
)
def test_every_derivative_follows_it(derivative, tolerance, total):
    if derivative == "callable":
        derivative = jax.value_and_grad(lambda w, x, y: TOTALS[total](jax.vmap(loss, (None, 0, 0))(w, x, y)))
    info, (updates, value, grad, again, elsewhere) = told(total=total, derivative=derivative)
    close([info.value, value, again], [of_batch(total, losses(W))] * 3)
    close(elsewhere, of_batch(total, losses(2 * W)))
    close(updates, of_batch(total, gradients(W)), tolerance)
    close(grad, updates)


@pytest.mark.parametrize("derivative", ["reverse", "forward", "finite_difference"])
def test_absent_examples_count_in_neither(derivative):
    for total in TOTALS:
        info, (updates, *_) = told(total=total, derivative=derivative, weights=WEIGHTS)
        close(info.value, of_batch(total, losses(W), WEIGHTS))
        close(updates, of_batch(total, gradients(W), WEIGHTS), 1e-8)


@pytest.mark.parametrize("total", TOTALS)
def test_ascent_sees_the_same_objective_with_the_other_sign(total):
    info, (updates, value, _, again, _) = told(jgd.ascent, total=total)
    want = of_batch(total, losses(W))
    close([info.value, -value, -again], [want] * 3)
    close(updates, -of_batch(total, gradients(W)))


@pytest.mark.parametrize("total", TOTALS)
def test_descent_ascent_sees_it_in_both_halves(total):
    both = lambda p, x, y: loss(p[0], x, y) - loss(p[1], x, y)
    method = jgd.descent_ascent(both, spy(), spy(), total=total)
    start = (jnp.asarray(W), jnp.asarray(-W))
    state, info = method.step(method.init(start), jnp.asarray(X), jnp.asarray(Y))
    (down, value, *_), (up, negative, *_) = state.opt_state
    want = of_batch(total, losses(W)) - of_batch(total, losses(-W))
    close([info.value, value, -negative], [want] * 3)
    close(down, of_batch(total, gradients(W)))
    close(up, of_batch(total, gradients(-W)))


@pytest.mark.parametrize("options", [{"microbatch_size": 2}, {"autotune": True}], ids=str)
def test_however_the_gradients_are_made(options):
    for total in TOTALS:
        info, (updates, *_) = told(total=total, **options)
        close(info.value, of_batch(total, losses(W)))
        close(updates, of_batch(total, gradients(W)))


@pytest.mark.parametrize("total", TOTALS)
@pytest.mark.parametrize(
    "reduce", [None, jgd.sum, functools.partial(jgd.sum)], ids=["default", "sum", "partial"]
)
def test_a_batch_without_examples(total, reduce):
    """A mean over nothing is nan, or refused; a sum is 0."""
    method = jgd.descent(loss, optax.sgd(0.1), total=total, reduce=reduce)
    step = lambda: method.step(method.init(jnp.asarray(W)), jnp.zeros((0, 3)), jnp.zeros(0))[1]
    if total == "mean" and reduce is None:
        with pytest.raises(ValueError, match=r"holds no examples"):
            step()
    else:
        np.testing.assert_equal(float(step().value), np.nan if total == "mean" else 0.0)


def test_a_forward_derivative_of_a_batch_without_examples():
    method = jgd.descent(loss, optax.sgd(0.1), derivative="forward")
    with pytest.raises(ValueError, match=r"holds no examples: its mean loss is not defined.*total='sum'"):
        method.step(method.init(jnp.asarray(W)), jnp.zeros((0, 3)), jnp.zeros(0))


def test_lbfgs_of_a_reduction_that_only_looks_different_walks_the_same_path():
    def path(reduce):
        method = jgd.descent(lambda w, x, y: (x @ w - y) ** 2, optax.lbfgs(), total="sum", reduce=reduce)
        state, seen = method.init(jnp.asarray(W)), []
        for _ in range(25):
            state, info = method.step(state, jnp.asarray(X), jnp.asarray(Y))
            seen.append(info.value)
        return np.array(seen), state.params

    values, params = path(jgd.sum)
    best = np.linalg.lstsq(X, Y)
    close(params, best[0], 1e-5)
    assert np.all(np.diff(values[:3]) < 0)
    for reduce in (None, functools.partial(jgd.sum), summed):
        again, ended = path(reduce)
        np.testing.assert_array_equal(again, values)
        np.testing.assert_array_equal(ended, params)


@pytest.mark.parametrize(
    "total",
    ["total", "Mean", "", None, True, jnp.sum, ["mean"]],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
@pytest.mark.parametrize("make", [jgd.descent, jgd.ascent])
def test_another_total_is_refused(make, total):
    with pytest.raises(ValueError, match=r"`total` .* must be one of 'mean', 'sum', got"):
        make(loss, optax.sgd(0.1), total=total)


def test_another_total_of_both_halves_is_refused():
    with pytest.raises(ValueError, match=r"`total` .* must be one of 'mean', 'sum', got 'both'"):
        jgd.descent_ascent(loss, optax.sgd(0.1), optax.sgd(0.1), total="both")


@pytest.mark.parametrize("reduce", [jgd.mean, jgd.sum])
def test_a_reduction_where_only_the_batch_is_known_is_refused(reduce):
    with pytest.raises(ValueError, match="leave `reduce` out and say what the objective is by `total`"):
        jgd.descent(loss, optax.sgd(0.1), reduce=reduce, derivative="forward")


@pytest.mark.parametrize("derivative", ["reverse", "forward"])
def test_a_kept_run_of_another_total_is_refused(tmp_path, derivative):
    def run(**options):
        method = jgd.descent(loss, optax.sgd(0.1), derivative=derivative, **options)
        key = jax.random.key(0)
        return jgd.fit(method, W, (X, Y), batch_size=1, epochs=2, key=key, checkpoint=tmp_path)

    kept = run()
    with pytest.raises(ValueError, match=r"holds another run.*another is the loss, or `total`"):
        run(total="sum")
    np.testing.assert_array_equal(run(total="mean").params, kept.params)
