"""Saddles: each half of the parameters by its own optimizer and sign."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from stepping import walk

import jgd


class TestSaddle:
    @staticmethod
    def bilinear(params, z):
        x, y = params
        return jnp.dot(x, y) + z * 0.0

    start = (jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]))
    batch = (jnp.ones(2),)

    def distance(self, optimizer, steps):
        state, _ = walk(
            jgd.descent_ascent(self.bilinear, optimizer, optimizer), self.start, self.batch, steps
        )
        return float(optax.tree.norm(state.params))

    def test_plain_steps_circle_outwards(self):
        # Each step multiplies the distance to the saddle by √(1 + η²).
        np.testing.assert_allclose(self.distance(optax.sgd(0.1), 100), 2**0.5 * 1.01**50, rtol=1e-4)

    def test_optimistic_steps_find_it(self):
        assert self.distance(optax.optimistic_gradient_descent(0.5), 200) < 1e-3

    def test_each_half_has_its_own_optimizer_and_sign(self):
        def objective(p, z):
            return z * (2 * p[0]["a"] - 5 * p[1])

        method = jgd.descent_ascent(objective, optax.sgd(1.0), optax.sgd(0.1))
        state, (info,) = walk(method, ({"a": jnp.array(1.0)}, jnp.array(1.0)), (jnp.ones(3),), 1)
        assert float(state.params[0]["a"]) == -1 and float(state.params[1]) == 0.5
        assert float(info.value) == -3

    def test_line_searches_hold_the_other_half(self):
        def objective(p, z):
            return z * (p[0] ** 2 - 2 * p[1] ** 2 + p[0] * p[1])

        method = jgd.descent_ascent(objective, optax.lbfgs(), optax.lbfgs())
        state, _ = walk(method, (jnp.array(1.0), jnp.array(-1.0)), (jnp.ones(2),), 60)
        np.testing.assert_allclose(jnp.stack(state.params), [0, 0], atol=1e-3)

    def test_pairs_keep_their_type(self):
        class Players(NamedTuple):
            x: jax.Array
            y: jax.Array

        for pair in (list, Players._make):
            method = jgd.descent_ascent(self.bilinear, optax.sgd(0.1), optax.adam(0.1))
            state, _ = walk(method, pair(self.start), self.batch, 1)
            assert type(state.params) is type(pair(self.start))

    def test_params_must_be_a_pair(self):
        method = jgd.descent_ascent(self.bilinear, optax.sgd(0.1), optax.sgd(0.1))
        with pytest.raises(ValueError, match=r"`params` must be a pair \(x, y\)"):
            method.init(jnp.ones(2))
