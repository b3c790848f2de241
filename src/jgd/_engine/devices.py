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
        bandwidth: bytes written by one operation and read by the next.
        cache: bytes of residuals that the backward pass of some examples still finds in the processor's cache, so that
            it is quicker than a whole batch's; None where a pass over few examples leaves most of the device idle.
    """

    large: float
    small: float
    bandwidth: float
    cache: int | None = None

    def seconds(self, *, large: int = 0, small: int = 0, moved: int = 0) -> float:
        """The time of so many operations of either kind, and of so many float32 numbers read or written."""
        return large / self.large + small / self.small + 4 * moved / self.bandwidth


# The first row was measured, by `python benchmarks/calibrate.py`: the medians of three calls, on two cores of an AMD
# EPYC (Zen 4). The others are published peaks and not measured: of an A100 of 80 GB, TF32, which products of float32
# take there by default (NVIDIA A100 Tensor Core GPU datasheet), and of one chip of a TPU v4, bfloat16, for the same
# reason (Google Cloud, "TPU v4"). That small products reach half of the peak is an assumption.
DEVICES = {
    "cpu": Device(large=205e9, small=101e9, bandwidth=14e9, cache=24 << 20),
    "gpu": Device(large=156e12, small=78e12, bandwidth=2039e9),
    "tpu": Device(large=275e12, small=137e12, bandwidth=1228e9),
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
