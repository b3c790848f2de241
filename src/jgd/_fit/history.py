"""What the updates of a run saw, and the error for a run that left the finite numbers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jgd._methods.method import MethodState


class History(NamedTuple):
    """What each update saw, in order.

    Attributes:
        value: `(updates,)`, the objective of the update's batch, before the update.
        grad_norm: `(updates,)`, the norm of its gradient.
    """

    value: Float[Array, "updates"]
    grad_norm: Float[Array, "updates"]


class NonFiniteError(FloatingPointError):
    """An update met a value or a gradient that is not finite, or left such parameters.

    Attributes:
        state: the last state that was checked and found finite.
        history: what the updates saw, up to and with the one that failed.
    """

    def __init__(self, state: MethodState, history: History) -> None:
        value, norm = float(history.value[-1]), float(history.grad_norm[-1])
        what = f"update {history.value.shape[0]} met a value of {value:g} and a gradient norm of {norm:g}"
        if np.isfinite(value) and np.isfinite(norm):
            what += ", and left parameters that are not finite"
        super().__init__(
            f"{what}; lower the learning rate, clip the gradients, or look at the batch. `.state` of this "
            "error is the last finite state kept, `.history` what led here"
        )
        self.state, self.history = state, history


def check_history(before: MethodState, after: MethodState, history: History, start: int, stop: int) -> None:
    """Looks at the updates from `start` up to `stop`, which led from one state to the other.

    Raises:
        NonFiniteError: something is not finite.
    """
    made = jax.tree.map(lambda x: np.asarray(x[start:stop]), history)
    bad = np.flatnonzero(~(np.isfinite(made.value) & np.isfinite(made.grad_norm)))
    if bad.size or not is_finite(after.params):
        end = start + bad[0] + 1 if bad.size else stop
        raise NonFiniteError(before, jax.tree.map(lambda x: x[:end], history))


def no_history() -> History:
    """What no update saw."""
    return History(jnp.zeros(0), jnp.zeros(0))


@jax.jit
def is_finite(tree: Any) -> jax.Array:
    """Whether every number of a pytree is finite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))
