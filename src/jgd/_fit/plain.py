"""Python's own types and arrays as JSON, and back as they were: what a loader says of where it stands."""

import base64
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgd._errors import describe


def encoded(value: Any, name: str) -> Any:
    """`value` as JSON from which `decoded` makes it again, types and all.

    Args:
        value: None, numbers, text, bytes, arrays of NumPy or JAX, and lists, tuples, dicts and sets of those.
        name: what an error calls it.

    Raises:
        TypeError: some part of it is of another type.
    """
    kind = type(value)
    if value is None or kind is bool or kind is int or kind is str:
        return value
    if kind is float:
        return {"float": value.hex()}
    if kind is complex:
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if kind is bytes or kind is bytearray:
        return {kind.__name__: _base64(value)}
    if kind is list:
        return [encoded(x, f"{name}[{k}]") for k, x in enumerate(value)]
    if kind is tuple or kind is set or kind is frozenset:
        return {kind.__name__: [encoded(x, f"{name}[{k}]") for k, x in enumerate(value)]}
    if kind is dict:
        return {"dict": [[encoded(k, f"{name} key"), encoded(x, f"{name}[{k!r}]")] for k, x in value.items()]}
    if kind is np.ndarray or isinstance(value, np.generic | jax.Array):
        return _encoded_array(value, name)
    raise TypeError(
        f"{name} is {describe(value)}, which a checkpoint cannot keep: it keeps None, numbers, text, bytes, arrays, "
        "and lists, tuples, dicts and sets of those"
    )


def decoded(value: Any) -> Any:
    """What `encoded` was given."""
    if isinstance(value, list):
        return [decoded(x) for x in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "float":
        return float.fromhex(inner)
    if kind == "complex":
        return complex(*map(float.fromhex, inner))
    if kind in ("bytes", "bytearray"):
        raw = base64.b64decode(inner)
        return raw if kind == "bytes" else bytearray(raw)
    if kind == "dict":
        return {decoded(k): decoded(x) for k, x in inner}
    if kind in ("tuple", "set", "frozenset"):
        return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](decoded(x) for x in inner)
    return _decoded_array(kind, inner)


def _encoded_array(value: Any, name: str) -> Any:
    if isinstance(value, jax.Array):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return {"key": [str(jax.random.key_impl(value)), encoded(jax.random.key_data(value), name)]}
        kind = "jax"
    else:
        kind = "array" if isinstance(value, np.ndarray) else "scalar"
    array = np.asarray(value)
    if array.dtype.hasobject or array.dtype.names:
        raise TypeError(f"{name} is {describe(value)}, which a checkpoint cannot keep")
    # By name where that says it all: JAX's half precisions have no letter of their own.
    dtype = array.dtype.str if array.dtype.kind in "SUmM" else array.dtype.name
    return {kind: [dtype, list(array.shape), _base64(np.ascontiguousarray(array).tobytes())]}


def _decoded_array(kind: str, inner: Any) -> Any:
    if kind == "key":
        return jax.random.wrap_key_data(decoded(inner[1]), impl=inner[0])
    dtype, shape, raw = inner
    array = np.frombuffer(base64.b64decode(raw), jnp.dtype(dtype)).reshape(shape).copy()
    return {"array": lambda: array, "scalar": lambda: array[()], "jax": lambda: jnp.asarray(array)}[kind]()


def _base64(raw: bytes | bytearray) -> str:
    return base64.b64encode(raw).decode()
