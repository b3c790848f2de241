"""`descent`, `ascent` and `descent_ascent`: the same step, pointed down, up, or both ways."""

from collections.abc import Callable
from typing import Any

import optax

from jgd._engine.calls import Loss
from jgd._methods.derivatives import Derivative, Total, evaluation_by
from jgd._methods.method import Method
from jgd._methods.optimizers import ascending, checked, simultaneous


def descent(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    reduce: Callable[..., Any] | None = None,
    total: Total = "mean",
    derivative: Derivative = "reverse",
    in_axes: Any = None,
    has_aux: bool = False,
    microbatch_size: int | None = None,
    max_memory: int | None = None,
    autotune: bool = False,
) -> Method:
    """A method that minimises the mean of `loss` over the examples, or the sum of it.

    Args:
        loss: `loss(params, *example)`, a scalar for ONE example, or `(scalar, aux)` with `has_aux`. Written
            `loss(params, *example, *, key)`, it is given a PRNG key by that name, another for each example at each
            update: for dropout, noise, samples.
        optimizer: any optax transformation. It is passed what it takes of `value`, `grad`, `value_fn` (the objective of
            the batch as a function of the parameters; also as `obj_fn`) and `grad_fn` (the gradient there, as `reduce`
            makes it), as `optax.lbfgs`, `reduce_on_plateau`, `optax.contrib.sophia` and `sam` need.
        reduce: from the per-example gradients to a pytree like the parameters, for instance
            `functools.partial(jgd.clipped_sum, max_norm=1.0)`, or your own. By default the gradient is that of
            the objective: `jgd.mean` for `total="mean"`, `jgd.sum` for `total="sum"`. One that has a parameter `key`,
            `reduce(grads, *, key)`, is given another PRNG key at each update, as the noise of a private gradient needs:
            a key that it holds itself would draw the same noise at every update.
        total: how the losses of a batch make the objective, `"mean"` or `"sum"`. It decides `info.value`, and the
            `value` and `value_fn` that the optimizer is passed, whatever `reduce` is. A line search compares the
            slope along the gradient with differences of `value_fn`, so it needs both on one scale: with a `reduce`
            that sums, as `jgd.clipped_sum` does, say `total="sum"`, or the slope it expects is B times too steep.
        derivative: how the gradient is computed.
            `"reverse"`: back-propagation, one forward and one backward pass.
            `"forward"`: a Jacobian-vector product for each parameter, so P forward passes.
            `"finite_difference"`: central differences, so 2P forward passes, and some error: about ε^(2/3).
            A function like `jax.value_and_grad(batch_loss)`: from `(params, *batch)` to `(value, gradient)`,
            or to `((value, aux), gradient)` with `has_aux`. It is the objective and is used as it is: with
            `total="sum"` it must be that of the sum.
            All but the first know only the gradient of the batch, and take no `reduce`.
        in_axes: as in `jax.vmap`, one entry for each argument of the loss; None marks a shared argument.
        has_aux: whether the loss returns a pair.
        microbatch_size: as in `jgd.per_example_grad`: so many examples at a time, for the memory of as many. The
            value of the objective then takes one more forward pass.
        max_memory: as in `jgd.per_example_grad`: the largest microbatch that stays within so many bytes.
        autotune: as in `jgd.per_example_grad`: the quickest of the few best plans, by the clock; what is timed is
            `reduce`, with the losses.

    Returns:
        A method: `method.init(params)` gives a state, `method.step(state, *batch)` the next one.

    Raises:
        TypeError: `optimizer` is not an optax transformation.
        ValueError: `derivative` or `total` is unknown, or `reduce` was given with a derivative that knows only the
            batch.

    Example:
        >>> import jax.numpy as jnp, jgd, optax
        >>> method = jgd.descent(lambda w, x, y: 0.5 * (x * w - y) ** 2, optax.sgd(0.5))
        >>> state = method.init(jnp.array(0.0))
        >>> state, info = method.step(state, jnp.array([1.0, 1.0]), jnp.array([1.0, 3.0]))
        >>> state.params, info.value, info.grad_norm
        (Array(1., dtype=float32), Array(2.5, dtype=float32), Array(2., dtype=float32))
    """
    evaluate = evaluation_by(
        derivative, loss, reduce=reduce, total=total, in_axes=in_axes, has_aux=has_aux,
        microbatch_size=microbatch_size, max_memory=max_memory, autotune=autotune,
    )  # fmt: skip
    return Method(evaluate, checked(optimizer, "optimizer"), in_axes)


def ascent(
    objective: Loss,
    optimizer: optax.GradientTransformation,
    *,
    reduce: Callable[..., Any] | None = None,
    total: Total = "mean",
    derivative: Derivative = "reverse",
    in_axes: Any = None,
    has_aux: bool = False,
    microbatch_size: int | None = None,
    max_memory: int | None = None,
    autotune: bool = False,
) -> Method:
    """A method that maximises the mean of `objective` over the examples, or the sum of it.

    It walks the path of descent on the objective's negative: the gradient is negated *before* the optimizer,
    so that weight decay still pulls towards zero. `info.value` is the objective, not its negative.

    Args:
        objective: `objective(params, *example)`, as the loss of `jgd.descent`.
        optimizer: any optax transformation, as for minimising; it sees negated gradients and values.
        reduce: as in `jgd.descent`, and so is `total`.
        total: `"mean"` or `"sum"`.
        derivative: as in `jgd.descent`; a function gives the value and gradient of the objective itself.
        in_axes: as in `jgd.descent`.
        has_aux: as in `jgd.descent`.
        microbatch_size: as in `jgd.descent`, and so is `max_memory`.
        max_memory: a number of bytes.
        autotune: as in `jgd.descent`.

    Returns:
        A method, as `jgd.descent` does.

    Raises:
        TypeError: `optimizer` is not an optax transformation.
        ValueError: `derivative` or `total` is unknown, or `reduce` was given with a derivative that knows only the
            batch.
    """
    evaluate = evaluation_by(
        derivative, objective, reduce=reduce, total=total, in_axes=in_axes, has_aux=has_aux,
        microbatch_size=microbatch_size, max_memory=max_memory, autotune=autotune,
    )  # fmt: skip
    return Method(evaluate, ascending(checked(optimizer, "optimizer")), in_axes, "ascent")


def descent_ascent(
    objective: Loss,
    min_optimizer: optax.GradientTransformation,
    max_optimizer: optax.GradientTransformation,
    *,
    reduce: Callable[..., Any] | None = None,
    total: Total = "mean",
    derivative: Derivative = "reverse",
    in_axes: Any = None,
    has_aux: bool = False,
    microbatch_size: int | None = None,
    max_memory: int | None = None,
    autotune: bool = False,
) -> Method:
    """A method for min over x, max over y of the mean, or the sum, of `objective((x, y), *example)`.

    Both halves step at once, from one gradient. With plain steps that circles outwards on a bilinear game;
    `optax.optimistic_gradient_descent` for both finds the saddle.

    Args:
        objective: `objective((x, y), *example)`, a scalar for ONE example; x and y are any pytrees.
        min_optimizer: the optimizer of x. Its `value_fn` is the objective with y held.
        max_optimizer: the optimizer of y; it sees negated gradients and values, as in `jgd.ascent`.
        reduce: as in `jgd.descent`, and so is `total`.
        total: `"mean"` or `"sum"`.
        derivative: as in `jgd.descent`.
        in_axes: as in `jgd.descent`.
        has_aux: as in `jgd.descent`.
        microbatch_size: as in `jgd.descent`, and so is `max_memory`.
        max_memory: a number of bytes.
        autotune: as in `jgd.descent`.

    Returns:
        A method whose parameters are the pair `(x, y)`.

    Raises:
        TypeError: an optimizer is not an optax transformation.
        ValueError: `derivative` or `total` is unknown, or `reduce` was given with a derivative that knows only the
            batch; at `init`, the parameters are not a pair.

    Source: Mokhtari et al., "A unified analysis of extra-gradient and optimistic gradient methods", 2020.
    """
    evaluate = evaluation_by(
        derivative, objective, reduce=reduce, total=total, in_axes=in_axes, has_aux=has_aux,
        microbatch_size=microbatch_size, max_memory=max_memory, autotune=autotune,
    )  # fmt: skip
    minimiser, maximiser = checked(min_optimizer, "min_optimizer"), checked(max_optimizer, "max_optimizer")
    return Method(evaluate, simultaneous(minimiser, ascending(maximiser)), in_axes, "descent_ascent")
