"""`PerExampleGrads` crosses transformations as a pytree, and is not taken for gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import jgd

REDUCTIONS = [
    jgd.materialize, jgd.sum, jgd.mean, jgd.norms, functools.partial(jgd.norms, per_leaf=True), jgd.gram,
    functools.partial(jgd.clipped_sum, max_norm=1.0), jgd.second_moment, jgd.variance, jgd.noise_scale,
    lambda g: jgd.dot(g, PARAMS), lambda g: jgd.project(g, jax.random.key(0), 3),
]  # fmt: skip
PARAMS = {"w": jnp.linspace(-1, 1, 12).reshape(4, 3), "b": jnp.ones(3)}
X = jnp.sin(jnp.arange(20.0)).reshape(5, 4)
FORMS = [{"strategy": "factored"}, {"strategy": "materialized"}, {"microbatch_size": 2}]
every_form = pytest.mark.parametrize("options", FORMS, ids=str)


def loss(p, x):
    return jnp.sum(jnp.tanh(x @ p["w"] + p["b"]) ** 2)


def made(options, params=PARAMS):
    return jgd.per_example_grad(loss, **options)(params, X)


def want():
    return jax.vmap(jax.grad(loss), (None, 0))(PARAMS, X)


ARITHMETIC = {
    "a norm": lambda g: optax.tree.norm(g),
    "a mean": lambda g: jax.tree.map(lambda x: x.mean(0), g),
    "a scale": lambda g: jax.tree.map(lambda x: 2 * x, g),
    "a sum": lambda g: jax.tree.map(jnp.add, g, g),
    "a sum of all": lambda g: sum(jnp.sum(x) for x in jax.tree.leaves(g)),
    "optax.sgd": lambda g: optax.sgd(0.1).update(g, optax.sgd(0.1).init(PARAMS)),
    "optax.clip": lambda g: optax.clip_by_global_norm(1.0).update(g, optax.EmptyState()),
    "private": lambda g: _private().update(g, _private().init(PARAMS)),
    "clipping": lambda g: optax.per_example_global_norm_clip(jax.tree.leaves(g), 1.0),
    "weighted": lambda g: jax.tree.map(lambda x: jnp.tensordot(jnp.ones(5), x, 1), g),
    "jax.grad": lambda g: jax.grad(lambda g: jnp.sum(g.values))(g),
}


def _private():
    return optax.contrib.differentially_private_aggregate(1.0, 1.0, 0)


@every_form
@pytest.mark.parametrize("arithmetic", ARITHMETIC.values(), ids=ARITHMETIC)
@pytest.mark.parametrize("under", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_arithmetic_raises(options, arithmetic, under):
    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        under(arithmetic)(made(options))


@every_form
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "change",
    [lambda x: x[None], lambda x: jnp.stack([x, x]), lambda x: x if x.ndim == 0 else x[:2]],
    ids=["an axis more", "stacked", "fewer examples"],
)
def test_a_reduction_of_changed_leaves_names_materialize(options, reduction, change):
    changed = jax.tree.map(change, made(options))
    assert "PerExampleGrads(5 examples, 15 parameters" in repr(changed)
    with pytest.raises(TypeError, match=r"jgd\.materialize"):
        reduction(changed)


@every_form
def test_what_vmap_returns_is_asked_under_vmap(options):
    stacked = jax.vmap(lambda s: made(options, jax.tree.map(lambda p: s * p, PARAMS)))(jnp.ones(3))
    with pytest.raises(TypeError, match=r"jax\.vmap"):
        jgd.norms(stacked)
    oracle.assert_close(jax.vmap(jgd.norms)(stacked)[1], np.asarray(jgd.norms(want())), 1e-5)


CROSSINGS = {
    "jit": lambda make: jax.jit(make)(),
    "twice": lambda make: jax.jit(lambda g: g)(jax.jit(make)()),
    "donated": lambda make: jax.jit(lambda g: g, donate_argnums=0)(jax.tree.map(jnp.copy, jax.jit(make)())),
    "vmap": lambda make: jax.tree.map(lambda x: x[1], jax.vmap(lambda _: make())(jnp.arange(2))),
    "scan": lambda make: jax.lax.scan(lambda g, _: (make(), None), make(), None, length=2)[0],
    "cond": lambda make: jax.lax.cond(jnp.array(True), make, make),
    "checkpoint": lambda make: jax.checkpoint(make)(),
    "flattened": lambda make: jax.tree.unflatten(jax.tree.structure(make()), jax.tree.leaves(make())),
    "stopped": lambda make: jax.tree.map(jax.lax.stop_gradient, make()),
    "device_put": lambda make: jax.device_put(make(), jax.devices()[0]),
}


@every_form
@pytest.mark.parametrize("cross", CROSSINGS.values(), ids=CROSSINGS)
def test_it_crosses(options, cross):
    grads = cross(lambda: made(options))
    assert repr(grads) == repr(made(options))
    oracle.assert_close(jgd.materialize(grads), jax.tree.map(np.asarray, want()), 1e-5)
    oracle.assert_close(jgd.norms(grads), np.asarray(jgd.norms(want())), 1e-5)


@every_form
def test_derivatives_cross_jit(options):
    def ours(p):
        return jnp.sum(jgd.norms(jax.jit(lambda p: made(options, p))(p)) ** 2)

    def theirs(p):
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(jax.vmap(jax.grad(loss), (None, 0))(p, X)))

    for derivative in (jax.grad, jax.jacfwd):
        oracle.assert_close(
            derivative(ours)(PARAMS), jax.tree.map(np.asarray, jax.grad(theirs)(PARAMS)), 1e-4
        )


@every_form
def test_its_repr_never_fails(options):
    grads = made(options)
    shown = repr(grads)
    for leaf in (None, object(), 1.0, "leaf"):
        assert (
            repr(jax.tree.unflatten(jax.tree.structure(grads), [leaf] * len(jax.tree.leaves(grads)))) == shown
        )
    assert repr(jax.eval_shape(lambda g: g, grads)) == shown
    jax.jit(lambda g: repr(g) == shown or 1 / 0)(grads)
