"""A batch that nothing maps is one error, which says where `in_axes` or the arguments are to be changed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jgd

W, X = jnp.ones(3), jnp.ones((4, 3))
KEY = jax.random.key(0)


def loss(w, *example):
    return jnp.sum(w)


ALL_SHARED = [
    ((X,), (None, None), "(None, None)", 1),
    ((X, X), (None, None, None), "(None, None, None)", 1),
    ((None, X), (None, 0, None), "(None, 0, None)", 2),
    (({"a": X, "b": None},), (None, {"a": None, "b": 0}), "(None, {'a': None, 'b': 0})", 1),
    (({"a": X, "b": X},), [None, {"a": None, "b": None}], "(None, {'a': None, 'b': None})", 1),
]
WAYS = {
    "gradients": lambda batch, in_axes: jgd.per_example_grad(loss, in_axes=in_axes)(W, *batch),
    "explain": lambda batch, in_axes: jgd.explain(loss, W, *batch, in_axes=in_axes),
    "step": lambda batch, in_axes: step(batch, in_axes=in_axes),
    "forward step": lambda batch, in_axes: step(batch, in_axes=in_axes, derivative="forward"),
    "fit batches": lambda batch, in_axes: fit([batch], None, in_axes=in_axes),
}


def step(batch, **options):
    method = jgd.descent(loss, optax.sgd(0.1), **options)
    return method.step(method.init(W), *batch)


def fit(data, batch_size, **options):
    return jgd.fit(
        jgd.descent(loss, optax.sgd(0.1), **options), W, data, batch_size=batch_size, epochs=1, key=KEY
    )


@pytest.mark.parametrize(("batch", "in_axes", "said", "number"), ALL_SHARED, ids=lambda x: None)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_in_axes_that_share_everything(way, batch, in_axes, said, number):
    with pytest.raises(ValueError) as error:
        way(batch, in_axes)
    assert f"the loss got no batch: `in_axes`={said} maps no array" in str(error.value)
    assert str(error.value).endswith(f"0 in `in_axes[{number}]`")


@pytest.mark.parametrize("batch", [(None,), ({},), (None, [])], ids=str)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_arguments_without_arrays(way, batch):
    with pytest.raises(ValueError, match=r"every argument beside the parameters is None .* `in_axes`"):
        way(batch, None)


def test_no_arguments():
    with pytest.raises(ValueError, match="no batch: give it at least one argument beside the parameters"):
        jgd.per_example_grad(loss)(W)


def test_several_arguments_that_all_hold_parameters():
    with pytest.raises(ValueError, match="no batch: give it at least one argument beside the parameters"):
        jgd.per_example_grad(loss, argnums=(0, 1))(W, X)


@pytest.mark.parametrize("in_axes", [None, (None, 0, 0), (None, 0, None)], ids=str)
def test_an_argument_of_none_beside_a_batch_is_trained_with(in_axes):
    for data, batch_size in (((X, None), 2), ([(X, None)], None)):
        method = jgd.descent(lambda w, x, y: x @ w, optax.sgd(1.0), in_axes=in_axes)
        result = jgd.fit(method, W, data, batch_size=batch_size, epochs=1, key=KEY)
        np.testing.assert_allclose(
            result.params, W - len(result.history.value)
        )  # its gradient is 1 everywhere


def test_arrays_that_fit_is_told_to_share():
    with pytest.raises(
        ValueError, match=r"`data` holds no examples: .*`in_axes`=\(None, None\) maps no array"
    ):
        fit(X, 2, in_axes=(None, None))
    with pytest.raises(ValueError, match="`data` holds no examples: at least one leaf"):
        fit((None,), 2)
