"""Every bad input is one clear error, before anything runs: what is named, what was got, what to do."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from internals import require

import jgd

PARAMS = {"w": jnp.ones(3), "b": jnp.zeros(())}
X, Y = jnp.ones((4, 3)), jnp.ones(4)


def loss(p, x, y):
    return 0.5 * (x @ p["w"] + p["b"] - y) ** 2


def grads_of(loss=loss, params=PARAMS, batch=(X, Y), **options):
    return jgd.per_example_grad(loss, **options)(params, *batch)


def raises(error, *parts):
    """Expects an error whose message has all the parts, in this order."""
    return pytest.raises(error, match=re.compile(".*".join(map(re.escape, parts)), re.DOTALL))


# The loss


def test_a_loss_that_returns_a_vector():
    with raises(TypeError, "`loss`", "scalar", "float32[3]", "ONE example", "jnp.sum"):
        grads_of(lambda p, x, y: x * p["w"])


def test_a_loss_that_keeps_a_batch_axis_of_one():
    with raises(TypeError, "`loss`", "scalar", "float32[1]"):
        grads_of(lambda p, x, y: loss(p, x, y)[None])


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_a_loss_that_returns_another_dtype(dtype):
    with raises(TypeError, "`loss`", "floating-point scalar", f"{dtype}[]"):
        grads_of(lambda p, x, y: jnp.asarray(loss(p, x, y), dtype))


@pytest.mark.parametrize("value", [None, "high", 3])
def test_a_loss_that_returns_no_array(value):
    with raises(TypeError, "`loss`", "floating-point scalar", repr(value)):
        grads_of(lambda p, x, y: value)


def test_a_pair_without_has_aux():
    with raises(TypeError, "`loss`", "tuple", "has_aux=True"):
        grads_of(lambda p, x, y: (loss(p, x, y), x))


@pytest.mark.parametrize("result", [lambda v: v, lambda v: (v, v, v)])
def test_has_aux_without_a_pair(result):
    with raises(TypeError, "has_aux=True", "(scalar, aux)"):
        grads_of(lambda p, x, y: result(loss(p, x, y)), has_aux=True)


def test_an_error_of_the_loss_itself_comes_through():
    with raises(ZeroDivisionError, "mine"):

        def bad(p, x, y):
            raise ZeroDivisionError("mine")

        grads_of(bad)


# The batch


def test_a_batch_whose_leaves_disagree_in_length():
    with raises(ValueError, "batch", "`batch[0]`", "4", "`batch[1]`", "5", "in_axes"):
        grads_of(batch=(X, jnp.ones(5)))


def test_leaves_inside_an_argument_that_disagree():
    with raises(ValueError, "`batch[0]['image']`", "4", "`batch[0]['label']`", "2"):
        grads_of(lambda p, e: e["image"] @ p["w"], batch=({"image": X, "label": jnp.ones(2)},))


def test_no_batch():
    with raises(ValueError, "no batch"):
        grads_of(lambda p: p["b"], batch=())


def test_a_batch_without_leaves():
    with raises(ValueError, "no batch"):
        grads_of(lambda p, x: p["b"], batch=({},))


def test_everything_shared():
    with raises(ValueError, "no batch"):
        grads_of(in_axes=(None, None, None))


def test_a_batch_leaf_without_axes():
    with raises(ValueError, "`batch[1]`", "axis 0", "in_axes"):
        grads_of(batch=(X, 3.0))


def test_an_axis_that_a_leaf_does_not_have():
    with raises(ValueError, "`batch[0]`", "float32[4,3]", "no axis 2"):
        grads_of(in_axes=(None, 2, 0))


def test_a_batch_of_objects():
    with raises(TypeError, "`batch[1]`"):
        grads_of(batch=(X, np.array([object()] * 4)))


def test_a_batch_of_strings():
    with raises(TypeError, "`batch[1]`"):
        grads_of(batch=(X, np.array(["a", "b", "c", "d"])))


# The parameters


@pytest.mark.parametrize("leaf", [jnp.arange(3), jnp.ones(3, bool), 2, np.arange(2)])
def test_a_parameter_that_is_not_floating(leaf):
    with raises(TypeError, "`params['steps']`", "floating", "eqx.partition", "nnx.split"):
        grads_of(params=PARAMS | {"steps": leaf})


def test_a_parameter_that_is_no_array():
    def relu(x):
        return jnp.maximum(x, 0)

    with raises(TypeError, "`params['act']`", "function", "relu", "eqx.partition"):
        grads_of(params=PARAMS | {"act": relu})


@pytest.mark.parametrize("params", [{}, None, []])
def test_no_parameters(params):
    with raises(ValueError, "`params`", "no leaves"):
        grads_of(lambda p, x, y: y, params=params)


# The options


@pytest.mark.parametrize("strategy", ["fast", None, "Auto"])
def test_an_unknown_strategy(strategy):
    with raises(ValueError, "`strategy`", "'auto'", "'factored'", "'materialized'", repr(strategy)):
        grads_of(strategy=strategy)


@pytest.mark.parametrize("argnums", [3, -4, (0, 5)])
def test_argnums_out_of_range(argnums):
    with raises(ValueError, "`argnums`", str(argnums), "3 arguments"):
        grads_of(argnums=argnums)


def test_argnums_that_name_an_argument_twice():
    with raises(ValueError, "`argnums`", "(0, -3)", "twice"):
        grads_of(argnums=(0, -3))


def test_a_bad_leaf_of_several_arguments():
    with raises(TypeError, "`params[1]`", "int32[4]"):
        grads_of(argnums=(0, 2), in_axes=(None, 0, None), batch=(X, jnp.arange(4)))


def test_in_axes_of_the_wrong_length():
    with raises(ValueError, "`in_axes`", "3 arguments", "(None, 0)"):
        grads_of(in_axes=(None, 0))


def test_in_axes_that_map_the_parameters():
    with raises(ValueError, "`in_axes[0]`", "parameters", "None"):
        grads_of(in_axes=(0, 0, 0))


def test_in_axes_that_are_no_prefix():
    with raises(ValueError, "`in_axes[1]`", "prefix", "argument 1"):
        grads_of(lambda p, e: e["x"] @ p["w"], batch=({"x": X},), in_axes=(None, {"z": 0}))


# The reductions


@pytest.mark.parametrize("reduction", [jgd.sum, jgd.mean, jgd.second_moment, jgd.variance])
@pytest.mark.parametrize("shape", [(3,), (4, 1), ()])
def test_weights_of_the_wrong_shape(reduction, shape):
    with raises(ValueError, "`weights`", "(4,)", str(shape)):
        reduction(grads_of(), jnp.ones(shape))


def test_weights_of_the_wrong_shape_where_they_are_a_keyword():
    with raises(ValueError, "`weights`", "(4,)", "(5,)"):
        jgd.clipped_sum(grads_of(), 1.0, weights=jnp.ones(5))


def test_weights_that_are_no_numbers():
    with raises(TypeError, "`weights`", "4 numbers"):
        jgd.sum(grads_of(), {"a": 1})


@pytest.mark.parametrize("reduction", [jgd.mean, jgd.second_moment, jgd.variance])
def test_weights_that_are_all_zero_in_a_mean(reduction):
    with raises(ValueError, "`weights`", "all 0"):
        reduction(grads_of(), jnp.zeros(4))


@pytest.mark.parametrize("reduction", [jgd.mean, jgd.second_moment])
def test_a_mean_over_an_empty_batch(reduction):
    with raises(ValueError, "no examples", "empty"):
        reduction(grads_of(batch=(X[:0], Y[:0])))


@pytest.mark.parametrize("reduction", [jgd.variance, jgd.noise_scale])
@pytest.mark.parametrize("size", [0, 1])
def test_a_spread_of_fewer_than_two(reduction, size):
    with raises(ValueError, "two examples", str(size)):
        reduction(grads_of(batch=(X[:size], Y[:size])))


@pytest.mark.parametrize("max_norm", [-1.0, float("nan"), -jnp.inf, np.float32(-0.5), jnp.nan])
def test_a_max_norm_that_is_negative_or_nan(max_norm):
    with raises(ValueError, "`max_norm`", "at least 0", str(max_norm)):
        jgd.clipped_sum(grads_of(), max_norm)


def test_a_max_norm_for_each_example():
    with raises(ValueError, "`max_norm`", "one number", "(4,)"):
        jgd.clipped_sum(grads_of(), jnp.ones(4))


@pytest.mark.parametrize("max_norm", ["1", None])
def test_a_max_norm_that_is_no_number(max_norm):
    with raises(TypeError, "`max_norm`", repr(max_norm)):
        jgd.clipped_sum(grads_of(), max_norm)


@pytest.mark.parametrize(
    "direction", [{"w": jnp.ones(3)}, [jnp.ones(3), 1.0], PARAMS | {"c": 1.0}, jnp.ones(4), None]
)
def test_a_direction_of_another_structure(direction):
    with raises(ValueError, "`direction`", "parameters", "got"):
        jgd.dot(grads_of(), direction)


def test_a_direction_of_another_shape():
    with raises(ValueError, "`direction['w']`", "(2,)", "(3,)"):
        jgd.dot(grads_of(), {"w": jnp.ones(2), "b": 0.0})


def test_a_gram_with_gradients_of_another_structure():
    other = grads_of(lambda p, x, y: x @ p, params=jnp.ones(3))
    with raises(ValueError, "`grads`", "`other`", "structure"):
        jgd.gram(grads_of(), other)


def test_a_gram_with_gradients_of_another_shape():
    other = grads_of(params={"w": jnp.ones(2), "b": jnp.zeros(())}, batch=(jnp.ones((4, 2)), Y))
    with raises(ValueError, "`grads`", "`other`", "(3,)", "(2,)"):
        jgd.gram(grads_of(), other)


@pytest.mark.parametrize("dim", [0, -1, 2.0, None, True])
def test_a_projection_to_no_dimensions(dim, key):
    with raises(ValueError, "`dim`", repr(dim)):
        jgd.project(grads_of(), key, dim)


def test_plain_gradients_whose_leaves_disagree():
    with raises(ValueError, "`grads`", "`grads['b']`", "4", "`grads['w']`", "2"):
        jgd.norms({"b": jnp.ones(4), "w": jnp.ones((2, 3))})


@pytest.mark.parametrize("leaf", [jnp.ones(()), jnp.arange(3), 1.0, "x"])
def test_plain_gradients_that_are_none(leaf):
    with raises(TypeError, "`grads['w']`", "leading axis"):
        jgd.sum({"w": leaf})


def test_plain_gradients_without_leaves():
    with raises(ValueError, "`grads`", "no gradients"):
        jgd.norms({})


def test_a_missing_extra():
    with raises(ImportError, "`no_such_module`", "extra `demo`", "pip install 'jgd[demo]'"):
        require("no_such_module.inside", "demo")
