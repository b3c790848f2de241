"""Random losses out of the primitives that have rules, and some that have none.

`random_program(seed)` draws a chain of steps, each of which turns one array of the example into another and
may meet parameters: products, convolutions, lookups, arithmetic, norms, and control flow with chains of its own
inside. An *operand* is what a step meets: a leaf, new or met before, behind a path of transposes, slices,
arithmetic. Sizes stay small, so that a program compiles in about a second.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from cases import B, Problem
from jax import lax


class Env(NamedTuple):
    """What the steps of one example see beside the array that passes through them."""

    p: dict[str, Any]
    indices: Any  # (4,), some of them out of bounds
    slices: dict[int, Any]  # what the loops around hand in, by number


Shape = tuple[int, ...]
Step = Callable[[Env, jax.Array], jax.Array]
Operand = Callable[[Env], jax.Array]


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

LEAVES = 6  # beyond which no new leaf is made where an old one will do


def random_program(seed: Any, sizes: Sizes = SMALL) -> tuple[Problem, str]:
    """A loss with parameters and a batch, and what it says."""
    writer = Writer(np.random.default_rng(seed), sizes)
    problem = writer.problem()
    leaves = ", ".join(f"{name}{list(value.shape)}" for name, value in writer.leaves.items())
    return problem, f"seed {seed}: leaves {leaves}\n" + "\n".join(writer.text)


def fit(x: jax.Array, shape: Shape) -> jax.Array:
    """The elements of `x` in another shape, repeated or cut off."""
    return jnp.resize(x, shape)


@jax.custom_jvp
def bent(x, y):
    return jnp.sin(x) * y


@bent.defjvp
def _bent_jvp(primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    return bent(x, y), 2.0 * jnp.cos(x) * y * dx + jnp.sin(x) * dy  # not the derivative, on purpose


NONLINEAR: dict[str, Callable[[jax.Array], jax.Array]] = {
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


class Writer:
    """Draws one program; `text` says what was drawn."""

    def __init__(self, rng: np.random.Generator, sizes: Sizes):
        self.rng, self.sizes = rng, sizes
        self.leaves: dict[str, np.ndarray] = {}
        self.text: list[str] = []
        self.loops: list[Loop] = []
        self.slices: dict[int, jax.ShapeDtypeStruct] = {}
        self.numbers_of_slices = itertools.count()
        self.depth = 0

    # Small things

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
            d = self.pick([d for d in range(1, n + 1) if n % d == 0])
            shape += [d, n // d]
        return tuple(shape)

    def shape_of(self, step: Step, shape: Shape) -> Shape:
        x = jax.ShapeDtypeStruct(shape, jnp.float64)
        return jax.eval_shape(step, self.env, x).shape

    @property
    def env(self) -> Env:
        return Env(self.leaves, jax.ShapeDtypeStruct((4,), jnp.int64), self.slices)

    # Programs

    def problem(self) -> Problem:
        shape = tuple(self.pick(self.sizes.axes) for _ in range(self.int(1, 3)))
        start = shape
        self.say(f"x{list(shape)}")
        run, shape = self.chain(shape, self.int(2, 4))
        head = self.pick(["sin", "square", "logsumexp", "product"])
        penalty, unused = self.chance(0.1), self.chance(0.1)
        if not self.leaves or unused:
            self.leaves["unused"] = self.numbers((2,))
        if head == "product":  # one more use of a leaf, in all likelihood
            last = self.operand(shape)
        self.say(f"{head}{' + penalty' if penalty else ''}")

        def loss(p, x, indices):
            env = Env(p, indices, {})
            out = run(env, x)
            if head == "square":
                value = 0.5 * jnp.sum(jnp.tanh(out) ** 2)
            elif head == "logsumexp":
                value = jax.nn.logsumexp(out)
            elif head == "product":
                value = jnp.sum(jnp.tanh(out) * last(env))
            else:
                value = jnp.sum(jnp.sin(out))
            return value + (0.1 * sum(jnp.sum(jnp.sin(w)) for w in p.values()) if penalty else 0.0)

        x = self.rng.normal(size=(B, *start))
        indices = self.rng.integers(-2, 7, size=(B, 4))
        return Problem(loss, jax.tree.map(jnp.asarray, self.leaves), (jnp.asarray(x), jnp.asarray(indices)))

    def chain(self, shape: Shape, length: int) -> tuple[Step, Shape]:
        steps: list[Step] = []
        for _ in range(length):
            step = self.step(shape)
            steps.append(step)
            shape = self.shape_of(step, shape)
            if math.prod(shape) > self.sizes.largest or not shape or len(shape) > 4:
                smaller = self.factored(self.pick(self.sizes.cut))
                self.say(f"fit to {list(smaller)}")
                steps.append(lambda env, x, to=smaller: fit(x, to))
                shape = smaller

        def run(env: Env, x: jax.Array) -> jax.Array:
            for step in steps:
                x = step(env, x)
            return x

        return run, shape

    def inner(self, shape: Shape) -> tuple[Step, Shape]:
        """A chain inside of another step."""
        self.depth += 1
        found = self.chain(shape, self.int(1, 2))
        self.depth -= 1
        return found

    def step(self, shape: Shape) -> Step:
        flat = [
            (5, self.dot), (4, self.arithmetic), (3, self.lookup), (3, self.convolution), (2, self.nonlinear),
            (2, self.rearrange), (1, self.reduce), (1.5, self.joined), (1, self.norm), (1, self.other),
            (0.3, self.forget),
        ]  # fmt: skip
        nested = [
            (3, self.scan), (1, self.cond), (1, self.wrapped), (0.7, self.vmapped), (0.7, self.residual),
            (0.4, self.gradient), (0.5, self.twice),
        ]  # fmt: skip
        options = flat + (nested if self.depth < 2 else [])
        weights = np.array([w for w, _ in options])
        return options[self.rng.choice(len(options), p=weights / weights.sum())][1](shape)

    # Operands

    def numbers(self, shape: Shape) -> np.ndarray:
        """Numbers that one can divide by."""
        return self.rng.uniform(0.4, 1.2, size=shape) * self.rng.choice([-1, 1], size=shape)

    def operand(self, shape: Shape, depth: int = 0) -> Operand:
        """What a step meets: a function of the parameters to an array of this shape."""
        found, text = self.path(tuple(map(int, shape)), depth)
        self.say(f"  with {text}")
        return found

    def path(self, shape: Shape, depth: int = 0) -> tuple[Operand, str]:
        if self.loops and self.chance(0.35):
            return self.handed_in(shape)
        if depth > 2 or self.chance(0.45):
            return self.leaf(shape)
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
            end = start + (shape[axis] - 1) * stride + 1
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
        self.leaves[name] = self.numbers(shape)
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

    # Steps without others inside

    def dot(self, shape: Shape) -> Step:
        """Any dimension numbers, the parameter on either side."""
        roles = [self.pick(["batch", "contracted", "contracted", "free"]) for _ in shape]
        mine = {role: self.shuffled([i for i, r in enumerate(roles) if r == role]) for role in set(roles)}
        batch, contracted = mine.get("batch", []), mine.get("contracted", [])
        free = [self.pick(self.sizes.free) for _ in range(self.int(0, 2))]
        sizes = [("b", i, shape[i]) for i in batch] + [("c", i, shape[i]) for i in contracted]
        axes = self.shuffled([*sizes, *(("f", i, size) for i, size in enumerate(free))])
        at = {(kind, i): place for place, (kind, i, _) in enumerate(axes)}
        theirs = [at["c", i] for i in contracted], [at["b", i] for i in batch]
        first = self.chance(0.5)
        self.say(
            f"dot_general, batch {batch}, contracted {contracted}, parameter {'first' if first else 'second'}"
        )
        operand = self.operand(tuple(size for _, _, size in axes))

        def step(env: Env, x: jax.Array) -> jax.Array:
            if first:
                return lax.dot_general(operand(env), x, ((theirs[0], contracted), (theirs[1], batch)))
            return lax.dot_general(x, operand(env), ((contracted, theirs[0]), (batch, theirs[1])))

        return step

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

    def lookup(self, shape: Shape) -> Step:
        """Rows of a table by the example's integers, or by where its array is largest."""
        rows, width = self.int(2, 4), self.int(1, 3)
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
        name = self.pick(names)
        self.say(f"lookup, {name}, axis {axis}")
        operand = self.operand((rows, width) if axis == 0 or "take" not in name else (width, rows))
        merge = self.merging()

        def found(env: Env, x: jax.Array) -> jax.Array:
            table, ix = operand(env), env.indices
            if "take" in name:
                return jnp.take(table, ix, axis, mode=name.split()[1], fill_value=0.3)
            if name == "in bounds":
                return table.at[ix % rows].get(mode="promise_in_bounds")
            if name == "w[i, j]":
                return table[ix % rows, jnp.flip(ix) % width]
            if name == "w[i][0]":
                return table[ix[0] % rows]
            if name == "w[argmax]":
                return table[jnp.argmax(x) % rows]
            if name == "dynamic slice":
                return lax.dynamic_slice(table, (ix[0], 0), (1, width))
            return table[ix % rows]

        return lambda env, x: merge(x, found(env, x))

    def merging(self) -> Callable[[jax.Array, jax.Array], jax.Array]:
        how = self.pick(["add", "concatenate", "scale"])
        self.say(f"  and {how}")
        return {
            "add": lambda x, y: x + fit(y, x.shape),
            "concatenate": lambda x, y: jnp.concatenate([x.reshape(-1), y.reshape(-1)]),
            "scale": lambda x, y: x * jnp.tanh(jnp.sum(y)) if y.size else x,
        }[how]

    def convolution(self, shape: Shape) -> Step:
        """One or two dimensions, in any layout, with all options; the parameter is the kernel, mostly."""
        space = self.int(1, 2)
        groups, by_batch = self.pick([1, 1, 2]), self.chance(0.1)
        channels_in, out = self.pick([1, 2]), self.pick([1, 2])
        size = [self.int(3, 4) for _ in range(space)]
        window = [self.int(1, 3) for _ in range(space)]
        batch = self.pick([1, 1, 2])
        if by_batch:
            groups, batch = 1, 2
        of_input, of_kernel, of_out = (self.shuffled(range(space + 2)) for _ in range(3))
        numbers = lax.ConvDimensionNumbers(tuple(of_input), tuple(of_kernel), tuple(of_out))
        options = {
            "window_strides": [self.int(1, 2) for _ in range(space)],
            "padding": [(self.int(0, 2), self.int(-1, 2)) for _ in range(space)],
            "lhs_dilation": [self.pick([1, 1, 2]) for _ in range(space)],
            "rhs_dilation": [self.pick([1, 1, 2]) for _ in range(space)],
            "feature_group_count": groups,
            "batch_group_count": 2 if by_batch else 1,
        }
        lhs = _laid_out([batch, groups * channels_in, *size], numbers.lhs_spec)
        rhs = _laid_out([2 * out if by_batch else groups * out, channels_in, *window], numbers.rhs_spec)
        as_input = self.chance(0.15)
        self.say(
            f"convolution {lhs} with {rhs}, {options}, {tuple(numbers)}, "
            f"parameter {'input' if as_input else 'kernel'}"
        )
        operand = self.operand(lhs if as_input else rhs)

        def step(env: Env, x: jax.Array) -> jax.Array:
            pair = (operand(env), fit(x, rhs)) if as_input else (fit(x, lhs), operand(env))
            made = lax.conv_general_dilated(*pair, **options, dimension_numbers=numbers)
            return made if made.size else jnp.tanh(x)

        return step

    def nonlinear(self, shape: Shape) -> Step:
        name = self.pick(list(NONLINEAR))
        self.say(name)
        return lambda env, x: NONLINEAR[name](x)

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
        name = self.pick(["sum", "mean", "max", "logsumexp"])
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

    # Steps with others inside

    def scan(self, shape: Shape) -> Step:
        along = len(shape) > 1 and self.chance(0.5)
        length = shape[0] if along else self.int(1, 3)
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
                return jnp.tanh(fit(made, carry.shape)), jnp.mean(made)

            first = start(env) if start is not None else jnp.zeros(state) if along else x
            carry, seen = lax.scan(
                each, first, (stacked, x if along else None), length=length, reverse=reverse
            )
            return carry * jnp.sum(jnp.cos(seen))

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


def _laid_out(sizes: Sequence[int], spec: Sequence[int]) -> Shape:
    """Sizes in the order (batch, channels, space..), put where a layout has them."""
    shape = [0] * len(sizes)
    for size, place in zip(sizes, spec, strict=True):
        shape[place] = size
    return tuple(shape)
