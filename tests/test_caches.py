"""What is remembered between calls, and what is not: other losses, other traces, closed-over values."""

import jax
import jax.numpy as jnp
import numpy as np
from compilations import compilations
from internals import form_of
from strategies import close, every_strategy, several, squared_error

import jgd


@every_strategy
def test_the_second_call_compiles_nothing(strategy, example):
    traces = []

    def loss(p, x, y):
        traces.append(1)
        return squared_error(p, x, y)

    params, x, y = jax.tree.map(jnp.float32, example)
    gradient_of = jgd.per_example_grad(loss, strategy=strategy)
    other = {"w": params["w"] * 2}, x + 1, y
    several(gradient_of(params, x, y))
    with compilations() as made:
        several(gradient_of(*other))
        several(jgd.per_example_grad(loss, strategy=strategy)(*other))
    assert not made and len(traces) == 3
    fewer = gradient_of(params, x[:3], y[:3])
    assert type(form_of(fewer)) is type(gradient_of(params, x, y)._form)
    if strategy == "factored":  # the loss sees one example: another batch size is the same program
        assert form_of(fewer).plan is gradient_of(params, x, y)._form.plan


def test_a_loss_with_a_loop_inside_that_is_written_anew_compiles_nothing(example):
    """What a cell of a notebook defines again is the same program, and so is what is inside of its loops."""
    params, x, y = jax.tree.map(jnp.float32, example)

    def written():
        step = lambda carry, row: (jnp.tanh(carry + row), None)
        loss = lambda p, x, y: jnp.sum((jax.lax.scan(step, y, x[:, None] * p["w"])[0] - y) ** 2)
        return jgd.norms(jgd.per_example_grad(loss, strategy="factored")(params, x, y))

    want = written()
    with compilations() as made:
        np.testing.assert_array_equal(written(), want)
    assert not made


def test_another_object_of_the_same_class_is_another_loss(example):
    class Model:
        def __init__(self, scale):
            self.scale = scale

        def loss(self, p, x, y):
            return self.scale * squared_error(p, x, y)

    args = jax.tree.map(jnp.float32, example)
    one, two = (jgd.per_example_grad(Model(scale).loss)(*args) for scale in (1.0, 2.0))
    close(two.values, 2 * one.values, 1e-6)


def test_the_cache_keeps_no_loss_alive(example):
    import gc
    import weakref

    def made():
        loss = lambda p, x, y: squared_error(p, x, y)
        jgd.norms(jgd.per_example_grad(loss)(*jax.tree.map(jnp.float32, example)))
        return weakref.ref(loss)

    alive = [made() for _ in range(3)]
    gc.collect()
    assert sum(ref() is not None for ref in alive) == 0


def test_what_a_loss_closes_over_may_change_under_jit(example, x64):
    """A closed-over value that is traced belongs to this trace alone."""
    params, x, y = example

    def ask(scale):
        loss = lambda p, x, y: scale * squared_error(p, x, y)
        return jgd.norms(jgd.per_example_grad(loss)(params, x, y))

    want = jgd.norms(jgd.per_example_grad(squared_error)(params, x, y))
    compiled = jax.jit(ask)
    for scale in (2.0, 3.0):
        close(compiled(scale), scale * want)
        close(ask(jnp.float64(scale)), scale * want)
    close(jax.vmap(ask)(jnp.arange(1.0, 4.0)), np.arange(1.0, 4.0)[:, None] * want)
    slope = jax.grad(lambda s: ask(s).sum())(2.0)
    close(slope, want.sum())


def test_one_function_called_in_two_traces(example, x64):
    """The same loss object, closing over a cell that a trace fills."""
    params, x, y = example
    box = {}

    def loss(p, x, y):
        return box["scale"] * squared_error(p, x, y)

    @jax.jit
    def ask(scale):
        box["scale"] = scale
        return jgd.norms(jgd.per_example_grad(loss)(params, x, y))

    first, second = ask(1.0), ask(jnp.array([2.0])[0].astype(jnp.float32))
    close(second, 2 * first, 1e-6)
