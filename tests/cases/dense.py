"""Dense layers, contractions, and parameters that meet data element by element."""

import jax
import jax.numpy as jnp
import optax

from cases import B, case


def squared(x):
    return 0.5 * jnp.sum(jnp.square(x))


def mlp(params, x):
    hidden = jnp.tanh(x @ params["in"]["w"] + params["in"]["b"])
    return hidden @ params["out"]["w"] + params["out"]["b"]


def mlp_params(draw, inside=7, hidden=4, outside=3):
    return {
        "in": {"w": draw(inside, hidden), "b": draw(hidden)},
        "out": {"w": draw(hidden, outside), "b": draw(outside)},
    }


@case
def linear_least_squares(draw):
    loss = lambda p, x, y: squared(x @ p["w"] + p["b"] - y)
    return loss, {"w": draw(7), "b": draw()}, (draw(B, 7), draw(B))


@case
def logistic(draw):
    loss = lambda p, x, y: optax.sigmoid_binary_cross_entropy(p @ x, y)
    return loss, draw(7), (draw(B, 7), draw.integers(2, B).astype(float))


@case
def mlp_classifier(draw):
    loss = lambda p, x, y: optax.softmax_cross_entropy_with_integer_labels(mlp(p, x), y)
    return loss, mlp_params(draw), (draw(B, 7), draw.integers(3, B))


@case
def integers_times_weights(draw):
    return lambda p, x: squared(jnp.tanh(x @ p)), draw(9, 8), (draw.integers(4, B, 2, 9),)


@case
def scalars_and_empty_subtrees(draw):
    def loss(p, example):
        out = mlp(p["net"], example["x"])
        return squared(p["gain"] * out + p["shift"] - example["y"])

    params = {"net": mlp_params(draw), "gain": draw(), "shift": 0.3, "nothing": {}, "none": None, "list": []}
    return loss, params, ({"x": draw(B, 7), "y": draw(B, 3), "nothing": ()},)


@case
def relu_mlp_on_positions(draw):
    """One dense layer at several positions of each example: T = 6."""
    loss = lambda p, x, y: squared(jax.nn.relu(mlp(p, x)).sum(axis=0) - y)
    return loss, mlp_params(draw), (draw(B, 6, 7), draw(B, 3))


@case
def two_positions(draw):
    loss = lambda p, x: squared(jnp.tanh(x @ p["w"] + p["b"]))
    return loss, {"w": draw(7, 3), "b": draw(3)}, (draw(B, 2, 7),)


@case
def parameter_on_the_left(draw):
    loss = lambda p, x: squared(jnp.tanh(p["w"] @ x + p["b"][:, None]))
    return loss, {"w": draw(3, 7), "b": draw(3)}, (draw(B, 7, 4),)


@case
def several_contracted_axes(draw):
    loss = lambda p, x: squared(jnp.tanh(jnp.einsum("tchw,whoc->to", x, p)))
    return loss, draw(4, 3, 6, 2), (draw(B, 5, 2, 3, 4),)


@case
def batched_dot(draw):
    """Groups: a block axis in the parameter and in the data."""
    loss = lambda p, x: squared(jnp.sin(jnp.einsum("gtp,gpq->gtq", x, p)))
    return loss, draw(3, 4, 5), (draw(B, 3, 2, 4),)


@case
def batched_dot_shared_output(draw):
    loss = lambda p, x: squared(jnp.sin(jnp.einsum("tgp,gqp->tgq", x, p["w"]) + p["b"]))
    return loss, {"w": draw(3, 5, 4), "b": draw(3, 5)}, (draw(B, 7, 3, 4),)


@case
def bilinear_form(draw):
    loss = lambda p, x, z: jnp.tanh(x @ p @ z)
    return loss, draw(4, 6), (draw(B, 4), draw(B, 6))


@case
def quadratic_form_twice_used(draw):
    """The same matrix on both sides: x·Pᵀ·P·x."""
    loss = lambda p, x: jnp.sin(x @ p.T @ p @ x)
    return loss, draw(3, 6, scale=0.3), (draw(B, 6),)


@case
def data_matrix_between_parameters(draw):
    loss = lambda p, a: jnp.sin(p @ a @ p) + p @ a[0]
    return loss, draw(6), (draw(B, 6, 6, scale=0.3),)


@case
def broadcast_arithmetic(draw):
    def loss(p, x):
        x = x * p["scale"] + p["shift"]
        x = x / p["divisor"] - p["row"][:, None]
        return squared(jnp.tanh(p["scalar"] * x) - p["table"])

    params = {"scale": draw(5), "shift": draw(5), "divisor": draw.uniform(5), "row": draw(3)}
    params |= {"scalar": draw(), "table": draw(3, 5)}
    return loss, params, (draw(B, 3, 5),)


@case
def parameter_divided_by_data(draw):
    loss = lambda p, x: squared(p["a"] / x) + squared(p["b"] - x) + jnp.sum(jnp.sin(-p["b"] * x))
    return loss, {"a": draw(7), "b": draw(7)}, (draw.uniform(B, 7),)


@case
def powers(draw):
    loss = lambda p, x: squared(jnp.power(p["base"], x) + jnp.power(x, p["exponent"]) + p["base"] ** 3)
    return loss, {"base": draw.uniform(4), "exponent": draw(4)}, (draw.uniform(B, 4),)


@case
def maximum_minimum_clamp(draw):
    def loss(p, x):
        y = jnp.maximum(x, p["low"])
        y = jnp.minimum(y, p["high"])
        return squared(y) + squared(jnp.clip(2 * x, p["low"], p["high"]) - 1.0)

    return loss, {"low": draw(7) - 0.5, "high": draw(7) + 0.5}, (draw(B, 7, scale=1.5),)


@case
def where_with_parameters(draw):
    def loss(p, x):
        y = (
            jnp.where(x > 0, p["a"], x)
            + jnp.where(x > 0.3, x, p["b"])
            + jnp.where(p["a"] > x, p["b"], p["a"])
        )
        return squared(jax.lax.select(x > 0, p["a"] * 2.0, p["b"] + 0.0)) + squared(y)

    return loss, {"a": draw(7), "b": draw(7)}, (draw(B, 7),)


@case
def fused_projection_split(draw):
    def loss(p, x):
        q, k, v = jnp.split(x @ p["qkv"] + p["b"], 3, axis=-1)
        return squared(jax.nn.softmax(q @ k.T) @ v)

    return loss, {"qkv": draw(7, 12), "b": draw(12)}, (draw(B, 5, 7),)


@case
def fourier_features(draw):
    """Learned frequencies: a dense layer inside of sines."""

    def loss(p, x, y):
        phase = x @ p["frequencies"] + p["phases"]
        return squared(jnp.concatenate([jnp.cos(phase), jnp.sin(phase)]) @ p["amplitudes"] - y)

    params = {"frequencies": draw(2, 5), "phases": draw(5), "amplitudes": draw(10)}
    return loss, params, (draw(B, 2), draw(B))


@case
def tensor_train(draw):
    """A three-core contraction, each core used once, the middle one between data on both sides."""
    loss = lambda p, x, y, z: jnp.tanh(jnp.einsum("i,ir,rjs,sk,j,k->", x, p["a"], p["b"], p["c"], y, z))
    return loss, {"a": draw(4, 2), "b": draw(2, 5, 3), "c": draw(3, 6)}, (draw(B, 4), draw(B, 5), draw(B, 6))


@case
def mixture_of_experts(draw):
    def loss(p, x):
        gates = jax.nn.softmax(x @ p["gate"])
        return squared(jnp.einsum("te,tei->ti", gates, jnp.tanh(jnp.einsum("tj,eij->tei", x, p["experts"]))))

    return loss, {"gate": draw(5, 3), "experts": draw(3, 4, 5)}, (draw(B, 2, 5),)


@case
def deep_sets(draw):
    def loss(p, items, mask):
        codes = jnp.where(mask[:, None], mlp(p["phi"], items), 0)
        return squared(mlp(p["rho"], codes.sum(axis=0)))

    params = {"phi": mlp_params(draw, 4, 6, 3), "rho": mlp_params(draw, 3, 5, 2)}
    return loss, params, (draw(B, 7, 4), draw.integers(2, B, 7).astype(bool))


@case
def siamese(draw):
    def loss(p, left, right, same):
        distance = squared(mlp(p, left) - mlp(p, right))
        return jnp.where(same, distance, jax.nn.relu(3.0 - distance))

    return loss, mlp_params(draw), (draw(B, 7), draw(B, 7), draw.integers(2, B).astype(bool))


@case
def triplet_of_different_lengths(draw):
    """One leaf at uses with 1, 2 and 4 positions."""
    embed = lambda p, x: jnp.tanh(x @ p["w"] + p["b"])

    def loss(p, anchor, near, far):
        centre = embed(p, anchor)
        return squared(embed(p, near) - centre) - 0.1 * squared(embed(p, far) - centre)

    return loss, {"w": draw(6, 3), "b": draw(3)}, (draw(B, 6), draw(B, 2, 6), draw(B, 4, 6))


@case
def class_weights_shared(draw):
    def loss(p, x, y, class_weights):
        return class_weights[y] * optax.softmax_cross_entropy_with_integer_labels(mlp(p, x), y)

    batch = (draw(B, 7), draw.integers(3, B), draw.uniform(3))
    return loss, mlp_params(draw), batch, {"in_axes": (None, 0, 0, None)}


@case
def auxiliary_output(draw):
    def loss(p, x, y):
        out = mlp(p, x)
        return squared(out - y), {"prediction": out, "count": jnp.int32(3)}

    return loss, mlp_params(draw), (draw(B, 7), draw(B, 3)), {"has_aux": True}


@case
def examples_on_other_axes(draw):
    loss = lambda p, x: squared(jnp.tanh(x["x"] @ p["w"]) - x["y"])
    return (
        loss,
        {"w": draw(7, 3)},
        ({"x": draw(7, B), "y": draw(3, B)},),
        {"in_axes": (None, {"x": 1, "y": -1})},
    )
