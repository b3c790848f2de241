"""Losses of every rule on inputs that are hard for floating point.

Each is a polynomial in the parameters and the positions `x`, `(T, D)`, so that it has a scale; the signs `s`, `(T,)`,
say whether the positions add up or cancel; `gain` scales the loss.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import Draw, Problem
from jax import lax

B, T, D = 8, 8, 24  # so that squared norms of products come from pairs of positions
LOSSES: dict[str, Callable[..., Any]] = {}


def _loss(build: Callable[..., Any]) -> Callable[..., Any]:
    """Enters `build(p, x, s)`, whose value is the loss at gain 1."""
    LOSSES[build.__name__] = lambda p, x, s, gain: gain * build(p, x, s)
    return build


def signed(s, y):
    return jnp.sum(s[:, None] * y)


@_loss
def product(p, x, s):
    return signed(s, (x @ p["w"]) * p["b"])


@_loss
def convolution(p, x, s):
    kernel = jnp.stack([p["w"], p["v"], p["w"]])  # a view of none, and so computed
    y = lax.conv_general_dilated(x[None], kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    return signed(s, y[0] * p["b"])


@_loss
def convolution_of_a_leaf(p, x, s):
    kernel = p["w"].reshape(2, D // 2, D)
    x = x[:, : D // 2]
    y = lax.conv_general_dilated(x[None], kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    return signed(s, y[0] * p["b"])


@_loss
def lookup(p, x, s):
    """One row at every position, or two."""
    rows = p["w"][(x[:, 0] > x[0, 1]).astype(jnp.int32)]
    return signed(s, rows * x * p["b"])


@_loss
def elementwise(p, x, s):
    return signed(s, x * p["b"] * p["b"][0] + p["b"])


@_loss
def steps(p, x, s):
    """The same weights at every step of a scan."""
    step = lambda total, pair: (total + pair[1] * jnp.sum((pair[0] @ p["w"]) * p["b"]), None)
    return lax.scan(step, jnp.zeros((), x.dtype), (x, s))[0]


@_loss
def layers(p, x, s):
    """Layers that a scan steps through."""
    h, _ = lax.scan(lambda h, w: (h @ w, None), x, jnp.stack([p["w"], p["v"]]))
    return signed(s, h * p["b"])


@_loss
def layers_of_a_leaf(p, x, s):
    h, _ = lax.scan(lambda h, w: (h @ w, None), x, p["layers"])
    return signed(s, h * p["b"])


@_loss
def tied(p, x, s):
    """Two uses of one weight at the same elements."""
    return signed(s, (x @ p["w"]) @ p["w"].T + x @ p["w"] * p["b"])


@_loss
def computed(p, x, s):
    """A weight that other parameters make."""
    return signed(s, x @ (p["w"] @ p["v"]))


@jax.custom_vjp
def _apart(x, w):
    return x @ w


_apart.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, ct: (ct @ kept[1].T, kept[0].T @ ct))


@_loss
def dense(p, x, s):
    """Data and a parameter meet inside a derivative of its own: no rule knows it."""
    return signed(s, _apart(x, p["w"]) * p["b"])


@jax.custom_jvp
def _twice(w):
    return w


_twice.defjvp(lambda w, t: (w[0], 2 * t[0]))


@_loss
def custom(p, x, s):
    """A derivative of its own on the way from a parameter to the data."""
    return signed(s, x @ _twice(p["w"]) * p["b"])


USED = {  # which parameters a loss has: one that it never meets would have gradients of 0
    "product": "wb", "convolution": "wvb", "convolution_of_a_leaf": "wb", "lookup": "wb", "elementwise": "b",
    "steps": "wb", "layers": "wvb", "layers_of_a_leaf": "lb", "tied": "wb", "computed": "wv", "dense": "wb",
    "custom": "wb",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Kind:
    """What the numbers are like.

    Positions are `offset` + `apart` · (the example's own) + `spread` · (the position's own), normal numbers; the
    parameters, the data and the loss are scaled.
    """

    spread: float = 1.0
    apart: float = 0.0
    offset: float = 0.0
    cancels: bool = False
    params: float = 1.0
    data: float = 1.0
    gain: float = 1.0

    @property
    def condition(self) -> float:
        """How much larger what cancels is than what is left of it.

        Squares by pairs of positions cancel twice as far, until they are not trusted.
        """
        return max(1.0, self.offset / self.spread, min(4e3, self.spread**-2) if self.cancels else 0.0)

    def in_few_bits(self) -> "Kind":
        """The same with scales that float16 has."""
        nearer = lambda scale: scale ** (1 / 6)
        gain = self.gain if self.offset else nearer(self.gain)
        return dataclasses.replace(self, params=nearer(self.params), data=nearer(self.data), gain=gain)


KINDS = {
    "ordinary": Kind(),
    "cancelling 1e-1": Kind(1e-1, 1.0, cancels=True),
    "cancelling 5e-2": Kind(5e-2, 1.0, cancels=True),
    "cancelling 1e-2": Kind(1e-2, 1.0, cancels=True),
    "cancelling 1e-3": Kind(1e-3, 1.0, cancels=True),
    "cancelling 1e-4": Kind(1e-4, 1.0, cancels=True),
    "offset 1e3 ± 1": Kind(offset=1e3, gain=1e-2),
    "offset 1e3 ± 0.01": Kind(spread=0.01, offset=1e3, gain=1e-2),
    "params 1e-6": Kind(params=1e-6),
    "params 1e6": Kind(params=1e6),
    "data 1e-6": Kind(data=1e-6),
    "data 1e6": Kind(data=1e6),
    "loss 1e-6": Kind(gain=1e-6),
    "loss 1e6": Kind(gain=1e6),
}
BEYOND = {
    "loss 1e-25": Kind(gain=1e-25),
    "loss 1e25": Kind(gain=1e25),
    "data 1e25, loss 1e-25": Kind(data=1e25, gain=1e-25),
    "data 1e-25, loss 1e25": Kind(data=1e-25, gain=1e25),
}


def problem_of(
    name: str, kind: Kind, dtype: Any, *, size: int = B, positions: int = T, seed: int = 5
) -> Problem:
    """The loss of that name on numbers of that kind, rounded to `dtype`."""
    kind = kind.in_few_bits() if dtype == jnp.float16 else kind
    draw = Draw(seed)
    arrays = {
        "w": draw(D, D, scale=0.2),
        "v": draw(D, D, scale=0.2),
        "b": draw(D),
        "layers": draw(2, D, D, scale=0.2),
    }
    params = {key: kind.params * x for key, x in arrays.items() if key[0] in USED[name]}
    x = (
        kind.offset
        + kind.apart * draw(size, 1, D, scale=1.0)
        + kind.spread * draw(size, positions, D, scale=1.0)
    )
    # Half of either sign, in no order: pairs of neighbours would cancel without a rounding.
    signs = np.where(draw.rng.permutation(positions) % 2 == 0, 1.0, -1.0 if kind.cancels else 1.0)
    batch = (kind.data * x, np.broadcast_to(signs, (size, positions)), np.full(size, kind.gain))
    rounded = lambda tree: jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64), dtype), tree)
    return Problem(LOSSES[name], rounded(params), rounded(batch))
