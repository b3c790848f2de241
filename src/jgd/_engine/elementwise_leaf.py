"""A leaf behind an operand that is computed from it element by element: a mask, a scale, an exponential.

Its gradient is M ⊙ G, where G is the operand's and M, the derivative, is the same for all examples.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jgd._engine import factors
from jgd._engine.carried_leaf import CarriedLeaf
from jgd._engine.dtypes import accumulation_dtype
from jgd._engine.leaf_gradients import ByLeaf
from jgd._engine.norms import Norm, length, root, with_digits
from jgd._engine.part_gradients import PartGradients
from jgd._engine.parts import Part

# The least square of a norm, all sides in units of their largest numbers, beside which what left the range is nothing.
_LEAST = 2.0**-60


@dataclass(frozen=True)
class ElementwiseLeaf(CarriedLeaf):
    """The gradients of one leaf, from those of the operand, `own`.

    Attributes:
        derivative: M, of the leaf's shape.
        left_out: where the gradient is 0 though G is not finite, as a selection makes it; None for nowhere.
    """

    derivative: jax.Array
    left_out: jax.Array | None = None

    def norms(self) -> dict[int, list[Norm]]:
        """By one product where each example has one position; else from the gradients."""
        if not all(gradients.rules.is_outer for _, gradients in self.own.parts):
            return self.gradients.norms()
        return {self.leaf: [Norm(self._norm_of_outer(part, gradients)) for part, gradients in self.own.parts]}

    def _norm_of_outer(self, part: Part, gradients: PartGradients) -> jax.Array:
        """‖M ⊙ l rᵀ‖, whose square is (l²)ᵀ M² r²: nothing cancels, but numbers may leave their range."""
        assert gradients.rules.layout is not None
        layout = gradients.rules.layout
        pick = lambda x: layout.unflatten(factors.pick(x, part.offset, part.axes))
        derivative = pick(self.derivative)
        (outer,) = gradients.factors()
        of_middle, middle = _in_units(derivative, axes=None)
        of_left, left = _in_units(outer.left[:, :, 0], axes=(1, 2))
        of_right, right = _in_units(outer.right[:, :, 0], axes=(1, 2))
        met = factors.contract("bnp,npq->bnq", jnp.square(left), jnp.square(middle))
        square = jnp.sum((met * jnp.square(right)).reshape(met.shape[0], -1), axis=1)
        made = root(square) * of_left.reshape(-1) * of_right.reshape(-1) * of_middle.reshape(())
        is_zero = (jnp.max(jnp.abs(left), (1, 2), initial=0) == 0) | (
            jnp.max(jnp.abs(right), (1, 2), initial=0) == 0
        )
        trusted = (is_zero & (made == 0)) | ((square >= _LEAST) & (made > 0) & (made < jnp.inf))
        left_out = None if self.left_out is None else pick(self.left_out)
        return with_digits(_norm_again, (gradients, derivative, left_out), made, trusted)

    def moments(self, weights: jax.Array | None, scale: Any, *, centred: bool) -> ByLeaf:
        """M² times those of G, unless one of these left its range and M may bring it back."""
        if any(gradients.batch.num_shards > 1 for _, gradients in self.own.parts):
            return super().moments(weights, scale, centred=centred)
        of_own = self.own.moments(weights, scale, centred=centred)[self.leaf]
        largest = jnp.max(jnp.abs(self.derivative), initial=0)
        # Where M is 0 so is the moment, if G is finite.
        least = jnp.min(jnp.where(self.derivative == 0, jnp.inf, jnp.abs(self.derivative)), initial=jnp.inf)
        most = jnp.max(of_own, initial=0)
        ordinary = (most >= 2.0**-_FAR) & (most <= 2.0**_FAR) & (largest <= 2.0**_FAR)
        even = least >= jnp.maximum(largest * 2.0**-_EVEN, 2.0**-_FAR)
        trusted = ordinary & even & jnp.all(jnp.isfinite(of_own))
        quick = lambda: jnp.square(self.derivative.astype(of_own.dtype)) * of_own
        carried = lambda: self.gradients.moments(weights, scale, centred=centred)[self.leaf].astype(
            of_own.dtype
        )
        return {self.leaf: jax.lax.cond(jax.lax.stop_gradient(trusted), quick, carried)}


# Moments and derivatives up to 2**±_FAR, and derivatives that differ by at most 2**_EVEN: what of the squares is lost
# below the range of float32 is nothing then beside the leaf's largest moment.
_FAR, _EVEN = 60, 20


def _norm_again(held: tuple[PartGradients, jax.Array, jax.Array | None], number: jax.Array) -> jax.Array:
    gradients, derivative, left_out = held
    (outer,) = gradients.of_example(number).factors()
    made = jnp.einsum("inp,inq->npq", outer.left[:, :, 0], outer.right[:, :, 0]) * derivative
    return length(made if left_out is None else jnp.where(left_out, 0, made))


def _in_units(x: Any, axes: tuple[int, ...] | None) -> tuple[jax.Array, jax.Array]:
    """The largest absolute value along some axes, of which no derivative is taken, and `x` in units of it."""
    wide = x.astype(accumulation_dtype(x))
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(wide), axis=axes, keepdims=True, initial=0))
    unit = jnp.where((largest > 0) & (largest < jnp.inf), largest, 1)
    return unit, wide / unit
