"""`PerExampleGrads` shows what it says it has, and nothing of how it holds the gradients."""

import inspect
import re

import jax
import jax.numpy as jnp
import pytest

import jgd


@pytest.mark.parametrize("options", [{}, {"strategy": "materialized"}, {"microbatch_size": 2}], ids=str)
def test_every_public_attribute_is_documented(options):
    loss = lambda w, x: (x @ w, {"x": x})
    make = jgd.per_example_grad(loss, has_aux=True, **options)
    grads = make(jnp.ones(3), jnp.ones((4, 3)))
    documented = re.findall(r"^    (\w+): ", inspect.getdoc(jgd.PerExampleGrads), re.MULTILINE)
    for made in (grads, jax.jit(make)(jnp.ones(3), jnp.ones((4, 3))), jax.tree.map(lambda x: x, grads)):
        assert (
            [name for name in dir(made) if not name.startswith("_")]
            == sorted(documented)
            == ["aux", "values"]
        )
