"""What each device holds, and what it sends and receives, from where the arguments lie."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import NamedSharding

from jgd._engine.plan import Plan
from jgd._engine.trees import residuals_of, taps_of, zeros


@dataclass(frozen=True)
class DeviceShare:
    """What one of several devices holds and sends.

    Attributes:
        devices: over how many devices the examples lie.
        examples: how many of them one device has.
        parameter_bytes: what it holds of the parameters.
        factor_bytes: the residuals of its examples, which it holds in place of their gradients.
        sum_bytes: what it receives for a sum, clipped or not: one all-reduce of its share of the gradient.
        norm_bytes: what it receives for norms: nothing where parameters lie whole on each device, as each has its
            own examples' factors; one number for each of its examples where they do not.
    """

    devices: int
    examples: int
    parameter_bytes: int
    factor_bytes: int
    sum_bytes: int
    norm_bytes: int

    def __str__(self) -> str:
        norms = "nothing" if self.norm_bytes == 0 else _bytes(self.norm_bytes)
        return (
            f"{self.devices} devices share the examples. Each holds {self.examples} of them, "
            f"{_bytes(self.parameter_bytes)} of parameters and {_bytes(self.factor_bytes)} of factors, and receives "
            f"{_bytes(self.sum_bytes)} for a sum or a clipped sum, {norms} for norms."
        )


def share_of(plan: Plan, size: int, params: Sequence[Any], batch: Sequence[Any]) -> DeviceShare | None:
    """One device's share; None if the examples lie on one device, or their place is not known."""
    pieces = max((size // max(_share(x)[0], 1) for x in batch), default=1)
    if pieces <= 1:
        return None
    parts = [_share(x) for x in params]
    held = sum(math.prod(shape) * x.dtype.itemsize for x, shape in zip(params, parts, strict=True))
    split = any(shape != x.shape for x, shape in zip(params, parts, strict=True))
    wide = sum(math.prod(shape) * max(4, x.dtype.itemsize) for x, shape in zip(params, parts, strict=True))
    examples = size // pieces
    return DeviceShare(
        pieces, examples, held, factor_bytes(plan) * examples, wide, 4 * examples if split else 0
    )


def factor_bytes(plan: Plan) -> int:
    """The bytes of one example's residuals."""
    one = jax.eval_shape(lambda: [zeros(plan.region, of) for of in (residuals_of, taps_of)])
    blocks = [plan.program.param_avals[leaf] for leaf in plan.dense]
    return bytes_of((one, blocks))


def bytes_of(tree: Any) -> int:
    """The bytes of a tree of arrays or shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _sharding(x: Any) -> NamedSharding | None:
    sharding = getattr(x, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def _share(x: Any) -> tuple[int, ...]:
    sharding = _sharding(x)
    return x.shape if sharding is None else sharding.shard_shape(x.shape)


def _bytes(number: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} B"
