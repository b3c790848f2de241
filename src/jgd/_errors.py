"""What every module needs to say no: names of leaves, and the error for a missing extra."""

import importlib
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
            f"this needs `{module.split('.')[0]}`, which the extra `{extra}` brings: pip install 'jgd[{extra}]'"
        ) from error
