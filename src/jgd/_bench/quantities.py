"""What is measured: each quantity by `jgd`, and by what one would write without it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jgd
from jgd._bench.models import Model
from jgd._errors import require

MAX_NORM = 1.0

Compute = Callable[..., Any]  # (params, *batch) -> the quantity

QUANTITIES: dict[str, Callable[[Any], Any]] = {
    "sum": jgd.sum,
    "norms": jgd.norms,
    "clipped_sum": lambda grads: (jgd.clipped_sum(grads, MAX_NORM), jgd.norms(grads)),
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


def by_jgd(model: Model, quantity: str, *, strategy: Any = "auto") -> Compute:
    """The quantity by this library."""
    gradients = jgd.per_example_grad(model.loss, in_axes=model.in_axes, strategy=strategy)
    return lambda params, *batch: QUANTITIES[quantity](gradients(params, *batch))


def by_vmap(model: Model, quantity: str) -> Compute:
    """The quantity as one writes it with `jax.vmap(jax.grad(loss))`; nothing here is this library's."""
    gradients = jax.vmap(jax.grad(model.loss), model.axes)
    return lambda params, *batch: _by_hand(quantity, gradients(params, *batch))


def by_microbatches(model: Model, quantity: str, *, size: int) -> Compute | None:
    """`vmap(grad)` on `size` examples at a time, added up by a scan; None where that is not the quantity."""
    if quantity not in ("sum", "norms", "clipped_sum"):
        return None
    gradients = jax.vmap(jax.grad(model.loss), model.axes)

    def compute(params: Any, *batch: Any) -> Any:
        mapped = [axis == 0 for axis in model.axes[1:]]
        steps = [
            jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), x)
            for x, m in zip(batch, mapped, strict=True)
            if m
        ]

        def step(total: Any, chunk: list[Any]) -> tuple[Any, Any]:
            rest = iter(chunk)
            args = [next(rest) if m else x for x, m in zip(batch, mapped, strict=True)]
            part = _by_hand(quantity, gradients(params, *args))
            if quantity == "norms":
                return total, part
            tree, norms = part if quantity == "clipped_sum" else (part, ())
            return jax.tree.map(jnp.add, total, tree), norms

        zeros = () if quantity == "norms" else jax.tree.map(jnp.zeros_like, params)
        total, norms = jax.lax.scan(step, zeros, steps)
        norms = jax.tree.map(jnp.ravel, norms)
        return {"sum": total, "norms": norms, "clipped_sum": (total, norms)}[quantity]

    return compute


def by_jax_privacy(model: Model, quantity: str) -> Compute | None:
    """The clipped sum with norms by `jax_privacy.clipping.clipped_grad`; None for another quantity."""
    if quantity != "clipped_sum":
        return None
    clipping = require("jax_privacy.clipping", "bench")
    mapped = tuple(k for k, axis in enumerate(model.axes) if axis == 0)
    clipped = clipping.clipped_grad(
        model.loss, l2_clip_norm=MAX_NORM, batch_argnums=mapped, keep_batch_dim=False, return_grad_norms=True
    )

    def compute(params: Any, *batch: Any) -> Any:
        total, aux = clipped(params, *batch)
        return total, aux.grad_norms

    return compute


METHODS: dict[str, Callable[[Model, str], Compute | None]] = {
    "jgd": by_jgd,
    "vmap(grad)": by_vmap,
    "microbatch 1": functools.partial(by_microbatches, size=1),
    "jax_privacy": by_jax_privacy,
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
