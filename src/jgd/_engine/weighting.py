"""Weights on what examples left, for sums over them: an example of weight 0 is absent, whatever it left.

A product with 0 would let a nan through, on either side. So an absent example's δ's become 0, and the rest becomes
0 or a stand-in: what a present example left, at which every site is known to have a derivative.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jgd._engine.examples import Example
from jgd._engine.leading import along
from jgd._mesh import varying


def silenced(
    examples: Example,
    axes: Example,
    weights: jax.Array,
    blocks: Sequence[jax.Array] = (),
    *,
    stand_in: bool,
    in_place: bool,
) -> tuple[Example, list[jax.Array]]:
    """What the examples left at the sites, with nothing of those of weight 0; and so of `blocks` of gradients.

    Args:
        examples: a batch; its own blocks and squares stay as they are.
        axes: where the examples lie in each array.
        weights: `(B,)`.
        blocks: gradients, the examples leading.
        stand_in: whether a present example stands in for the absent ones, in place of zeros.
        in_place: whether to write only where somebody is absent, and then into the arrays themselves. That takes a
            look at all the weights, so they should lie on one device.
    """
    present = weights != 0
    first = jnp.argmax(present)

    def other(x: jax.Array, axis: int) -> jax.Array:
        if not stand_in:
            return jnp.zeros((), x.dtype)
        row = jax.lax.dynamic_index_in_dim(x, first, axis)
        return jnp.where(present[first], row, jnp.zeros((), x.dtype))

    leaves, treedef = jax.tree.flatten((examples._replace(blocks={}, squares={}), list(blocks)))
    lie = [0] * len(examples.inputs) + jax.tree.leaves((axes.records, axes.deltas)) + [0] * len(blocks)
    first_record = len(examples.inputs)
    first_delta = first_record + len(jax.tree.leaves(axes.records))
    floats = [k for k, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.inexact)]
    # What was given to the program is not the program's to write into.
    given = [k for k in floats if k < first_record or not in_place]
    for fill, some in ((_filled, given), (_filled_in_place, [k for k in floats if k not in given])):
        others = [
            other(leaves[k], lie[k]) if k < first_delta else jnp.zeros((), leaves[k].dtype) for k in some
        ]
        made = fill(tuple(lie[k] for k in some), [leaves[k] for k in some], others, present)
        for k, x in zip(some, made, strict=True):
            leaves[k] = x
    there, made_of_blocks = jax.tree.unflatten(treedef, leaves)
    return there._replace(blocks=examples.blocks, squares=examples.squares), made_of_blocks


def _filled(
    axes: Sequence[int], arrays: Sequence[jax.Array], others: Sequence[jax.Array], present: jax.Array
) -> list[jax.Array]:
    fill = lambda x, other, axis: jnp.where(along(present, axis, x.ndim), x, other)
    return list(map(fill, arrays, others, axes))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _filled_in_place(
    axes: Sequence[int], arrays: Sequence[jax.Array], others: Sequence[jax.Array], present: jax.Array
) -> list[jax.Array]:
    # A loop of one step or none: XLA keeps what a loop carries in one place, and a branch would copy it.
    def fill(state: tuple[jax.Array, list[jax.Array]]) -> tuple[jax.Array, list[jax.Array]]:
        return jnp.zeros_like(state[0]), _filled(axes, state[1], others, present)

    absent = jnp.logical_not(jnp.all(present))
    start = absent, varying(list(arrays), present)
    return jax.lax.while_loop(lambda state: state[0], fill, start)[1]


@_filled_in_place.defjvp
def _filled_in_place_jvp(axes, primals, tangents):
    present = primals[2]
    moved, others_moved, _ = tangents
    return _filled_in_place(axes, *primals), _filled(axes, moved, others_moved, present)
