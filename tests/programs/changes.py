"""What a loss may refer to that is another thing when it is asked again."""

import functools
import types
from collections.abc import Callable
from typing import Any

import numpy as np

Refer = Callable[[], Any]
Pair = tuple[Refer, Callable[[], None]]


def _of_dict() -> Pair:
    held = {"factor": 1.1}
    return lambda: held["factor"], lambda: held.update(factor=-0.6)


def _of_closure() -> Pair:
    factor = 1.1

    def change() -> None:
        nonlocal factor
        factor = -0.6

    return lambda: factor, change


def _of_globals() -> Pair:
    """A function with a module's globals of its own, as a notebook has them."""
    names: dict[str, Any] = {"factor": 1.1}
    refer = types.FunctionType((lambda: factor).__code__, names)
    return refer, lambda: names.update(factor=-0.6)


def _of_helper() -> Pair:
    """A helper that is defined anew."""
    names: dict[str, Any] = {"helper": lambda: 1.1}
    refer = types.FunctionType((lambda: helper()).__code__, names)
    return refer, lambda: names.update(helper=lambda: -0.6)


class _Model:
    def __init__(self) -> None:
        self.factor = 1.1

    def refer(self) -> float:
        return self.factor


def _of_attribute() -> Pair:
    model = _Model()
    return model.refer, lambda: setattr(model, "factor", -0.6)


def _of_default() -> Pair:
    def refer(factor: float = 1.1) -> float:
        return factor

    return refer, lambda: setattr(refer, "__defaults__", (-0.6,))


def _of_partial() -> Pair:
    refer = functools.partial(lambda factor: factor, factor=1.1)
    return refer, lambda: refer.keywords.update(factor=-0.6)


def _of_array() -> Pair:
    """An array of NumPy's that is written to."""
    factor = np.array([1.1])

    def change() -> None:
        factor[0] = -0.6

    return lambda: factor[0], change


def _of_traced_array() -> Pair:
    """The same, used as an array: a constant of the program."""
    factor = np.array([1.1])

    def change() -> None:
        factor[0] = -0.6

    return lambda: factor.copy(), change


CHANGEABLE: dict[str, Callable[[], Pair]] = {
    "dict": _of_dict,
    "closure": _of_closure,
    "global": _of_globals,
    "helper": _of_helper,
    "attribute": _of_attribute,
    "default": _of_default,
    "partial": _of_partial,
    "array": _of_array,
    "array as a constant": _of_traced_array,
}


def changeable(name: str) -> tuple[Refer, Callable[[], None], str]:
    return (*CHANGEABLE[name](), name)
