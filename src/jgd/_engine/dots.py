"""⟨g_i, v⟩ for each example: from a leaf's factors where it has them, else from its gradient.

What the sum over a site's outputs of δ times the output's tangent gives is the same number, but for two things: a
tangent has the dtype of what moves, so that a direction would be rounded to it, and a δ that is not finite meets
tangents of 0 that the backward pass would have selected away.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jgd._engine import factors, sums, tiles
from jgd._engine.directional import inner_product
from jgd._engine.examples import Example, deltas_of, site_outputs
from jgd._engine.gathered import Asked, Gathered
from jgd._engine.held import Held
from jgd._engine.regions import Nested, Region, Value
from jgd._engine.stored import stored
from jgd._mesh import varying


def dot(held: Held, direction: Sequence[jax.Array]) -> jax.Array:
    """⟨g_i, v⟩, `(B,)`, in at least float32, with the direction in its own dtype."""
    direction = varying(stored(list(direction)), held.examples)
    without_rule = {part.leaf for part in held.plan.parts for use in part.uses if use.shape is None}
    others = without_rule | held.plan.whole_leaves | held.plan.backward_only
    total, ask = jnp.zeros(held.size, jnp.float32), Asked(Gathered.dot)
    for part in held.plan.parts:
        if part.leaf not in others:
            flat = factors.pick(direction[part.leaf], part.offset, part.axes)
            total = total + ask(held.gathered(part), flat)
    forward = [leaf for leaf in sorted(others) if _goes_forward(held, leaf, direction[leaf])]
    backward = sorted(others.difference(forward))
    if backward:
        total = total + _by_gradients(held, backward, direction)
    return total + _by_tangents(held, forward, direction) if forward else total


def _by_gradients(held: Held, leaves: Sequence[int], direction: Sequence[jax.Array]) -> jax.Array:
    """⟨g_i, v⟩ in some leaves, from a tile of the examples' gradients at a time."""

    def one(example: Example) -> jax.Array:
        made = zip(held.gradient(example, leaves), (direction[leaf] for leaf in leaves), strict=True)
        return sum((inner_product(g, v) for g, v in made), start=jnp.zeros((), jnp.float32))

    return held.tiled(sum(held.like[leaf].size for leaf in leaves), one)


def _goes_forward(held: Held, leaf: int, direction: jax.Array) -> bool:
    """Whether a leaf is worth a forward derivative, and that rounds the direction nowhere.

    Between it and its sites lies a computation, which a gradient of each example has to be pulled back through, and
    which a tangent passes once for all of them.
    """
    if leaf in held.unruled():
        return True  # XLA computes its gradient wrongly
    if held.pieces > 1 or leaf in held.plan.backward_only or leaf in held.examples.blocks:
        return False
    if held.size * held.like[leaf].size <= tiles.TILE:
        return False
    exact = lambda dtype: jnp.finfo(dtype).nmant >= _digits(direction.dtype)
    return exact(held.like[leaf].dtype) and all(exact(x.aval.dtype) for x in _made_of(held.plan.region, leaf))


def _digits(dtype: jnp.dtype) -> int:
    least = jnp.finfo(jnp.float32).nmant
    return max(jnp.finfo(dtype).nmant, least) if jnp.issubdtype(dtype, jnp.floating) else least


def _made_of(region: Region, leaf: int) -> list[Value]:
    """The values that are made of a leaf and no example, in a region and those inside."""
    found = [x for op in region.ops for x in op.inputs if leaf in x.leaves]
    nested = [op for op in region.ops if isinstance(op, Nested)]
    return found + [x for op in nested for inner in op.regions for x in _made_of(inner, leaf)]


def _by_tangents(held: Held, leaves: Sequence[int], direction: Sequence[jax.Array]) -> jax.Array:
    """⟨g_i, v⟩ in some leaves as Σ δ · tangent, unless a number on the way back to them is not finite."""
    tangents = [direction[leaf].astype(held.like[leaf].dtype) for leaf in leaves]

    def one(example: Example) -> jax.Array:
        outputs = lambda values: site_outputs(held.plan, held.model, example, leaves, values)
        _, moved = jax.jvp(outputs, ([held.model.params[leaf] for leaf in leaves],), (tangents,))
        products = map(inner_product, deltas_of(held.plan, example, leaves), moved)
        return sum(products, start=jnp.zeros((), jnp.float32))

    made = held.each(one)
    certain = [leaf for leaf in leaves if leaf not in held.unruled()]
    if len(certain) < len(leaves):
        return made
    # A sum is finite where all gradients are, but for an overflow. It costs what one product for all examples does.
    finite = [jnp.all(jnp.isfinite(x)) for x in (made, *sums.pull_sum(held, leaves, held.examples, None))]
    by_gradients = lambda: _by_gradients(held, leaves, direction).astype(made.dtype)
    return jax.lax.cond(jnp.all(jnp.stack(finite)), lambda: made, by_gradients)
