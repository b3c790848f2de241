"""What methods refuse, and what they say of it."""

import jax.numpy as jnp
import optax
import pytest
from stepping import batch_loss, loss, problem

import jgd


class TestErrors:
    def test_unknown_derivative(self):
        with pytest.raises(
            ValueError, match="`derivative` must be one of 'reverse', 'forward', 'finite_difference'"
        ):
            jgd.descent(loss, optax.sgd(0.1), derivative="backward")

    @pytest.mark.parametrize("make", [jgd.descent, jgd.ascent])
    def test_no_optimizer(self, make):
        with pytest.raises(
            TypeError, match=r"`optimizer` must be an optax.GradientTransformation .* got float 0.1"
        ):
            make(loss, 0.1)
        with pytest.raises(TypeError, match="`max_optimizer` must be"):
            jgd.descent_ascent(loss, optax.sgd(0.1), optax.sgd)

    def test_no_function(self):
        with pytest.raises(TypeError, match="the loss must be a function"):
            jgd.descent(1.0, optax.sgd(0.1))
        with pytest.raises(TypeError, match="`reduce` must be a function"):
            jgd.descent(loss, optax.sgd(0.1), reduce="mean")

    def test_a_parameter_that_is_not_floating(self):
        with pytest.raises(TypeError, match=r"`params\['n'\]` is int32\[2\].*eqx.partition"):
            jgd.descent(loss, optax.sgd(0.1)).init({"n": jnp.arange(2)})

    def test_a_state_that_is_none(self):
        params, batch = problem()
        method = jgd.descent(loss, optax.adam(0.1))
        with pytest.raises(
            TypeError, match=r"`state` must be the MethodState that `method.init\(params\)` returned"
        ):
            method.step(params, *batch)

    def test_a_state_of_another_optimizer_or_other_params(self):
        params, batch = problem()
        method = jgd.descent(loss, optax.adam(0.1))
        other = jgd.descent(loss, optax.sgd(0.1)).init(params)
        with pytest.raises(ValueError, match=r"`state.opt_state` is not what this method's optimizer keeps"):
            method.step(other, *batch)
        smaller = method.init(params)._replace(params={**params, "b": jnp.ones(1)})
        with pytest.raises(ValueError, match=r"`state.opt_state` is not what this method's optimizer keeps"):
            method.step(smaller, *batch)

    @pytest.mark.parametrize("derivative", ["reverse", "forward", "finite_difference"])
    def test_batches_that_do_not_fit(self, derivative):
        params, (x, y) = problem()
        method = jgd.descent(loss, optax.sgd(0.1), derivative=derivative)
        with pytest.raises(ValueError, match="disagree in length"):
            method.step(method.init(params), x, y[:3])
        with pytest.raises(ValueError, match="holds no examples"):
            method.step(method.init(params), x[:0], y[:0])
        vector = jgd.descent(lambda p, x, y: x, optax.sgd(0.1), derivative=derivative)
        with pytest.raises(TypeError, match="must return a floating-point scalar"):
            vector.step(vector.init(params), x, y)

    @pytest.mark.parametrize(
        "has_aux, pair", [(False, r"\(value, gradient\)"), (True, r"\(\(value, aux\), gradient\)")]
    )
    def test_a_callable_that_returns_something_else(self, has_aux, pair):
        params, batch = problem()
        for wrong in (batch_loss, lambda *a: (1.0, 2.0, 3.0)):
            method = jgd.descent(loss, optax.sgd(0.1), derivative=wrong, has_aux=has_aux)
            with pytest.raises(TypeError, match=f"`derivative` must return {pair}"):
                method.step(method.init(params), *batch)
