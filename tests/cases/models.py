"""Models of flax, equinox and haiku, used as they come."""

import jax
import jax.numpy as jnp
import optax

from cases import B, case
from cases.dense import squared


def filled(draw, shapes):
    """Random parameters of the shapes that an initialiser would give, without the time that it takes."""
    return jax.tree.map(lambda x: draw(*x.shape), shapes)


def is_shape(x):
    return isinstance(x, jax.ShapeDtypeStruct)


cross_entropy = optax.softmax_cross_entropy_with_integer_labels


@case
def flax_linen_convolutional_network(draw):
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3))(x))
            x = nn.avg_pool(x, (2, 2), (2, 2))
            x = nn.gelu(nn.GroupNorm(2)(nn.Conv(6, (3, 2), strides=(2, 1), use_bias=False)(x)))
            return nn.Dense(3)(x.reshape(-1))

    net, images = Net(), draw(B, 6, 5, 2)

    def loss(p, x, y):
        return cross_entropy(net.apply(p, x), y)

    return loss, filled(draw, jax.eval_shape(net.init, draw.key, images[0])), (images, draw.integers(3, B))


@case
def flax_linen_lstm(draw):
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(7, 3)(tokens)
            x = nn.RNN(nn.OptimizedLSTMCell(4, param_dtype=jnp.result_type(float)))(x)
            return nn.Dense(5)(nn.LayerNorm()(x[-1]))

    net, tokens = Net(), draw.integers(7, B, 6)

    def loss(p, tokens, y):
        return cross_entropy(net.apply(p, tokens), y)

    return loss, filled(draw, jax.eval_shape(net.init, draw.key, tokens[0])), (tokens, draw.integers(5, B))


@case
def flax_linen_transformer_with_dropout(draw):
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + nn.MultiHeadDotProductAttention(2, dropout_rate=0.3, deterministic=False)(
                nn.LayerNorm()(x)
            )
            return nn.Dense(3)(nn.Dropout(0.4, deterministic=False)(nn.gelu(nn.Dense(7)(x))))

    net, x = Net(), draw(B, 5, 4)

    def loss(p, x, y, key):
        return squared(net.apply(p, x, rngs={"dropout": key}) - y)

    return (
        loss,
        filled(draw, jax.eval_shape(net.init, {"params": draw.key, "dropout": draw.key}, x[0])),
        (x, draw(B, 5, 3), draw.keys(B)),
    )


@case
def flax_nnx_gru(draw):
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.cell = nnx.RNN(nnx.GRUCell(3, 4, param_dtype=jnp.result_type(float), rngs=rngs))
            self.head = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(self.cell(x, initial_carry=jnp.zeros(4, x.dtype)))

    graph, params, rest = nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))), nnx.Param, ...)

    def loss(p, x, y):
        return squared(nnx.merge(graph, p, rest)(x) - y)

    return loss, filled(draw, params), (draw(B, 5, 3), draw(B, 5, 2))


@case
def equinox_network(draw):
    import equinox as eqx

    net = eqx.filter_eval_shape(eqx.nn.MLP, 4, 2, 5, 2, key=draw.key)
    params, static = eqx.partition(net, is_shape)

    def loss(p, x, y):
        return squared(eqx.combine(p, static)(x) - y)

    return loss, filled(draw, params), (draw(B, 4), draw(B, 2))


@case
def equinox_gru_and_convolution(draw):
    import equinox as eqx

    net = {
        "conv": eqx.filter_eval_shape(eqx.nn.Conv1d, 2, 3, 3, stride=2, key=draw.key),
        "cell": eqx.filter_eval_shape(eqx.nn.GRUCell, 3, 4, key=draw.key),
        "head": eqx.filter_eval_shape(eqx.nn.Linear, 4, "scalar", key=draw.key),
    }
    params, static = eqx.partition(net, is_shape)

    def loss(p, x):
        net = eqx.combine(p, static)
        steps = net["conv"](x).T
        h, _ = jax.lax.scan(lambda h, x: (net["cell"](x, h), None), jnp.zeros(4, x.dtype), steps)
        return jnp.square(net["head"](h) - 1.0)

    return loss, filled(draw, params), (draw(B, 2, 9),)


@case
def haiku_lstm(draw):
    import haiku as hk

    def forward(xs):
        core = hk.LSTM(4)
        state = jax.tree.map(lambda x: x.astype(xs.dtype), core.initial_state(None))
        outs, _ = hk.dynamic_unroll(core, xs, state)
        return hk.Linear(3)(outs[-1])

    net = hk.without_apply_rng(hk.transform(forward))
    xs = draw(B, 5, 2)

    def loss(p, xs, y):
        return cross_entropy(net.apply(p, xs), y)

    return loss, filled(draw, jax.eval_shape(net.init, draw.key, xs[0])), (xs, draw.integers(3, B))


@case
def haiku_normalised_network_with_noise(draw):
    import haiku as hk

    def forward(x):
        x = hk.Conv2D(3, (2, 3), stride=2, data_format="NCHW")(x[None])[0]
        x = hk.LayerNorm((1, 2), True, True)(x)
        return hk.Linear(2)(hk.dropout(hk.next_rng_key(), 0.2, x.reshape(-1)))

    net = hk.transform(forward)
    images = draw(B, 2, 5, 4)

    def loss(p, x, key):
        return squared(jnp.tanh(net.apply(p, key, x)))

    return loss, filled(draw, jax.eval_shape(net.init, draw.key, images[0])), (images, draw.keys(B))
