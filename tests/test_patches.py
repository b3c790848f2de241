"""Convolutions whose windows do not overlap: patches are the input in another order, the gradient is one product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Draw, Problem
from internals import form_of
from jax import lax
from questions import WEIGHTS, check_asked

import jgd

ROWS = ("NHWC", "HWIO", "NHWC")
CHANNELS_FIRST = ("NCHW", "OIHW", "NCHW")
KINDS = {  # name: input and kernel of one example, strides, padding, numbers, groups, dilation of the input
    "tiles": ((6, 6, 3), (2, 3, 3, 4), (2, 3), "VALID", ROWS, 1, None),
    "gaps": ((9, 11, 3), (2, 3, 3, 4), (3, 4), "VALID", ROWS, 1, None),
    "padded": ((9, 11, 3), (2, 3, 3, 4), (3, 4), [(1, 2), (0, 3)], ROWS, 1, None),
    "cropped": ((9, 11, 3), (2, 3, 3, 4), (3, 4), [(-1, 2), (0, -3)], ROWS, 1, None),
    "groups": ((6, 9, 11), (4, 3, 2, 3), (3, 4), [(1, 2), (2, 1)], CHANNELS_FIRST, 2, (2, 3)),
    "pointwise": ((4, 5, 3), (1, 1, 3, 4), (1, 2), "SAME", ROWS, 1, None),
    "whole": ((4, 3, 3), (4, 3, 3, 5), (4, 3), "VALID", ROWS, 1, None),
    "one axis": ((12, 3), (4, 3, 5), (4,), "VALID", ("NWC", "WIO", "NWC"), 1, None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_question(kind, x64):
    shape, kernel, strides, padding, numbers, groups, dilation = KINDS[kind]

    def loss(k, x):
        made = lax.conv_general_dilated(
            x[None], k, strides, padding, lhs_dilation=dilation, dimension_numbers=numbers,
            feature_group_count=groups,
        )  # fmt: skip
        return jnp.sum(jnp.sin(made))

    draw = Draw(3)
    check_asked(Problem(loss, draw(*kernel), (draw(len(WEIGHTS), *shape),)), None)


def test_steps_of_a_loop_and_a_stack_of_kernels(x64):
    def loss(p, x):
        convolve = lambda x, k: lax.conv_general_dilated(
            x, k, (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )
        x, _ = lax.scan(lambda x, k: (jnp.repeat(jnp.tanh(convolve(x, k)), 2, axis=1), None), x[None], p)
        return jnp.sum(jnp.sin(x))

    draw = Draw(4)
    check_asked(Problem(loss, draw(3, 2, 4, 4), (draw(len(WEIGHTS), 6, 4),)), None)


def test_no_loop_goes_over_the_window():
    loss = lambda k, x: jnp.sum(jnp.sin(lax.conv(x[None], k, (8, 8), "VALID")))
    args = jnp.ones((5, 3, 8, 8)), jnp.ones((4, 3, 32, 32))
    ask = lambda k, x: jgd.norms(jgd.per_example_grad(loss, strategy="factored")(k, x))
    text = jax.jit(ask).lower(*args).as_text()
    assert "stablehlo.while" not in text
    assert form_of(jgd.per_example_grad(loss, strategy="factored")(*args)).plan.factored == (0,)
    np.testing.assert_allclose(
        ask(*args),
        np.linalg.norm(np.asarray(jax.vmap(jax.grad(loss), (None, 0))(*args)).reshape(4, -1), axis=1),
        rtol=1e-5,
    )
