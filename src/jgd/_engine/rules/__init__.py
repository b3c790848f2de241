"""Which rule each primitive has. A rule that is registered takes part in everything that is asked.

A match is `match(site, position, view) -> Rule | None`: the rule of the operand at `position`, which is `view` of a
leaf. A leaf with an operand that has no rule is dense: the backward pass makes its gradients as `vmap(grad)` does.
"""

from typing import Any

from jgd._engine.jaxprs import Primitive, prim
from jgd._engine.rules import convolution, dot_general, elementwise, lookup
from jgd._engine.rules.complexes import with_real_parts
from jgd._engine.rules.rule import Match, Rule
from jgd._engine.sites import Site
from jgd._engine.views import View

_BUILT_IN: dict[Any, Match] = {
    prim.dot_general_p: dot_general.match,
    prim.conv_general_dilated_p: convolution.match,
    prim.gather_p: lookup.match_gather,
    prim.dynamic_slice_p: lookup.match_dynamic_slice,
    prim.add_p: elementwise.match_sum,
    prim.add_jaxvals_p: elementwise.match_sum,
    prim.sub_p: elementwise.match_sum,
    prim.mul_p: elementwise.match_product,
    prim.div_p: elementwise.match_product,
    prim.select_n_p: elementwise.match_selection,
    prim.concatenate_p: elementwise.match_piece,
}
_registered: dict[Any, Match] = {}


def rule_of(site: Site, position: int, view: View) -> Rule | None:
    """The rule of a site's operand, which is a view of a leaf; None where it has none."""
    if site.eqn is None:
        rule = elementwise.match_sum(site, position, view)
    else:
        known = (_registered.get(site.eqn.primitive), _BUILT_IN.get(site.eqn.primitive))
        found = (match(site, position, view) for match in known if match is not None)
        rule = next((rule for rule in found if rule is not None), None)
    if rule is None:
        return None
    try:
        hash(rule)
    except TypeError as error:
        raise TypeError(
            f"the rule {rule!r} must be hashable: make it a frozen dataclass without arrays"
        ) from error
    return rule if view.is_complex else with_real_parts(rule, site)


def register(primitive: Primitive, match: Match) -> None:
    """Makes a rule known for a primitive. It is asked before the built-in one, which serves where it says None.

    Args:
        primitive: a JAX primitive, for example `jax.lax.cumsum_p`.
        match: `match(site, position, view)`, to a rule or None, see `jgd.rules`.

    Raises:
        TypeError: `primitive` is no primitive, or `match` is no function.
    """
    if not isinstance(primitive, Primitive):
        raise TypeError(f"`primitive` must be a JAX primitive such as `jax.lax.cumsum_p`, got {primitive!r}")
    if not callable(match):
        raise TypeError(
            f"`match` must be a function of (site, position, view) to a rule or None, got {match!r}"
        )
    _registered[primitive] = match


def unregister(primitive: Primitive) -> None:
    """Removes the rule that was registered for a primitive; the built-in one, if there is one, serves again.

    Raises:
        KeyError: none was registered.
    """
    if primitive not in _registered:
        raise KeyError(f"no rule was registered for the primitive {primitive}")
    del _registered[primitive]


def registered() -> tuple[tuple[Any, Any], ...]:
    """The registered rules, as part of a program's key: one that was planned by other rules is not found again."""
    return tuple(_registered.items())
