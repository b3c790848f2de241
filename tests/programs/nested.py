"""Steps with other steps inside: loops, branches, wrappers, derivatives."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from programs.drawing import Env, Loop, Shape, Step, fit
from programs.plain import Plain


class Nested(Plain):
    """Draws steps around a chain of others, which `chain` of the writer draws."""

    def chain(self, shape: Shape, length: int) -> tuple[Step, Shape]:
        """Steps one after the other, and the shape that they end with."""
        raise NotImplementedError

    def inner(self, shape: Shape) -> tuple[Step, Shape]:
        """A chain inside of another step."""
        self.depth += 1
        found = self.chain(shape, self.int(1, 2))
        self.depth -= 1
        return found

    def scan(self, shape: Shape) -> Step:
        along = len(shape) > 1 and self.chance(0.5)
        length = shape[0] if along else self.int(0 if "small" in self.features else 1, 3)
        state = shape[1:] if along else shape
        reverse, started = self.chance(0.4), self.chance(0.25)
        self.say(f"scan of {length} {'over x' if along else 'of x'}{', reverse' if reverse else ''}")
        start = self.operand(state) if started else None
        loop = Loop(length)
        self.loops.append(loop)
        body, _ = self.inner(state)
        self.loops.pop()

        def step(env: Env, x: jax.Array) -> jax.Array:
            stacked, hoisted = loop.inputs(env)

            def each(carry: jax.Array, inputs: Any) -> Any:
                slices, row = inputs
                inside = env._replace(slices=env.slices | hoisted | slices)
                made = body(inside, carry if row is None else carry + row)
                return jnp.tanh(fit(made, carry.shape)), jnp.mean(made) if made.size else 0.0

            first = start(env) if start is not None else jnp.zeros(state) if along else x
            carry, seen = lax.scan(
                each, first, (stacked, x if along else None), length=length, reverse=reverse
            )
            return carry * (jnp.sum(jnp.cos(seen)) if length else 1.0)

        return step

    def vmapped(self, shape: Shape) -> Step:
        if len(shape) < 2:
            return self.scan(shape)
        self.say(f"vmap over {shape[0]}")
        loop = Loop(shape[0])
        self.loops.append(loop)
        body, _ = self.inner(shape[1:])
        self.loops.pop()

        def step(env: Env, x: jax.Array) -> jax.Array:
            stacked, hoisted = loop.inputs(env)
            each = lambda slices, row: body(env._replace(slices=env.slices | hoisted | slices), row)
            return jax.vmap(each)(stacked, x)

        return step

    def counted(self, shape: Shape) -> Step:
        """A loop that counts, or one over rows; what is drawn inside meets the same parameters at each turn."""
        by_rows = len(shape) > 1 and shape[0] > 0 and self.chance(0.5)
        turns = self.int(0 if "small" in self.features else 1, 3)
        self.say("map over rows" if by_rows else f"fori_loop of {turns}")
        loop = Loop(shape[0] if by_rows else max(turns, 1))  # one to trace with, where there is no turn
        self.loops.append(loop)
        body, _ = self.inner(shape[1:] if by_rows else shape)
        self.loops.pop()

        def step(env: Env, x: jax.Array) -> jax.Array:
            stacked, hoisted = loop.inputs(env)

            def each(slices: Any, x: jax.Array) -> jax.Array:
                return fit(jnp.tanh(body(env._replace(slices=env.slices | hoisted | slices), x)), x.shape)

            if by_rows:
                return lax.map(lambda of: each(*of), (stacked, x))
            at = lambda k: {n: lax.dynamic_index_in_dim(w, k, keepdims=False) for n, w in stacked.items()}
            return lax.fori_loop(0, turns, lambda k, x: each(at(k), x), x)

        return step

    def cond(self, shape: Shape) -> Step:
        by_index = self.chance(0.5)
        self.say("switch on an index" if by_index else "cond on x")
        bodies = [self.inner(shape)[0] for _ in range(self.int(2, 3) if by_index else 2)]

        def step(env: Env, x: jax.Array) -> jax.Array:
            branches = [lambda x, body=body: fit(body(env, x), shape) for body in bodies]
            if by_index:
                return lax.switch(env.indices[2] % len(branches), branches, x)
            return lax.cond(jnp.sum(x) > 0, *branches, x)

        return step

    def wrapped(self, shape: Shape) -> Step:
        name = self.pick(["checkpoint", "jit"])
        self.say(name)
        body, _ = self.inner(shape)
        wrap = {"checkpoint": jax.checkpoint, "jit": jax.jit}[name]
        if self.chance(0.5):
            return lambda env, x: wrap(body)(env, x)
        return lambda env, x: wrap(lambda x: body(env, x))(x)

    def residual(self, shape: Shape) -> Step:
        self.say("x +")
        body, _ = self.inner(shape)
        return lambda env, x: x + fit(body(env, x), shape)

    def twice(self, shape: Shape) -> Step:
        """The same parameters at two places, as a siamese net has them."""
        self.say("twice")
        body, _ = self.inner(shape)
        return lambda env, x: fit(body(env, x), shape) * fit(body(env, jnp.flip(jnp.cos(x), 0)), shape)

    def gradient(self, shape: Shape) -> Step:
        """A derivative inside of the loss."""
        self.say("grad")
        body, _ = self.inner(shape)
        return lambda env, x: jax.grad(lambda x: jnp.sum(jnp.sin(body(env, x))))(x)

    def unrolled(self, shape: Shape) -> Step:
        """The same parameters again and again, without a loop of JAX's."""
        times = self.int(3, 5)
        self.say(f"unrolled, {times} times")
        body, _ = self.inner(shape)

        def step(env: Env, x: jax.Array) -> jax.Array:
            for _ in range(times):
                x = jnp.tanh(fit(body(env, x), shape))
            return x

        return step
