"""A leaf that also meets data through numbers that are computed from it, such as an L2 penalty inside of the loss.

Its gradient is G_i + Σ_k c_ik D_k: what it has at its own sites, and for each number k the derivative D_k of that
number, the same for all examples, times the loss's derivative c_ik by it.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jgd._engine import factors
from jgd._engine.carried_leaf import CarriedLeaf
from jgd._engine.dtypes import add
from jgd._engine.factored_leaf import placed
from jgd._engine.norms import Norm, has_digits, is_within, length, root, total, with_digits


@dataclass(frozen=True)
class ShiftedLeaf(CarriedLeaf):
    """The gradients of one leaf, whose `own` are G_i.

    Attributes:
        numbers: c, `(B, K)`.
        directions: D, `(K, *leaf)`.
    """

    numbers: jax.Array
    directions: jax.Array

    def norms(self) -> dict[int, list[Norm]]:
        """From ‖G‖² + 2 Σ c ⟨G, D⟩ + ‖Σ c D‖²; from the gradient itself where these cancel or leave their range."""
        own = total(self.own.norms()[self.leaf], self.numbers.shape[0])
        flat = self.directions.reshape(self.directions.shape[0], -1)
        met = jnp.stack([self._own_dot(one) for one in self.directions], axis=1)
        among = factors.contract("ks,ls->kl", flat, flat)
        of_shift = jnp.sum(self.numbers * factors.contract("ik,kl->il", self.numbers, among), axis=1)
        square = jnp.square(own.length) + 2 * jnp.sum(self.numbers * met, axis=1) + of_shift
        # By the lengths of D, not by their squares, which may be out of range.
        lengths = jax.vmap(length)(flat)
        bound = jax.lax.stop_gradient(
            own.length + factors.contract("ik,k->i", jnp.abs(self.numbers), lengths)
        )
        in_range = is_within(bound, 3 / 8) & ((own.length == 0) | is_within(own.length, 3 / 8))
        trusted = (bound == 0) | (in_range & has_digits(square, jnp.square(bound)))
        held = [gradients for _, gradients in self.own.parts], self.numbers, self.directions
        made = with_digits(self._norm_again, held, root(jnp.maximum(square, 0)), trusted)
        norm = Norm(made).of_sum(bound)
        assert norm.rounding is not None
        rounding = norm.rounding if own.rounding is None else add(norm.rounding, own.rounding)
        return {self.leaf: [Norm(made, rounding)]}

    def _own_dot(self, direction: jax.Array) -> jax.Array:
        return self.own.dot([direction] * (self.leaf + 1))

    def _norm_again(self, held: Any, number: jax.Array) -> jax.Array:
        gradients, numbers, directions = held
        each = zip(self.own.parts, gradients, strict=True)
        flat = [(part, own.of_example(number).flat_blocks()) for (part, _), own in each]
        shift = jnp.tensordot(jax.lax.dynamic_index_in_dim(numbers, number, keepdims=False), directions, 1)
        return length(placed(flat, self.own.like)[0] + shift)
