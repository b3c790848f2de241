"""Steps of one array, with or without a parameter: arithmetic, functions, moves, sums, norms."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from programs.changes import CHANGEABLE, changeable
from programs.derivatives import ASKING, NONLINEAR, NONLINEAR_OF_TWO, PRIMAL, bent
from programs.drawing import Env, Shape, Step
from programs.lookups import Lookups

FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "sin": jnp.sin,
    "silu": jax.nn.silu,
    "softmax": jax.nn.softmax,
    "bent": lambda x: bent(x, jnp.cos(x)),
    "cumsum": lambda x: jnp.cumsum(x, axis=0),
    "standardised": lambda x: (x - jnp.mean(x)) / jnp.sqrt(jnp.var(x) + 0.1),
    "attention": lambda x: jax.nn.softmax(_rows(x) @ _rows(x).T) @ _rows(x),
    "log1p(x²)": lambda x: jnp.log1p(x * x),
}


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1)


class Plain(Lookups):
    """Draws steps without others inside."""

    def arithmetic(self, shape: Shape) -> Step:
        """With a parameter, broadcast as NumPy does."""
        lower = self.int(0, len(shape))
        small = tuple(1 if self.chance(0.3) else s for s in shape[lower:])
        name = self.pick(["x + w", "x - w", "w - x", "x * w", "x / (w² + ½)", "w / (x² + 1)", "x + w x"])
        self.say(name)
        operand = self.operand(small)
        return {
            "x + w": lambda env, x: x + operand(env),
            "x - w": lambda env, x: x - operand(env),
            "w - x": lambda env, x: operand(env) - x,
            "x * w": lambda env, x: x * operand(env),
            "x / (w² + ½)": lambda env, x: x / (operand(env) ** 2 + 0.5),
            "w / (x² + 1)": lambda env, x: operand(env) / (x * x + 1),
            "x + w x": lambda env, x: x + operand(env) * x,
        }[name]

    def nonlinear(self, shape: Shape) -> Step:
        name = self.pick(list(FUNCTIONS))
        self.say(name)
        return lambda env, x: FUNCTIONS[name](x)

    def rearrange(self, shape: Shape) -> Step:
        order, to = self.shuffled(range(len(shape))), self.factored(math.prod(shape))
        name = self.pick(["transpose", "reshape", "flip", "repeat"])
        self.say(f"{name} {order if name == 'transpose' else to if name == 'reshape' else ''}")
        return {
            "transpose": lambda env, x: x.transpose(order),
            "reshape": lambda env, x: x.reshape(to),
            "flip": lambda env, x: jnp.flip(x, 0),
            "repeat": lambda env, x: jnp.broadcast_to(x, (2, *x.shape)),
        }[name]

    def reduce(self, shape: Shape) -> Step:
        axis = self.int(0, len(shape) - 1)
        name = self.pick(["sum", "mean", "max", "logsumexp"]) if shape[axis] else "sum"
        self.say(f"{name} over axis {axis}")
        how = {"sum": jnp.sum, "mean": jnp.mean, "max": jnp.max, "logsumexp": jax.nn.logsumexp}[name]
        return lambda env, x: how(x, axis=axis)

    def joined(self, shape: Shape) -> Step:
        axis = self.int(0, len(shape) - 1)
        self.say(f"concatenate along axis {axis}")
        operand = self.operand((*shape[:axis], self.int(1, 2), *shape[axis + 1 :]))
        return lambda env, x: jnp.concatenate([x, operand(env)], axis)

    def norm(self, shape: Shape) -> Step:
        self.say("layer norm")
        scale, shift = self.operand(shape[-1:]), self.operand(shape[-1:])

        def step(env: Env, x: jax.Array) -> jax.Array:
            centred = x - jnp.mean(x, -1, keepdims=True)
            return scale(env) * centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + 0.1) + shift(env)

        return step

    def other(self, shape: Shape) -> Step:
        """Primitives that have no rule."""
        name = self.pick(["where", "maximum", "custom_jvp", "update", "cumulative", "pad", "atan2"])
        self.say(name)
        operand = self.operand(shape[-1:] if name == "update" else () if name == "pad" else shape)

        def update(env: Env, x: jax.Array) -> jax.Array:
            return x.reshape(-1, shape[-1]).at[env.indices[1]].set(operand(env)).reshape(x.shape)

        return {
            "where": lambda env, x: jnp.where(x > 0, x, operand(env)),
            "maximum": lambda env, x: jnp.maximum(x, operand(env)),
            "custom_jvp": lambda env, x: bent(x, operand(env)),
            "update": update,
            "cumulative": lambda env, x: jnp.cumsum(x * operand(env), -1) * operand(env),
            # JAX cannot differentiate a pad in its value alone, so the operand depends on the parameter too.
            "pad": lambda env, x: lax.pad(
                x * operand(env), operand(env), [(1, 0, 0)] + [(0, 0, 0)] * (len(shape) - 1)
            ),
            "atan2": lambda env, x: jnp.arctan2(x, operand(env)),
        }[name]

    def forget(self, shape: Shape) -> Step:
        self.say("nothing but a parameter")
        operand = self.operand(shape)
        return lambda env, x: jnp.tanh(operand(env))

    def custom(self, shape: Shape) -> Step:
        """A custom derivative, of the array or of it and a parameter."""
        pools: list[dict[str, tuple[Callable[..., jax.Array], int]]] = []
        if "nonlinear" in self.features:
            pools.append({name: (fun, 1) for name, fun in NONLINEAR.items()})
            pools.append({name: (fun, 2) for name, fun in NONLINEAR_OF_TWO.items()})
        if "asking" in self.features:
            pools += [ASKING, {name: found for name, found in ASKING.items() if found[1] == 2}]
        if "primal" in self.features:
            pools.append({name: (fun, 1) for name, fun in PRIMAL.items()})
        options = self.pick(pools)
        name = self.pick(sorted(options))
        fun, operands = options[name]
        self.say(name)
        if operands == 1:
            return lambda env, x: fun(x)
        operand, flipped = self.operand(shape), self.chance(0.4)
        return lambda env, x: fun(operand(env), x) if flipped else fun(x, operand(env))

    def complexly(self, shape: Shape) -> Step:
        """Complex numbers in between: real parameters meet them, or two make a complex one."""
        start = self.pick(["fft", "complex", "turned", "cast"])
        meet = self.pick(
            ["scale", "add", "matmul", "matmul of two", "scale of two", "conjugate", "parts", "convolve"]
        )
        end = self.pick(["|z|²", "real", "imag", "both", "ifft", "|z|"])
        self.say(f"complex: {start}, {meet}, {end}")
        n = math.prod(shape)
        width = self.int(1, 3)
        sizes = (n, width) if "matmul" in meet else (3,) if meet == "convolve" else (n,)
        w, v = self.operand(sizes), self.operand(sizes)
        first = self.chance(0.3)

        def product(z: jax.Array, w: jax.Array) -> jax.Array:
            return w.T @ z if first else z @ w

        def step(env: Env, x: jax.Array) -> jax.Array:
            x = x.reshape(-1)
            z = {
                "fft": lambda: jnp.fft.fft(x),
                "complex": lambda: lax.complex(x, jnp.cos(x)),
                "turned": lambda: x * jnp.exp(1j * x),
                "cast": lambda: x.astype(complex),
            }[start]()
            z = {
                "scale": lambda: z * w(env),
                "add": lambda: z + w(env),
                "matmul": lambda: product(z, w(env)),
                "matmul of two": lambda: product(z, lax.complex(w(env), v(env))),
                "scale of two": lambda: z * lax.complex(w(env), v(env)),
                "conjugate": lambda: jnp.conj(z * w(env)) * v(env),
                "parts": lambda: lax.complex(jnp.real(z) * w(env), jnp.imag(z) * v(env)),
                "convolve": lambda: jnp.convolve(z, w(env), mode="same"),
            }[meet]()
            return {
                "|z|²": lambda: jnp.real(z * jnp.conj(z)),
                "real": lambda: jnp.real(z),
                "imag": lambda: jnp.imag(z),
                "both": lambda: jnp.concatenate([jnp.real(z), jnp.imag(z)]),
                "ifft": lambda: jnp.real(jnp.fft.ifft(z)),
                "|z|": lambda: jnp.abs(z + (2.0 + 1.0j)),
            }[end]()

        return step

    def changing(self, shape: Shape) -> Step:
        """Refers to something that is another one later."""
        refer, change, name = changeable(self.pick(sorted(CHANGEABLE)))
        self.say(f"times what changes later: {name}")
        self.changes.append(change)
        return lambda env, x: x * refer()
