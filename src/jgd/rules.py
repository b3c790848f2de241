"""Rules: how one example's gradient at an operand of a primitive is held without building it.

A rule that is registered for a primitive takes part in everything: norms, sums, clipped sums, moments, Grams, products
with a direction, projections, scans, meshes, microbatches and `jgd.explain`. Without a rule a leaf is dense: the
backward pass makes its gradients as `jax.vmap(jax.grad(loss))` does, which is always right.

    @dataclasses.dataclass(frozen=True)
    class Update(jgd.rules.OperandRule):
        sizes: tuple[int, ...]

        def at_step(self, data):
            starts = [data.values[k] for k in sorted(data.values) if k >= 2]
            return jax.lax.dynamic_slice(data.cotangent, starts, self.sizes)

    def match(site, position, view):
        if position != 1 or not all(site.is_data(k) for k in range(2, len(site.inputs))):
            return None
        return Update.of(site, view, sizes=site.inputs[1].aval.shape)

    jgd.rules.register(jax.lax.dynamic_update_slice_p, match)

`match(site, position, view)` is asked for each operand of the primitive that is computed from parameters while another
depends on the example. `site` has the equation: `eqn_params`, and `inputs` and `outputs` with their `aval`;
`site.is_data(k)` says whether an operand depends on the example. `view` says where the operand lies in the leaf. It
returns a rule, or None where it knows none.

A rule is a frozen dataclass, hashable, and holds no arrays: two rules that are equal are traced once. It must be
right for every example by itself, and linear in the cotangent. What it gets of an example is `SiteData`: `values`, the
operands that depend on the example, by position, and `cotangent`. A scan around the equation is a leading axis of each
array.

- `OperandRule` is for equations that sum over no positions. Its `at_step` says the gradient at the operand, shaped like
  the operand, in one step of the scans around; what the parameter was broadcast along is summed over.
- `Rule` is for all others. Its `factor` says the factors: `Outer(left, right)` where the gradient is
  G[n, p, q] = Σ_t left[n, t, p] · right[n, t, q], `Rows` where `left` would be one-hot, `Full` where there is no
  better than the gradient itself. `layout` says where n, p and q lie in the leaf, and `positions` is T, from which
  costs are predicted. Its properties, such as `is_product`, say what else may be counted on: `is_linear`, that the
  gradient is linear in the one operand that depends on the example, without which complex numbers make a leaf dense.
  `split_axes` and `group` help to find the layout, `operand_grouping` to arrange an array like the operand.

docs/how_it_works.md has the whole way of a loss through the engine.
"""

from jgd._engine.factors import AxisGrouping as AxisGrouping
from jgd._engine.factors import Full as Full
from jgd._engine.factors import Layout as Layout
from jgd._engine.factors import Outer as Outer
from jgd._engine.factors import Rows as Rows
from jgd._engine.factors import group as group
from jgd._engine.factors import split_axes as split_axes
from jgd._engine.rules import register as register
from jgd._engine.rules import unregister as unregister
from jgd._engine.rules.rule import OperandRule as OperandRule
from jgd._engine.rules.rule import Rule as Rule
from jgd._engine.rules.rule import SiteData as SiteData
from jgd._engine.rules.rule import operand_grouping as operand_grouping
from jgd._engine.sites import Site as Site
from jgd._engine.views import View as View
