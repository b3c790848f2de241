"""Descent and ascent: every derivative walks one path, and steps compile once."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from stepping import batch_loss, loss, problem, walk

import jgd


def by_hand(value_and_grad, optimizer, params, steps=5):
    """The oracle: plain optax over JAX's own gradient of the batch."""
    opt_state, values, norms = optimizer.init(params), [], []
    value_and_grad, update = jax.jit(value_and_grad), jax.jit(optimizer.update)
    for _ in range(steps):
        value, grads = value_and_grad(params)
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        values.append(value)
        norms.append(jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))))
    return params, values, norms


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": optax.adamw(0.05, weight_decay=0.1),
    "schedule": optax.adam(optax.cosine_decay_schedule(0.1, 5)),
    "noise": optax.chain(optax.add_noise(0.1, 0.5, 3), optax.sgd(0.1)),
}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "derivative, tolerance",
    [
        ("reverse", 1e-12),
        ("forward", 1e-12),
        (jax.value_and_grad(batch_loss), 1e-12),
        ("finite_difference", 1e-7),
    ],
    ids=["reverse", "forward", "callable", "finite_difference"],
)
def test_every_derivative_walks_the_path_of_plain_optax(x64, derivative, tolerance, optimizer):
    optimizer = OPTIMIZERS[optimizer]
    params, batch = problem(jnp.float64)
    state, infos = walk(jgd.descent(loss, optimizer, derivative=derivative), params, batch)
    expected, values, norms = by_hand(jax.value_and_grad(lambda p: batch_loss(p, *batch)), optimizer, params)
    chex.assert_trees_all_close(state.params, expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose([i.value for i in infos], values, rtol=tolerance)
    np.testing.assert_allclose([i.grad_norm for i in infos], norms, rtol=tolerance, atol=tolerance)
    assert int(state.step) == 5 and state.step.dtype == jnp.int32


@pytest.mark.parametrize("derivative, tolerance", [("forward", 1e-5), ("finite_difference", 2e-3)])
def test_other_derivatives_in_float32(derivative, tolerance):
    params, batch = problem()
    state, _ = walk(jgd.descent(loss, optax.sgd(0.1), derivative=derivative), params, batch, 1)
    expected, _, _ = by_hand(jax.value_and_grad(lambda p: batch_loss(p, *batch)), optax.sgd(0.1), params, 1)
    chex.assert_trees_all_close(state.params, expected, rtol=tolerance, atol=tolerance)


def test_many_parameters_are_differenced_in_chunks(x64):
    # More than one chunk of coordinates, and a chunk that is not full.
    w, x = jnp.linspace(-30, 30, 75), jnp.linspace(0, 1, 150).reshape(2, 75)
    params = {"w": w, "s": jnp.array(2.0)}

    def f(p, x):
        return p["s"] * jnp.sum(jnp.sin(p["w"]) * x)

    def one(derivative):
        return walk(jgd.descent(f, optax.sgd(1.0), derivative=derivative), params, (x,), 1)[0].params

    chex.assert_trees_all_close(one("forward"), one("reverse"), rtol=1e-12, atol=1e-12)
    chex.assert_trees_all_close(one("finite_difference"), one("reverse"), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    "derivative, optimizer",
    [
        *(("reverse", o) for o in OPTIMIZERS),
        *((d, "adamw") for d in ("forward", "finite_difference", "callable")),
    ],
)
def test_ascent_walks_the_path_of_descent_on_the_negative(derivative, optimizer):
    optimizer = OPTIMIZERS[optimizer]
    params, batch = problem()

    def negative(*args):
        return -loss(*args)

    up = down = derivative
    if derivative == "callable":
        up, down = jax.value_and_grad(lambda *a: -batch_loss(*a)), jax.value_and_grad(batch_loss)
    ascended, seen = walk(jgd.ascent(negative, optimizer, derivative=up), params, batch)
    descended, infos = walk(jgd.descent(loss, optimizer, derivative=down), params, batch)
    chex.assert_trees_all_close(ascended.params, descended.params, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(seen, infos, strict=True):
        np.testing.assert_allclose(ours.value, -theirs.value, rtol=1e-5)
        np.testing.assert_allclose(ours.grad_norm, theirs.grad_norm, rtol=1e-5)


def test_weight_decay_still_pulls_to_zero_under_ascent():
    method = jgd.ascent(lambda w, x: 0.0 * w * x, optax.adamw(0.1, weight_decay=0.5))
    state, _ = walk(method, jnp.array(4.0), (jnp.ones(3),), 3)
    np.testing.assert_allclose(state.params, 4.0 * 0.95**3, rtol=1e-6)


@pytest.mark.sample(lambda total, sign: (total, sign) == ("sum", -1))
@pytest.mark.parametrize("total, objective", [("mean", jnp.mean), ("sum", jnp.sum)], ids=["mean", "sum"])
@pytest.mark.parametrize("make, sign", [(jgd.descent, 1), (jgd.ascent, -1)], ids=["descent", "ascent"])
def test_lbfgs_walks_its_own_path_and_converges(x64, total, objective, make, sign):
    params, batch = problem(jnp.float64)

    def of_batch(p):
        return objective(jax.vmap(loss, (None, 0, 0))(p, *batch))

    def signed(*args):
        return sign * loss(*args)

    state, infos = walk(make(signed, optax.lbfgs(), total=total), params, batch, 12)

    @jax.jit
    def by_hand(params, opt_state):
        value, grad = jax.value_and_grad(of_batch)(params)
        updates, opt_state = optax.lbfgs().update(
            grad, opt_state, params, value=value, grad=grad, value_fn=of_batch
        )
        return optax.apply_updates(params, updates), opt_state

    expected, opt_state = params, optax.lbfgs().init(params)
    for _ in range(12):
        expected, opt_state = by_hand(expected, opt_state)
    chex.assert_trees_all_close(state.params, expected, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(sign * infos[0].value, of_batch(params), rtol=1e-12)
    assert sign * infos[-1].value < 0.1 * sign * infos[0].value


@pytest.mark.sample(lambda derivative: derivative in ("reverse", "forward"))
@pytest.mark.parametrize(
    "derivative", ["reverse", "forward", "finite_difference", jax.value_and_grad(batch_loss)]
)
def test_line_search_with_every_derivative(derivative):
    params, batch = problem()
    _, infos = walk(jgd.descent(loss, optax.lbfgs(), derivative=derivative), params, batch, 8)
    assert infos[-1].value < 0.2 * infos[0].value


def test_reduce_on_plateau_sees_the_value():
    # The loss cannot improve, so the patience runs out and the scale falls by the factor.
    optimizer = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(factor=0.5, patience=2))
    state, _ = walk(jgd.descent(lambda w, x: 0 * w + x, optimizer), jnp.array(1.0), (jnp.ones(2),), 6)
    assert float(optax.tree.get(state.opt_state, "scale")) == 0.25
    params, batch = problem()
    state, infos = walk(jgd.descent(loss, optimizer), params, batch, 20)
    assert infos[-1].value < infos[0].value


def test_ascent_passes_the_optimizer_the_negative_of_everything():
    def update(updates, state, params=None, *, value, grad, value_fn):
        return updates, (updates, value, grad, value_fn(params))

    spy = optax.GradientTransformationExtraArgs(lambda p: (p, jnp.zeros(()), p, jnp.zeros(())), update)
    state, info = walk(jgd.ascent(lambda w, x: 3 * w * x, spy), jnp.array(2.0), (jnp.ones(4),), 1)
    updates, value, grad, again = state.opt_state
    assert (float(updates), float(value), float(grad), float(again)) == (-3, -6, -3, -6)
    assert float(info[0].value) == 6


class TestReduce:
    def test_clipped_sum(self):
        params, batch = problem()
        clip = functools.partial(jgd.clipped_sum, max_norm=0.5)
        state, (info,) = walk(jgd.descent(loss, optax.sgd(1.0), reduce=clip), params, batch, 1)
        each = jax.vmap(jax.grad(loss), (None, 0, 0))(params, *batch)
        norms = np.sqrt(sum((np.asarray(g).reshape(7, -1) ** 2).sum(1) for g in jax.tree.leaves(each)))
        scale = np.minimum(1, 0.5 / norms)
        assert (scale < 1).any()
        expected = jax.tree.map(lambda p, g: p - np.einsum("b,b...->...", scale, g), params, each)
        chex.assert_trees_all_close(state.params, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(info.value, batch_loss(params, *batch), rtol=1e-5)

    def test_a_users_own(self):
        params, batch = problem()

        def median(grads):
            return jax.tree.map(lambda g: jnp.median(g, axis=0), jgd.materialize(grads))

        state, _ = walk(jgd.descent(loss, optax.sgd(1.0), reduce=median), params, batch, 1)
        each = jax.vmap(jax.grad(loss), (None, 0, 0))(params, *batch)
        expected = jax.tree.map(lambda p, g: p - np.median(g, axis=0), params, each)
        chex.assert_trees_all_close(state.params, expected, rtol=1e-5, atol=1e-6)

    def test_sum_is_the_sum(self):
        params, batch = problem()
        _, (total,) = walk(jgd.descent(loss, optax.sgd(1.0), total="sum"), params, batch, 1)
        _, (mean,) = walk(jgd.descent(loss, optax.sgd(1.0)), params, batch, 1)
        np.testing.assert_allclose(total.value, 7 * mean.value, rtol=1e-5)
        np.testing.assert_allclose(total.grad_norm, 7 * mean.grad_norm, rtol=1e-5)

    @pytest.mark.parametrize("derivative", ["forward", "finite_difference", jax.value_and_grad(batch_loss)])
    def test_is_refused_where_only_the_batch_is_known(self, derivative):
        with pytest.raises(
            ValueError, match=r"`reduce` needs the gradient of each example, but `derivative`="
        ):
            jgd.descent(loss, optax.sgd(0.1), reduce=jgd.sum, derivative=derivative)

    def test_that_does_not_reduce(self):
        params, batch = problem()
        method = jgd.descent(loss, optax.sgd(0.1), reduce=jgd.materialize)
        with pytest.raises(
            ValueError, match=r"`reduce` or `derivative` returned has `gradient\['b'\]` of shape \(7, 4\)"
        ):
            method.step(method.init(params), *batch)
        method = jgd.descent(loss, optax.sgd(0.1), reduce=jgd.norms)
        with pytest.raises(ValueError, match="must be a pytree like the parameters"):
            method.step(method.init(params), *batch)


@pytest.mark.parametrize("derivative", ["reverse", "forward", "finite_difference"])
def test_aux_and_shared_arguments(derivative):
    def weighted(params, x, y, scale):
        value = scale["s"] * loss(params, x, y)
        return value, {"x": x, "value": value}

    params, (x, y) = problem()
    method = jgd.descent(
        weighted, optax.sgd(0.1), derivative=derivative, in_axes=(None, 1, 0, None), has_aux=True
    )
    _, (info,) = walk(method, params, (x.T, y, {"s": jnp.array(3.0)}), 1)
    chex.assert_trees_all_close(info.aux["x"], x)
    np.testing.assert_allclose(info.aux["value"], 3 * jax.vmap(loss, (None, 0, 0))(params, x, y), rtol=1e-5)
    np.testing.assert_allclose(info.value, 3 * batch_loss(params, x, y), rtol=1e-5)


def test_aux_of_a_users_own_derivative():
    params, batch = problem()
    derivative = jax.value_and_grad(lambda p, x, y: (batch_loss(p, x, y), y.sum()), has_aux=True)
    _, (info,) = walk(jgd.descent(loss, optax.lbfgs(), derivative=derivative, has_aux=True), params, batch, 1)
    np.testing.assert_allclose(info.aux, batch[1].sum())


class TestCompilation:
    def test_once_a_batch_shape(self):
        chex.clear_trace_counter()
        optimizer = optax.adam(0.1)
        update = chex.assert_max_traces(optimizer.update, n=2)
        counted = optax.GradientTransformation(optimizer.init, update)
        # Python floats and numpy arrays go in, so that weak types and hosts could tempt a second trace.
        params = {"w": np.ones((3, 4), np.float32), "b": jnp.zeros(4), "v": jnp.ones(4), "unused": 1.0}
        _, (x, y) = problem()
        method = jgd.descent(loss, counted)
        state = method.init(params)
        for _ in range(3):
            state, _ = method.step(state, x, y)
        for _ in range(3):
            state, _ = method.step(state, x[:5], y[:5])  # the one other shape
        with pytest.raises(AssertionError):
            method.step(state, x[:4], y[:4])

    @pytest.mark.parametrize(
        "optimizer", [optax.lbfgs(), optax.contrib.reduce_on_plateau(), *OPTIMIZERS.values()]
    )
    def test_the_state_keeps_its_types(self, optimizer):
        params, batch = problem()
        method = jgd.descent(loss, optimizer)
        before = method.init(params)
        after, _ = method.step(before, *batch)

        def types(tree):
            return jax.tree.map(lambda x: (x.shape, x.dtype, x.aval.weak_type), tree)

        assert types(before) == types(after)

    def test_step_leaves_the_state_intact(self):
        params, batch = problem()
        method = jgd.descent(loss, optax.adam(0.1))
        state = method.init(params)
        first, _ = method.step(state, *batch)
        again, _ = method.step(state, *batch)
        chex.assert_trees_all_equal(first, again)

    @pytest.mark.sample(lambda transform: transform in ("vmap", "scan"))
    @pytest.mark.parametrize("transform", ["disable_jit", "jit", "vmap", "scan"])
    def test_inside_transformations(self, transform):
        params, (x, y) = problem()
        method = jgd.descent(loss, optax.adam(0.1))
        expected, _ = walk(method, params, (x, y), 2)
        state = method.init(params)

        def run(state):
            return method.step(method.step(state, x, y)[0], x, y)[0]

        if transform == "disable_jit":
            with jax.disable_jit():
                got = run(state)
        elif transform == "jit":
            got = jax.jit(run)(state)
        elif transform == "scan":
            got, _ = jax.lax.scan(lambda s, _: method.step(s, x, y), state, length=2)
        else:
            many = jax.vmap(run)(jax.tree.map(lambda a: jnp.stack([a, a]), state))
            got = jax.tree.map(lambda a: a[1], many)
        chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)

    def test_half_precision_reports_in_float32(self):
        params, batch = problem(jnp.bfloat16)
        state, infos = walk(jgd.descent(loss, optax.adam(0.1)), params, batch, 3)
        assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(state.params))
        assert infos[0].value.dtype == infos[0].grad_norm.dtype == jnp.float32
        _, (exact,) = walk(jgd.descent(loss, optax.adam(0.1)), *problem(), 1)
        np.testing.assert_allclose(infos[0].grad_norm, exact.grad_norm, rtol=0.05)
