"""What XLA's partitioner computes wrongly if the examples lie over several devices, and the leaves concerned.

It gets the derivative of a convolution in groups wrong, and `vmap` makes every convolution one whose kernel differs
from example to example (docs/mesh.md). The rule of a convolution does without such a derivative.
"""

from jgd._engine.jaxprs import mentions, prim
from jgd._engine.plan import Plan
from jgd._engine.sites import Nested, Region, Side


def wrong_when_sharded(plan: Plan) -> frozenset[int]:
    """The leaves whose blocks the pass would make wrongly: dense ones, where a kernel is data."""
    return plan.dense if plan.dense and _has_data_kernel(plan.region) else frozenset()


def _has_data_kernel(region: Region) -> bool:
    for op in region.ops:
        if isinstance(op, Nested):
            if any(map(_has_data_kernel, op.regions)):
                return True
        elif op.eqn is not None and op.eqn.primitive is prim.conv_general_dilated_p:
            if op.inputs[1].side == Side.DATA:
                return True
        elif op.eqn is not None and mentions(op.eqn, prim.conv_general_dilated_p):
            return True
    return False


def refuse(plan: Plan) -> None:
    """Raises NotImplementedError where XLA would compute gradients wrongly."""
    for leaf in sorted(wrong_when_sharded(plan)):
        raise NotImplementedError(
            f"the parameter {plan.program.param_paths[leaf]} may make a kernel that no rule knows, and over a "
            "sharded batch XLA computes the examples' gradients of that wrongly, with or without jgd: ask inside "
            "of `jax.shard_map`, see docs/mesh.md"
        )
