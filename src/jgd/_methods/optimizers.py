"""Optax transformations that make a minimiser into what a method needs: to ascend, or to play against another."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def checked(optimizer: Any, argument: str) -> optax.GradientTransformationExtraArgs:
    """The optimizer, able to take extra arguments.

    Raises:
        TypeError: it has no `init` and `update`.
    """
    if not callable(getattr(optimizer, "init", None)) or not callable(getattr(optimizer, "update", None)):
        raise TypeError(
            f"`{argument}` must be an optax.GradientTransformation such as optax.sgd(0.1), got "
            f"{type(optimizer).__name__} {optimizer!r}"
        )
    return optax.with_extra_args_support(optimizer)


def ascending(optimizer: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """The optimizer, minimising the objective's negative.

    The gradient changes sign on the way in, not the update on the way out: what the optimizer does to the
    parameters themselves, weight decay above all, keeps its meaning.
    """

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        value: Any,
        grad: Any,
        value_fn: Callable[[Any], Any],
        **extra: Any,
    ) -> tuple[Any, Any]:
        return optimizer.update(
            _negative(updates), state, params,
            value=-value, grad=_negative(grad), value_fn=lambda p: -value_fn(p), **extra,
        )  # fmt: skip

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def simultaneous(
    first: optax.GradientTransformationExtraArgs, second: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """One optimizer for each half of a pair of parameters, both stepping from the same point.

    Each is told the objective as a function of its own half, the other one held where it is.
    """

    def init(params: Any) -> tuple[Any, Any]:
        x, y = _pair(params)
        return first.init(x), second.init(y)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        value: Any,
        grad: Any,
        value_fn: Callable[[Any], Any],
        **extra: Any,
    ) -> tuple[Any, Any]:
        structure = jax.tree.structure(params)

        def join(x: Any, y: Any) -> Any:
            return jax.tree.unflatten(structure, jax.tree.leaves((x, y)))

        (x, y), (grad_x, grad_y), (update_x, update_y) = _pair(params), grad, updates
        update_x, state_x = first.update(
            update_x, state[0], x, value=value, grad=grad_x, value_fn=lambda x: value_fn(join(x, y)), **extra
        )
        update_y, state_y = second.update(
            update_y, state[1], y, value=value, grad=grad_y, value_fn=lambda y: value_fn(join(x, y)), **extra
        )
        return join(update_x, update_y), (state_x, state_y)

    return optax.GradientTransformationExtraArgs(init, update)


def _pair(params: Any) -> tuple[Any, Any]:
    if not isinstance(params, tuple | list) or len(params) != 2:
        raise ValueError(
            "`params` must be a pair (x, y), x to minimise over and y to maximise over, got "
            f"{jax.tree.structure(params)}"
        )
    return params[0], params[1]


def _negative(tree: Any) -> Any:
    return jax.tree.map(jnp.negative, tree)
