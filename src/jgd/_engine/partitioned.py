"""What XLA's partitioner computes wrongly when the examples lie over several devices, and which leaves that meets.

It gets the derivative of a convolution in groups wrong, and `vmap` makes every convolution one (docs/mesh.md).
"""

from jgd._engine.jaxprs import prim
from jgd._engine.plan import Plan
from jgd._engine.regions import sites_of


def grouped_kernels(plan: Plan, *, groups: int) -> frozenset[int]:
    """The kernels of convolutions in at least so many groups, whose gradient only the rule gives."""
    uses = [use for part in plan.parts for use in part.uses if use.rule == "convolution"]
    counts = ((use.leaf, use.site.eqn.params["feature_group_count"]) for use in uses)
    return frozenset(leaf for leaf, count in counts if count >= groups)


def unruled_kernels(plan: Plan, *, batch_groups: int = 1) -> frozenset[int]:
    """The leaves that make a kernel, of at least so many `batch_groups`, whose gradient no rule gives."""
    # The plans of a program differ in methods, not in rules.
    return plan.program.once(("unruled kernels", batch_groups), lambda: _unruled_kernels(plan, batch_groups))


def _unruled_kernels(plan: Plan, batch_groups: int) -> frozenset[int]:
    uses = (use for part in plan.parts for use in part.uses if use.rule != "opaque")
    ruled = {(id(use.site), use.position) for use in uses}
    convolutions = [
        site
        for site in sites_of(plan.region)
        if site.eqn is not None
        and site.eqn.primitive is prim.conv_general_dilated_p
        and site.eqn.params["batch_group_count"] >= batch_groups
    ]
    return frozenset().union(*(s.inputs[1].leaves for s in convolutions if (id(s), 1) not in ruled))


def refuse(plan: Plan, leaves: frozenset[int]) -> None:
    """Raises NotImplementedError where there are leaves whose gradient XLA would compute wrongly."""
    for leaf in sorted(leaves):
        raise NotImplementedError(
            f"the parameter {plan.program.param_paths[leaf]} makes a kernel that no rule knows, and over a "
            "sharded batch XLA computes the examples' gradients of that wrongly, with or without jgd: ask inside "
            "of `jax.shard_map`, see docs/mesh.md"
        )
