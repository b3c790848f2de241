"""JAX's own catalogue of primitives and of their instances, and the instances that it lacks.

The one file of the tests that imports what JAX keeps private. Where that has moved, `UNAVAILABLE` says so.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core.primitives
import jax.interpreters.ad
import jax.numpy as jnp
import numpy as np

try:
    from jax._src.internal_test_util import test_harnesses as _harnesses
except ImportError as error:  # its place is JAX's own business
    _harnesses, UNAVAILABLE = None, f"JAX {jax.__version__} has moved its catalogue of primitives: {error}"
else:
    UNAVAILABLE = ""


@dataclass(frozen=True)
class Instance:
    """One use of one primitive: a function of arrays, and how its arguments are drawn."""

    group: str  # the primitive, as the catalogue calls it
    name: str
    fun: Callable[..., Any]
    draw: Callable[[np.random.RandomState], list[Any]]  # the arrays among its arguments

    def __str__(self) -> str:
        return f"{self.group}-{self.name}"


def instances() -> Iterator[Instance]:
    """All of JAX's instances that have a floating or complex argument, but for those it cannot run itself."""
    if _harnesses is None:
        return
    for harness in _harnesses.all_harnesses:
        if not harness.filter("cpu"):
            continue
        draw = functools.partial(_draw, harness)
        yield Instance(harness.group_name, harness.name, harness.dyn_fun, draw)


def _draw(harness: Any, rng: np.random.RandomState) -> list[Any]:
    return [np.asarray(x) if not isinstance(x, jax.Array) else x for x in harness.dyn_args_maker(rng)]


def known_primitives() -> set[str]:
    """The names of all primitives that JAX lists or has a derivative of, as its own modules leave them.

    Packages add to the second list when they are imported: ask in a process that has imported nothing else.
    """
    listed = vars(jax.extend.core.primitives).values()
    return {p.name for p in [*listed, *jax.interpreters.ad.primitive_jvps] if hasattr(p, "bind")}


def primitives_in(fun: Callable[..., Any], *args: Any) -> set[str]:
    """The names of the primitives that a function of arrays goes through, in all that it calls as well."""
    found: set[str] = set()

    def visit(jaxpr: Any) -> None:
        for eqn in jaxpr.eqns:
            if any(jnp.issubdtype(getattr(x.aval, "dtype", np.int32), jnp.inexact) for x in eqn.invars):
                found.add(eqn.primitive.name)
            for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                visit_any(inner)

    def visit_any(x: Any) -> None:
        x = getattr(x, "jaxpr", x)
        if hasattr(x, "eqns"):
            visit(x)

    visit_any(jax.make_jaxpr(fun)(*args))
    return found
