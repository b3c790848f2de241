"""Every reduction, of every case, by every strategy, against NumPy on `vmap(grad)` in float64."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES, B, Problem, problem
from internals import SECOND_PASS, form_of, has_second_pass, sums_of

import jgd

STRATEGIES = ("auto", "factored", "materialized")
WEIGHTS = np.array([1.5, 0.0, 0.5, 2.0, 1.0])
FEW = ("mlp_classifier", "conv2d_all_options", "tied_embedding_and_head", "nested_scans", "auxiliary_output")
NARROW = (
    *FEW,
    "recurrence",
    "embedding_repeated_indices",
    "layer_norm",
    "weight_normalisation",
    "physics_informed",
)


class Solved(NamedTuple):
    """A case in some dtype, and what every reduction must answer: in float64, from the numbers that it holds."""

    case: Problem
    other: Problem  # the same parameters, other examples
    values: Any
    aux: Any
    blocks: Any
    arguments: dict[str, Any]
    want: dict[str, Any]


@functools.lru_cache(maxsize=2)
def solved(name, dtype=jnp.float64):
    case = problem(name, dtype)
    other = dataclasses.replace(case, batch=problem(name, dtype, batch_seed=1).batch)
    with jax.enable_x64(True):
        (values, aux), blocks = oracle.loop_of_value_and_grad(_cast(case, jnp.float64))
        other_blocks = oracle.loop_of_value_and_grad(_cast(other, jnp.float64))[1]
    rng = np.random.default_rng(0)
    arguments = {
        "weights": WEIGHTS,
        "max_norm": 0.9 * np.median(np.linalg.norm(oracle.matrix(blocks), axis=1)),
        "direction": jax.tree.map(lambda x: rng.normal(size=x.shape[1:]), blocks),
    }
    return Solved(
        case, other, values, aux, blocks, arguments, oracle.answers(blocks, other_blocks, **arguments)
    )


def _cast(case, dtype):
    cast = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return dataclasses.replace(
        case, params=jax.tree.map(cast, case.params), batch=jax.tree.map(cast, case.batch)
    )


def _narrow(arguments):
    return jax.tree.map(np.float32, arguments)


def ask(grads, other, key, weights, max_norm, direction):
    """Every reduction, by the oracle's names."""
    thirds = (
        third(grads, other, key, weights, max_norm, direction) for third in (ask_sums, ask_moments, ask_pairs)
    )
    return functools.reduce(dict.__or__, thirds)


def ask_sums(grads, other, key, weights, max_norm, direction):
    """Sums, norms, and what needs both."""
    del other, key, direction
    scale = jgd.noise_scale(grads)
    return {
        "sum": jgd.sum(grads),
        "weighted_sum": jgd.sum(grads, weights),
        "norms": jgd.norms(grads),
        "leaf_norms": jgd.norms(grads, per_leaf=True),
        "clipped_sum": jgd.clipped_sum(grads, max_norm),
        "weighted_clipped_sum": jgd.clipped_sum(grads, max_norm, weights=weights),
        "noise_scale": (scale.trace_covariance, scale.squared_norm),
    }


def ask_pairs(grads, other, key, weights, max_norm, direction):
    """Inner products, with each other and with something else."""
    del max_norm, weights
    return {
        "gram": jgd.gram(grads),
        "cross_gram": jgd.gram(grads, other),
        "dot": jgd.dot(grads, direction),
        "project": jgd.project(grads, key, 3),
    }


def ask_moments(grads, other, key, weights, max_norm, direction):
    """Moments, and the gradients themselves."""
    del other, key, max_norm, direction
    return {
        "materialize": jgd.materialize(grads),
        "weighted_mean": jgd.mean(grads, weights),
        "weighted_second_moment": jgd.second_moment(grads, weights),
        "weighted_variance": jgd.variance(grads, weights),
    }


def ask_without_weights(grads):
    """The reductions of which `ask` has only the weighted form: it would take longer to compile."""
    return {
        "mean": jgd.mean(grads),
        "second_moment": jgd.second_moment(grads),
        "variance": jgd.variance(grads),
    }


def gradients(case, strategy):
    return jgd.per_example_grad(case.loss, strategy=strategy, **case.options)(case.params, *case.batch)


def check(got, want, tolerance):
    for quantity in got:
        oracle.assert_close(got[quantity], want[quantity], tolerance, what=quantity)


def ask_core(grads, other, key, weights, max_norm, direction):
    """What every case is asked by default."""
    del other, key, weights, direction
    return {"sum": jgd.sum(grads), "norms": jgd.norms(grads), "clipped_sum": jgd.clipped_sum(grads, max_norm)}


# One compiled function for each structure of gradients: strategies that choose the same plan share it.
compiled_ask = jax.jit(ask)
compiled_core = jax.jit(ask_core)
THIRDS = tuple(jax.jit(third) for third in (ask_sums, ask_moments, ask_pairs))


def _each_case_and_strategy():
    """Each case is factored. By default each third one is asked the sum, the norms and the clipped sum; every
    twelfth a third of all reductions beside, the next one another: to compile them takes minutes. CI asks each case
    the sum, the norms and the clipped sum, and a third.
    The reductions of materialized gradients, which small losses get from "auto" as well, see
    nothing of a loss but its leaves' shapes: a few cases will do.
    """
    for number, name in enumerate(CASES):
        for strategy in STRATEGIES:
            few = name in {"auto": FEW[:2], "factored": NARROW, "materialized": FEW}[strategy]
            rest = (pytest.mark.slow, pytest.mark.sample) if name in FEW else pytest.mark.slow
            yield pytest.param(
                name, strategy, compiled_ask, marks=() if few else rest, id=f"{name}-{strategy}"
            )
            if strategy == "factored" and name not in NARROW:
                marks = () if number % 3 == 0 else (pytest.mark.slow, pytest.mark.sample)
                yield pytest.param(name, strategy, compiled_core, marks=marks, id=f"{name}-core")
                marks = () if number % 12 == 0 else (pytest.mark.slow, pytest.mark.sample)
                yield pytest.param(name, strategy, THIRDS[number % 3], marks=marks, id=f"{name}-third")


@pytest.mark.parametrize(("name", "strategy", "asked"), list(_each_case_and_strategy()))
def test_every_reduction_of_every_case_by_every_strategy(name, strategy, asked, key, x64):
    it = solved(name)
    grads, others = gradients(it.case, strategy), gradients(it.other, strategy)
    assert len(grads) == B
    oracle.assert_close(grads.values, it.values, 1e-10, what="values")
    oracle.assert_close(grads.aux, it.aux, 1e-10, what="aux")
    # jgd's own arithmetic promotes no ranks; the losses are traced by now, and may.
    with jax.numpy_rank_promotion("raise"):
        got = asked(grads, others, key, **it.arguments)
    assert set(got) <= set(it.want) | {"project"} and len(got) >= 3
    if "project" in got:
        oracle.assert_close(got.pop("project"), jgd.project(it.blocks, key, 3), 1e-9, what="project")
    check(got, it.want, 1e-9)
    if strategy == "factored" and asked is compiled_ask:
        _check_that_the_references_agree(it)


def _check_that_the_references_agree(it):
    """`strategy="materialized"`, a loop over single examples and `vmap(grad)`."""
    grads = gradients(it.case, "materialized")
    oracle.assert_close(jgd.materialize(grads), it.blocks, 1e-10)
    oracle.assert_close(grads.values, it.values, 1e-10)
    oracle.assert_close(oracle.vmap_of_grad(it.case), it.blocks, 1e-10)


OUTSIDE_OF_JIT = {
    ("mlp_classifier", "auto"), ("conv2d_all_options", "materialized"),
    ("nested_scans", "factored"), ("auxiliary_output", "factored"),
}  # fmt: skip


@pytest.mark.sample(lambda name, strategy: (name, strategy) in OUTSIDE_OF_JIT)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", FEW)
def test_every_reduction_outside_of_jit(name, strategy, key, x64):
    it = solved(name)
    grads = gradients(it.case, strategy)
    got = ask(grads, gradients(it.other, strategy), key, **it.arguments) | ask_without_weights(grads)
    del got["project"]
    assert set(got) == set(it.want)
    check(got, it.want, 1e-9)
    scale = jgd.noise_scale(grads)
    np.testing.assert_allclose(scale.noise_scale, scale.trace_covariance / scale.squared_norm, rtol=1e-12)


STEPPED = (
    "stacked_layers", "stacked_layers_on_positions", "stacked_layers_reversed", "scan_of_a_transposed_stack",
    "scan_over_pairs_of_layers", "tied_checkpointed_transformer",
)  # fmt: skip


@pytest.mark.sample(lambda name: name != "tied_checkpointed_transformer")
@pytest.mark.parametrize("name", STEPPED)
def test_what_a_scan_makes_of_its_steps_in_one_program(name, x64):
    """Without weights, and with the gradients in the same program, it is the pass that makes it."""
    it = solved(name)

    @jax.jit
    def answers(params, batch):
        grads = jgd.per_example_grad(it.case.loss, strategy="factored", **it.case.options)(params, *batch)
        assert sums_of(grads).parts  # or this test tests nothing
        scale = jgd.noise_scale(grads)
        return ask_without_weights(grads) | {
            "sum": jgd.sum(grads),
            "norms": jgd.norms(grads),
            "gram": jgd.gram(grads),
            "noise_scale": (scale.trace_covariance, scale.squared_norm),
        }

    got = answers(it.case.params, it.case.batch)
    check(got, it.want, 1e-9)


@pytest.mark.sample(lambda name: name in FEW[:2])
@pytest.mark.parametrize("name", FEW)
def test_a_plain_pytree_gives_the_same_answers(name, key, x64):
    it = solved(name)
    got = ask(it.blocks, gradients(it.other, "auto"), key, **it.arguments) | ask_without_weights(it.blocks)
    del got["project"]
    check(got, it.want, 1e-9)


def ask_linear(grads, weights, max_norm):
    """What a second backward pass answers, and norms and noise beside it."""
    scale = jgd.noise_scale(grads)
    return {
        "norms": jgd.norms(grads),
        "weighted_sum": jgd.sum(grads, weights),
        "weighted_clipped_sum": jgd.clipped_sum(grads, max_norm, weights=weights),
        "noise_scale": (scale.trace_covariance, scale.squared_norm),
    }


def _second_passes():
    """Some cases in microbatches and whole, every third of the others in one of both ways."""
    for name in NARROW:
        for size in (3, B):
            yield name, size
    for k, name in enumerate([name for name in CASES if name not in NARROW][::3]):
        yield pytest.param(name, (3, B)[k % 2], marks=pytest.mark.slow)


@pytest.mark.sample(lambda name, size: name not in NARROW or size == {0: 3, 1: B}.get(NARROW.index(name) % 4))
@pytest.mark.parametrize(("name", "size"), list(_second_passes()))
def test_a_second_backward_pass(name, size, x64):
    it = solved(name)
    make = jgd.per_example_grad(it.case.loss, strategy=SECOND_PASS, microbatch_size=size, **it.case.options)
    grads = make(it.case.params, *it.case.batch)
    if not has_second_pass(form_of(grads).program):
        pytest.skip("a custom_vjp need not be linear")
    got = jax.jit(ask_linear)(grads, it.arguments["weights"], it.arguments["max_norm"])
    check(got, it.want, 1e-9)


def _narrow_cases():
    for name in NARROW:
        for strategy in STRATEGIES[1:]:
            default = name in FEW and strategy == "factored"
            yield pytest.param(name, strategy, marks=() if default else pytest.mark.slow)


@pytest.mark.sample(lambda name, strategy: strategy != "factored" or name in (*FEW[::2], *NARROW[5:]))
@pytest.mark.parametrize(("name", "strategy"), list(_narrow_cases()))
def test_float32(name, strategy, key):
    """The oracle computes in float64, from the same float32 numbers: a few hundred roundings apart."""
    it = solved(name, jnp.float32)
    got = compiled_ask(
        gradients(it.case, strategy), gradients(it.other, strategy), key, **_narrow(it.arguments)
    )
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(got))
    del got["project"]
    check(got, it.want, 3e-5)


@pytest.mark.sample(lambda name, strategy: strategy != "factored" or name in (*FEW[1:3], *NARROW[5:]))
@pytest.mark.parametrize(("name", "strategy"), list(_narrow_cases()))
def test_bfloat16(name, strategy, key):
    """Losses and trees in bfloat16, of 8 bits: each rounding is 0.4%. What accumulates is float32."""
    it = solved(name, jnp.bfloat16)
    got = compiled_ask(
        gradients(it.case, strategy), gradients(it.other, strategy), key, **_narrow(it.arguments)
    )
    for quantity in (
        "norms",
        "leaf_norms",
        "dot",
        "gram",
        "cross_gram",
        "noise_scale",
        "project",
        "weighted_variance",
    ):
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(got[quantity])), quantity
    for quantity in ("materialize", "sum", "clipped_sum", "weighted_mean"):
        assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(got[quantity])), quantity
    del got["project"]
    check(got, it.want, 6e-2)


@pytest.mark.parametrize("reduction", [jgd.mean, jgd.variance, jgd.second_moment])
def test_weights_may_be_closed_over_under_jit(reduction):
    case = problem("mlp_classifier")
    make = jgd.per_example_grad(case.loss, **case.options)
    weights = jnp.arange(1.0, 1.0 + case.batch[0].shape[0])
    ask = lambda weights: jax.jit(lambda *args: reduction(make(*args), weights))(case.params, *case.batch)
    oracle.assert_close(ask(weights), reduction(make(case.params, *case.batch), weights), 1e-6)
    for nothing in (jnp.zeros_like(weights), jnp.zeros(weights.shape, int), [0.0] * len(weights)):
        with pytest.raises(ValueError, match="`weights` are all 0"):
            ask(nothing)
