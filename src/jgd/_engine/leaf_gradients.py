"""A batch's gradients with respect to some leaves: the protocol of questions that each kind of leaf answers.

A factored leaf (`factored_leaf.py`) is held as the factors of its sites, a dense leaf (`dense_leaf.py`) as its
`(B, leaf)` block. Computed leaves (`computed_leaves.py`) meet data through operands that are computed from them, or in
parts that overlap; where the way back is simple they are factored leaves too (`carried.py`), or elementwise ones
(`elementwise_leaf.py`).
"""

from collections.abc import Sequence
from typing import Any, Protocol

import jax

from jgd._engine.norms import Norm

ByLeaf = dict[int, jax.Array]


class LeafGradients(Protocol):
    """The gradients of B examples with respect to some leaves. All sums are kept in at least float32."""

    def blocks(self) -> ByLeaf:
        """g_i, `(B, *leaf)`."""
        ...

    def norms(self) -> dict[int, list[Norm]]:
        """‖g_i‖, `(B,)`, by leaf: the norms of disjoint parts."""
        ...

    def weighted_sum(self, weights: jax.Array | None) -> ByLeaf:
        """Σ w_i g_i. Residuals of absent examples have been masked before; blocks may be masked here."""
        ...

    def squared_sum(self) -> jax.Array:
        """‖Σ g_i‖²."""
        ...

    def deviation(self) -> jax.Array:
        """Σ ‖g_i − ḡ‖², from the deviations themselves."""
        ...

    def dot(self, direction: Sequence[jax.Array]) -> jax.Array:
        """⟨g_i, v⟩, `(B,)`, with the leaves of a direction, each in its own dtype."""
        ...

    def gram(self, other: Any, *, num_shards: int) -> jax.Array:
        """⟨g_i, g'_j⟩, `(B, B')`; `other` None means the same gradients on both sides."""
        ...

    def moments(self, weights: jax.Array | None, scale: Any, *, centred: bool) -> ByLeaf:
        """scale · Σ w_i g_i², or of the deviations from the weighted mean."""
        ...

    def project(self, key: jax.Array, dim: int) -> jax.Array:
        """⟨g_i, r_k⟩, `(B, dim)`, for random directions r_k."""
        ...
