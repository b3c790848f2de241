"""What XLA's partitioner computes wrongly if the examples lie over several devices, and the leaves concerned.

It gets the derivative of a convolution in groups wrong, and `vmap` makes every convolution one whose kernel differs
from example to example (docs/mesh.md). The rule of a convolution does without such a derivative.
"""

from jgd._engine.jaxprs import mentions, prim, scan_of
from jgd._engine.plan import Plan
from jgd._engine.sites import Nested, Region, Site


def wrong_when_sharded(plan: Plan) -> bool:
    """Whether the pass may make gradients wrongly: where a kernel is computed from data and a parameter."""
    first = len(plan.program.jaxpr.constvars)
    dense = {id(plan.region.inputs[first + leaf]) for leaf in plan.dense}
    return plan.program.once(("perturbed kernel", plan.dense), lambda: _makes_kernel(plan.region, dense))


def sum_is_wrong_when_sharded(plan: Plan) -> bool:
    """Whether the gradient of the summed losses may be wrong too: where that kernel differs between examples."""
    first = len(plan.region.inputs) - len(plan.program.avals()[2])
    examples = set(map(id, plan.region.inputs[first:]))
    differs = plan.program.once(("kernel of data", plan.dense), lambda: _makes_kernel(plan.region, examples))
    return wrong_when_sharded(plan) and differs


def _makes_kernel(region: Region, perturbed: set[int]) -> bool:
    """Whether a kernel is computed from the `perturbed` values, told by identity. Those of the region join them."""
    for op in region.ops:
        moved = [id(x) in perturbed for x in op.inputs]
        if any(moved) or isinstance(op, Site):
            perturbed.update(map(id, op.outputs))
        if isinstance(op, Nested):
            perturbed.update(map(id, op.outputs))  # sites are inside
            for inner in op.regions:
                own = moved[len(op.inputs) - len(inner.inputs) :]
                perturbed.update(id(x) for x, m in zip(inner.inputs, own, strict=True) if m)
                if op.loop is not None:  # what a scan carries may be computed from anything that enters it
                    scan = scan_of(op.eqn)
                    perturbed.update(map(id, inner.inputs[scan.num_consts :][: scan.num_carry]))
                if _makes_kernel(inner, perturbed):
                    return True
        elif op.eqn is not None and op.eqn.primitive is prim.conv_general_dilated_p:
            if moved[1]:
                return True
        elif any(moved) and op.eqn is not None and mentions(op.eqn, prim.conv_general_dilated_p):
            return True
    return False


def refuse(plan: Plan) -> None:
    """Raises NotImplementedError: XLA would compute gradients wrongly."""
    named = plan.program.param_paths[min(plan.dense, default=0)]
    raise NotImplementedError(
        f"a parameter, such as {named}, may make a kernel that no rule knows, and over a sharded batch XLA computes "
        "the examples' gradients of that wrongly, with or without jgd: ask inside of `jax.shard_map`, see docs/mesh.md"
    )
