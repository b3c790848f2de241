"""The reference: the gradients as arrays with a leading axis of examples, as `vmap(grad)` returns them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jgd._engine.leading import mask_rows, scale_rows, sum_present
from jgd._engine.stored import stored
from jgd._engine.tiles import pieces_of
from jgd._mesh import Placement, spec_of
from jgd._random import directions


def accumulator(dtype: Any) -> Any:
    """The dtype that sums are kept in: float32, or the array's own where that is wider."""
    return jnp.promote_types(dtype, jnp.float32)


class AllAtOnce:
    """A form that holds all its gradients at the same time."""

    for_norms_and_sums: Callable[[], Any]

    def walk(self, fun: Callable[[Any, jax.Array | None], Any], weights: jax.Array | None) -> Any:
        """`fun` of the gradients and weights: of what they make, what adds up over examples and what each has."""
        return fun(self, weights)

    def squares_and_sum(self) -> tuple[list[jax.Array], jax.Array]:
        """‖g_i‖² of each leaf, and ‖Σ g_i‖²."""
        form = self.for_norms_and_sums()
        return form.squared_norms(), form.squared_sum()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Materialized(AllAtOnce):
    """B gradients as one `(B, *leaf.shape)` block for each leaf."""

    blocks: list[jax.Array]

    @property
    def size(self) -> int:
        """The number of examples, B."""
        return self.blocks[0].shape[0]

    @property
    def like(self) -> list[jax.ShapeDtypeStruct]:
        """Shape and dtype of one gradient's leaves."""
        return [jax.ShapeDtypeStruct(b.shape[1:], b.dtype) for b in self.blocks]

    @property
    def placement(self) -> Placement:
        """Over which axes of a mesh the gradients lie, where that is part of their type."""
        specs = [spec_of(b) for b in self.blocks]
        return Placement(specs[0][0], [PartitionSpec(*spec[1:]) for spec in specs])

    def materialize(self) -> list[jax.Array]:
        """The blocks themselves."""
        return self.blocks

    def for_norms_and_sums(self) -> "Materialized":
        """Itself: it has the gradients."""
        return self

    def weighted_sum(self, weights: jax.Array | None, *, keep_wide: bool = False) -> list[jax.Array]:
        """Σ w_i g_i, in the leaves' dtypes or, where told to `keep_wide`, in the accumulators'."""
        one_device = pieces_of(self.blocks, self.size) == 1
        sums = [sum_present(b, weights, one_device=one_device) for b in self.blocks]
        return sums if keep_wide else [s.astype(b.dtype) for s, b in zip(sums, self.blocks, strict=True)]

    def dot(self, direction: Sequence[jax.Array]) -> jax.Array:
        """⟨g_i, v⟩."""
        total = jnp.zeros(self.size, jnp.float32)
        for block, v in zip(self.blocks, direction, strict=True):
            wide = accumulator(jnp.promote_types(block.dtype, v.dtype))
            exact = jax.lax.Precision.HIGHEST  # the direction may differ from a rounder one where it matters
            total = total + jnp.dot(_flat(block).astype(wide), v.reshape(-1).astype(wide), precision=exact)
        return total

    def squared_norms(self) -> list[jax.Array]:
        """‖g_i‖² of each leaf."""
        return [jnp.sum(jnp.square(_flat(b).astype(accumulator(b.dtype))), axis=1) for b in self.blocks]

    def squared_sum(self) -> jax.Array:
        """‖Σ g_i‖²."""
        sums = self.weighted_sum(None, keep_wide=True)
        return jnp.sum(jnp.stack([jnp.sum(jnp.square(x)) for x in sums]))

    def gram(self, other: Any) -> jax.Array:
        """⟨g_i, g'_j⟩, with gradients that are held in any form."""
        total = jnp.zeros((self.size, other.size), jnp.float32)
        for ours, theirs in zip(self.blocks, other.materialize(), strict=True):
            wide = accumulator(jnp.promote_types(ours.dtype, theirs.dtype))
            total = total + _flat(ours).astype(wide) @ stored(_flat(theirs).astype(wide)).T
        return total

    def self_gram(self) -> jax.Array:
        """⟨g_i, g_j⟩."""
        return self.gram(self)

    def second_moments(self, weights: jax.Array | None, scale: Any = 1) -> list[jax.Array]:
        """scale · Σ w_i g_i², elementwise. Leaves in the accumulator's dtype."""
        zero = [jnp.zeros(x.shape, accumulator(x.dtype)) for x in self.like]
        return [x * scale for x in self._squares_around(zero, weights)]

    def spreads(self, weights: jax.Array | None, scale: Any = 1) -> list[jax.Array]:
        """scale · Σ w_i (g_i − ḡ)², elementwise, with ḡ the weighted mean. Leaves in the accumulator's dtype."""
        total = self.size if weights is None else jnp.sum(weights)
        mean = [x / total for x in self.weighted_sum(weights, keep_wide=True)]
        return [x * scale for x in self._squares_around(mean, weights)]

    def _squares_around(self, center: Sequence[jax.Array], weights: jax.Array | None) -> list[jax.Array]:
        sums = []
        for block, c in zip(self.blocks, center, strict=True):
            present = block if weights is None else mask_rows(weights != 0, block)
            square = jnp.square(present.astype(c.dtype) - c[None])
            sums.append(jnp.sum(square if weights is None else scale_rows(weights, square), axis=0))
        return sums

    def project(self, key: jax.Array, dim: int, numbers: Sequence[int] | None = None) -> jax.Array:
        """⟨g_i, r_k⟩/√dim for `dim` random directions r_k; `numbers` are the leaves', by default 0, 1, ..."""
        total = jnp.zeros((self.size, dim), jnp.float32)
        for number, block in zip(numbers or range(len(self.blocks)), self.blocks, strict=True):
            rows, columns = directions(key, number, block.shape[1:], dim)
            wide = accumulator(block.dtype)
            matrix = block.reshape(self.size, rows.shape[1], columns.shape[1]).astype(wide)
            total = total + jnp.einsum("brc,kr,kc->bk", matrix, rows.astype(wide), columns.astype(wide))
        return total / math.sqrt(dim)


def _flat(block: jax.Array) -> jax.Array:
    return block.reshape(block.shape[0], math.prod(block.shape[1:]))
