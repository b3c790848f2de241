"""Small problems that each rule has a part in, in float64, and every reduction asked of them at once."""

import jax
import jax.numpy as jnp
import numpy as np
from cases import B, Problem
from jax import lax

import jgd

WEIGHTS = np.array([1.5, 0.0, 0.5, 2.0, 1.0])


def gradients(problem, strategy="factored"):
    return jgd.per_example_grad(problem.loss, strategy=strategy)(problem.params, *problem.batch)


def made(loss, params, *batch):
    """A problem of these arrays, in float64."""
    return Problem(loss, jax.tree.map(jnp.asarray, params), tuple(jnp.asarray(x) for x in batch))


def dense(draw, t):
    return made(lambda p, x: jnp.sum(jnp.sin(x @ p)), draw(4, 3), draw(B, t, 4))


def parameter_first(draw, t):
    return made(lambda p, x: jnp.sum(jnp.sin(p @ x)), draw(3, 4), draw(B, 4, t))


def in_groups(draw, t):
    loss = lambda p, x: jnp.sum(jnp.sin(jnp.einsum("gio,tgi->tgo", p, x)))
    return made(loss, draw(2, 4, 3), draw(B, t, 2, 4))


def several_contracted(draw, t):
    loss = lambda p, x: jnp.sum(jnp.sin(jnp.einsum("iojk,tjik->to", p, x)))
    return made(loss, draw(2, 3, 4, 2), draw(B, t, 4, 2, 2))


def convolved(groups, space, draw, t):
    size = (t + 1, 2)[:space]
    names = "NCH" + "W" * (space > 1), "OIH" + "W" * (space > 1)

    def loss(p, x):
        options = {"feature_group_count": groups, "dimension_numbers": (*names, names[0])}
        return jnp.sum(jnp.sin(lax.conv_general_dilated(x[None], p, (1,) * space, "VALID", **options)))

    return made(loss, draw(2 * groups, 3, *((2,) * space)), draw(B, 3 * groups, *size))


def depthwise(draw, t):
    def loss(p, x):
        names = ("NHC", "HIO", "NHC")
        options = {"feature_group_count": 3, "dimension_numbers": names, "rhs_dilation": (2,)}
        return jnp.sum(jnp.sin(lax.conv_general_dilated(x[None], p, (1,), "VALID", **options)))

    return made(loss, draw(2, 1, 6), draw(B, t + 2, 3))


def looked_up(draw, t):
    loss = lambda p, ix: jnp.sum(jnp.sin(jnp.sum(p[ix], 0) * jnp.arange(1.0, 4)))
    return made(loss, draw(5, 3), draw.integers(5, B, t))


def tied(draw, t):
    loss = lambda p, ix: jnp.sum(jnp.sin(jnp.tanh(p[ix]) @ p.T))
    return made(loss, draw(5, 3), draw.integers(5, B, t))


def both_ways(draw, t):
    """The same matrix and its transpose."""
    return made(lambda p, x: jnp.sum(jnp.sin(jnp.tanh(x @ p) @ p.T)), draw(4, 3), draw(B, t, 4))


def recurrent(draw, t):
    def loss(p, xs):
        step = lambda h, x: (jnp.tanh(h @ p + x), h)
        return jnp.sum(jnp.sin(lax.scan(step, jnp.ones(3), xs)[0]))

    return made(loss, draw(3, 3), draw(B, t, 3))


def stacked(draw, t):
    def loss(p, x):
        step = lambda h, w: (jnp.tanh(h @ w), None)
        return jnp.sum(jnp.sin(lax.scan(step, x, p, reverse=True)[0]))

    return made(loss, draw(2, 4, 4), draw(B, t, 4))


@jax.custom_vjp
def cubed(x, w):
    return x * w


def _cubed_bwd(kept, ct):
    x, w = kept
    return ct**3 * w, jnp.sum(jnp.sin(ct * x).reshape(-1, *w.shape), 0)


cubed.defvjp(lambda x, w: (x * w, (x, w)), _cubed_bwd)


def every_reduction(grads, arguments):
    return {
        "materialize": jgd.materialize(grads),
        "sum": jgd.sum(grads),
        "weighted_sum": jgd.sum(grads, arguments["weights"]),
        "leaf_norms": jgd.norms(grads, per_leaf=True),
        "dot": jgd.dot(grads, arguments["direction"]),
        "gram": jgd.gram(grads),
        "clipped_sum": jgd.clipped_sum(grads, arguments["max_norm"]),
        "weighted_second_moment": jgd.second_moment(grads, arguments["weights"]),
        "weighted_variance": jgd.variance(grads, arguments["weights"]),
    }
