"""The forward pass of one example with a tap at each site, and the replay of the sites alone.

`run` evaluates a region as it stands; each site's output passes through a tap, whose derivative is the
site's δ, and the DATA operands that the sites need come out beside the result: the records.
`replay` evaluates the sites once more from the parameters, the records standing in for all that came before:
its `vjp` at the δ's is the example's gradient, its `jvp` the products with a direction.

Records and taps are trees alike: what a region has, then, for each of its nested operations, a tree for each
region of that. What lies inside a scan has the steps as a leading axis.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import GatherScatterMode

from jgd._engine.jaxprs import bind, prim, scan_of
from jgd._engine.regions import Nested, Op, Region, Side, Site, Value, needed_by, recorded
from jgd._mesh import varying

Tree = tuple[tuple[Any, ...], tuple[tuple[Any, ...], ...]]


@jax.custom_jvp
def _tap(x: jax.Array, tap: jax.Array) -> jax.Array:
    # Not `x + tap`: that would turn −0 into 0, and a scan would carry the zeros through memory.
    return x


@_tap.defjvp
def _tap_jvp(primals: Any, tangents: Any) -> Any:
    return primals[0], tangents[0] + tangents[1]


def taps_of(region: Region) -> Sequence[Value]:
    """The values that a region taps."""
    return region.taps


def records_of(region: Region) -> Sequence[Value]:
    """The values that a region keeps for its sites."""
    return region.records


def batch_axes(region: Region, of: Callable[[Region], Sequence[Value]], depth: int = 0) -> Tree:
    """Where the examples' axis lies in a tree of a batch: behind the steps of the scans around, as a scan leaves it."""
    inner = tuple(
        tuple(batch_axes(r, of, depth if op.loop is None else depth + 1) for r in op.regions)
        for op in region.ops
        if isinstance(op, Nested)
    )
    return tuple(depth for _ in of(region)), inner


def zeros(region: Region, of: Callable[[Region], Sequence[Value]], lead: tuple[int, ...] = ()) -> Tree:
    """A tree of zeros for what each region has of values."""
    own = tuple(_zero(value.aval, lead) for value in of(region))
    inner = tuple(
        tuple(zeros(r, of, lead if op.loop is None else (*lead, op.loop[1])) for r in op.regions)
        for op in region.ops
        if isinstance(op, Nested)
    )
    return own, inner


def _zero(aval: jax.ShapeDtypeStruct, lead: tuple[int, ...]) -> jax.Array:
    shape = (*lead, *aval.shape)
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        like: Any = aval
        return jnp.broadcast_to(jax.random.key(0, impl=jax.random.key_impl(like)), shape)
    return jnp.zeros(shape, aval.dtype)


Watch = Callable[[Value, jax.Array, Callable[[Value], Any]], jax.Array]


def run(
    region: Region, inputs: Sequence[Any], taps: Tree, watch: Watch = lambda value, x, look: x
) -> tuple[list[Any], Tree]:
    """One example's forward pass: the region's outputs and its records.

    Each value that is tapped goes through `watch`, with the way to look at the others at hand there.
    """
    env, inner_taps = _Environment(region.inputs, inputs), iter(taps[1])
    tap = {id(value): array for value, array in zip(region.taps, taps[0], strict=True)}
    inner_records = []
    for op in region.ops:
        operands = [env[x] for x in op.inputs]
        if isinstance(op, Nested):
            outputs, records = _run_nested(op, operands, next(inner_taps), watch)
            inner_records.append(records)
        else:
            outputs = operands if op.eqn is None else bind(op.eqn, operands)
        values = zip(op.outputs, outputs, strict=True)
        tapped = lambda v, x: _tap(watch(v, x, env.__getitem__), tap[id(v)])
        env.set(op.outputs, [tapped(v, x) if id(v) in tap else x for v, x in values])
    return [env[x] for x in region.outputs], (tuple(env[x] for x in region.records), tuple(inner_records))


class _Environment:
    """The values at hand, by identity; a literal is its own."""

    def __init__(self, values: Sequence[Value], arrays: Sequence[Any]):
        self._arrays: dict[int, Any] = {}
        self.set(values, arrays)

    def set(self, values: Sequence[Value], arrays: Sequence[Any]) -> None:
        self._arrays.update((id(value), array) for value, array in zip(values, arrays, strict=True))

    def __getitem__(self, value: Value) -> Any:
        return self._arrays[id(value)] if value.literal is None else value.literal


def _run_nested(op: Nested, operands: list[Any], taps: Any, watch: Watch) -> tuple[Sequence[Any], Any]:
    if op.eqn.primitive is prim.scan_p:
        return _run_scan(op, operands, taps[0], watch)
    if op.eqn.primitive is prim.remat_p:
        again = jax.checkpoint(
            lambda inputs, taps: run(op.regions[0], inputs, taps, watch),
            policy=op.eqn.params["policy"],
            prevent_cse=op.eqn.params["prevent_cse"],
        )
        outputs, records = again(operands, taps[0])
        return outputs, (records,)

    def branch(number: int) -> Callable[..., Any]:
        def run_branch(inputs: list[Any], taps: Any) -> Any:
            outputs, own = run(op.regions[number], inputs, taps[number], watch)
            blank = [zeros(region, records_of) for region in op.regions]
            return varying((outputs, (*blank[:number], own, *blank[number + 1 :])), operands)

        return run_branch

    return jax.lax.switch(operands[0], [branch(k) for k in range(len(op.regions))], operands[1:], taps)


def _run_scan(op: Nested, operands: list[Any], taps: Tree, watch: Watch) -> tuple[Sequence[Any], Any]:
    scan = scan_of(op.eqn)
    ends = scan.num_consts, scan.num_consts + scan.num_carry
    consts, xs = operands[: ends[0]], operands[ends[1] :]
    carry = [jnp.asarray(x, v.aval.dtype) for x, v in _arrays(operands, op.inputs)[ends[0] : ends[1]]]

    def body(carry: list[Any], step: Any) -> Any:
        outputs, records = run(op.regions[0], [*consts, *carry, *step[0]], step[1], watch)
        return outputs[: scan.num_carry], (outputs[scan.num_carry :], records)

    carry, (ys, records) = jax.lax.scan(
        body, carry, (xs, taps), length=scan.length, reverse=scan.reverse, unroll=scan.unroll
    )
    return [*carry, *ys], (records,)


def _arrays(operands: list[Any], values: Sequence[Value]) -> list[tuple[Any, Value]]:
    return list(zip(operands, values, strict=True))


def replay(
    region: Region,
    known: Sequence[Any],
    records: Tree,
    wanted: Callable[[Op], bool],
    bumps: Tree | None = None,
) -> list[Any]:
    """The tapped outputs of the wanted sites, from the known inputs and the records of one example.

    Args:
        region: the region.
        known: its inputs; of the DATA inputs, only those that it asks for are looked at.
        records: its records.
        wanted: which sites, and which nested operations, to replay.
        bumps: what to add to the sites' parameter operands, see `bumps_of`.
    """
    env, inner = _Environment(region.inputs, known), iter(records[1])
    env.set(region.records, records[0])
    bump, inner_bumps = (None, None) if bumps is None else (iter(bumps[0]), iter(bumps[1]))
    outputs: list[Any] = []
    for op in region.ops:
        if isinstance(op, Nested):
            parts = next(inner), None if inner_bumps is None else next(inner_bumps)
            if wanted(op):
                asked = {id(x) for x in needed_by(op)}
                operands = [env[x] if x.side != Side.DATA or id(x) in asked else None for x in op.inputs]
                outputs += _replay_nested(op, operands, parts, wanted)
        elif isinstance(op, Site):
            added = {i: None if bump is None else next(bump) for i in op.params}
            if wanted(op):
                outputs += _replay_site(op, env, added)
        elif op.known:
            operands = [env[x] for x in op.inputs]
            env.set(op.outputs, bind(op.eqn, varying(operands, operands)))
    return outputs


def bumps_of(region: Region, chosen: Callable[[Site, int], bool], lead: tuple[int, ...] = ()) -> Tree:
    """A tree of zeros to add to each chosen parameter operand of a site; None for those not chosen."""
    own = tuple(
        _zero(op.inputs[i].aval, lead) if chosen(op, i) else None
        for op in region.ops
        if isinstance(op, Site)
        for i in op.params
    )
    inner = tuple(
        tuple(bumps_of(r, chosen, lead if op.loop is None else (*lead, op.loop[1])) for r in op.regions)
        for op in region.ops
        if isinstance(op, Nested)
    )
    return own, inner


def _replay_site(site: Site, env: _Environment, bumps: dict[int, Any]) -> list[Any]:
    kept = {id(x) for x in recorded(site)}
    operands = []
    for position, x in enumerate(site.inputs):
        if x.side != Side.DATA:
            bump = bumps.get(position)
            operands.append(env[x] if bump is None else env[x] + bump)
        else:  # where the site only adds, the operand's value makes no difference
            shared = [env[site.inputs[i]] for i in site.params]
            zero = varying(jnp.zeros(x.aval.shape, x.aval.dtype), shared)
            operands.append(env[x] if id(x) in kept else zero)
    outputs = operands if site.eqn is None else _REPLAYED.get(site.eqn.primitive, bind)(site.eqn, operands)
    return [outputs[i] for i in site.tapped]


def _pad(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    # JAX cannot transpose a pad in its value alone, which is what is left when the operand is recorded data.
    operand, value = operands
    zero, one = jnp.zeros((), operand.dtype), jnp.ones((), operand.dtype)
    config = eqn.params["padding_config"]
    around = jax.lax.pad(jnp.zeros_like(operand), one, config)
    return [jax.lax.pad(operand, zero, config) + value * around]


def _gather(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    # Out of bounds, a gather that was promised none clamps forward and drops backward: here it drops both ways.
    if eqn.params["mode"] != GatherScatterMode.PROMISE_IN_BOUNDS:
        return bind(eqn, operands)
    params = {k: v for k, v in eqn.params.items() if k not in ("mode", "fill_value")}
    return [eqn.primitive.bind(*operands, **params, mode=GatherScatterMode.FILL_OR_DROP, fill_value=0)]


_REPLAYED = {prim.pad_p: _pad, prim.gather_p: _gather}


def _replay_nested(op: Nested, operands: list[Any], parts: tuple[Any, Any], wanted: Any) -> list[Any]:
    records, bumps = parts
    bumps = [None] * len(op.regions) if bumps is None else bumps
    if op.eqn.primitive is prim.remat_p:
        return replay(op.regions[0], operands, records[0], wanted, bumps[0])
    if op.eqn.primitive is prim.cond_p:
        return _replay_cond(op, operands, (records, bumps), wanted)
    # What the carry held is recorded, so the steps do not wait for each other: they are one more batch axis.
    scan = scan_of(op.eqn)
    first = scan.num_consts + scan.num_carry
    axes = [None if i < first or x is None else 0 for i, x in enumerate(operands)]
    step = lambda operands, records, bumps: replay(op.regions[0], operands, records, wanted, bumps)
    if not has_branches(op.regions[0]):
        return jax.vmap(step, in_axes=(axes, 0, 0), axis_size=scan.length)(operands, records[0], bumps[0])

    def one(_: None, xs: Any) -> tuple[None, list[Any]]:
        return None, step([*operands[:first], *xs[0]], *xs[1:])

    # Under `vmap` every branch would be differentiated, and those not taken may have no derivative.
    return jax.lax.scan(one, None, (operands[first:], records[0], bumps[0]), length=scan.length)[1]


def _replay_cond(op: Nested, operands: list[Any], parts: tuple[Any, Any], wanted: Any) -> list[Any]:
    """The outputs of all branches: zeros for those that were not taken."""
    known = [x for x in operands if x is not None]
    blank = [[jnp.zeros_like(x) for x in picked(r, zeros(r, taps_of), wanted)] for r in op.regions]
    blank = varying(blank, known)  # out here: JAX does not differentiate the cast of a constant in a branch

    def branch(number: int, region: Region, records: Tree, bumps: Any) -> Callable[[], list[Any]]:
        def replay_branch() -> list[Any]:
            own = replay(region, operands[1:], records, wanted, bumps)
            made = [x for each in (*blank[:number], own, *blank[number + 1 :]) for x in each]
            return varying(made, known)

        return replay_branch

    each = zip(range(len(blank)), op.regions, *parts, strict=True)
    return jax.lax.switch(operands[0], [branch(*arguments) for arguments in each])


def has_branches(region: Region) -> bool:
    """Whether a region has a `cond` in which a parameter meets data, at any depth."""
    nested = [op for op in region.ops if isinstance(op, Nested)]
    return any(len(op.regions) > 1 or any(map(has_branches, op.regions)) for op in nested)


def picked(region: Region, tree: Tree, wanted: Callable[[Op], bool]) -> list[Any]:
    """From a tree like the taps, what belongs to the wanted sites, in the order in which `replay` returns them."""
    inner, found = iter(tree[1]), []
    for op in region.ops:
        if isinstance(op, Nested):
            parts = next(inner)
            if wanted(op):
                found += [
                    x for r, part in zip(op.regions, parts, strict=True) for x in picked(r, part, wanted)
                ]
        elif isinstance(op, Site) and wanted(op):
            found += [tree[0][region.delta_at(op.outputs[i])] for i in op.tapped]
    return found
