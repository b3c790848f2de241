"""Arithmetic between a leaf and the operand it becomes: paths that rearrange, and paths that compute."""

import jax
import jax.numpy as jnp
import optax

from cases import B, case
from cases.dense import mlp, mlp_params, squared


@case
def unused_and_dataless_leaves(draw):
    def loss(p, x):
        return squared(x @ p["w"]) + jnp.sum(jnp.sin(p["dataless"])) * jnp.prod(p["dataless"][0])

    return loss, {"w": draw(7, 3), "dataless": draw(3, 2), "unused": draw(4)}, (draw(B, 7),)


@case
def nothing_meets_data(draw):
    loss = lambda p, x: squared(jnp.tanh(p["w"])) + 0.0 * jnp.sum(x)
    return loss, {"w": draw(4, 3)}, (draw(B, 7),)


@case
def penalty_on_the_parameters(draw):
    def loss(p, x, y):
        penalty = 0.1 * optax.tree.norm(p, squared=True) + jnp.sum(jnp.abs(p["in"]["w"]))
        return squared(mlp(p, x) - y) + penalty

    return loss, mlp_params(draw), (draw(B, 7), draw(B, 3))


@case
def low_rank_merged(draw):
    loss = lambda p, x: squared(jnp.tanh(x @ (p["w"] + 0.5 * p["a"] @ p["b"])))
    return loss, {"w": draw(7, 5), "a": draw(7, 2), "b": draw(2, 5)}, (draw(B, 3, 7),)


@case
def low_rank_unmerged(draw):
    loss = lambda p, x: squared(jnp.tanh(x @ p["w"] + 0.5 * (x @ p["a"]) @ p["b"]))
    return loss, {"w": draw(7, 5), "a": draw(7, 2), "b": draw(2, 5)}, (draw(B, 3, 7),)


@case
def adapters_alone(draw):
    """Frozen weights that the loss closes over."""
    frozen = draw(7, 5)
    loss = lambda p, x: squared(jnp.tanh(x @ jnp.asarray(frozen, x.dtype) + x @ p["a"] @ p["b"]))
    return loss, {"a": draw(7, 2), "b": draw(2, 5)}, (draw(B, 3, 7),)


@case
def weight_normalisation(draw):
    def loss(p, x):
        direction = p["v"] / jnp.linalg.norm(p["v"], axis=0, keepdims=True)
        return squared(jnp.tanh(x @ (p["g"] * direction)))

    return loss, {"v": draw(7, 3), "g": draw.uniform(3)}, (draw(B, 4, 7),)


@case
def softmax_of_parameters(draw):
    def loss(p, x):
        mixture = jax.nn.softmax(p["logits"])
        return squared(jnp.einsum("e,eij,tj->ti", mixture, p["experts"], x)) + mixture @ x[0, :3]

    return loss, {"logits": draw(3), "experts": draw(3, 4, 5)}, (draw(B, 2, 5),)


@case
def symmetric_parameter(draw):
    """A leaf and its transpose meet in one operand."""
    loss = lambda p, x: squared(jnp.tanh(x @ (p + p.T)))
    return loss, draw(5, 5), (draw(B, 3, 5),)


@case
def casts_transposes_reshapes(draw):
    def loss(p, x):
        w = p.transpose(2, 0, 1).reshape(4, 15).T
        return squared(jnp.tanh(x @ w)) + squared(x[:3] @ p[..., 1].T.reshape(3, 5)[:, ::-1])

    return loss, draw(5, 3, 4), (draw(B, 15),)


@case
def slices_of_a_stack(draw):
    """Layers in one leaf, taken out one by one."""

    def loss(p, x):
        for k in range(3):
            x = jnp.tanh(x @ p["w"][k] + p["b"][k])
        return squared(x)

    return loss, {"w": draw(3, 4, 4), "b": draw(3, 4)}, (draw(B, 2, 4),)


@case
def overlapping_slices(draw):
    def loss(p, x):
        return squared(jnp.tanh(x @ p[:4])) + squared(jnp.sin(x @ p[2:6])) + squared(x[:3] @ p[::2])

    return loss, draw(6, 3), (draw(B, 4),)


@case
def parameter_vector_as_network(draw):
    """All the parameters in one flat vector."""

    def loss(p, x, y):
        w1, b1, w2 = p[:28].reshape(7, 4), p[28:32], p[32:44].reshape(4, 3)
        return squared(jnp.tanh(x @ w1 + b1) @ w2 - y)

    return loss, draw(44), (draw(B, 7), draw(B, 3))


@case
def kronecker_layer(draw):
    loss = lambda p, x: squared(jnp.tanh(jnp.kron(p["a"], p["b"]) @ x))
    return loss, {"a": draw(2, 3), "b": draw(5, 2)}, (draw(B, 6),)


@case
def parameters_that_jax_pulls_only_together(draw):
    """JAX cannot transpose a pad in its value alone, nor a solve in what only its solver holds."""

    def loss(p, x):
        padded = jax.lax.pad(p["w"], p["b"], [(1, 2, 1)])
        solve = lambda matvec, b: b * p["inverse"]
        solved = jax.lax.custom_linear_solve(lambda v: p["scale"] * v, p["w"], solve, symmetric=True)
        return squared(padded * x) + jnp.sum(solved * x[:3])

    scale = draw.uniform(3)
    return loss, {"w": draw(3), "b": draw(), "scale": scale, "inverse": 1 / scale}, (draw(B, 8),)
