"""Many devices: every reduction and method gives one device's answer, and sends no more than the plain gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from cases import CASES
from internals import build, by_jgd, collectives, largest_array, plain, tiles, traffic
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import PLACEMENTS, is_none, mesh_of, placed, spec_of, widened

import jgd

WEIGHTS = np.array([1.5, 0.0, 0.5, 2.0, 1.0, 0.0, 0.0, 3.0])

# One case for each way through the engine; the others behind `slow`.
FEW = {
    "relu_mlp_on_positions": "sharded",
    "conv2d_all_options": "replicated",
    "tied_embedding_and_head": "explicit",
    "recurrence": "sharded",
    "weight_normalisation": "replicated",
    "custom_vjp_on_data_and_on_parameters": "explicit",
}


# Kernels that are convolved in no way that a rule knows: XLA gets `vmap` of their derivatives wrong.
REFUSED = ("batch_groups",)
# XLA does not compile the forward pass where the kernel's channels are spread over devices.
NOT_PARTITIONED = ("conv2d_depthwise_multiplied",)


def marks_of(name, placement):
    """Each placement once by default; CI asks all of `FEW`."""
    if FEW.get(name) != placement:
        return pytest.mark.slow
    return () if name in list(FEW)[:3] else (pytest.mark.slow, pytest.mark.sample)


def asked(case, strategy="factored"):
    """Reductions that between them take every way through the factors, as one function of the arguments."""

    def ask(params, *batch):
        grads = jgd.per_example_grad(case.loss, strategy=strategy, **case.options)(params, *batch)
        scale = jgd.noise_scale(grads)
        return {
            "norms": jgd.norms(grads),
            "sum": jgd.sum(grads),
            "weighted_clipped_sum": jgd.clipped_sum(grads, 0.5, weights=jnp.asarray(WEIGHTS)),
            "weighted_mean": jgd.mean(grads, jnp.asarray(WEIGHTS)),
            "gram": jgd.gram(grads),
            "dot": jgd.dot(grads, jax.tree.map(jnp.ones_like, params)),
            "variance": jgd.variance(grads),
            "noise_scale": (scale.trace_covariance, scale.squared_norm),
        }

    return ask


def wanted(case):
    blocks = oracle.vmap_of_grad(case)
    ones = jax.tree.map(lambda x: np.ones(x.shape), case.params)
    return oracle.answers(blocks, blocks, WEIGHTS, 0.5, ones)


def check(got, want, tolerance=1e-9):
    for quantity in got:
        oracle.assert_close(got[quantity], want[quantity], tolerance, what=quantity)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of two or three examples of most leaves."""
    jax.clear_caches()
    monkeypatch.setattr(tiles, "TILE", 40)
    yield
    jax.clear_caches()


@pytest.mark.parametrize(
    ("name", "placement"),
    [pytest.param(name, p, marks=marks_of(name, p)) for name in CASES for p in PLACEMENTS],
)
def test_every_reduction_gives_one_devices_answer(name, placement, x64, small_tiles):
    case, axes = widened(name)
    params, batch = placed(case, axes, placement)
    ask = jax.jit(asked(case))
    if name in REFUSED:
        with pytest.raises(NotImplementedError, match=r"inside of `jax\.shard_map`"):
            ask(params, *batch)
        gradients = jgd.per_example_grad(case.loss)
        total = jax.jit(lambda params, *batch: jgd.mean(gradients(params, *batch), jnp.asarray(WEIGHTS)))
        check({"weighted_mean": total(params, *batch)}, wanted(case))
        return
    if name in NOT_PARTITIONED and placement != "replicated":
        with pytest.raises(jax.errors.JaxRuntimeError, match="feature_group_count"):
            ask(params, *batch)
        return
    check(ask(params, *batch), wanted(case))


# shard_map: the reductions are of a device's own examples, and what joins them is `psum`


def pooled(axis, grads):
    """Every device's answer from its own examples, as docs/mesh.md joins them."""
    size = jax.lax.psum(len(grads), axis)
    mean = jax.tree.map(lambda s: s / size, jax.lax.psum(jgd.sum(grads), axis))
    apart = jax.tree.map(lambda m, all: len(grads) * (m - all) ** 2, jgd.mean(grads), mean)
    within = jax.tree.map(lambda v: (len(grads) - 1) * v, jgd.variance(grads))
    variance = jax.tree.map(
        lambda x: x / (size - 1), jax.lax.psum(jax.tree.map(jnp.add, within, apart), axis)
    )
    trace = sum(jnp.sum(v) for v in jax.tree.leaves(variance))
    signal = sum(jnp.sum(m**2) for m in jax.tree.leaves(mean)) - trace / size
    return mean, variance, (trace, signal)


IN_SHARD_MAP = {"relu_mlp_on_positions": True, "weight_normalisation": True, "tied_embedding_and_head": False}


@pytest.mark.parametrize(
    ("name", "counted"),
    [
        pytest.param(name, counted, marks=() if IN_SHARD_MAP.get(name) == counted else pytest.mark.slow)
        for name in CASES
        for counted in (True, False)
    ],
)
def test_inside_of_shard_map_each_device_answers_for_its_own(name, counted, x64):
    """`counted`: JAX keeps count of what differs from device to device, and would sum derivatives over devices."""
    case, axes = widened(name)
    mesh = mesh_of(4)
    specs = jax.tree.map(spec_of, axes, case.batch, is_leaf=is_none)

    def ask(params, weights, *batch):
        grads = jgd.per_example_grad(case.loss, strategy="factored", **case.options)(params, *batch)
        mean, variance, scale = pooled("data", grads)
        local = {"norms": jgd.norms(grads), "dot": jgd.dot(grads, jax.tree.map(jnp.ones_like, params))}
        joined = {
            "sum": jax.lax.psum(jgd.sum(grads), "data"),
            "weighted_clipped_sum": jax.lax.psum(jgd.clipped_sum(grads, 0.5, weights=weights), "data"),
            "mean": mean,
            "variance": variance,
            "noise_scale": scale,
        }
        return local, joined

    mapped = functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), *specs), check_vma=counted)
    if counted and not _can_be_counted(case, mapped):
        pytest.skip("JAX itself does not take this loss inside of shard_map without check_vma=False")
    local, joined = jax.jit(mapped(ask, out_specs=(P("data"), P())))(
        case.params, jnp.asarray(WEIGHTS), *case.batch
    )
    check(local | joined, wanted(case))


def _can_be_counted(case, mapped):
    plain_gradient = jax.vmap(jax.grad(case.loss, has_aux=case.has_aux), case.in_axes)

    def whole(params, weights, *batch):
        params = jax.lax.pcast(params, "data", to="varying")
        return jax.tree.map(lambda x: jax.lax.psum(x, "data"), plain_gradient(params, *batch))

    try:
        jax.eval_shape(mapped(whole, out_specs=P()), case.params, jnp.asarray(WEIGHTS), *case.batch)
    except (TypeError, ValueError):
        return False
    return True


# Methods and fit


def squared_error(params, x, y):
    return 0.5 * jnp.sum((jnp.tanh(x @ params["w"] + params["b"]) - y) ** 2)


def regression(size):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(4, 2)), "b": rng.normal(size=2)}
    return params, (rng.normal(size=(size, 4)), rng.normal(size=(size, 2)))


METHODS = {
    "descent": jgd.descent(squared_error, optax.adam(0.1)),
    "clipped": jgd.descent(
        squared_error, optax.sgd(0.1), reduce=functools.partial(jgd.clipped_sum, max_norm=0.5)
    ),
    "ascent": jgd.ascent(squared_error, optax.sgd(0.01, momentum=0.9)),
    "line_search": jgd.descent(squared_error, optax.lbfgs()),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("descent", AxisType.Auto),
        ("clipped", AxisType.Explicit),
        ("ascent", AxisType.Explicit),
        pytest.param("line_search", AxisType.Auto, marks=pytest.mark.slow),
    ],
)
def test_steps_on_a_mesh_are_one_devices_steps(name, kind, x64):
    method, (params, batch), mesh = METHODS[name], regression(16), mesh_of(4, 2, kind=kind)
    on_mesh = {
        "w": jax.device_put(params["w"], NamedSharding(mesh, P("data", "model"))),
        "b": jax.device_put(params["b"], NamedSharding(mesh, P())),
    }
    spread = jax.device_put(batch, NamedSharding(mesh, P("data")))
    one, many = method.init(params), method.init(on_mesh)
    for _ in range(2):
        one, want = method.step(one, *batch)
        many, info = method.step(many, *spread)
    oracle.assert_close((many.params, info), jax.tree.map(np.asarray, (one.params, want)), 1e-10)


@pytest.mark.parametrize("batch_size", [8, 5, None])
def test_fit_on_examples_spread_over_a_mesh(batch_size, x64):
    params, data = regression(16)
    mesh = mesh_of(8)
    spread = jax.device_put(data, NamedSharding(mesh, P("data")))
    on_mesh = jax.device_put(params, NamedSharding(mesh, P()))
    key = jax.random.key(0)
    fit = functools.partial(jgd.fit, METHODS["descent"], batch_size=batch_size, epochs=2, key=key)
    one, many = fit(params, data), fit(on_mesh, spread)
    oracle.assert_close(tuple(many[::2]), jax.tree.map(np.asarray, tuple(one[::2])), 1e-10)


# Traffic


def compiled_on_mesh(model, compute, examples=64):
    mesh = mesh_of(8)
    shape = lambda x, size, *spec: jax.ShapeDtypeStruct(
        (*size, *x.shape[len(size) :]), x.dtype, sharding=NamedSharding(mesh, P(*spec))
    )
    whole = lambda tree: jax.tree.map(lambda x: shape(x, ()), tree)
    spread = lambda tree: jax.tree.map(lambda x: shape(x, (examples,), "data"), tree)
    batch = [
        whole(x) if axis is None else spread(x) for x, axis in zip(model.batch, model.axes[1:], strict=True)
    ]
    return jax.jit(compute).lower(whole(model.params), *batch).compile().as_text()


MODELS = ("mlp", "cnn", "bag", "gru", "transformer", "adapters")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "mlp" else pytest.mark.slow) for name in MODELS]
)
def test_devices_send_what_the_plain_gradient_makes_them_send(name, small_tiles):
    """At most one collective more, of as many numbers as there are examples; and nobody holds (B, P).

    But for deviations of a noise scale that are summed where two sums cancel: they stand in a branch.
    """
    examples, model = 64, build(name, small=True)
    baseline = traffic(collectives(compiled_on_mesh(model, plain(model), examples)))
    assert baseline[0] >= 1
    largest_leaf = max(x.size for x in jax.tree.leaves(model.params))
    for quantity, allowed in (("norms", (0, 0)), ("clipped_sum", baseline), ("noise_scale", baseline)):
        hlo = compiled_on_mesh(model, by_jgd(model, quantity, strategy="factored"), examples)
        count, size = traffic(collectives(hlo, branches=False))
        assert count <= allowed[0] + 1 and size <= allowed[1] + 4 * examples, (quantity, collectives(hlo))
        assert largest_array(hlo) < examples * largest_leaf, quantity


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "mlp" else pytest.mark.slow) for name in MODELS]
)
def test_a_gram_sends_at_most_the_others_gradients_and_holds_tiles_of_them(name, small_tiles):
    examples, model = 64, build(name, small=True)
    hlo = compiled_on_mesh(model, by_jgd(model, "gram", strategy="factored"), examples)
    leaves = [x.size for x in jax.tree.leaves(model.params)]
    assert traffic(collectives(hlo))[1] <= 4 * examples * (sum(leaves) + examples / 8)
    assert name != "mlp" or largest_array(hlo) < examples * max(leaves)


def test_a_bias_is_summed_along_positions_before_it_is_sent():
    mesh, size = mesh_of(8), 3
    p = jax.device_put(jnp.ones(size), NamedSharding(mesh, P()))
    x = jax.device_put(jnp.ones((8, 50, size)), NamedSharding(mesh, P("data")))
    grads = jgd.per_example_grad(lambda p, x: jnp.sum(jnp.tanh(x + p)), strategy="factored")
    hlo = jax.jit(lambda p, x: jgd.sum(grads(p, x))).lower(p, x).compile().as_text()
    assert traffic(collectives(hlo)) == (1, 4 * size)


def test_collectives_in_loops_are_counted_once_a_step():
    mesh = mesh_of(8)

    def steps(x):
        add = lambda total, _: (jax.lax.psum(total, "data") / 8, None)
        return jax.lax.scan(add, x, None, length=5)[0]

    mapped = jax.shard_map(steps, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    hlo = jax.jit(mapped).lower(jnp.ones((8, 3), jnp.bfloat16)).compile().as_text()
    assert {c.kind for c in collectives(hlo)} == {"all-reduce"}
    assert traffic(collectives(hlo)) in ((5, 5 * 3 * 2), (5, 5 * 3 * 4))  # in bfloat16, or widened on the CPU


# Batches of any length, and bad input


@pytest.mark.parametrize("size", [1, 8, 13])
def test_a_padded_batch_gives_the_answers_of_the_whole(size, x64):
    params, batch = regression(size)
    mesh = mesh_of(8)
    spread, weights = jgd.shard_batch(batch, mesh, "data")
    padded = -(-size // 8) * 8
    assert weights.shape == (padded,) and weights.sum() == size
    assert {x.sharding.spec for x in spread} == {P("data")} and {x.shape[0] for x in spread} == {padded}
    params_on_mesh = jax.device_put(params, NamedSharding(mesh, P()))
    one = jgd.per_example_grad(squared_error)(params, *batch)
    many = jgd.per_example_grad(squared_error, strategy="factored")(params_on_mesh, *spread)
    for ask in (jgd.sum, jgd.mean, functools.partial(jgd.clipped_sum, max_norm=0.5), jgd.second_moment):
        want = jax.tree.map(np.asarray, ask(one))
        oracle.assert_close(ask(many, weights=weights), want, 1e-7)
    np.testing.assert_allclose(jgd.norms(many)[:size], jgd.norms(one), rtol=1e-12)


def test_a_batch_over_two_axes_of_a_mesh():
    spread, weights = jgd.shard_batch({"x": jnp.arange(5)}, mesh_of(4, 2), ("data", "model"))
    assert spread["x"].tolist() == [0, 1, 2, 3, 4, 4, 4, 4] and weights.tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    assert len({shard.device for shard in spread["x"].addressable_shards}) == 8


@pytest.mark.parametrize(
    ("batch", "axis", "error", "says"),
    [
        (np.ones((4, 2)), "date", ValueError, r"`axis` is 'date', but `mesh` has the axes 'data', 'model'"),
        ((np.ones(4), np.ones(5)), "data", ValueError, r"`batch\[0\]` holds 4 examples, `batch\[1\]` 5"),
        ({"x": np.ones((0, 3))}, "data", ValueError, r"`batch\['x'\]` has length 0"),
        ((), "data", ValueError, "`batch` holds no examples: at least one leaf"),
        ((np.ones(4), 3.0), "data", TypeError, r"`batch\[1\]` is float 3.0"),
        (np.array(["a"]), "data", TypeError, "not an array of numbers"),
    ],
)
def test_what_cannot_be_spread(batch, axis, error, says):
    with pytest.raises(error, match=says):
        jgd.shard_batch(batch, mesh_of(4, 2), axis)


def test_arrays_on_different_meshes():
    params, batch = regression(8)
    left, right = (Mesh(np.array(jax.devices()[k : k + 4]), ("data",)) for k in (0, 4))
    params = jax.device_put(params, NamedSharding(left, P()))
    batch = jax.device_put(batch, NamedSharding(right, P("data")))
    with pytest.raises(ValueError, match=r"`params\['b'\]` on .*0, 1, 2, 3, `batch\[0\]` on .*4, 5, 6, 7"):
        jgd.per_example_grad(squared_error)(params, *batch)


def test_one_loss_in_microbatches_on_explicit_meshes_one_after_the_other():
    loss = lambda w, x: jnp.sum(jnp.tanh(x @ w))
    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((7, 5), (8, 3, 7)))
    want = jgd.per_example_grad(loss)(w, x)
    for devices in (4, 1, 2):
        mesh = mesh_of(devices, kind=AxisType.Explicit)
        placed = (
            jax.device_put(w, NamedSharding(mesh, P())),
            jax.device_put(x, NamedSharding(mesh, P("data"))),
        )
        grads = jgd.per_example_grad(loss, microbatch_size=4)(*placed)
        clipped, norms = jgd.clipped_sum(grads, 1.0, return_norms=True)
        assert grads.values.sharding.spec == norms.sharding.spec == P("data")
        oracle.assert_close(grads.values, want.values, 1e-5)
        oracle.assert_close(norms, jgd.norms(want), 1e-5)
        oracle.assert_close(clipped, jgd.clipped_sum(want, 1.0), 1e-5)


@pytest.mark.parametrize("reduction", [jgd.norms, jgd.sum])
def test_a_kernel_that_is_computed_from_data_and_parameters_is_refused(reduction):
    """`vmap(grad)` itself is wrong there, and so is the plain gradient: each example has a kernel of its own."""

    def loss(w, x, z):
        kernel = (z @ w).reshape(3, 2, 4)
        y = jax.lax.conv_general_dilated(
            x[None], kernel, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        )
        return jnp.sum(jnp.sin(y))

    rows = NamedSharding(mesh_of(8), P("data"))
    x, z = jax.device_put((jnp.ones((8, 6, 2)), jnp.ones((8, 5))), rows)
    grads = jgd.per_example_grad(loss, strategy="factored")(jnp.ones((5, 24)), x, z)
    with pytest.raises(NotImplementedError, match=r"inside of `jax\.shard_map`"):
        reduction(grads)
