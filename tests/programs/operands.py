"""Operands: what a step meets. A leaf, new or met before, behind a path that moves its elements or computes."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from programs.derivatives import ASKING, NONLINEAR, PRIMAL
from programs.drawing import Drawing, Operand, Shape

LEAVES = 6  # beyond which no new leaf is made where an old one will do


class Operands(Drawing):
    """Draws operands."""

    def operand(self, shape: Shape, depth: int = 0) -> Operand:
        """What a step meets: a function of the parameters to an array of this shape."""
        number, shape = next(self.numbers), tuple(map(int, shape))
        found, text = self.path(shape, depth)
        if number in self.without:
            found, text = (lambda env: jnp.full(shape, 0.7)), f"a constant {list(shape)}"
        elif number in self.plain:
            name = f"plain{number}"
            self.leaves[name] = np.cos(1.0 + np.arange(math.prod(shape))).reshape(shape)
            found, text = (lambda env: env.p[name]), name
        self.say(f"  with {text}  #{number}")
        return found

    def path(self, shape: Shape, depth: int = 0) -> tuple[Operand, str]:
        if self.loops and self.chance(0.35):
            return self.handed_in(shape)
        if depth > 2 or self.chance(0.45):
            return self.leaf(shape)
        if self.features and self.chance(0.4):
            changed = self.computed(shape, depth + 1)
            if changed is not None:
                return changed
        views = ["transpose", "reshape", "slice", "flip", "index", "split", "broadcast"]
        other = ["scaled", "tanh", "sum", "low rank", "normalised", "jit", "concatenated"]
        kind = self.pick(views + views + other)
        n, deeper = len(shape), depth + 1
        if kind == "transpose" and n > 1:
            order = [int(i) for i in self.rng.permutation(n)]
            source, text = self.path(tuple(shape[i] for i in np.argsort(order)), deeper)
            # The axis k of the operand is the axis order[k] of the source.
            back = [int(i) for i in order]
            if tuple(np.array(self._shape(source))[back]) != shape:
                return source, text
            return lambda env: jnp.transpose(source(env), back), f"{text}.transpose{back}"
        if kind == "reshape":
            source, text = self.path(self.factored(math.prod(shape)), deeper)
            return lambda env: jnp.reshape(source(env), shape), f"{text}.reshape{list(shape)}"
        if kind == "slice" and n:
            axis, start, stride = self.int(0, n - 1), self.int(0, 2), self.int(1, 2)
            end = start + max((shape[axis] - 1) * stride + 1, 0)  # of no elements, where it begins
            source, text = self.path((*shape[:axis], end + self.int(0, 1), *shape[axis + 1 :]), deeper)
            cut = lambda env: lax.slice_in_dim(source(env), start, end, stride, axis)
            return cut, f"{text}[{start}:{end}:{stride} of axis {axis}]"
        if kind == "flip" and n:
            axis = self.int(0, n - 1)
            source, text = self.path(shape, deeper)
            return lambda env: jnp.flip(source(env), axis), f"{text}.flip({axis})"
        if kind == "index":
            many = self.int(1, 3)
            at = self.int(0, many - 1)
            source, text = self.path((many, *shape), deeper)
            return lambda env: source(env)[at], f"{text}[{at}]"
        if kind == "split" and n:
            axis, which = self.int(0, n - 1), self.int(0, 1)
            source, text = self.path((*shape[:axis], 2 * shape[axis], *shape[axis + 1 :]), deeper)
            return lambda env: jnp.split(source(env), 2, axis)[which], f"{text}.split({axis})[{which}]"
        if kind == "broadcast" and n:
            kept = tuple(s if self.chance(0.6) else 1 for s in shape)
            source, text = self.path(kept, deeper)
            return lambda env: jnp.broadcast_to(source(env), shape), f"{text}.broadcast{list(shape)}"
        if kind in ("scaled", "tanh", "normalised", "jit"):
            source, text = self.path(shape, deeper)
            change = {
                "scaled": lambda w: 0.7 * w,
                "tanh": jnp.tanh,
                "normalised": lambda w: w / jnp.sqrt(jnp.sum(w * w) + 0.1),
                "jit": jax.jit(lambda w: jnp.flip(w, 0) if w.ndim else w),
            }[kind]
            return lambda env: change(source(env)), f"{kind}({text})"
        if kind == "sum":
            (a, first), (b, second) = self.path(shape, deeper), self.path(shape, deeper)
            return lambda env: a(env) + b(env), f"({first} + {second})"
        if kind == "low rank" and n == 2:
            (a, first), (b, second) = self.path((shape[0], 2), deeper), self.path((2, shape[1]), deeper)
            return lambda env: a(env) @ b(env), f"({first} @ {second})"
        if kind == "concatenated" and n and shape[0] > 1:
            cut = self.int(1, shape[0] - 1)
            (a, first), (b, second) = (
                self.path((cut, *shape[1:]), deeper), self.path((shape[0] - cut, *shape[1:]), deeper),
            )  # fmt: skip
            return lambda env: jnp.concatenate([a(env), b(env)]), f"[{first}, {second}]"
        return self.leaf(shape)

    def _shape(self, source: Operand) -> Shape:
        return jax.eval_shape(source, self.env).shape

    def leaf(self, shape: Shape) -> tuple[Operand, str]:
        same = [name for name, value in self.leaves.items() if value.shape == shape]
        if same and self.chance(0.7):
            name = self.pick(same)
            return lambda env: env.p[name], name
        size = math.prod(shape)
        larger = [name for name, value in self.leaves.items() if value.size >= size > 0]
        if larger and (len(self.leaves) >= LEAVES or self.chance(0.15)):
            name = self.pick(larger)
            start = self.int(0, self.leaves[name].size - size)
            part = lambda env: env.p[name].reshape(-1)[start : start + size].reshape(shape)
            return part, f"{name}.flat[{start}:{start + size}].reshape{list(shape)}"
        name = f"w{len(self.leaves)}"
        self.leaves[name] = self.values(shape)
        return lambda env: env.p[name], name

    def handed_in(self, shape: Shape) -> tuple[Operand, str]:
        """A slice of what the loop around steps through, or what was made outside of it."""
        loop, number = self.loops.pop(), next(self.numbers_of_slices)
        stepped = self.chance(0.7)
        source, text = self.path((loop.length, *shape) if stepped else shape, 1)
        (loop.stacked if stepped else loop.hoisted)[number] = source
        self.loops.append(loop)
        self.slices[number] = jax.ShapeDtypeStruct(shape, jnp.float64)
        return lambda env: env.slices[number], f"{'step of' if stepped else 'outer'} {text}"

    def computed(self, shape: Shape, depth: int) -> tuple[Operand, str] | None:
        """A path that computes: weights made out of others, custom derivatives; None where no feature asks for it."""
        pools: list[dict[str, Any]] = []
        if "nonlinear" in self.features:
            pools.append(NONLINEAR)
        if "asking" in self.features:
            pools.append({name: fun for name, (fun, operands) in ASKING.items() if operands == 1})
        if "primal" in self.features:
            pools.append(PRIMAL)
        if "computed" in self.features:
            mask = (np.arange(math.prod(shape)) % 3 > 0).reshape(shape)
            masked = {
                "masked": lambda w: w * mask,
                "where masked": lambda w: jnp.where(mask, w, 0.2),
                "scattered": lambda w: jnp.zeros(w.shape).at[..., ::2].set(w[..., ::2]) if w.ndim else w,
            }
            pools += [_COMPUTED, masked | ({"w + a @ b": None} if len(shape) == 2 else {})]
        if not pools:
            return None
        options = self.pick(pools)
        name = self.pick(sorted(options))
        source, text = self.path(shape, depth)
        if name == "w + a @ b":
            (a, first), (b, second) = self.path((shape[0], 2), depth), self.path((2, shape[1]), depth)
            return lambda env: source(env) + a(env) @ b(env), f"({text} + {first} @ {second})"
        change = options[name]
        return lambda env: change(source(env)), f"{name}({text})"


def _soft_threshold(w: jax.Array) -> jax.Array:
    return jnp.sign(w) * jax.nn.relu(jnp.abs(w) - 0.5)


def _spectrally_normalised(w: jax.Array) -> jax.Array:
    if w.ndim < 2 or not w.size:
        return w
    rows = w.reshape(w.shape[0], -1)
    v = jnp.ones(rows.shape[1])
    for _ in range(2):
        u = rows @ v
        v = rows.T @ (u / jnp.sqrt(u @ u + 0.1))
    return w / jnp.sqrt(v @ v + 0.1)


_COMPUTED: dict[str, Callable[[Any], Any]] = {
    "w / ‖w‖": lambda w: w / jnp.sqrt(jnp.sum(w * w) + 0.01),
    "w / ‖row‖": lambda w: w / jnp.sqrt(jnp.sum(w * w, -1, keepdims=True) + 0.01) if w.ndim else w,
    "soft threshold": _soft_threshold,
    "stopped in part": lambda w: w + 0.5 * lax.stop_gradient(w * w),
    "softmax": lambda w: jax.nn.softmax(w) if w.ndim and w.size else w,
    "standardised": lambda w: (w - jnp.mean(w)) / jnp.sqrt(jnp.var(w) + 0.1) if w.size else w,
    "spectral": _spectrally_normalised,
    "cumulative": lambda w: jnp.cumsum(w, 0) if w.ndim else w,
    "symmetric": lambda w: w + w.T if w.ndim == 2 and w.shape[0] == w.shape[1] else w,
    "checkpoint": jax.checkpoint(lambda w: jnp.sin(w) * w),
    "scanned": lambda w: (
        lax.scan(lambda c, row: (c + row, jnp.tanh(c)), jnp.zeros(w.shape[1:]), w)[1] + w if w.ndim else w
    ),
    "fori": lambda w: lax.fori_loop(0, 2, lambda k, w: jnp.sin(w) + 0.1 * w, w),
}
