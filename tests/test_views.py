"""The algebra of views: which elements of a leaf a path of rearrangements picks."""

import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from internals import View, overlap, trace_jaxpr, views
from jax import lax


def chain(rng, shape):
    """A random path of rearrangements, as a function of an array of this shape."""
    steps = []
    for _ in range(rng.integers(1, 6)):
        step = rearrangement(rng, shape)
        shape = jax.eval_shape(step, jax.ShapeDtypeStruct(shape, jnp.float32)).shape
        if math.prod(shape) > 200:
            break
        steps.append(step)
    return lambda x: functools.reduce(lambda x, step: step(x), steps, x)


def rearrangement(rng, shape):
    n, size = len(shape), math.prod(shape)
    kind = rng.choice(["transpose", "reshape", "slice", "rev", "squeeze", "broadcast", "split", "cast"])
    if kind == "transpose":
        order = rng.permutation(n).tolist()
        return lambda x: lax.transpose(x, order)
    if kind == "reshape":
        first = int(rng.choice([d for d in range(1, size + 1) if size % d == 0]))
        return lambda x: lax.reshape(x, (first, size // first))
    if kind == "slice" and n:
        starts = [int(rng.integers(s)) for s in shape]
        limits = [int(rng.integers(a + 1, s + 1)) for a, s in zip(starts, shape, strict=True)]
        strides = [int(rng.integers(1, 3)) for _ in shape]
        return lambda x: lax.slice(x, starts, limits, strides)
    if kind == "rev" and n:
        axes = [int(i) for i in range(n) if rng.random() < 0.5]
        return lambda x: lax.rev(x, axes)
    if kind == "squeeze":
        axes = [i - n * int(rng.random() < 0.5) for i in range(n) if shape[i] == 1]
        return lambda x: lax.squeeze(x, axes)
    if kind == "broadcast":
        places = sorted(rng.choice(n + 1, size=n, replace=False).tolist())
        to = [int(rng.integers(1, 3))] * (n + 1)
        for place, length in zip(places, shape, strict=True):
            to[place] = length if length > 1 or rng.random() < 0.5 else 2
        return lambda x: lax.broadcast_in_dim(x, to, places)
    if kind == "split" and n and shape[0] > 1:
        cut = int(rng.integers(1, shape[0]))
        which = int(rng.integers(2))
        return lambda x: lax.split(x, (cut, shape[0] - cut))[which]
    return lambda x: lax.convert_element_type(x, jnp.bfloat16).astype(jnp.float32)


def elements(view: View) -> np.ndarray:
    """Which element of the leaf each element of a view is."""
    index = np.full(view.array.shape, view.offset)
    for axis, (size, stride) in enumerate(zip(view.array.shape, view.array.strides, strict=True)):
        index = index + (np.arange(size) * stride).reshape(
            [-1 if i == axis else 1 for i in range(index.ndim)]
        )
    return index


def followed(fun, shape):
    """The view that `fun` makes of a leaf; None where there is none."""
    jaxpr, _, _ = trace_jaxpr(fun, jax.ShapeDtypeStruct(shape, jnp.float32))
    env = {jaxpr.invars[0]: views.whole(0, shape)}
    for eqn in jaxpr.eqns:
        view = env.get(eqn.invars[0])
        env.update(zip(eqn.outvars, views.follow(eqn, view), strict=True))
    return env[jaxpr.outvars[0]]


@hypothesis.settings(max_examples=30)
@hypothesis.given(st.integers(0, 2**32 - 1))
def test_a_view_says_which_elements_a_path_picks(seed):
    check_elements(seed)


@pytest.mark.slow
@pytest.mark.sample
@hypothesis.settings(max_examples=150)
@hypothesis.given(st.integers(0, 2**32 - 1))
def test_more_views_say_which_elements_a_path_picks(seed):
    check_elements(seed)


def check_elements(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 5, size=rng.integers(0, 4)).tolist())
    fun = chain(rng, shape)
    view = followed(fun, shape)
    hypothesis.assume(view is not None)  # a reshape may have to copy: that leaf is materialised
    picked = fun(jnp.arange(math.prod(shape), dtype=jnp.float32).reshape(shape))
    np.testing.assert_array_equal(elements(view), np.asarray(picked, int))
    assert tuple(size for size, _ in view.axes) == picked.shape


def test_a_reshape_that_copies_has_no_view():
    assert followed(lambda x: lax.reshape(lax.transpose(x, (1, 0)), (6,)), (2, 3)) is None
    assert followed(lambda x: lax.reshape(lax.transpose(x, (1, 0)), (3, 2, 1)), (2, 3)) is not None
    assert followed(lambda x: x * 2.0, (2, 3)) is None


def test_a_step_of_a_loop_is_one_slice_of_the_leaf():
    flipped = followed(lambda x: lax.rev(lax.transpose(x, (1, 0)), (0,)), (2, 3))
    step = views.step_of(views.step_of(flipped, loop=4), loop=5)
    whole = np.arange(6).reshape(2, 3).T[::-1]
    np.testing.assert_array_equal(elements(step), whole.T)  # the inner loop leads
    assert step.loops == (5, 4) and step.axes == ()
    assert (step.loop_axis(4), step.loop_axis(5), step.loop_axis(6)) == ((3, -1), (2, 3), None)


AXES = st.lists(st.tuples(st.integers(1, 4), st.integers(-6, 6)), max_size=3)


@hypothesis.settings(max_examples=200)
@hypothesis.given(AXES, AXES, st.integers(0, 40), st.integers(0, 40))
def test_overlap_is_that_of_the_sets_of_elements(a, b, start, other):
    # An address below the leaf's first element is nobody's: both are moved up by as much.
    sets = []
    for offset, axes in ((start + 80, a), (other + 80, b)):
        places = {offset}
        for size, stride in axes:
            places = {place + k * stride for place in places for k in range(size)}
        sets.append(places)
    assert overlap((start + 80, a), (other + 80, b)) == bool(sets[0] & sets[1])
