"""No answer is further from the exact one than ten times what the gradients of `vmap(grad)` in the same dtype are."""

import functools

import accuracy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from accuracy_losses import BEYOND, KINDS, LOSSES, problem_of
from cases import CASES, Draw, Problem
from internals import factors
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of, widened

import jgd

WAYS = ("jitted", "eager", "microbatches", "mesh")
PARTS = ("noise scale", "the rest")


def when(*, default, in_ci):
    """The marks of what the default run asks, what CI asks beside it, and what only `pytest -m slow` does."""
    if default:
        return []
    return [pytest.mark.sample(lambda: False) if in_ci else pytest.mark.slow]


def ask_by(loss, way, options):
    grads = jgd.per_example_grad(
        loss, strategy="factored", microbatch_size=3 if way == "microbatches" else None, **options
    )

    def asked(question, params, *batch):
        return accuracy.ask(grads(params, *batch), question)

    return asked if way == "eager" else jax.jit(asked)


@functools.lru_cache(maxsize=8)
def program(name, way):
    return ask_by(LOSSES[name], way, {})


def on_two(batch):
    return jax.device_put(batch, NamedSharding(mesh_of(2), P("data")))


@functools.lru_cache(maxsize=2)
def found(name, dtype, way, kind):
    """The errors of all reductions of that loss at numbers of that kind."""
    problem = problem_of(name, kind, jnp.dtype(dtype))
    exact = accuracy.exact_gradients(problem)
    question = accuracy.question_of(problem, exact)
    batch = on_two(problem.batch) if way == "mesh" else problem.batch
    got = jax.tree.map(np.asarray, program(name, way)(question, problem.params, *batch))
    return accuracy.excess(got, problem, exact, question, accuracy.floor_of(dtype, kind.condition))


def part_of(found, part):
    return {name: of for name, of in found.items() if (name == "noise_scale") == (part == PARTS[0])}


OTHER_WAYS = ("ordinary", "cancelling 1e-2", "cancelling 1e-4", "offset 1e3 ± 1")
DEFAULT = {
    ("product", "float32", "jitted"), ("steps", "bfloat16", "jitted"), ("tied", "float16", "jitted"),
    ("convolution_of_a_leaf", "float32", "mesh"),
}  # fmt: skip
IN_DEFAULT = (*OTHER_WAYS, "cancelling 5e-2", "params 1e-6", "data 1e6", "loss 1e-6")
IN_CI = {
    ("float32", "jitted"): LOSSES,
    ("float32", "eager"): ("product",),
    ("float32", "microbatches"): ("product", "lookup"),
    ("float32", "mesh"): ("product", "convolution_of_a_leaf", "lookup"),
    ("bfloat16", "jitted"): ("product", "steps", "convolution_of_a_leaf", "lookup"),
    ("float16", "jitted"): ("tied", "layers", "elementwise", "custom"),
}


def asked():
    """Loss, dtype, way, kind, part: those of one program follow each other."""
    for dtype in accuracy.DTYPES:
        for way in WAYS if dtype == "float32" else ("jitted",):
            for name in LOSSES:
                for kind in KINDS if way == "jitted" else OTHER_WAYS:
                    for part in PARTS:
                        # Offsets in half precision: what the rounding of the gradients leaves is no spread.
                        if dtype != "float32" and (
                            kind == "offset 1e3 ± 0.01" or (kind.startswith("offset") and part == PARTS[0])
                        ):
                            continue
                        default = (name, dtype, way) in DEFAULT and kind in IN_DEFAULT
                        marks = when(default=default, in_ci=name in IN_CI[dtype, way])
                        yield pytest.param(name, dtype, way, kind, part, marks=marks)


@pytest.mark.parametrize(("name", "dtype", "way", "kind", "part"), list(asked()))
def test_numbers_that_are_hard(name, dtype, way, kind, part):
    accuracy.check(part_of(found(name, dtype, way, KINDS[kind]), part))


# The cases that every other test puts to jgd: ordinary numbers.

DRAWS = (  # another program in float64: they draw numbers, in the default dtype or the data's
    "dropout", "dropped_weights", "variational_autoencoder", "raw_keys_and_random_masks",
    "flax_linen_transformer_with_dropout", "haiku_normalised_network_with_noise",
)  # fmt: skip
NO_WIDE_INTEGERS = ("indices_that_no_example_changes", "dynamic_update_of_a_parameter")
NOT_IN = {
    "float32": (),
    "bfloat16": (  # XLA for CPUs has no such product, LAPACK no such numbers
        "examples_on_other_axes", "equinox_network", "gaussian_likelihood_by_cholesky",
        "linear_solve_and_determinant",
    ),
    "float16": (
        "examples_on_other_axes", "gaussian_likelihood_by_cholesky", "linear_solve_and_determinant",
        # gradients that leave float16
        "complex_operand_at_positions", "complex_cotangent_alone", "complex_parameter_of_two_parts",
        "tied_complex_transposed",
    ),
}  # fmt: skip
EVEN = ("powers", "nothing_meets_data", "conv2d_dilated_image")  # gradients that are all but the same


CASES_IN_CI = {
    "float32": (
        "relu_mlp_on_positions", "broadcast_arithmetic", "conv2d_all_options", "generated_kernel",
        "tied_embedding_and_head", "multi_head_attention", "recurrence", "stacked_layers_on_positions",
        "custom_vjp_that_differs", "layer_norm", "complex_convolution",
    ),
    "bfloat16": ("conv2d_same", "tied_embedding_and_head", "recurrence"),
    "float16": ("conv2d_same", "relu_mlp_on_positions", "stacked_layers_on_positions"),
}  # fmt: skip


def cases():
    for dtype in accuracy.DTYPES:
        for name in CASES:
            if name not in (*DRAWS, *NO_WIDE_INTEGERS, *NOT_IN[dtype]):
                default = (name, dtype) == ("weight_normalisation", "float32")
                marks = when(default=default, in_ci=name in CASES_IN_CI[dtype])
                yield pytest.param(name, dtype, marks=marks)


@functools.lru_cache(maxsize=2)
def found_in_case(name, dtype):
    problem, _ = widened(name, jnp.dtype(dtype))
    exact = accuracy.exact_gradients(problem)
    question = accuracy.question_of(problem, exact)
    got = ask_by(problem.loss, "jitted", problem.options)(question, problem.params, *problem.batch)
    return accuracy.excess(jax.tree.map(np.asarray, got), problem, exact, question, accuracy.floor_of(dtype))


@pytest.mark.parametrize(("name", "dtype"), list(cases()))
def test_every_case(name, dtype):
    of = found_in_case(name, dtype)
    accuracy.check(part_of(of, PARTS[1]) if name in EVEN else of)


@pytest.mark.parametrize("name", [pytest.param(name, marks=when(default=False, in_ci=True)) for name in EVEN])
def test_the_noise_scale_of_examples_that_are_all_but_the_same(name):
    # Of a difference that is trusted at least 1/64 is left.
    _, error, own = found_in_case(name, "float32")["noise_scale"]
    assert error <= max(1e-3, 10 * own)


# Gradients that float32 has, and whose squares it does not have

LINEAR = ("sum", "weighted_sum", "mean", "weighted_mean", "dot", "project")
BY_NORMS = (
    "norms", "leaf_norms", "group_norms", "clipped_sum", "weighted_clipped_sum", "group_clipped_sum",
)  # fmt: skip


@pytest.mark.sample(lambda name: name == "product")
@pytest.mark.parametrize(
    "reductions", [LINEAR, BY_NORMS],
    ids=["linear", "norms"],
)  # fmt: skip
@pytest.mark.parametrize("kind", BEYOND)
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_whose_squares_leave_float32(name, kind, reductions):
    with np.errstate(all="ignore"):
        errors = found(name, "float32", "jitted", BEYOND[kind])
    accuracy.check({reduction: errors[reduction] for reduction in reductions})


# Clipping is a promise of its own


@functools.lru_cache(maxsize=4)
def clipped(name):
    grads = jgd.per_example_grad(LOSSES[name], strategy="factored")
    return jax.jit(lambda bound, params, *batch: jgd.clipped_sum(grads(params, *batch), bound))


def longest(name, dtype, kind):
    """The length of the longest clipped example, in float64, as a share of the bound."""
    problem = problem_of(name, KINDS[kind], jnp.dtype(dtype))
    bound = float(np.float32(0.5 * accuracy.lengths(accuracy.exact_gradients(problem)).min()))
    each = [
        clipped(name)(bound, problem.params, *(x[i : i + 1] for x in problem.batch))
        for i in range(len(problem.batch[0]))
    ]
    return max(accuracy.lengths(jax.tree.map(lambda x: np.asarray(x)[None], one))[0] for one in each) / bound


def bounded():
    for dtype in accuracy.DTYPES:
        for name in LOSSES:
            for kind in KINDS:
                if dtype == "float32" or not kind.startswith("offset"):
                    default = (name, dtype) in (("product", "float32"), ("layers", "bfloat16"))
                    marks = when(default=default and kind in IN_DEFAULT, in_ci=True)
                    yield pytest.param(name, dtype, kind, marks=marks)


@pytest.mark.parametrize(("name", "dtype", "kind"), list(bounded()))
def test_no_clipped_example_is_longer_than_the_bound(name, dtype, kind):
    """In half precision but for the rounding of the answer."""
    few = 1e-5 if dtype == "float32" else float(jnp.finfo(dtype).eps)
    assert longest(name, dtype, kind) <= 1 + few


# A mean that float16 has, of gradients whose sum it does not have


def multiplied(kernel, x):
    return jnp.sum(x @ kernel[0])


def convolved(kernel, x):
    numbers = ("NWC", "WIO", "NWC")
    return jnp.sum(jax.lax.conv_general_dilated(x[None], kernel, (1,), "SAME", dimension_numbers=numbers))


@pytest.mark.parametrize(
    "loss",
    [multiplied, convolved],
)
def test_a_mean_of_gradients_whose_sum_leaves_float16(loss):
    kernel, x = jnp.ones((1, 2, 3), jnp.float16), jnp.full((8, 8, 2), 2000, jnp.float16)
    grads = jgd.per_example_grad(loss, strategy="factored")(kernel, x)
    np.testing.assert_array_equal(jgd.mean(grads), np.full((1, 2, 3), 16_000))


# Many positions, many examples


MANY = 100_000


def dense(p, x):
    return jnp.sum((x @ p["w"]) * p["b"]) / 256


def long_problem(dtype, shape):
    draw = Draw(2)
    rounded = lambda x: jnp.asarray(x, dtype)
    params = {"w": rounded(draw(6, 4)), "b": rounded(draw(4))}
    return Problem(dense, params, (rounded(1 + draw(*shape, 6, scale=1.0)),))


@functools.lru_cache(maxsize=1)
def found_along(dtype):
    problem = long_problem(dtype, (3, MANY))
    exact = accuracy.exact_gradients(problem)
    question = accuracy.question_of(problem, exact)
    got = ask_by(dense, "jitted", {})(question, problem.params, *problem.batch)
    return accuracy.excess(got, problem, exact, question, accuracy.floor_of(dtype))


@pytest.mark.sample(lambda dtype, part: dtype == "bfloat16")
@pytest.mark.parametrize("dtype", accuracy.DTYPES)
@pytest.mark.parametrize("part", PARTS)
def test_many_positions(dtype, part):
    accuracy.check(part_of(found_along(dtype), part))


@pytest.mark.sample(lambda dtype: dtype == "bfloat16")
@pytest.mark.parametrize("dtype", accuracy.DTYPES)
def test_many_examples(dtype):
    problem = long_problem(dtype, (MANY,))
    exact = jax.tree.map(np.float64, accuracy.exact_gradients(problem))
    grads = lambda params, x: jgd.per_example_grad(dense, strategy="factored")(params, x)
    bound = float(np.float32(np.median(accuracy.lengths(exact))))

    @jax.jit
    def asked(params, x):
        of = grads(params, x)
        noise = jgd.noise_scale(of)
        return {
            "sum": jgd.sum(of),
            "mean": jgd.mean(of),
            "clipped_sum": jgd.clipped_sum(of, bound),
            "second_moment": jgd.second_moment(of),
            "variance": jgd.variance(of),
            "trace": noise.trace_covariance,
        }

    def wanted(blocks):
        norms = accuracy.lengths(blocks)
        mapped = lambda fun: jax.tree.map(fun, blocks)
        share = np.minimum(1, bound / norms)
        variance = mapped(lambda x: np.var(x, axis=0, ddof=1))
        return {
            "sum": mapped(lambda x: np.sum(x, axis=0)),
            "mean": mapped(lambda x: np.mean(x, axis=0)),
            "clipped_sum": mapped(lambda x: np.tensordot(share, x, 1)),
            "second_moment": mapped(lambda x: np.mean(np.square(x), axis=0)),
            "variance": variance,
            "trace": sum(np.sum(x) for x in jax.tree.leaves(variance)),
        }

    want, got = wanted(exact), asked(problem.params, *problem.batch)
    own = wanted(jax.tree.map(np.float64, accuracy.gradients(problem)))
    floor = accuracy.floor_of(dtype, MANY**0.5)  # a sum of so many numbers is rounded as often
    for name, answer in got.items():
        for x, y, z in zip(*map(jax.tree.leaves, (answer, own[name], want[name])), strict=True):
            error, measure = (np.max(np.abs(np.float64(a) - z)) / np.max(np.abs(z)) for a in (x, y))
            assert error <= max(floor, 10 * measure), (name, error, measure)


# Products of bfloat16 and float32, as weighted sums in half precision are


def on_an_accelerator(monkeypatch):
    other = lambda *args, default, **_: default(*args)
    monkeypatch.setattr(jax.lax, "platform_dependent", other)


def test_a_product_in_two_halves_has_16_bits(monkeypatch):
    on_an_accelerator(monkeypatch)
    draw = Draw(7)
    x, y = jnp.asarray(draw(300, 20), jnp.float32), jnp.asarray(draw(300, 30), jnp.bfloat16)
    for a, b in ((x, y), (y, x)):
        got = jax.jit(lambda a, b: factors.contract("tp,tq->pq", a, b, precision=None))(a, b)
        exact, most = (np.einsum("tp,tq->pq", *map(np.float64, each)) for each in ((a, b), (abs(a), abs(b))))
        assert got.dtype == jnp.float32
        assert 1e-8 < np.max(np.abs(got - exact) / most) < 2.0**-16


def test_halves_of_what_is_not_finite_or_at_the_edge():
    edge = float(jnp.finfo(jnp.float32).max)
    numbers = jnp.array([jnp.inf, -jnp.inf, jnp.nan, edge, -edge, 0.0, 1e-30], jnp.float32)
    high, low = jax.jit(factors._halves)(numbers)
    np.testing.assert_allclose(np.float64(high) + np.float64(low), np.float64(numbers), rtol=2.0**-16)


@pytest.mark.parametrize("name", ["tied_embedding_and_head", "relu_mlp_on_positions", "recurrence"])
def test_cases_with_products_in_halves(name, monkeypatch):
    on_an_accelerator(monkeypatch)
    found_in_case.cache_clear()
    accuracy.check(found_in_case(name, "bfloat16"))
