"""`per_example_grad`, and the object it returns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jgd._engine.examples import Model, axes_of, pass_over
from jgd._engine.factored import Factored
from jgd._engine.plan import MATERIALIZED_BELOW, plan_of
from jgd._engine.program import Program, trace
from jgd._engine.tiles import pieces_of
from jgd._errors import describe, leaf_name
from jgd._loss import Loss, bind
from jgd._materialized import Materialized
from jgd._mesh import placed_by, spec_of, with_examples

Strategy = Literal["auto", "factored", "materialized"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PerExampleGrads:
    """B gradients, one for each example, without the `(B, P)` block of them.

    An immutable pytree: it goes in and out of `jit`, through `vmap` and `scan`. Ask it with the reductions:
    `jgd.sum`, `jgd.norms`, `jgd.clipped_sum` and the others; `jgd.materialize` gives the gradients themselves.

    Attributes:
        values: `(B,)`, the loss of each example.
        aux: what the loss returned beside its value, with a leading axis B; None without `has_aux`.
    """

    values: jax.Array
    aux: Any
    form: Any = field(repr=False)  # how the gradients are held: `Materialized`, or the engine's factors
    treedef: Any = field(metadata={"static": True}, repr=False)  # of the parameters

    def __len__(self) -> int:
        return self.values.shape[0]

    def __repr__(self) -> str:
        params, held = sum(x.size for x in self.form.like), type(self.form).__name__.lower()
        return f"PerExampleGrads({len(self)} examples, {params:,} parameters, held as {held})"


def per_example_grad(
    loss: Loss,
    *,
    argnums: int | Sequence[int] = 0,
    in_axes: Any = None,
    has_aux: bool = False,
    strategy: Strategy = "auto",
) -> Callable[..., PerExampleGrads]:
    """The gradients of a loss at each example of a batch: g_i = ∇ loss(params, example_i).

    Args:
        loss: a pure function `loss(params, *example)` of parameters and ONE example, to a floating-point
            scalar, or to `(scalar, aux)` with `has_aux`.
        argnums: which argument holds the parameters; several make the gradients a tuple.
        in_axes: as in `jax.vmap`, one entry for each argument, the parameters' included. By default the
            parameters are shared and every other argument is mapped over axis 0. None marks a shared argument.
        has_aux: whether the loss returns a pair.
        strategy: `"auto"` plans by cost; `"factored"` never builds a `(B, P)` block where a rule exists;
            `"materialized"` is `jax.vmap(jax.grad(loss))`, the reference.

    Returns:
        A function of `(params, *batch)` to `PerExampleGrads`. Called outside of `jit` it compiles itself, once
        for each loss and shapes of its arguments.

    Raises:
        TypeError: a parameter is not floating-point, or the loss of one example is not a floating-point scalar.
        ValueError: the batch's leaves disagree in length, or `strategy`, `in_axes` or `argnums` do not fit.

    Example:
        >>> import jax.numpy as jnp, jgd
        >>> loss = lambda w, x, y: 0.5 * (x @ w - y) ** 2
        >>> x, y = jnp.array([[1., 0.], [0., 2.]]), jnp.array([1., 1.])
        >>> grads = jgd.per_example_grad(loss)(jnp.zeros(2), x, y)
        >>> jgd.norms(grads)
        Array([1., 2.], dtype=float32)

    Cost: one forward and one backward pass without the products that make the weights' gradients; those are
    done by the reductions. The reference makes B gradients and holds them all.
    """
    if strategy not in get_args(Strategy):
        raise ValueError(
            f"`strategy` must be one of {', '.join(map(repr, get_args(Strategy)))}, got {strategy!r}"
        )

    def gradients(*args: Any) -> PerExampleGrads:
        call = bind(loss, args, argnums=argnums, in_axes=in_axes, has_aux=has_aux)
        program = trace(call)
        values, aux, form = _compiled_pass(
            program, strategy, call.param_leaves, program.constants(call.shared_leaves), call.batch_leaves
        )
        aux = jax.tree.unflatten(program.aux_treedef, aux)
        return PerExampleGrads(values, aux, form, jax.tree.structure(call.params))

    return gradients


def _specs_of_pass(out: Any, program: Any, strategy: Any, params: Any, constants: Any, batch: Any) -> Any:
    """Over which explicit axes of a mesh everything lies that the pass returns."""
    del program, strategy
    examples = spec_of(batch[0])[0]
    along = lambda axis: PartitionSpec(*(None,) * axis, examples)
    leaves, form = [spec_of(p) for p in params], out[2]
    if isinstance(form, Materialized):
        blocks: list[Any] = [with_examples(examples, leaf) for leaf in leaves]
        return along(0), along(0), Materialized(blocks)
    model = Model(leaves, [spec_of(x) for x in constants])
    return along(0), along(0), replace(form, model=model, examples=jax.tree.map(along, axes_of(form.plan)))


@placed_by(_specs_of_pass)
def _pass(
    program: Program, strategy: Strategy, params: list[Any], constants: list[Any], batch: list[Any]
) -> tuple[jax.Array, list[Any], Any]:
    if batch[0].shape[0] == 0:
        return _no_examples(program, params, constants, batch)
    total = batch[0].shape[0] * sum(p.size for p in program.param_avals)
    pieces = pieces_of(batch, batch[0].shape[0])
    if strategy == "factored" or (strategy == "auto" and (total > MATERIALIZED_BELOW or pieces > 1)):
        plan = plan_of(program)
        model = Model(params, constants)
        values, aux, examples = pass_over(plan, model, batch)
        return values, aux, Factored(model, examples, plan, pieces)

    def value_and_grad(example: list[Any]) -> Any:
        return jax.value_and_grad(program.run, has_aux=True)(params, constants, example)

    (values, aux), blocks = jax.vmap(value_and_grad)(batch)
    return values, aux, Materialized(blocks)


_compiled_pass = jax.jit(_pass, static_argnums=(0, 1))


def _no_examples(program: Program, params: list[Any], constants: list[Any], batch: list[Any]) -> Any:
    example = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in batch]
    value, aux = jax.eval_shape(program.run, params, constants, example)
    empty = lambda x: jnp.zeros((0, *x.shape), x.dtype)
    return empty(value), [empty(x) for x in aux], Materialized([empty(jnp.asarray(p)) for p in params])


def held_form(grads: Any) -> tuple[Any, Any]:
    """How gradients are held, and the pytree they make: of `PerExampleGrads`, or of a plain pytree of blocks.

    Raises:
        TypeError: a leaf of a plain pytree is not a floating-point array.
        ValueError: its leaves disagree in their leading axis, or there are none.
    """
    if isinstance(grads, PerExampleGrads):
        return grads.form, grads.treedef
    paths, treedef = jax.tree_util.tree_flatten_with_path(grads)
    if not paths:
        raise ValueError("`grads` is a pytree without leaves: it holds no gradients")
    first = None
    for path, leaf in paths:
        name = leaf_name("grads", path)
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.ndim == 0:
            raise TypeError(
                f"{name} is {describe(leaf)}, but gradients are floating-point arrays with a leading axis of examples, "
                "as `jax.vmap(jax.grad(loss))` or `jgd.per_example_grad(loss)` give them"
            )
        first = first or (name, leaf.shape[0])
        if leaf.shape[0] != first[1]:
            raise ValueError(
                f"the leaves of `grads` disagree in length: {first[0]} holds {first[1]} examples, "
                f"{name} {leaf.shape[0]}"
            )
    return Materialized([jnp.asarray(leaf) for _, leaf in paths]), treedef
