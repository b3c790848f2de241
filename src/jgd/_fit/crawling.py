"""Whether updates are better made one by one, though a compiled loop could make them all.

Inside of a loop XLA for CPUs computes convolutions without the blocked kernels, and on one core, that it has for them
outside: an update of a small convolutional net takes 30 times as long in `lax.scan` as by itself. A call for each
update costs a tenth of a millisecond.
"""

from typing import Any

import jax

from jgd._engine.devices import platform_of
from jgd._engine.flops import convolution_flops
from jgd._methods.method import Method, MethodState, traced_step

# Operations of an update's convolutions that take as long in a loop as a call for them does.
_WORTH_A_CALL = 4_000_000


def crawls_in_a_loop(method: Method, state: MethodState, batch: Any, key: jax.Array) -> bool:
    """Whether updates from such batches, arrays or their shapes, take much longer in a loop than one by one."""
    if platform_of(jax.tree.leaves(state)) != "cpu":
        return False
    return convolution_flops(traced_step(method, state, batch, key)) > _WORTH_A_CALL
