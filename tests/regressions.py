"""A small regression to train, and a method that counts what it sees."""

import numpy as np
import optax

import jgd


def squared(params, x, y):
    return 0.5 * (x @ params["w"] + params["b"] - y) ** 2


PARAMS = {"w": np.zeros(3, np.float32), "b": 0.0}


def regression(size=23):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(size, 3)).astype(np.float32)
    return x, (x @ [1.0, -2.0, 3.0] + 0.5 + 0.1 * rng.normal(size=size)).astype(np.float32)


def method(learning_rate=0.1):
    return jgd.descent(squared, optax.sgd(learning_rate))


def counting(reduce=jgd.sum):
    """A method whose parameters count how often each example was seen: the gradient of w·onehot is onehot."""
    return jgd.ascent(lambda counts, onehot: counts @ onehot, optax.sgd(1.0), reduce=reduce)
