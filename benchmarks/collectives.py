"""Counts what the devices of a mesh send each other for each reduction, against the plain gradient.

    python benchmarks/collectives.py --models mlp transformer --devices 1 2 8 64 256

Everything is compiled for so many simulated CPU devices, nothing is run: batches lie over all the devices, and
parameters on each. Prints a Markdown table: how many collectives run, and the bytes of their results on each device.
"""

import argparse
import json
import os
import subprocess
import sys

EXAMPLES = 512
QUANTITIES = ("plain", "norms", "clipped_sum", "noise_scale", "gram")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["mlp", "cnn", "transformer", "gru", "bag"])
    parser.add_argument("--full", nargs="*", default=[], help="models to compile in full size as well")
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 2, 8, 64, 256])
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    models = [(name, True) for name in options.models] + [(name, False) for name in options.full]
    if options.count:
        for name, small in models:
            print(json.dumps(measured(name, small)), flush=True)
        return
    print(f"| {EXAMPLES} examples | devices | " + " | ".join(QUANTITIES) + " |")
    print("| --- | --: |" + " --: |" * len(QUANTITIES))
    rows = {count: in_process(count, options) for count in options.devices}
    for k, (name, small) in enumerate(models):
        for count in options.devices:
            cells = (f"{number}, {amount(size)}" for number, size in rows[count][k])
            print(f"| {name}{' (small)' if small else ''} | {count} | " + " | ".join(cells) + " |")


def in_process(count: int, options: argparse.Namespace) -> list[list[tuple[int, int]]]:
    """The rows of the table for so many devices: JAX makes them when it starts."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    command = [
        sys.executable,
        __file__,
        "--count",
        str(count),
        "--models",
        *options.models,
        "--full",
        *options.full,
    ]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def measured(name: str, small: bool) -> list[tuple[int, int]]:
    """Of one model, the traffic of each quantity."""
    import jax

    from jgd._bench.collectives import collectives, traffic
    from jgd._bench.models import build
    from jgd._bench.quantities import by_jgd, plain

    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    model = build(name, small=small)
    placed = lambda x, shape, *spec: jax.ShapeDtypeStruct(
        shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    )
    whole = lambda tree: jax.tree.map(lambda x: placed(x, x.shape), tree)
    spread = lambda tree: jax.tree.map(lambda x: placed(x, (EXAMPLES, *x.shape[1:]), "data"), tree)
    batch = [
        whole(x) if axis is None else spread(x) for x, axis in zip(model.batch, model.axes[1:], strict=True)
    ]

    def of(quantity: str) -> tuple[int, int]:
        compute = plain(model) if quantity == "plain" else by_jgd(model, quantity, strategy="factored")
        return traffic(collectives(jax.jit(compute).lower(whole(model.params), *batch).compile().as_text()))

    return [of(quantity) for quantity in QUANTITIES]


def amount(size: int) -> str:
    """Bytes, in a unit that one can read."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} B"


if __name__ == "__main__":
    main()
