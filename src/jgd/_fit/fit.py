"""`fit`: a method, parameters and data in; trained parameters and the history out."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jgd._errors import is_concrete
from jgd._fit import epochs as compiled
from jgd._fit.data import Examples, examples_of, is_batches
from jgd._fit.epochs import History
from jgd._fit.progress import bar
from jgd._fit.schedule import Length, Pass, length_of, passes_of
from jgd._fit.stepwise import NonFiniteError, batches_of_examples, batches_of_iterable, run_steps
from jgd._methods.method import Method, MethodState, StepInfo


class FitResult(NamedTuple):
    """What training led to.

    Attributes:
        params: the trained parameters.
        state: the method's state, from which `method.step` or another `fit` can go on.
        history: `history.value` and `history.grad_norm`, `(updates,)` each.
    """

    params: Any
    state: MethodState
    history: History


def fit(
    method: Method,
    params: Any,
    data: Any,
    *,
    batch_size: int | None,
    epochs: int | None = None,
    steps: int | None = None,
    key: jax.Array,
    inner_steps: int = 1,
    callback: Callable[[MethodState, StepInfo], Any] | None = None,
    progress: bool = False,
    check_finite: bool = False,
) -> FitResult:
    """Trains parameters by a method, one update for each batch of examples.

    Every example is seen once an epoch, the smaller batch at its end included, in an order drawn from `key`; the
    same call with the same key gives the same bits. Over arrays, epochs are compiled scans that update the state in
    place, and all of pure JAX: `jax.vmap` over keys or parameters trains many runs as one program.

    Args:
        method: from `jgd.descent`, `jgd.ascent` or `jgd.descent_ascent`.
        params: the parameters to start from, left intact; or a `MethodState` to go on from.
        data: a pytree of arrays with a common axis of examples: a tuple holds the arguments of the loss after the
            parameters, anything else is its only one; arguments with None in the method's `in_axes` go to every
            step whole. Or an iterable of batches of that kind (a list, a generator, a data loader), each compiled
            once for its shapes.
        batch_size: 1 updates after every example (stochastic), k after every k (mini-batch), None after all of
            them (full batch, in their own order). None for an iterable, whose batches are made.
        epochs: how often to walk the data; or
        steps: how many updates to make; the last epoch may end early.
        key: a PRNG key for the order of the examples. To go on from a state, give another one.
        inner_steps: updates made from each batch, in a row, before the next.
        callback: called with `(state, info)` after every update; it ends the training by returning True.
        progress: whether to show a bar with an estimate of the time left (extra `demo`).
        check_finite: whether to stop at a value or gradient that is not finite; looked for after every epoch of
            arrays, after every update otherwise.

    Returns:
        `FitResult(params, state, history)`.

    Raises:
        ValueError: `batch_size` is below 1 or above the number of examples, or given for an iterable; neither or
            both of `epochs` and `steps`; the data are empty, disagree in length, or ran out.
        FloatingPointError: with `check_finite`; its `.state` is the last good state, `.history` the way there.

    Example:
        >>> import jax, jax.numpy as jnp, jgd, optax
        >>> x = jnp.linspace(-1, 1, 64)
        >>> method = jgd.descent(lambda w, x, y: 0.5 * (x * w - y) ** 2, optax.sgd(0.5))
        >>> result = jgd.fit(method, jnp.array(0.0), (x, 3 * x), batch_size=8, epochs=20, key=jax.random.key(0))
        >>> round(float(result.params), 3), result.history.value.shape
        (3.0, (160,))

    Cost: with `callback` or `progress`, or for an iterable, one dispatch for each update, about 0.1 ms; without,
    one for all epochs.
    """
    if not isinstance(method, Method):
        raise TypeError(f"`method` must come from `jgd.descent` or its kin, got {type(method).__name__}")
    length = length_of(epochs, steps, inner_steps)
    state = _own(method, params)
    watchers = [] if callback is None else [callback]

    if is_batches(data):
        _check_batches(data, batch_size, length)
        total = _updates_of_iterable(data, length)
        _check_watchable(state, key, callback, progress, check_finite)
        return _step_by_step(
            method, state, batches_of_iterable(data, length), length, watchers, total, progress, check_finite
        )
    examples = examples_of(data, method.in_axes)
    epoch, whole_epochs, last = passes_of(length, examples.size, batch_size)
    _check_watchable((state, examples), key, callback, progress, check_finite)
    if not watchers and not progress:
        return _by_epochs(method, state, examples, key, epoch, whole_epochs, last, check_finite)
    batches = batches_of_examples(examples, key, epoch, whole_epochs, last)
    total = whole_epochs * epoch.updates + (last.updates if last else 0)
    return _step_by_step(method, state, batches, length, watchers, total, progress, check_finite)


def _by_epochs(
    method: Method,
    state: MethodState,
    examples: Examples,
    key: jax.Array,
    epoch: Pass,
    epochs: int,
    last: Pass | None,
    check_finite: bool,
) -> FitResult:
    # A check needs the host between epochs and the state before each; otherwise all whole epochs are one call.
    numbers = [np.arange(k, k + 1) for k in range(epochs)] if check_finite else [np.arange(epochs)]
    calls = [(epoch, n) for n in numbers] + ([(last, np.arange(epochs, epochs + 1))] if last else [])
    # Under `vmap` a state that is the same for all runs has no room for the states that it becomes.
    in_place = not check_finite and _all_concrete((state, examples, key))
    parts = []
    for one, chunk in calls:
        if len(chunk) == 0:
            continue
        run = compiled.run_in_place if in_place else compiled.run
        before, (state, history) = state, run(method, one, state, examples, key, chunk)
        parts.append(history)
        if check_finite:
            _check_history(before, parts)
    return FitResult(state.params, state, _joined(parts))


def _step_by_step(
    method: Method,
    state: MethodState,
    batches: Iterable[tuple[Any, ...]],
    length: Length,
    watchers: list[Callable[[MethodState, StepInfo], Any]],
    total: int | None,
    progress: bool,
    check_finite: bool,
) -> FitResult:
    with ExitStack() as stack:
        if progress:
            advance = stack.enter_context(bar(total))
            watchers = [lambda _, info: advance(info), *watchers]
        state, history = run_steps(
            method,
            state,
            batches,
            inner_steps=length.inner_steps,
            check_finite=check_finite,
            watchers=watchers,
        )
    return FitResult(state.params, state, history)


def _own(method: Method, params: Any) -> MethodState:
    """A state that nobody else holds and whose leaves are all apart, so that it can be updated in place."""
    state = params if isinstance(params, MethodState) else method.init(params)
    return jax.tree.map(lambda x: jnp.array(x, copy=True), state)


def _check_batches(data: Any, batch_size: Any, length: Length) -> None:
    if batch_size is not None:
        raise ValueError(
            f"`batch_size`={batch_size!r} was given, but `data` is an iterable ({type(data).__name__}) whose batches "
            "are already made: give None; or give the examples as arrays, several arguments as a tuple"
        )
    if iter(data) is data and length.epochs is not None and length.epochs > 1:
        raise ValueError(
            f"`data` is an iterator, which can be walked only once, but `epochs` is {length.epochs}: give what starts "
            "anew each time, such as a list or a data loader, or say `steps`"
        )


def _updates_of_iterable(data: Any, length: Length) -> int | None:
    if length.epochs is None:
        return length.steps
    return len(data) * length.epochs * length.inner_steps if hasattr(data, "__len__") else None


def _check_watchable(arrays: Any, key: Any, callback: Any, progress: bool, check_finite: bool) -> None:
    if _all_concrete((arrays, key)):
        return
    asked = {"callback": callback is not None, "progress": progress, "check_finite": check_finite}
    for argument in (name for name, wanted in asked.items() if wanted):
        raise ValueError(
            f"`{argument}` needs values to look at, and inside `jax.jit` or `jax.vmap` there are none: leave it out "
            "there and look at `result.history`"
        )


def _all_concrete(tree: Any) -> bool:
    return all(is_concrete(x) for x in jax.tree.leaves(tree))


def _check_history(before: MethodState, parts: list[History]) -> None:
    finite = np.isfinite(parts[-1].value) & np.isfinite(parts[-1].grad_norm)
    if not finite.all():
        good = sum(part.value.shape[0] for part in parts[:-1]) + int(np.argmin(finite))
        history = jax.tree.map(lambda x: x[: good + 1], _joined(parts))
        raise NonFiniteError(before, history)


def _joined(parts: list[History]) -> History:
    if not parts:
        return History(jnp.zeros(0), jnp.zeros(0))
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts) if len(parts) > 1 else parts[0]
