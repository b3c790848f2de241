"""`jgd.explain`: the plan as a table, one row for each place where a parameter meets data."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp

from jgd._autotune import compiled_program
from jgd._clipping import clipped_sum
from jgd._clock import time_interleaved
from jgd._engine.blocks import blocks_at_once
from jgd._engine.calls import Call, Loss, bind
from jgd._engine.carried import Way, way_of
from jgd._engine.costs import Cost, weight_gradient
from jgd._engine.flops import work_of
from jgd._engine.norms import all_together
from jgd._engine.parts import Part, Use
from jgd._engine.plan import PLANNED, Plan, plan_of
from jgd._engine.residuals import Model
from jgd._engine.shares import DeviceShare, share_of
from jgd._engine.sites import Site, sites_of
from jgd._engine.tiles import num_shards_of
from jgd._engine.trace import TracedLoss, trace
from jgd._errors import describe, is_concrete
from jgd._execution import gradients_of, values_of


@dataclass(frozen=True)
class ExplainRow:
    """One place where a parameter meets data.

    Attributes:
        leaf: the leaf's path in the parameters.
        primitive: the equation's primitive; "identity" where a parameter itself becomes data.
        n, t, p, q: block axes, summed positions, and the two sides of the leaf; 0 where nothing is factored.
        uses: how many uses share this row's part of the leaf; they are added before they are squared.
        rule: how the norm is taken: "norms" (‖a‖²‖δ‖²), "pairs" (inner products of positions), "block" (the
            gradient itself, then its square), "whole leaf" (the block of that leaf, by `vjp`), "none"; of a leaf
            behind a computed operand also "identity", "factors", "elementwise" or "shift", by what the way back
            makes of the operand's gradient.
        flops: floating-point operations of this part's squared norm, for one example.
        bytes: what they hold in float32, for one example.
        why: the reason, in words.
    """

    leaf: str
    primitive: str
    n: int
    t: int
    p: int
    q: int
    uses: int
    rule: str
    flops: int
    bytes: int
    why: str


@dataclass(frozen=True)
class Explanation:
    """A plan as data; `str()` prints it.

    Attributes:
        rows: one `ExplainRow` for each place where a parameter meets data, and for each leaf that meets none.
        examples: B.
        parameters: P.
        strategy: what `strategy="auto"` does with this loss and batch: "factored" or "materialized". The rows are what
            "factored" does.
        at_once: how many examples go through one pass: fewer than B where gradients are materialized that are small
            beside what the examples leave for it.
        norms: the predicted time of `jgd.norms`, in units of the plain gradient's.
        clipped_sum: the same of `jgd.clipped_sum` and the norms in one program.
        share: what one device holds and sends, where the batch given lies over several; else None.
        measured_norms: the time of `jgd.norms` as measured here, in the same unit; None where nothing was measured.
        measured_clipped_sum: the same of `jgd.clipped_sum` and the norms.
    """

    rows: tuple[ExplainRow, ...]
    examples: int
    parameters: int
    strategy: str
    norms: float
    clipped_sum: float
    at_once: int
    share: DeviceShare | None = None
    measured_norms: float | None = None
    measured_clipped_sum: float | None = None

    def __str__(self) -> str:
        names = [f.name for f in fields(ExplainRow)]
        cells = [names] + [[_cell(getattr(row, name)) for name in names] for row in self.rows]
        widths = [max(len(line[k]) for line in cells) for k in range(len(names))]
        lines = ["  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in cells]
        lines.insert(1, "─" * max(map(len, lines)))
        some = f", {self.at_once} examples at a time" if self.at_once < self.examples else ""
        total = (
            f'{self.examples} examples, {self.parameters:,} parameters; "auto" is {self.strategy!r}{some}. Predicted '
            f"from the products and the numbers moved, against the plain gradient's time: norms {self.norms:.2f}×, "
            f"clipped sum {self.clipped_sum:.2f}×."
        )
        if self.measured_norms is not None:
            total += f" Measured: {self.measured_norms:.2f}×, {self.measured_clipped_sum:.2f}×."
        return "\n".join([*lines, "", total, *([] if self.share is None else [str(self.share)])])


def explain(
    loss: Loss,
    params: Any,
    *batch: Any,
    argnums: int | Sequence[int] = 0,
    in_axes: Any = None,
    has_aux: bool = False,
    measure: bool = False,
) -> Explanation:
    """Says where each parameter meets data, how its per-example gradients are held there, what that costs, and why.

    Nothing of the loss is run unless told to `measure`: it is traced on shapes.

    Args:
        loss: as for `jgd.per_example_grad`, and so are `argnums`, `in_axes` and `has_aux`.
        params: the loss's first argument; arrays, or their shapes by `jax.eval_shape`. Where they and the batch lie
            over the devices of a mesh, so is said what each device holds and sends.
        *batch: its other arguments, with a leading axis of examples.
        measure: whether to time the plain gradient, the norms and the clipped sum as well, beside the predictions;
            that takes three compilations and some seconds.

    Returns:
        An `Explanation`: a table by `str()`, data by `.rows`. Costs are of one example's squared norm.

    Raises:
        ValueError: told to `measure`, it was given shapes, or was called under `jit`.

    Example:
        >>> import jax.numpy as jnp, jgd
        >>> loss = lambda w, x: jnp.sum(jnp.tanh(x @ w))
        >>> [row.rule for row in jgd.explain(loss, jnp.ones((200, 300)), jnp.ones((32, 200))).rows]
        ['norms']
    """
    call = bind(loss, (params, *batch), argnums=argnums, in_axes=in_axes, has_aux=has_aux)
    program, constants = trace(call)
    plan = plan_of(program, PLANNED)
    at_once = blocks_at_once(plan.program, call.size, num_shards_of(call.batch_leaves, call.size))
    predicted = _predicted(plan, call.size, factored=at_once is None)
    measured = _measured(program, constants, call) if measure else (None, None)
    total = sum(x.size for x in plan.program.param_avals)
    return Explanation(
        (*_rows(plan), *_unmet(plan)),
        examples=call.size,
        parameters=total,
        strategy="factored" if at_once is None else "materialized",
        norms=predicted[0],
        clipped_sum=predicted[1],
        at_once=call.size if at_once is None else at_once,
        share=share_of(plan, call.size, call.param_leaves, call.batch_leaves),
        measured_norms=measured[0],
        measured_clipped_sum=measured[1],
    )


def _predicted(plan: Plan, size: int, *, factored: bool) -> tuple[float, float]:
    """The times of norms and of the clipped sum, in units of the plain gradient's, for one of `size` examples."""
    avals, device = plan.program.param_avals, plan.device
    own = lookups = again = squares = (
        0.0  # backward to the parameters; what of it is lookups; a sum after the norms
    )
    factored_leaves = set(plan.factored)
    for part in plan.parts:
        products = 0.0
        for rule in part.rules.rules:
            seconds = weight_gradient(rule.factor_sizes, lookup=rule.is_lookup).seconds(device)
            products += seconds if rule.has_factors else 0
            lookups += seconds if rule.is_lookup else 0
        own += products
        again += device.seconds(moved=part.rules.size) if part.leaf in plan.kept else products
        squares += part.rules.cost.seconds(device) if part.leaf in factored_leaves else products
    blocks = sum(
        Cost(2 * avals[leaf].size, 0, 2 * avals[leaf].size).seconds(device)
        for leaf in plan.dense | plan.computed
    )
    squares += blocks
    numbers = sum(x.size for x in avals)
    written = device.seconds(moved=numbers) / max(size, 1)
    # Rows are looked up on the way forward and added to on the way back.
    gradient = device.seconds(large=sum(work_of(plan.program))) + 2 * lookups + blocks
    plain = max(gradient + written, 1e-30)
    if factored:
        norms = max(gradient - own - blocks, 0) + squares
        clipped = norms + again + blocks + written
    else:
        norms = gradient + device.seconds(moved=numbers)
        clipped = norms + device.seconds(moved=numbers) + written
    return norms / plain, clipped / plain


def _measured(program: TracedLoss, constants: list[Any], call: Call) -> tuple[float, float]:
    """The times of norms and of the clipped sum by "auto", in units of the plain gradient's."""
    model = Model(call.param_leaves, constants)
    for x in (*model.params, *model.constants, *call.batch_leaves):
        if isinstance(x, jax.ShapeDtypeStruct) or not is_concrete(x):
            raise ValueError(
                f"`measure=True` runs the loss, but `params` or the batch hold {describe(x)} without numbers: give "
                "concrete arrays, outside of `jit`"
            )

    def plain_gradient(model: Model, batch: list[Any]) -> Any:
        summed = lambda params: jnp.sum(values_of(program, model._replace(params=params), batch)[0])
        return jax.grad(summed)(model.params)

    held = lambda model, batch: gradients_of(program, "auto", True, *model, batch)[2]
    norms_of = lambda form: form.norms(all_together(form.leaf_structs))[0].length
    asked = (
        plain_gradient,
        lambda *of: norms_of(held(*of)),
        lambda *of: clipped_sum(held(*of), 1.0, None),
    )
    runs = {fun: compiled_program(fun, model, call.batch_leaves).run for fun in asked}
    plain, norms, clipped = (min(times) for times in time_interleaved(runs).values())
    return norms / plain, clipped / plain


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _rows(plan: Plan) -> list[ExplainRow]:
    parts = {(id(use.site), use.position): (part, use) for part in plan.parts for use in part.uses}
    factored, rows = set(plan.factored), []
    for site in sites_of(plan.region):
        for position in site.params:
            part, use = parts[id(site), position]
            if part.leaf in factored:
                rows.append(_part_row(plan, part, use))
            else:
                leaves = sorted(site.inputs[position].leaves)
                rows += [_whole_row(plan, site, part, leaf) for leaf in leaves]
    rows += [_spread_row(plan, part, use) for part in plan.spread for use in part.uses]
    return rows + [_dense_row(plan, leaf) for leaf in sorted(plan.dense - {p.leaf for p in plan.spread})]


def _primitive(site: Site) -> str:
    return "identity" if site.eqn is None else site.eqn.primitive.name


def _part_row(plan: Plan, part: Part, use: Use) -> ExplainRow:
    cost = part.rules.cost
    rule = part.rules.method if part.rules.positions > 1 or part.rules.method == "block" else "norms"
    return ExplainRow(
        plan.program.param_paths[part.leaf], _primitive(use.site), *use.rule.factor_sizes, len(part.uses), rule,
        cost.flops, 4 * cost.numbers, _why(plan, part, use),
    )  # fmt: skip


def _spread_row(plan: Plan, part: Part, use: Use) -> ExplainRow:
    why = "spread over many positions: the backward pass makes the block, which is small, as it goes"
    return replace(_part_row(plan, part, use), why=why)


def _dense_row(plan: Plan, leaf: int) -> ExplainRow:
    size = plan.program.param_avals[leaf].size
    why = (
        "it meets data in an equation without a rule, in too many places, or on a way whose derivative depends on what "
        "is differentiated: the backward pass makes its block, as `jax.vmap(jax.grad(loss))` does"
    )
    return ExplainRow(plan.program.param_paths[leaf], "—", 0, 0, 0, 0, 1, "dense", 4 * size, 4 * size, why)


def _why(plan: Plan, part: Part, use: Use) -> str:
    rules = part.rules
    shared = f"; {len(part.uses)} uses add up before the square" if len(part.uses) > 1 else ""
    if not use.rule.has_factors:
        return f"no product over positions: the gradient at the operand is the size of the operand{shared}"
    if not rules.has_pairs:
        return f"its uses lie in the leaf in different ways: the block holds their sum{shared}"
    if rules.method == "pairs" and use.rule.is_lookup:
        return f"only the rows looked up have a gradient: pairs of lookups of one row{shared}"
    if rules.method == "pairs" and rules.positions == 1:
        return "one position: the norm of a product is the product of the norms"
    verb = "take" if rules.method == "pairs" else "would take"
    kept = (
        "; the blocks stay, being little larger than the factors, and make the clipped sum"
        if part.leaf in plan.kept
        else "; each step of the scan has elements of its own: the backward pass takes their square as it goes"
        if plan.is_probed(part)
        else ""
    )
    seconds = {method: cost.seconds(plan.device) for method, cost in rules.costs.items()}
    ratio = seconds["pairs"] / seconds["block"]
    return f"pairs of positions {verb} {ratio:.2g}× the predicted time of the block{shared}{kept}"


def _whole_row(plan: Plan, site: Site, part: Part, leaf: int) -> ExplainRow:
    size, way = plan.program.param_avals[leaf].size, way_of(plan, leaf)
    why, rule = (
        "another use of this leaf overlaps, or is computed from it: the uses add up in the leaf",
        "whole leaf",
    )
    if part.leaf != leaf:
        why = "the operand is computed from the leaf: the operand's gradient is carried back to the leaf"
    if way is not None:
        why, rule = f"the operand is computed from the leaf: {_WAYS[way]}", way
    work = 0 if way is not None else 4 * size
    return ExplainRow(plan.program.param_paths[leaf], _primitive(site), 0, 0, 0, 0, 1, rule, work, work, why)


_WAYS: dict[Way, str] = {
    "identity": "the operand's gradient is the leaf's, on the way back",
    "factors": "the way back takes the factors of its gradient to factors of the leaf's",
    "shift": "beside its own sites it is in numbers whose derivatives all examples share",
    "elementwise": "the way back multiplies each element of its gradient by a number, the same for all examples",
}


def _unmet(plan: Plan) -> list[ExplainRow]:
    met = plan.region.leaves | plan.dense
    missing = [path for leaf, path in enumerate(plan.program.param_paths) if leaf not in met]
    why = "it never meets data: its gradient is 0 at every example"
    return [ExplainRow(path, "—", 0, 0, 0, 0, 0, "none", 0, 0, why) for path in missing]
