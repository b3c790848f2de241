"""What the compiler makes of every reduction, in float32, against gradients that run one operation at a time.

Outside of `jit` the pass and the reductions compile themselves too, so the other side is JAX's `vmap(grad)` under
`jax.disable_jit()`, and NumPy from there. The sizes are such that compilers fuse what they can.
"""

import dataclasses
import gc
import os
import random

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES, Problem
from meshes import is_none, widened
from programs.drawing import MENDED, WIDE
from programs.writer import random_program

import jgd

EXAMPLES = 320  # of a case: its arrays are then as large as those that compilers fuse
PROGRAMS = 3  # programs that the questions are put in

QUESTIONS = {
    "materialize": lambda grads, **_: jgd.materialize(grads),
    "sum": lambda grads, **_: jgd.sum(grads),
    "weighted_sum": lambda grads, weights, **_: jgd.sum(grads, weights),
    "mean": lambda grads, **_: jgd.mean(grads),
    "weighted_mean": lambda grads, weights, **_: jgd.mean(grads, weights),
    "norms": lambda grads, **_: jgd.norms(grads),
    "leaf_norms": lambda grads, **_: jgd.norms(grads, per_leaf=True),
    "dot": lambda grads, direction, **_: jgd.dot(grads, direction),
    "gram": lambda grads, **_: jgd.gram(grads),
    "clipped_sum": lambda grads, max_norm, **_: jgd.clipped_sum(grads, max_norm),
    "weighted_clipped_sum": lambda grads, max_norm, weights, **_: jgd.clipped_sum(
        grads, max_norm, weights=weights
    ),
    "second_moment": lambda grads, **_: jgd.second_moment(grads),
    "weighted_second_moment": lambda grads, weights, **_: jgd.second_moment(grads, weights),
    "variance": lambda grads, **_: jgd.variance(grads),
    "weighted_variance": lambda grads, weights, **_: jgd.variance(grads, weights),
    "noise_scale": lambda grads, **_: jgd.noise_scale(grads)[1:],
}


def many(name, dtype):
    """The case with many examples, each of which comes several times."""
    case, axes = widened(name, dtype)
    who = np.arange(EXAMPLES) % 8
    take = lambda axis, x: x if axis is None else jnp.take(x, who, axis=axis % x.ndim)
    return dataclasses.replace(case, batch=jax.tree.map(take, axes, case.batch, is_leaf=is_none))


def one_by_one(case):
    """The gradients by JAX's own transforms, one operation after the other."""
    grad = jax.grad(case.loss, has_aux=case.has_aux)
    with jax.disable_jit():
        out = jax.vmap(grad, case.in_axes)(case.params, *case.batch)
    return jax.tree.map(lambda x: np.asarray(x, np.float64), out[0] if case.has_aux else out)


def narrow(case):
    """The problem in float32 and int32."""
    kinds = {np.dtype(np.float64): np.float32, np.dtype(np.int64): np.int32}
    cast = lambda x: x if x.dtype not in kinds else np.asarray(x, kinds[x.dtype])
    return dataclasses.replace(
        case, params=jax.tree.map(cast, case.params), batch=jax.tree.map(cast, case.batch)
    )


def compare(case, exact, questions, *, what):
    """Asks the questions, some in one program; False where there is nothing to compare.

    `exact` is the same problem in float64. What float32 rounds is seen where nothing is compiled, and only looked at
    where an answer differs by more than a well-conditioned loss would.
    """
    with jax.enable_x64(True):
        blocks = one_by_one(exact)
    rows = oracle.matrix(blocks)
    if not np.all(np.isfinite(rows)) or np.max(np.abs(rows)) > 1e15:
        return False
    draw, norms = np.random.default_rng(0), np.linalg.norm(rows, axis=1)
    arguments = {
        "weights": np.resize(np.float32([1.5, 0.0, 0.5, 2.0, 1.0]), len(rows)),
        "max_norm": max(0.9 * float(np.median(norms)), 1e-3),
        "direction": jax.tree.map(lambda x: draw.normal(size=x.shape[1:]).astype(np.float32), blocks),
    }
    want = oracle.answers(blocks, blocks, **arguments)
    gradients = jgd.per_example_grad(case.loss, strategy="factored", **case.options)

    def ask(params, batch, arguments, names):
        grads = gradients(params, *batch)
        return {name: QUESTIONS[name](grads, **arguments) for name in names}

    # What the means cancel rounds as the squares do.
    beside = {name: want["second_moment"] for name in ("variance", "weighted_variance", "noise_scale")}

    def check(name, got, tolerance):
        square = beside.get(name)
        oracle.assert_close((got, square), (want[name], square), tolerance, what=name)

    questions, wrong, tolerance = list(questions), {}, 2e-4
    compiled = jax.jit(ask, static_argnums=3)
    for first in range(PROGRAMS):
        names = tuple(questions[first::PROGRAMS])
        for name, got in compiled(case.params, case.batch, arguments, names).items():
            try:
                check(name, got, tolerance)
            except AssertionError:
                wrong[name] = got
    if wrong:
        off = np.max(np.abs(oracle.matrix(one_by_one(case)) - rows)) / np.max(np.abs(rows))
        if not off < 1e-2:
            return False
        tolerance = max(tolerance, 100 * off)
    for name, got in wrong.items():
        try:
            check(name, got, tolerance)
        except AssertionError as error:
            raise AssertionError(f"{what}\n{error}") from None
    return True


@pytest.fixture(autouse=True)
def forget_the_programs():
    yield
    jax.clear_caches()
    gc.collect()


def case_of(name):
    with jax.enable_x64(True):
        exact = many(name, jnp.float64)
    return many(name, jnp.float32), exact


def sampled(names, number, seed):
    """A few names, other ones for each seed."""
    return random.Random(seed).sample(sorted(names), number)


@pytest.mark.slow
@pytest.mark.sample
@pytest.mark.parametrize("name", sampled(CASES, 2, "cases"))
def test_some_cases_compiled(name):
    compare(*case_of(name), sampled(QUESTIONS, 4, name), what=name)


# Of how many cases and random programs the slow tests are: all of them, which takes most of an hour, or some.
SWEEP = int(os.environ.get("JGD_SWEEP", 0)) or None


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(CASES, SWEEP, "sweep") if SWEEP else CASES)
def test_every_case_compiled(name):
    compare(*case_of(name), QUESTIONS, what=name)


def compare_program(seed, questions):
    with jax.enable_x64(True):
        program = random_program(seed, MENDED - {"ids"}, sizes=WIDE)
    return compare(narrow(program.problem), program.problem, questions, what=program.text)


def test_some_random_programs_compiled():
    compared = [compare_program([0, k], sampled(QUESTIONS, 4, k)) for k in range(2)]
    assert any(compared)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SWEEP or 100))
def test_many_random_programs_compiled(seed):
    if not compare_program([1, seed], QUESTIONS):
        pytest.skip("no finite gradients, or float32 rounds too much")


def dense():
    w, x = np.ones((3, 2)), np.arange(12.0).reshape(4, 3)
    return Problem(lambda w, x: jnp.sum(jnp.tanh(x @ w / 10)), w, (x,))


def test_a_wrong_answer_is_found(monkeypatch):
    assert compare(narrow(dense()), dense(), ["norms"], what="dense")
    monkeypatch.setitem(QUESTIONS, "norms", lambda grads, **_: jgd.norms(grads) * 1.001)
    with pytest.raises(AssertionError, match="norms"):
        compare(narrow(dense()), dense(), ["norms"], what="dense")
