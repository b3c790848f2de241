"""Optax transformations that make of minimisers what a method needs: one that ascends, or two at once."""

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

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        value_fn = extra["value_fn"]
        negated = {
            "value": -extra["value"],
            "grad": _negative(extra["grad"]),
            "value_fn": lambda params: -value_fn(params),
        }
        return optimizer.update(_negative(updates), state, params, **extra | negated)

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

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        structure, value_fn = jax.tree.structure(params), extra["value_fn"]

        def join(x: Any, y: Any) -> Any:
            return jax.tree.unflatten(structure, jax.tree.leaves((x, y)))

        (x, y), (grad_x, grad_y), (update_x, update_y) = _pair(params), extra["grad"], updates
        of_x = {"grad": grad_x, "value_fn": lambda x: value_fn(join(x, y))}
        of_y = {"grad": grad_y, "value_fn": lambda y: value_fn(join(x, y))}
        update_x, state_x = first.update(update_x, state[0], x, **extra | of_x)
        update_y, state_y = second.update(update_y, state[1], y, **extra | of_y)
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
