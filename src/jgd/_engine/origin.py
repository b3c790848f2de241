"""`vmap(grad)` of a batch: what makes blocks of gradients, and can make those of other examples."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax

from jgd._engine.masking import replace_absent
from jgd._engine.residuals import Model
from jgd._engine.stored import stored
from jgd._engine.tiles import map_tiles
from jgd._engine.trace import TracedLoss


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Origin:
    """Where blocks come from: a loss, its parameters, and the examples, of which so many go through one pass."""

    model: Model
    batch: list[jax.Array]
    program: TracedLoss = field(metadata={"static": True})
    at_once: int = field(metadata={"static": True})

    def values_and_blocks(self) -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
        """The losses, the auxiliary leaves, and the gradients of each leaf with a leading axis B."""

        def value_and_grad(example: list[Any]) -> Any:
            run = jax.value_and_grad(self.program.run, has_aux=True)
            return run(*self.model, example)

        size = self.batch[0].shape[0]
        some = lambda batch, _: jax.vmap(value_and_grad)(batch)
        # Not by `jax.lax.map(..., batch_size=at_once)`, which refuses arrays without elements.
        if self.at_once == size:
            made = some(self.batch, size)
        else:
            made = map_tiles(some, self.batch, [0] * len(self.batch), size, self.at_once)
        (values, aux), blocks = made
        return values, aux, stored(blocks)

    def with_present(self, present: jax.Array) -> "Origin":
        """The same with a present example in the place of each that is not."""
        return replace(self, batch=replace_absent(self.batch, present))
