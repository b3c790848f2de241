"""Rows taken from tables, positions, slices at data's indices, writes into parameters."""

import jax
import jax.numpy as jnp
import optax
from jax import lax

from cases import B, case
from cases.dense import squared


@case
def embedding_take(draw):
    loss = lambda p, ix: squared(jnp.tanh(jnp.take(p["table"], ix, axis=0) @ p["w"]))
    return loss, {"table": draw(7, 3), "w": draw(3, 4)}, (draw.integers(7, B, 5),)


@case
def embedding_repeated_indices(draw):
    loss = lambda p, ix: squared(jnp.tanh(p[ix].sum(axis=0)))
    return loss, draw(3, 4), (draw.integers(3, B, 6),)


@case
def embedding_one_row(draw):
    loss = lambda p, i: squared(jnp.tanh(p[i] - 0.1))
    return loss, draw(7, 3), (draw.integers(7, B),)


@case
def embedding_block_of_indices(draw):
    loss = lambda p, ix: squared(jnp.tanh(p[ix]).sum(axis=1))
    return loss, draw(7, 3), (draw.integers(7, B, 2, 4),)


@case
def embedding_of_single_numbers(draw):
    """A table of scalars, such as the bias of each user."""
    loss = lambda p, ix: squared(jnp.tanh(p[ix]))
    return loss, draw(6), (draw.integers(6, B, 4),)


@case
def embedding_of_matrices(draw):
    """One matrix for each relation, as in knowledge graphs."""
    loss = lambda p, left, r, right: jnp.tanh(left @ p[r] @ right)
    return loss, draw(3, 4, 5), (draw(B, 4), draw.integers(3, B), draw(B, 5))


@case
def embedding_clipped(draw):
    loss = lambda p, ix: squared(jnp.tanh(p.at[ix].get(mode="clip")))
    return loss, draw(4, 3), (draw.integers(9, B, 6) - 2,)


@case
def embedding_filled(draw):
    loss = lambda p, ix: squared(jnp.tanh(p.at[ix].get(mode="fill", fill_value=0.5)))
    return loss, draw(4, 3), (draw.integers(9, B, 6) - 2,)


@case
def embedding_out_of_bounds(draw):
    """Negative indices count from the end; those past the end are clamped by indexing, and nan by `take`."""

    def loss(p, ix):
        rows = jnp.take(p, ix, axis=0)
        return squared(jnp.tanh(jnp.where(jnp.isnan(rows), 0.3, rows))) + squared(jnp.sin(p[ix]))

    return loss, draw(4, 3), (draw.integers(11, B, 6) - 6,)


@case
def embedding_wrapped_promised(draw):
    def loss(p, ix):
        wrapped = jnp.take(p, ix - 9, axis=0, mode="wrap")
        return squared(jnp.tanh(wrapped)) + squared(jnp.sin(p.at[ix % 4].get(mode="promise_in_bounds")))

    return loss, draw(4, 3), (draw.integers(20, B, 5),)


@case
def embedding_with_padding(draw):
    """Index 0 is padding: its row must stay untouched."""

    def loss(p, ix, y):
        mask = (ix != 0).astype(p["table"].dtype)
        mean = (p["table"][ix] * mask[:, None]).sum(0) / jnp.maximum(mask.sum(), 1)
        return optax.softmax_cross_entropy_with_integer_labels(mean @ p["head"], y)

    return loss, {"table": draw(6, 4), "head": draw(4, 3)}, (draw.integers(6, B, 7), draw.integers(3, B))


@case
def embedding_of_columns(draw):
    """Rows taken along another axis than the first."""
    loss = lambda p, ix: squared(jnp.tanh(jnp.take(p, ix, axis=1)))
    return loss, draw(3, 7), (draw.integers(7, B, 4),)


@case
def embedding_of_points(draw):
    """Two indices at once: single elements of a matrix, as in matrix factorisation's biases."""
    loss = lambda p, i, j: squared(jnp.tanh(p[i, j])) + jnp.sin(p[i[0], 2]).sum()
    return loss, draw(4, 5), (draw.integers(4, B, 6), draw.integers(5, B, 6))


@case
def embedding_scaled_and_shared(draw):
    """Two lookups of one table, one of them scaled."""

    def loss(p, user, item):
        return jnp.tanh(3.0 * p[user] @ p[item]) + squared(p[user])

    return loss, draw(6, 4), (draw.integers(6, B), draw.integers(6, B))


@case
def matrix_factorisation(draw):
    def loss(p, user, item, rating):
        guess = p["users"][user] @ p["items"][item] + p["user_bias"][user] + p["item_bias"][item] + p["mean"]
        return squared(guess - rating)

    params = {
        "users": draw(6, 3),
        "items": draw(7, 3),
        "user_bias": draw(6),
        "item_bias": draw(7),
        "mean": draw(),
    }
    return loss, params, (draw.integers(6, B), draw.integers(7, B), draw(B))


@case
def tied_embedding_and_head(draw):
    def loss(p, ix, y):
        hidden = jnp.tanh(p["table"][ix] @ p["w"])
        logits = hidden @ p["table"].T
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return loss, {"table": draw(7, 3), "w": draw(3, 3)}, (draw.integers(7, B, 4), draw.integers(7, B, 4))


@case
def one_hot_embedding(draw):
    loss = lambda p, ix: squared(jnp.tanh(jax.nn.one_hot(ix, 7, dtype=p.dtype) @ p))
    return loss, draw(7, 3), (draw.integers(7, B, 4),)


@case
def indices_that_no_example_changes(draw):
    """A gather of parameters at constant indices: a path, not a site."""
    pick = draw.integers(6, 4)
    loss = lambda p, x: squared(jnp.tanh(x @ p[pick]))
    return loss, draw(6, 3), (draw(B, 5, 4),)


@case
def relative_position_bias(draw):
    """A table of biases at the distances of positions, added to the scores of attention."""
    distance = jnp.arange(5)[None] - jnp.arange(5)[:, None] + 4

    def loss(p, x):
        scores = jnp.einsum("td,hde,se->hts", x, p["qk"], x) + p["bias"][:, distance]
        return squared(jax.nn.softmax(scores) @ x)

    return loss, {"qk": draw(2, 3, 3), "bias": draw(2, 9)}, (draw(B, 5, 3),)


@case
def learned_positions(draw):
    """A slice of a longer table of positions, added to every example."""

    def loss(p, x, start):
        later = lax.dynamic_slice_in_dim(p["positions"], start, 5)
        return squared(jnp.tanh((x + p["positions"][:5]) @ p["w"] + later[:, :4]))

    return loss, {"positions": draw(9, 6), "w": draw(6, 4)}, (draw(B, 5, 6), draw.integers(6, B))


@case
def dynamic_slice_at_data(draw):
    """Starts that run over the end are clamped."""
    loss = lambda p, i, j: squared(jnp.tanh(lax.dynamic_slice(p, (i, j), (3, 2))))
    return loss, draw(5, 6), (draw.integers(7, B), draw.integers(7, B))


@case
def dynamic_index_of_experts(draw):
    """Hard routing: one expert's matrix for each example."""
    loss = lambda p, x, e: squared(jnp.tanh(x @ lax.dynamic_index_in_dim(p, e, keepdims=False)))
    return loss, draw(3, 5, 4), (draw(B, 2, 5), draw.integers(3, B))


@case
def dynamic_update_of_a_parameter(draw):
    loss = lambda p, x, i: squared(jnp.tanh(lax.dynamic_update_slice(p, x, (i, 1))))
    return loss, draw(5, 4), (draw(B, 2, 3), draw.integers(4, B))


@case
def scatter_into_a_parameter(draw):
    def loss(p, x, ix):
        y = p.at[ix].add(x) + p.at[ix[0]].set(2 * x[0]) + p.at[ix[1:]].mul(x[1:])
        return squared(jnp.tanh(y))

    return loss, draw(6, 4), (draw(B, 3, 4), draw.integers(6, B, 3))


@case
def scatter_of_a_parameter(draw):
    loss = lambda p, x, ix: squared(jnp.tanh(x.at[ix].add(p, mode="drop")))
    return loss, draw(3, 4), (draw(B, 6, 4), draw.integers(8, B, 3))


@case
def segment_sum_of_messages(draw):
    """A graph network: messages along edges that the data gives."""

    def loss(p, nodes, senders, receivers):
        messages = jnp.tanh(nodes[senders] @ p["message"])
        gathered = jax.ops.segment_sum(messages, receivers, num_segments=4)
        return squared(jnp.tanh(gathered @ p["update"] + nodes @ p["self"]))

    params = {"message": draw(3, 5), "update": draw(5, 2), "self": draw(3, 2)}
    return loss, params, (draw(B, 4, 3), draw.integers(4, B, 6), draw.integers(4, B, 6))


@case
def class_token(draw):
    """A parameter concatenated to the data, and one that pads it."""

    def loss(p, x):
        tokens = jnp.concatenate([p["token"][None], x], axis=0)
        padded = lax.pad(tokens, p["filler"], ((1, 0, 0), (0, 1, 0)))
        return squared(jnp.tanh(padded @ p["w"]))

    return loss, {"token": draw(4), "filler": draw(), "w": draw(5, 3)}, (draw(B, 3, 4),)


@case
def sorting_and_cumulating(draw):
    def loss(p, x):
        y = jnp.sort(x * p["scale"]) + jnp.cumsum(p["steps"] * x) + jnp.cumsum(p["steps"])
        return squared(jnp.tanh(y)) + jnp.sum(jnp.sort(p["steps"]) * x) + jnp.max(x + p["scale"])

    return loss, {"scale": draw(6), "steps": draw(6)}, (draw(B, 6),)


@case
def median_and_top_k(draw):
    def loss(p, x):
        y = x @ p["w"]
        values, places = lax.top_k(y, 2)
        return squared(values) + jnp.median(y) + jnp.sum(p["b"][places])

    return loss, {"w": draw(4, 7), "b": draw(7)}, (draw(B, 4),)
