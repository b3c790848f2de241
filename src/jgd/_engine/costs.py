"""What a part costs for one example, by either method: the planner's only source of figures."""

from typing import NamedTuple

from jgd._engine.devices import Device


class Cost(NamedTuple):
    """What a computation takes.

    Attributes:
        flops: floating-point operations.
        numbers: the numbers held while they are done.
        moved: the numbers read and written, beside the factors that every method reads. The results of small products
            are not counted: the rate of small products includes them.
        small: whether the operations are those of many small products.
        half: whether these are of numbers in half precision.
    """

    flops: int
    numbers: int
    moved: int
    small: bool = False
    half: bool = False

    def seconds(self, device: Device) -> float:
        """The time predicted."""
        kind = ("half" if self.half else "small") if self.small else "large"
        return device.seconds(**{kind: self.flops}, moved=self.moved)


class Sizes(NamedTuple):
    """The sizes of a part: block axes, summed positions, and the two sides."""

    n: int
    t: int
    p: int
    q: int


def pairs(sizes: Sizes, *, lookups: int, half: bool = False) -> Cost:
    """Inner products of all pairs of positions on both sides; two squared norms if there is one position.

    Positions that are `lookups` compare row numbers, and need no products over p.
    """
    n, t, p, q = sizes
    others = t - lookups
    if t == 1:
        sides = n * (q + others * p)
        return Cost(2 * sides, 0, sides)
    held = n * t * (2 * t + p + q if others else t)
    return Cost(2 * n * (t * t * (q + 1) + others * others * p), held, 0, small=True, half=half)


def block(sizes: Sizes) -> Cost:
    """The gradient itself, then its square."""
    n, t, p, q = sizes
    return Cost(2 * n * p * q * (t + 1), n * p * q, 2 * n * p * q)


def weight_gradient(sizes: Sizes, *, lookup: bool = False) -> Cost:
    """The product that makes the gradient of a batch: a third of what a layer costs, forward and backward.

    Looking up rows is no product: they are read and written.
    """
    n, t, p, q = sizes
    return Cost(0, 0, 2 * n * t * q) if lookup else Cost(2 * n * t * p * q, 0, 0)
