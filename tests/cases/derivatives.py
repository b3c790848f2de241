"""Checkpoints, derivatives that the user wrote, derivatives inside the loss."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from cases import B, case
from cases.dense import mlp, mlp_params, squared


@case
def checkpoint(draw):
    loss = lambda p, x, y: squared(jax.checkpoint(mlp)(p, x) - y)
    return loss, mlp_params(draw), (draw(B, 7), draw(B, 3))


@case
def checkpoint_with_policy(draw):
    def loss(p, x):
        block = lambda x: jnp.tanh(jnp.sin(x @ p["w"]) @ p["w"].T)
        block = jax.checkpoint(block, policy=jax.checkpoint_policies.dots_saveable)
        return squared(block(block(x)))

    return loss, {"w": draw(5, 4)}, (draw(B, 2, 5),)


@case
def checkpoint_in_checkpoint_under_jit(draw):
    def loss(p, x):
        inner = jax.checkpoint(jax.jit(lambda w, x: jnp.tanh(x @ w)))
        return squared(jax.jit(jax.checkpoint(lambda p, x: inner(p[0], x) @ p[1]))(p, x))

    return loss, [draw(4, 5), draw(5, 3)], (draw(B, 4),)


@jax.custom_jvp
def _leaky(x, slope):
    return jnp.where(x > 0, x, slope * x)


@_leaky.defjvp
def _leaky_jvp(primals, tangents):
    # Not the true derivative: whoever differentiates the inside gets another answer.
    (x, slope), (dx, dslope) = primals, tangents
    return _leaky(x, slope), jnp.where(x > 0, 3.0, 2.0 * slope) * dx + 0.5 * dslope


@case
def custom_jvp_that_differs(draw):
    loss = lambda p, x: squared(_leaky(x @ p["w"], p["slope"]))
    return loss, {"w": draw(7, 3), "slope": draw(3)}, (draw(B, 7),)


@jax.custom_vjp
def _straight_through(x, scale):
    # Ranks are made equal: JAX traces these functions when it differentiates, under the settings of that moment.
    return jnp.round(x * 4.0) * jnp.broadcast_to(scale, x.shape)


def _straight_through_forward(x, scale):
    return _straight_through(x, scale), (x, scale)


def _straight_through_backward(residuals, cotangent):
    x, scale = residuals
    passed = cotangent * jnp.broadcast_to(scale, x.shape)
    return passed, jnp.sum(cotangent * x, axis=-2 if x.ndim > 1 else ()) * 7.0


_straight_through.defvjp(_straight_through_forward, _straight_through_backward)


@case
def custom_vjp_that_differs(draw):
    """Quantised weights by a straight-through estimator, with parameters and data inside."""

    def loss(p, x):
        weights = _straight_through(p["w"], p["scale"])
        return squared(_straight_through(jnp.tanh(x @ weights), p["gain"]))

    return loss, {"w": draw(5, 3), "scale": draw(3), "gain": draw(3)}, (draw(B, 4, 5),)


@jax.custom_vjp
def _clipped_cotangent(x):
    return x


_clipped_cotangent.defvjp(lambda x: (x, None), lambda _, cotangent: (jnp.clip(cotangent, -0.1, 0.1),))


@case
def custom_vjp_on_data_and_on_parameters(draw):
    loss = lambda p, x: squared(_clipped_cotangent(x @ _clipped_cotangent(p["w"]) + p["b"]))
    return loss, {"w": draw(5, 3), "b": draw(3)}, (draw(B, 5),)


@case
def custom_vjp_inside_a_scan(draw):
    def loss(p, xs):
        step = lambda h, x: (_clipped_cotangent(jnp.tanh(x + h @ p)), None)
        return squared(lax.scan(step, jnp.zeros(3, xs.dtype), xs)[0])

    return loss, draw(3, 3), (draw(B, 4, 3),)


@case
def kinks(draw):
    """relu and friends at exactly 0, where the rule of the function and that of its parts disagree."""

    def loss(p, x):
        y = p * jnp.round(x)
        return jnp.sum(jax.nn.relu(y) + jax.nn.relu6(y) + jnp.abs(y) + jax.nn.leaky_relu(y) * y) + squared(y)

    return loss, draw(7), (draw(B, 7),)


@case
def stopped_gradient(draw):
    def loss(p, x):
        target = lax.stop_gradient(x @ p["target"])
        return squared(jnp.tanh(x @ p["w"] * lax.stop_gradient(p["w"]).sum()) - target)

    return loss, {"w": draw(5, 3), "target": draw(5, 3)}, (draw(B, 5),)


@case
def derivative_inside(draw):
    """A field matched to the gradient of a network by its input."""
    potential = lambda p, x: mlp(p, x).sum()
    loss = lambda p, x, force: squared(jax.grad(potential, 1)(p, x) - force)
    return loss, mlp_params(draw, 3, 5, 2), (draw(B, 3), draw(B, 3))


@case
def physics_informed(draw):
    """First and second derivatives of the network in its inputs: a heat equation's residual and boundary."""

    def loss(p, t, x):
        net = lambda t, x: mlp(p, jnp.stack([t, x]))[0]
        u_t = jax.grad(net)(t, x)
        u_xx = jax.grad(jax.grad(net, 1), 1)(t, x)
        return squared(u_t - p["diffusivity"] * u_xx) + squared(net(jnp.zeros_like(t), x) - jnp.sin(x))

    return loss, mlp_params(draw, 2, 5, 3) | {"diffusivity": draw.uniform()}, (draw(B), draw(B))


@case
def laplacian_by_forward_over_reverse(draw):
    def loss(p, x):
        gradient = jax.grad(lambda x: jnp.sin(mlp(p, x)).sum())
        laplacian = sum(jax.jvp(gradient, (x,), (e,))[1] @ e for e in jnp.eye(3, dtype=x.dtype))
        return squared(laplacian) + squared(jax.jacfwd(lambda x: mlp(p, x))(x))

    return loss, mlp_params(draw, 3, 4, 2), (draw(B, 3),)


@case
def gradient_penalty_on_the_parameters(draw):
    """One step of training inside the loss, as in meta-learning."""

    def loss(p, x, y, x2, y2):
        inner = lambda p: squared(mlp(p, x) - y)
        stepped = jax.tree.map(lambda p, g: p - 0.1 * g, p, jax.grad(inner)(p))
        return squared(mlp(stepped, x2) - y2)

    batch = (draw(B, 4), draw(B, 2), draw(B, 4), draw(B, 2))
    return loss, mlp_params(draw, 4, 3, 2), batch


@case
def compiled_and_mapped_inside(draw):
    """jit with static arguments, vmap with an unmapped parameter, partial application."""

    def loss(p, xs):
        layer = jax.jit(lambda w, x, power: jnp.tanh(x @ w) ** power, static_argnames="power")
        hidden = jax.vmap(functools.partial(layer, power=2), (None, 0))(p["w"], xs)
        return squared(jax.vmap(jnp.dot, (0, None), 1)(hidden, p["v"]))

    return loss, {"w": draw(4, 5), "v": draw(5, 2)}, (draw(B, 3, 4),)
