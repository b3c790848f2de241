"""How many examples at a time fit into some memory, by what the compiler says."""

from typing import Any

import jax
import jax.numpy as jnp

from jgd._clipping import clipped_sum
from jgd._engine.plan import SECOND_PASS, has_second_pass
from jgd._engine.residuals import Model
from jgd._engine.tiles import num_shards_of
from jgd._engine.trace import TracedLoss
from jgd._errors import describe
from jgd._execution import Execution, Strategy, gradients_of, values_of

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


def choice_within(
    max_memory: int, program: TracedLoss, strategy: Strategy, model: Model, batch: list[Any]
) -> Execution:
    """The largest B, B/2, B/4, ... rounded up, of which a clipped sum stays within so many temporary bytes.

    Where one example's factors alone need more, a second backward pass takes their place, if it may.

    Raises:
        ValueError: one example alone needs more.
    """
    made_of = _shapes(model.params), _shapes(model.constants), _shapes(batch)

    def needs(choice: Execution) -> int:
        make = lambda: _temporary_bytes(program, choice.strategy, *made_of, choice.microbatch_size)
        return program.once(("temporary bytes", choice, *made_of), make)

    sizes = [batch[0].shape[0]]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    again = (
        strategy == "auto"
        and may_use_second_pass(program, model, batch)
        and num_shards_of(batch, sizes[0]) == 1
    )
    strategies: list[Strategy] = [strategy, SECOND_PASS] if again else [strategy]
    for each in strategies:
        for size in sizes:
            if size == 0 or needs(Execution(each, size)) <= max_memory:
                return Execution(each, size)
    needed = min(needs(Execution(each, 1)) for each in strategies)
    raise ValueError(
        f"`max_memory`={max_memory:,} bytes is less than the clipped gradient of one example needs: {needed:,}"
    )


def may_use_second_pass(program: TracedLoss, model: Model, batch: list[Any]) -> bool:
    """Whether a weighted sum can be a second backward pass, of the losses of a batch together.

    JAX differentiates each example of some losses, but not their sum: `vmap` makes a `select` of a `cond` in a
    `custom_jvp`, for which there is then no transpose.
    """

    def summed(params: list[Any], constants: list[Any], batch: list[Any]) -> jax.Array:
        return jnp.sum(values_of(program, Model(params, constants), batch)[0])

    def differentiates() -> bool:
        try:
            jax.eval_shape(jax.grad(summed), *map(list, made_of))
        except Exception:  # whatever it is, the pass would raise it
            return False
        return True

    made_of = _shapes(model.params), _shapes(model.constants), _shapes(batch)
    return has_second_pass(program) and program.once(("differentiates", *made_of), differentiates)


def _shapes(leaves: list[Any]) -> Shapes:
    return tuple(jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves)


def _temporary_bytes(
    program: TracedLoss, strategy: Strategy, params: Shapes, constants: Shapes, batch: Shapes, size: int
) -> int:
    def clipped(params: list[Any], constants: list[Any], batch: list[Any]) -> list[jax.Array]:
        *_, form = gradients_of(program, strategy, True, params, constants, batch)
        return clipped_sum(form, 1.0, None)[0]

    some = [x.update(shape=(size, *x.shape[1:])) for x in batch]
    memory = jax.jit(clipped).lower(list(params), list(constants), some).compile().memory_analysis()
    return int(getattr(memory, "temp_size_in_bytes", 0))
