"""Digests of what a function computes, by its trace: the same in every process, on every device and mesh."""

import hashlib
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding


def digest_of(function: Callable[..., Any], *args: Any) -> str:
    """A digest of the function as traced for the shapes and dtypes of the arguments, its constants included.

    A function that a custom derivative holds is told by its name alone where its own trace is not a part of this one.
    """
    closed = jax.make_jaxpr(function)(*jax.tree.map(shape_of, args))
    writer = _Writer()
    writer.closed(closed)
    return writer.sha.hexdigest()[:32]


def shape_of(x: Any) -> jax.ShapeDtypeStruct:
    """The shape of an array and the dtype that JAX gives it, wherever it lies."""
    dtype = x.dtype if hasattr(x, "dtype") else jax.numpy.result_type(x)
    if not jax.numpy.issubdtype(dtype, jax.dtypes.extended):
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jax.ShapeDtypeStruct(np.shape(x), dtype)


class _Writer:
    """Writes a jaxpr as text into a digest: variables by the order in which they appear, constants by their bits."""

    def __init__(self) -> None:
        self.sha = hashlib.sha256()
        self._names: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no variable's number passes to another

    def closed(self, closed: Any) -> None:
        for constant in closed.consts:
            self.value(constant)
        self.jaxpr(closed.jaxpr)

    def jaxpr(self, jaxpr: Any) -> None:
        self.text("{")
        for variable in (*jaxpr.constvars, *jaxpr.invars):
            self.atom(variable)
        for eqn in jaxpr.eqns:
            self.text(f";{eqn.primitive.name}")
            for name in sorted(eqn.params):
                self.text(f" {name}=")
                self.value(eqn.params[name])
            for atom in (*eqn.invars, *eqn.outvars):
                self.atom(atom)
        self.text("->")
        for atom in jaxpr.outvars:
            self.atom(atom)
        self.text("}")

    def atom(self, atom: Any) -> None:
        if hasattr(atom, "val"):
            self.value(atom.val)
            return
        if id(atom) not in self._names:
            self._names[id(atom)] = len(self._names)
            self._alive.append(atom)
        aval = atom.aval
        self.text(
            f" v{self._names[id(atom)]}:{getattr(aval, 'dtype', type(aval).__name__)}{getattr(aval, 'shape', '')}"
        )

    def value(self, value: Any) -> None:
        if hasattr(value, "eqns"):
            self.jaxpr(value)
        elif hasattr(value, "jaxpr") and hasattr(value, "consts"):
            self.closed(value)
        elif isinstance(value, jax.Array | np.ndarray | np.generic):
            self.array(value)
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                self.text(f"{key}:")
                self.value(value[key])
        elif isinstance(value, list | tuple):
            self.text(f"{type(value).__name__}(")
            for item in value:
                self.value(item)
                self.text(",")
            self.text(")")
        elif isinstance(value, set | frozenset):
            self.value(sorted(value, key=str))
        elif isinstance(value, Sharding | Mesh) or type(value).__name__ == "AbstractMesh":
            self.text(type(value).__name__)  # where arrays lie may change from one start to the next
        elif callable(value) and not isinstance(value, type):
            self.text(getattr(value, "__qualname__", type(value).__qualname__))
        else:
            self.text(
                re.sub(r" at 0x[0-9a-f]+|\b(id|0x)=?[0-9a-f]{6,}", "", f"{type(value).__name__} {value!r}")
            )

    def array(self, value: Any) -> None:
        if isinstance(value, jax.Array) and jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            self.text(f"{value.dtype}{value.shape}")  # a part of it is all that this process could look at
            return
        array = np.asarray(value)
        self.text(f"{array.dtype}{array.shape}")
        self.sha.update(np.ascontiguousarray(array).tobytes())

    def text(self, text: str) -> None:
        self.sha.update(text.encode())
