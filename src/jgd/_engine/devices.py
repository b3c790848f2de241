"""What each platform does in a second: the constants by which plans are chosen."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

from jgd._errors import is_concrete


class Device(NamedTuple):
    """What a device does in a second. Plans depend on the ratios alone.

    Attributes:
        large: operations of one large product.
        small: operations of many small products, of one example's positions by its positions.
        half: the same of numbers in half precision.
        bandwidth: bytes written by one operation and read by the next.
        cache: bytes of residuals that the backward pass of some examples still finds in the processor's cache, so that
            it is quicker than a whole batch's; None where a pass over few examples leaves most of the device idle.
        tile: numbers that are built at once, where it may be done in pieces: such as stay in a processor's cache, and
            on an accelerator so many that all of it is busy.
    """

    large: float
    small: float
    half: float
    bandwidth: float
    cache: int | None = None
    tile: int = 1 << 25

    def seconds(self, *, large: int = 0, small: int = 0, half: int = 0, moved: int = 0) -> float:
        """The time of so many operations of each kind, and of so many float32 numbers read or written."""
        return large / self.large + small / self.small + half / self.half + 4 * moved / self.bandwidth


# The first two rows were measured, by `python benchmarks/calibrate.py`: the medians of three calls, on two cores of an
# AMD EPYC (Zen 4), and of two on an NVIDIA H200. Products of float32 that make gradients are in TF32 there, JAX's
# default, and small ones in float32, as the engine asks for; `large` is what weight gradients of 512 × 4096 × 4096
# reached inside of a program (a product of 8192³ by itself reached 355e12). The last row is of published peaks of one
# chip of a TPU v4, bfloat16, its default (Google Cloud, "TPU v4"); that small products reach half is an assumption.
DEVICES = {
    "cpu": Device(large=205e9, small=101e9, half=101e9, bandwidth=14e9, cache=24 << 20, tile=1 << 20),
    "gpu": Device(large=200e12, small=40.3e12, half=195e12, bandwidth=2710e9),
    "tpu": Device(large=275e12, small=137e12, half=137e12, bandwidth=1228e9),
}


def device_of(platform: str) -> Device:
    """The constants of a platform; a GPU's for one that has no row."""
    return DEVICES.get(platform, DEVICES["gpu"])


def platform_of(arrays: Iterable[Any]) -> str:
    """The platform that arrays lie on; the default one if all of them are traced, or shapes."""
    for x in arrays:
        if isinstance(x, jax.Array) and is_concrete(x):
            return next(iter(x.sharding.device_set)).platform
    return jax.default_backend()
