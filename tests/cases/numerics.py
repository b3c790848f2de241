"""Linear algebra, normalisation, complex numbers, randomness."""

import jax
import jax.numpy as jnp
import jax.scipy as jsp

from cases import B, case
from cases.dense import mlp, mlp_params, squared


@case
def triangular_solve(draw):
    def loss(p, x):
        lower = jnp.tril(p, -1) + jnp.diag(jnp.exp(jnp.diag(p)))
        white = jsp.linalg.solve_triangular(lower, x, lower=True)
        return squared(white) + jnp.sum(jnp.diag(p))

    return loss, draw(4, 4), (draw(B, 4),)


@case
def gaussian_likelihood_by_cholesky(draw):
    """A factorisation of a matrix in which parameters and data meet."""

    def loss(p, x, y):
        features = jnp.tanh(x @ p["w"])
        covariance = features @ features.T + jnp.exp(p["noise"]) * jnp.eye(3, dtype=x.dtype)
        factor = jnp.linalg.cholesky(covariance)
        return squared(jsp.linalg.solve_triangular(factor, y, lower=True)) + jnp.log(jnp.diag(factor)).sum()

    return loss, {"w": draw(4, 2), "noise": draw()}, (draw(B, 3, 4), draw(B, 3))


@case
def linear_solve_and_determinant(draw):
    def loss(p, x):
        matrix = p + jnp.diag(x)
        return squared(jnp.linalg.solve(matrix, x)) + jnp.linalg.slogdet(matrix)[1]

    return loss, draw(3, 3, scale=0.1), (draw.uniform(B, 3),)


@case
def fourier_filter(draw):
    """Complex numbers between real parameters and a real loss."""

    def loss(p, x):
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))  # there is no transform of bfloat16
        spectrum = jnp.fft.rfft(x) * (p["real"] + 1j * p["imaginary"])
        return squared(jnp.tanh(jnp.fft.irfft(spectrum, 6)))

    return loss, {"real": draw(4), "imaginary": draw(4)}, (draw(B, 6),)


def _normalise(x, axes):
    return (x - x.mean(axes, keepdims=True)) / jnp.sqrt(x.var(axes, keepdims=True) + 1e-3)


@case
def layer_norm(draw):
    loss = lambda p, x: squared(jnp.tanh(_normalise(x @ p["w"], -1) * p["scale"] + p["bias"]))
    return loss, {"w": draw(4, 6), "scale": draw.uniform(6), "bias": draw(6)}, (draw(B, 3, 4),)


@case
def rms_norm(draw):
    def loss(p, x):
        normed = x / jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True)) * (1.0 + p["scale"])
        return squared(jnp.tanh(normed @ p["w"]))

    return loss, {"scale": draw(4), "w": draw(4, 6)}, (draw(B, 3, 4),)


@case
def group_norm(draw):
    def loss(p, x):
        groups = _normalise(x.reshape(3, 5, 2, 2), (0, 1, 3)).reshape(3, 5, 4)
        return squared(jnp.tanh(groups * p["scale"] + p["bias"]) @ p["w"])

    return loss, {"scale": draw.uniform(4), "bias": draw(4), "w": draw(4, 2)}, (draw(B, 3, 5, 4),)


@case
def dropout(draw):
    """Examples that carry their own random keys."""

    def loss(p, x, key):
        hidden = jnp.tanh(x @ p["in"]["w"] + p["in"]["b"])
        kept = jax.random.bernoulli(key, 0.6, hidden.shape)
        return squared(jnp.where(kept, hidden / 0.6, 0) @ p["out"]["w"] + p["out"]["b"])

    return loss, mlp_params(draw, 4, 6, 2), (draw(B, 3, 4), draw.keys(B))


@case
def dropped_weights(draw):
    """Noise on the weights: each example has its own matrix."""

    def loss(p, x, key):
        noise = jax.random.normal(key, p["mean"].shape, x.dtype)
        return squared(jnp.tanh(x @ (p["mean"] + jnp.exp(p["log_scale"]) * noise)))

    return loss, {"mean": draw(4, 3), "log_scale": draw(4, 3)}, (draw(B, 2, 4), draw.keys(B))


@case
def variational_autoencoder(draw):
    def loss(p, x, key):
        mean, log_scale = jnp.split(mlp(p["encoder"], x), 2)
        code = mean + jnp.exp(log_scale) * jax.random.normal(key, mean.shape, x.dtype)
        divergence = 0.5 * jnp.sum(jnp.exp(2 * log_scale) + mean**2 - 1 - 2 * log_scale)
        return squared(mlp(p["decoder"], code) - x) + divergence

    params = {"encoder": mlp_params(draw, 7, 5, 4), "decoder": mlp_params(draw, 2, 3, 7)}
    return loss, params, (draw(B, 7), draw.keys(B))


@case
def raw_keys_and_random_masks(draw):
    """The old kind of key, an array of integers."""

    def loss(p, x, seed):
        mask = jax.random.bernoulli(jax.random.PRNGKey(seed), 0.5, (3,))
        return squared(x @ p * mask)

    return loss, draw(4, 3), (draw(B, 4), draw.integers(99, B))


@case
def hard_to_reach_zero_gradient(draw):
    """Example 0 has a gradient of exactly zero, through a square root guarded by where."""

    def loss(p, x):
        square = jnp.sum(jnp.square(x @ p))
        positive = square > 0
        return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)

    x = draw(B, 4)
    x[0] = 0
    return loss, draw(4, 3), (x,)
