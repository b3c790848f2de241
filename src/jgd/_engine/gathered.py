"""What examples left for one part, and what is made of it: blocks, squares, inner products, moments.

It is all the same here whether the examples left it in a pass that is over, or are in a scan's step of one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jgd._engine import factors, grams, lookups, moments
from jgd._engine.parts import Part
from jgd._engine.tiles import Batch
from jgd._engine.uses import SiteData


@dataclass(frozen=True)
class Gathered:
    """A batch of examples, and what one of them left at the sites of a part.

    Where gradients are `kept`, all may be there at once, and as `blocks` they may be at hand: each in the order in
    which it comes.
    """

    part: Part
    batch: Batch
    data: Callable[[Any], dict[int, SiteData]]
    kept: bool = False
    blocks: jax.Array | None = None

    def of(self, arrays: Any, blocks: jax.Array | None = None) -> "Gathered":
        """What was gathered of other examples, or of a part of the same kind."""
        return replace(self, batch=replace(self.batch, arrays=arrays), blocks=blocks)

    def made_blocks(self) -> jax.Array:
        """The gradients in the part, `(B, ...)`, each in the order in which it comes."""
        return self._each(self.part.unordered) if self.blocks is None else self.blocks

    def factors(self) -> list[Any]:
        """The factors in the part, the examples leading."""
        return self._each(self.part.factors)

    def sum(self, weights: jax.Array | None) -> jax.Array:
        """Σ w_i G_i, flat in the order of memory, by one product for each use, the examples among its positions."""
        data = self.data(self.batch.arrays)
        return factors.add([use.batch_gradient(data[id(use.site)], weights) for use in self.part.uses])

    def squares(self) -> jax.Array:
        """‖G_i‖², `(B,)`, by the part's method."""
        if self.kept:
            return jax.vmap(factors.sum_squares)(self.made_blocks())
        square = lambda some, size: self._each(self.part.square, some, size)
        return self.batch.mapped(square, self.part.cost.numbers)

    def dot(self, direction: jax.Array) -> jax.Array:
        """⟨G_i, v⟩, `(B,)`, with a direction that is flat in the order of memory."""
        of_one = lambda data: self.part.dot(data, direction)
        built = sum(self.part.size for use in self.part.uses if use.block is not None)
        return self.batch.mapped(lambda some, size: self._each(of_one, some, size), built)

    def gram(self, other: "Gathered | None" = None, *, pieces: int = 1) -> jax.Array:
        """⟨G_i, G'_j⟩, `(B, B')`; other None means the gradients themselves once more."""
        both = [self] if other is None else [self, other]
        if self.part.shape is None or self.kept:
            flat = [one.made_blocks().reshape(one.batch.size, self.part.size) for one in both]
            return grams.of_blocks(*flat, pieces=pieces)
        return grams.of_factors(*(one.factors() for one in both), rows=self.part.shape.sizes()[1])

    @property
    def is_outer(self) -> bool:
        """Whether each gradient is one outer product, of which moments are products."""
        part = self.part
        return part.shape is not None and part.positions == 1 and part.uses[0].rule == "dot_general"

    def moment(
        self, weights: jax.Array | None, scale: Any, total: jax.Array | None = None, *, centred: bool
    ) -> jax.Array:
        """scale · Σ w_i G_i², or of what deviates from the weighted mean: flat in the order of memory.

        From the factors where they give it, else from the gradients, a tile at a time. Of outer products the
        `total`, Σ G_i, may be at hand.
        """
        shape = self.part.shape
        if shape is not None and self.part.looks_up:
            (rows,) = self.factors()
            of_rows = lookups.spread if centred else lookups.second_moment
            each = jnp.ones(self.batch.size) if weights is None else weights
            table = of_rows(rows, each, scale, shape.sizes()[1], one_device=self.batch.pieces == 1)
            return shape.flatten(table[None])
        if self.is_outer:
            assert shape is not None
            (outer,) = self.factors()
            if not centred:
                return shape.flatten(moments.square_of_outer(outer, weights)) * scale
            known = None if total is None else shape.unflatten(total)
            return shape.flatten(moments.spread_of_outer(outer, weights, scale, known))
        around = moments.square_around_mean if centred else moments.square_around_zero
        return self.part.in_memory(around(self._spread(weights))) * scale

    def both_moments(self) -> tuple[jax.Array, jax.Array]:
        """Σ G_i², and Σ (G_i − Ḡ)²: flat in the order of memory, by one way through the gradients."""
        if self.is_outer:
            return self.moment(None, 1, centred=False), self.moment(None, 1, centred=True)
        spread = self._spread(None)
        around_zero, around_mean = moments.square_around_zero(spread), moments.square_around_mean(spread)
        return self.part.in_memory(around_zero), self.part.in_memory(around_mean)

    def _spread(self, weights: jax.Array | None) -> moments.Spread:
        if self.kept:
            return moments.spread_of(self.made_blocks(), weights, one_device=self.batch.pieces == 1)
        blocks = lambda some, size: self._each(self.part.unordered, some, size)
        return moments.spread_of_tiles(self.batch, blocks, self.part.size, weights)

    def _each(
        self, fun: Callable[[dict[int, SiteData]], Any], some: Any = None, size: int | None = None
    ) -> Any:
        of_one = jax.vmap(
            lambda one: fun(self.data(one)), in_axes=(self.batch.axes,), axis_size=size or self.batch.size
        )
        return of_one(self.batch.arrays if some is None else some)


class Asked:
    """A question to what was gathered for a part, traced for the first of all parts that are of a kind."""

    def __init__(self, question: Callable[..., jax.Array]):
        self._question = question
        self._traced: dict[Any, Callable[..., jax.Array]] = {}

    def __call__(self, gathered: Gathered, *args: Any) -> jax.Array:
        kind = gathered.part.kind
        if kind is None:
            return self._question(gathered, *args)

        def question(arrays: Any, blocks: Any, *args: Any) -> jax.Array:
            return self._question(gathered.of(arrays, blocks), *args)

        key = kind, gathered.kept, gathered.batch.size
        traced = self._traced.setdefault(key, jax.jit(question))
        return traced(gathered.batch.arrays, gathered.blocks, *args)
