"""What must hold for any batch: laws of the reductions, on random batches and weights."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import problem
from hypothesis import given
from hypothesis.extra.numpy import arrays

import jgd

pytestmark = pytest.mark.usefixtures("x64")
SIZE = 6
STRATEGIES = ("factored", "materialized")
TOLERANCE = 1e-10

seeds = st.integers(0, 2**32 - 1)
weights = arrays(np.float64, SIZE, elements=st.floats(0, 10, width=32) | st.just(0.0))
some_weight = weights.filter(lambda w: w.sum() > 0.1)
thresholds = st.floats(0, 20, width=32)
forms = st.sampled_from(
    [(name, strategy) for name in ("dense", "lookup", "sequence") for strategy in STRATEGIES]
)


def dense(p, x, ix):
    return jnp.sum(jnp.sin(jnp.tanh(x @ p["w"] + p["b"]) * p["scale"]))


def lookup(p, x, ix):
    hidden = jnp.tanh(p["w"][ix] * p["scale"] + p["b"])
    return jnp.sum(jnp.sin(hidden @ p["w"].T))


def sequence(p, x, ix):
    step = lambda h, x: (jnp.tanh(x @ p["w"] * p["scale"] + h + p["b"]), None)
    return jnp.sum(jax.lax.scan(step, jnp.zeros(3), x)[0] ** 2)


def shifted(loss):
    """A loss with a constant added to each element of its gradient."""
    return lambda p, x, ix, shift: loss(p, x, ix) + shift * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(p))


LOSSES = {"dense": dense, "lookup": lookup, "sequence": sequence}
LOSSES |= {f"shifted {name}": shifted(loss) for name, loss in LOSSES.items()}
PARAMS = {
    "w": np.random.default_rng(0).normal(size=(4, 3)),
    "b": np.random.default_rng(1).normal(size=3),
    "scale": np.float64(0.7),
}


def examples(seed, size=SIZE):
    """A batch whose examples differ in scale, so that some are clipped and some are not."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(size, 5, 4)) * np.exp(rng.normal(size=(size, 1, 1)))
    return x, rng.integers(0, 4, size=(size, 5))


# Functions of arrays, compiled once for each loss: hypothesis calls them a hundred times.


@functools.cache
def compiled(form, reduction):
    name, strategy = form
    gradient_of = jgd.per_example_grad(LOSSES[name], strategy=strategy)
    return jax.jit(lambda batch, *args, **kwargs: reduction(gradient_of(PARAMS, *batch), *args, **kwargs))


def clipped(grads, max_norm, weights):
    return jgd.clipped_sum(grads, max_norm, weights=weights)


def everything(grads, weights, max_norm):
    """The reductions that know weights."""
    return {
        "sum": jgd.sum(grads, weights),
        "mean": jgd.mean(grads, weights),
        "clipped_sum": jgd.clipped_sum(grads, max_norm, weights=weights),
        "second_moment": jgd.second_moment(grads, weights),
        "variance": jgd.variance(grads, weights),
    }


def by_example(grads):
    """The reductions that answer for each example."""
    direction = jax.tree.map(jnp.ones_like, PARAMS)
    return {
        "norms": jgd.norms(grads),
        "dot": jgd.dot(grads, direction),
        "project": jgd.project(grads, jax.random.key(0), 4),
        "materialize": jgd.materialize(grads),
        "values": grads.values,
    }


def close(got, want, scale=None):
    want = jax.tree.map(np.asarray, want)
    if scale is not None:  # of what cancels in the answer
        got, want = ((tree, np.float64(scale)) for tree in (got, want))
    oracle.assert_close(got, want, TOLERANCE)


def plus(a, b):
    return jax.tree.map(jnp.add, a, b)


def size_of(tree):
    return max(float(np.max(np.abs(x))) for x in jax.tree.leaves(tree))


@given(forms, seeds, weights, weights, st.floats(-3, 3))
def test_sums_are_linear_in_the_weights(form, seed, one, two, factor):
    batch, ask = examples(seed), compiled(form, jgd.sum)
    parts = ask(batch, one), jax.tree.map(lambda x: factor * x, ask(batch, two))
    close(ask(batch, one + factor * two), plus(*parts), max(map(size_of, parts)))


@given(forms, seeds, weights, weights, thresholds)
def test_clipped_sums_are_linear_in_the_weights(form, seed, one, two, max_norm):
    batch, ask = examples(seed), compiled(form, clipped)
    close(ask(batch, max_norm, one + two), plus(ask(batch, max_norm, one), ask(batch, max_norm, two)))


@given(forms, seeds, some_weight, thresholds, st.floats(0.125, 8))
def test_means_do_not_change_with_the_scale_of_the_weights(form, seed, w, max_norm, factor):
    batch, ask = examples(seed), compiled(form, everything)
    one, other = ask(batch, w, max_norm), ask(batch, factor * w, max_norm)
    for quantity in ("mean", "second_moment"):
        close(other[quantity], one[quantity])


@given(forms, seeds, some_weight, thresholds, st.permutations(range(SIZE)))
def test_the_order_of_the_examples_does_not_matter(form, seed, w, max_norm, order):
    x, ix = examples(seed)
    order = np.array(order)
    ask = compiled(form, by_example)
    close(ask((x[order], ix[order])), jax.tree.map(lambda a: a[order], ask((x, ix))))
    ask = compiled(form, everything)
    one, other = ask((x, ix), w, max_norm), ask((x[order], ix[order]), w[order], max_norm)
    for quantity in ("sum", "mean", "clipped_sum", "second_moment"):
        close(other[quantity], one[quantity])
    gram = compiled(form, jgd.gram)
    close(gram((x[order], ix[order])), gram((x, ix))[order][:, order])


@pytest.mark.slow
@pytest.mark.sample
@given(forms, seeds, weights, thresholds, st.just(2))
def test_a_batch_may_be_split(form, seed, w, max_norm, at):
    x, ix = examples(seed)
    parts = [((x[s], ix[s]), w[s]) for s in (slice(None, at), slice(at, None))]
    for reduction, args in ((jgd.sum, ()), (clipped, (max_norm,))):
        ask = compiled(form, reduction)
        close(ask((x, ix), *args, w), plus(*(ask(batch, *args, part) for batch, part in parts)))
    ask = compiled(form, by_example)
    joined = jax.tree.map(lambda *a: jnp.concatenate(a), *(ask(batch) for batch, _ in parts))
    close(ask((x, ix)), joined)


@given(forms, seeds, st.sampled_from([1, 3]), thresholds)
def test_any_microbatch_gives_the_same_clipped_sum(form, seed, size, max_norm):
    batch, ask = examples(seed), compiled(form, jgd.clipped_sum)
    parts = jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), batch)
    in_turn = jax.lax.map(lambda part: ask(part, max_norm), parts)
    close(jax.tree.map(lambda a: a.sum(0), in_turn), ask(batch, max_norm))


@given(
    forms, seeds, some_weight, thresholds, st.integers(0, SIZE), st.sampled_from([0.0, np.nan, np.inf, 1e300])
)
def test_an_absent_example_changes_nothing(form, seed, w, max_norm, place, value):
    x, ix = examples(seed)
    padded = np.insert(x, place, value, axis=0), np.insert(ix, place, 0, axis=0)
    ask = compiled(form, everything)
    if np.count_nonzero(w) > 1:
        close(ask(padded, np.insert(w, place, 0.0), max_norm), ask((x, ix), w, max_norm))


@given(forms, seeds, st.floats(0.01, 20), st.integers(0, SIZE - 1), st.sampled_from([1.0, 1e8, np.nan]))
def test_one_example_moves_a_clipped_sum_by_no_more_than_its_bound(form, seed, max_norm, index, scale):
    x, ix = examples(seed)
    x[index] *= scale
    ask = compiled(form, jgd.clipped_sum)
    with_it = ask((x, ix), max_norm)
    without = ask((np.delete(x, index, 0), np.delete(ix, index, 0)), max_norm)
    apart = jax.tree.map(lambda a, b: jnp.sum(jnp.square(a - b)), with_it, without)
    moved = np.sqrt(sum(jax.tree.leaves(apart)))
    assert moved <= max_norm * (1 + 1e-9) + 1e-12


@given(forms, seeds)
def test_a_gram_is_symmetric_and_positive_with_squared_norms_on_its_diagonal(form, seed):
    batch = examples(seed)
    gram = np.asarray(compiled(form, jgd.gram)(batch))
    close(gram, gram.T)
    close(np.diag(gram), np.square(compiled(form, jgd.norms)(batch)))
    assert np.linalg.eigvalsh(gram).min() >= -TOLERANCE * np.abs(gram).max()


@given(forms, seeds, weights)
def test_norms_and_dots_agree_with_sums(form, seed, w):
    """⟨g_i, Σ w_j g_j⟩ = Σ_j w_j ⟨g_i, g_j⟩, and ‖g_i‖² is the sum over its leaves."""
    batch = examples(seed)
    total = compiled(form, jgd.sum)(batch, w)
    gram = compiled(form, jgd.gram)(batch)
    close(compiled(form, jgd.dot)(batch, total), gram @ w, np.abs(gram).max() * max(w.max(), 1))
    leaves = compiled(form, functools.partial(jgd.norms, per_leaf=True))(batch)
    close(np.sqrt(sum(np.square(x) for x in jax.tree.leaves(leaves))), compiled(form, jgd.norms)(batch))


@given(forms, seeds, st.floats(1, 1e6))
def test_a_variance_does_not_cancel(form, seed, shift):
    """A loss that adds a large constant gradient to each example leaves the variance as it is."""
    batch = examples(seed)
    plain = compiled(form, jgd.variance)(batch)
    far = compiled((f"shifted {form[0]}", form[1]), jgd.variance)((*batch, np.full(SIZE, shift)))
    # What is left is the rounding of each gradient, shift·2⁻⁵³; squares of large numbers would leave shift²·2⁻⁵³.
    spread = np.sqrt(size_of(plain))
    for a, b in zip(jax.tree.leaves(far), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(
            a, b, rtol=1e-9, atol=1e-14 * shift * (spread + 1e-14 * shift) + 1e-14 * spread**2
        )


@given(seeds, st.integers(2, 5))
def test_a_projection_keeps_inner_products_in_expectation(seed, dim):
    """Averaged over many keys, ⟨y_i, y_j⟩ comes within six standard errors of ⟨g_i, g_j⟩."""
    blocks = jax.vmap(jax.grad(dense), (None, 0, 0))(PARAMS, *examples(seed, 3))
    keys = jax.random.split(jax.random.key(seed), 4000)
    products = jax.vmap(lambda key: (lambda y: y @ y.T)(jgd.project(blocks, key, dim)))(keys)
    error = products.mean(0) - jgd.gram(blocks)
    assert np.all(np.abs(error) <= 6 * products.std(0) / np.sqrt(4000))


def test_one_key_gives_one_projection_for_any_batch():
    case = problem("tied_embedding_and_head")
    key = jax.random.key(3)
    ask = lambda batch: jgd.project(jgd.per_example_grad(case.loss)(case.params, *batch), key, 3)
    close(ask(jax.tree.map(lambda x: x[2:4], case.batch)), ask(case.batch)[2:4])
