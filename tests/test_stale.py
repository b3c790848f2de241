"""A loss is answered as it is now, and what was compiled for it serves again as long as it is the same."""

import contextlib
import functools
import types

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.ad_checkpoint import checkpoint_name

import jgd

_compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: _compiled.append(event) if event == _COMPILED else None
)
_COMPILED = "/jax/core/compile/backend_compile_duration"

X = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
P = np.random.default_rng(1).normal(size=6).astype("float32")


@contextlib.contextmanager
def compilations():
    """Counts what is compiled inside."""
    found = _compiled[len(_compiled) :]
    start = len(_compiled)
    yield found
    found += _compiled[start:]


def want(loss, p=P, x=X):
    """The gradients, by JAX alone, of the loss as it is now."""
    return jax.vmap(jax.grad(lambda p, x: loss(p, x)), (None, 0))(jnp.array(p), jnp.array(x))


# Each makes a loss and two functions that change it: what a loss may refer to, in Python.


def a_global():
    space = {"jnp": jnp}
    exec("def net(p, x): return jnp.sum(p * x) ** 2", space)
    exec("def loss(p, x): return net(p, x)", space)
    return space["loss"], lambda: exec("def net(p, x): return 5 * jnp.sum(p * x) ** 2", space)


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


@every_change
@pytest.mark.parametrize("options", [{}, {"strategy": "factored"}, {"microbatch_size": 2}], ids=str)
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


# What is the same is compiled once.


def relu(p, x):
    return jnp.sum(jax.nn.relu(p * x - 0.1))


def softmax(p, x):
    return -jnp.log(jax.nn.softmax(p * x)[0]) + jax.nn.logsumexp(jax.nn.gelu(p * x))


def scanned(p, x):
    return jnp.sum(jax.lax.scan(lambda c, s: (jnp.tanh(c + s), jax.nn.relu(c)), p * x, jnp.ones(3))[1])


def checkpointed(p, x):
    named = jax.checkpoint_policies.save_only_these_names("a")
    some = lambda p: jnp.sum(jnp.sin(checkpoint_name(jnp.cos(p * x), "a")))
    return jax.checkpoint(some, policy=named)(p) + jax.checkpoint(some)(p)


def custom(p, x):
    @jax.custom_vjp
    def f(x, k):
        return jnp.sin(x) * k

    f.defvjp(lambda x, k: (f(x, k), x), lambda x, g: (jnp.clip(g, -0.1, 0.1) * jnp.cos(x), None))
    return jnp.sum(f(p * x, 3))


def custom_gradient(p, x):
    return jnp.sum(jax.custom_gradient(lambda x: (jnp.sin(x), lambda g: g * jnp.cos(x)))(p * x))


def own_rule(p, x):
    f = jax.custom_jvp(jnp.exp)
    f.defjvp(lambda p, t: (f(*p), f(*p) * t[0]))  # which uses itself
    return jnp.sum(f(p * x))


def solved(p, x):
    a = jnp.diag(1 + jnp.square(x))
    return jnp.sum(jnp.linalg.solve(a, p)) + jnp.sum(jax.scipy.sparse.linalg.cg(a, p)[0])


def branched(p, x):
    grown = jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, 2 * c[1]), (0, x))[1]
    return jax.lax.cond(x[0] > 0, lambda p: jnp.sum(p * grown), lambda p: jnp.sum(jnp.sin(p)), p)


def entropy(p, x):
    logits = jnp.stack([p * x, p + x])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array([0, 1]))
    return jnp.sum(losses) + jnp.sum(
        optax.safe_softmax_cross_entropy(logits, jax.nn.one_hot(jnp.array([0, 1]), 6))
    )


def closes_over_arrays(p, x):
    helper = jax.jit(lambda x: x @ np.eye(6, dtype="float32"))
    return jnp.sum(helper(p * x) * np.arange(6.0, dtype="float32")) + optax.huber_loss(jnp.sum(p * x))


def draws(p, x):
    return jnp.sum(p * x * jax.random.normal(jax.random.key(0), (6,)))


def calls_back(p, x):
    made = jax.pure_callback(np.sin, jax.ShapeDtypeStruct((6,), x.dtype), x, vmap_method="expand_dims")
    return jnp.sum(jnp.sin(p * made))


LOSSES = [
    relu, softmax, scanned, checkpointed, custom, custom_gradient, own_rule, solved, branched, entropy,
    closes_over_arrays, draws, calls_back,
]  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_a_second_call_compiles_nothing(loss):
    def ask(loss):
        grads = jgd.per_example_grad(loss)(P, X)
        return jgd.norms(grads), jgd.clipped_sum(grads, 1.0), jgd.materialize(grads)

    close(ask(loss)[2], want(loss))
    with compilations() as made:
        ask(loss)
        ask(lambda p, x: loss(p, x))  # what was traced counts, not the function
    assert not made
