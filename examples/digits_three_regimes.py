"""A digit classifier in three regimes: an update after one example, after a few, after all of them."""

import time

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jgd

SIZES = (64, 32, 10)


def predict(params: list[tuple[jax.Array, jax.Array]], pixels: jax.Array) -> jax.Array:
    """The ten logits of one image."""
    (w1, b1), (w2, b2) = params
    return jnp.tanh(pixels @ w1 + b1) @ w2 + b2


def loss(params: list[tuple[jax.Array, jax.Array]], pixels: jax.Array, digit: jax.Array) -> jax.Array:
    """The cross-entropy of ONE image."""
    return optax.softmax_cross_entropy_with_integer_labels(predict(params, pixels), digit)


def initial(key: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """Random weights, zero biases."""
    shapes = zip(SIZES[:-1], SIZES[1:], jax.random.split(key, 2), strict=True)
    return [(jax.random.normal(k, (i, o)) / i**0.5, jnp.zeros(o)) for i, o, k in shapes]


images, digits = load_digits(return_X_y=True)
split = train_test_split(images / 16, digits, test_size=0.25, random_state=0)
train_x, test_x, train_y, test_y = (jnp.asarray(part) for part in split)
train_x, test_x = train_x.astype(jnp.float32), test_x.astype(jnp.float32)

print("batch size  learning rate  epochs  updates  seconds  accuracy")
for batch_size, rate, epochs in ((1, 0.03, 10), (32, 0.5, 20), (None, 1.0, 400)):
    method = jgd.descent(loss, optax.sgd(rate))
    began = time.perf_counter()
    result = jgd.fit(
        method,
        initial(jax.random.key(0)),
        (train_x, train_y),
        batch_size=batch_size,
        epochs=epochs,
        key=jax.random.key(1),
    )
    guesses = predict(result.params, test_x).argmax(-1)
    accuracy = jnp.mean(guesses == test_y)
    seconds = time.perf_counter() - began
    name, updates = batch_size or f"all {len(train_x)}", len(result.history.value)
    print(f"{name!s:>10}  {rate:13}  {epochs:6}  {updates:7}  {seconds:7.1f}  {accuracy:8.3f}")
    assert accuracy > 0.94, accuracy
    assert result.history.value[-10:].mean() < result.history.value[:10].mean() / 4
