"""The way round an error of XLA on CPUs: a value that is stored before it is used.

From jaxlib 0.10.2 on XLA compiles a product, what makes its operands and what reduces it into one kernel. Where the
right operand is an array that is broadcast along the product's columns, the kernel reads memory that nobody wrote:
docs/xla_report.md. A broadcast that is stored first is an array like any other. What is stored anyway, as arguments and
the results of other products are, costs nothing more: `stored` is the identity, and keeps the compiler from fusing.

So the engine stores the operands of each product that it computes, and all residuals.
`tests/test_compiler.py` says when this may go.
"""

from typing import Any

import jax
from jax.interpreters import ad, batching, mlir

from jgd._engine.jaxprs import Primitive
from jgd._engine.versions import JAXLIB, fuses_products

_stored_p = Primitive("stored")  # not `optimization_barrier` itself: only where the program is for a CPU
_stored_p.def_impl(lambda x: x)
_stored_p.def_abstract_eval(lambda x: x)
ad.deflinear2(_stored_p, lambda cotangent, _: [_stored_p.bind(cotangent)])
batching.primitive_batchers[_stored_p] = lambda args, axes: (_stored_p.bind(*args), *axes)
mlir.register_lowering(_stored_p, lambda _, x: [x])
if fuses_products(JAXLIB):
    barrier = mlir.lower_fun(jax.lax.optimization_barrier, multiple_results=False)
    mlir.register_lowering(_stored_p, barrier, platform="cpu")


def stored(tree: Any) -> Any:
    """The same arrays, each computed and stored by itself before anything uses it."""
    return jax.tree.map(_stored_p.bind, tree)
