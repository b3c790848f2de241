"""Sums in which an example of weight 0 is absent, whatever it left.

Examples with weight 0 must not contribute even if their residuals are nan, and 0·nan = nan. So their cotangents become
0 and their operands 1, which every rule can multiply with, or divide by.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jgd._engine.batch_sums import along
from jgd._engine.residuals import Residuals
from jgd._mesh import varying


def mask_absent(
    residuals: Residuals,
    axes: Residuals,
    weights: jax.Array,
    blocks: Sequence[jax.Array] = (),
    *,
    in_place: bool,
) -> tuple[Residuals, list[jax.Array]]:
    """Residuals, and `blocks` of gradients, with the examples of weight 0 masked.

    Args:
        residuals: of a batch; its own blocks and squares stay as they are.
        axes: where the examples lie in each array.
        weights: `(B,)`.
        blocks: gradients, the examples leading.
        in_place: whether to write only if an example is absent, and then into the arrays themselves. That takes a
            look at all the weights, so they should lie on one device.
    """
    present = weights != 0
    leaves, treedef = jax.tree.flatten((residuals._replace(blocks={}, squares={}), list(blocks)))
    lie = [0] * len(residuals.inputs) + jax.tree.leaves((axes.operands, axes.cotangents)) + [0] * len(blocks)
    first_operand = len(residuals.inputs)
    first_cotangent = first_operand + len(jax.tree.leaves(axes.operands))
    floats = [k for k, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.inexact)]
    # A program must not write into its arguments.
    given = [k for k in floats if k < first_operand or not in_place]
    for fill, some in ((_filled, given), (_filled_in_place, [k for k in floats if k not in given])):
        others = [jnp.full((), k < first_cotangent, leaves[k].dtype) for k in some]
        made = fill(tuple(lie[k] for k in some), [leaves[k] for k in some], others, present)
        for k, x in zip(some, made, strict=True):
            leaves[k] = x
    there, masked_blocks = jax.tree.unflatten(treedef, leaves)
    return there._replace(blocks=residuals.blocks, squares=residuals.squares), masked_blocks


def replace_absent(arrays: Sequence[jax.Array], present: jax.Array) -> list[jax.Array]:
    """Arrays of a batch with the first example that is present in the place of each that is not, if there is one.

    By a sum, not by its number: over several devices that would be a lookup along the axis that they share.
    """
    first = present & (jnp.cumsum(present) == 1)
    stays = present | ~jnp.any(present)

    def replaced(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(replaced(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        only = jnp.where(along(first, 0, x.ndim), x, jnp.zeros((), x.dtype))
        one = jnp.any(only, axis=0) if x.dtype == bool else jnp.sum(only, axis=0, dtype=x.dtype)
        return jnp.where(along(stays, 0, x.ndim), x, one)

    return [replaced(x) for x in arrays]


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
