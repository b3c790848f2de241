"""Functions that take a PRNG key by name: losses, reductions, derivatives. A method gives them one at each update."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax

from jgd._engine.calls import Loss, bind

ANY_KEY = functools.partial(jax.random.key, 0)  # where only the program counts


def takes_key(fun: Callable[..., Any], *, by_name_only: bool = False) -> bool:
    """Whether a function has a parameter `key` that nobody has bound: without a default, or with that of None.

    Args:
        fun: the function.
        by_name_only: whether it must be one that is given by its name alone, as where others are the batch's.
    """
    try:
        key = inspect.signature(fun).parameters.get("key")
    except (TypeError, ValueError):  # what has no signature
        return False
    kinds = [inspect.Parameter.KEYWORD_ONLY]
    if not by_name_only:
        kinds.append(inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return key is not None and key.kind in kinds and (key.default is key.empty or key.default is None)


def keyed(fun: Callable[..., Any], key: Any) -> Callable[..., Any]:
    """The function with its key bound, where it takes one."""
    return functools.partial(fun, key=key) if takes_key(fun) else fun


def without_key(fun: Callable[..., Any]) -> Callable[..., Any]:
    """The function with some key bound, where it takes one: for who looks at its program."""
    return keyed(fun, ANY_KEY())


def with_any_key(objective: Callable[..., Any]) -> Callable[..., Any]:
    """The same of an objective, `(params, *batch, key=...)`."""
    return lambda params, *batch: objective(params, *batch, key=ANY_KEY())


class KeyedLoss:
    """A loss that may take a key, as one of examples that hold it: each has one of its own, as its last argument.

    Attributes:
        loss: the loss of such examples.
        in_axes: its axes.
    """

    def __init__(self, loss: Loss, in_axes: Any, has_aux: bool) -> None:
        self._given, self._in_axes, self._has_aux = loss, in_axes, has_aux
        self._takes_key = takes_key(loss, by_name_only=True)
        self.loss: Loss = loss
        self.in_axes = in_axes
        if self._takes_key:
            self.loss = functools.wraps(loss)(lambda params, *args: loss(params, *args[:-1], key=args[-1]))
            if isinstance(in_axes, int) and in_axes != 0:
                raise ValueError(
                    f"`in_axes`={in_axes} would be the axis of the keys too, which have one: give a tuple with an "
                    "entry for each argument of the loss"
                )
            self.in_axes = (*in_axes, 0) if isinstance(in_axes, tuple | list) else in_axes

    def batch(self, params: Any, batch: tuple[Any, ...], key: Any) -> tuple[Any, ...]:
        """The batch, its keys included."""
        if not self._takes_key:
            return batch
        axes = {"argnums": 0, "in_axes": self._in_axes, "has_aux": self._has_aux}
        return (*batch, jax.random.split(key, bind(self._given, (params, *batch), **axes).size))
