"""What a newcomer trips over is said in words that help."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import Draw

import jgd

X, Y, W = jnp.asarray(Draw(1)(8, 3), jnp.float32), jnp.ones(8), jnp.ones(3)
KEY = jax.random.key(0)


def squared(w, x, y):
    return 0.5 * (x @ w - y) ** 2


METHOD = jgd.descent(squared, optax.adam(0.1))
grads_of = jgd.per_example_grad


# Losses that were written for a batch


@pytest.mark.parametrize(
    "loss",
    [
        lambda w, x, y: jnp.mean(jnp.sum(x * w, axis=1) - y),
        lambda w, x, y: jnp.mean(jax.vmap(squared, (None, 0, 0))(w, x, y)),
        lambda w, x, y: jnp.mean((x @ w)[: y.shape[0]]),
    ],
    ids=["an axis", "a map", "a shape"],
)
def test_an_error_in_the_loss_says_what_the_loss_was_given(loss):
    method = jgd.descent(loss, optax.sgd(0.1))
    for ask in (lambda: grads_of(loss)(W, X, Y), lambda: method.step(method.init(W), X, Y)):
        with pytest.raises((ValueError, TypeError, IndexError)) as raised:
            ask()
        notes = " ".join(raised.value.__notes__)
        assert "ONE example" in notes and "float32[3], float32[]" in notes


def test_a_name_of_the_batch_says_why_there_is_none():
    loss = lambda w, x: jnp.sum(w * (x - jax.lax.pmean(x, "batch"))) ** 2
    with pytest.raises(NameError, match="unbound axis name") as raised:
        grads_of(loss)(W, X)
    assert "group norm" in " ".join(raised.value.__notes__)


def normalised(x, axis=0):
    return (x - jnp.mean(x, axis)) / jnp.sqrt(jnp.var(x, axis) + 1e-5)


STATISTICS = {
    "of the example": lambda w, x: jnp.sum(jnp.tanh(normalised((x @ w)[None]))),
    "kept": lambda w, x: (lambda h: jnp.sum(jnp.tanh(h - h.mean(0, keepdims=True))))((x @ w)[None]),
    "in a jit": lambda w, x: jax.jit(lambda h: jnp.sum(jnp.tanh(normalised(h))))((x @ w)[None]),
}
NONE = {
    "a layer norm": lambda w, x: jnp.sum(jnp.tanh(normalised(x @ w))),
    "over positions too": lambda w, x: jnp.sum(
        jnp.tanh(jax.nn.standardize((x @ w)[None, :, None], axis=(0, 1)))
    ),
    "a softmax of one": lambda w, x: jnp.sum(jax.nn.softmax((x @ w)[None], axis=0) * (x @ w)),
    "a mean of one": lambda w, x: jnp.mean((x @ w)[None], axis=0)[0],
    "a mean of a parameter": lambda w, x: jnp.sum((w[:1] - w[:1].mean(0)) + x @ w),
    "a mean of what is given": lambda w, x: jnp.sum((x[:1] - x[:1].mean(0)) + x @ w),
    "neighbours": lambda w, x: jnp.sum((x @ w)[None].sum(0, keepdims=True) - (x @ w)[None]),
    "itself": lambda w, x: jnp.sum((x @ w) - (x @ w)),
}


@pytest.mark.parametrize("kind", STATISTICS)
def test_a_batch_statistic_of_one_example_is_a_warning(kind):
    with pytest.warns(UserWarning, match="batch statistic"):
        grads_of(STATISTICS[kind])(jnp.ones((3, 4)), X)


@pytest.mark.parametrize("kind", NONE)
def test_what_is_no_batch_statistic_is_none(kind, recwarn):
    jgd.norms(grads_of(NONE[kind])(jnp.ones((3, 4)), X))
    assert not [one for one in recwarn if "batch statistic" in str(one.message)]


def test_flax_batch_norm_is_a_warning():
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))

    state = Net().init(KEY, X)
    rest = {"batch_stats": state["batch_stats"]}
    loss = lambda p, x: jnp.sum(Net().apply({"params": p} | rest, x[None], mutable=["batch_stats"])[0] ** 2)
    with pytest.warns(UserWarning, match="batch statistic"):
        grads_of(loss)(state["params"], X)


# Arguments by name


def test_arguments_by_name_are_mapped_as_by_vmap():
    loss = lambda w, x, *, y, mask: mask * squared(w, x, y)
    mask = jnp.arange(8.0)
    want = jax.vmap(jax.grad(lambda w, x, y, mask: mask * squared(w, x, y)), (None, 0, 0, 0))(W, X, Y, mask)
    for options in (
        {},
        {"in_axes": (None, 0)},
        {"argnums": 0, "strategy": "materialized"},
        {"microbatch_size": 3},
    ):
        got = jgd.materialize(grads_of(loss, **options)(W, X, mask=mask, y=Y))
        np.testing.assert_allclose(got, want, rtol=1e-5)
    other = jgd.materialize(grads_of(lambda x, w, *, y: squared(w, x, y), argnums=1)(X, W, y=Y))
    np.testing.assert_allclose(other, jax.vmap(jax.grad(squared), (None, 0, 0))(W, X, Y), rtol=1e-5)
    with pytest.raises(ValueError, match="disagree in length"):
        grads_of(loss)(W, X, y=Y[:3], mask=mask)
    with pytest.raises(ValueError, match="give the parameters by their place"):
        grads_of(lambda x, w: jnp.sum(x @ w), argnums=1)(X, w=W)
    with pytest.raises(ValueError, match="give the parameters by their place"):
        grads_of(squared)(w=W, x=X, y=Y)


# Keys, devices, memory that was given away, modes


@pytest.mark.parametrize("key", [0, None, "key", jnp.zeros((3, 2), jnp.uint32), jax.random.split(KEY, 3)])
def test_what_is_no_key(key):
    with pytest.raises(TypeError, match="`key` must be one PRNG key"):
        jgd.fit(METHOD, W, (X, Y), batch_size=2, epochs=1, key=key)


def test_a_key_of_either_kind():
    for key in (KEY, jax.random.PRNGKey(0)):
        jgd.fit(METHOD, W, (X, Y), batch_size=2, epochs=1, key=key)


def test_arrays_on_different_devices():
    first, second = jax.devices()[:2]
    params, x = jax.device_put(W, first), jax.device_put(X, second)
    for ask in (
        lambda: grads_of(squared)(params, x, Y),
        lambda: jgd.fit(METHOD, params, (x, Y), batch_size=2, epochs=1, key=KEY),
    ):
        with pytest.raises(ValueError, match="arrays lie on different devices: `params`"):
            ask()
    moved = jgd.fit(METHOD, W, (x, Y), batch_size=3, epochs=1, key=KEY)
    assert moved.params.devices() == {second}


def test_memory_that_was_given_away():
    gone = jnp.ones(3)
    gone.delete()
    for ask in (
        lambda: grads_of(squared)(gone, X, Y),
        lambda: grads_of(squared)(W, X, gone),
        lambda: METHOD.init(gone),
        lambda: jgd.fit(METHOD, gone, (X, Y), batch_size=2, epochs=1, key=KEY),
    ):
        with pytest.raises(ValueError, match="is there no more"):
            ask()


@pytest.mark.parametrize("callback", [None, lambda *_: None])
def test_strict_promotion_in_fit(callback):
    with jax.numpy_dtype_promotion("strict"):
        result = jgd.fit(METHOD, W, (X, Y), batch_size=3, epochs=2, key=KEY, callback=callback)
        METHOD.step(result.state, X, Y, weights=jnp.arange(8.0))


def test_a_second_call_moves_nothing_to_the_device():
    grads = grads_of(squared)(W, X, Y)
    state = METHOD.init(W)
    asked = [
        lambda: jgd.norms(grads),
        lambda: jgd.clipped_sum(grads, 1.0, weights=Y),
        lambda: jgd.variance(grads),
        lambda: jgd.noise_scale(grads),
        lambda: grads_of(squared)(W, X, Y).values,
        lambda: METHOD.step(state, X, Y),
    ]
    for ask in asked:
        ask()
    with jax.transfer_guard("disallow"):
        for ask in asked:
            jax.block_until_ready(ask())


def test_everything_public_but_what_hides_a_builtin_comes_by_a_star():
    names: dict = {}
    exec("from jgd import *", names)
    assert "norms" in names and "fit" in names and "sum" not in names
    assert all(not name.startswith("_") for name in jgd.__all__)
