"""Leaves behind computed operands whose way back takes factors to factors, or multiplies each element."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import B, Draw, Problem
from internals import computed_leaves, form_of
from jax import lax
from questions import WEIGHTS, check_asked, wave

import jgd
from jgd._engine.computed_leaves import ComputedLeaves
from jgd._engine.elementwise_leaf import ElementwiseLeaf
from jgd._engine.factored_leaf import FactoredLeaf
from jgd._engine.shifted_leaf import ShiftedLeaf


def of_vjp(forward, backward):
    fun = jax.custom_vjp(forward)
    fun.defvjp(lambda w: (forward(w), None), lambda _, g: (backward(g),))
    return fun


through = of_vjp(jnp.sign, lambda g: g)
doubled = of_vjp(lambda w: w, lambda g: 2 * g)
clipped = of_vjp(lambda w: w, lambda g: jnp.clip(g, -0.1, 0.1))
draw = Draw(5)
W0, MASK = draw(6, 4), draw(6, 4) > 0


def in_steps(weight):
    """The weight in each step of a scan, computed inside of it."""

    def loss(p, x):
        return wave(lax.scan(lambda h, row: (jnp.tanh(h + row @ weight(p)), None), jnp.zeros(4), x)[0])

    return loss


def adapters(p):
    return W0 + p["a"] @ p["b"]


LOW = {"a": (6, 2), "b": (2, 4)}
CASES = {  # loss, shapes of the parameters, of an example, and of which kind each leaf is, in the order of the leaves
    "adapters": (lambda p, x: wave(x @ adapters(p)), LOW, (3, 6), "factored factored"),
    "adapters of one position": (lambda p, x: wave(x @ adapters(p)), LOW, (6,), "factored factored"),
    "adapters, scaled": (lambda p, x: wave(x @ (W0 - 0.5 * (p["a"] @ p["b"]) / 3)), LOW, (3, 6), "factored factored"),
    "adapters, turned": (
        lambda p, x: wave(x @ (p["a"].T @ p["b"].T)), {"a": (2, 6), "b": (4, 2)}, (3, 6), "factored factored",
    ),
    "adapters by einsum": (
        lambda p, x: wave(jnp.einsum("ti,oi->to", x, jnp.einsum("ir,ro->oi", p["a"], p["b"]))), LOW, (3, 6),
        "factored factored",
    ),
    "three matrices": (
        lambda p, x: wave(x @ (p["a"] @ p["m"] @ p["b"])), LOW | {"m": (2, 2)}, (3, 6), "factored factored factored",
    ),
    "rows and columns scaled": (
        lambda p, x: wave(x @ (jnp.arange(1.0, 7)[:, None] * p["w"] / jnp.arange(2.0, 6))), {"w": (6, 4)}, (3, 6),
        "factored",
    ),
    "used in two operands": (
        lambda p, x: wave(x @ adapters(p)) + wave(jnp.cos(x) @ (p["a"] @ jnp.cos(p["b"]))), LOW, (3, 6),
        "factored computed",
    ),
    "the same twice": (lambda p, x: wave(x @ (p["a"] @ p["a"].T)), {"a": (6, 2)}, (3, 6), "factored"),
    "adapters in a scan": (in_steps(adapters), LOW, (3, 6), "factored factored"),
    "adapters and their norm": (
        lambda p, x: wave(x @ (adapters(p) * p["g"] / jnp.linalg.norm(adapters(p), axis=0))), LOW | {"g": (4,)}, (3, 6),
        "computed computed computed",
    ),
    "adapters beside data": (lambda p, x: wave(x @ adapters(p)) + wave(x @ p["a"]), LOW, (3, 6), "computed factored"),
    "straight through": (lambda p, x: wave(x @ through(p)), (6, 4), (3, 6), "factored"),
    "straight through, by hand": (
        lambda p, x: wave(x @ (p + lax.stop_gradient(jnp.sign(p) - p))), (6, 4), (3, 6), "factored",
    ),
    "straight through, in a scan": (in_steps(through), (6, 4), (3, 6), None),
    "a kernel straight through": (
        lambda p, x: wave(lax.conv(x[None], through(p), (1, 1), "SAME")), (3, 2, 3, 3), (2, 5, 5), "factored",
    ),
    "doubled on the way back": (lambda p, x: wave(x @ doubled(p)), (6, 4), (3, 6), "factored"),
    "clipped on the way back": (lambda p, x: wave(x @ clipped(p)), (6, 4), (3, 6), "computed"),
    "nothing on the way back": (
        lambda p, x: wave(x @ of_vjp(jnp.sign, jnp.zeros_like)(p)) + wave(x @ p[:, 0]), (6, 4), (3, 6), None,
    ),
    "nothing but on the way back": (lambda p, x: wave(x @ of_vjp(jnp.sign, jnp.zeros_like)(p)), (6, 4), (3, 6), None),
    "a constant on the way back": (
        lambda p, x: wave(x @ of_vjp(jnp.sign, jnp.ones_like)(p)), (6, 4), (3, 6), "computed",
    ),
    "another constant where it is masked, on the way back": (
        lambda p, x: wave(x @ of_vjp(jnp.sign, lambda g: jnp.where(MASK, g, 0.5))(p)), (6, 4), (6,), "computed",
    ),
    "padded": (
        lambda p, x: wave(x @ lax.pad(p["a"], p["b"], [(1, 1, 0), (1, 2, 0)])), {"a": (4, 3), "b": ()}, (3, 6), None,
    ),
    "masked": (lambda p, x: wave(x @ (p * MASK)), (6, 4), (3, 6), "elementwise"),
    "masked, of one position": (lambda p, x: wave(x @ (p * MASK)), (6, 4), (6,), "elementwise"),
    "masked by a selection": (lambda p, x: wave(x @ jnp.where(MASK, p, 0)), (6, 4), (6,), "elementwise"),
    "soft thresholds": (
        lambda p, x: wave(x @ (jnp.sign(p) * jnp.maximum(jnp.abs(p) - 0.3, 0))), (6, 4), (6,), "elementwise",
    ),
    "two slopes": (lambda p, x: wave(x @ jnp.where(p > 0, 3 * p, jnp.sin(p))), (6, 4), (6,), "elementwise"),
    "softmax": (lambda p, x: wave(x @ jax.nn.softmax(p, axis=0)), (6, 4), (6,), "computed"),
    "a masked kernel": (
        lambda p, x: wave(lax.conv(x[None], p * jnp.cos(jnp.arange(54.0).reshape(3, 2, 3, 3)), (1, 1), "SAME")),
        (3, 2, 3, 3), (2, 5, 5), "elementwise",
    ),
    "positive weights": (lambda p, x: wave(x @ jnp.exp(p)), (6, 4), (6,), "elementwise"),
    "a masked table": (lambda p, x: wave((p * MASK)[jnp.argsort(x)[:3]]), (6, 4), (6,), "elementwise"),
    "an L2 penalty": (lambda p, x: wave(x @ p) + 0.1 * jnp.sum(p**2), (6, 4), (3, 6), "shift"),
    "a penalty and a scale": (
        lambda p, x: wave(x @ p) * jnp.exp(-jnp.sum(p**2)) + jnp.sum(x) * jnp.linalg.norm(p), (6, 4), (3, 6), "shift",
    ),
    "a penalty on one of two": (
        lambda p, x: wave(x @ p["a"] @ p["b"]) + jnp.sum(jnp.abs(p["a"])), LOW, (3, 6), "shift factored",
    ),
    "a penalty on adapters": (
        lambda p, x: wave(x @ adapters(p)) + jnp.sum(adapters(p) ** 2), LOW, (3, 6), "computed computed",
    ),
    "a penalty in each step": (
        lambda p, x: lax.scan(lambda h, row: (h + wave(row @ p) + row[0] * jnp.sum(p**2), None), 0.0, x)[0],
        (6, 4), (3, 6), None,
    ),
    "parts that overlap": (
        lambda p, x: wave(x[:4] @ (p * MASK)[:4]) + wave(x[2:] @ (p * MASK)[2:]), (6, 4), (6,), "computed",
    ),
    "parts that do not": (
        lambda p, x: wave(x[:4] @ (p * MASK)[:4]) + wave(x[4:] @ jnp.cos((p * MASK)[4:])), (6, 4), (6,), None,
    ),
}  # fmt: skip


def of(case, dtype=np.float64):
    loss, shapes, example, _ = CASES[case]
    draw = Draw(1)
    make = lambda shape: jnp.asarray(draw(*shape), dtype)
    params = jax.tree.map(make, shapes, is_leaf=lambda x: isinstance(x, tuple))
    return Problem(loss, params, (jnp.asarray(draw(B, *example), dtype),))


@pytest.mark.sample(lambda case, microbatch_size: microbatch_size is None)
@pytest.mark.parametrize("microbatch_size", [None, 2])
@pytest.mark.parametrize("case", CASES)
def test_what_is_carried(case, microbatch_size, x64):
    check_asked(of(case), microbatch_size)


@pytest.mark.parametrize("case", [case for case, (*_, kinds) in CASES.items() if kinds is not None])
def test_how_it_is_carried(case):
    problem, kinds = of(case, np.float32), CASES[case][-1]
    grads = jgd.per_example_grad(problem.loss, strategy="factored")(problem.params, *problem.batch)
    names = {
        FactoredLeaf: "factored",
        ElementwiseLeaf: "elementwise",
        ShiftedLeaf: "shift",
        ComputedLeaves: "computed",
    }
    found = {}
    for leaf in form_of(grads).leaves():
        for number in leaf.likes if isinstance(leaf, ComputedLeaves) else [leaf.leaf]:
            found[number] = names[type(leaf)]
    assert " ".join(found[k] for k in sorted(found)) == kinds


@pytest.mark.parametrize("case", ["adapters", "straight through", "masked, of one position", "an L2 penalty"])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_norms_of_any_size(case, scale):
    """Squares of these numbers leave float32."""
    problem = of(case, np.float32)
    loss = lambda p, x: scale * problem.loss(p, x)
    wide = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
    got = jgd.norms(
        jgd.per_example_grad(lambda p, x: scale * loss(p, x), strategy="factored")(
            problem.params, *problem.batch
        )
    )
    with jax.enable_x64(True):
        blocks = oracle.vmap_of_grad(Problem(problem.loss, wide(problem.params), wide(problem.batch)))
    want = scale**2 * np.linalg.norm(oracle.matrix(blocks), axis=1)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=1e-5)


ROWS = np.where(np.arange(6) % 2 == 0, 1e-25, 1.0).astype(np.float32)
LARGE = np.repeat(1 / ROWS[:, None], 4, axis=1)
FAR = {  # what is carried leaves float32 where the gradient does not, or only where it is masked
    "large derivatives beside small data": lambda p, x: jnp.sum((x * ROWS) @ (p * LARGE)),
    "large gradients that are masked": lambda p, x: (
        1e10 * jnp.sum((1e10 * x) @ (p * MASK.astype(jnp.float32)))
    ),
    "a small penalty beside nothing": lambda p, x: (
        jnp.sum(jax.nn.relu(x @ p - 100)) + 0.5 * 1e-25 * jnp.sum(jnp.square(p))
    ),
}


@pytest.mark.parametrize("case", FAR)
def test_what_leaves_the_range_on_the_way(case):
    loss = lambda p, x: FAR[case](p, x)
    x, w = (jnp.asarray(Draw(k)(*shape), np.float32) for k, shape in ((1, (B, 6)), (2, (6, 4))))
    blocks = np.asarray(jax.vmap(jax.grad(loss), (None, 0))(w, x), np.float64)
    grads = jgd.per_example_grad(loss, strategy="factored")(w, x)
    np.testing.assert_allclose(jgd.norms(grads), np.linalg.norm(blocks.reshape(B, -1), axis=1), rtol=1e-5)
    with np.errstate(over="ignore"):
        moment = np.mean(blocks**2, axis=0).astype(np.float32)
    np.testing.assert_allclose(jgd.second_moment(grads), moment, rtol=1e-5, atol=1e-37)
    np.testing.assert_allclose(jgd.dot(grads, w), np.sum(blocks * w, axis=(1, 2)), rtol=1e-4)


UNDEFINED = {  # gradients that are not finite where the first, but not the second, leaves them out
    "selected": lambda p: jnp.where(MASK, p, 0),
    "clipped": lambda p: jnp.abs(jnp.where(MASK, p, 0)),
    "multiplied": lambda p: p * MASK,
    "everything left out": lambda p: jnp.where(jnp.zeros((6, 4), bool), p, 1),
}


@pytest.mark.parametrize("kind", UNDEFINED)
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_what_is_not_finite_where_a_selection_leaves_it_out(kind, bad):
    w, x = jnp.asarray(Draw(1)(6, 4), np.float32), jnp.asarray(Draw(2)(B, 6), np.float32)
    scale = jnp.ones((B, 4), np.float32).at[1, 2].set(bad).at[2].set(0)
    loss = lambda p, x, s: jnp.sum(s * (x @ UNDEFINED[kind](p)))
    x = x.at[3, 0].set(bad).at[4].set(0)
    blocks = np.asarray(jax.vmap(jax.grad(loss), (None, 0, 0))(w, x, scale), np.float64)
    got = jgd.norms(jgd.per_example_grad(loss, strategy="factored")(w, x, scale))
    np.testing.assert_allclose(got, np.linalg.norm(blocks.reshape(B, -1), axis=1), rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1.0, 1e15, 1e30])
@pytest.mark.parametrize("case", ["softmax", "adapters and their norm"])
def test_norms_of_tiles_of_any_size(case, scale, monkeypatch):
    """Squares out of range in one tile of several; examples of 0 are no reason to look again."""
    monkeypatch.setattr(computed_leaves, "_QUICK", 1 << 14)  # so that a tile is one example or two
    problem = of(case, np.float32)
    sizes = jnp.asarray([1, scale, 0, 1, scale], jnp.float32)
    loss = lambda p, x, size: size * problem.loss(p, x)
    blocks = jax.vmap(jax.grad(problem.loss), (None, 0))(problem.params, *problem.batch)
    want = np.float64(sizes) * np.linalg.norm(np.float64(oracle.matrix(blocks)), axis=1)
    ask = lambda p, *batch: jgd.norms(jgd.per_example_grad(loss, strategy="factored")(p, *batch))
    for asked in (ask, jax.jit(ask)):
        np.testing.assert_allclose(asked(problem.params, *problem.batch, sizes), want, rtol=1e-5)


@pytest.mark.parametrize(("derivative", "scale"), [(1e-25, 1e8), (1e-22, 1e7), (1e20, 1e-5), (1.0, 1.0)])
def test_moments_whose_derivatives_are_far_from_1(derivative, scale):
    """Their squares leave float32, and the moments do not."""
    w, x = jnp.asarray(Draw(1)(6, 4), jnp.float32), jnp.asarray(Draw(2)(B, 6), jnp.float32)
    loss = lambda p, x: scale * jnp.sum(jnp.tanh(x) @ (p * np.float32(derivative * (1 + MASK))))
    blocks = np.float64(jax.vmap(jax.grad(loss), (None, 0))(w, x))
    grads = jgd.per_example_grad(loss, strategy="factored")(w, x)
    for got, want in (
        (jgd.second_moment(grads), np.mean(blocks**2, axis=0)),
        (jgd.variance(grads), np.var(blocks, axis=0, ddof=1)),
    ):
        assert np.max(np.abs(got - want)) < 1e-5 * np.max(want)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_a_way_back_that_leaves_nothing_of_one_direction(scale):
    """Signs that the engine tries a way back on may cancel in it: that says nothing of the gradients."""
    w = jnp.asarray([2.0, 3.0], jnp.float32)
    loss = lambda p, x: scale * wave(x @ (jax.nn.softmax(p)[0] * jnp.ones((8, 8))))
    x = jnp.asarray(Draw(1)(B, 8), jnp.float32)
    blocks = np.float64(jax.vmap(jax.grad(lambda p, x: loss(p, x) / scale), (None, 0))(w, x))
    got = np.float64(jgd.norms(jgd.per_example_grad(loss, strategy="factored")(w, x)))
    np.testing.assert_allclose(got / scale, np.linalg.norm(blocks, axis=1), rtol=1e-4)


@pytest.mark.parametrize("left", [0.0, 1e-4, 1e-2])
def test_a_penalty_that_cancels_the_rest(left):
    """The norm of a difference, to float32's digits of the difference."""
    x = jnp.asarray(Draw(1)(B, 6), np.float32)
    w = jnp.asarray(Draw(2)(6, 4), np.float32)
    loss = lambda p, x: (
        jnp.sum(p * lax.stop_gradient(w)) * (left - 1) + 0.5 * jnp.sum(p**2) + left * wave(x @ p)
    )
    blocks = jax.vmap(jax.grad(loss), (None, 0))(w, x)
    got = jgd.norms(jgd.per_example_grad(loss, strategy="factored")(w, x))
    want = np.linalg.norm(np.asarray(blocks, np.float64).reshape(B, -1), axis=1)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-30)  # the block rounds to 1e-3 of 1e-4


@pytest.mark.parametrize("case", ["adapters", "masked", "straight through", "an L2 penalty"])
def test_an_absent_example_may_hold_anything(case):
    problem = of(case, np.float32)
    x = problem.batch[0].at[1].set(jnp.nan)
    ask = lambda x: jgd.sum(
        jgd.per_example_grad(problem.loss, strategy="factored")(problem.params, x), WEIGHTS
    )
    for got, want in zip(jax.tree.leaves(ask(x)), jax.tree.leaves(ask(problem.batch[0])), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
