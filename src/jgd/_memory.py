"""How many examples at a time fit into some memory, by what the compiler says."""

from typing import Any

import jax
import jax.numpy as jnp

from jgd._clipping import clipped_sum
from jgd._engine.examples import Model
from jgd._engine.program import Program
from jgd._errors import describe
from jgd._whole import Strategy, gradients_of

Shapes = tuple[jax.ShapeDtypeStruct, ...]


def checked_sizes(microbatch_size: Any, max_memory: Any) -> None:
    """Raises what is wrong with the two ways to say how many examples go at a time."""
    for name, value in (("microbatch_size", microbatch_size), ("max_memory", max_memory)):
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            unit = "examples" if name == "microbatch_size" else "bytes"
            raise TypeError(f"`{name}` must be an int, a number of {unit}, got {describe(value)}")
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")
    if microbatch_size is not None and max_memory is not None:
        raise ValueError(
            f"give at most one of `microbatch_size` and `max_memory`, got {microbatch_size} and {max_memory}"
        )


def microbatch_within(
    max_memory: int, program: Program, strategy: Strategy, model: Model, batch: list[Any]
) -> int:
    """The largest B, B/2, B/4, ... rounded up, of which a clipped sum stays within so many temporary bytes.

    Raises:
        ValueError: one example alone needs more.
    """
    shapes = lambda leaves: tuple(jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves)
    size = batch[0].shape[0]
    made_of = strategy, shapes(model.params), shapes(model.constants), shapes(batch)

    def needs(size: int) -> int:
        make = lambda: _temporary_bytes(program, *made_of, size)
        return program.once(("temporary bytes", *made_of, size), make)

    while size > 1 and needs(size) > max_memory:
        size = -(-size // 2)
    if size == 1 and (needed := needs(1)) > max_memory:
        raise ValueError(
            f"`max_memory`={max_memory:,} bytes is less than the clipped gradient of one example needs: {needed:,}"
        )
    return size


def _temporary_bytes(
    program: Program, strategy: Strategy, params: Shapes, constants: Shapes, batch: Shapes, size: int
) -> int:
    def clipped(params: list[Any], constants: list[Any], batch: list[Any]) -> list[jax.Array]:
        *_, form = gradients_of(program, strategy, params, constants, batch)
        return clipped_sum(form, 1.0, None)[0]

    some = [x.update(shape=(size, *x.shape[1:])) for x in batch]
    memory = jax.jit(clipped).lower(list(params), list(constants), some).compile().memory_analysis()
    return int(getattr(memory, "temp_size_in_bytes", 0))
