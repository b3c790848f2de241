"""Weighted sums over many devices: by which pass they are made."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import B, mesh_of
from programs.derivatives import stops_jvp

import jgd

WEIGHTS = np.array([1.5, 0.0, 0.5, 2.0, 1.0, 0.0, 0.0, 3.0])


def test_a_sum_over_devices_takes_no_second_pass():
    loss = lambda p, x: jnp.sum(jnp.tanh(x @ p))
    x = jax.device_put(jnp.ones((B, 3)), NamedSharding(mesh_of(B), P("data")))
    grads = jgd.per_example_grad(loss, strategy="factored")(jnp.ones((3, 2)), x)
    assert "tanh" not in str(jax.make_jaxpr(jgd.sum)(grads))


def test_a_weighted_sum_over_devices_where_only_the_examples_gradients_are_refused(x64):
    """A kernel of a parameter that no rule may meet: the examples' gradients are wrong there, those of a sum right."""

    def loss(w, x):
        y = jax.lax.conv_general_dilated(
            x[None], stops_jvp(w), (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        )
        return jnp.sum(jnp.sin(y))

    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(3, 2, 4)), rng.normal(size=(B, 6, 2))
    over_devices = jax.device_put(x, NamedSharding(mesh_of(B), P("data")))
    grads = jgd.per_example_grad(loss, strategy="factored")(w, over_devices)
    blocks = np.asarray(jax.vmap(jax.grad(loss), (None, 0))(w, x))
    oracle.assert_close(jgd.sum(grads, WEIGHTS), oracle.weighted(WEIGHTS, blocks), 1e-9)
    with pytest.raises(NotImplementedError, match=r"inside of `jax\.shard_map`"):
        jgd.norms(grads)
