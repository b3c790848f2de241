"""The work of a loss's products, which `jgd.explain` predicts by: against XLA's count, and by closed forms."""

import jax
import jax.numpy as jnp
import pytest
from internals import Work, bind, build, plain, trace, work_of
from jax import lax

import jgd


def work(loss, *args, in_axes=None):
    return work_of(trace(bind(loss, args, argnums=0, in_axes=in_axes, has_aux=False)).program)


def counted(fun, *args):
    """XLA's own count, of the program as it stands before XLA changes it; it takes elementwise work along."""
    return jax.jit(fun).lower(*args).cost_analysis()["flops"]


@pytest.mark.sample(lambda name: name in ("cnn", "adapters"))
@pytest.mark.parametrize("name", ["mlp", "cnn", "residual", "convnext", "vit", "transformer", "adapters"])
def test_the_products_are_those_of_the_plain_gradient(name):
    model = build(name)
    shapes = jax.eval_shape(lambda: (model.params, *model.batch))
    found = work(model.loss, *shapes, in_axes=model.in_axes)
    losses = jax.vmap(model.loss, model.axes)
    forward = counted(lambda *args: jnp.sum(losses(*args)), *shapes)
    # XLA leaves out what a convolution takes of its padding.
    assert 0.8 * forward < model.size * found.forward < 1.15 * forward
    whole = counted(plain(model), *shapes)
    assert 0.8 * whole < model.size * sum(found) < 1.15 * whole


def test_a_scan_of_checkpointed_steps_and_its_branches():
    length, t, d = 3, 5, 4
    once = 2 * t * d * d

    def loss(w, x, checkpointed, branching):
        def step(h, w):
            if branching:
                return lax.cond(jnp.sum(h) > 0, lambda: jnp.tanh(h @ w) @ w, lambda: h @ w), None
            return jnp.tanh(h @ w), None

        return jnp.sum(lax.scan(jax.checkpoint(step) if checkpointed else step, x, w)[0])

    of = lambda *flags: work(lambda w, x: loss(w, x, *flags), jnp.ones((length, d, d)), jnp.ones((7, t, d)))
    assert of(False, False) == Work(length * once, 2 * length * once)
    assert of(True, False) == Work(length * once, 3 * length * once)
    assert of(False, True) == Work(2 * length * once, 4 * length * once)


def test_what_no_parameter_reaches_has_no_derivative():
    loss = lambda w, x, y: jnp.sum((jnp.tanh(x @ y) @ w) ** 2)
    found = work(loss, jnp.ones((3, 2)), jnp.ones((6, 5, 4)), jnp.ones((6, 4, 3)))
    assert found == Work(2 * 5 * 4 * 3 + 2 * 5 * 3 * 2, 2 * 5 * 3 * 2)


def test_a_loop_of_unknown_length_counts_nothing():
    def loss(w, x):
        return jnp.sum(w * lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: x + x @ jnp.ones((4, 4)), x))

    assert work(loss, jnp.ones(4), jnp.ones((3, 4))) == Work(0, 0)


def test_gradients_that_are_made_themselves_are_predicted_as_the_plain_one():
    model = build("adapters")
    shapes = jax.eval_shape(lambda: (model.params, *model.batch))
    explanation = jgd.explain(model.loss, *shapes, in_axes=model.in_axes)
    assert explanation.strategy == "materialized" and explanation.at_once < model.size
    assert 0.99 < explanation.norms < explanation.clipped_sum < 1.02
