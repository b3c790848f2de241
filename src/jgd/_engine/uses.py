"""One use of a leaf: a site's operand, where it lies in the leaf, and how its gradient is factored."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jgd._engine.costs import Sizes
from jgd._engine.directional import along, inner_product
from jgd._engine.factors import Arrangement, Factor, Full, Shape, block, group, product, split_axes
from jgd._engine.regions import Site
from jgd._engine.views import Axis, View, merge_axes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SiteData:
    """What one example left at a site; the loops around the site are the leading axes of every array."""

    values: dict[int, jax.Array]  # the recorded operands, by position
    deltas: list[jax.Array]  # the loss's derivative with respect to each tapped output
    operand_grads: dict[int, jax.Array]  # the gradient at an operand, for the uses that ask for it


@dataclass(frozen=True, eq=False)
class Use:
    """One operand of one site, as a use of one leaf.

    `shape` says where n, p and q lie in the leaf; None where the gradient is not factored. `factor` makes the
    factors of one example; `block` its gradient in some order of its own, which `arrange` turns into `(N, P, Q)`, and
    `square` that gradient's squared norm, where there is a better way than the factors'.
    `batch_factor` makes the factors of the examples' weighted sum, from data with a batch axis behind the loops':
    folded into the positions, it makes one large product of many.
    """

    rule: str
    site: Site
    position: int
    leaf: int
    offset: int
    axes: tuple[Axis, ...]
    shape: Shape | None
    positions: int  # T
    factor: Callable[[SiteData], Factor]
    block: Callable[[SiteData], jax.Array] | None = None
    arrange: Callable[[jax.Array], jax.Array] | None = None
    square: Callable[[SiteData], jax.Array] | None = None
    batch_factor: Callable[[SiteData, jax.Array | None], Factor] | None = None

    @property
    def needs_operand_grad(self) -> bool:
        """Whether the gradient at the operand has to be computed by the equation's own `vjp`."""
        return self.shape is None

    @property
    def is_wide(self) -> bool:
        """Whether sums over examples may be kept in the operand's own dtype."""
        return self.site.inputs[self.position].aval.dtype.itemsize >= 4

    @property
    def kind(self) -> Hashable:
        """What uses have in common whose gradients are made alike, see `Part.kind`."""
        site, view = self.site, self.site.inputs[self.position].view
        literal = any(x.literal is not None for x in site.inputs)
        if self.needs_operand_grad or site.eqn is None or view is None or literal:
            return None
        around, own = split_axes(view, site.loops)
        values = [(x.aval.shape, x.aval.dtype, x.side) for x in (*site.inputs, *site.outputs)]
        params = tuple(site.eqn.params.items())
        kind = (self.rule, self.position, site.eqn.primitive, params, tuple(around), own, *values)
        try:
            hash(kind)
        except TypeError:
            return None
        return kind

    @property
    def sizes(self) -> Sizes:
        """The sizes of the factors; of an opaque use, those of its part, each element by itself."""
        if self.shape is None:
            return Sizes(product(self.axes), self.positions, 1, 1)
        n, p, q = self.shape.sizes()
        return Sizes(n, self.positions, p, q)

    def gradient(self, data: SiteData) -> jax.Array:
        """One example's gradient in this part, flat, in the order of the leaf's memory."""
        return self.in_memory(self.unordered(data))

    def unordered(self, data: SiteData) -> jax.Array:
        """One example's gradient in this part, in the order in which it comes."""
        if self.shape is None:
            factor = self.factor(data)
            assert isinstance(factor, Full)
            return factor.flat
        return self.block(data) if self.block is not None else block(self.factor(data), self.shape)

    def in_memory(self, gradient: jax.Array) -> jax.Array:
        """What `unordered` made, or a sum of such, flat, in the order of the leaf's memory."""
        if self.shape is None:
            return gradient
        return self.shape.flatten(gradient if self.arrange is None else self.arrange(gradient))

    def dot(self, data: SiteData, direction: jax.Array) -> jax.Array:
        """⟨G, v⟩ for one example; the direction lies flat in the order of the leaf's memory."""
        if self.shape is None or self.block is not None:
            return inner_product(self.gradient(data), direction)
        return along(self.factor(data), self.shape.unflatten(direction))

    def batch_gradient(self, data: SiteData, weights: jax.Array | None) -> jax.Array:
        """Σ w_i g_i of a batch in this part, flat, in the order of the leaf's memory."""
        assert self.batch_factor is not None and self.shape is not None
        return self.shape.flatten(block(self.batch_factor(data, weights), self.shape))


def opaque(site: Site, position: int, view: View) -> Use:
    """The use that is always right: the gradient at the operand, by the equation's own `vjp`, put where it belongs."""
    around, own = split_axes(view, site.loops)
    axes = list(enumerate([*around, *own]))
    spread = [(i, axis) for i, axis in axes if axis[1] == 0 and axis[0] > 1]
    order, places = group([pair for pair in axes if pair not in spread])
    arrange = Arrangement(tuple(i for i, _ in spread), (order,))
    return Use(
        "opaque", site, position, view.leaf, view.offset, merge_axes(places), None, 1,
        lambda data: Full(jnp.real(arrange(data.operand_grads[position]))),  # the leaf is real, whatever it was cast to
    )  # fmt: skip
