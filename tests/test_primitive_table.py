"""Every differentiable primitive of JAX with a parameter meeting data in it: exact, and none of them forgotten.

The default run asks one instance of each; `-m slow` all that JAX ships. docs/primitives.md is the table.
"""

import collections
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from catalogue import UNAVAILABLE, instances, primitives_in
from instances import NOT_COVERED, own_instances
from primitive_table import EXCEPTIONS, QUANTITIES, NoDerivative, answers_of, is_inexact, representative

GROUPS = collections.defaultdict(list)
for _instance in instances():
    GROUPS[_instance.group].append(_instance)
CHOSEN = {group: representative(found) for group, found in GROUPS.items()}
CHOSEN |= {instance.group: instance for instance in own_instances()}
# Nothing to differentiate: what JAX says of them stands in the table.
PLAIN = {
    group
    for group, instance in CHOSEN.items()
    if not any(map(is_inexact, instance.draw(np.random.RandomState(0))))
}
SHARE = 2  # of the questions, for each instance of the default run


def test_the_catalogue_is_there():
    assert not UNAVAILABLE, f"{UNAVAILABLE}: find it, and mend tests/catalogue.py"


def check(instance, quantities=QUANTITIES):
    try:
        answers = answers_of(instance, quantities, with_rules=False)
    except NoDerivative:
        return
    failed = [x for x in answers if x.error and (instance.group, x.role) not in EXCEPTIONS]
    assert not failed, "\n".join(f"{x.role}: {x.error}" for x in failed)


# Functions of one number to one number have no rule of their own: all go by the fallback, and some will do.
ELEMENTWISE = (
    "abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "bessel_i0e", "bessel_i1e", "cbrt", "ceil", "cos",
    "cosh", "digamma", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "imag", "integer_pow", "is_finite",
    "lgamma", "log", "log1p", "log2", "logistic", "neg", "real", "round", "rsqrt", "sign", "sin", "sinh", "sqrt",
    "square", "tan", "tanh",
)  # fmt: skip


def _by_default(group):
    """Each twelfth of the functions of one number, and each sixth of the others."""
    if group in ELEMENTWISE:
        return ELEMENTWISE.index(group) % 12 == 0
    return sorted(set(CHOSEN) - PLAIN - set(ELEMENTWISE)).index(group) % 6 == 0


@pytest.mark.sample(lambda group: _by_default(group))
@pytest.mark.parametrize("group", sorted(set(CHOSEN) - PLAIN))
def test_primitive(group, x64):
    start = sorted(CHOSEN).index(group) * SHARE
    check(CHOSEN[group], [QUANTITIES[(start + k) % len(QUANTITIES)] for k in range(SHARE)])


def test_no_primitive_is_forgotten(x64):
    """One that a new JAX brings is named here: give it an instance in tests/instances.py, or a reason."""
    code = "import json, catalogue; print(json.dumps(sorted(catalogue.known_primitives())))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    covered = set()
    for instance in CHOSEN.values():
        covered |= primitives_in(instance.fun, *instance.draw(np.random.RandomState(0)))
    forgotten = set(json.loads(done.stdout)) - covered - set(NOT_COVERED)
    assert not forgotten, (
        f"JAX {jax.__version__} has primitives that no row of the table covers: {sorted(forgotten)}"
    )
    assert not covered & set(NOT_COVERED), f"covered after all: {sorted(covered & set(NOT_COVERED))}"


@pytest.mark.slow
@pytest.mark.parametrize("group", sorted(set(GROUPS) - PLAIN))
def test_every_instance(group, x64):
    for number, instance in enumerate(GROUPS[group]):
        floating = [x for x in instance.draw(np.random.RandomState(0)) if is_inexact(x)]
        if floating and all(
            x.dtype.itemsize >= 4 for x in floating
        ):  # the narrower ones are the same functions
            check(instance)
        if number % 20 == 0:
            jax.clear_caches()
