"""What every part of the generator draws with, and the types that its parts hand on."""

import importlib.metadata
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# What a program may have beside products, convolutions, lookups, arithmetic, norms and control flow.
FEATURES = frozenset({
    "changed", "complex", "asking", "nonlinear", "primal", "windows", "ids", "computed", "unrolled", "small",
})  # fmt: skip

# Those that cannot be asked for, and why. The tests draw from the others.
KNOWN_TO_FAIL: dict[str, str] = {}
if importlib.metadata.version("jaxlib").startswith("0.10."):
    KNOWN_TO_FAIL["ids"] = "XLA wraps bounds to the dtype of narrow ids, and so `vmap(grad)` itself is wrong"
MENDED = FEATURES - set(KNOWN_TO_FAIL)


class Env(NamedTuple):
    """What the steps of one example see beside the array that passes through them."""

    p: dict[str, Any]
    indices: Any  # (4,), some of them out of bounds
    slices: dict[int, Any]  # what the loops around hand in, by number


Shape = tuple[int, ...]
Step = Callable[[Env, jax.Array], jax.Array]
Operand = Callable[[Env], jax.Array]
Change = Callable[[], None]


@dataclass
class Loop:
    """A scan or a vmap around steps: it steps through `stacked` operands, and shares `hoisted` ones."""

    length: int
    stacked: dict[int, Operand] = field(default_factory=dict)
    hoisted: dict[int, Operand] = field(default_factory=dict)

    def inputs(self, env: Env) -> tuple[dict[int, Any], dict[int, Any]]:
        return {k: f(env) for k, f in self.stacked.items()}, {k: f(env) for k, f in self.hoisted.items()}


class Sizes(NamedTuple):
    """How large programs are: of the example's axes, of what is cut down, of a product's new axes."""

    axes: Sequence[int] = (2, 3, 4)
    largest: int = 40  # elements beyond which a step's output is cut down
    cut: Sequence[int] = (6, 8, 12)
    free: Sequence[int] = (1, 2, 3)


# So large that a compiler treats the arrays of five examples as it treats large ones: XLA's kernels begin at 4,096.
SMALL = Sizes()
WIDE = Sizes((8, 12, 16), 2048, (128, 240, 512), (8, 12, 24))


def fit(x: jax.Array, shape: Shape) -> jax.Array:
    """The elements of `x` in another shape, repeated or cut off; zeros, where it has none."""
    return jnp.resize(x, shape) if x.size else jnp.zeros(shape, x.dtype)


class Drawing:
    """Random choices out of one seed; `text` says what was drawn.

    Every step and every operand has a number, in the order of drawing. One that is in `without` is drawn like the
    others, and then left out: a step only fits its array to the shape it would have made, an operand is a constant.
    One that is in `plain` is an operand that is a leaf of its own, without a path. So a failing program shrinks.
    """

    def __init__(
        self,
        seed: Any,
        features: frozenset[str],
        without: frozenset[int] = frozenset(),
        plain: frozenset[int] = frozenset(),
        sizes: Sizes = SMALL,
    ):
        self.rng = np.random.default_rng(seed)
        self.features, self.without, self.plain, self.sizes = features, without, plain, sizes
        self.leaves: dict[str, np.ndarray] = {}
        self.text: list[str] = []
        self.loops: list[Loop] = []
        self.slices: dict[int, jax.ShapeDtypeStruct] = {}
        self.changes: list[Change] = []
        self.numbers_of_slices, self.numbers = itertools.count(), itertools.count()
        self.index_dtype: Any = np.int64
        self.depth = 0

    def has(self, feature: str, probability: float = 1.0) -> bool:
        """Whether a feature is on and its turn has come; nothing is drawn where it is off."""
        return feature in self.features and (probability == 1.0 or self.chance(probability))

    def say(self, text: str) -> None:
        self.text.append("  " * (self.depth + 1) + text)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def pick(self, options: Sequence[Any]) -> Any:
        return options[self.rng.integers(len(options))]

    def int(self, low: int, high: int) -> int:
        """Both ends included."""
        return int(self.rng.integers(low, high + 1))

    def shuffled(self, items: Sequence[Any]) -> list[Any]:
        return [items[i] for i in self.rng.permutation(len(items))]

    def factored(self, size: int) -> Shape:
        """A shape of one to three axes of that size."""
        shape = [size]
        for _ in range(self.int(0, 2)):
            n = shape.pop()
            d = self.pick([d for d in range(1, n + 1) if n % d == 0] or [1])
            shape += [d, n // d]
        return tuple(shape)

    def shape_of(self, step: Step, shape: Shape) -> Shape:
        x = jax.ShapeDtypeStruct(shape, jnp.float64)
        return jax.eval_shape(step, self.env, x).shape

    @property
    def env(self) -> Env:
        return Env(self.leaves, jax.ShapeDtypeStruct((4,), self.index_dtype), self.slices)

    def values(self, shape: Shape) -> np.ndarray:
        """Numbers that one can divide by."""
        return self.rng.uniform(0.4, 1.2, size=shape) * self.rng.choice([-1, 1], size=shape)
