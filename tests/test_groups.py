"""Groups of leaves with a norm of their own: per-layer clipping, and the norms that go with it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from cases import CASES, problem
from internals import SECOND_PASS, form_of
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of

import jgd

WEIGHTS = np.array([1.5, 0.0, 0.5, 2.0, 1.0])
HELD = ({"strategy": "factored"}, {"strategy": "materialized"}, {"microbatch_size": 2})
FEW = ("mlp_classifier", "tied_embedding_and_head", "auxiliary_output", "recurrence")


# The oracle: one group after the other, in NumPy.


def clipped_by_hand(blocks, max_norm, weights=None):
    """The clipped sum and the norms: every group of `max_norm`, a pytree prefix of `blocks`."""
    size = len(jax.tree.leaves(blocks)[0])
    weights = np.ones(size) if weights is None else weights
    max_norms, structure = jax.tree.flatten(max_norm)
    groups = [jax.tree.map(np.float64, group) for group in structure.flatten_up_to(blocks)]
    norms = [norm_by_hand(group, size) for group in groups]
    present = np.all(np.isfinite(norms), axis=0) & (weights != 0)
    sums = []
    for limit, norm, group in zip(max_norms, norms, groups, strict=True):
        factor = np.array([min(1.0, limit / n) if n > 0 else 1.0 for n in norm[present]])
        factor = factor * weights[present]
        sums.append(jax.tree.map(lambda x, f=factor: np.tensordot(f, x[present], 1), group))
    whole = jax.tree.unflatten(jax.tree.structure(blocks), jax.tree.leaves(sums))
    return whole, jax.tree.unflatten(structure, norms)


def norm_by_hand(group, size):
    squares = [np.sum(x.reshape(size, -1) ** 2, axis=1) for x in jax.tree.leaves(group)]
    return np.sqrt(sum(squares, start=np.zeros(size)))


def median_norms(blocks, structure):
    """A limit for each group that clips about half of the examples."""
    groups = structure.flatten_up_to(blocks)
    limits = [0.9 * np.median(norm_by_hand(g, len(jax.tree.leaves(blocks)[0]))) for g in groups]
    return jax.tree.unflatten(structure, limits)


def prefixes(params):
    """One number, one for each child of the root, and one for each leaf: without those that are the same."""
    one = jax.tree.structure(0)
    top = jax.tree.structure(params, is_leaf=lambda x: x is not params)
    return {"one": one, "top": top, "leaves": jax.tree.structure(params)}


def _each_case():
    for name in CASES:
        for held in HELD:
            for grouping in ("top", "leaves"):
                slow = name not in FEW or (grouping == "top" and "strategy" not in held)
                chosen = not slow and held is HELD[(FEW.index(name) + len(grouping)) % 3]
                marks = () if chosen else [pytest.mark.slow] + [pytest.mark.sample] * (not slow)
                yield pytest.param(name, held, grouping, marks=marks, id=f"{name}-{held}-{grouping}")


@pytest.mark.parametrize(("name", "held", "grouping"), list(_each_case()))
def test_each_group_is_clipped_to_its_own_norm(name, held, grouping, x64):
    case = problem(name, jnp.float64)
    blocks = oracle.vmap_of_grad(case)
    max_norm = median_norms(blocks, prefixes(case.params)[grouping])

    @jax.jit
    def ask(max_norm, params, *batch):
        grads = jgd.per_example_grad(case.loss, **case.options, **held)(params, *batch)
        return {
            "plain": jgd.clipped_sum(grads, max_norm, return_norms=True),
            "weighted": jgd.clipped_sum(grads, max_norm, weights=WEIGHTS, return_norms=True),
            "norms": jgd.norms(grads, groups=max_norm),
        }

    got = ask(max_norm, case.params, *case.batch)
    want = clipped_by_hand(blocks, max_norm)
    for answer, weights in ((got["plain"], None), (got["weighted"], WEIGHTS)):
        sums, norms = clipped_by_hand(blocks, max_norm, weights)
        oracle.assert_close(answer[0], sums, 1e-10)
        oracle.assert_close(answer[1], norms, 1e-10)
    oracle.assert_close(got["norms"], want[1], 1e-10)


@pytest.mark.parametrize("held", HELD, ids=str)
def test_groups_within_groups_and_of_a_plain_pytree(held, x64):
    case = problem("mlp_classifier", jnp.float64)
    blocks = oracle.vmap_of_grad(case)
    nested = {"own": blocks, "twice": [jax.tree.map(lambda x: 2 * x, blocks), blocks]}
    max_norm = {"own": jax.tree.map(lambda _: 0.1, blocks), "twice": [0.2, 0.3]}
    got = jgd.clipped_sum(nested, max_norm, weights=WEIGHTS, return_norms=True)
    want = clipped_by_hand(nested, max_norm, WEIGHTS)
    oracle.assert_close(got[0], want[0], 1e-12)
    oracle.assert_close(got[1], want[1], 1e-12)

    loss = lambda p, *example: (
        case.loss(p["own"], *example)
        + case.loss(jax.tree.map(lambda a, b: 2 * a + b - 2 * a, p["own"], p["twice"][1]), *example)
        + 0 * sum(map(jnp.sum, jax.tree.leaves(p["twice"][0])))
    )
    params = {"own": case.params, "twice": [case.params, case.params]}
    grads = jgd.per_example_grad(loss, **held)(params, *case.batch)
    blocks = {"own": blocks, "twice": [jax.tree.map(lambda x: 0 * x, blocks), blocks]}
    got = jgd.clipped_sum(grads, max_norm, return_norms=True)
    want = clipped_by_hand(blocks, max_norm)
    oracle.assert_close(got[0], want[0], 1e-10)
    oracle.assert_close(got[1], want[1], 1e-10)


# Of two layers, to which examples can be made as they are needed


def two_layers(p, x, y):
    hidden = jnp.tanh(x @ p["first"]["w"] + p["first"]["b"])
    return jnp.sum((hidden @ p["second"]["w"] - y) ** 2)


RNG = np.random.default_rng(0)
PARAMS = {
    "first": {"w": RNG.normal(size=(3, 4)), "b": RNG.normal(size=4)},
    "second": {"w": RNG.normal(size=(4, 2))},
}
BATCH = (RNG.normal(size=(5, 3)), RNG.normal(size=(5, 2)))
LAYERS = {"first": 0.5, "second": 0.25}


def grads_of(batch=BATCH, **held):
    return jgd.per_example_grad(two_layers, **held)(PARAMS, *batch)


def blocks_of(batch=BATCH):
    return jax.tree.map(np.asarray, jax.vmap(jax.grad(two_layers), (None, 0, 0))(PARAMS, *batch))


@pytest.mark.sample(lambda held, weights, bad: np.isnan(bad) == (weights is None) == ("strategy" in held))
@pytest.mark.parametrize("held", HELD, ids=str)
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_in_one_group_adds_to_no_group(bad, weights, held, x64):
    def loss(p, x, y):
        return two_layers(p, x, y) + jnp.where(y[0] == 7, bad, 0) * jnp.sum(p["second"]["w"])

    y = BATCH[1].copy()
    y[2, 0] = 7
    grads = jgd.per_example_grad(loss, **held)(PARAMS, BATCH[0], y)
    sums, norms = jgd.clipped_sum(grads, LAYERS, weights=weights, return_norms=True)
    rest = np.array([0, 1, 3, 4])
    blocks = jax.tree.map(lambda x: x[rest], blocks_of((BATCH[0], y)))
    want, some = clipped_by_hand(blocks, LAYERS, None if weights is None else weights[rest])
    oracle.assert_close(sums, want, 1e-12)
    oracle.assert_close(jax.tree.map(lambda x: x[rest], norms), some, 1e-12)
    assert np.isfinite(norms["first"]).all() and not np.isfinite(norms["second"][2])


def test_one_number_is_the_norm_of_everything(x64):
    grads, blocks = grads_of(), blocks_of()
    for max_norm in (0.5, np.float32(0.5), jnp.array(0.5), 2, np.inf, 0):
        sums, norms = jgd.clipped_sum(grads, max_norm, return_norms=True)
        want = clipped_by_hand(blocks, float(max_norm))
        oracle.assert_close(sums, want[0], 1e-12)
        assert norms.shape == (5,)
        oracle.assert_close(norms, want[1], 1e-12)


def test_limits_of_0_and_of_infinity(x64):
    sums = jgd.clipped_sum(grads_of(), {"first": 0, "second": np.inf})
    oracle.assert_close(sums["first"], jax.tree.map(np.zeros_like, PARAMS["first"]), 1e-12)
    oracle.assert_close(sums["second"], jgd.sum(grads_of())["second"], 1e-12)


def test_one_example_changes_each_group_by_no_more_than_its_limit(x64):
    for k in range(5):
        one = jax.tree.map(lambda x, k=k: x[k : k + 1], BATCH)
        sums = jgd.clipped_sum(grads_of(one), LAYERS)
        for name, limit in LAYERS.items():
            norm = norm_by_hand(jax.tree.map(lambda x: np.asarray(x)[None], sums[name]), 1)
            assert norm <= limit * (1 + 1e-5)


@pytest.mark.parametrize("held", HELD, ids=str)
def test_derivatives_by_weights_and_by_each_limit(held, x64):
    weights, blocks = jnp.asarray(WEIGHTS), blocks_of()
    wave = lambda tree: sum(jnp.sum(x * jnp.sin(1 + jnp.arange(x.size)).reshape(x.shape)) for x in tree)

    def ours(weights, limits):
        sums = jgd.clipped_sum(grads_of(**held), limits, weights=weights)
        return wave(jax.tree.leaves(sums))

    def theirs(weights, limits):
        squares = lambda group: [jnp.sum(x.reshape(5, -1) ** 2, axis=1) for x in jax.tree.leaves(group)]
        norm = lambda group: jnp.sqrt(sum(squares(group)))
        factors = {name: weights * jnp.minimum(1, limits[name] / norm(blocks[name])) for name in limits}
        sums = {
            name: jax.tree.map(lambda x, f=f: jnp.tensordot(f, x, 1), blocks[name])
            for name, f in factors.items()
        }
        return wave(jax.tree.leaves(sums))

    want = jax.grad(theirs, (0, 1))(weights, LAYERS)
    assert np.all(np.abs(want[0]) > 0) and np.all(np.abs(jnp.array(jax.tree.leaves(want[1]))) > 0)
    for derivative in (jax.grad, jax.jacfwd):
        got = jax.jit(derivative(ours, (0, 1)))(weights, LAYERS)
        oracle.assert_close(got, jax.tree.map(np.asarray, want), 1e-10)


def test_derivatives_by_the_parameters(x64):
    def penalty(total):
        return lambda params: sum(jnp.sum(x**3) for x in jax.tree.leaves(total(params)))

    def reference(params):
        blocks = jax.vmap(jax.grad(two_layers), (None, 0, 0))(params, *BATCH)
        return jgd.clipped_sum(blocks, LAYERS)

    ours = penalty(lambda params: jgd.clipped_sum(jgd.per_example_grad(two_layers)(params, *BATCH), LAYERS))
    want = jax.grad(penalty(reference))(PARAMS)
    oracle.assert_close(jax.grad(ours)(PARAMS), jax.tree.map(np.asarray, want), 1e-10)


def test_limits_may_be_mapped_over(x64):
    limits = {"first": jnp.array([0.1, 0.5, 9.0]), "second": jnp.array([0.2, 0.1, 0.0])}
    grads, blocks = grads_of(), blocks_of()
    sums = jax.vmap(lambda limit: jgd.clipped_sum(grads, limit))(limits)
    for k in range(3):
        want, _ = clipped_by_hand(blocks, jax.tree.map(lambda x, k=k: float(x[k]), limits))
        oracle.assert_close(jax.tree.map(lambda x, k=k: x[k], sums), want, 1e-12)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("held", [{}, {"strategy": "factored"}, {"microbatch_size": 4}], ids=str)
def test_on_a_mesh(held, kind, x64):
    mesh = mesh_of(4, kind=kind)
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    batch = jax.tree.map(lambda x: np.concatenate([x, x[:3] + 1]), BATCH)
    weights = np.concatenate([WEIGHTS, [0.0, 1.0, 2.0]])
    params = jax.tree.map(lambda x: put(x, P()), PARAMS)
    grads = jgd.per_example_grad(two_layers, **held)(params, *(put(x, P("data")) for x in batch))
    sums, norms = jgd.clipped_sum(grads, LAYERS, weights=put(weights, P("data")), return_norms=True)
    want = clipped_by_hand(blocks_of(batch), LAYERS, weights)
    oracle.assert_close(sums, want[0], 1e-10)
    oracle.assert_close(norms, want[1], 1e-10)
    oracle.assert_close(jgd.norms(grads, groups=LAYERS), want[1], 1e-10)
    if kind == AxisType.Explicit:
        assert {x.sharding.spec for x in jax.tree.leaves(norms)} == {P("data")}


def test_inside_of_shard_map(x64):
    batch = jax.tree.map(lambda x: np.concatenate([x, x[:3] + 1]), BATCH)

    def ask(params, *batch):
        sums, norms = jgd.clipped_sum(
            jgd.per_example_grad(two_layers)(params, *batch), LAYERS, return_norms=True
        )
        return jax.lax.psum(sums, "data"), norms

    mapped = jax.shard_map(
        ask, mesh=mesh_of(4), in_specs=(P(), P("data"), P("data")), out_specs=(P(), P("data"))
    )
    got, want = jax.jit(mapped)(PARAMS, *batch), clipped_by_hand(blocks_of(batch), LAYERS)
    oracle.assert_close(got[0], want[0], 1e-10)
    oracle.assert_close(got[1], want[1], 1e-10)


@pytest.mark.parametrize("held", HELD, ids=str)
def test_norms_of_groups(held, x64):
    grads, blocks = grads_of(**held), blocks_of()
    everything, each = norm_by_hand(blocks, 5), jax.tree.map(lambda x: norm_by_hand(x, 5), blocks)
    oracle.assert_close(jgd.norms(grads), everything, 1e-12)
    oracle.assert_close(jgd.norms(grads, groups="everything"), everything, 1e-12)
    oracle.assert_close(jgd.norms(grads, per_leaf=True), each, 1e-12)
    oracle.assert_close(jgd.norms(grads, groups=PARAMS), each, 1e-12)
    mixed = {"first": ..., "second": {"w": object()}}
    want = {"first": norm_by_hand(blocks["first"], 5), "second": each["second"]}
    oracle.assert_close(jgd.norms(grads, groups=mixed), want, 1e-12)


def test_a_group_without_leaves():
    grads = {"w": jnp.ones((5, 3)), "none": None, "empty": {}}
    sums, norms = jgd.clipped_sum(grads, {"w": 1.0, "none": None, "empty": 1.0}, return_norms=True)
    assert sums["none"] is None and sums["empty"] == {} and norms["none"] is None
    np.testing.assert_array_equal(norms["empty"], np.zeros(5))
    np.testing.assert_allclose(sums["w"], np.full(3, 5 / np.sqrt(3)), rtol=1e-6)


def test_no_examples():
    none = jax.tree.map(lambda x: x[:0], BATCH)
    sums, norms = jgd.clipped_sum(grads_of(none), LAYERS, return_norms=True)
    assert all(np.all(x == 0) for x in jax.tree.leaves(sums))
    assert {name: x.shape for name, x in norms.items()} == {"first": (0,), "second": (0,)}


@pytest.mark.parametrize("strategy", ["factored", "materialized"])
def test_groups_cost_no_more_operations(strategy):
    """Each group asks for a sum of all leaves, and the compiler drops the others."""

    def operations(max_norm):
        def ask(params, *batch):
            grads = jgd.per_example_grad(mlp, strategy=strategy)(params, *batch)
            return jgd.clipped_sum(grads, max_norm, weights=WEIGHTS, return_norms=True)

        cost = jax.jit(ask).lower(params, x).compile().cost_analysis()
        return cost["flops"]

    def mlp(params, x):
        for layer in params:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return jnp.sum(x)

    params = [{"w": jnp.ones((64, 64)), "b": jnp.ones(64)}] * 3
    x = jnp.ones((5, 7, 64))
    one = operations(1.0)
    assert one > 2 * 5 * 7 * 64 * 64 * (3 * 3 - 1)  # forward, backward without the first layer's data, sums
    assert operations([1.0, 1.0, 1.0]) < 1.02 * one
    assert operations(jax.tree.map(lambda _: 1.0, params)) < 1.02 * one


@pytest.mark.slow
@pytest.mark.sample
def test_of_a_second_backward_pass(x64):
    def loss(p, x):
        layer = jax.checkpoint(lambda h, w: (h + jnp.tanh(h @ w["up"]) @ w["down"], None))
        return jnp.mean(jax.lax.scan(layer, x, p)[0])

    params = {"up": RNG.normal(size=(16, 8, 64)) / 3, "down": RNG.normal(size=(16, 64, 8)) / 8}
    x = RNG.normal(size=(4, 512, 8))
    plain = jax.jit(jax.grad(lambda p: jnp.sum(jax.vmap(loss, (None, 0))(p, x)))).lower(params).compile()
    limit = int(plain.memory_analysis().temp_size_in_bytes)
    grads = jgd.per_example_grad(loss, max_memory=limit)(params, x)
    assert form_of(grads).strategy == SECOND_PASS
    blocks = jax.vmap(jax.grad(loss), (None, 0))(params, x)
    max_norm = median_norms(jax.tree.map(np.asarray, blocks), jax.tree.structure(params))
    sums, norms = jgd.clipped_sum(grads, max_norm, weights=WEIGHTS[:4], return_norms=True)
    want = clipped_by_hand(blocks, max_norm, WEIGHTS[:4])
    oracle.assert_close(sums, want[0], 1e-10)
    oracle.assert_close(norms, want[1], 1e-10)


def test_as_the_reduction_of_a_method(x64):
    reduce = functools.partial(jgd.clipped_sum, max_norm=LAYERS)
    method = jgd.descent(two_layers, optax.sgd(1.0), reduce=reduce)
    state, _ = method.step(method.init(PARAMS), *BATCH, weights=jnp.asarray(WEIGHTS))
    want, _ = clipped_by_hand(blocks_of(), LAYERS, WEIGHTS)
    oracle.assert_close(state.params, jax.tree.map(np.subtract, PARAMS, want), 1e-12)


# What is refused

NO_PREFIX = [
    {"first": 1.0}, {"first": 1.0, "third": 1.0},
    {"first": {"w": 1.0}, "second": 1.0},
    {"first": 1.0, "second": {"w": {"deeper": 1.0}}},
    {"first": 1.0, "second": None},
    [1.0, 1.0], (),
]  # fmt: skip


@pytest.mark.parametrize("prefix", NO_PREFIX, ids=str)
def test_what_is_no_prefix_of_the_parameters(prefix):
    with pytest.raises(ValueError) as error:
        jgd.clipped_sum(grads_of(), prefix)
    assert "`max_norm` must be a pytree prefix of the parameters" in str(error.value)
    assert str(jax.tree.structure(PARAMS)) in str(error.value)
    assert str(jax.tree.structure(prefix)) in str(error.value)
    with pytest.raises(ValueError, match="`groups` must be a pytree prefix of the parameters"):
        jgd.norms(grads_of(), groups=prefix)


@pytest.mark.parametrize("bad", [-1.0, np.nan, jnp.array(-2.0), -np.inf])
def test_a_limit_that_is_negative_or_nan_is_named(bad):
    with pytest.raises(ValueError, match=r"`max_norm\['first'\]\['b'\]` must be at least 0, got"):
        jgd.clipped_sum(grads_of(), {"first": {"w": 1.0, "b": bad}, "second": 1.0})


def test_a_limit_for_each_example_is_named():
    with pytest.raises(ValueError, match=r"`max_norm\['second'\]` must be one number, .* shape \(5,\)"):
        jgd.clipped_sum(grads_of(), {"first": 1.0, "second": jnp.ones(5)})


def test_a_limit_that_is_no_number_is_named():
    with pytest.raises(TypeError, match=r"`max_norm\['second'\]` must be one number, got str '1'"):
        jgd.clipped_sum(grads_of(), {"first": 1.0, "second": "1"})


def test_groups_beside_per_leaf():
    with pytest.raises(ValueError, match="`per_leaf` is one group for each leaf already"):
        jgd.norms(grads_of(), per_leaf=True, groups=LAYERS)
