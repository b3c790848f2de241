"""The versions of jaxlib that compute wrong numbers on a CPU: which are refused, and which are gone round.

docs/xla_report.md has the programs, and what each version makes of them.
"""

import warnings
from importlib.metadata import version

JAXLIB = version("jaxlib")

# The version whose error cannot be gone round, and those that are wrong on CPUs alone, with what they get wrong.
# pyproject.toml excludes them all. Where something else installed one of the latter, as for a GPU, that is a warning.
REFUSED = {"0.10.2": "sums of products that are mapped over examples"}
DOUBTED = dict.fromkeys(("0.11.0", "0.11.1", "0.11.2"), "sums of arrays that are broadcast")

# The first version that computes a product and what reduces it in one kernel, wrongly where the product's right operand
# is broadcast along the product's columns. `tests/test_compiler.py` says when a version no longer does.
FUSES_PRODUCTS = (0, 10, 2)


def release(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: `(0, 12, 0, 1)` of "0.12.0.1", `(0, 13, 0)` of "0.13.0.dev20261128"."""
    numbers = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def fuses_products(jaxlib: str) -> bool:
    """Whether a version of jaxlib needs the way round of `stored.py`."""
    return release(jaxlib) >= FUSES_PRODUCTS


def check(jaxlib: str) -> None:
    """Raises ImportError for a version of jaxlib that is refused, and warns of one that is doubted."""
    wrong = "on a CPU it computes {} wrongly, without an error"
    instead = (
        "Install a version that is right: `pip install 'jax==0.10.1' 'jaxlib==0.10.1'`, or from Python 3.12 on "
        "`pip install 'jax>=0.12' 'jaxlib>=0.12'`"
    )
    if jaxlib in REFUSED:
        raise ImportError(
            f"jgd does not run with jaxlib {jaxlib}: {wrong.format(REFUSED[jaxlib])}. {instead}"
        )
    if jaxlib in DOUBTED:
        warnings.warn(f"jaxlib {jaxlib}: {wrong.format(DOUBTED[jaxlib])}. {instead}", stacklevel=2)


check(JAXLIB)
