"""The gradients of a whole batch at once: traced, planned, and held in the form that costs least."""

from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jgd._engine.blocks import blocks_at_once
from jgd._engine.gradients import DenseGradients, FactoredGradients
from jgd._engine.origin import Origin
from jgd._engine.plan import PLANNED, Variant, plan_of
from jgd._engine.residuals import Model, axes_of, pass_over
from jgd._engine.stored import stored
from jgd._engine.tiles import num_shards_of
from jgd._engine.trace import TracedLoss
from jgd._mesh import placed_by, spec_of, with_examples

Named = Literal["auto", "factored", "materialized"]
Strategy = Named | Variant  # a variant is a factored plan that the clock or a limit on memory chose


class Execution(NamedTuple):
    """How gradients are made: by which strategy, and so many examples at a time."""

    strategy: Strategy
    microbatch_size: int


def _specs_of_pass(
    out: Any, program: Any, strategy: Any, together: Any, params: Any, constants: Any, batch: Any
) -> Any:
    """Over which explicit axes of a mesh everything lies that the pass returns."""
    del program, strategy, together
    examples = spec_of(batch[0])[0]
    along = lambda axis: PartitionSpec(*(None,) * axis, examples)
    leaves, form = [spec_of(p) for p in params], out[2]
    model = Model(leaves, [spec_of(x) for x in constants])
    if isinstance(form, DenseGradients):
        blocks: list[Any] = [with_examples(examples, leaf) for leaf in leaves]
        origin = form.origin
        if origin is not None:
            origin = replace(origin, model=model, batch=[along(0) for _ in batch])
        return along(0), along(0), DenseGradients(blocks, origin)
    lie = jax.tree.map(along, axes_of(form.plan))
    reductions = jax.tree.map(lambda _: PartitionSpec(), form.reductions)
    return along(0), along(0), replace(form, model=model, residuals=lie, reductions=reductions)


@placed_by(_specs_of_pass)
def gradients_of(
    program: TracedLoss,
    strategy: Strategy,
    together: bool,
    params: list[Any],
    constants: list[Any],
    batch: list[Any],
) -> tuple[jax.Array, list[Any], Any]:
    """The losses, the auxiliary leaves and the gradients of a batch, by one pass.

    That may make sums, moments and inner products of examples `together`, of leaves that a scan steps through: for
    programs in which it is also asked, for else it is work that nobody may ask for.
    """
    if batch[0].shape[0] == 0:
        return _no_examples(program, params, constants, batch)
    size = batch[0].shape[0]
    num_shards = num_shards_of(batch, size)
    given, given_batch = Model(params, constants), batch
    params, constants, batch = stored((params, constants, batch))
    if strategy == "auto":
        at_once = blocks_at_once(program, size, num_shards)
    else:
        at_once = size if strategy == "materialized" else None
    if at_once is None:
        plan = plan_of(program, strategy if isinstance(strategy, Variant) else PLANNED)
        model = Model(params, constants)
        one_device = num_shards == 1
        values, aux, residuals, reductions = pass_over(
            plan, model, batch, fuse=one_device, together=together and one_device
        )
        return values, aux, FactoredGradients(model, stored(residuals), plan, num_shards, reductions)
    values, aux, blocks = Origin(Model(params, constants), batch, program, at_once).values_and_blocks()
    return values, aux, DenseGradients(blocks, Origin(given, given_batch, program, at_once))


def values_of(program: TracedLoss, model: Model, batch: list[Any]) -> tuple[jax.Array, list[Any]]:
    """The losses and the auxiliary leaves of a batch, by a forward pass alone."""
    return jax.vmap(lambda example: program.run(model.params, model.constants, example))(batch)


def _no_examples(program: TracedLoss, params: list[Any], constants: list[Any], batch: list[Any]) -> Any:
    example = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in batch]
    value, aux = jax.eval_shape(program.run, params, constants, example)
    empty = lambda x: jnp.zeros((0, *x.shape), x.dtype)
    return empty(value), [empty(x) for x in aux], DenseGradients([empty(jnp.asarray(p)) for p in params])
