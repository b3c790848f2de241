"""The rules: how the gradient at a site is factored, by the site's primitive. One file each.

A rule is `match(site, position, view) -> Use | None`: what to make of the operand at `position`, which is `view`
of a leaf. None leaves the operand opaque, and that is always right.
"""

from collections.abc import Callable
from typing import Any

from jgd._engine.jaxprs import prim
from jgd._engine.regions import Site
from jgd._engine.rules import convolution, dot_general, lookup
from jgd._engine.rules.complexes import by_real_parts
from jgd._engine.uses import Use, opaque
from jgd._engine.views import View

Rule = Callable[[Site, int, View], Use | None]

RULES: dict[Any, Rule] = {
    prim.dot_general_p: dot_general.match,
    prim.conv_general_dilated_p: convolution.match,
    prim.gather_p: lookup.match_gather,
    prim.dynamic_slice_p: lookup.match_dynamic_slice,
}


def use_of(site: Site, position: int, view: View) -> Use:
    """The use that an operand of a site makes of its leaf."""
    rule = None if site.eqn is None else RULES.get(site.eqn.primitive)
    use = None if rule is None else rule(site, position, view)
    use = None if use is None else by_real_parts(use)
    return opaque(site, position, view) if use is None else use
