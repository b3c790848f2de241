"""A loss is answered as it is now, and what was compiled for it serves again as long as it is the same."""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx

import jgd

X = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
P = np.random.default_rng(1).normal(size=6).astype("float32")


def want(loss, p=P, x=X):
    """The gradients, by JAX alone, of the loss as it is now."""
    return jax.vmap(jax.grad(lambda p, x: loss(p, x)), (None, 0))(jnp.array(p), jnp.array(x))


# Each makes a loss and two functions that change it: what a loss may refer to, in Python.


def a_global():
    space: dict[str, Any] = {"jnp": jnp}
    exec("def net(p, x): return jnp.sum(p * x) ** 2", space)
    exec("def loss(p, x): return net(p, x)", space)
    loss: Any = space["loss"]
    return loss, lambda: exec("def net(p, x): return 5 * jnp.sum(p * x) ** 2", space)


def a_rebound_variable():
    scale = 1.0

    def loss(p, x):
        return scale * jnp.sum(jnp.sin(p * x))

    def change():
        nonlocal scale
        scale = 3.0

    return loss, change


def a_captured_array():
    table = jnp.arange(6.0)

    def loss(p, x):
        return jnp.sum(jnp.sin(p * x) * table)

    def change():
        nonlocal table
        table = table + 1

    return loss, change


def an_array_of_numpy_changed_in_place():
    table = np.arange(6.0, dtype="float32")
    return lambda p, x: jnp.sum(jnp.sin(p * x) * table), lambda: table.__setitem__(slice(None), 2)


def an_attribute_of_a_bound_method():
    class Model:
        scale = 1.0

        def loss(self, p, x):
            return self.scale * jnp.sum(jnp.sin(p * x))

    model = Model()
    return model.loss, lambda: setattr(model, "scale", 2.0)


def a_dict():
    options = {"power": 2}
    return lambda p, x: jnp.sum(p * x) ** options["power"], lambda: options.update(power=3)


def a_default():
    def loss(p, x, power=2):
        return jnp.sum(p * x) ** power

    return loss, lambda: setattr(loss, "__defaults__", (3,))


def its_code():
    def loss(p, x):
        return jnp.sum(p * x) ** 2

    def other(p, x):
        return jnp.sum(p * x) ** 3

    return loss, lambda: setattr(loss, "__code__", other.__code__)


def what_it_wraps():
    holder = types.SimpleNamespace(f=lambda p, x: jnp.sum(p * x) ** 2)

    @functools.wraps(holder.f)
    def loss(*args):
        return loss.__wrapped__(*args)

    return loss, lambda: setattr(loss, "__wrapped__", lambda p, x: jnp.sum(jnp.cos(p * x)))


def a_partial_of_a_list():
    weights = [1.0]
    return functools.partial(lambda w, p, x: w[0] * jnp.sum(p * x) ** 2, weights), lambda: weights.insert(
        0, 4.0
    )


def the_rule_of_a_custom_jvp():
    factor = 1.0

    @jax.custom_jvp
    def f(x):
        return jnp.sin(x)

    f.defjvp(lambda p, t: (f(p[0]), factor * t[0]))

    def change():
        nonlocal factor
        factor = 7.0

    return lambda p, x: jnp.sum(f(p * x)), change


def the_rule_of_a_custom_vjp():
    factor = jnp.float32(1.0)

    @jax.custom_vjp
    def f(x):
        return jnp.sin(x)

    f.defvjp(lambda x: (f(x), x), lambda x, g: (factor * jnp.clip(g * x, -1, 1),))

    def change():
        nonlocal factor
        factor = jnp.float32(7.0)

    return lambda p, x: jnp.sum(f(p * x)), change


def the_rule_that_a_rule_uses():
    holder = types.SimpleNamespace(factor=1.0)
    inner, f = jax.custom_jvp(jnp.sin), jax.custom_jvp(jnp.cos)
    inner.defjvp(lambda p, t: (inner(p[0]), holder.factor * t[0]))
    f.defjvp(lambda p, t: (f(p[0]), inner(p[0]) * t[0]))

    def slope(p, x):  # a derivative in the loss: the rule of the rule is that of its gradient
        return jnp.sum(jax.jvp(f, (p * x,), (x,))[1])

    return slope, lambda: setattr(holder, "factor", 5.0)


def the_rule_with_symbolic_zeros():
    holder = types.SimpleNamespace(factor=1.0)
    f = jax.custom_jvp(lambda x, y: x * y)

    def rule(primals, tangents):
        (x, y), (dx, dy) = primals, tangents
        told = isinstance(dy, jax.custom_derivatives.SymbolicZero)
        return x * y, (holder.factor if told else 1.0) * dx * y

    f.defjvp(rule, symbolic_zeros=True)
    return lambda p, x: jnp.sum(jnp.sin(f(p, x))), lambda: setattr(holder, "factor", 5.0)


def the_rule_of_a_custom_vmap():
    holder = types.SimpleNamespace(factor=1.0)
    f = jax.custom_batching.custom_vmap(lambda x: 2 * x)
    f.def_vmap(lambda size, batched, x: (holder.factor * x, batched[0]))
    stop = jax.lax.stop_gradient
    return lambda p, x: jnp.sum(p * f(stop(x))), lambda: setattr(holder, "factor", 5.0)


def a_callback():
    holder = types.SimpleNamespace(factor=np.float32(1))

    def loss(p, x):
        made = jax.pure_callback(
            lambda x: holder.factor * np.asarray(x),
            jax.ShapeDtypeStruct((6,), x.dtype),
            x,
            vmap_method="sequential",
        )
        return jnp.sum(jnp.sin(p * made))

    return loss, lambda: setattr(holder, "factor", np.float32(3))


CHANGES = [
    a_global, a_rebound_variable, a_captured_array, an_array_of_numpy_changed_in_place,
    an_attribute_of_a_bound_method, a_dict, a_default, its_code, what_it_wraps, a_partial_of_a_list,
    the_rule_of_a_custom_jvp, the_rule_of_a_custom_vjp, the_rule_that_a_rule_uses, the_rule_with_symbolic_zeros,
    the_rule_of_a_custom_vmap, a_callback,
]  # fmt: skip
every_change = pytest.mark.parametrize("changing", CHANGES, ids=lambda f: f.__name__)


def close(got, want):
    oracle.assert_close(got, jax.tree.map(np.asarray, want), 1e-4)


# Each change in one of the ways, the next one in another.
WAYS = [{}, {"strategy": "factored"}, {"microbatch_size": 2}]


@pytest.mark.sample(lambda changing, options: options is WAYS[list(CHANGES).index(changing) % len(WAYS)])
@every_change
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_loss_that_has_changed_is_answered_as_it_is_now(changing, options):
    loss, change = changing()
    g = jgd.per_example_grad(loss, **options)
    close(jgd.materialize(g(P, X)), want(loss))
    before = want(loss)
    change()
    after = want(loss)
    assert not np.allclose(before, after), "the change makes no difference"
    grads = g(P, X)
    close(jgd.materialize(grads), after)
    close(jgd.norms(grads), jnp.linalg.norm(after, axis=1))
    close(grads.values, jax.vmap(lambda x: loss(P, x))(X))


# Wherever it is asked


def by_a_new_jit(loss):
    return jax.jit(lambda p, x: jgd.materialize(jgd.per_example_grad(loss)(p, x)))(P, X)


def by_a_vmap(loss):
    return jax.vmap(lambda p: jgd.materialize(jgd.per_example_grad(loss)(p, X)))(
        jnp.stack([jnp.array(P)] * 2)
    )[0]


def by_a_derivative(loss):
    summed = lambda p: jnp.sum(jgd.per_example_grad(loss)(p, X).values)
    return jgd.materialize(jgd.per_example_grad(loss)(P, X)), jax.grad(summed)(jnp.array(P))


def by_a_new_method(loss, **options):
    method = jgd.descent(loss, optax.sgd(1.0), **options)
    return P - method.step(method.init(P), X)[0].params


def by_fit(loss, callback=None):
    method = jgd.descent(loss, optax.sgd(1.0))
    return (
        P - jgd.fit(method, P, X, steps=1, key=jax.random.key(0), batch_size=None, callback=callback).params
    )


def by_the_clock(loss):
    return jgd.materialize(jgd.per_example_grad(loss, autotune=jgd.norms)(P, X))


def by_a_memory_limit(loss):
    return jgd.materialize(jgd.per_example_grad(loss, max_memory=1 << 30)(P, X))


PLACES = [
    (by_a_new_jit, lambda g: g),
    (by_a_vmap, lambda g: g),
    (by_a_derivative, lambda g: (g, g.sum(0))),
    (by_a_new_method, lambda g: g.mean(0)),
    (functools.partial(by_a_new_method, derivative="forward"), lambda g: g.mean(0)),
    (functools.partial(by_a_new_method, microbatch_size=2), lambda g: g.mean(0)),
    (functools.partial(by_a_new_method, autotune=True), lambda g: g.mean(0)),
    (by_fit, lambda g: g.mean(0)),
    (functools.partial(by_fit, callback=lambda *_: None), lambda g: g.mean(0)),
    (by_the_clock, lambda g: g),
    (by_a_memory_limit, lambda g: g),
]


@pytest.mark.parametrize(
    "changing", [a_global, a_captured_array, the_rule_of_a_custom_jvp], ids=lambda f: f.__name__
)
@pytest.mark.parametrize(("ask", "shape"), PLACES, ids=lambda f: getattr(f, "__name__", None))
def test_wherever_a_changed_loss_is_asked(changing, ask, shape):
    loss, change = changing()
    close(ask(loss), shape(want(loss)))
    change()
    close(ask(loss), shape(want(loss)))


def test_explain_tells_of_the_loss_as_it_is_now():
    body = lambda w, x: jnp.sum(jnp.tanh(x @ w))
    loss = lambda w, x: body(w, x)
    w, x = jnp.ones((6, 5)), jnp.ones((4, 6))
    first = jgd.explain(loss, w, x)
    assert str(jgd.explain(loss, w, x)) == str(first)
    body = lambda w, x: jnp.sum(jnp.tanh(x @ w) + w[0] * 2)
    assert len(jgd.explain(loss, w, x).rows) > len(first.rows)


def test_what_jit_has_compiled_stays_as_jit_has_it():
    """A compiled function of the user's, and a method's step, are what `jax.jit` makes of them."""
    loss, change = a_global()
    compiled = jax.jit(lambda p, x: jgd.materialize(jgd.per_example_grad(loss)(p, x)))
    method = jgd.descent(loss, optax.sgd(1.0))
    step = lambda: P - method.step(method.init(P), X)[0].params
    before = want(loss)
    close(compiled(P, X), before)
    close(step(), before.mean(0))
    change()
    close(compiled(P, X), before)
    close(step(), before.mean(0))


def test_a_module_split_again_is_answered_as_it_is_now():
    net: Any = nnx.Linear(6, 6, rngs=nnx.Rngs(0))

    def ask():
        graph, params, rest = nnx.split(net, nnx.Param, ...)
        loss = lambda params, x: jnp.sum(nnx.merge(graph, params, rest)(x) ** net.power)
        gradients = jgd.materialize(jgd.per_example_grad(loss)(params, X))
        return gradients, jax.vmap(jax.grad(loss), (None, 0))(params, X)

    for power in (2, 3):
        net.power = power
        close(*ask())
        net.kernel[...] = 2 * net.kernel[...]
        close(*ask())


@pytest.mark.parametrize("options", [{}, {"strategy": "factored"}, {"microbatch_size": 2}], ids=str)
def test_arrays_of_numpy_are_taken_as_they_are_when_given(options):
    p, x, shared = np.copy(P), np.tile(X, (64, 64)), np.ones(384, np.float32)
    p = np.tile(p, 64)
    loss = lambda p, x, s: jnp.sum(jnp.sin(p * x) * s)
    before = jax.vmap(jax.grad(loss), (None, 0, None))(*map(jnp.array, (p, x, shared)))
    grads = jgd.per_example_grad(loss, in_axes=(None, 0, None), **options)(p, x, shared)
    for array in (p, x, shared):
        array[:] = 7
    close(jgd.materialize(grads), before)


def test_the_rule_of_a_rule_counts_where_answers_are_differentiated():
    holder = types.SimpleNamespace(factor=1.0)
    inner, f = jax.custom_jvp(jnp.sin), jax.custom_jvp(jnp.cos)
    inner.defjvp(lambda p, t: (inner(p[0]), holder.factor * t[0]))
    f.defjvp(lambda p, t: (f(p[0]), inner(p[0]) * t[0]))
    loss = lambda p, x: jnp.sum(f(p * x))

    def slopes(p):
        ours = jax.grad(lambda p: jnp.sum(jgd.norms(jgd.per_example_grad(loss)(p, X)) ** 2))
        theirs = jax.grad(lambda p: jnp.sum(jax.vmap(jax.grad(loss), (None, 0))(p, X) ** 2))
        return ours(p), theirs(p)

    close(*slopes(jnp.array(P)))
    holder.factor = 5.0
    close(*slopes(jnp.array(P)))
    jgd.norms(jgd.per_example_grad(loss)(P, X))
    holder.factor = 9.0
    jgd.norms(jgd.per_example_grad(loss)(P, X))
    close(*slopes(jnp.array(P)))
