"""Questions to ask of gradients by name, the names being the oracle's, and the comparison of the answers."""

from collections.abc import Sequence
from typing import Any

import oracle

import jgd


def ask(grads: Any, names: Sequence[str], weights: Any, max_norm: Any, direction: Any) -> dict[str, Any]:
    """The reductions of these names; the names are the oracle's."""
    questions = {
        "sum": lambda: jgd.sum(grads),
        "norms": lambda: jgd.norms(grads),
        "weighted_clipped_sum": lambda: jgd.clipped_sum(grads, max_norm, weights=weights),
        "weighted_variance": lambda: jgd.variance(grads, weights),
        "variance": lambda: jgd.variance(grads),
        "materialize": lambda: jgd.materialize(grads),
        "leaf_norms": lambda: jgd.norms(grads, per_leaf=True),
        "dot": lambda: jgd.dot(grads, direction),
        "gram": lambda: jgd.gram(grads),
        "second_moment": lambda: jgd.second_moment(grads),
        "weighted_sum": lambda: jgd.sum(grads, weights),
        "clipped_sum": lambda: jgd.clipped_sum(grads, max_norm),
    }
    return {name: questions[name]() for name in names}


def compare(got: dict[str, Any], want: dict[str, Any], tolerance: float) -> None:
    """Each answer with the oracle's of its name."""
    for quantity, answer in got.items():
        oracle.assert_close(answer, want[quantity], tolerance, what=quantity)
