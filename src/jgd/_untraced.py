"""Losses that JAX differentiates, but does not trace: their gradients are those of `vmap(grad)`, held as they are.

Outside of a program constants are concrete, and JAX looks at some of them. `lax.reduce` is one case: of a concrete
initial value it sees that the reduction is a sum, and then does not ask for the operand's dtype.
"""

from typing import Any

import jax

from jgd._engine.calls import Call
from jgd._engine.gradients import DenseGradients


def gradients_untraced(call: Call, refused: Exception) -> tuple[jax.Array, Any, DenseGradients]:
    """Values, auxiliary results and gradients of a batch, by JAX's own transforms.

    Raises:
        TypeError, IndexError: what was `refused`, where JAX refuses it too.
    """

    def loss(params: list[Any], example: list[Any]) -> tuple[Any, Any]:
        return call.signature.call(params, call.shared_leaves, example)

    each = jax.vmap(jax.value_and_grad(loss, has_aux=True), in_axes=(None, 0))
    try:
        (values, aux), blocks = each(call.param_leaves, call.batch_leaves)
    except Exception:
        raise refused from None
    return values, aux, DenseGradients(blocks)
