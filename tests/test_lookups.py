"""Lookups at the edges: ids of every integer type in every way to look up, and ids out of bounds, as padding has them.

What is right there is what JAX's derivative does: with some ways the row at the edge gets δ, with others no row does.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import B, Draw, Problem
from internals import forced, form_of, rules_of, with_form
from jax import lax
from jax.lax import GatherDimensionNumbers, GatherScatterMode

import jgd

WEIGHTS = np.array([1.5, 0.0, 0.5, 2.0, 1.0])
ROWS = GatherDimensionNumbers((1,), (0,), (0,))


def gathered(mode):
    return lambda p, ids: lax.gather(p, ids[:, None], ROWS, (1, p.shape[1]), mode=mode)


def one_by_one(take):
    return lambda p, ids: lax.map(lambda i: take(p, i), ids)


WAYS = {
    "indexed": lambda p, ids: p[ids],
    "taken": lambda p, ids: jnp.take(p, ids, axis=0),
    "taken_clipped": lambda p, ids: jnp.take(p, ids, axis=0, mode="clip"),
    "filled": lambda p, ids: p.at[ids].get(mode="fill", fill_value=0.5),
    "promised": lambda p, ids: p.at[ids].get(mode="promise_in_bounds"),
    "along": lambda p, ids: jnp.take_along_axis(p, ids[:, None], axis=0),
    "clamped": gathered(GatherScatterMode.CLIP),
    "dropped": gathered(GatherScatterMode.FILL_OR_DROP),
    "as_they_are": gathered(GatherScatterMode.PROMISE_IN_BOUNDS),
    "columns": lambda p, ids: jnp.take(p.T, ids, axis=1).T,
    "points": lambda p, ids: jnp.take(p.reshape(-1, 1, p.shape[1]), ids, axis=0)[:, 0] + p[ids, :1],
    "one_by_one": one_by_one(lambda p, i: p[i]),
    "sliced": one_by_one(lambda p, i: lax.dynamic_slice_in_dim(p, i, 1)[0]),
    "index_in_dim": one_by_one(lambda p, i: lax.dynamic_index_in_dim(p, i, keepdims=False)),
}


PRIMITIVES = ("clamped", "dropped", "as_they_are", "sliced", "index_in_dim")


def every_way(tables, ids):
    """One loss with a table for each way."""
    total = 0.0
    for number, name in enumerate(tables):
        rows = WAYS[name](tables[name], ids)
        rows = jnp.where(jnp.isnan(rows), 0.3, rows)
        at = jnp.cos(number + jnp.arange(rows.size)).reshape(rows.shape)
        total += jnp.sum(jnp.sin(at * rows + 0.1 * jnp.sum(rows)))
    return total


def ids_of(dtype, rows):
    """Those at both ends of the table and of the dtype, around them, and a few in the midst."""
    info = jnp.iinfo(dtype)
    least, most = int(info.min), int(info.max)
    ends = [0, 1, rows - 2, rows - 1, rows, rows + 3, most, most - 1, 43, 100]
    if most >= rows:  # else JAX itself counts negative ids from an end that the dtype does not reach
        ends += [-1, -2, -rows, -rows - 1, least, least + 1]
    held = [i for i in ends if least <= i <= most]
    some = [held[(7 * k) % len(held)] for k in range(3 * B)]
    return jnp.asarray(np.array(some, np.int64 if least < 0 else np.uint64).reshape(B, 3)).astype(dtype)


def _types():
    for bits, rows in ((8, 300), (8, 5), (16, 70_000), (16, 5), (32, 5), (64, 5)):
        for dtype in (f"uint{bits}", f"int{bits}"):
            yield dtype, rows


def answers_of(problem, strategy="factored"):
    """What a few reductions give, in one program, and the gradients."""

    def answers(params, *batch):
        grads = jgd.per_example_grad(problem.loss, strategy=strategy)(params, *batch)
        asked = {
            "leaf_norms": jgd.norms(grads, per_leaf=True),
            "gram": jgd.gram(grads),
            "sum": jgd.sum(grads),
            "weighted_clipped_sum": jgd.clipped_sum(grads, 0.5, weights=WEIGHTS),
            "second_moment": jgd.second_moment(grads),
            "variance": jgd.variance(grads),
        }
        return asked, grads

    return jax.jit(answers)(problem.params, *problem.batch)


@pytest.mark.sample(lambda dtype, rows: (dtype, rows) == ("uint8", 300))
@pytest.mark.parametrize(("dtype", "rows"), list(_types()))
def test_ids_of_every_integer_type(dtype, rows, x64):
    # JAX refuses negative ids of a dtype that does not reach the end they are counted from.
    ways = PRIMITIVES if dtype.startswith("int") and rows > jnp.iinfo(dtype).max else WAYS
    tables = {name: jnp.asarray(Draw(1)(rows, 2)) for name in ways}
    ids = ids_of(dtype, rows)
    got, grads = answers_of(Problem(every_way, tables, (ids,)))
    assert rules_of(form_of(grads).plan) == {"Lookup"}
    # The same ids in a dtype that XLA does not wrap: `vmap(grad)` itself is wrong for narrow ones on some versions.
    wide = ids.astype(jnp.int64) if ids.dtype.itemsize < 4 else ids
    blocks = oracle.vmap_of_grad(Problem(every_way, tables, (wide,)))
    want = oracle.answers(blocks, blocks, WEIGHTS, 0.5, tables)
    for name, answer in got.items():
        oracle.assert_close(answer, want[name], 1e-9, what=name)


# Ids out of bounds, whose derivative is nan, although no row gets it


def padded(take):
    """A loss of lookups by `take`, in which what padding reads is nan and left out."""

    def loss(p, ids):
        there = (ids < 7) & (ids > -8)
        rows = take(p, ids)
        rows = rows * jnp.where(there, 1.0, jnp.nan).reshape(there.shape + (1,) * (rows.ndim - ids.ndim))
        safe = jnp.sin(0.3 + rows)
        return jnp.sum(
            jnp.where(jnp.isnan(safe), 0.0, safe) * jnp.cos(jnp.arange(safe.size)).reshape(safe.shape)
        )

    return loss


def tied(take):
    """A lookup, and a product of the same table."""
    own = padded(take)
    return lambda p, ids, x: own(p, ids) + jnp.sum(jnp.sin(p @ x))


def scanned(p, ids):
    """Each step looks up in a table of its own."""
    own = padded(lambda p, ids: jnp.take(p, ids, axis=0))
    return lax.scan(lambda total, p: (total + own(p, ids), None), 0.0, p)[0]


def two_axes(p, ids):
    return padded(lambda p, ids: p.at[ids, ids[::-1]].get(mode="fill"))(p.reshape(7, 7, -1), ids)


TAKES = {
    "filled": lambda p, ids: jnp.take(p, ids, axis=0),
    "promised": lambda p, ids: p.at[ids].get(mode="promise_in_bounds"),
    "windows": lambda p, ids: lax.gather(
        p, ids[:, None], GatherDimensionNumbers((1, 2), (), (0,)), (2, 2), mode=GatherScatterMode.FILL_OR_DROP
    ),
}


def out_of_bounds():
    draw = Draw(7)
    ids = np.array([[1, 5, 7, 2], [2, 9, 9, 2], [3, 4, 5, 6], [6, 6, 6, 6], [8, 7, 9, 100]])
    x = draw(B, 2)
    for name, take in TAKES.items():
        yield name, padded(take), draw(7, 2), (ids,)
    yield "tied", tied(TAKES["filled"]), draw(7, 2), (ids, x)
    yield "tied_promised", tied(TAKES["promised"]), draw(7, 2), (ids, x)
    yield "scanned", scanned, draw(2, 7, 2), (ids,)
    yield "two_axes", two_axes, draw(49, 2), (ids,)
    yield "numbers", padded(TAKES["filled"]), draw(7), (ids,)


OUT_OF_BOUNDS = {name: rest for name, *rest in out_of_bounds()}


def ask(grads, other, max_norm):
    scale = jgd.noise_scale(grads)
    return {
        "materialize": jgd.materialize(grads),
        "sum": jgd.sum(grads),
        "weighted_sum": jgd.sum(grads, WEIGHTS),
        "mean": jgd.mean(grads),
        "norms": jgd.norms(grads),
        "leaf_norms": jgd.norms(grads, per_leaf=True),
        "gram": jgd.gram(grads),
        "cross_gram": jgd.gram(grads, other),
        "clipped_sum": jgd.clipped_sum(grads, max_norm),
        "weighted_clipped_sum": jgd.clipped_sum(grads, max_norm, weights=WEIGHTS),
        "second_moment": jgd.second_moment(grads),
        "weighted_second_moment": jgd.second_moment(grads, WEIGHTS),
        "variance": jgd.variance(grads),
        "weighted_variance": jgd.variance(grads, WEIGHTS),
        "noise_scale": (scale.trace_covariance, scale.squared_norm),
        "project": jgd.project(grads, jax.random.key(0), 3),
    }


def _forced():
    quick = {("pairs", "tied"), ("pairs", "scanned"), ("block", "promised")}
    for each in itertools.product(("pairs", "block"), OUT_OF_BOUNDS):
        marks = (
            ()
            if each in quick
            else (pytest.mark.slow, pytest.mark.sample)
            if each == ("pairs", "filled")
            else pytest.mark.slow
        )
        yield pytest.param(*each, marks=marks)


@pytest.mark.parametrize(("method", "name"), list(_forced()))
def test_what_was_read_for_no_row_reaches_no_answer(method, name, x64):
    loss, params, batch = OUT_OF_BOUNDS[name]
    problem = Problem(loss, jnp.asarray(params), tuple(map(jnp.asarray, batch)))
    others = tuple(x[::-1] for x in problem.batch)
    blocks = oracle.vmap_of_grad(problem)
    other_blocks = oracle.vmap_of_grad(dataclasses.replace(problem, batch=others))
    assert np.all(np.isfinite(blocks)) and np.any(blocks[:4] != 0)

    @jax.jit
    def answers(params, batch, others):
        made = jgd.per_example_grad(loss, strategy="factored")
        grads = forced(made(params, *batch), method)
        other = with_form(
            grads, dataclasses.replace(form_of(grads), residuals=made(params, *others)._form.residuals)
        )
        return ask(grads, other, 0.5)

    want = oracle.answers(blocks, other_blocks, WEIGHTS, 0.5, params)
    want["project"] = jgd.project(jnp.asarray(blocks), jax.random.key(0), 3)
    for quantity, got in answers(problem.params, problem.batch, others).items():
        oracle.assert_close(got, want[quantity], 1e-9, what=quantity)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_has_no_finite_inner_product(bad, x64):
    """Not with the gradients of examples that looked up other rows either, as without the library."""
    scale = np.ones((3, 3))
    scale[0, 1] = bad
    ids = np.array([[0, 1, 2], [3, 4, 3], [1, 5, 6]])
    loss = lambda p, ids, scale: jnp.sum(jnp.sin(p[ids]) * scale[:, None] * jnp.array([1.0, 2.0]))
    grads = jgd.per_example_grad(loss, strategy="factored")(Draw(0)(7, 2), ids, scale)
    gram, norms = jgd.gram(grads), jgd.norms(grads)
    assert not np.any(np.isfinite(gram[0])) and not np.any(np.isfinite(gram[:, 0]))
    assert np.all(np.isfinite(gram[1:, 1:])) and not np.isfinite(norms[0]) and np.all(np.isfinite(norms[1:]))
