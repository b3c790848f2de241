"""`fit`: a method, parameters and data in; trained parameters and the history out."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.tree_util import tree_flatten_with_path

from jgd._engine.calls import check_alive
from jgd._errors import describe, is_concrete
from jgd._fit.checkpoint import Checkpoint, checkpoint_of
from jgd._fit.checkpointer import Checkpointer
from jgd._fit.crawling import crawls_in_a_loop
from jgd._fit.data import is_batches
from jgd._fit.dispatcher import Dispatcher
from jgd._fit.epochs import run_epochs
from jgd._fit.history import History, no_history
from jgd._fit.identity import Identity, key_identity, optimizer_identity, start_identity
from jgd._fit.placement import mesh_of, on_mesh
from jgd._fit.processes import lost_processes_named
from jgd._fit.progress import bar
from jgd._fit.run_state import RunState
from jgd._fit.schedule import Length, length_of
from jgd._fit.source import Arrays, Source, source_of
from jgd._fit.stepwise import run_steps
from jgd._mesh import check_one_place
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
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
) -> FitResult:
    """Trains parameters by a method, one update for each batch of examples.

    Every example is seen once an epoch, the smaller batch at its end included, in an order drawn from `key`;
    the same call with the same key gives the same bits. Over arrays, epochs are compiled scans that update
    the state in place, and pure JAX: `jax.vmap` over keys or parameters trains many runs as one program.

    Args:
        method: from `jgd.descent`, `jgd.ascent` or `jgd.descent_ascent`.
        params: the parameters to start from, left intact; or a `MethodState` to go on from.
        data: a pytree of arrays with a common axis of examples: a tuple holds the arguments of the loss after
            the parameters, anything else is the only one; an argument with None in the method's `in_axes`
            goes to every step whole. Or an iterable of batches of that kind: a list, a generator, a data
            loader. A batch is copied when it is drawn, and no more are drawn than are used; the step is compiled
            once for each shape of batch. docs/scaling.md says what a loader must do.
        batch_size: 1 updates after every example (stochastic), k after every k (mini-batch), None after all
            of them (full batch, in their own order). None for an iterable, whose batches are made.
        epochs: how often to walk the data; or
        steps: how many updates to make; the last epoch may end early.
        key: a PRNG key for the order of the examples and, where the loss or `reduce` takes a key, for one of its own
            at each update. To go on from a state, give another one.
        inner_steps: updates made from each batch, in a row, before the next.
        callback: called with `(state, info)` after every update; it ends the training by returning True, and by
            nothing else. Where `fit` filled a batch up, `info.aux` has the rows of its examples alone.
        progress: whether to show a bar with an estimate of the time left (extra `demo`).
        check_finite: whether to stop at a value, gradient or parameter that is not finite. Arrays are checked
            after every epoch, iterables and watched runs after every update. The mean over a batch without
            examples is nan, and stops nothing.
        checkpoint: a folder to keep the run in (extra `checkpoint`), or a `jgd.Checkpoint`, which says how often.
            After a run has died, by whatever, the same call goes on from the newest checkpoint that is whole,
            to the same bits; with more `epochs` or `steps`, from the end of a run that is done. That one cannot be
            written is a RuntimeWarning, and the training goes on.

    Returns:
        `FitResult(params, state, history)`.

    Raises:
        ValueError: `batch_size` is below 1 or above the number of examples, or given for an iterable; neither
            or both of `epochs` and `steps`; the data are empty, disagree in length or structure, or ran out;
            `checkpoint` holds another run, or one that is longer already, or a loader gives other batches than
            the run was trained on.
        TypeError: a count is not an int, a leaf of the data no array, or a loader's state cannot be kept.
        OSError: `checkpoint` cannot be written to.
        BlockingIOError: another run is at work in `checkpoint`.
        RuntimeError: another process of this run has died.
        FloatingPointError: with `check_finite`; its `.state` is the last finite one kept, `.history` all that
            led there.

    Example:
        >>> import jax, jax.numpy as jnp, jgd, optax
        >>> x = jnp.linspace(-1, 1, 64)
        >>> method = jgd.descent(lambda w, x, y: 0.5 * (x * w - y) ** 2, optax.sgd(0.5))
        >>> key = jax.random.key(0)
        >>> result = jgd.fit(method, jnp.array(0.0), (x, 3 * x), batch_size=8, epochs=20, key=key)
        >>> round(float(result.params), 3), result.history.value.shape
        (3.0, (160,))

    Cost: one dispatch for all epochs, or with `progress` or `checkpoint` one for each tenth of a second. With
    `callback`, for an iterable, and on a CPU for a loss with convolutions, which crawl in XLA's loops there, one for
    each update, about 0.1 ms.
    """
    if not isinstance(method, Method):
        raise TypeError(f"`method` must come from `jgd.descent` or its kin, got {type(method).__name__}")
    _check_key(key)
    length = length_of(epochs, steps, inner_steps)
    arrays = {"params": params} if is_batches(data) else {"params": params, "data": data}
    for argument, tree in arrays.items():
        check_alive(tree, argument)
    mesh = mesh_of(params, arrays.get("data", ()))
    check_one_place(
        [(name, *leaf) for name, tree in arrays.items() for leaf in tree_flatten_with_path(tree)[0]]
    )
    state = _own(method, params, mesh)
    source = source_of(data, params, method.in_axes, batch_size=batch_size, length=length, key=key, mesh=mesh)
    watches = {
        "callback": callback is not None,
        "progress": progress,
        "check_finite": check_finite,
        "checkpoint": checkpoint is not None,
    }
    _check_watchable((state, source.examples if isinstance(source, Arrays) else (), key), watches)

    with lost_processes_named(), ExitStack() as stack:
        keeper, start = None, RunState(state, no_history)
        if checkpoint is not None:
            plan = checkpoint_of(checkpoint)
            keeper = stack.enter_context(
                Checkpointer(plan, _identity(method, state, key, source, length), length.inner_steps)
            )
            start = keeper.restore(state) or start
            _check_not_past(start, source, length)
        report = stack.enter_context(bar(source.updates)) if progress else None
        feed = source.feed(start, keep_position=keeper is not None)
        stack.callback(feed.close)
        if keeper and (like := feed.like()) is not None:
            keeper.check_batches(method, state.params, like)
        in_loops = isinstance(source, Arrays) and callback is None and not start.repeats
        if in_loops and is_concrete(state.step):
            in_loops = not crawls_in_a_loop(method, state, feed.like(), key)
        if isinstance(source, Arrays) and in_loops:
            chunks = Dispatcher(keeper, report, length.inner_steps) if keeper or report else None
            trained, history = run_epochs(
                method, start, source.examples, key, source.schedule, check_finite=check_finite, chunks=chunks
            )
        else:
            trained, history = run_steps(
                method, start, feed, key, inner_steps=length.inner_steps, check_finite=check_finite, callback=callback,
                report=report, keeper=keeper,
            )  # fmt: skip
        result = FitResult(trained.params, trained, history)
        # The device may still read the data where the host holds them, and the host may write there next.
        jax.block_until_ready([x for x in jax.tree.leaves(result) if is_concrete(x)])
    return result


def _check_key(key: Any) -> None:
    """Raises TypeError for what is not one PRNG key, new-style or old."""
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if (typed and key.shape == ()) or (dtype == jnp.uint32 and len(key.shape) == 1):
        return
    raise TypeError(f"`key` must be one PRNG key, as `jax.random.key(0)` is, got {describe(key)}")


def _own(method: Method, params: Any, mesh: Mesh | None) -> MethodState:
    """A state that nobody else holds and whose leaves are all apart, so that it can be updated in place."""
    state = on_mesh(params if isinstance(params, MethodState) else method.init(params), mesh)
    return jax.tree.map(lambda x: jnp.array(x, copy=True), state)


def _check_watchable(arrays: Any, watches: dict[str, bool]) -> None:
    if all(is_concrete(x) for x in jax.tree.leaves(arrays)):
        return
    for argument in (name for name, wanted in watches.items() if wanted):
        raise ValueError(
            f"`{argument}` needs values to look at, and inside `jax.jit` or `jax.vmap` there are none: leave "
            "it out there and look at `result.history`"
        )


def _identity(method: Method, state: MethodState, key: jax.Array, source: Source, length: Length) -> Identity:
    """What makes a run the run that it is, as far as that is known before its first batch."""
    return {
        "method": method.kind,
        "key": key_identity(key),
        **source.identity,
        "inner_steps": length.inner_steps,
        "in_axes": repr(method.in_axes),
        "optimizer": optimizer_identity(method, state),
        "start": start_identity(state),
    }


def _check_not_past(start: RunState, source: Source, length: Length) -> None:
    if source.is_past(start):
        asked = f"`epochs`={length.epochs}" if length.steps is None else f"`steps`={length.steps}"
        made = start.batches * length.inner_steps + start.repeats
        raise ValueError(
            f"`checkpoint`: the run has made {made} updates already, more than {asked} asks for; ask for as "
            "many or more, or give another folder"
        )
