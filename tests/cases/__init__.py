"""The table of cases: losses of every kind that the tests put every reduction and every strategy to.

A case is a function of `draw` to `(loss, params, batch)` or `(loss, params, batch, options)`, where `options`
are arguments of `jgd.per_example_grad`; its name is the function's. Sizes differ pairwise where that is
possible, so that a transposed axis shows. To add one, write such a function under `@case` in the file whose
subject it is.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

B = 5  # examples in a batch

_SUBJECTS = (
    "dense",
    "parameters",
    "convolutions",
    "complex",
    "lookups",
    "sequences",
    "derivatives",
    "numerics",
    "models",
)


@dataclass(frozen=True)
class Problem:
    """A loss with arguments, ready for `per_example_grad(loss, **options)(params, *batch)`."""

    loss: Callable[..., Any]
    params: Any
    batch: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def has_aux(self) -> bool:
        return self.options.get("has_aux", False)

    @property
    def in_axes(self) -> Any:
        return self.options.get("in_axes") or (None,) + (0,) * len(self.batch)


class Draw:
    """Seeded random numbers, as numpy arrays: normal where called, uniform and integer where asked."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.seed = seed

    def __call__(self, *shape: int, scale: float = 0.6) -> np.ndarray:
        return self.rng.normal(size=shape) * scale

    def uniform(self, *shape: int, low: float = 0.5, high: float = 1.5) -> np.ndarray:
        return self.rng.uniform(low, high, size=shape)

    def integers(self, high: int, *shape: int) -> np.ndarray:
        return self.rng.integers(high, size=shape)

    @property
    def key(self) -> jax.Array:
        return jax.random.key(self.seed)

    def keys(self, number: int) -> jax.Array:
        return jax.random.split(self.key, number)


CASES: dict[str, Callable[[Draw], Any]] = {}


def case(build: Callable[[Draw], Any], name: str | None = None) -> Callable[[Draw], Any]:
    """Enters a case in the table."""
    name = name or build.__name__
    if name in CASES:
        raise ValueError(f"two cases are called {name!r}")
    CASES[name] = build
    return build


def problem(name: str, dtype: Any = None, *, batch_seed: int | None = None) -> Problem:
    """The case of that name in `dtype`, by default the widest that JAX's configuration allows.

    Another `batch_seed` gives the same loss and parameters with other examples of the same shapes.
    """
    dtype = dtype or jnp.result_type(float)
    loss, params, batch, *options = CASES[name](Draw(zlib.crc32(name.encode())))
    if batch_seed is not None:
        _, _, batch, *_ = CASES[name](Draw(batch_seed))
    return Problem(loss, _cast(params, dtype), _cast(tuple(batch), dtype), *options)


def _cast(tree: Any, dtype: Any) -> Any:
    def leaf(x):
        x = jnp.asarray(x)
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(leaf, tree)


for _subject in _SUBJECTS:
    import_module(f"cases.{_subject}")
