"""No arithmetic of the library's own promotes dtypes or ranks: it works where JAX is told to refuse that."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import B, Draw, Problem
from questions import ask, compare

import jgd

WEIGHTS = np.array([1.5, 0.0, 0.5, 2.0, 1.0])
QUESTIONS = (
    "sum", "weighted_sum", "norms", "leaf_norms", "clipped_sum", "weighted_clipped_sum", "dot", "gram",
    "second_moment", "variance", "weighted_variance", "materialize",
)  # fmt: skip
HELD = (
    {"strategy": "factored"},
    {"strategy": "materialized"},
    {"strategy": "factored", "microbatch_size": 2},
)


def loss(p, x, ids):
    """Products, lookups, a scale, a scan over layers; nothing is promoted."""
    h = jnp.tanh(x @ p["dense"]) * p["scale"][None] + p["table"][ids]
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["layers"])
    return jnp.sum(h * h)


def problem_in(dtype):
    draw = Draw(0)
    params = {"dense": draw(4, 3), "scale": draw(3), "table": draw(6, 3), "layers": draw(2, 3, 3)}
    cast = lambda x: jnp.asarray(x, dtype)
    return Problem(
        loss, jax.tree.map(cast, params), (cast(draw(B, 5, 4)), jnp.asarray(draw.integers(6, B, 5)))
    )


CHOSEN = ((0, "float32"), (0, "bfloat16"), (1, "float64"), (2, "bfloat16"))


@pytest.mark.sample(lambda held, dtype: (HELD.index(held), dtype) in CHOSEN)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        ("float32", 1e-5),
        ("float64", 1e-9),
        ("bfloat16", 6e-2),
    ],
)
@pytest.mark.parametrize("held", HELD, ids=str)
def test_every_reduction_where_promotion_is_refused(held, dtype, tolerance):
    with jax.enable_x64(True):
        exact = problem_in("float64")
        wide = oracle.vmap_of_grad(exact)
    direction = jax.tree.map(
        lambda x: np.cos(np.arange(x[0].size, dtype=np.float32)).reshape(x.shape[1:]), wide
    )
    max_norm = 0.9 * float(np.median(np.linalg.norm(oracle.matrix(wide), axis=1)))
    want = oracle.answers(wide, wide, WEIGHTS, max_norm, direction)
    with jax.enable_x64(dtype == "float64"):
        it = problem_in(dtype)
        direction = jax.tree.map(lambda x, p: jnp.asarray(x, p.dtype), direction, it.params)
        gradients = jgd.per_example_grad(it.loss, **held)
        asked = lambda *args: ask(
            gradients(*args), QUESTIONS, jnp.asarray(WEIGHTS, it.params["scale"].dtype), max_norm, direction
        )
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            got = jax.jit(asked)(it.params, *it.batch)
    compare(got, want, tolerance)
