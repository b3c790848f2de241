"""What a model of the suite is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Model:
    """A loss of one example with parameters and a batch to measure it on.

    Attributes:
        name: what tables call it.
        loss: `loss(params, *example)` to a scalar.
        params: the parameters.
        batch: the loss's other arguments, with a leading axis of examples where they are mapped.
        in_axes: as `jgd.per_example_grad` takes it; None maps everything but the parameters.
    """

    name: str
    loss: Callable[..., Any]
    params: Any
    batch: tuple[Any, ...]
    in_axes: tuple[Any, ...] | None = None

    @property
    def axes(self) -> tuple[Any, ...]:
        """What `jax.vmap` takes: an entry for each argument."""
        return self.in_axes or (None, *(0 for _ in self.batch))

    @property
    def size(self) -> int:
        """The number of examples, B."""
        mapped = [x for x, axis in zip(self.batch, self.axes[1:], strict=True) if axis == 0]
        return jax.tree.leaves(mapped)[0].shape[0]

    @property
    def num_params(self) -> int:
        """The number of parameters, P."""
        return sum(x.size for x in jax.tree.leaves(self.params))
