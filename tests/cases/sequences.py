"""Attention, recurrences, loops and branches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from cases import B, case
from cases.dense import squared


def attention(p, x, heads=2):
    split = lambda w: jnp.einsum("td,dhk->thk", x, w)
    q, k, v = split(p["q"]), split(p["k"]), split(p["v"])
    weights = jax.nn.softmax(jnp.einsum("thk,shk->hts", q, k) / jnp.sqrt(q.shape[-1]).astype(x.dtype))
    return jnp.einsum("hts,shk,hkd->td", weights, v, p["out"])


def attention_params(draw, width=6, heads=2, size=3):
    projection = lambda: draw(width, heads, size)
    return {"q": projection(), "k": projection(), "v": projection(), "out": draw(heads, size, width)}


@case
def multi_head_attention(draw):
    loss = lambda p, x, y: squared(attention(p, x) - y)
    return loss, attention_params(draw), (draw(B, 5, 6), draw(B, 5, 6))


@case
def causal_attention_in_two_loops(draw):
    """vmaps inside the loss, over heads and positions."""

    def loss(p, x):
        def head(q, k, v):
            scores = jax.vmap(lambda t: jax.vmap(lambda s: (x[t] @ q) @ (x[s] @ k))(jnp.arange(5)))(
                jnp.arange(5)
            )
            scores = jnp.where(jnp.tri(5, dtype=bool), scores, -jnp.inf)
            return jax.nn.softmax(scores) @ (x @ v)

        return squared(jax.vmap(head)(p["q"], p["k"], p["v"]))

    return loss, {"q": draw(2, 4, 3), "k": draw(2, 4, 3), "v": draw(2, 4, 3)}, (draw(B, 5, 4),)


@case
def learned_queries(draw):
    """Pooling by attention, its queries a parameter."""

    def loss(p, x):
        keys = x @ p["k"]
        return squared(jax.nn.softmax(p["queries"] @ keys.T) @ x)

    return loss, {"queries": draw(2, 3), "k": draw(4, 3)}, (draw(B, 5, 4),)


@case
def recurrence(draw):
    """Weights that are the same at every step of a scan."""

    def loss(p, xs, y):
        def step(h, x):
            h = jnp.tanh(x @ p["in"] + h @ p["hidden"] + p["b"])
            return h, h @ p["out"]

        h, outs = lax.scan(step, jnp.zeros(4, xs.dtype), xs)
        return squared(outs - y) + squared(h)

    params = {"in": draw(3, 4), "hidden": draw(4, 4), "b": draw(4), "out": draw(4, 2)}
    return loss, params, (draw(B, 6, 3), draw(B, 6, 2))


@case
def recurrence_reversed_with_initial_state(draw):
    def loss(p, xs):
        step = lambda h, x: (jnp.tanh(x + h @ p["w"]), h[0])
        h, firsts = lax.scan(step, p["h0"], xs, reverse=True)
        return squared(h) + jnp.sin(firsts).sum()

    return loss, {"w": draw(4, 4), "h0": draw(4)}, (draw(B, 5, 4),)


@case
def recurrence_in_both_directions(draw):
    def loss(p, xs):
        step = lambda h, x: (jnp.tanh(x @ p["in"] + h @ p["hidden"]),) * 2
        _, ahead = lax.scan(step, jnp.zeros(4, xs.dtype), xs)
        _, back = lax.scan(step, jnp.zeros(4, xs.dtype), xs, reverse=True)
        return squared(ahead * back @ p["out"])

    return loss, {"in": draw(3, 4), "hidden": draw(4, 4), "out": draw(4, 2)}, (draw(B, 5, 3),)


@case
def recurrence_unrolled(draw):
    def loss(p, xs):
        h = jnp.zeros(4, xs.dtype)
        for t in range(3):
            h = jnp.tanh(xs[t] @ p["in"] + h @ p["hidden"] + p["b"])
        return squared(h)

    return loss, {"in": draw(3, 4), "hidden": draw(4, 4), "b": draw(4)}, (draw(B, 3, 3),)


@case
def recurrence_with_unroll(draw):
    def loss(p, xs):
        step = lambda h, x: (jnp.tanh(x + h @ p), None)
        return squared(lax.scan(step, jnp.zeros(4, xs.dtype), xs, unroll=2)[0])

    return loss, draw(4, 4), (draw(B, 5, 4),)


@case
def stacked_layers(draw):
    """Layers scanned over: another slice of each leaf at every step."""

    def loss(p, x):
        layer = lambda x, p: (jnp.tanh(x @ p["w"] + p["b"]), None)
        return squared(lax.scan(layer, x, p)[0])

    return loss, {"w": draw(3, 4, 4), "b": draw(3, 4)}, (draw(B, 4),)


@case
def stacked_layers_on_positions(draw):
    """T = 5 in each layer, plus a gate that all layers share and a norm of each layer's output."""

    def loss(p, x):
        def layer(x, layer_params):
            y = x + jnp.tanh(x @ layer_params["w"] + layer_params["b"]) * p["gate"]
            return y, squared(y) * layer_params["weight"]

        x, terms = lax.scan(layer, x, p["layers"])
        return squared(x) + terms.sum()

    layers = {"w": draw(3, 4, 4), "b": draw(3, 4), "weight": draw(3)}
    return loss, {"layers": layers, "gate": draw(4)}, (draw(B, 5, 4),)


@case
def stacked_layers_reversed(draw):
    def loss(p, x):
        return squared(lax.scan(lambda x, w: (jnp.tanh(x @ w), x[0]), x, p, reverse=True)[0])

    return loss, draw(3, 4, 4), (draw(B, 2, 4),)


@case
def one_leaf_constant_and_scanned(draw):
    """The same leaf is stepped through and used whole at each step."""

    def loss(p, x):
        def step(x, row):
            return jnp.tanh(x @ p + row), jnp.sin(row @ x)

        x, terms = lax.scan(step, x, p)
        return squared(x) + terms.sum()

    return loss, draw(4, 4), (draw(B, 4),)


@case
def scan_of_a_transposed_stack(draw):
    def loss(p, x):
        layers = p.transpose(1, 2, 0)
        return squared(lax.scan(lambda x, w: (jnp.tanh(w @ x), None), x, layers)[0])

    return loss, draw(4, 3, 4), (draw(B, 4),)


@case
def nested_scans(draw):
    """Layers over time: an outer scan through a stack, an inner one with the layer's weights constant."""

    def loss(p, xs):
        def layer(xs, w):
            step = lambda h, x: (jnp.tanh(x + h @ w["hidden"] + p["b"]),) * 2
            return lax.scan(step, w["h0"], xs)[1], None

        return squared(lax.scan(layer, xs, p["layers"])[0])

    layers = {"hidden": draw(3, 4, 4), "h0": draw(3, 4)}
    return loss, {"layers": layers, "b": draw(4)}, (draw(B, 5, 4),)


@case
def scan_over_pairs_of_layers(draw):
    """A stack of stacks: the inner scan steps through what the outer one hands it."""

    def loss(p, x):
        inner = lambda x, w: (jnp.tanh(x @ w), None)
        return squared(lax.scan(lambda x, ws: lax.scan(inner, x, ws), x, p)[0])

    return loss, draw(2, 3, 4, 4), (draw(B, 5, 4),)


@case
def parameters_in_the_carry(draw):
    """Fast weights: a parameter starts the carry and is updated by the data; another decays it, untouched."""

    def loss(p, xs):
        def step(carry, x):
            fast, rate = carry
            y = jnp.tanh(fast @ x)
            return (rate * fast + 0.1 * jnp.outer(y, x), rate), y

        (fast, _), ys = lax.scan(step, (p["fast"], p["rate"]), xs)
        return squared(ys) + squared(fast)

    return loss, {"fast": draw(4, 3), "rate": draw.uniform()}, (draw(B, 5, 3),)


@case
def carry_of_parameters_alone(draw):
    """Powers of a matrix made by a scan that sees no data, then used on data."""

    def loss(p, x):
        _, powers = lax.scan(lambda m, _: (jnp.tanh(m @ p), m), jnp.eye(3, dtype=p.dtype), None, length=4)
        return squared(jnp.einsum("kij,j->ki", powers, x))

    return loss, draw(3, 3), (draw(B, 3),)


@case
def euler_steps_of_an_ode(draw):
    """A neural differential equation by a loop with a fixed number of steps."""

    def loss(p, x, y):
        field = lambda x: jnp.tanh(x @ p["w1"] + p["b"]) @ p["w2"]
        x = lax.fori_loop(0, 4, lambda k, x: x + 0.25 * field(x) * (1.0 + k), x)
        return squared(x - y)

    return loss, {"w1": draw(3, 5), "b": draw(5), "w2": draw(5, 3)}, (draw(B, 3), draw(B, 3))


@case
def linear_recurrence_by_associative_scan(draw):
    def loss(p, xs):
        decay = jnp.broadcast_to(jax.nn.sigmoid(p["decay"]), xs.shape)
        combine = lambda left, right: (left[0] * right[0], left[1] * right[0] + right[1])
        _, states = lax.associative_scan(combine, (decay, xs * p["in"]))
        return squared(jnp.tanh(states) @ p["out"])

    return loss, {"decay": draw(4), "in": draw(4), "out": draw(4, 3)}, (draw(B, 6, 4),)


@case
def map_over_patches(draw):
    loss = lambda p, x: squared(lax.map(lambda patch: jnp.tanh(patch @ p), x))
    return loss, draw(3, 2), (draw(B, 4, 3),)


@case
def branches_by_the_data(draw):
    def loss(p, x, y):
        left = lambda x: jnp.tanh(x @ p["left"]) * p["shared"]
        right = lambda x: jnp.sin(x @ p["right"]) + p["shared"]
        return squared(lax.cond(x[0] > 0, left, right, x) - y)

    return loss, {"left": draw(4, 3), "right": draw(4, 3), "shared": draw(3)}, (draw(B, 4), draw(B, 3))


@case
def switch_inside_a_scan(draw):
    def loss(p, xs, kinds):
        branches = [lambda h, x: jnp.tanh(x + h @ p["a"]), lambda h, x: h * p["b"], lambda h, x: h - x]
        step = lambda h, args: (lax.switch(args[1], branches, h, args[0]), None)
        return squared(lax.scan(step, jnp.ones(3, xs.dtype), (xs, kinds))[0])

    return loss, {"a": draw(3, 3), "b": draw(3)}, (draw(B, 5, 3), draw.integers(3, B, 5))


@case
def branch_that_no_example_changes(draw):
    """A predicate of the parameters alone, with data in the branches."""

    def loss(p, x):
        return squared(lax.cond(p["gate"] > 0, lambda: jnp.tanh(x @ p["w"]), lambda: x[:3] * p["gate"]))

    return loss, {"gate": abs(draw()), "w": draw(4, 3)}, (draw(B, 4),)


@case
def loop_until_the_data_says(draw):
    """A while loop, which has no reverse derivative, on data and stopped parameters."""

    def loss(p, x):
        frozen = lax.stop_gradient(p)
        _, x = lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ frozen)), (0, x))
        return squared(x @ p)

    return loss, draw(3, 3), (draw(B, 3),)


@case
def connectionist_temporal_loss(draw):
    def loss(p, frames, labels):
        logits = (frames @ p["w"] + p["b"])[None]
        zeros = lambda n: jnp.zeros((1, n), frames.dtype)
        return optax.ctc_loss(logits, zeros(6), labels[None], zeros(2))[0]

    return loss, {"w": draw(3, 4), "b": draw(4)}, (draw(B, 6, 3), 1 + draw.integers(3, B, 2))


def _block(p, x):
    normed = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-3) * p["norm"]
    x = x + attention(p["attention"], normed)
    return x + jnp.tanh(x @ p["up"]) @ p["down"]


@case
def tied_checkpointed_transformer(draw):
    """Embedding and head tied, layers stacked and scanned over, each layer rematerialised."""

    def loss(p, tokens, targets):
        layer = jax.checkpoint(lambda x, layer: (_block(layer, x), None))
        x, _ = lax.scan(layer, p["table"][tokens] + p["positions"], p["layers"])
        logits = x @ p["table"].T
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    layers = [
        {"norm": draw.uniform(6), "attention": attention_params(draw), "up": draw(6, 7), "down": draw(7, 6)}
        for _ in range(2)
    ]
    layers = jax.tree.map(lambda *rows: np.stack(rows), *layers)
    params = {"table": draw(9, 6), "positions": draw(5, 6), "layers": layers}
    return loss, params, (draw.integers(9, B, 5), draw.integers(9, B, 5))
