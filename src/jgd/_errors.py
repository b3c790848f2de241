"""What every module needs to say no: names of leaves, and the error for a missing extra."""

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from jax.core import Tracer
from jax.tree_util import keystr


def leaf_name(argument: str, path: Any) -> str:
    """The name under which an error speaks of one leaf: the argument, then the path into its pytree."""
    return f"`{argument}{keystr(path)}`"


def describe(leaf: Any) -> str:
    """Shape and dtype of an array, the type of anything else."""
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    return f"{type(leaf).__name__} {leaf!r}"


def common_length(
    lengths: Mapping[str, int], argument: str, *, hint: str = "", may_be_empty: bool = False
) -> int:
    """The number of examples that all leaves of an argument hold.

    Args:
        lengths: how many each leaf holds, by the name that `leaf_name` gives it.
        argument: what the leaves make up, as an error is to call it.
        hint: what to do where they disagree, behind a semicolon.
        may_be_empty: whether it may be 0.

    Raises:
        ValueError: they disagree, none has an axis of examples, or there are no examples.
    """
    if not lengths:
        raise ValueError(f"{argument} holds no examples: at least one leaf must have an axis of them")
    (first, size), *others = lengths.items()
    for name, length in others:
        if length != size:
            raise ValueError(
                f"the leaves of {argument} disagree in length: {first} holds {size} examples, {name} {length}{hint}"
            )
    if size == 0 and not may_be_empty:
        raise ValueError(f"{argument} holds no examples: {first} has length 0")
    return size


def is_concrete(x: Any) -> bool:
    """Whether the value of `x` can be looked at now, that is, outside of `jit`, `vmap` and `grad`."""
    return not isinstance(x, Tracer)


def require(module: str, extra: str) -> ModuleType:
    """Imports an optional dependency, or says which extra brings it.

    Raises:
        ImportError: the module is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this needs `{module.split('.')[0]}`, which the extra `{extra}` brings: pip install 'jgd[{extra}]', or "
            f"in a checkout pip install -e '.[{extra}]'"
        ) from error
