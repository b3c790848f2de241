"""What XLA is known to compute wrongly on a CPU, and that the engine goes round it: docs/xla_report.md."""

import pathlib
import re
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from internals import stored
from internals import versions as _versions
from packaging.requirements import Requirement

import jgd

B, T, Q = 64, 32, 64
NEEDED = _versions.fuses_products(_versions.JAXLIB)
ROOT = pathlib.Path(__file__).parent.parent


def draw(*shape, seed=0):
    return (1 + np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


# The error itself


def minimal(s, x, store=lambda x: x):
    """Σ s r of one example, where r is x along the columns; 0 nowhere but by chance."""
    return jnp.sum(s @ store(jnp.broadcast_to(x[:, None], (T, Q))))


def constant(s, x, store=lambda x: x):
    del x
    return jnp.sum(s @ store(jnp.ones((T, Q))))


PROGRAMS = {"row": minimal, "constant": constant}


def errors(program, store, times=3):
    """The largest relative error of each of some runs, compiled."""
    s, x = np.abs(draw(B, T, T)), np.abs(draw(B, T, seed=1)) + 1
    right = s.astype(float) @ (x[:, :, None] if program is minimal else np.ones((B, T, 1)))
    want = Q * right.sum(axis=(1, 2))
    compiled = jax.jit(jax.vmap(lambda s, x: program(s, x, store)))
    with np.errstate(over="ignore", invalid="ignore"):
        return [np.max(np.abs(np.asarray(compiled(s, x), float) / want - 1)) for _ in range(times)]


def test_xla_is_wrong_where_the_way_round_is_taken():
    right = [
        name for name, program in PROGRAMS.items() if all(e < 1e-4 for e in errors(program, lambda x: x))
    ]
    if NEEDED:
        assert not right, (
            f"jaxlib {_versions.JAXLIB} computes these programs right: {right}. The way round may go: for this version "
            "and later ones, `fuses_products` in _engine/versions.py can say so, once all of test_compiler.py and the "
            "slow tests of test_jitted.py pass without it"
        )
    else:
        assert right == list(PROGRAMS), (
            f"jaxlib {_versions.JAXLIB} needs the way round too: {right} are right"
        )


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_stored_operand_is_right(name):
    assert all(e < 1e-4 for e in errors(PROGRAMS[name], stored))


def test_a_sum_of_a_broadcast_is_right():
    """The other error of YNNPACK, which nothing goes round: versions that have it are warned of."""
    total = jax.jit(lambda x: jnp.sum(jnp.broadcast_to(x, (8, 1024, 1024))))
    ones = np.ones((1024, 1), np.float32)
    assert all(total(ones) == 8 * 1024 * 1024 for _ in range(20))


def test_a_sum_of_mapped_products_is_right():
    """jax issue 39103."""
    rows = np.arange(32_769, dtype=np.float32)[:, None] * np.float32([1, 0, 0])
    of_rows = jax.jit(jax.vmap(lambda row: jnp.sum((np.eye(3, dtype=np.float32) @ row) ** 2)))
    np.testing.assert_allclose(of_rows(rows), rows[:, 0].astype(float) ** 2, rtol=1e-6)


# The way round


def test_what_is_stored_is_differentiated_and_mapped():
    x = jnp.array([1.0, 2.0, 3.0])
    cube = lambda x: jnp.sum(stored({"x": x})["x"] ** 3)
    assert jnp.allclose(jax.grad(cube)(x), 3 * x**2)
    assert jnp.allclose(jax.jit(jax.vmap(jax.hessian(cube)))(x[None])[0], jnp.diag(6 * x))
    assert jnp.allclose(jax.linearize(cube, x)[1](x), 3 * jnp.sum(x**3))
    assert jnp.allclose(jax.jvp(jax.grad(cube), (x,), (x,))[1], 6 * x**2)
    keys = jax.random.split(jax.random.key(0), 2)
    assert (jax.jit(stored)(keys) == keys).all()


@pytest.mark.parametrize(("platform", "barriers"), [("cpu", int(NEEDED)), ("cuda", 0), ("tpu", 0)])
def test_only_programs_for_a_cpu_have_barriers(platform, barriers):
    lowered = jax.jit(stored).trace(jnp.ones(3)).lower(lowering_platforms=(platform,))
    assert lowered.as_text().count("optimization_barrier") == barriers


def test_without_a_broadcast_it_costs_nothing():
    """As many kernels, and no more memory."""

    def kernels_and_memory(store):
        program = lambda s, r: jnp.sum(r * (store(s) @ store(r)), axis=(1, 2))
        compiled = jax.jit(program).lower(draw(B, T, T), draw(B, T, Q)).compile()
        entry = compiled.as_text().split("ENTRY")[1]
        return re.findall(r"(\w[\w-]*)\(%", entry), compiled.memory_analysis().temp_size_in_bytes

    assert kernels_and_memory(stored) == kernels_and_memory(lambda x: x)


# Losses whose operands or cotangents are broadcast, at sizes that XLA fuses


def lookup(how):
    def loss(w, i, x):
        rows = w[i] * x[:, None] if how == "weighted" else w[i]
        total = jnp.sum(rows, axis=0) if how == "sum" else jnp.mean(rows, axis=0)
        return jnp.sum(rows) if how == "weighted" else jnp.sum(total)

    i = np.random.default_rng(2).integers(0, 8, size=(B, T))
    return loss, draw(1000, Q), (i, draw(B, T, seed=1))


def dense(w, x):
    return jnp.sum(x @ w)


def dense_of_broadcast(w, x):
    return jnp.sum(jnp.tanh(jnp.broadcast_to(x[:, :1], (T, Q)) @ w / Q))


def parameter_first(w, x):
    return jnp.sum(w @ jnp.broadcast_to(x[0][:, None], (Q, T)))


def bias(w, x):
    return jnp.sum(jnp.tanh(x) @ jnp.ones((Q, Q)) + w[0])


def scaled(w, x):
    return jnp.sum(jnp.broadcast_to(x[:, :1], (T, Q)) * w[:T])


def scale_of_product(w, x):
    return jnp.sum(w[:T] * (jnp.tanh(x[:, :T]) @ jnp.broadcast_to(x[:, :1], (T, Q))))


def stepped(w, x):
    step = lambda h, row: (h, jnp.sum(h[:, :1] * (row @ w)[None]))
    return jnp.sum(jax.lax.scan(step, x[:T], jnp.broadcast_to(x[0], (T, Q)))[1])


def layers(w, x):
    stack = w.reshape(4, 16, Q)
    return jnp.sum(
        jax.lax.scan(lambda h, w: (h + jnp.broadcast_to(h[:, :1], (T, 16)) @ w, None), x, stack)[0]
    )


def convolved(w, x):
    kernel = w.reshape(4, 16, Q)
    patch = jnp.broadcast_to(x[None, :, :1], (1, T, 16))
    return jnp.sum(
        jax.lax.conv_general_dilated(patch, kernel, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))
    )


def pooled(w, x):
    """The derivative of the convolution is one itself, with a cotangent of ones for its kernel."""
    kernel = jnp.reshape(jnp.resize(w, (9, 32, Q)), (3, 3, 32, Q))
    image = jnp.broadcast_to(x[None, :16, None, :32], (1, 16, 16, 32))
    names = ("NHWC", "HWIO", "NHWC")
    return jnp.sum(jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=names)) / 256


LOSSES = {f"lookup, {how}": lookup(how) for how in ("sum", "mean", "weighted")} | {
    loss.__name__: (loss, draw(Q, Q) / 8, (draw(B, T, Q, seed=1),))
    for loss in (
        dense, dense_of_broadcast, parameter_first, bias, scaled, scale_of_product, stepped, layers, convolved, pooled,
    )
}  # fmt: skip


def flat(blocks):
    return blocks.reshape(B, -1)


WEIGHTS = np.resize(np.float32([1.5, 0.0, 0.5, 2.0]), B)
REDUCTIONS = {
    "norms": (lambda grads, w: jgd.norms(grads), lambda g: np.linalg.norm(flat(g), axis=1)),
    "weighted clipped sum": (
        lambda grads, w: jgd.clipped_sum(grads, 1.0, weights=WEIGHTS),
        lambda g: np.tensordot(WEIGHTS * np.minimum(1, 1 / np.linalg.norm(flat(g), axis=1)), g, 1),
    ),
    "gram": (lambda grads, w: jgd.gram(grads), lambda g: flat(g) @ flat(g).T),
    "second moment": (lambda grads, w: jgd.second_moment(grads), lambda g: np.mean(g**2, axis=0)),
    "variance": (lambda grads, w: jgd.variance(grads), lambda g: np.var(g, axis=0, ddof=1)),
    "weighted sum": (lambda grads, w: jgd.sum(grads, WEIGHTS), lambda g: np.tensordot(WEIGHTS, g, 1)),
    "noise scale": (
        lambda grads, w: jgd.noise_scale(grads).trace_covariance,
        lambda g: np.var(g, axis=0, ddof=1).sum(),
    ),
    "slopes along ones": (lambda grads, w: jgd.dot(grads, jnp.ones_like(w)), lambda g: flat(g).sum(axis=1)),
}  # fmt: skip


@pytest.fixture(scope="module")
def truth():
    """The gradients of a loss, one operation at a time."""
    made = {}

    def of(name):
        if name not in made:
            loss, w, batch = LOSSES[name]
            axes = (None,) + (0,) * len(batch)
            with jax.disable_jit():
                made[name] = np.asarray(jax.vmap(jax.grad(loss), axes)(w, *batch), np.float64)
        return made[name]

    return of


def check(name, options, reductions, truth):
    loss, w, batch = LOSSES[name]
    gradients = jgd.per_example_grad(loss, **options)
    for what in reductions:
        reduce, answer = REDUCTIONS[what]
        got = jax.jit(lambda w, *batch, reduce=reduce: reduce(gradients(w, *batch), w))(w, *batch)
        want = answer(truth(name))
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-3 * np.max(np.abs(want)), err_msg=what)


@pytest.mark.parametrize("name", LOSSES)
def test_broadcasts_are_right_in_compiled_programs(name, truth):
    others = {"dense": "slopes along ones", "pooled": "noise scale", "bias": "gram", "convolved": "variance"}
    check(name, {"strategy": "factored"}, ["norms", others.get(name, "weighted clipped sum")], truth)


OPTIONS = {
    "factored": {"strategy": "factored"},
    "materialized": {"strategy": "materialized"},
    "microbatches": {"microbatch_size": 16},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_broadcasts_are_right_in_every_compiled_program(name, options, truth):
    check(name, OPTIONS[options], REDUCTIONS, truth)


# Versions


def test_what_is_refused_is_excluded_from_installs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    for name in ("jax", "jaxlib"):
        assert not [bad for bad in (*_versions.REFUSED, *_versions.DOUBTED) if bad in required[name]]
        assert {"0.10.1", "0.12.0", "0.12.0.1", "0.13.0"} == {
            good for good in ("0.10.1", "0.12.0", "0.12.0.1", "0.13.0") if good in required[name]
        }


@pytest.mark.parametrize("jaxlib", _versions.REFUSED)
def test_a_refused_version_says_what_to_install(jaxlib):
    with pytest.raises(ImportError, match=rf"jaxlib {re.escape(jaxlib)}.*pip install"):
        _versions.check(jaxlib)


@pytest.mark.parametrize("jaxlib", _versions.DOUBTED)
def test_a_version_that_is_wrong_on_cpus_alone_is_a_warning(jaxlib):
    with pytest.warns(UserWarning, match=rf"jaxlib {re.escape(jaxlib)}.*pip install"):
        _versions.check(jaxlib)


def test_other_versions_are_not_refused():
    for jaxlib in ("0.10.1", "0.12.0.1", _versions.JAXLIB, "0.13.0.dev20261201"):
        _versions.check(jaxlib)
    assert not _versions.fuses_products("0.10.1") and _versions.fuses_products("0.13.0.dev20261201")
