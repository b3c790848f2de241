"""When `strategy="auto"` holds blocks instead of factors, and how many examples then go through one pass.

Factors take less memory than gradients if a parameter meets few positions. If few parameters are trained of the many
that an example passes through, as adapters are, gradients take less. Then passes over some examples at a time keep
only gradients. If the residuals of such a pass stay in the processor's cache, several of these passes are also quicker
than one over the whole batch.
"""

from typing import Any

import jax

from jgd._engine.devices import device_of
from jgd._engine.jaxprs import mentions, prim
from jgd._engine.plan import PLANNED, plan_of
from jgd._engine.shares import bytes_of, factor_bytes
from jgd._engine.tiles import tile_of
from jgd._engine.trace import TracedLoss

# Gradients of at most this many numbers in all are held as blocks: less than one tile, and quicker to compile.
_MATERIALIZED_BELOW = 1 << 13

# Blocks are held if the factors of one example are at least so many times larger than its gradient.
_FACTORS = 4

# What all examples share may be at most so many times larger than the cache: each of the passes reads it again.
_SHARED = 4


def blocks_at_once(program: TracedLoss, size: int, num_shards: int) -> int | None:
    """How many of `size` gradients "auto" makes at a time, to hold all as blocks; None if it holds factors.

    Args:
        program: the traced loss.
        size: the number of the examples, B. The result is `size` itself only if all gradients are few numbers.
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
    """The bytes that one example keeps for its backward pass; 0 if blocks would not pay."""
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
