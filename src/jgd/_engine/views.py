"""Where in a parameter's memory an operand lies: paths from a leaf that only rearrange it.

A path made of transposes, reshapes, slices, broadcasts and casts is a strided view, and NumPy knows the
algebra of those. A view here is an array of one byte an element that owns no memory: its strides and its
address say which element of the leaf each of its own is. An axis of stride 0 is a broadcast: gradients
are summed over it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.lib.stride_tricks import as_strided

from jgd._engine.jaxprs import aval_of, prim, split_p

_BASE = np.zeros(1, np.int8)

_MANY = 64  # sets of elements beyond which a look at every pair is too much
_ADDRESS = _BASE.__array_interface__["data"][0]

Axis = tuple[int, int]  # size, stride in elements of the leaf


@dataclass(frozen=True, eq=False)
class View:
    """An operand as a view of one leaf. Loops that step through the leaf own the leading axes of `array`."""

    leaf: int
    array: np.ndarray
    loops: tuple[int, ...] = ()
    is_complex: bool = False  # whether the leaf is: only a computed operand can be

    @property
    def offset(self) -> int:
        """Where in the leaf the first element lies."""
        return self.array.__array_interface__["data"][0] - _ADDRESS

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Size and stride of each axis of the operand."""
        return tuple(zip(self.array.shape, self.array.strides, strict=True))[len(self.loops) :]

    def loop_axis(self, loop: int) -> Axis | None:
        """Size and stride of the axis that a loop steps along; None where the operand is the same each step."""
        if loop not in self.loops:
            return None
        at = self.loops.index(loop)
        return self.array.shape[at], self.array.strides[at]


def whole(
    leaf: int, shape: Sequence[int], loops: Sequence[int] = (), *, is_complex: bool = False
) -> View | None:
    """The view of a leaf as it is, its leading axes belonging to `loops`; None for an empty one."""
    if 0 in shape:
        return None
    strides = [int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape))]
    return View(leaf, as_strided(_BASE, shape, strides), tuple(loops), is_complex)


def step_of(view: View | None, loop: int) -> View | None:
    """The view that a loop's body has of an operand whose leading axis the loop scans."""
    if view is None:
        return None
    depth = len(view.loops)
    return replace(view, array=np.moveaxis(view.array, depth, 0), loops=(loop, *view.loops))


def follow(eqn: Any, view: View | None) -> list[View | None]:
    """The views that an equation's outputs have, from the view of its first operand."""
    rule = _RULES.get(eqn.primitive)
    nothing: list[View | None] = [None] * len(eqn.outvars)
    if view is not None and view.is_complex and eqn.primitive in _OF_REAL:
        return nothing
    if rule is None or view is None or any(0 in v.aval.shape for v in eqn.outvars):
        return nothing
    try:
        arrays = rule(view.array, len(view.loops), eqn)
    except ValueError:  # a reshape that has to copy
        return nothing
    return [replace(view, array=array) for array in arrays]


def merge_axes(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """Axes in canonical form: without those of size 1, and with contiguous neighbours merged. The order stays."""
    merged: list[Axis] = []
    for size, stride in axes:
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return tuple(merged)


def overlap(a: tuple[int, Sequence[Axis]], b: tuple[int, Sequence[Axis]]) -> bool:
    """Whether two sets of elements, each given by an offset and axes, may have an element in common."""
    arrays = [as_strided(_BASE, [s for s, _ in axes], [d for _, d in axes]) for _, axes in (a, b)]
    shift = [as_strided(_BASE, [offset + 1], [1])[offset:] for offset, _ in (a, b)]
    moved = [as_strided(s, x.shape, x.strides) for s, x in zip(shift, arrays, strict=True)]
    try:
        most: Any = 100_000
        return np.shares_memory(*moved, max_work=most)
    except np.exceptions.TooHardError:
        return True


def may_overlap(places: Sequence[tuple[int, Sequence[Axis]]]) -> bool:
    """Whether some of several sets of elements may overlap. Of too many not every pair is looked at."""
    return len(places) > _MANY or any(overlap(a, b) for i, a in enumerate(places) for b in places[:i])


def _broadcast(array: np.ndarray, loops: int, eqn: Any) -> list[np.ndarray]:
    shape, places = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    strides = [0] * len(shape)
    for axis, place in enumerate(places):
        if array.shape[loops + axis] == shape[place]:
            strides[place] = array.strides[loops + axis]
    return [as_strided(array, array.shape[:loops] + tuple(shape), array.strides[:loops] + tuple(strides))]


def _slice(array: np.ndarray, loops: int, eqn: Any) -> list[np.ndarray]:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    index = tuple(slice(*s) for s in zip(starts, limits, strides, strict=True))
    return [array[(slice(None),) * loops + index]]


def _split(array: np.ndarray, loops: int, eqn: Any) -> list[np.ndarray]:
    ends = np.cumsum(eqn.params["sizes"])
    return np.split(array, ends[:-1].tolist(), axis=loops + eqn.params["axis"])


def _reshape(array: np.ndarray, loops: int, eqn: Any) -> list[np.ndarray]:
    if eqn.params["dimensions"] is not None:
        raise ValueError("a reshape that also transposes")
    return [np.reshape(array, array.shape[:loops] + tuple(eqn.params["new_sizes"]), copy=False)]


def _cast(array: np.ndarray, loops: int, eqn: Any) -> list[np.ndarray]:
    # Leaves are real: a cast to complex numbers and back loses nothing of them.
    if not jnp.issubdtype(aval_of(eqn.outvars[0]).dtype, jnp.inexact):
        raise ValueError("a cast that ends the path")
    return [array]


_RULES: dict[Any, Callable[[np.ndarray, int, Any], list[np.ndarray]]] = {
    prim.transpose_p: lambda array, loops, eqn: [
        array.transpose(*range(loops), *(loops + p for p in eqn.params["permutation"]))
    ],
    prim.reshape_p: _reshape,
    prim.squeeze_p: lambda array, loops, eqn: [
        array.squeeze(tuple(loops + d % (array.ndim - loops) for d in eqn.params["dimensions"]))
    ],
    prim.rev_p: lambda array, loops, eqn: [
        np.flip(array, tuple(loops + d for d in eqn.params["dimensions"]))
    ],
    prim.broadcast_in_dim_p: _broadcast,
    prim.slice_p: _slice,
    split_p: _split,
    prim.convert_element_type_p: _cast,
    prim.copy_p: lambda array, loops, eqn: [array],
    prim.real_p: lambda array, loops, eqn: [array],  # of a real leaf that was cast
    prim.conj_p: lambda array, loops, eqn: [array],
}
# These are views of real leaves only: they change the values of a complex one.
_OF_REAL = {prim.convert_element_type_p, prim.real_p, prim.conj_p}
