"""Random losses, every reduction of which must agree with `vmap(grad)` in float64.

To look at one program, read its seed off the failure: `print(random_program([0, 123], MENDED).text)`. Ten thousand
of them, in processes of their own, with the failing ones shrunk: `python -m tests.programs --help`.
"""

import gc

import hypothesis
import hypothesis.strategies as st
import jax
import pytest
from programs.check import ALL, QUARTERS, Refused, check
from programs.drawing import MENDED
from programs.writer import random_program


def compare(seed, names):
    """Puts one random program to the test: False where it has no finite gradients to compare."""
    program = random_program(seed, MENDED)
    try:
        return check(program, names)
    except Refused:
        return False
    except Exception as error:
        raise AssertionError(f"{program.text}\n{error}") from error


def search(part, number, names):
    """Many random programs. Shrinking a seed would make nothing simpler, so there is none."""

    @hypothesis.settings(max_examples=number, phases=[hypothesis.Phase.generate])
    @hypothesis.given(st.integers(0, 2**32 - 1))
    def test(seed):
        hypothesis.assume(compare([part, seed], names))

    test()


@pytest.fixture(autouse=True)
def forget_the_programs():
    yield
    jax.clear_caches()
    gc.collect()


@pytest.mark.sample(lambda part: part < len(QUARTERS))
@pytest.mark.parametrize("part", range(16))
def test_random_programs(part, x64):
    search(part, 1, QUARTERS[part % 4])


@pytest.mark.slow
@pytest.mark.sample
@pytest.mark.parametrize("part", range(12))
def test_more_random_programs(part, x64):
    search(part, 5, QUARTERS[part % 4])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(100, 140))
def test_many_random_programs(part, x64):
    search(part, 50, ALL)
