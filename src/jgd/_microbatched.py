"""Gradients that are made a microbatch at a time, and again for each question: the memory of one microbatch.

The loop and its accumulators are `optax.microbatching`'s. A last microbatch that is not full is filled with absent
examples, copies of the last one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax.microbatching as micro
from jax.sharding import PartitionSpec

from jgd._engine.factors import sum_squares
from jgd._engine.gradients import OfGradients
from jgd._engine.masking import replace_absent
from jgd._engine.moments import deviation_of, inverse
from jgd._engine.norms import all_together
from jgd._engine.residuals import Model
from jgd._engine.trace import TracedLoss
from jgd._execution import Strategy, gradients_of, values_of
from jgd._mesh import Placement, spec_of
from jgd._weights import sums

_SUM, _CONCAT = micro.AccumulationType.SUM, micro.AccumulationType.CONCAT


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MicrobatchedGradients:
    """B gradients, as what makes them."""

    model: Model
    batch: list[jax.Array]
    program: TracedLoss = field(metadata={"static": True})
    strategy: Strategy = field(metadata={"static": True})
    microbatch_size: int = field(metadata={"static": True})

    @property
    def size(self) -> int:
        """The number of examples, B."""
        return self.batch[0].shape[0]

    @property
    def leaf_structs(self) -> list[jax.ShapeDtypeStruct]:
        """Shape and dtype of one gradient's leaves."""
        return list(self.program.param_avals)

    @property
    def placement(self) -> Placement:
        """Over which axes of a mesh the gradients lie, where that is part of their type."""
        leaves: list[PartitionSpec] = [spec_of(p) for p in self.model.params]
        return Placement(spec_of(self.batch[0])[0], leaves)

    def values(self) -> tuple[jax.Array, list[jax.Array]]:
        """The losses and the auxiliary leaves, by a forward pass alone."""
        kinds: list[Any] = []  # of the auxiliary leaves that are keys, which optax cannot string together

        def of_batch(batch: list[jax.Array], _: None) -> Any:
            values, aux = values_of(self.program, self.model, batch)
            kinds[:] = [jax.random.key_impl(x) if _is_key(x) else None for x in aux]
            return (), (values, [jax.random.key_data(x) if _is_key(x) else x for x in aux])

        values, aux = self._mapped(of_batch, None)[1]
        keyed = zip(aux, kinds, strict=True)
        return values, [x if kind is None else jax.random.wrap_key_data(x, impl=kind) for x, kind in keyed]

    def with_present(self, present: jax.Array) -> "MicrobatchedGradients":
        """The same gradients, with those of a present example in the place of each that is not."""
        return replace(self, batch=replace_absent(self.batch, present))

    def map_microbatches(self, fun: OfGradients, weights: jax.Array | None) -> tuple[Any, Any]:
        """`fun` of every microbatch's gradients and weights: of its pair, the first added up, the second joined."""

        def of_batch(batch: list[jax.Array], weights: jax.Array | None) -> Any:
            params, constants = self.model.params, self.model.constants
            *_, form = gradients_of(self.program, self.strategy, True, params, constants, batch)
            return fun(form, weights)

        return self._mapped(of_batch, weights)

    def _mapped(self, fun: Callable[..., Any], weights: jax.Array | None) -> tuple[Any, Any]:
        size = self.microbatch_size
        if size == self.size:  # not in a loop: inside of one XLA has slower convolutions on a CPU
            return fun(self.batch, weights)
        padding = -self.size % size
        batch = self.batch
        if padding:
            order = jnp.minimum(jnp.arange(self.size + padding), self.size - 1)
            batch = [x[order] for x in batch]
            weights = jnp.pad(jnp.ones(self.size) if weights is None else weights, (0, padding))
        # optax can neither cut nor join arrays without elements.
        given = [x if x.size else None for x in batch]
        if weights is None and not any(x.size for x in batch):
            weights = jnp.ones(self.size + padding)
        joined = _Joined()

        def some(given: list[jax.Array | None], weights: jax.Array | None) -> Any:
            empty = lambda x: jnp.zeros((size, *x.shape[1:]), x.dtype)
            each = zip(given, batch, strict=True)
            return joined.split(fun([empty(x) if own is None else own for own, x in each], weights))

        if weights is None:
            sums, each = micro.microbatch(lambda given: some(given, None), 0, size, (_SUM, _CONCAT))(given)
        else:
            sums, each = micro.microbatch(some, (0, 1), size, (_SUM, _CONCAT))(given, weights)
        return sums, joined.whole([x[: self.size] for x in each], self.size)

    def deviation_and_squared_sum(self) -> tuple[jax.Array, jax.Array]:
        """Σ ‖g_i − ḡ‖², and ‖Σ g_i‖²."""
        whole = all_together(self.leaf_structs)
        both = lambda form, weights: (form.weighted_sum(weights), form.norms(whole)[0].length)
        total, norms = self.map_microbatches(both, None)
        of_sum = jnp.sum(jnp.stack([sum_squares(x) for x in total]))
        itself = lambda: jnp.sum(jnp.stack([jnp.sum(x) for x in self.spreads(None)]))
        return deviation_of(jnp.sum(jnp.square(norms)), of_sum, self.size, itself), of_sum

    def spreads(self, weights: jax.Array | None, scale: Any = 1) -> list[jax.Array]:
        """scale · Σ w_i (g_i − ḡ)², elementwise, with ḡ the weighted mean; the mean first, by a walk of its own."""
        total = self.size if weights is None else jnp.sum(weights)
        whole = sums(self, weights)

        def around_the_mean(form: Any, w: Any) -> Any:
            own = jnp.sum(jnp.ones(form.size) if w is None else w)
            means = [x * inverse(own) for x in form.weighted_sum(w)]
            apart = [mean - x / total for mean, x in zip(means, whole, strict=True)]
            # The weight, which may be 0, before the square, which may be out of range.
            return [square + x * own * x for square, x in zip(form.spreads(w), apart, strict=True)], ()

        return [x * scale for x in self.map_microbatches(around_the_mean, weights)[0]]

    def gram(self, other: Any) -> jax.Array:
        """⟨g_i, g'_j⟩; the other batch's microbatches are made again for each of these."""
        if other.size == 0:  # which optax cannot string together
            return jnp.zeros((self.size, 0))
        columns = lambda form: other.map_microbatches(lambda theirs, _: ((), theirs.gram(form)), None)[1]
        return self.map_microbatches(lambda form, _: ((), columns(form).T), None)[1]

    def self_gram(self) -> jax.Array:
        """⟨g_i, g_j⟩."""
        return self.gram(self)

    def materialize(self) -> list[jax.Array]:
        """g_i, every leaf with a leading axis B."""
        return self.map_microbatches(lambda form, _: ((), form.materialize()), None)[1]


def _is_key(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


class _Joined:
    """A tree of arrays to be joined along their leading axis, some without elements."""

    def split(self, made: tuple[Any, Any]) -> tuple[Any, list[jax.Array]]:
        """What is summed, and those arrays of what is joined that have elements."""
        sums, each = made
        leaves, self._treedef = jax.tree.flatten(each)
        self._shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
        return sums, [x for x in leaves if x.size]

    def whole(self, joined: list[jax.Array], size: int) -> Any:
        """The tree of what was joined; of `size` examples."""
        filled = iter(joined)
        empty = lambda x: jnp.zeros((size, *x.shape[1:]), x.dtype)
        return jax.tree.unflatten(self._treedef, [next(filled) if x.size else empty(x) for x in self._shapes])
