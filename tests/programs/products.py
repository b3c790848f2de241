"""Products and convolutions, with any dimension numbers and options."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from programs.drawing import Env, Shape, Step, fit
from programs.operands import Operands


class Products(Operands):
    """Draws steps that multiply and add up."""

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


def _laid_out(sizes: Sequence[int], spec: Sequence[int]) -> Shape:
    """Sizes in the order (batch, channels, space..), put where a layout has them."""
    shape = [0] * len(sizes)
    for size, place in zip(sizes, spec, strict=True):
        shape[place] = size
    return tuple(shape)
