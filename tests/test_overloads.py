"""What `overloads.py` says to pyright of return types is what comes back."""

import jax
import jax.numpy as jnp
import overloads
import pytest

import jgd

PARAMS = {"w": jnp.ones(3), "b": jnp.ones(())}


@pytest.fixture(params=["auto", "materialized", "plain pytree"])
def grads(request):
    loss = lambda p, x: jnp.sin(x @ p["w"]) + p["b"]
    strategy = "auto" if request.param == "plain pytree" else request.param
    made = jgd.per_example_grad(loss, strategy=strategy)(PARAMS, jnp.ones((4, 3)))
    return jgd.materialize(made) if request.param == "plain pytree" else made


def is_norms(x):
    return isinstance(x, jax.Array) and x.shape == (4,)


def is_tree(x):
    return isinstance(x, dict) and x.keys() == PARAMS.keys()


def is_tree_of_norms(x):
    return is_tree(x) and all(map(is_norms, x.values()))


def is_sum(x):
    return is_tree(x) and all(x[name].shape == PARAMS[name].shape for name in x)


def test_norms(grads):
    for flag, of_flag in ((False, is_norms), (True, is_tree_of_norms)):
        got = overloads.of_norms(grads, flag)
        assert list(got) == ["array", "tree", "either"] and all(got.values())
        assert all(map(is_norms, got["array"]))
        assert all(map(is_tree_of_norms, got["tree"]))
        assert all(map(of_flag, got["either"]))


def test_clipped_sum(grads):
    for flag in (False, True):
        got = overloads.of_clipped_sum(grads, flag, jnp.array(2.0))
        assert list(got) == ["sum", "sum and array", "sum and tree", "either"] and all(got.values())
        assert all(map(is_sum, got["sum"]))
        for kind, of_norms in (("sum and array", is_norms), ("sum and tree", is_tree_of_norms)):
            assert all(isinstance(x, tuple) and is_sum(x[0]) and of_norms(x[1]) for x in got[kind])
        assert all(isinstance(x, tuple) == flag for x in got["either"])


def test_what_pyright_refuses_is_refused(grads):
    with pytest.raises(ValueError, match="`per_leaf` is one group for each leaf already"):
        overloads.of_what_is_refused(grads)
