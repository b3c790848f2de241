"""What a part's squared norm costs for one example, by either method: the planner's only source of figures."""

from typing import NamedTuple

# An operation of a block's one large product takes this share of the time of one of the pairs' many small ones.
# Measured on a CPU, by the transformer of the suite.
BLOCK_SPEED = 0.75


class Cost(NamedTuple):
    """Floating-point operations, and the numbers held while they are done."""

    flops: int
    numbers: int


class Sizes(NamedTuple):
    """The sizes of a part: block axes, summed positions, and the two sides."""

    n: int
    t: int
    p: int
    q: int


def pairs(sizes: Sizes, *, lookup: bool) -> Cost:
    """Inner products of all pairs of positions on both sides; two squared norms where there is one position.

    Rows that were looked up need no products on the side of the rows' numbers.
    """
    n, t, p, q = sizes
    sides = q if lookup else p + q
    if t == 1:
        return Cost(2 * n * sides, 0)
    return Cost(2 * n * t * t * (sides + 1), n * t * (t if lookup else 2 * t + sides))


def block(sizes: Sizes) -> Cost:
    """The gradient itself, then its square."""
    n, t, p, q = sizes
    return Cost(2 * n * p * q * (t + 1), n * p * q)


def weight_gradient(sizes: Sizes) -> int:
    """The operations of the product that makes the gradient: a third of what a layer costs, forward and backward."""
    n, t, p, q = sizes
    return 2 * n * t * p * q
