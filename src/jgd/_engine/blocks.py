"""When the gradients of a batch are held as they are, one block for each leaf, and how many are made at a time.

Factors are less than gradients where a parameter meets few positions. Where few parameters are trained of the many
that an example passes through, as adapters are, it is the other way round. Then some examples at a time leave
nothing but their gradients, and where what such a pass makes stays in the processor's cache, several of them are
also quicker than one of the whole batch.
"""

from typing import Any

import jax

from jgd._engine.devices import device_of
from jgd._engine.jaxprs import mentions, prim
from jgd._engine.plan import PLANNED, plan_of
from jgd._engine.shares import bytes_of, factor_bytes
from jgd._engine.tiles import tile_of
from jgd._engine.trace import TracedLoss

# Gradients of this many numbers in all are held as they are: less than one tile, and quicker to compile.
_MATERIALIZED_BELOW = 1 << 13

# How many times larger than its gradient the factors of one example must be.
_FACTORS = 4

# How many times larger than the cache may be what all examples share: each of the passes reads it again.
_SHARED = 4


def blocks_at_once(program: TracedLoss, size: int, num_shards: int) -> int | None:
    """How many of `size` gradients "auto" makes at a time, to hold all as they are; None where it holds factors.

    Args:
        program: the traced loss.
        size: the number of the examples, B. It is returned itself only where all gradients are few numbers.
        num_shards: how many devices may share them; with several, factors are held.
    """
    if num_shards > 1:
        return None
    if size * sum(x.size for x in program.param_avals) <= _MATERIALIZED_BELOW:
        return size
    cache = device_of(program.platform).cache
    if cache is None or not jax.sharding.get_abstract_mesh().empty:
        return None
    left = program.once("left by an example", lambda: _left_by_an_example(program, _SHARED * cache))
    return tile_of(size, left, cache) if 2 * left <= cache < size * left else None


def _left_by_an_example(program: TracedLoss, most_shared: int) -> int:
    """The bytes that one example leaves for its backward pass; 0 where its gradient is no small part of them."""
    params, constants, example = program.avals()
    if bytes_of((params, constants)) > most_shared:
        return 0
    if any(mentions(eqn, prim.conv_general_dilated_p) for eqn in program.jaxpr.eqns):
        return 0  # inside of a loop XLA has slower convolutions on a CPU
    if _FACTORS * bytes_of(params) > factor_bytes(plan_of(program, PLANNED)):
        return 0

    def pullback(batch: list[Any], params: list[Any], constants: list[Any]) -> Any:
        loss = lambda params, example: program.run(params, constants, example)[0]
        return jax.vjp(lambda params: jax.vmap(loss, in_axes=(None, 0))(params, batch), params)[1]

    several = lambda size: [x.update(shape=(size, *x.shape)) for x in example]
    one, two = (bytes_of(jax.eval_shape(pullback, several(size), params, constants)) for size in (1, 2))
    return two - one  # what all examples share is left once
