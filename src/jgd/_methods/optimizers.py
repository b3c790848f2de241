"""Optax transformations that make of minimisers what a method needs: one that ascends, or two at once.

All are told the same by name: `value` and `grad`, `value_fn`, the objective as a function of the parameters, and
`grad_fn`, what the method makes of its gradients there. `obj_fn` is another name that optax has for `value_fn`.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def checked(optimizer: Any, argument: str) -> optax.GradientTransformationExtraArgs:
    """The optimizer, able to be given more arguments than it takes.

    Raises:
        TypeError: it has no `init` and `update`.
    """
    if not callable(getattr(optimizer, "init", None)) or not callable(getattr(optimizer, "update", None)):
        raise TypeError(
            f"`{argument}` must be an optax.GradientTransformation such as optax.sgd(0.1), got "
            f"{type(optimizer).__name__} {optimizer!r}"
        )
    wide = optax.with_extra_args_support(optimizer)
    taken = inspect.signature(wide.update).parameters.values()
    if any(one.kind is one.VAR_KEYWORD for one in taken):
        return wide
    names = {one.name for one in taken}

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return wide.update(updates, state, params, **{k: x for k, x in extra.items() if k in names})

    return optax.GradientTransformationExtraArgs(wide.init, update)


def told(
    value: Any, grad: Any, value_fn: Callable[[Any], Any], grad_fn: Callable[..., Any]
) -> dict[str, Any]:
    """What an optimizer is told by name."""

    # optax's line searches take all other names for arguments of `value_fn`, and refuse those that it does not have.
    def of_params(params: Any, *, obj_fn: Any = None, grad_fn: Any = None) -> Any:
        del obj_fn, grad_fn
        return value_fn(params)

    return {"value": value, "grad": grad, "value_fn": of_params, "obj_fn": value_fn, "grad_fn": grad_fn}


def ascending(optimizer: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """The optimizer, minimising the objective's negative.

    The gradient changes sign on the way in, not the update on the way out: what the optimizer does to the
    parameters themselves, weight decay above all, keeps its meaning.
    """

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        value_fn, grad_fn = extra["value_fn"], extra["grad_fn"]
        negated = told(
            -extra["value"],
            _negative(extra["grad"]),
            lambda params: -value_fn(params),
            lambda params, *step: _negative(grad_fn(params, *step)),
        )
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
        structure, value_fn, grad_fn = jax.tree.structure(params), extra["value_fn"], extra["grad_fn"]

        def join(x: Any, y: Any) -> Any:
            return jax.tree.unflatten(structure, jax.tree.leaves((x, y)))

        (x, y), (grad_x, grad_y), (update_x, update_y) = _pair(params), extra["grad"], updates
        value = extra["value"]
        of_x = told(value, grad_x, lambda x: value_fn(join(x, y)), lambda x, *_: grad_fn(join(x, y))[0])
        of_y = told(value, grad_y, lambda y: value_fn(join(x, y)), lambda y, *_: grad_fn(join(x, y))[1])
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
