"""What was compiled for a loss serves again as long as what it traces to is the same."""

import gc
import weakref

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from compilations import compilations
from flax import nnx
from internals import bind, trace, trace_module
from jax.ad_checkpoint import checkpoint_name

import jgd

X = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
P = np.random.default_rng(1).normal(size=6).astype("float32")


def close(got, want):
    oracle.assert_close(got, jax.tree.map(np.asarray, want), 1e-4)


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


@pytest.mark.sample(lambda loss: list(LOSSES).index(loss) % 2 == 0)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_a_second_call_compiles_nothing(loss):
    def ask(loss):
        grads = jgd.per_example_grad(loss)(P, X)
        return jgd.norms(grads), jgd.clipped_sum(grads, 1.0), jgd.materialize(grads)

    close(ask(loss)[2], jax.vmap(jax.grad(loss), (None, 0))(P, X))
    with compilations() as made:
        ask(loss)
        ask(lambda p, x: loss(p, x))  # what was traced counts, not the function
    assert not made


def a_module(key):
    net = eqx.nn.Sequential([eqx.nn.Linear(6, 6, key=key), eqx.nn.LayerNorm(6), eqx.nn.Lambda(jax.nn.relu)])
    params, static = eqx.partition(net, eqx.is_inexact_array)
    return lambda params, x: jnp.sum(jax.nn.softmax(eqx.combine(params, static)(x)) ** 2), params


def a_module_of_flax(key):
    net = nn.Sequential([nn.Dense(6), nn.LayerNorm(), nn.swish, nn.Dense(3)])
    return lambda params, x: jnp.sum(nn.softmax(net.apply(params, x)) ** 2), dict(net.init(key, jnp.ones(6)))


def a_module_of_nnx(key):
    net = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
    graph, params = nnx.split(net, nnx.Param)
    return lambda params, x: jnp.sum(nnx.softmax(nnx.merge(graph, params)(x)) ** 2), params


def a_module_of_haiku(key):
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([6, 3])(x)))
    return lambda params, x: jnp.sum(jax.nn.softmax(net.apply(params, x)) ** 2), net.init(key, jnp.ones(6))


@pytest.mark.parametrize("make", [a_module, a_module_of_flax, a_module_of_nnx, a_module_of_haiku])
def test_a_framework_s_model_made_again_compiles_nothing(make, key):
    ask = lambda loss, params: jgd.norms(jgd.per_example_grad(loss)(params, X))
    first = ask(*make(key))
    again = make(key)
    with compilations() as made:
        oracle.assert_close(ask(*again), np.asarray(first), 0)
    assert not made


def test_another_value_of_what_a_loss_closes_over_compiles_nothing():
    def ask(closed):
        return jgd.materialize(jgd.per_example_grad(lambda p, x: jnp.sum(jnp.sin(p * x) * closed))(P, X))

    one = ask(jnp.ones(6))
    with compilations() as made:
        two = ask(np.full(6, 2, np.float32))
    assert not made
    close(two, 2 * one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (0.0, -0.0),
        (1.0, 1),
        (1.0, True),
        (np.float32(1), np.float32(2)),
        (float("nan"), 1.0),
        (1, np.int32(1)),
    ],
    ids=str,
)
def test_what_python_takes_for_equal_may_be_another_program(one, other):
    """1 / -0.0 is another infinity, and a weak type promotes in another way."""

    def ask(number):
        loss = lambda p, x: jnp.sum(jnp.where(p > 9, number, 1.0) + jnp.sin(p * x)) + jnp.sum(p / number) * 0
        return trace(bind(loss, (P, X), argnums=0, in_axes=None, has_aux=False)).program

    assert ask(one) is not ask(other)
    assert ask(one) is ask(one)


def test_options_that_change_a_program_are_told_apart():
    def ask(loss=softmax):
        return trace(bind(loss, (P, X), argnums=0, in_axes=None, has_aux=False)).program

    first = ask()
    assert ask() is first
    for changed in (
        jax.enable_x64(True),
        jax.default_matmul_precision("float32"),
        jax.numpy_dtype_promotion("strict"),
        jax.threefry_partitionable(False),
    ):
        with changed:
            other = ask()
            assert other is not first and ask() is other
    assert ask() is first
    other = lambda p, x: jax.named_call(softmax, name="other")(p, x)
    assert ask(other) is first


def test_as_many_programs_are_kept_as_may_be(monkeypatch):
    monkeypatch.setattr(trace_module, "_PROGRAMS_KEPT", 2)
    jax.clear_caches()

    def ask(power):
        loss = lambda p, x: jnp.sum(p * x) ** power
        return trace(bind(loss, (P, X), argnums=0, in_axes=None, has_aux=False)).program

    first, second = ask(2), ask(3)
    assert ask(2) is first
    third = ask(4)
    assert ask(2) is first and ask(4) is third
    dropped = weakref.ref(second)
    del second
    gc.collect()
    assert dropped() is None


def test_clearing_jax_s_caches_drops_all():
    made = weakref.ref(trace(bind(softmax, (P, X), argnums=0, in_axes=None, has_aux=False)).program)
    assert made() is not None
    jax.clear_caches()
    gc.collect()
    assert made() is None
