"""Σ w_i g_i of a batch, leaf by leaf: from blocks that were kept, by one product for each use, by one `vjp`."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jgd._engine import lookups, tiles
from jgd._engine.examples import Example, axes_of, deltas_of, site_outputs
from jgd._engine.gathered import Asked, Gathered
from jgd._engine.held import Held
from jgd._engine.leading import few_and_long, few_and_short, scaled, sum_leading, sum_present, wide
from jgd._engine.parts import Part
from jgd._engine.stored import stored
from jgd._engine.tiles import Batch
from jgd._materialized import Materialized, accumulator


def weighted_sum(held: Held, weights: jax.Array | None) -> list[jax.Array]:
    """Σ w_i g_i, in the accumulators' dtypes."""
    if held.plan.again:
        return _second_pass(held, weights)
    held.refuse(held.unruled(batch_groups=2))  # XLA aborts on their sum
    one_device = held.pieces == 1
    examples = held.examples
    kept = [held.plan.parts[k] for k in held.made]
    made = list(held.made.values())
    if weights is None:
        totals = [sum_present(x, None, one_device=one_device) for x in made]
        # Not as a product: XLA makes the sum along with the block, if that is a sum or an outer product.
        totals += [jnp.sum(x, axis=0, dtype=wide(x)) for x in examples.blocks.values()]
    else:
        examples, totals = _sums_of_blocks(held, [*made, *examples.blocks.values()], weights)
    sums = dict(zip(examples.blocks, totals[len(kept) :], strict=True))
    if weights is None:
        of_pass = lambda part: held.sums.parts[held.plan.parts.index(part)]
        sums.update({leaf: held.assembled(leaf, of_pass) for leaf in held.summed})
    of_part = {id(part): x for part, x in zip(kept, totals, strict=False)}
    from_blocks = lambda part: part.in_memory(of_part[id(part)])
    for leaf in {part.leaf for part in kept}:
        sums[leaf] = held.assembled(leaf, from_blocks)
    silent, ask = replace(held, examples=examples), Asked(Gathered.sum)
    for leaf in held.plan.direct:
        if leaf not in sums:
            sums[leaf] = held.assembled(leaf, functools.partial(direct_sum, silent), weights, ask)
    # A custom derivative need not be linear in what it is given: it gets each example's own.
    apart = sorted((held.plan.backward_only | held.grouped(groups=2)) - sums.keys())
    if apart:
        sums.update(zip(apart, _apart_sum(held, apart, weights), strict=True))
    rest = [leaf for leaf in held.leaves if leaf not in sums]
    if not one_device:
        guarded = [leaf for leaf in rest if leaf in held.plan.guarded]
        sums.update(zip(guarded, _guarded_sum(held, guarded, weights), strict=True))
        rest = [leaf for leaf in rest if leaf not in sums]
    elif weights is not None:
        others = {part.leaf for part in held.plan.parts if not part.looks_up or part.shape is None}
        met = {part.leaf for part in held.plan.parts} - others
        for leaf in met.intersection(rest):
            sums[leaf] = held.assembled(leaf, functools.partial(_lookup_sum, held), weights)
        rest = [leaf for leaf in rest if leaf not in sums]
    sums.update(zip(rest, pull_sum(held, rest, examples, weights), strict=True))
    return [sums[leaf] for leaf in held.leaves]


def _second_pass(held: Held, weights: jax.Array | None) -> list[jax.Array]:
    """Σ w_i g_i by a backward pass of its own, the weights being the losses' derivatives."""
    program, constants, inputs = held.plan.program, held.model.constants, held.examples.inputs
    if weights is None:
        weights = jnp.ones(held.size)
    else:  # an absent example is another one, without weight
        present = weights != 0
        who = jnp.where(present, jnp.arange(held.size), jnp.argmax(present))
        inputs = [x[who] for x in inputs]

    def losses(params: list[jax.Array]) -> jax.Array:
        narrow = [x.astype(like.dtype) for x, like in zip(params, held.like, strict=True)]
        return jax.vmap(lambda example: program.run(narrow, constants, example)[0])(inputs)

    values, pull = jax.vjp(losses, [x.astype(wide(x)) for x in held.model.params])
    sums = pull(weights.astype(values.dtype))[0]
    anyone = jnp.any(weights != 0)
    return stored([jnp.where(anyone, x, 0) for x in sums])


def _sums_of_blocks(
    held: Held, blocks: Sequence[jax.Array], weights: jax.Array
) -> tuple[Example, list[jax.Array]]:
    """Σ w_i g_i of each block, and the examples without those of weight 0: one look at the weights for all of them."""
    one_device = held.pieces == 1
    # Flat: an axis of length 1 would be one more way to lie in memory, and a copy between the two.
    flat = [x.reshape(held.size, math.prod(x.shape[1:])) for x in blocks]
    # Sums that are elementwise programs take the look at the weights in; products would need what it makes stored.
    others = [k for k, x in enumerate(flat) if not (few_and_short(x) or (one_device and few_and_long(x)))]
    some = [flat[k] for k in others]
    stand_in = one_device and held.plan.fragile
    examples, silent = held.silenced(weights, some, stand_in=stand_in, in_place=one_device)
    sums = dict(zip(others, (sum_leading(x, weights) for x in silent), strict=True))
    for k, x in enumerate(flat):
        total = sums[k] if k in sums else sum_present(x, weights, one_device=one_device)
        sums[k] = total.reshape(blocks[k].shape[1:])
    return examples, [sums[k] for k in range(len(flat))]


def _apart_sum(held: Held, leaves: Sequence[int], weights: jax.Array | None) -> list[jax.Array]:
    """Σ w_i g_i of some leaves, from the examples' gradients, a tile at a time."""

    def of_tile(batch: tuple[Example, jax.Array], size: int) -> list[jax.Array]:
        blocks = held.each(lambda one: held.gradient(one, leaves), batch[0], size)
        return Materialized(blocks).weighted_sum(batch[1], keep_wide=True)

    ones = jnp.ones(held.size) if weights is None else weights
    return held.batch().with_each(ones).folded(of_tile, sum(held.like[leaf].size for leaf in leaves))


def direct_sum(held: Held, part: Part, weights: jax.Array | None, ask: Any = Gathered.sum) -> jax.Array:
    """Σ w_i g_i in one part, flat, by one product for each use; `ask` may be that question, already asked."""
    gathered = held.gathered(part)
    if held.pieces == 1 or not any(use.site.loops for use in part.uses):
        return ask(gathered, weights)
    # Behind the steps of a loop the batch axis cannot be cut once both are folded into the positions.
    of_piece = lambda arrays, weights=None: gathered.of(arrays).sum(weights)
    return _sum_by_piece(gathered.batch, of_piece, weights)


def _lookup_sum(held: Held, part: Part, weights: jax.Array) -> jax.Array:
    """Σ w_i g_i in one part whose rows were looked up, flat, on one device."""
    assert part.shape is not None
    (rows,) = held.gathered(part).factors()
    return part.shape.flatten(lookups.weighted_sum(rows, weights, part.shape.sizes()[1])[None])


def pull_sum(
    held: Held, leaves: Sequence[int], examples: Example, weights: jax.Array | None
) -> list[jax.Array]:
    """Σ w_i g_i of some leaves, by one `vjp` with the examples inside."""
    asked, leaves = leaves, held.plan.pulled_with(leaves)
    if not leaves:
        return []
    wide = [accumulator(held.like[leaf].dtype) for leaf in leaves]

    def outputs(values: Sequence[jax.Array]) -> list[jax.Array]:
        values = [x.astype(held.like[leaf].dtype) for leaf, x in zip(leaves, values, strict=True)]
        return held.each(lambda one: site_outputs(held.plan, held.model, one, leaves, values), examples)

    params = [held.model.params[leaf].astype(w) for leaf, w in zip(leaves, wide, strict=True)]
    pull = jax.vjp(outputs, params)[1]
    if weights is None:
        sums = pull(held.each(lambda one: deltas_of(held.plan, one, leaves), examples))[0]
        return [sums[leaves.index(leaf)] for leaf in asked]
    of_weight = lambda x, axis: scaled(x, axis, weights)
    deltas = jax.tree.map(of_weight, examples.deltas, axes_of(held.plan).deltas)
    sums = pull(held.each(lambda one: deltas_of(held.plan, one, leaves), examples._replace(deltas=deltas)))[0]
    # Without any present example there was no stand-in, and a site may have no derivative at 0.
    anyone = jnp.any(weights != 0)
    silent = lambda leaf, x: jnp.where(anyone, x, 0) if leaf in held.plan.guarded else x
    return [silent(leaf, sums[leaves.index(leaf)]) for leaf in asked]


def _guarded_sum(held: Held, leaves: Sequence[int], weights: jax.Array | None) -> list[jax.Array]:
    """Σ w_i g_i of leaves whose sites may have no derivative at 0, over several devices.

    A stand-in comes from the device's own examples. And what a parameter was broadcast along, as a bias along
    positions, is summed before the devices add up, which else send a number for each position.
    """
    unruled = [leaf for leaf in leaves if leaf in held.unruled()]
    ruled = [leaf for leaf in leaves if leaf not in unruled]

    def of_present(
        leaves: Sequence[int], examples: Example, weights: jax.Array | None = None
    ) -> list[jax.Array]:
        part = replace(held, examples=examples, pieces=1)
        if weights is not None:
            examples, _ = part.silenced(weights, stand_in=True, in_place=False)
        return pull_sum(part, leaves, examples, weights)

    sums = dict(zip(unruled, of_present(unruled, held.examples, weights), strict=True))
    if ruled:
        of_ruled = functools.partial(of_present, ruled)
        sums.update(zip(ruled, _sum_by_piece(held.batch(), of_ruled, weights), strict=True))
    return [sums[leaf] for leaf in leaves]


def _sum_by_piece(batch: Batch, fun: Callable[..., Any], weights: jax.Array | None) -> Any:
    """`fun` of each device's examples, and of their weights where there are any, added up."""
    if weights is None:
        return tiles.total(batch.by_piece(fun))
    return tiles.total(batch.with_each(weights).by_piece(lambda both: fun(*both)))
