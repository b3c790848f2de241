"""Random losses out of the primitives that have rules, and some that have none.

`random_program(seed)` draws a chain of steps, each of which turns one array of the example into another and
may meet parameters: products, convolutions, lookups, arithmetic, norms, and control flow with chains of its own
inside. An *operand* is what a step meets: a leaf, new or met before, behind a path of transposes, slices,
arithmetic. Sizes stay small, so that a program compiles in about a second.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import B, Problem

from programs.drawing import FEATURES, SMALL, Change, Env, Shape, Sizes, Step, fit
from programs.nested import Nested

INTEGERS = tuple(np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64))


@dataclass(frozen=True)
class Program:
    """A loss with parameters and a batch, and what it says.

    `change` makes what the loss refers to another thing: its gradients are then others. `mode` is how it is asked.
    """

    problem: Problem
    text: str
    mode: str
    change: Change | None
    steps: int  # of steps and operands


def random_program(
    seed: Any,
    features: Collection[str] = FEATURES,
    without: Collection[int] = (),
    plain: Collection[int] = (),
    sizes: Sizes = SMALL,
) -> Program:
    """Draws one program; `without` and `plain` are what to leave out of it, by number."""
    writer = Writer(seed, frozenset(features), frozenset(without), frozenset(plain), sizes)
    problem = writer.problem()
    mode = _mode(seed) if features else "jit"
    leaves = ", ".join(f"{name}{list(value.shape)}" for name, value in problem.params.items())
    text = f"seed {seed}, {mode}: leaves {leaves}\n" + "\n".join(writer.text)
    changes = tuple(writer.changes)

    def change() -> None:
        for each in changes:
            each()

    return Program(problem, text, mode, change if changes else None, next(writer.numbers))


def _mode(seed: Any) -> str:
    """How the questions are asked: drawn apart, so that a program stays the same whatever there is to draw from."""
    rng = np.random.default_rng([20, *np.atleast_1d(seed)])
    modes = {
        "jit, with what is wanted": 0.55,
        "jit": 0.15,
        "eager": 0.12,
        "jitted pass": 0.06,
        "microbatches": 0.12,
    }
    return str(rng.choice(list(modes), p=list(modes.values())))


class Writer(Nested):
    """Draws whole programs."""

    def problem(self) -> Problem:
        size = self.pick([0, 1, 2, B, B, B]) if self.has("small", 0.3) else B
        sizes = [1, 2, 3] if self.has("small", 0.3) else self.sizes.axes
        if self.has("small", 0.1):
            sizes = [0, 1, 2]
        shape = tuple(self.pick(sizes) for _ in range(self.int(1, 3)))
        start = shape
        if "ids" in self.features:
            self.index_dtype = self.pick(INTEGERS)
        self.say(f"x{list(shape)}, {size} examples, indices {np.dtype(self.index_dtype).name}")
        run, shape = self.chain(shape, self.int(2, 4))
        head = self.pick(["sin", "square", "logsumexp", "product"])
        penalty, unused = self.chance(0.1), self.chance(0.1)
        if head == "product":  # one more use of a leaf, in all likelihood
            last = self.operand(shape)
        if not self.leaves or unused:
            self.leaves["unused"] = self.values((2,))
        self.say(f"{head}{' + penalty' if penalty else ''}")

        def loss(p, x, indices):
            env = Env(p, indices, {})
            out = run(env, x)
            if head == "square":
                value = 0.5 * jnp.sum(jnp.tanh(out) ** 2)
            elif head == "logsumexp" and out.size:
                value = jax.nn.logsumexp(out)
            elif head == "product":
                value = jnp.sum(jnp.tanh(out) * last(env))
            else:
                value = jnp.sum(jnp.sin(out))
            return value + (0.1 * sum(jnp.sum(jnp.sin(w)) for w in p.values()) if penalty else 0.0)

        x = self.rng.normal(size=(size, *start))
        # Unlike `jnp.asarray`, `device_put` compiles nothing for each new shape.
        batch = (jax.device_put(x), jax.device_put(self.indices(size)))
        return Problem(self.method(loss), jax.device_put(dict(self.leaves)), batch)

    def indices(self, size: int) -> np.ndarray:
        """Small ones on both sides of 0, some of them far out where the type has room."""
        limits = np.iinfo(self.index_dtype)
        found = self.rng.integers(-2, 7, size=(size, 4))
        if "ids" in self.features:
            far = self.rng.integers(-130, 310, size=(size, 4))
            found = np.where(self.rng.random((size, 4)) < 0.3, far, found)
        return np.clip(found, max(limits.min, -1000), min(limits.max, 1000)).astype(self.index_dtype)

    def method(self, loss: Any) -> Any:
        """The loss as a method whose object changes, now and then."""
        if not self.has("changed", 0.1):
            return loss
        self.say("a method, of an object that changes")
        model = _Model(loss)
        self.changes.append(lambda: setattr(model, "factor", 0.4))
        return model.loss

    def chain(self, shape: Shape, length: int) -> tuple[Step, Shape]:
        steps: list[Step] = []
        for _ in range(length):
            said, changes, number = len(self.text), len(self.changes), next(self.numbers)
            step = self.step(shape)
            made = self.shape_of(step, shape)
            if number in self.without:
                del self.text[said:], self.changes[changes:]
                step = lambda env, x, to=made: fit(x, to)
                self.say(f"fit to {list(made)}")
            else:
                self.text[said] += f"  #{number}"
            steps.append(step)
            shape = made
            large = math.prod(shape) > self.sizes.largest or not shape or len(shape) > 4
            if large or (0 in shape and self.chance(0.5)):
                smaller = self.factored(self.pick(self.sizes.cut))
                self.say(f"fit to {list(smaller)}")
                steps.append(lambda env, x, to=smaller: fit(x, to))
                shape = smaller

        def run(env: Env, x: jax.Array) -> jax.Array:
            for step in steps:
                x = step(env, x)
            return x

        return run, shape

    def step(self, shape: Shape) -> Step:
        if 0 in shape:  # where little is defined
            return self.pick([self.dot, self.arithmetic, self.rearrange, self.forget])(shape)
        flat = [
            (5, self.dot), (4, self.arithmetic), (3, self.lookup), (3, self.convolution), (2, self.nonlinear),
            (2, self.rearrange), (1, self.reduce), (1.5, self.joined), (1, self.norm), (1, self.other),
            (0.3, self.forget),
        ]  # fmt: skip
        nested = [
            (3, self.scan), (1, self.cond), (1, self.wrapped), (0.7, self.vmapped), (0.7, self.residual),
            (0.4, self.gradient), (0.5, self.twice),
        ]  # fmt: skip
        if self.features & {"nonlinear", "asking", "primal"}:
            flat.append((4, self.custom))
            nested.append((1.5, self.counted))
        if "complex" in self.features:
            flat.append((1.5, self.complexly))
        if "windows" in self.features:
            flat.append((2, self.window))
        if "unrolled" in self.features:
            nested.append((0.7, self.unrolled))
        if "changed" in self.features and self.depth == 0:
            flat.append((0.8, self.changing))
        options = flat + (nested if self.depth < 2 else [])
        weights = np.array([w for w, _ in options])
        return options[self.rng.choice(len(options), p=weights / weights.sum())][1](shape)


class _Model:
    def __init__(self, loss: Any) -> None:
        self.held, self.factor = loss, 1.0

    def loss(self, *args: Any) -> Any:
        return self.held(*args) * self.factor
