"""How the gradient of a batch is computed: the part of a method that can be exchanged.

Every derivative is a function of `(params, *batch, weights=None, key=None)` to an `Evaluation`; the step that follows
is the same. `weights` is `(B,)`, and weight 0 is an absent example. `key` is that of one update.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jgd._autotune import Reduced
from jgd._engine.calls import Loss, bind
from jgd._engine.dtypes import accumulation_dtype
from jgd._engine.trace import trace
from jgd._gradients import per_example_grad
from jgd._memory import checked_sizes
from jgd._methods.keys import ANY_KEY, KeyedLoss, keyed, takes_key, with_any_key, without_key
from jgd._reductions.linear import mean
from jgd._reductions.linear import sum as sum_

Named = Literal["reverse", "forward", "finite_difference"]
Derivative = Named | Callable[..., Any]
Total = Literal["mean", "sum"]  # how the losses of a batch make its objective

# The reduction that gives the gradient of the objective.
_OF_OBJECTIVE: dict[Total, Callable[..., Any]] = {"mean": mean, "sum": sum_}

# Coordinates differentiated at once: memory is so many times the objective's.
_COORDINATES_AT_ONCE = 32


class Evaluation(NamedTuple):
    """A batch's objective at one point: its value and gradient there, and the objective itself."""

    value: jax.Array
    gradient: Any
    aux: Any
    value_fn: Callable[[Any], jax.Array]  # the objective as a function of the parameters, for line searches


Evaluate = Callable[..., Evaluation]


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a batch, and says of what: `(params, *batch, weights=None, key=None)` to an `Evaluation`.

    Attributes:
        evaluate: the evaluation, by whatever plan.
        reference: the objective and the gradient as functions of `(params, *batch)` that no plan changes, nor the
            device: two methods of the same numbers trace to the same programs.
        takes_key: which of its functions take a key, in words; "" for none.
    """

    evaluate: Evaluate
    reference: dict[str, Callable[..., Any]]
    takes_key: str = ""

    def __call__(self, params: Any, *batch: Any, weights: Any = None, key: Any = None) -> Evaluation:
        """The evaluation of one batch.

        Raises:
            ValueError: there is a key and nothing that takes it, or the other way round.
        """
        if key is None and self.takes_key:
            raise ValueError(
                f"`key` is missing: {self.takes_key} takes one. Give another at each update, as "
                "`method.step(state, *batch, key=jax.random.fold_in(key, number))`; `jgd.fit` does so by itself"
            )
        if key is not None and not self.takes_key:
            raise ValueError(
                "`key` was given, but neither the loss nor `reduce` takes one: a loss does that is written "
                "`loss(params, *example, *, key)`, a reduction by a parameter `key`, both without a default"
            )
        return self.evaluate(params, *batch, weights=weights, key=key)


def evaluation_by(
    derivative: Derivative,
    loss: Loss,
    *,
    reduce: Any,
    total: Total,
    in_axes: Any,
    has_aux: bool,
    microbatch_size: int | None = None,
    max_memory: int | None = None,
    autotune: bool = False,
) -> Evaluator:
    """What evaluates a batch by the derivative chosen.

    Without a `reduce` the gradient is that of the objective: the mean of the examples' gradients, or their sum.

    Raises:
        ValueError: `total` is unknown; the derivative is unknown, or knows only the batch's gradient and was given a
            `reduce`, `autotune` or a limit of memory; a limit is out of range, or two are given.
        TypeError: `loss` or `reduce` is not callable.
    """
    if not callable(loss):
        raise TypeError(
            f"the loss must be a function `loss(params, *example)`, got {type(loss).__name__} {loss!r}"
        )
    if total not in get_args(Total):
        raise ValueError(
            f"`total` says how the losses of a batch make the objective, so it must be one of "
            f"{', '.join(map(repr, get_args(Total)))}, got {total!r}"
        )
    if reduce is not None and not callable(reduce):
        raise TypeError(f"`reduce` must be a function from per-example gradients to a pytree, got {reduce!r}")
    if not callable(derivative) and derivative not in get_args(Named):
        raise ValueError(
            f"`derivative` must be one of {', '.join(map(repr, get_args(Named)))} or a function like "
            f"`jax.value_and_grad(batch_loss)`, got {derivative!r}"
        )
    if derivative != "reverse" and reduce is not None:
        raise ValueError(
            f"`reduce` needs the gradient of each example, but `derivative`={derivative!r} knows only the "
            "batch's; leave `reduce` out and say what the objective is by `total`, or use derivative='reverse'"
        )
    checked_sizes(microbatch_size, max_memory)
    if derivative != "reverse" and (microbatch_size or max_memory or autotune):
        raise ValueError(
            "`microbatch_size`, `max_memory` and `autotune` belong to derivative='reverse', got "
            f"derivative={derivative!r}"
        )
    if callable(derivative):
        taken = "`derivative`" if takes_key(derivative) else ""
        return _explained(_by_callable(derivative, has_aux), without_key(derivative), taken)
    taken = "the loss" if takes_key(loss, by_name_only=True) else ""
    of_loss = KeyedLoss(loss, in_axes, has_aux)
    loss, in_axes = of_loss.loss, of_loss.in_axes
    objective = _objective(loss, in_axes, has_aux, total, of_loss)
    if derivative == "reverse":
        reduce = _OF_OBJECTIVE[total] if reduce is None else reduce
        taken = taken or ("`reduce`" if takes_key(reduce) else "")
        question = Reduced(without_key(reduce)) if autotune is True else autotune
        per_example = per_example_grad(
            loss, in_axes=in_axes, has_aux=has_aux,
            microbatch_size=microbatch_size, max_memory=max_memory, autotune=question,
        )  # fmt: skip
        plain = per_example_grad(loss, in_axes=in_axes, has_aux=has_aux, strategy="materialized")
        gradient = lambda params, *batch: without_key(reduce)(
            plain(params, *of_loss.batch(params, batch, ANY_KEY()))
        )
        return Evaluator(
            _by_reverse(per_example, objective, reduce, total, of_loss),
            {"loss": with_any_key(objective), "gradient": gradient},
            taken,
        )
    slopes = _forward if derivative == "forward" else _central_difference
    return _explained(_by_coordinates(objective, slopes), with_any_key(objective), taken)


def _explained(evaluate: Evaluate, objective: Callable[..., Any], taken: str) -> Evaluator:
    reference = lambda params, *batch: evaluate(params, *batch, key=ANY_KEY() if taken else None)[:2]
    return Evaluator(evaluate, {"loss": objective, "gradient": reference}, taken)


Objective = Callable[..., tuple[jax.Array, Any]]


def _objective(loss: Loss, in_axes: Any, has_aux: bool, total: Total, of_loss: KeyedLoss) -> Objective:
    """The objective of a batch: the mean of its losses, or their sum, and the examples' aux."""

    def objective(params: Any, *batch: Any, weights: Any = None, key: Any = None) -> tuple[jax.Array, Any]:
        batch = of_loss.batch(params, batch, key)
        call = bind(loss, (params, *batch), argnums=0, in_axes=in_axes, has_aux=has_aux)
        if call.size == 0 and total == "mean":
            raise ValueError(
                "the batch holds no examples: its mean loss is not defined. Their sum is: total='sum'"
            )
        program, constants = trace(call)
        values, aux = jax.vmap(functools.partial(program.run, call.param_leaves, constants))(
            call.batch_leaves
        )
        return _objective_value(_wide(values), weights, total), jax.tree.unflatten(program.aux_treedef, aux)

    return objective


def _objective_value(values: jax.Array, weights: jax.Array | None, total: Total) -> jax.Array:
    """The objective, from the losses of a batch."""
    if weights is None:
        return jnp.mean(values) if total == "mean" else jnp.sum(values)
    absent = (weights == 0) & ~jnp.isfinite(values)  # what is finite keeps its derivative by the weight
    weighted = jnp.sum(jnp.where(absent, 0, values) * weights)
    return weighted / jnp.sum(weights) if total == "mean" else weighted


def _by_reverse(
    per_example: Callable[..., Any], objective: Objective, reduce: Any, total: Total, of_loss: KeyedLoss
) -> Evaluate:
    def evaluate(params: Any, *batch: Any, weights: Any = None, key: Any = None) -> Evaluation:
        own, of_reduce = (None, None) if key is None else jax.random.split(key)
        grads = per_example(params, *of_loss.batch(params, batch, own))
        reduced = keyed(reduce, of_reduce)
        gradient = reduced(grads) if weights is None else _reduced(reduced, grads, weights)
        return Evaluation(
            _objective_value(_wide(grads.values), weights, total),
            gradient,
            grads.aux,
            lambda p: objective(p, *batch, weights=weights, key=own)[0],
        )

    return evaluate


def _reduced(reduce: Any, grads: Any, weights: jax.Array) -> Any:
    try:
        inspect.signature(reduce).bind(grads, weights=weights)
    except TypeError as error:
        raise TypeError(
            "some examples of this batch are absent, so `reduce` must take `weights`, as `jgd.mean`, `jgd.sum` and "
            f"`jgd.clipped_sum` do, with weight 0 for an absent example: `reduce(grads, weights=...)`; {error}"
        ) from error
    return reduce(grads, weights=weights)


def _by_callable(derivative: Callable[..., Any], has_aux: bool) -> Evaluate:
    def value_and_aux(params: Any, *batch: Any, key: Any) -> tuple[Any, Any, Any]:
        out = keyed(derivative, key)(params, *batch)
        if not _is_pair(out) or (has_aux and not _is_pair(out[0])):
            pair = "((value, aux), gradient)" if has_aux else "(value, gradient)"
            raise TypeError(
                f"`derivative` must return {pair} like `jax.value_and_grad`, got {jax.tree.structure(out)}"
            )
        value, aux = out[0] if has_aux else (out[0], None)
        if jnp.shape(value) != ():
            raise TypeError(f"`derivative` must return a scalar value, got one of shape {jnp.shape(value)}")
        return jnp.asarray(value), out[1], aux

    def evaluate(params: Any, *batch: Any, weights: Any = None, key: Any = None) -> Evaluation:
        if weights is not None:
            raise ValueError(
                "some examples of this batch are absent, and a `derivative` that is a function cannot be told "
                "which: use derivative='reverse', or batches without absent examples"
            )
        value, gradient, aux = value_and_aux(params, *batch, key=key)
        return Evaluation(_wide(value), gradient, aux, lambda p: _wide(value_and_aux(p, *batch, key=key)[0]))

    return evaluate


def _is_pair(x: Any) -> bool:
    return isinstance(x, tuple | list) and len(x) == 2


Slopes = Callable[[Callable[[Any], jax.Array], Any], Any]


def _by_coordinates(objective: Objective, slopes: Slopes) -> Evaluate:
    def evaluate(params: Any, *batch: Any, weights: Any = None, key: Any = None) -> Evaluation:
        own = None if key is None else jax.random.split(key)[0]  # as where `reduce` has the other

        def value_fn(params: Any) -> jax.Array:
            return objective(params, *batch, weights=weights, key=own)[0]

        value, aux = objective(params, *batch, weights=weights, key=own)
        return Evaluation(value, slopes(value_fn, params), aux, value_fn)

    return evaluate


def _forward(function: Callable[[Any], jax.Array], params: Any) -> Any:
    """One Jacobian-vector product for each parameter."""
    flat, unravel = ravel_pytree(params)

    def slope(k: jax.Array) -> jax.Array:
        direction = unravel(jnp.zeros_like(flat).at[k].set(1))
        return jax.jvp(function, (params,), (direction,))[1]

    return unravel(_each_coordinate(slope, flat))


def _central_difference(function: Callable[[Any], jax.Array], params: Any) -> Any:
    """(f(x + h) - f(x - h)) / 2h along each parameter, with h = ε^(1/3) max(1, |x|) for the parameter's ε.

    That h balances the error of the formula, h², against that of rounding, ε/h.
    """
    flat, unravel = ravel_pytree(params)
    widths, _ = ravel_pytree(
        jax.tree.map(lambda x: float(jnp.finfo(x.dtype).eps) ** (1 / 3) * jnp.maximum(1, jnp.abs(x)), params)
    )

    def slope(k: jax.Array) -> jax.Array:
        above, below = (unravel(flat.at[k].add(sign * widths[k])) for sign in (1, -1))
        # The points are rounded to the parameters' dtype, so the distance is measured and not taken as 2h.
        distance = ravel_pytree(above)[0][k] - ravel_pytree(below)[0][k]
        return (function(above) - function(below)) / distance

    return unravel(_each_coordinate(slope, flat))


def _each_coordinate(slope: Callable[[jax.Array], jax.Array], flat: jax.Array) -> jax.Array:
    slopes = jax.lax.map(slope, jnp.arange(flat.size), batch_size=_COORDINATES_AT_ONCE)
    return slopes.astype(flat.dtype)


def _wide(values: jax.Array) -> jax.Array:
    return values.astype(accumulation_dtype(values.dtype))
