"""What is measured: each quantity by `jgd`, and by what one would write without it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jgd
from jgd._bench.models import Model
from jgd._engine.plan import SECOND_PASS
from jgd._errors import require

MAX_NORM = 1.0
TUNED = ("norms", "clipped_sum")

Compute = Callable[..., Any]  # (params, *batch) -> the quantity


class Absent(Exception):
    """A method does not compute a quantity of a model; the message says why."""


QUANTITIES: dict[str, Callable[[Any], Any]] = {
    "sum": jgd.sum,
    "norms": jgd.norms,
    "clipped_sum": lambda grads: jgd.clipped_sum(grads, MAX_NORM, return_norms=True),
    "second_moment": jgd.second_moment,
    "variance": jgd.variance,
    "gram": jgd.gram,
    "noise_scale": lambda grads: tuple(jgd.noise_scale(grads)),
}
QUANTITIES["all"] = lambda grads: [
    reduction(grads) for name, reduction in QUANTITIES.items() if name != "all"
]


def plain(model: Model) -> Compute:
    """The baseline: the gradient of the summed loss, by `jax.grad`."""
    losses = jax.vmap(model.loss, model.axes)
    return jax.grad(lambda params, *batch: jnp.sum(losses(params, *batch)))


def by_jgd(model: Model, quantity: str, *, strategy: Any = "auto", autotune: bool = False) -> Compute:
    """The quantity by this library; told to `autotune`, by the plan that the clock finds quickest for it.

    Raises:
        Absent: a quantity that the table does not tune.
    """
    if autotune and quantity not in TUNED:
        raise Absent("tuning times half a minute of programs; the table tunes " + " and ".join(TUNED))
    question = QUANTITIES[quantity] if autotune else False
    gradients = jgd.per_example_grad(model.loss, in_axes=model.in_axes, strategy=strategy, autotune=question)
    return lambda params, *batch: QUANTITIES[quantity](gradients(params, *batch))


def by_second_pass(model: Model, quantity: str) -> Compute:
    """The clipped sum by this library, in two backward passes: what `max_memory` takes where factors are too large.

    Raises:
        Absent: it is another quantity.
    """
    if quantity != "clipped_sum":
        raise Absent("only a weighted sum has a second backward pass")
    return by_jgd(model, quantity, strategy=SECOND_PASS)


def by_vmap(model: Model, quantity: str) -> Compute:
    """The quantity as one writes it with `jax.vmap(jax.grad(loss))`; nothing here is this library's."""
    gradients = jax.vmap(jax.grad(model.loss), model.axes)
    return lambda params, *batch: _by_hand(quantity, gradients(params, *batch))


def by_microbatches(model: Model, quantity: str, *, size: int) -> Compute:
    """`vmap(grad)` on `size` examples at a time, added up by a scan.

    Raises:
        Absent: the quantity is none that microbatches add up to, or `size` does not divide the batch.
    """
    if quantity not in _OF_MICROBATCHES:
        raise Absent("all pairs of examples are needed at once")
    _check_divides(model, size)
    gradients = jax.vmap(jax.grad(model.loss), model.axes)
    mapped = [axis == 0 for axis in model.axes[1:]]

    def compute(params: Any, *batch: Any) -> Any:
        steps = [
            jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), x)
            for x, m in zip(batch, mapped, strict=True)
            if m
        ]

        def of_chunk(chunk: list[Any]) -> Any:
            rest = iter(chunk)
            return gradients(params, *(next(rest) if m else x for x, m in zip(batch, mapped, strict=True)))

        return _OF_MICROBATCHES[quantity](of_chunk, steps, jax.tree.map(jnp.zeros_like, params), model.size)

    return compute


def _added(of_chunk: Any, steps: Any, zeros: Any, parts: Callable[[Any], tuple[Any, Any]]) -> tuple[Any, Any]:
    """Adds up the first of what `parts` makes of each chunk's gradients, and strings together the second."""

    def step(total: Any, chunk: Any) -> tuple[Any, Any]:
        tree, each = parts(of_chunk(chunk))
        return jax.tree.map(jnp.add, total, tree), each

    total, each = jax.lax.scan(step, zeros, steps)
    return total, jax.tree.map(jnp.ravel, each)


def _variance_by_microbatches(of_chunk: Any, steps: Any, zeros: Any, total: int) -> Any:
    """Chan, Golub and LeVeque's update: the mean and the squared distances from it, chunk by chunk."""

    def step(seen: Any, chunk: Any) -> tuple[Any, None]:
        count, mean, squares = seen
        grads = of_chunk(chunk)
        size = jax.tree.leaves(grads)[0].shape[0]
        new = count + size
        own = jax.tree.map(lambda g: g.mean(0), grads)
        off = jax.tree.map(jnp.subtract, own, mean)
        within = jax.tree.map(lambda g, m: jnp.square(g - m).sum(0), grads, own)
        squares = jax.tree.map(lambda s, w, d: s + w + d * d * (count * size / new), squares, within, off)
        return (new, jax.tree.map(lambda m, d: m + d * (size / new), mean, off), squares), None

    (_, _, squares), _ = jax.lax.scan(step, (jnp.zeros(()), zeros, zeros), steps)
    return jax.tree.map(lambda s: s / (total - 1), squares)


def _noise_by_microbatches(of_chunk: Any, steps: Any, zeros: Any, total: int) -> Any:
    both = lambda grads: (_by_hand("sum", grads), jnp.square(_by_hand("norms", grads)))
    tree, squares = _added(of_chunk, steps, zeros, both)
    of_mean = sum(jnp.square(x / total).sum() for x in jax.tree.leaves(tree))
    trace = (squares.mean() - of_mean) * (total / (total - 1))
    signal = of_mean - trace / total
    return trace / signal, trace, signal


_OF_MICROBATCHES: dict[str, Callable[[Any, Any, Any, int], Any]] = {
    "sum": lambda of, steps, zeros, total: _added(of, steps, zeros, lambda g: (_by_hand("sum", g), ()))[0],
    "norms": lambda of, steps, zeros, total: _added(of, steps, (), lambda g: ((), _by_hand("norms", g)))[1],
    "clipped_sum": lambda of, steps, zeros, total: _added(
        of, steps, zeros, lambda g: _by_hand("clipped_sum", g)
    ),
    "second_moment": lambda of, steps, zeros, total: _added(
        of, steps, zeros, lambda g: (jax.tree.map(lambda x: jnp.square(x).sum(0) / total, g), ())
    )[0],
    "variance": _variance_by_microbatches,
    "noise_scale": _noise_by_microbatches,
}


def by_jax_privacy(model: Model, quantity: str, *, size: int | None = None) -> Compute:
    """The clipped sum with norms by `jax_privacy.clipping.clipped_grad`, whole or `size` examples at a time.

    Raises:
        Absent: it is another quantity, `size` does not divide the batch, or the library is not installed.
    """
    if quantity != "clipped_sum":
        raise Absent("the library has no such function")
    if size is not None:
        _check_divides(model, size)
    try:
        clipping = require("jax_privacy.clipping", "bench")
    except ImportError as error:
        raise Absent(str(error)) from error
    mapped = tuple(k for k, axis in enumerate(model.axes) if axis == 0)
    clipped = clipping.clipped_grad(
        model.loss, l2_clip_norm=MAX_NORM, batch_argnums=mapped, keep_batch_dim=False,
        return_grad_norms=True, microbatch_size=size,
    )  # fmt: skip

    def compute(params: Any, *batch: Any) -> Any:
        total, aux = clipped(params, *batch)
        return total, aux.grad_norms

    return compute


def _check_divides(model: Model, size: int) -> None:
    if model.size % size or model.size == size:
        raise Absent(f"{model.size} examples are not made of several microbatches of {size}")


METHODS: dict[str, Callable[[Model, str], Compute]] = {
    "jgd": by_jgd,
    "jgd autotuned": functools.partial(by_jgd, autotune=True),
    "jgd second pass": by_second_pass,
    "vmap(grad)": by_vmap,
    "microbatch 1": functools.partial(by_microbatches, size=1),
    "microbatch 4": functools.partial(by_microbatches, size=4),
    "jax_privacy": by_jax_privacy,
    "jax_privacy 1": functools.partial(by_jax_privacy, size=1),
    "jax_privacy 4": functools.partial(by_jax_privacy, size=4),
}


def _by_hand(quantity: str, grads: Any) -> Any:
    """A quantity of gradients that are held, by the formulas one finds in papers."""
    flat = [x.reshape(x.shape[0], -1) for x in jax.tree.leaves(grads)]
    size = flat[0].shape[0]
    if quantity == "sum":
        return jax.tree.map(lambda x: x.sum(0), grads)
    if quantity == "norms":
        return jax.vmap(optax.tree.norm)(grads)
    if quantity == "clipped_sum":
        norms = jax.vmap(optax.tree.norm)(grads)
        scale = jnp.minimum(1, MAX_NORM / norms)
        return jax.tree.map(lambda x: jnp.tensordot(scale, x, 1), grads), norms
    if quantity == "second_moment":
        return jax.tree.map(lambda x: jnp.square(x).mean(0), grads)
    if quantity == "variance":
        return jax.tree.map(lambda x: jnp.var(x, axis=0, ddof=1), grads)
    if quantity == "gram":
        return functools.reduce(jnp.add, [x @ x.T for x in flat])
    if quantity == "noise_scale":
        trace = sum(jnp.var(x, axis=0, ddof=1).sum() for x in flat)
        signal = sum(jnp.square(x.mean(0)).sum() for x in flat) - trace / size
        return trace / signal, trace, signal
    return [_by_hand(name, grads) for name in QUANTITIES if name != "all"]
