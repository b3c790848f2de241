"""Custom derivatives: not the derivative, not linear in the cotangent, or asking what is perturbed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero


@jax.custom_jvp
def bent(x, y):
    return jnp.sin(x) * y


@bent.defjvp
def _bent_jvp(primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    return bent(x, y), 2.0 * jnp.cos(x) * y * dx + jnp.sin(x) * dy  # not the derivative, on purpose


def backward(change: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    """The identity, with `change(value, cotangent)` for its derivative."""
    fun = jax.custom_vjp(lambda z: z)
    fun.defvjp(lambda z: (z, z), lambda z, g: (change(z, g),))
    return fun


NONLINEAR: dict[str, Callable[[Any], Any]] = {
    "clip backward": backward(lambda z, g: jnp.clip(g, -0.1, 0.1)),
    "reverse backward": backward(lambda z, g: -0.7 * g),
    "round backward": backward(lambda z, g: jnp.round(8 * g) / 8),
    "shorten backward": backward(lambda z, g: g / (1 + jnp.sqrt(jnp.sum(g * g) + 0.01))),
    "square backward": backward(lambda z, g: g * jnp.abs(g)),
    "gate backward": backward(lambda z, g: jnp.where(z > 0, g, 0.1 * g)),
    "round straight through": lambda z: z + jax.lax.stop_gradient(jnp.round(4 * z) / 4 - z),
}


def backward_of_two() -> Callable[[Any, Any], Any]:
    fun = jax.custom_vjp(lambda x, w: x * w)
    fun.defvjp(
        lambda x, w: (x * w, (x, w)), lambda of, g: (jnp.clip(g * of[1], -0.2, 0.2), jnp.tanh(g * of[0]))
    )
    return fun


NONLINEAR_OF_TWO: dict[str, Callable[[Any, Any], Any]] = {"clip backward x w": backward_of_two()}


def _zero(t: Any) -> bool:
    return isinstance(t, SymbolicZero)


@jax.custom_jvp
def asks_jvp(x, w):
    return jnp.sin(x) * w


def _asks_jvp(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    out = jnp.sin(x) * w
    if _zero(dx) and _zero(dw):
        return out, jnp.zeros_like(out)
    if _zero(dw):
        return out, 2.0 * jnp.cos(x) * w * dx
    if _zero(dx):
        return out, 3.0 * jnp.sin(x) * dw
    return out, jnp.cos(x) * w * dx + 0.5 * jnp.sin(x) * dw


asks_jvp.defjvp(_asks_jvp, symbolic_zeros=True)


@jax.custom_jvp
def stops_jvp(x):
    return jnp.tanh(x)


def _stops_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    out = jnp.tanh(x)
    return out, jnp.zeros_like(out) if _zero(dx) else 0.5 * dx


stops_jvp.defjvp(_stops_jvp, symbolic_zeros=True)

asks_vjp = jax.custom_vjp(lambda x, w: x * jnp.tanh(w))


def _asks_forward(x, w):
    how = 1.0 + 2.0 * x.perturbed + 4.0 * w.perturbed
    return x.value * jnp.tanh(w.value), (x.value, w.value, jnp.asarray(how))


def _asks_backward(kept, g):
    x, w, how = kept
    if _zero(g):
        g = jnp.zeros(g.shape, g.dtype)
    return how * g * jnp.tanh(w), g * x / how


asks_vjp.defvjp(_asks_forward, _asks_backward, symbolic_zeros=True)

# By name: the function, and how many arrays it takes.
ASKING: dict[str, tuple[Callable[..., Any], int]] = {
    "asking jvp": (asks_jvp, 2),
    "asking vjp": (asks_vjp, 2),
    "stopping jvp": (stops_jvp, 1),
    "asking jvp of one": (lambda x: asks_jvp(x, jnp.full(x.shape, 0.8)), 1),
    "asking vjp of one": (lambda x: asks_vjp(x, x), 1),
}


def _primal_vjp() -> Callable[[Any], Any]:
    fun = jax.custom_vjp(lambda z: z)
    fun.defvjp(lambda z: (1.5 * z, z), lambda z, g: (g * jnp.cos(z),))
    return fun


@jax.custom_jvp
def primal_jvp(z):
    return z


@primal_jvp.defjvp
def _primal_jvp(primals, tangents):
    return 0.5 * primals[0], tangents[0] * jnp.cos(primals[0])


# Whose value is another one where it is differentiated.
PRIMAL: dict[str, Callable[[Any], Any]] = {"other value vjp": _primal_vjp(), "other value jvp": primal_jvp}
