"""Gradients much smaller than what an example leaves: that they are made some at a time, and are the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from internals import DenseGradients, devices, form_of
from jax.sharding import AxisType

import jgd

T, S = 32, 96


def arguments(size, layers=3, rank=2):
    """Adapters, frozen weights, and a batch."""
    keys = jax.random.split(jax.random.key(1), 3)
    frozen = jax.random.normal(keys[0], (layers, S, S)) / S**0.5
    adapters = [(jnp.full((S, rank), 0.1), jnp.full((rank, S), 0.1)) for _ in range(layers)]
    return adapters, frozen, jax.random.normal(keys[1], (size, T, S))


def new_loss(*, aux=False):
    """The loss of a frozen net with adapters, as a function that no cache has seen."""

    def loss(adapters, frozen, x):
        for weight, (a, b) in zip(frozen, adapters, strict=True):
            x = jnp.tanh(x @ weight + (x @ a) @ b)
        value = jnp.sum(x[0])
        return (value, {"key": jax.random.key(jnp.int32(value)), "x": x[0, :2]}) if aux else value

    return loss


AXES = (None, None, 0)


@pytest.fixture
def small_cache(monkeypatch):
    """A device whose cache holds what some of these examples leave, and not what a batch of them leaves."""
    row = devices.DEVICES["cpu"]._replace(cache=300_000)
    monkeypatch.setitem(devices.DEVICES, "cpu", row)


def explained(loss, size, args=None):
    return jgd.explain(loss, *(args or arguments(size)), in_axes=AXES)


@pytest.mark.usefixtures("small_cache")
@pytest.mark.parametrize("size", [12, 13])  # a number that divides, and one that does not
def test_every_answer_is_that_of_the_reference(size):
    args = arguments(size)
    loss = new_loss()
    at_once = explained(loss, size).at_once
    assert 1 < at_once < size
    assert f"\"auto\" is 'materialized', {at_once} examples at a time" in str(explained(loss, size))
    grads = jgd.per_example_grad(loss, in_axes=AXES)(*args)
    assert isinstance(form_of(grads), DenseGradients)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), args)
        values, gradients = jax.vmap(jax.value_and_grad(new_loss()), in_axes=AXES)(*wide)
        values = np.asarray(values)
        rows = np.concatenate([np.reshape(x, (size, -1)) for x in jax.tree.leaves(gradients)], axis=1)
    close = lambda ours, theirs: np.testing.assert_allclose(
        ours, theirs, rtol=2e-5, atol=1e-5 * np.max(np.abs(theirs))
    )
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    close(grads.values, values)
    close(jgd.norms(grads), np.linalg.norm(rows, axis=1))
    close(flat(jgd.sum(grads)), rows.sum(0))
    close(jgd.gram(grads), rows @ rows.T)
    close(flat(jgd.second_moment(grads)), np.mean(rows**2, axis=0))
    scales = np.minimum(1, 1 / np.linalg.norm(rows, axis=1))
    close(flat(jgd.clipped_sum(grads, 1.0)), scales @ rows)


@pytest.mark.usefixtures("small_cache")
def test_what_the_loss_returns_beside_its_value_comes_along():
    args = arguments(13)
    grads = jgd.per_example_grad(new_loss(aux=True), in_axes=AXES, has_aux=True)(*args)
    assert isinstance(form_of(grads), DenseGradients)
    _, aux = jax.vmap(new_loss(aux=True), in_axes=AXES)(*args)
    np.testing.assert_allclose(grads.aux["x"], aux["x"], rtol=1e-5)
    data = jax.random.key_data
    np.testing.assert_array_equal(data(grads.aux["key"]), data(aux["key"]))


@pytest.mark.usefixtures("small_cache")
def test_leaves_without_elements():
    adapters, *others = arguments(13)
    loss = lambda p, f, x: new_loss()(p[0], f, x) + jnp.sum(p[1])
    grads = jgd.per_example_grad(loss, in_axes=AXES)((adapters, jnp.ones((0, 4))), *others)
    assert isinstance(form_of(grads), DenseGradients) and jgd.materialize(grads)[1].shape == (13, 0, 4)
    alone = jgd.norms(jgd.per_example_grad(new_loss(), in_axes=AXES)(adapters, *others))
    np.testing.assert_allclose(jgd.norms(grads), alone, rtol=1e-5)


@pytest.mark.usefixtures("small_cache")
def test_absent_examples_and_second_derivatives():
    adapters, frozen, x = arguments(12)
    loss = new_loss()
    grad = jgd.per_example_grad(loss, in_axes=AXES)
    bad = x.at[5].set(jnp.nan)
    present = jnp.ones(12).at[5].set(0)
    some = jgd.sum(grad(adapters, frozen, bad), weights=present)
    others = jax.grad(lambda p: jnp.sum(jax.vmap(loss, in_axes=AXES)(p, frozen, jnp.delete(x, 5, 0))))(
        adapters
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), some, others)

    ours = lambda p: jnp.sum(jgd.norms(grad(p, frozen, x)))
    norm = lambda g: jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(g)))
    theirs = lambda p: jnp.sum(jax.vmap(lambda e: norm(jax.grad(loss)(p, frozen, e)))(x))
    for a, b in zip(
        *map(jax.tree.leaves, (jax.grad(ours)(adapters), jax.grad(theirs)(adapters))), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def is_whole(loss, size, args=None):
    explanation = explained(loss, size, args)
    return explanation.strategy == "factored" and explanation.at_once == size


@pytest.mark.usefixtures("small_cache")
def test_what_goes_through_one_pass_as_before():
    assert not is_whole(new_loss(), 12)
    assert is_whole(new_loss(), 12, arguments(12, rank=16))  # gradients as large as the factors
    convolved = lambda p, f, x: new_loss()(p, f, x * jnp.convolve(x[0], f[0, 0, :5], mode="same"))
    assert is_whole(convolved, 12)
    wide = lambda p, f, x: new_loss()(p, f[:3], x)
    adapters, frozen, x = arguments(12)
    assert not is_whole(wide, 12)
    assert is_whole(wide, 12, (adapters, jnp.concatenate([frozen] * 16), x))  # much is read by every pass
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        assert is_whole(new_loss(), 12)


def test_what_all_stays_in_the_cache_goes_at_once(monkeypatch):
    assert is_whole(new_loss(), 12)
    for cache in (60_000, None):  # no two examples stay; and no cache to speak of
        monkeypatch.setitem(devices.DEVICES, "cpu", devices.DEVICES["cpu"]._replace(cache=cache))
        assert is_whole(new_loss(), 12)


def test_no_examples_are_held_as_they_are():
    explanation = explained(new_loss(), 0)
    assert (explanation.strategy, explanation.at_once) == ("materialized", 0)
    grads = jgd.per_example_grad(new_loss(), in_axes=AXES)(*arguments(0))
    assert isinstance(form_of(grads), DenseGradients)
