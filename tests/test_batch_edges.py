"""The edges of a batch: none and one of an example, numbers that are not finite or too small."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import problem
from strategies import FEW, STRATEGIES, close, every_strategy, few_cases, gradients, squared_error

import jgd


@pytest.mark.sample(lambda name: name != FEW[2])
@every_strategy
@few_cases
def test_no_examples(name, strategy, x64):
    case = problem(name)
    batch = jax.tree.map(lambda x: x[:0], case.batch)
    grads = jgd.per_example_grad(case.loss, strategy=strategy)(case.params, *batch)
    assert len(grads) == 0 and grads.values.shape == (0,)
    zeros = jax.tree.map(jnp.zeros_like, case.params)
    for tree in (jgd.sum(grads), jgd.clipped_sum(grads, 1.0), jgd.sum(grads, jnp.ones(0))):
        assert jax.tree.structure(tree) == jax.tree.structure(zeros)
        close(tree, zeros)
    assert jgd.norms(grads).shape == jgd.dot(grads, zeros).shape == (0,)
    assert jgd.gram(grads).shape == (0, 0)
    assert jgd.gram(grads, gradients(case, strategy)).shape == (0, 5)
    assert jgd.project(grads, jax.random.key(0), 3).shape == (0, 3)
    for block, leaf in zip(
        jax.tree.leaves(jgd.materialize(grads)), jax.tree.leaves(case.params), strict=True
    ):
        assert block.shape == (0, *leaf.shape)


@pytest.mark.sample(lambda name: name != FEW[2])
@every_strategy
@few_cases
def test_one_example(name, strategy, x64):
    case = problem(name)
    batch = jax.tree.map(lambda x: x[2:3], case.batch)
    grads = jgd.per_example_grad(case.loss, strategy=strategy)(case.params, *batch)
    want = jax.grad(case.loss)(case.params, *jax.tree.map(lambda x: x[0], batch))
    close(jgd.sum(grads), want)
    close(jgd.mean(grads), want)
    norm = np.linalg.norm(oracle.matrix(jax.tree.map(lambda x: x[None], want)))
    close(jgd.norms(grads), np.array([norm]))
    close(jgd.gram(grads), np.array([[norm**2]]))


@every_strategy
def test_grams_of_batches_of_different_sizes(strategy, example, x64):
    params, x, y = example
    gradient_of = jgd.per_example_grad(squared_error, strategy=strategy)
    whole = jgd.gram(gradient_of(params, x, y))
    close(jgd.gram(gradient_of(params, x[:2], y[:2]), gradient_of(params, x[2:], y[2:])), whole[:2, 2:])
    plain = jax.vmap(jax.grad(squared_error), (None, 0, 0))(params, x[2:], y[2:])
    close(jgd.gram(gradient_of(params, x[:2], y[:2]), plain), whole[:2, 2:])


def test_grams_between_strategies(example, x64):
    params, x, y = example
    held = [jgd.per_example_grad(squared_error, strategy=s)(params, x, y) for s in STRATEGIES]
    whole = jgd.gram(held[-1])
    for one in held:
        for two in held:
            close(jgd.gram(one, two), whole)


# Numbers that are not finite, or too small


@every_strategy
def test_small_gradients_do_not_underflow(strategy):
    """1e-5² is 0 in float16: norms squared in half precision would leave such gradients unclipped."""
    x = jnp.full((3, 4), 1e-5, jnp.float16)
    grads = jgd.per_example_grad(lambda p, x: jnp.sum(x * p), strategy=strategy)(jnp.ones(4, jnp.float16), x)
    rows = np.asarray(x, np.float64)
    norms = np.linalg.norm(rows, axis=1)
    assert jgd.norms(grads).dtype == jnp.float32
    np.testing.assert_allclose(jgd.norms(grads), norms, rtol=1e-6)
    np.testing.assert_allclose(jgd.gram(grads), rows @ rows.T, rtol=1e-6)
    clipped = jgd.clipped_sum(grads, float(norms[0]) / 2)
    assert clipped.dtype == jnp.float16
    np.testing.assert_allclose(np.asarray(clipped, np.float64), 1.5 * rows[0], rtol=1e-2)


@every_strategy
def test_half_precision_sums_do_not_stall(strategy):
    """257 + 1 is 256 in bfloat16: a sum of 2,000 ones in it ends at 256."""
    x = jnp.ones((2000, 300), jnp.bfloat16)
    grads = jgd.per_example_grad(lambda p, x: jnp.sum(x * p), strategy=strategy)(
        jnp.ones(300, jnp.bfloat16), x
    )
    np.testing.assert_allclose(jgd.norms(grads), np.sqrt(300.0), rtol=1e-6)
    np.testing.assert_allclose(jgd.gram(grads)[:3, :3], 300.0, rtol=1e-6)
    np.testing.assert_allclose(jgd.sum(grads).astype(float), 2000.0, rtol=5e-2)
    np.testing.assert_allclose(jgd.mean(grads).astype(float), 1.0, rtol=5e-2)


@every_strategy
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite(bad, strategy, example, x64):
    params, x, y = example
    x = x.copy()
    x[1, 2] = bad
    loss = lambda p, x, y: jnp.sum(x @ p["w"] * y)
    grads = jgd.per_example_grad(loss, strategy=strategy)(params, x, y)
    rest = np.array([0, 2, 3, 4])
    good = jgd.per_example_grad(loss, strategy=strategy)(params, x[rest], y[rest])
    weights = np.ones(5)
    weights[1] = 0

    assert not np.isfinite(jgd.norms(grads)[1])
    close(jgd.norms(grads)[rest], jgd.norms(good))
    close(jgd.clipped_sum(grads, 0.3), jgd.clipped_sum(good, 0.3))
    close(jgd.clipped_sum(grads, np.inf), jgd.sum(good))
    close(jgd.sum(grads, weights), jgd.sum(good))
    close(jgd.mean(grads, weights), jgd.mean(good))
    close(jgd.second_moment(grads, weights), jgd.second_moment(good))
    close(jgd.variance(grads, weights), jgd.variance(good))
    close(jgd.clipped_sum(grads, 0.3, weights=weights), jgd.clipped_sum(good, 0.3))
    assert not np.isfinite(jgd.sum(grads)["w"]).all()


@every_strategy
def test_thresholds_at_the_ends(strategy, example, x64):
    grads = jgd.per_example_grad(squared_error, strategy=strategy)(*example)
    close(jgd.clipped_sum(grads, 0.0), jax.tree.map(np.zeros_like, example[0]))
    close(jgd.clipped_sum(grads, np.inf), jgd.sum(grads))
    close(jgd.clipped_sum(grads, 1e300), jgd.sum(grads))
