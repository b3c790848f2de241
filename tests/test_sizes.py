"""Every rule, by every form, where axes have no elements, one or two: of examples, of positions, of the parameters."""

import functools
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from cases import Draw, Problem
from internals import form_of, rules_of
from jax import lax
from jax.lax import GatherDimensionNumbers, GatherScatterMode

import jgd

NHC = ("NHC", "HIO", "NHC")

# One program holds all sizes of a rule: each has a leaf of its own. What meets data is drawn for each example.


def products(draw, size, sizes):
    """`(g, t, p, q)`: groups, positions, contracted, free."""
    for g, t, p, q in sizes:
        yield draw(g, p, q), (draw(size, t, g, p),), lambda w, x: jnp.einsum("gpq,tgp->tgq", w, x)


def kernels(draw, size, sizes):
    """`(images, length, window, in, out)`, in one group and in two."""
    for n, length, window, channels, out in sizes:
        for groups in (1, 2):

            def convolved(w, x, groups=groups):
                return lax.conv_general_dilated(
                    x, w, (1,), [(1, 0)], dimension_numbers=NHC, feature_group_count=groups
                )

            yield draw(window, channels, groups * out), (draw(size, n, length, groups * channels),), convolved


def rows(draw, size, sizes):
    """`(rows, lookups, columns)`, by several ids."""
    for r, t, q in sizes:
        ids = draw.integers(r + 1, size, t)
        yield draw(r, q), (ids,), lambda p, ids: jnp.take(p, ids, axis=0)
        yield draw(q, r), (ids,), lambda p, ids: jnp.take(p, ids, axis=1, mode="clip")
        yield draw(r, q), (ids,), whole_table


def slices(draw, size, sizes):
    """`(rows, columns)`, by one id: a row, a column, all of them."""
    for r, q in sizes:
        ids = draw.integers(r + 1, size)
        yield draw(r, q), (ids,), lambda p, i: p[i]
        yield draw(r, q), (ids,), lambda p, i: lax.dynamic_slice_in_dim(p, i, 1)
        yield draw(r, q), (ids,), lambda p, i: lax.dynamic_slice(p, (i, i), p.shape)
        yield draw(r, q), (ids,), lambda p, i: lax.dynamic_slice(p, (i, i), (1, min(1, p.shape[1])))


def whole_table(p, ids):
    """The table as it is for each id: a gather along none of its axes."""
    numbers, nowhere = GatherDimensionNumbers((1, 2), (), ()), jnp.zeros((*ids.shape, 0), ids.dtype)
    tables = lax.gather(p, nowhere, numbers, p.shape, mode=GatherScatterMode.CLIP)
    return tables * ids[:, None, None]


def tied(draw, size, sizes):
    """`(rows, lookups, columns)`: a table looked up and multiplied."""
    for r, t, q in sizes:
        ids = draw.integers(r, size, t)
        yield draw(r, q), (ids,), lambda p, ids: jnp.sin(jnp.take(p, ids, axis=0)) @ p.T


def others(draw, size, sizes):
    """`(positions, width)`: without a rule."""
    for t, width in sizes:
        x = draw(size, t, width)
        yield draw(width), (x,), lambda p, x: x * p
        yield draw(width), (x,), lambda p, x: x + p
        yield draw(t, width), (x,), lambda p, x: jnp.concatenate([x, p]) * jnp.arange(2 * x.shape[0])[:, None]
        yield draw(width, width), (x,), lambda p, x: jax.nn.softmax(x[:, None] * p)


def loops(draw, size, sizes):
    """`(steps, width, other width)`: one matrix at each step, one for each step, lookups, a scale, a kernel."""
    for steps, p, q in sizes:
        x, ids = draw(size, steps, p), draw.integers(2, size, steps)

        def shared(w, x):
            return lax.scan(lambda h, x: (jnp.tanh(h + x @ w), h), jnp.zeros(w.shape[1]), x)

        def stepped(w, x):
            return lax.scan(lambda h, own: (jnp.tanh(h + own[1] @ own[0]), h), jnp.zeros(w.shape[2]), (w, x))

        def looked_up(w, ids):
            return lax.scan(
                lambda h, i: (jnp.tanh(h + jnp.take(w, i, axis=0)), h), jnp.zeros(w.shape[1]), ids
            )

        def tables(w, ids):
            return lax.scan(lambda h, own: (jnp.tanh(h + own[0][own[1]]), h), jnp.zeros(w.shape[2]), (w, ids))

        def scaled(w, x):
            return lax.scan(lambda h, x: (jnp.tanh(h + x * w), h), jnp.zeros(w.shape[0]), x)

        def convolved(w, x):
            def step(h, x):
                out = lax.conv_general_dilated(x.reshape(1, -1, 1), w, (1,), "SAME", dimension_numbers=NHC)
                return jnp.tanh(h + jnp.sum(out, axis=(0, 1))), h

            return lax.scan(step, jnp.zeros(w.shape[2]), x)

        yield draw(p, q), (x,), shared
        if p:
            yield draw(2, 1, q), (x,), convolved
        yield draw(steps, p, q), (x,), stepped
        yield draw(2, q), (ids,), looked_up
        yield draw(steps, 2, q), (ids,), tables
        yield draw(p), (x,), scaled


RULES = {
    "products": (products, (3, 3, 3, 3)),
    "kernels": (kernels, (3, 3, 3, 3, 3)),
    "rows": (rows, (3, 3, 3)),
    "slices": (slices, (3, 3)),
    "tied": (tied, (3, 3, 3)),
    "others": (others, (3, 3)),
    "loops": (loops, (3, 3, 3)),
}
AT_LEAST_ONE = {
    "kernels": (2,),
    "rows": (0,),
    "slices": (0,),
    "tied": (0,),
}  # axes that JAX wants elements on


def sizes_of(name, *, every):
    """All sizes of 0, 1 and 2 on every axis; or those that are 1 on all axes, or on all but one that has none."""
    found = itertools.product(*map(range, RULES[name][1]))
    kept = (at for at in found if all(at[axis] > 0 for axis in AT_LEAST_ONE.get(name, ())))
    return [at for at in kept if every or (sum(k != 1 for k in at) <= 1 and max(at) == 1)]


def problem_of(name, size, sizes):
    build = RULES[name][0]
    params, batches, losses = zip(*build(Draw(3), size, sizes), strict=True)

    def loss(params, batches):
        total = 0.0
        for number, (p, x, fun) in enumerate(zip(params, batches, losses, strict=True)):
            for out in jax.tree.leaves(fun(p, *x)):
                out = jnp.where(jnp.isnan(out), 0.1, out)
                at = jnp.cos(number + jnp.arange(out.size)).reshape(out.shape)
                total += jnp.sum(jnp.sin(at * out + 0.1 * jnp.sum(out)))
        return total

    cast = lambda tree: jax.tree.map(jnp.asarray, tree)
    return Problem(loss, cast(list(params)), (cast(list(batches)),))


def ask(grads, size, direction, *, every):
    weights = np.array([0.5, 0.0])[:size]
    asked = {
        "sum": jgd.sum(grads),
        "leaf_norms": jgd.norms(grads, per_leaf=True),
        "gram": jgd.gram(grads),
        "weighted_clipped_sum": jgd.clipped_sum(grads, 0.5, weights=weights),
        "dot": jgd.dot(grads, direction),
        "project": jgd.project(grads, jax.random.key(0), 2),
    }
    if every:
        asked["materialize"] = jgd.materialize(grads)
        asked["weighted_sum"] = jgd.sum(grads, weights)
        asked["norms"] = jgd.norms(grads)
        asked["cross_gram"] = jgd.gram(grads, grads)
        asked["clipped_sum"] = jgd.clipped_sum(grads, 0.5)
    if size > 0:
        asked["second_moment"] = jgd.second_moment(grads)
    if size > 0 and every:
        asked["mean"] = jgd.mean(grads)
        asked["weighted_second_moment"] = jgd.second_moment(grads, weights)
    if size > 1:
        asked["variance"] = jgd.variance(grads)
    if size > 1 and every:
        scale = jgd.noise_scale(grads)
        asked["noise_scale"] = scale.trace_covariance, scale.squared_norm
    return asked


def answers_of(blocks, size, direction):
    """The oracle's answers; of no examples a sum is 0, and what each has is empty."""
    if size:
        with warnings.catch_warnings(action="ignore"):  # of one example there is no variance
            want = oracle.answers(blocks, blocks, np.array([0.5, 0.0])[:size], 0.5, direction)
    else:
        zeros = jax.tree.map(lambda x: np.zeros(x.shape[1:]), blocks)
        sums = ("sum", "weighted_sum", "clipped_sum", "weighted_clipped_sum")
        want = {name: zeros for name in sums} | {
            "materialize": blocks,
            "norms": np.zeros(0),
            "dot": np.zeros(0),
        }
        want |= {"leaf_norms": jax.tree.map(lambda x: np.zeros(0), blocks)}
        want |= {name: np.zeros((0, 0)) for name in ("gram", "cross_gram")}
    want["project"] = jgd.project(jax.tree.map(jnp.asarray, blocks), jax.random.key(0), 2)
    return want


FORMS = {
    "auto": {},
    "factored": {"strategy": "factored"},
    "materialized": {"strategy": "materialized"},
    "one_by_one": {"strategy": "factored", "microbatch_size": 1},
    "in_threes": {"strategy": "factored", "microbatch_size": 3},
}


def compare(name, size, form, sizes, *, every):
    problem = problem_of(name, size, sizes)
    blocks = oracle.vmap_of_grad(problem)
    direction = [np.cos(np.arange(x.size)).reshape(x.shape) for x in problem.params]
    made = jgd.per_example_grad(problem.loss, **FORMS[form])
    got = jax.jit(lambda params, *batch: ask(made(params, *batch), size, direction, every=every))(
        problem.params, *problem.batch
    )
    want = answers_of(blocks, size, direction)
    for quantity, answer in got.items():
        oracle.assert_close(answer, want[quantity], 1e-9, what=quantity)


def _quick():
    for name in RULES:
        yield from ((name, "factored", size) for size in (0, 2))
    for form in FORMS:
        yield "slices", form, 1
        yield "tied", form, 0


# Each rule at one size, each form with slices.
BY_DEFAULT = {"products": 2, "kernels": 2, "rows": 0, "slices": 1, "tied": 0, "others": 2, "loops": 0}


@pytest.mark.sample(
    lambda name, form, size: size == BY_DEFAULT[name] and (form == "factored" or name == "slices")
)
@pytest.mark.parametrize(("name", "form", "size"), sorted(set(_quick())))
def test_sizes(name, form, size, x64):
    compare(name, size, form, sizes_of(name, every=False), every=False)


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 1, 2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", RULES)
def test_every_size(name, form, size, x64):
    sizes = sizes_of(name, every=True)
    for first in range(0, len(sizes), 27):
        compare(name, size, form, sizes[first : first + 27], every=True)


def dense_and_rows(w, x):
    return jnp.sum(jnp.tanh(x @ w["dense"]) ** 2) + jnp.sum(w["rows"][x[:2, 0].astype(int)])


WEIGHTS = {"dense": jnp.ones((3, 2)), "rows": jnp.ones(4)}
WAYS_TO_MAKE = (
    {"strategy": "factored", "microbatch_size": 1},
    {"microbatch_size": 2},
    {"max_memory": 10_000},
    {"autotune": True},
)


@pytest.mark.parametrize("options", WAYS_TO_MAKE, ids=str)
def test_no_examples_beside_some(options):
    grads_of = jgd.per_example_grad(dense_and_rows, **options)
    none, some = (grads_of(WEIGHTS, jnp.ones((size, 5, 3))) for size in (0, 2))
    assert len(none) == 0 and none.values.shape == (0,)
    assert jgd.gram(none, some).shape == (0, 2) and jgd.gram(some, none).shape == (2, 0)
    zeros = jax.tree.map(jnp.zeros_like, WEIGHTS)
    for answer in (jgd.sum(none), jgd.clipped_sum(none, 1.0), jgd.sum(none, jnp.zeros(0))):
        jax.tree.map(np.testing.assert_array_equal, answer, zeros)
    for reduction in (jgd.mean, jgd.second_moment, jgd.variance, jgd.noise_scale):
        with pytest.raises(ValueError, match="`grads`"):
            reduction(none)


@pytest.mark.parametrize(
    "reduce", [jgd.sum, functools.partial(jgd.clipped_sum, max_norm=1.0)], ids=["sum", "clipped"]
)
def test_a_step_on_no_examples_has_a_gradient_of_zeros(reduce):
    method = jgd.descent(dense_and_rows, optax.sgd(0.1), reduce=reduce)
    state, info = method.step(method.init(WEIGHTS), jnp.ones((0, 5, 3)))
    assert state.step == 1 and info.grad_norm == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, WEIGHTS)


def test_more_rows_than_numbers_for_them_are_left_to_the_fallback():
    """Nothing is computed: only shapes go through."""
    at = jax.ShapeDtypeStruct((2, 3), jnp.int32)
    for rows, first, rule in ((2**15, 0, {"Lookup"}), (2**16, 0, set()), (2**17, 1, set())):
        table = jax.ShapeDtypeStruct((rows, 2**15, 1), jnp.float32)
        loss = lambda p, i, j, first=first: jnp.sum(jnp.sin(p[:, first:][i, j]))
        grads = jax.eval_shape(jgd.per_example_grad(loss, strategy="factored"), table, at, at)
        assert rules_of(form_of(grads).plan) == rule
        assert jax.eval_shape(jgd.norms, grads).shape == (2,)
