"""Lookups of rows and windows, by integers of the example's."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from programs.drawing import Env, Shape, Step
from programs.products import Products

# JAX computes with the number of rows in the integers' own type, and refuses where it does not fit.
_WRAPPING = ("take wrap", "at fill nan", "in bounds", "w[i]", "w[i, j]")


class Lookups(Products):
    """Draws steps that look up."""

    def lookup(self, shape: Shape) -> Step:
        """Rows of a table by the example's integers, or by where its array is largest."""
        rows, width = self.int(2, 4), self.int(1, 3)
        if self.has("ids", 0.3):
            rows = self.pick([1, 100, 130, 260, 300])  # on both sides of what a narrow integer counts to
        elif self.has("small", 0.2):
            rows = 1
        axis = self.int(0, 1)
        names = [
            "take clip",
            "take fill",
            "take wrap",
            "w[i]",
            "w[i, j]",
            "w[i][0]",
            "w[argmax]",
            "dynamic slice",
            "in bounds",
        ]
        if "ids" in self.features:
            names += ["take nan", "at fill nan", "w[i]", "index in dim", "take clip"]
        name = self.pick(names)
        if name in _WRAPPING and (name == "take wrap" or jnp.issubdtype(self.index_dtype, jnp.signedinteger)):
            rows = min(rows, int(jnp.iinfo(self.index_dtype).max))
        self.say(f"lookup, {name}, axis {axis}")
        operand = self.operand(
            (rows, width)
            if axis == 0 or name not in ("take clip", "take fill", "take wrap")
            else (width, rows)
        )
        merge = self.merging()

        def found(env: Env, x: jax.Array) -> jax.Array:
            table, ix = operand(env), env.indices
            if name == "take nan":
                return jnp.where(_padding(ix, rows)[:, None], 0.0, jnp.sin(jnp.take(table, ix, 0)))
            if name == "at fill nan":
                looked_up = table.at[ix].get(mode="fill", fill_value=jnp.nan)
                return jnp.where(_padding(ix, rows)[:, None], 0.0, looked_up)
            if name == "index in dim":
                return lax.dynamic_index_in_dim(table, ix[0], 0, keepdims=False)
            if name.startswith("take"):
                return jnp.take(table, ix, axis, mode=name.split()[1], fill_value=0.3)
            if name == "in bounds":
                return table.at[within(ix, rows)].get(mode="promise_in_bounds")
            if name == "w[i, j]":
                return table[within(ix, rows), within(jnp.flip(ix), width)]
            if name == "w[i][0]":
                return table[within(ix[0], rows)]
            if name == "w[argmax]":
                return table[jnp.argmax(x) % rows]
            if name == "dynamic slice":
                return lax.dynamic_slice(table, (ix[0], jnp.zeros_like(ix[0])), (1, width))
            return table[within(ix, rows)]

        return lambda env, x: merge(x, found(env, x))

    def window(self, shape: Shape) -> Step:
        """Parts of an array at a place that the example says: read, or written to."""
        names = [
            "slice of w", "slice of x w", "w into x", "x into w", "windows of w", "windows filled", "w rows into x",
            "x rows into w", "index into x", "update at an index", "gather of x w",
        ]  # fmt: skip
        name = self.pick(names)
        self.say(f"window, {name}")
        lowest = 0 if self.has("small", 0.1) else 1
        part = tuple(self.int(min(lowest, s), s) for s in shape)
        sizes = {
            "slice of w": tuple(s + self.int(0, 2) for s in shape),
            "w into x": part,
            "x into w": tuple(s + self.int(0, 2) for s in shape),
            "windows of w": (self.int(2, 5), 3),
            "windows filled": (self.int(2, 5), 3),
            "w rows into x": (4, *shape[1:]),
            "x rows into w": (self.int(1, 4), math.prod(shape)),
            "update at an index": shape[1:],
        }
        operand = self.operand(sizes.get(name, shape))
        merge = self.merging()
        long = self.int(1, 2)

        def starts(env: Env) -> list[jax.Array]:
            return [env.indices[k % 4] for k in range(len(shape))]

        def windows(env: Env, mode: lax.GatherScatterMode) -> jax.Array:
            numbers = lax.GatherDimensionNumbers(
                offset_dims=(1, 2), collapsed_slice_dims=(), start_index_map=(0,)
            )
            return lax.gather(
                operand(env), env.indices[:, None], numbers, slice_sizes=(long, 2), mode=mode, fill_value=0.4
            )

        def step(env: Env, x: jax.Array) -> jax.Array:
            ix = env.indices
            return {
                "slice of w": lambda: x * lax.dynamic_slice(operand(env), starts(env), shape),
                "slice of x w": lambda: merge(x, lax.dynamic_slice(x * operand(env), starts(env), part)),
                "w into x": lambda: lax.dynamic_update_slice(x, operand(env), starts(env)),
                "x into w": lambda: merge(x, lax.dynamic_update_slice(operand(env), x, starts(env))),
                "windows of w": lambda: merge(x, windows(env, lax.GatherScatterMode.CLIP)),
                "windows filled": lambda: merge(x, windows(env, lax.GatherScatterMode.FILL_OR_DROP)),
                "w rows into x": lambda: x.at[ix].add(operand(env)),
                "x rows into w": lambda: merge(
                    x, operand(env).at[ix].add(jnp.sin(x.reshape(-1)), mode="drop")
                ),
                "index into x": lambda: merge(x, lax.dynamic_index_in_dim(x * operand(env), ix[1], 0)),
                "update at an index": lambda: lax.dynamic_update_index_in_dim(x, operand(env), ix[1], 0),
                "gather of x w": lambda: merge(x, jnp.take(x * operand(env), ix, 0, mode="clip")),
            }[name]()

        return step


def _padding(ix: jax.Array, rows: int) -> jax.Array:
    return (ix < 0) | (ix.astype(np.int64) >= rows)


def within(ix: jax.Array, size: int) -> jax.Array:
    """Integers of the same type, in bounds."""
    return ix % min(size, jnp.iinfo(ix.dtype).max)
