"""`per_example_grad`, and the object it returns."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jgd._autotune import Question, autotuned, clipped_sum_with_norms
from jgd._engine.calls import Loss, bind_named
from jgd._engine.gradients import DenseGradients, FactoredGradients, Gradients
from jgd._engine.plan import SECOND_PASS, Variant
from jgd._engine.residuals import Model
from jgd._engine.scan_reductions import NOTHING, ScanReductions
from jgd._engine.stored import stored
from jgd._engine.trace import TracedLoss, trace
from jgd._errors import common_length, describe, leaf_name
from jgd._execution import Execution, Named, gradients_of
from jgd._memory import checked_sizes, choice_within
from jgd._mesh import like_examples, placed_by
from jgd._microbatched import MicrobatchedGradients
from jgd._untraced import gradients_untraced


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "aux", "_form", "_mark"],
    meta_fields=["_treedef", "_made"],
    drop_fields=["_sums"],
)
@dataclass(frozen=True)
class PerExampleGrads:
    """B gradients, one for each example, without the `(B, P)` block of them.

    An immutable pytree: it goes in and out of `jit`, through `vmap` and `scan`. Ask it with the reductions:
    `jgd.sum`, `jgd.norms`, `jgd.clipped_sum` and the others; `jgd.materialize` gives the gradients themselves. Its
    leaves are not gradients: one is a PRNG key, which arithmetic refuses, so that `optax.tree.norm(grads)` raises.
    Best in the jitted function that makes it: of layers that a scan steps through, what is asked there without
    weights is made by the backward pass as it goes, and what its steps leave for it is not stored. (Of parameters of
    at least four bytes that a step uses once, outside of a `cond`, on one device.)

    Attributes:
        values: `(B,)`, the loss of each example.
        aux: what the loss returned beside its value, with a leading axis B; None without `has_aux`.
    """

    values: jax.Array
    aux: Any
    _form: Gradients = field(
        repr=False
    )  # how the gradients are held: `DenseGradients`, or the engine's factors
    _treedef: Any = field(repr=False)  # of the parameters
    _mark: jax.Array = field(repr=False)  # a key: arithmetic over all leaves, as on gradients, raises
    _made: "Made" = field(repr=False)  # what it was made as
    # What the pass has made of all examples together: no part of the pytree, and so not computed for one that leaves
    # its program, where nobody may ask for it.
    _sums: ScanReductions = field(default=NOTHING, repr=False)

    def __len__(self) -> int:
        return self.values.shape[0]

    def __repr__(self) -> str:
        size, parameters, form, _ = (
            self._made
        )  # the leaves may be anything: JAX puts objects of its own there
        held = form.__name__.removesuffix("Gradients").lower()
        return f"PerExampleGrads({size} examples, {parameters:,} parameters, held as {held})"


class Made(NamedTuple):
    """What gradients were made as: it tells leaves that someone has changed from those."""

    size: int
    parameters: int
    form: type
    leaves: tuple[Any, ...]  # shape and dtype of each


def _leaves(*parts: Any) -> tuple[Any, ...]:
    return tuple((jnp.shape(x), jax.dtypes.result_type(x)) for x in jax.tree.leaves(parts))


def per_example_grad(
    loss: Loss,
    *,
    argnums: int | Sequence[int] = 0,
    in_axes: Any = None,
    has_aux: bool = False,
    strategy: Named = "auto",
    microbatch_size: int | None = None,
    max_memory: int | None = None,
    autotune: bool | Question = False,
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
        microbatch_size: make the gradients so many at a time, and anew for each reduction: the memory of one
            microbatch. The examples need not divide by it. None makes all at once.
        max_memory: choose the largest microbatch, by halves of B, whose clipped sum needs no more than so many
            bytes beside arguments and results, as the compiler counts them; that takes a few compilations. Where
            what one example leaves is more, weighted sums are second backward passes, for which nothing stays: 1.4 to
            2.3 times the plain gradient's time, measured on a CPU.
        autotune: let the clock decide instead of the predictions. Give the question, a function of the
            `PerExampleGrads` to arrays, such as `jgd.norms`; True is the clipped sum with the norms. The first
            call with a loss, shapes and question times the few best plans for it on this device (some
            compilations and runs of each, while tracing where there is a trace), half and a quarter of the batch
            at a time among them where B divides; the quickest is remembered as long as the loss and the question,
            the same function object, are there. Whatever else is asked gets the same plan. The answers are the
            same to rounding, but which plan makes them may differ from run to run. Of arrays known to lie over
            several devices nothing is timed, nor with several processes, and the predictions decide.

    Returns:
        A function of `(params, *batch)` to `PerExampleGrads`. Called outside of `jit` it traces the loss each time, as
        it is then, and compiles itself once for all losses and shapes that trace to the same, whatever arrays they
        close over. What may do otherwise each time is compiled each time: a derivative rule with symbolic zeros, a
        `custom_vmap`.

    Raises:
        TypeError: a parameter is not floating-point, the loss of one example is not a floating-point scalar, or
            `autotune` is neither a bool nor a function.
        ValueError: the batch's leaves disagree in length, or `strategy`, `in_axes` or `argnums` do not fit;
            `microbatch_size` or `max_memory` is below 1, both are given, or one example alone needs more memory;
            `autotune` comes with a `strategy` that leaves no choice, or its question closes over a traced value.

    Example:
        >>> import jax.numpy as jnp, jgd
        >>> loss = lambda w, x, y: 0.5 * (x @ w - y) ** 2
        >>> x, y = jnp.array([[1., 0.], [0., 2.]]), jnp.array([1., 1.])
        >>> grads = jgd.per_example_grad(loss)(jnp.zeros(2), x, y)
        >>> jgd.norms(grads)
        Array([1., 2.], dtype=float32)

    Outside of `jit` the trace is 2 to 100 ms a call for the suite's models (some 0.1 ms for each equation, 2 to 5 ms
    for each `custom_jvp` or `custom_vjp`, jax.nn.relu among them): in a loop, call it from a jitted function.

    Cost: one forward and one backward pass without the products that make the weights' gradients; those are
    done by the reductions. Gradients that are small, all in all or beside what their examples leave for a backward
    pass, are made by the pass itself, the latter on a CPU some examples at a time. The reference makes B
    gradients and holds them all. In microbatches each reduction makes its own pass, the losses' values take a
    forward pass more where they are used, and a Gram one of both for each pair of microbatches.
    """
    if strategy not in get_args(Named) and not isinstance(strategy, Variant):  # which measurements force
        raise ValueError(
            f"`strategy` must be one of {', '.join(map(repr, get_args(Named)))}, got {strategy!r}"
        )

    if autotune and strategy != "auto":
        raise ValueError(
            f"`autotune` chooses the plan, so `strategy` must be 'auto' beside it, got {strategy!r}"
        )
    if not isinstance(autotune, bool) and not callable(autotune):
        raise TypeError(
            f"`autotune` must be a bool, or the function of the gradients that is to be timed, got {describe(autotune)}"
        )
    checked_sizes(microbatch_size, max_memory)
    question = clipped_sum_with_norms if autotune is True else autotune

    def gradients(*args: Any, **named: Any) -> PerExampleGrads:
        call = bind_named(loss, args, named, argnums=argnums, in_axes=in_axes, has_aux=has_aux)
        try:
            program, constants = trace(call)
        except (TypeError, jax.errors.NonConcreteBooleanIndexError) as refused:
            values, aux, form = gradients_untraced(call, refused)
            return _stand_in(_mark(), values, aux, form, jax.tree.structure(call.params))
        model = Model(call.param_leaves, constants)
        if max_memory is not None:
            choice = choice_within(max_memory, program, strategy, model, call.batch_leaves)
        else:
            choice = Execution(strategy, min(microbatch_size or call.size, call.size))
        hold = functools.partial(_held, program, jax.tree.structure(call.params))
        if question is not False:
            choice = autotuned(
                program, hold, model, call.batch_leaves,
                question=question, planned=choice, divide=microbatch_size is None, max_memory=max_memory,
            )  # fmt: skip
        return hold(choice, model, call.batch_leaves)

    return gradients


def _held(
    program: TracedLoss, treedef: Any, choice: Execution, model: Model, batch: list[jax.Array]
) -> PerExampleGrads:
    """The gradients of a batch, made as chosen."""
    if choice.microbatch_size == batch[0].shape[0] and choice.strategy != SECOND_PASS:
        asked_there = any(map(_is_in_a_program, jax.tree.leaves((model, batch))))
        mark, values, aux, form = _compiled(program, choice.strategy, asked_there, *model, batch)
    else:
        form = MicrobatchedGradients(model, batch, program, *choice)
        mark, values, aux = _compiled_values(form)
    return _stand_in(mark, values, jax.tree.unflatten(program.aux_treedef, aux), form, treedef)


def _stand_in(mark: jax.Array, values: jax.Array, aux: Any, form: Gradients, treedef: Any) -> PerExampleGrads:
    sums = NOTHING
    if isinstance(form, FactoredGradients):
        sums, form = form.reductions, replace(form, reductions=NOTHING)
    parameters = sum(x.size for x in form.leaf_structs)
    made = Made(values.shape[0], parameters, type(form), _leaves(values, aux, form))
    return PerExampleGrads(values, aux, form, treedef, mark, made, sums)


def held_as(grads: PerExampleGrads, form: Gradients) -> PerExampleGrads:
    """The gradients, held in another form."""
    return _stand_in(grads._mark, grads.values, grads.aux, form, grads._treedef)


def _is_in_a_program(x: Any) -> bool:
    """Whether `x` is traced to be compiled, when what nobody asks for is dropped, and not for a derivative alone."""
    while isinstance(x, Tracer):
        # Of the tracers of derivatives, and of `vmap`'s.
        below = getattr(x, "primal", getattr(x, "val", None))
        if not isinstance(below, Tracer | jax.Array | np.ndarray | np.generic | float | int):
            return True
        x = below
    return False


def _marked(fun: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """The function, with a new mark before its results: an array of its own, which may be donated."""
    return functools.wraps(fun)(lambda *args: (_mark(), *fun(*args)))


def _mark() -> jax.Array:
    return jax.random.wrap_key_data(jnp.zeros(2, jnp.uint32), impl="threefry2x32")


_compiled = jax.jit(_marked(gradients_of), static_argnums=(0, 1, 2))
_compiled_values = jax.jit(_marked(placed_by(like_examples)(MicrobatchedGradients.values)))


def held_form(grads: Any) -> tuple[Gradients, Any]:
    """How gradients are held, and the pytree they make: of `PerExampleGrads`, or of a plain pytree of blocks.

    Raises:
        TypeError: a leaf of a plain pytree is not a floating-point array, or the leaves of `PerExampleGrads` are not
            those that they were made with.
        ValueError: its leaves disagree in their leading axis, or there are none.
    """
    if isinstance(grads, PerExampleGrads):
        form = grads._form
        if _leaves(grads.values, grads.aux, form) != grads._made.leaves or jnp.shape(grads._mark) != ():
            raise TypeError(
                f"`grads` is a {grads!r} whose leaves have been changed since, as by `jax.tree.map` or `jax.vmap`, and "
                "they are not gradients: compute with those that `jgd.materialize(grads)` returns; of what `jax.vmap` "
                "or `jax.lax.scan` returned, ask under `jax.vmap`"
            )
        form = replace(form, reductions=grads._sums) if isinstance(form, FactoredGradients) else form
        return form, grads._treedef
    paths, treedef = jax.tree_util.tree_flatten_with_path(grads)
    if not paths:
        raise ValueError("`grads` is a pytree without leaves: it holds no gradients")
    lengths = {}
    for path, leaf in paths:
        name = leaf_name("grads", path)
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.ndim == 0:
            raise TypeError(
                f"{name} is {describe(leaf)}, but gradients are floating-point arrays with a leading axis of examples, "
                "as `jax.vmap(jax.grad(loss))` or `jgd.per_example_grad(loss)` give them"
            )
        lengths[name] = leaf.shape[0]
    common_length(lengths, "`grads`", may_be_empty=True)
    return DenseGradients([stored(jnp.asarray(leaf)) for _, leaf in paths]), treedef
