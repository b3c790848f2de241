"""What the flags of public functions make of their return types: pyright reads this file, and a test runs it.

Of a pytree pyright knows nothing, so that it is `Any` here.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from typing import Any, assert_type

from jax import Array

import jgd


def of_norms(grads: jgd.PerExampleGrads, flag: bool) -> dict[str, Any]:
    """One array, or a pytree of them."""
    return {
        "array": [
            assert_type(jgd.norms(grads), Array),
            assert_type(jgd.norms(grads, per_leaf=False), Array),
            assert_type(jgd.norms(grads, groups=None), Array),
            assert_type(jgd.norms(grads, per_leaf=False, groups=None), Array),
        ],
        "tree": [
            assert_type(jgd.norms(grads, per_leaf=True), Any),
            assert_type(jgd.norms(grads, per_leaf=True, groups=None), Any),
            assert_type(jgd.norms(grads, groups={"w": "w", "b": "b"}), Any),
        ],
        "either": [assert_type(jgd.norms(grads, per_leaf=flag), Any)],
    }


def of_clipped_sum(grads: jgd.PerExampleGrads, flag: bool, number: Array) -> dict[str, Any]:
    """The sum, or a pair of it and the norms: an array for one number, a pytree for a pytree of them."""
    limits = {"w": 1.0, "b": number}
    return {
        "sum": [
            assert_type(jgd.clipped_sum(grads, 1.0), Any),
            assert_type(jgd.clipped_sum(grads, limits), Any),
            assert_type(jgd.clipped_sum(grads, limits, return_norms=False), Any),
        ],
        "sum and array": [
            assert_type(jgd.clipped_sum(grads, 1.0, return_norms=True), tuple[Any, Array]),
            assert_type(jgd.clipped_sum(grads, 1, return_norms=True), tuple[Any, Array]),
            assert_type(jgd.clipped_sum(grads, number, return_norms=True), tuple[Any, Array]),
        ],
        "sum and tree": [
            assert_type(jgd.clipped_sum(grads, limits, return_norms=True), tuple[Any, Any]),
        ],
        "either": [assert_type(jgd.clipped_sum(grads, limits, return_norms=flag), Any)],
    }


def of_what_is_refused(grads: jgd.PerExampleGrads) -> Any:
    """Each line is an error to pyright, which says so if one is no longer."""
    jgd.clipped_sum(grads, 1.0, return_norms="yes")  # pyright: ignore[reportCallIssue, reportArgumentType]
    return jgd.norms(grads, per_leaf=True, groups={"w": 0, "b": 0})  # pyright: ignore[reportCallIssue, reportArgumentType]
