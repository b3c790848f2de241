"""Measures this machine's row of the table of devices, by which plans are chosen (src/jgd/_engine/devices.py).

`python benchmarks/calibrate.py` prints the row to paste, and how the one that is stored differs. The programs take
turns, and each counts by its median run: the fastest of many small products is one that happened to spread over all
cores, which they seldom do inside of a larger program. What plans move is blocks of gradients, so the bandwidth is
that of blocks: the time of gradients of few positions and of their squares, less that of the operations. The cache is
what the examples of one pass leave where a batch goes quickest, some of them at a time.
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jgd._clock import time_interleaved
from jgd._engine import costs
from jgd._engine.costs import Sizes
from jgd._engine.devices import DEVICES, Device, device_of
from jgd._engine.factors import contract


class Programs(NamedTuple):
    """How large the programs are: such that they keep the device busy, and take much longer than to start.

    Attributes:
        side: of the large product.
        pairs: `n` is the number of the examples.
        blocks: so few positions that the blocks take longer to move than to make.
    """

    side: int
    pairs: Sizes
    blocks: Sizes


ON_CPU = Programs(1024, Sizes(64, 64, 64, 64), Sizes(256, 8, 128, 128))
ON_ACCELERATOR = Programs(2048, Sizes(256, 512, 512, 512), Sizes(1024, 8, 512, 512))
LAYERS, POSITIONS, WIDTH, EXAMPLES = 8, 128, 256, 96  # of the net whose examples go some at a time
LEFT = 3  # arrays of each layer, for its backward pass: the product, and what goes into tanh and comes out
AT_A_TIME = (2, 4, 8, 16, 32, 96)


def pairs(left: jax.Array, right: jax.Array) -> jax.Array:
    """The squared norms of the gradients Σₜ left[n, t] ⊗ right[n, t], from pairs of positions."""
    products = [contract("ntp,nsp->nts", side, side) for side in (left, right)]
    return contract("nts,nts->n", *products)


def blocks(left: jax.Array, right: jax.Array) -> jax.Array:
    """The same from the gradients themselves."""
    return jnp.sum(jnp.square(jnp.einsum("ntp,ntq->npq", left, right)), axis=(1, 2))


def scales(examples: jax.Array, weights: jax.Array, *, at_a_time: int) -> jax.Array:
    """The gradients of a net's few scales, made so many examples at a time."""

    def loss(scales: jax.Array, x: jax.Array) -> jax.Array:
        for weight, scale in zip(weights, scales, strict=True):
            x = jnp.tanh(scale * (x @ weight))
        return jnp.sum(x)

    gradient = lambda x: jax.grad(loss)(jnp.full(LAYERS, 0.1), x)
    return jax.lax.map(gradient, examples, batch_size=at_a_time)


def _program(function: Callable[..., Any], *shapes: tuple[int, ...], dtype: Any = None) -> Callable[[], Any]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    args = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]
    compiled = jax.jit(function).lower(*args).compile()
    return lambda: jax.block_until_ready(compiled(*args))


def measure(repeats: int, seconds: float) -> Device:
    """The row of the default device; an accelerator's has no cache, since few examples leave most of it idle."""
    on_cpu = jax.default_backend() == "cpu"
    size = ON_CPU if on_cpu else ON_ACCELERATOR
    factors = lambda sizes: ((sizes.n, sizes.t, sizes.p), (sizes.n, sizes.t, sizes.q))
    programs = {
        "large": _program(jnp.matmul, (size.side, size.side), (size.side, size.side)),
        "small": _program(pairs, *factors(size.pairs)),
        "half": _program(pairs, *factors(size.pairs), dtype=jnp.bfloat16),
        "moved": _program(blocks, *factors(size.blocks)),
    }
    for number in AT_A_TIME if on_cpu else ():
        shapes = (EXAMPLES, POSITIONS, WIDTH), (LAYERS, WIDTH, WIDTH)
        programs[f"{number} at a time"] = _program(functools.partial(scales, at_a_time=number), *shapes)
    times = time_interleaved(programs, repeats=repeats, seconds=seconds)
    usual = {name: statistics.median(each) for name, each in times.items()}
    large = 2 * size.side**3 / usual["large"]
    one = lambda sizes: sizes._replace(n=1)
    block = costs.block(one(size.blocks))
    bandwidth = 4 * size.blocks.n * block.moved / (usual["moved"] - size.blocks.n * block.flops / large)
    flops = size.pairs.n * costs.pairs(one(size.pairs), lookups=0).flops
    row = Device(large, flops / usual["small"], flops / usual["half"], bandwidth)
    row = row._replace(tile=device_of(jax.default_backend()).tile)
    if not on_cpu:
        return row
    best = min(AT_A_TIME, key=lambda number: usual[f"{number} at a time"])
    return row._replace(cache=LEFT * 4 * LAYERS * POSITIONS * WIDTH * best)


def text(row: Device, kind: str, platform: str) -> str:
    """The row as it stands in the table."""
    rates = {name: value for name, value in row._asdict().items() if name not in ("cache", "tile")}
    numbers = ", ".join(f"{name}={value / 1e9:.3g}e9" for name, value in rates.items())
    numbers += "" if row.cache is None else f", cache={row.cache >> 20} << 20"
    return f'    "{platform}": Device({numbers}),  # {kind}'


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repeats", type=int, default=200, help="runs of each program, at most (default: 200)"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="a program that took this long rests")
    options = parser.parse_args()
    device = jax.devices()[0]
    row = measure(options.repeats, options.seconds)
    print(text(row, device.device_kind, device.platform))
    stored = DEVICES.get(device.platform)
    if stored is None:
        print(f"There is no row for {device.platform!r}.")
        return
    for name, value, other in zip(row._fields, row, stored, strict=True):
        if name == "tile":  # not measured
            continue
        if not value or not other:
            print(f"{name:9}  measured {value}  stored {other}")
            continue
        print(f"{name:9}  measured {value / 1e9:10.4g}e9  stored {other / 1e9:10.4g}e9  {value / other:.2f}×")


if __name__ == "__main__":
    main()
