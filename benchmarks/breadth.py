"""Kinds of research code beside the benchmark's models: `python benchmarks/breadth.py [WORDS OF A CASE ...]`.

For each case one line: time and temporary memory of norms and of a clipped sum, and the time of a variance, against the
plain gradient; the same of norms by `vmap(grad)`, and their time one example at a time; and how much longer the clipped
sum takes to trace and to compile. Times are the least of seven rounds, all programs of a case in turn.
"""

import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jgd

SIZE = 64  # examples
_keys = iter(jax.random.split(jax.random.key(0), 200))

Case = tuple[Callable[..., jax.Array], Any, tuple[jax.Array, ...]]


def normal(*shape: int, scale: float = 1.0) -> jax.Array:
    return scale * jax.random.normal(next(_keys), shape)


def integers(most: int, *shape: int) -> jax.Array:
    return jax.random.randint(next(_keys), shape, 0, most)


def wave(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.tanh(x))


@jax.custom_vjp
def one_bit(w: jax.Array) -> jax.Array:
    """The signs of weights, with the derivative of the identity."""
    return jnp.sign(w)


one_bit.defvjp(lambda w: (jnp.sign(w), None), lambda _, cotangent: (cotangent,))


def spectral(w: jax.Array, x: jax.Array) -> jax.Array:
    u = jnp.ones(w.shape[0])
    for _ in range(2):
        v = w.T @ u
        v = v / jnp.linalg.norm(v)
        u = w @ v
        u = u / jnp.linalg.norm(u)
    u, v = jax.lax.stop_gradient((u, v))
    return wave(x @ (w / (u @ w @ v)))


def unrolled(p: Any, xs: jax.Array) -> jax.Array:
    h = jnp.zeros(xs.shape[1])
    for x in xs:
        h = jnp.tanh(h @ p["w"] + x @ p["u"])
    return jnp.sum(h**2)


def scanned(p: Any, xs: jax.Array) -> jax.Array:
    step = lambda h, x: (jnp.tanh(h @ p["w"] + x @ p["u"]), None)
    return jnp.sum(jax.lax.scan(step, jnp.zeros(xs.shape[1]), xs)[0] ** 2)


def cases() -> dict[str, Case]:
    slice_of, rows = jax.lax.dynamic_slice, normal(SIZE, 16, 64)
    table, grid, starts = normal(20_000, 64), normal(512, 512), integers(19_000, SIZE)
    places, w, w0 = integers(500, SIZE, 2), normal(256, 256, scale=1 / 16), normal(256, 256, scale=1 / 16)
    low = {"a": normal(256, 8, scale=1 / 16), "b": normal(8, 256, scale=1 / 3)}
    normed = {"v": normal(256, 256), "g": jnp.ones(256)}
    recurrent = {"w": normal(64, 64, scale=1 / 8), "u": normal(64, 64, scale=1 / 8)}
    x, tokens, series = normal(SIZE, 256), normal(32, 16, 256), normal(32, 64, 64)
    mask = normal(256, 256) > 0
    merged = lambda p: w0 + p["a"] @ p["b"]
    unit = lambda w, g: w * g / jnp.linalg.norm(w, axis=0)
    shrunk = lambda w: jnp.sign(w) * jnp.maximum(jnp.abs(w) - 0.01, 0)
    return {
        "a slice of rows": (lambda p, s, x: wave(slice_of(p, (s, 0), (16, 64)) * x), table, (starts, rows)),
        "the same by ids": (lambda p, s, x: wave(p[s + jnp.arange(16)] * x), table, (starts, rows)),
        "a flat stretch": (
            lambda p, s, x: wave(p[s * 64 + jnp.arange(1024)] * x.reshape(-1)),
            table.reshape(-1),
            (starts, rows),
        ),
        "a patch of a grid": (
            lambda p, at, x: wave(slice_of(p, (at[0], at[1]), (4, 4)) * x),
            grid,
            (places, normal(SIZE, 4, 4)),
        ),
        "weight norm": (lambda p, x: wave(x @ unit(p["v"], p["g"])), normed, (x,)),
        "merged adapters": (lambda p, x: wave(x @ merged(p)), low, (x,)),
        "merged adapters, 16 tokens": (lambda p, x: wave(x @ merged(p)), low, (tokens,)),
        "merged adapters, weight norm": (
            lambda p, x: wave(x @ unit(merged(p), p["g"])),
            low | {"g": jnp.ones(256)},
            (x,),
        ),
        "a recurrence in a Python loop": (unrolled, recurrent, (series,)),
        "a recurrence by scan": (scanned, recurrent, (series,)),
        "soft-thresholded weights": (lambda p, x: wave(x @ shrunk(p)), w, (x,)),
        "one-bit weights": (lambda p, x: wave(x @ one_bit(p)), w, (x,)),
        "masked weights": (lambda p, x: wave(x @ (p * mask)), w, (x,)),
        "positive weights": (lambda p, x: wave(x @ jnp.exp(p - 4)), w, (x,)),
        "softmax of weights": (lambda p, x: wave(x @ jax.nn.softmax(p, axis=0)), w, (x,)),
        "spectral normalisation": (spectral, w, (x,)),
        "an L2 penalty in the loss": (lambda p, x: wave(x @ p) + 0.5 * jnp.sum(p**2), w, (x,)),
        "Kronecker factors": (
            lambda p, x: wave(p["l"] @ x.reshape(16, 16) @ p["r"]),
            {"l": normal(16, 16, scale=1 / 4), "r": normal(16, 16, scale=1 / 4)},
            (x,),
        ),
    }


def programs(case: Case) -> list[Callable[..., Any]]:
    """The plain gradient; norms, a clipped sum and a variance by jgd; norms by `vmap(grad)`, and one by one."""
    loss, _, batch = case
    axes = (None, *(0 for _ in batch))
    gradients = jgd.per_example_grad(loss)

    def norms(blocks: Any) -> jax.Array:
        return jnp.sqrt(sum(jnp.sum(x.reshape(x.shape[0], -1) ** 2, axis=1) for x in jax.tree.leaves(blocks)))

    def one_by_one(p: Any, *batch: jax.Array) -> jax.Array:
        of_one = lambda one: norms(jax.tree.map(lambda x: x[None], jax.grad(loss)(p, *one)))[0]
        return jax.lax.map(of_one, batch)

    return [
        lambda p, *batch: jax.grad(lambda p: jnp.mean(jax.vmap(loss, axes)(p, *batch)))(p),
        lambda p, *batch: jgd.norms(gradients(p, *batch)),
        lambda p, *batch: jgd.clipped_sum(gradients(p, *batch), 1.0),
        lambda p, *batch: jgd.variance(gradients(p, *batch)),
        lambda p, *batch: norms(jax.vmap(jax.grad(loss), axes)(p, *batch)),
        one_by_one,
    ]


def built(fun: Callable[..., Any], args: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    compiled = jax.jit(fun).lower(*args).compile()
    seconds = time.perf_counter() - started
    for _ in range(2):
        jax.block_until_ready(compiled(*args))
    return compiled, seconds


def least_times(compiled: list[Any], args: Any, rounds: int = 7) -> list[float]:
    least = [float("inf")] * len(compiled)
    for _, (i, run) in itertools.product(range(rounds), enumerate(compiled)):
        started, count = time.perf_counter(), 0
        while count == 0 or (time.perf_counter() - started < 0.03 and count < 50):
            jax.block_until_ready(run(*args))
            count += 1
        least[i] = min(least[i], (time.perf_counter() - started) / count)
    return least


def main(words: list[str]) -> None:
    print(
        f"jax {jax.__version__}\n{'':30s} {'norms':>14s} {'clipped sum':>14s} {'var':>6s} {'vmap(grad)':>16s}"
        f" {'1 by 1':>6s} {'build':>6s} {'plain':>8s}"
    )
    for name, case in cases().items():
        if words and not any(word in name for word in words):
            continue
        args = case[1], *case[2]
        compiled, seconds = zip(*(built(fun, args) for fun in programs(case)), strict=True)
        times = least_times(list(compiled), args)
        memory = [max(1, x.memory_analysis().temp_size_in_bytes) for x in compiled]
        both = lambda i, of=(times, memory): f"{of[0][i] / of[0][0]:6.2f}x {of[1][i] / of[1][0]:6.2f}x"
        print(
            f"{name:30s} {both(1)} {both(2)} {times[3] / times[0]:5.2f}x {both(4)} {times[5] / times[0]:5.2f}x"
            f" {seconds[2] / seconds[0]:5.1f}x {times[0] * 1e3:6.2f}ms",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
