"""The engine from inside: each method and tile forced in turn, the algebra of views, what compiled programs hold."""

import dataclasses
import functools
import gc
import math
import re
import weakref

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import B, Draw, Problem
from compilations import compilations
from inside import form_of
from jax import lax

import jgd
from jgd._engine import leading, lookups, moments, tiles, views
from jgd._engine.examples import pass_over
from jgd._engine.factored import Factored
from jgd._engine.jaxprs import trace_jaxpr
from jgd._engine.parts import Part
from jgd._engine.plan import Variant, plan_of
from jgd._engine.views import View, overlap
from jgd._gradients import held_as

WEIGHTS = np.array([1.5, 0.0, 0.5, 2.0, 1.0])


@pytest.fixture
def forget():
    """What is compiled for one constant is not for another."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def gradients(problem, strategy="factored"):
    return jgd.per_example_grad(problem.loss, strategy=strategy)(problem.params, *problem.batch)


def made(loss, params, *batch):
    """A problem of these arrays, in float64."""
    return Problem(loss, jax.tree.map(jnp.asarray, params), tuple(jnp.asarray(x) for x in batch))


# Each rule, by each method, for one position and for many


def dense(draw, t):
    return made(lambda p, x: jnp.sum(jnp.sin(x @ p)), draw(4, 3), draw(B, t, 4))


def parameter_first(draw, t):
    return made(lambda p, x: jnp.sum(jnp.sin(p @ x)), draw(3, 4), draw(B, 4, t))


def in_groups(draw, t):
    loss = lambda p, x: jnp.sum(jnp.sin(jnp.einsum("gio,tgi->tgo", p, x)))
    return made(loss, draw(2, 4, 3), draw(B, t, 2, 4))


def several_contracted(draw, t):
    loss = lambda p, x: jnp.sum(jnp.sin(jnp.einsum("iojk,tjik->to", p, x)))
    return made(loss, draw(2, 3, 4, 2), draw(B, t, 4, 2, 2))


def convolved(groups, space, draw, t):
    size = (t + 1, 2)[:space]
    names = "NCH" + "W" * (space > 1), "OIH" + "W" * (space > 1)

    def loss(p, x):
        options = {"feature_group_count": groups, "dimension_numbers": (*names, names[0])}
        return jnp.sum(jnp.sin(lax.conv_general_dilated(x[None], p, (1,) * space, "VALID", **options)))

    return made(loss, draw(2 * groups, 3, *((2,) * space)), draw(B, 3 * groups, *size))


def depthwise(draw, t):
    def loss(p, x):
        names = ("NHC", "HIO", "NHC")
        options = {"feature_group_count": 3, "dimension_numbers": names, "rhs_dilation": (2,)}
        return jnp.sum(jnp.sin(lax.conv_general_dilated(x[None], p, (1,), "VALID", **options)))

    return made(loss, draw(2, 1, 6), draw(B, t + 2, 3))


def looked_up(draw, t):
    loss = lambda p, ix: jnp.sum(jnp.sin(jnp.sum(p[ix], 0) * jnp.arange(1.0, 4)))
    return made(loss, draw(5, 3), draw.integers(5, B, t))


def tied(draw, t):
    loss = lambda p, ix: jnp.sum(jnp.sin(jnp.tanh(p[ix]) @ p.T))
    return made(loss, draw(5, 3), draw.integers(5, B, t))


def both_ways(draw, t):
    """The same matrix and its transpose."""
    return made(lambda p, x: jnp.sum(jnp.sin(jnp.tanh(x @ p) @ p.T)), draw(4, 3), draw(B, t, 4))


def recurrent(draw, t):
    def loss(p, xs):
        step = lambda h, x: (jnp.tanh(h @ p + x), h)
        return jnp.sum(jnp.sin(lax.scan(step, jnp.ones(3), xs)[0]))

    return made(loss, draw(3, 3), draw(B, t, 3))


def stacked(draw, t):
    def loss(p, x):
        step = lambda h, w: (jnp.tanh(h @ w), None)
        return jnp.sum(jnp.sin(lax.scan(step, x, p, reverse=True)[0]))

    return made(loss, draw(2, 4, 4), draw(B, t, 4))


RULED = {
    "dot_general": (dense, parameter_first, in_groups, several_contracted, both_ways, recurrent, stacked),
    "convolution": (
        functools.partial(convolved, 1, 1),
        functools.partial(convolved, 2, 1),
        functools.partial(convolved, 2, 2),
        depthwise,
    ),
    "lookup": (looked_up, tied),
}
FORCED = [(rule, build) for rule, builds in RULED.items() for build in builds]


def named(value):
    if isinstance(value, functools.partial):
        return "convolved_in_{}_groups_{}d".format(*value.args)
    return getattr(value, "__name__", None)


@pytest.mark.parametrize("t", [1, 2, 7])
@pytest.mark.parametrize(("rule", "build"), FORCED, ids=named)
def test_each_method_of_each_rule(rule, build, t, x64):
    problem = build(Draw(t), t)
    grads, blocks = gradients(problem), oracle.vmap_of_grad(problem)
    plan = form_of(grads).plan
    (part,) = plan.parts
    assert rule in {use.rule for use in part.uses} and part.shape is not None and not plan.whole_leaves
    norms = oracle.answers(blocks, blocks, WEIGHTS, 1.0, problem.params)["norms"]
    for method in ("pairs", "block"):
        forced = dataclasses.replace(plan, parts=(dataclasses.replace(part, method=method),))
        examples = form_of(grads).examples._replace(squares={})  # what the pass itself made of the norms
        held = held_as(grads, dataclasses.replace(form_of(grads), plan=forced, examples=examples))
        oracle.assert_close(jgd.norms(held), norms, 1e-9, what=method)
        clipped = oracle.answers(blocks, blocks, WEIGHTS, 0.7 * norms.mean(), problem.params)["clipped_sum"]
        oracle.assert_close(jgd.clipped_sum(held, 0.7 * norms.mean()), clipped, 1e-9, what=method)
    oracle.assert_close(jgd.gram(grads), oracle.matrix(blocks) @ oracle.matrix(blocks).T, 1e-9)


@pytest.mark.parametrize("method", ["pairs", "block"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_what_the_backward_pass_makes_of_the_steps_of_a_scan(checkpointed, method, x64):
    """Where a scan steps through a leaf, each step's square is taken in the pass; others are left to be asked for."""

    def loss(p, x):
        def step(h, own):
            h = jnp.tanh(jnp.tanh(h @ own["w"] + own["b"]) @ own["v"] + h @ own["skip"][0])
            return h @ p["shared"], None

        return jnp.sum(jnp.sin(lax.scan(jax.checkpoint(step) if checkpointed else step, x, p["layers"])[0]))

    draw = Draw(3)
    layers = {"w": draw(2, 4, 4), "b": draw(2, 4), "v": draw(2, 4, 4), "skip": draw(2, 3, 4, 4)}
    problem = made(loss, {"layers": layers, "shared": draw(4, 4)}, draw(B, 5, 4))
    form = form_of(gradients(problem))
    plan = plan_of(form.plan.program, Variant(keeps=False))
    forced = {
        key: tuple(
            dataclasses.replace(probe, part=dataclasses.replace(probe.part, method=method)) for probe in some
        )
        for key, some in plan.probes.items()
    }
    probed = {plan.program.param_paths[probe.of.leaf] for some in plan.probes.values() for probe in some}
    assert probed == {"['layers']['w']", "['layers']['v']", "['layers']['skip']"}
    plan = dataclasses.replace(plan, probes=forced)
    *_, examples, sums = pass_over(plan, form.model, form.examples.inputs, fuse=True, together=True)
    assert {len(examples.squares), *map(len, sums[:4])} == {3} and not sums.norms
    squares = Factored(form.model, examples, plan).squared_norms()
    blocks = jax.tree.leaves(oracle.vmap_of_grad(problem))
    want = [np.square(np.reshape(x, (B, -1))).sum(1) for x in blocks]
    oracle.assert_close(squares, want, 1e-9)
    whole = [np.sum(x, axis=0) for x in blocks]
    held = Factored(form.model, examples, plan, sums=sums)
    oracle.assert_close(held.weighted_sum(None), whole, 1e-9)
    oracle.assert_close(held.squared_sum(), sum(np.square(x).sum() for x in whole), 1e-9)
    flat = oracle.matrix(blocks)
    seconds = [np.sum(np.square(x), axis=0) for x in blocks]
    spreads = [B * np.var(x, axis=0) for x in blocks]
    oracle.assert_close(held.self_gram(), flat @ flat.T, 1e-9)
    oracle.assert_close(held.second_moments(None), seconds, 1e-9)
    oracle.assert_close(held.spreads(None), spreads, 1e-9)
    # It is these that are used, and for these leaves alone.
    assert plan.summed == {plan.parts[k].leaf for k in sums.parts} == sums.squares.keys()
    twice = dataclasses.replace(held, sums=jax.tree.map(lambda x: 2 * x, sums))
    doubled = lambda leaves: [(2 if leaf in plan.summed else 1) * x for leaf, x in enumerate(leaves)]
    oracle.assert_close(twice.weighted_sum(None), doubled(whole), 1e-9)
    oracle.assert_close(twice.second_moments(None), doubled(seconds), 1e-9)
    oracle.assert_close(twice.spreads(None), doubled(spreads), 1e-9)
    oracle.assert_close(twice.self_gram(), held.self_gram() + sums.gram, 1e-9)
    more = sum(sums.squares.values())
    oracle.assert_close(twice.squared_sum(), held.squared_sum() + more, 1e-9)
    # With weights they are of no use.
    for ask in (Factored.weighted_sum, Factored.second_moments, Factored.spreads):
        oracle.assert_close(ask(twice, jnp.asarray(WEIGHTS)), ask(held, jnp.asarray(WEIGHTS)), 1e-15)
    oracle.assert_close(twice.gram(held), flat @ flat.T, 1e-9)


def test_steps_with_many_positions_keep_blocks_for_a_clipped_sum_alone(forget):
    """Nothing of a layer stays for what is asked without weights, though its blocks are kept where they sum too."""

    def loss(p, x):
        step = jax.checkpoint(lambda h, w: (h + jnp.tanh(h @ w["a"]) @ w["b"], None))
        return jnp.mean(lax.scan(step, x, p)[0] ** 2)

    draw = Draw(0)
    params = {"a": draw(6, 16, 64), "b": draw(6, 64, 16)}
    problem = made(loss, jax.tree.map(np.float32, params), np.float32(draw(B, 64, 16)))
    grads, blocks = gradients(problem), oracle.vmap_of_grad(problem)
    assert form_of(grads).plan.kept == {0, 1} and not form_of(grads).examples.squares
    plain = lambda p, x: jax.grad(lambda p: jnp.sum(jax.vmap(loss, (None, 0))(p, x)))(p)
    memory = lambda ask: jax.jit(ask).lower(problem.params, *problem.batch).compile().memory_analysis()
    most = 1.5 * memory(plain).temp_size_in_bytes
    want = oracle.answers(blocks, blocks, WEIGHTS, 1.0, problem.params)
    clipped = functools.partial(jgd.clipped_sum, max_norm=1.0)
    questions = {"sum": jgd.sum, "norms": jgd.norms, "gram": jgd.gram, "variance": jgd.variance}
    questions["noise_scale"] = lambda grads: jgd.noise_scale(grads)[1:]
    for name, question in (questions | {"clipped_sum": clipped}).items():
        make = jgd.per_example_grad(loss, strategy="factored")
        ask = lambda *args, make=make, question=question: question(make(*args))
        oracle.assert_close(jax.jit(ask)(problem.params, *problem.batch), want[name], 1e-4, what=name)
        assert (memory(ask).temp_size_in_bytes <= most) == (name != "clipped_sum"), name


def test_the_planner_takes_either_method(x64):
    """Pairs where there are few positions, the block where there are many."""
    methods = [form_of(gradients(dense(Draw(0), t))).plan.parts[0].method for t in (1, 40)]
    assert methods == ["pairs", "block"]


@pytest.mark.parametrize("weights", [np.ones(B), WEIGHTS])
@pytest.mark.parametrize("broken", [None, 1, 3])
@pytest.mark.parametrize("long", [1, 1000])
def test_blocks_that_were_kept_for_the_clipped_sum(long, broken, weights, monkeypatch, forget, x64):
    """Of an example without weight, or without a finite norm, nothing is left in the sum."""
    monkeypatch.setattr(leading, "_LONG", long)
    problem = dense(Draw(0), 40)
    (x, *rest) = problem.batch
    if broken is not None:
        problem = dataclasses.replace(problem, batch=(x.at[broken, 2].set(jnp.nan), *rest))
    grads, blocks = gradients(problem), oracle.vmap_of_grad(problem)
    assert form_of(grads).plan.kept == {part.leaf for part in form_of(grads).plan.parts}
    present = [i for i in range(B) if i != broken]
    held = jax.tree.map(lambda g: g[present], blocks)
    bound = 0.7 * np.linalg.norm(oracle.matrix(held), axis=1).mean()
    want = oracle.answers(held, held, weights[present], bound, problem.params)["weighted_clipped_sum"]
    oracle.assert_close(jgd.clipped_sum(grads, bound, weights=weights), want, 1e-9)


# Parts that are alike


def layers_of(*uses):
    """A loss of one weight for each use, all of one shape, and positions to use them on."""

    def loss(p, x):
        for w, use in zip(p, uses, strict=True):
            x = jnp.tanh(use(x, w))
        return jnp.sum(x)

    draw = Draw(0)
    return made(loss, [draw(4, 4) for _ in uses], draw(B, 6, 4))


PLAIN, TURNED = (lambda x, w: x @ w), (lambda x, w: x @ w.T)
IN_PAIRS = lambda x, w: jnp.einsum("tgi,gio->tgo", x.reshape(6, 2, 2), w.reshape(4, 2, 2)[::2]).reshape(6, 4)


@pytest.mark.parametrize(
    ("uses", "kinds"),
    [((PLAIN,) * 3, 1), ((PLAIN, TURNED, PLAIN, TURNED), 2), ((PLAIN, IN_PAIRS, TURNED, IN_PAIRS), 3)],
)
def test_parts_of_a_kind_are_traced_once(uses, kinds, monkeypatch, forget, x64):
    """A kind says how the weight lies, too: those of one shape that are used in another way are another kind."""
    problem = layers_of(*uses)
    traced = []
    for name in ("square", "unordered"):
        of_part = getattr(Part, name)
        count = lambda part, data, of_part=of_part, name=name: (traced.append(name), of_part(part, data))[1]
        monkeypatch.setattr(Part, name, count)
    grads = gradients(problem)
    assert len({part.kind for part in form_of(grads).plan.parts}) == kinds
    blocks = oracle.vmap_of_grad(problem)
    arguments = {"weights": WEIGHTS, "max_norm": 1.0, "direction": problem.params}
    want = oracle.answers(blocks, blocks, **arguments)
    oracle.assert_close(jgd.norms(grads), want["norms"], 1e-9)
    oracle.assert_close(jgd.second_moment(grads), want["second_moment"], 1e-9)
    assert traced == ["square"] * kinds + ["unordered"] * kinds
    for quantity, got in jax.jit(every_reduction)(grads, arguments).items():
        oracle.assert_close(got, want[quantity], 1e-9, what=quantity)


# Tiles


@jax.custom_vjp
def cubed(x, w):
    return x * w


def _cubed_bwd(kept, ct):
    x, w = kept
    return ct**3 * w, jnp.sum(jnp.sin(ct * x).reshape(-1, *w.shape), 0)


cubed.defvjp(lambda x, w: (x * w, (x, w)), _cubed_bwd)


def of_every_kind(draw):
    """A leaf for each way in which the engine takes a gradient."""

    def loss(p, x, ix):
        h = jnp.tanh(x @ p["dense"]) + jnp.tanh(p["table"][ix])
        h = h * p["opaque"] + h @ (p["whole"] / jnp.linalg.norm(p["whole"]))
        h = lax.conv_general_dilated(
            h[None], p["kernel"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        )[0]
        return jnp.sum(cubed(jnp.sin(h), p["custom"]))

    params = {
        "dense": draw(4, 3), "table": draw(6, 3), "opaque": draw(3),
        "whole": draw(3, 3), "kernel": draw(2, 3, 3), "custom": draw(3),
    }  # fmt: skip
    return made(loss, params, draw(B, 3, 4), draw.integers(6, B, 3))


def every_reduction(grads, arguments):
    return {
        "materialize": jgd.materialize(grads),
        "sum": jgd.sum(grads),
        "weighted_sum": jgd.sum(grads, arguments["weights"]),
        "leaf_norms": jgd.norms(grads, per_leaf=True),
        "dot": jgd.dot(grads, arguments["direction"]),
        "gram": jgd.gram(grads),
        "clipped_sum": jgd.clipped_sum(grads, arguments["max_norm"]),
        "weighted_second_moment": jgd.second_moment(grads, arguments["weights"]),
        "weighted_variance": jgd.variance(grads, arguments["weights"]),
    }


def tiled_answers(monkeypatch, tile=None, elements=None):
    if elements is not None:
        monkeypatch.setattr(tiles, "TILE", elements)
    if tile is not None:
        monkeypatch.setattr(tiles, "tile_of", lambda size, elements: min(tile, size))
    problem = of_every_kind(Draw(0))
    blocks = oracle.vmap_of_grad(problem)
    direction = jax.tree.map(lambda x: Draw(1)(*x.shape), problem.params)
    arguments = {"weights": WEIGHTS, "max_norm": 1.0, "direction": direction}
    want = oracle.answers(blocks, blocks, **arguments)
    grads = gradients(problem)
    got = jax.jit(every_reduction)(grads, arguments)
    for quantity in got:
        oracle.assert_close(got[quantity], want[quantity], 1e-9, what=quantity)
    return form_of(grads).plan


@pytest.mark.parametrize("tile", [1, 2, 3, 4])
def test_tiles_of_every_number_of_examples(tile, monkeypatch, forget, x64):
    plan = tiled_answers(monkeypatch, tile=tile)
    rules = {use.rule for part in plan.parts for use in part.uses}
    assert rules >= {"dot_general", "convolution", "lookup", "opaque"}
    assert len(plan.whole_leaves) == 2 and len(plan.dense) == len(plan.backward_only) == 1


@pytest.mark.parametrize("tile", [1, 2, 5])
def test_rows_one_by_one(tile, monkeypatch, forget, x64):
    """As `leading.sum_present` takes few and long ones."""
    monkeypatch.setattr(leading, "_LONG", 1)
    tiled_answers(monkeypatch, tile=tile)


@pytest.mark.parametrize("fun", [None, lambda x: jnp.square(x - 3)])
def test_rows_one_by_one_have_the_same_derivative(fun, monkeypatch, forget, x64):
    rows, weights = jnp.asarray(Draw(0)(B, 2, 3)).at[1].set(np.nan), jnp.asarray(WEIGHTS)
    total = lambda rows, weights: leading.sum_present(rows, weights, fun, one_device=True)
    made = []
    for long in (1, 1000):
        monkeypatch.setattr(leading, "_LONG", long)
        assert leading.few_and_long(rows) == (long == 1)
        slope = jax.grad(lambda *args: jnp.sum(jnp.sin(total(*args))), argnums=(0, 1))(rows, weights)
        made.append((total(rows, weights), slope))
    oracle.assert_close(made[0], made[1], 1e-12)
    assert np.all(made[0][1][0][1] == 0)  # the absent example's, which is not a number itself


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("build", [looked_up, tied])
def test_the_sum_of_looked_up_rows_is_squared_some_columns_at_a_time(build, width, monkeypatch, x64):
    monkeypatch.setattr(lookups, "_CACHED", 1)
    monkeypatch.setattr(lookups, "_NARROW", width)
    problem = build(Draw(0), 7)
    blocks = oracle.vmap_of_grad(problem)
    got = jgd.noise_scale(gradients(problem))
    want = oracle.answers(blocks, blocks, WEIGHTS, 1.0, problem.params)["noise_scale"]
    oracle.assert_close((got.trace_covariance, got.squared_norm), want, 1e-9)


@pytest.mark.parametrize("elements", [1, 40, 100])
def test_tiles_of_every_number_of_elements(elements, monkeypatch, forget, x64):
    tiled_answers(monkeypatch, elements=elements)


@pytest.mark.parametrize("weights", [None, np.float64, np.float16])
@pytest.mark.parametrize("positions", [1, 40])
@pytest.mark.parametrize("tile", [1, 2])
def test_moments_in_fewer_bits_than_the_weights(tile, positions, weights, monkeypatch, forget, x64):
    monkeypatch.setattr(tiles, "tile_of", lambda size, elements: min(tile, size))
    problem = dense(Draw(0), positions)
    narrow = dataclasses.replace(
        problem, params=problem.params.astype(jnp.float32), batch=(problem.batch[0].astype(jnp.float32),)
    )
    grads, blocks = gradients(narrow), np.asarray(oracle.vmap_of_grad(problem))
    w = np.ones(B) if weights is None else WEIGHTS
    share = (w / w.sum())[:, None, None]
    spread = (share * (blocks - (share * blocks).sum(0)) ** 2).sum(0) / (1 - np.square(share).sum())
    asked = None if weights is None else jnp.asarray(WEIGHTS.astype(weights))
    oracle.assert_close(jgd.second_moment(grads, asked), (share * blocks**2).sum(0), 1e-5)
    oracle.assert_close(jgd.variance(grads, asked), spread, 1e-5)


@pytest.mark.parametrize("tile", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "broken", [{}, {0: np.inf}, {2: -np.inf}, {4: np.inf}, {1: np.nan}, {0: np.inf, 4: np.nan}]
)
def test_moments_of_what_is_not_finite(broken, tile, x64):
    """Wherever it lies among the tiles, an infinite gradient makes the second moment inf and the variance nan."""
    grads = np.array(Draw(0)(5, 2))
    for example, value in broken.items():
        grads[example, 1] = value
    cut = [jnp.asarray(grads[i : i + tile]) for i in range(0, 5, tile)]
    each = [moments.spread_of(x, None, one_device=True) for x in cut]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *each)
    for whole in (functools.reduce(moments.joined, each), moments.joined_all(stacked)):
        np.testing.assert_allclose(moments.square_around_zero(whole), np.square(grads).sum(0), rtol=1e-12)
        with np.errstate(invalid="ignore"):
            spread = 5 * np.var(grads, axis=0)
        np.testing.assert_allclose(moments.square_around_mean(whole), spread, rtol=1e-12)


def test_a_variance_by_weights_of_either_sign():
    got = jgd.variance([jnp.arange(3.0)], jnp.array([3.0, -1.0, 1.0]))[0]
    assert got == pytest.approx(-4.0)  # Σ w (g − ḡ)² / (V₁ − V₂/V₁), from its definition
    assert np.isnan(jgd.variance([jnp.arange(3.0)], jnp.array([2.0, 0.0, 0.0]))[0])


@pytest.mark.parametrize("size", range(1, 14))
@pytest.mark.parametrize("elements", [0, 1, 30, 1000])
def test_a_tile_fits_and_divides_where_a_divisor_is_near(size, elements, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 100)
    tile = tiles.tile_of(size, elements)
    most = max(1, min(size, 100 // max(elements, 1)))
    assert most // 2 < tile <= most or tile == most == 1
    assert size % tile == 0 or all(size % k for k in range(most // 2 + 1, most + 1))


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_a_window_larger_than_the_image_has_no_gradient(strides, x64):
    def loss(p, x):
        made = lax.conv_general_dilated(
            x[None], p, strides, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        assert made.size == 0
        return jnp.sum(made) + jnp.sum(x)

    problem = made(loss, Draw(0)(5, 5, 2, 3), Draw(1)(B, 3, 3, 2))
    arguments = {"weights": WEIGHTS, "max_norm": 1.0, "direction": problem.params}
    got = jax.jit(every_reduction)(gradients(problem), arguments)
    for quantity, zero in got.items():
        assert not np.any(zero), quantity


# Blocks that the pass makes


def normalized(params, x):
    """Norms with scale and bias in a scan over layers; a gain inside of a branch; a shift carried by every step."""

    def layer(h, own):
        h = jax.nn.standardize(h, axis=-1) * own["scale"] + own["bias"] + params["carried"]
        return jnp.sin(h @ own["w"]), None

    h, _ = lax.scan(layer, x / params["gain"], params["layers"])
    h = lax.cond(x[0, 0] > 0, lambda h: h * params["branched"], lambda h: h, h)
    return jnp.sum((h + params["each"]) ** 2)


def masked(params, x):
    """The bias meets the matrix where no gradient flows: in a mask, in what is logged, in each step of a scan."""

    def step(h, bias):
        return jnp.tanh(h + bias) * jnp.sum(params["w"] @ bias > 0), None

    h = jnp.tanh(x @ params["w"] + params["bias"]) * (params["w"] @ params["bias"] > 0)
    h, _ = lax.scan(step, h, params["steps"])
    return jnp.sum(h * x), params["w"] @ params["bias"]


def test_what_is_made_in_the_pass_may_meet_a_matrix_without_a_gradient(x64):
    draw = Draw(3)
    params = {"w": jnp.asarray(draw(3, 3)), "bias": jnp.asarray(draw(3)), "steps": jnp.asarray(draw(2, 3))}
    x = jnp.asarray(draw(B, 6, 3))
    ours = jgd.per_example_grad(masked, has_aux=True, strategy="factored")(params, x)
    assert len(form_of(ours).examples.blocks) == 2
    _, aux = jax.vmap(masked, in_axes=(None, 0))(params, x)
    oracle.assert_close(ours.aux, aux, 1e-9)
    blocks = oracle.vmap_of_grad(made(lambda *args: masked(*args)[0], params, x))
    arguments = {"weights": WEIGHTS, "max_norm": 1.0, "direction": jax.tree.map(np.ones_like, params)}
    want = oracle.answers(blocks, blocks, **arguments)
    for quantity, got in jax.jit(every_reduction)(ours, arguments).items():
        oracle.assert_close(got, want[quantity], 1e-9, what=quantity)


@pytest.mark.parametrize("broken", [False, True])
def test_what_is_spread_over_positions_is_made_in_the_pass(broken, x64):
    draw = Draw(3)
    layers = {"scale": draw(2, 3), "bias": draw(2, 3), "w": draw(2, 3, 3)}
    single = {name: 2 + draw(3) for name in ("gain", "branched", "carried")}
    problem = made(normalized, {"layers": layers, "each": draw(6, 3)} | single, draw(B, 6, 3))
    grads = gradients(problem)
    plan = form_of(grads).plan
    beside = {plan.program.param_paths[leaf] for leaf in form_of(grads).examples.blocks}
    assert beside == {"['gain']", "['layers']['scale']", "['layers']['bias']"}
    blocks = oracle.vmap_of_grad(problem)
    direction = jax.tree.map(lambda x: Draw(1)(*x.shape), problem.params)
    arguments = {"weights": WEIGHTS, "max_norm": 1.0, "direction": direction}
    want = oracle.answers(blocks, blocks, **arguments)
    if broken:  # the second example has weight 0
        (x,) = problem.batch
        grads = gradients(dataclasses.replace(problem, batch=(x.at[1].set(jnp.nan),)))
    got = jax.jit(every_reduction)(grads, arguments)
    for quantity in [name for name in got if name.startswith("weighted")] if broken else got:
        oracle.assert_close(got[quantity], want[quantity], 1e-9, what=quantity)


# Views


def chain(rng, shape):
    """A random path of rearrangements, as a function of an array of this shape."""
    steps = []
    for _ in range(rng.integers(1, 6)):
        step = rearrangement(rng, shape)
        shape = jax.eval_shape(step, jax.ShapeDtypeStruct(shape, jnp.float32)).shape
        if math.prod(shape) > 200:
            break
        steps.append(step)
    return lambda x: functools.reduce(lambda x, step: step(x), steps, x)


def rearrangement(rng, shape):
    n, size = len(shape), math.prod(shape)
    kind = rng.choice(["transpose", "reshape", "slice", "rev", "squeeze", "broadcast", "split", "cast"])
    if kind == "transpose":
        order = rng.permutation(n).tolist()
        return lambda x: lax.transpose(x, order)
    if kind == "reshape":
        first = int(rng.choice([d for d in range(1, size + 1) if size % d == 0]))
        return lambda x: lax.reshape(x, (first, size // first))
    if kind == "slice" and n:
        starts = [int(rng.integers(s)) for s in shape]
        limits = [int(rng.integers(a + 1, s + 1)) for a, s in zip(starts, shape, strict=True)]
        strides = [int(rng.integers(1, 3)) for _ in shape]
        return lambda x: lax.slice(x, starts, limits, strides)
    if kind == "rev" and n:
        axes = [int(i) for i in range(n) if rng.random() < 0.5]
        return lambda x: lax.rev(x, axes)
    if kind == "squeeze":
        axes = [i - n * int(rng.random() < 0.5) for i in range(n) if shape[i] == 1]
        return lambda x: lax.squeeze(x, axes)
    if kind == "broadcast":
        places = sorted(rng.choice(n + 1, size=n, replace=False).tolist())
        to = [int(rng.integers(1, 3))] * (n + 1)
        for place, length in zip(places, shape, strict=True):
            to[place] = length if length > 1 or rng.random() < 0.5 else 2
        return lambda x: lax.broadcast_in_dim(x, to, places)
    if kind == "split" and n and shape[0] > 1:
        cut = int(rng.integers(1, shape[0]))
        which = int(rng.integers(2))
        return lambda x: lax.split(x, (cut, shape[0] - cut))[which]
    return lambda x: lax.convert_element_type(x, jnp.bfloat16).astype(jnp.float32)


def elements(view: View) -> np.ndarray:
    """Which element of the leaf each element of a view is."""
    index = np.full(view.array.shape, view.offset)
    for axis, (size, stride) in enumerate(zip(view.array.shape, view.array.strides, strict=True)):
        index = index + (np.arange(size) * stride).reshape(
            [-1 if i == axis else 1 for i in range(index.ndim)]
        )
    return index


def followed(fun, shape):
    """The view that `fun` makes of a leaf; None where there is none."""
    jaxpr, _, _ = trace_jaxpr(fun, jax.ShapeDtypeStruct(shape, jnp.float32))
    env = {jaxpr.invars[0]: views.whole(0, shape)}
    for eqn in jaxpr.eqns:
        view = env.get(eqn.invars[0])
        env.update(zip(eqn.outvars, views.follow(eqn, view), strict=True))
    return env[jaxpr.outvars[0]]


@hypothesis.settings(max_examples=150)
@hypothesis.given(st.integers(0, 2**32 - 1))
def test_a_view_says_which_elements_a_path_picks(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 5, size=rng.integers(0, 4)).tolist())
    fun = chain(rng, shape)
    view = followed(fun, shape)
    hypothesis.assume(view is not None)  # a reshape may have to copy: that leaf is materialised
    picked = fun(jnp.arange(math.prod(shape), dtype=jnp.float32).reshape(shape))
    np.testing.assert_array_equal(elements(view), np.asarray(picked, int))
    assert tuple(size for size, _ in view.axes) == picked.shape


def test_a_reshape_that_copies_has_no_view():
    assert followed(lambda x: lax.reshape(lax.transpose(x, (1, 0)), (6,)), (2, 3)) is None
    assert followed(lambda x: lax.reshape(lax.transpose(x, (1, 0)), (3, 2, 1)), (2, 3)) is not None
    assert followed(lambda x: x * 2.0, (2, 3)) is None


def test_a_step_of_a_loop_is_one_slice_of_the_leaf():
    flipped = followed(lambda x: lax.rev(lax.transpose(x, (1, 0)), (0,)), (2, 3))
    step = views.step_of(views.step_of(flipped, loop=4), loop=5)
    whole = np.arange(6).reshape(2, 3).T[::-1]
    np.testing.assert_array_equal(elements(step), whole.T)  # the inner loop leads
    assert step.loops == (5, 4) and step.axes == ()
    assert (step.loop_axis(4), step.loop_axis(5), step.loop_axis(6)) == ((3, -1), (2, 3), None)


AXES = st.lists(st.tuples(st.integers(1, 4), st.integers(-6, 6)), max_size=3)


@hypothesis.settings(max_examples=200)
@hypothesis.given(AXES, AXES, st.integers(0, 40), st.integers(0, 40))
def test_overlap_is_that_of_the_sets_of_elements(a, b, start, other):
    # An address below the leaf's first element is nobody's: both are moved up by as much.
    sets = []
    for offset, axes in ((start + 80, a), (other + 80, b)):
        places = {offset}
        for size, stride in axes:
            places = {place + k * stride for place in places for k in range(size)}
        sets.append(places)
    assert overlap((start + 80, a), (other + 80, b)) == bool(sets[0] & sets[1])


# What is compiled


def _matrix(rng, *shape):
    return jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5, jnp.float32)


def mlp(rng, size=16):
    def loss(p, x, y):
        return -jax.nn.log_softmax(jax.nn.relu(jax.nn.relu(x @ p[0]) @ p[1]) @ p[2])[y]

    params = [_matrix(rng, 40, 64), _matrix(rng, 64, 48), _matrix(rng, 48, 10)]
    return loss, params, (_matrix(rng, size, 40), jnp.asarray(rng.integers(10, size=size)))


def transformer(rng, size=16, d=32, t=3):
    def loss(p, tokens):
        x = p["table"][tokens[:-1]]
        for q, k, v, out, up, down in p["layers"]:
            h = jax.nn.standardize(x)
            x = x + jax.nn.softmax((h @ q) @ (h @ k).T) @ (h @ v) @ out
            x = x + jax.nn.gelu(jax.nn.standardize(x) @ up) @ down
        return -jnp.mean(jax.nn.log_softmax(x @ p["table"].T)[jnp.arange(t), tokens[1:]])

    shapes = [(d, d)] * 4 + [(d, 4 * d), (4 * d, d)]
    params = {"table": _matrix(rng, 40, d), "layers": [[_matrix(rng, *s) for s in shapes] for _ in range(1)]}
    return loss, params, (jnp.asarray(rng.integers(40, size=(size, t + 1))),)


def gru(rng, size=16, d=32, t=4):
    def loss(p, xs):
        def step(h, x):
            r, z = jnp.split(jax.nn.sigmoid(x @ p["gates_x"] + h @ p["gates_h"]), 2)
            return z * h + (1 - z) * jnp.tanh(x @ p["x"] + (r * h) @ p["h"]), None

        return jnp.sum(lax.scan(step, jnp.zeros(d), xs)[0] ** 2)

    params = {
        "gates_x": _matrix(rng, d, 2 * d), "gates_h": _matrix(rng, d, 2 * d),
        "x": _matrix(rng, d, d), "h": _matrix(rng, d, d),
    }  # fmt: skip
    return loss, params, (_matrix(rng, size, t, d),)


def embedding(rng, size=16):
    def loss(p, ix, y):
        return -jax.nn.log_softmax(jnp.mean(p["table"][ix], 0) @ p["head"])[y]

    params = {"table": _matrix(rng, 500, 16), "head": _matrix(rng, 16, 40)}
    batch = jnp.asarray(rng.integers(500, size=(size, 6))), jnp.asarray(rng.integers(40, size=size))
    return loss, params, batch


def norms_and_clipped_sum(loss, strategy):
    def both(params, *batch):
        grads = jgd.per_example_grad(loss, strategy=strategy)(params, *batch)
        return jgd.norms(grads), jgd.clipped_sum(grads, 1.0)

    return both


def largest_array(fun, *args):
    """The elements of the largest array in the compiled program."""
    text = jax.jit(fun).lower(*args).compile().as_text()
    shapes = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]*)\]", text)
    return max(math.prod(int(n) for n in shape.split(",") if n) for shape in shapes)


@pytest.mark.parametrize("model", [mlp, transformer, gru, embedding])
def test_no_program_holds_a_block_of_all_examples_gradients(model):
    loss, params, batch = model(np.random.default_rng(0))
    size = batch[0].shape[0]
    plan = form_of(jgd.per_example_grad(loss, strategy="factored")(params, *batch)).plan
    assert {part.method for part in plan.parts} == {"pairs"} and not plan.whole_leaves
    smallest = size * min(leaf.size for leaf in jax.tree.leaves(params))
    largest = max(leaf.size for leaf in jax.tree.leaves(params))
    assert smallest > largest  # or the parameters themselves would be taken for a block
    assert largest_array(norms_and_clipped_sum(loss, "factored"), params, *batch) < smallest
    # The measure sees a block where there is one.
    assert largest_array(norms_and_clipped_sum(loss, "materialized"), params, *batch) >= size * largest


def flops(fun, *args):
    return jax.jit(fun).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("model", [mlp, transformer, gru])
def test_several_reductions_share_one_forward_and_one_backward_pass(model):
    loss, params, batch = model(np.random.default_rng(0))
    questions = {
        "norms": jgd.norms,
        "clipped_sum": lambda grads: jgd.clipped_sum(grads, 1.0),
        "noise_scale": jgd.noise_scale,
    }
    ask = lambda names: (
        lambda params, *batch: [
            questions[name](jgd.per_example_grad(loss, strategy="factored")(params, *batch)) for name in names
        ]
    )
    apart = {name: flops(ask([name]), params, *batch) for name in questions}
    together = flops(ask(list(questions)), params, *batch)
    # Norms cost little but the pass. What the others add to it is a sum each, and that alone is added.
    added = sum(apart[name] - apart["norms"] for name in ("clipped_sum", "noise_scale"))
    assert together < 1.01 * (apart["norms"] + added)
    assert together < 0.75 * sum(apart.values())


# Numbers that JAX takes care to keep


def test_minus_zero_stays_minus_zero(x64):
    def loss(p, x):
        h = x * p["scale"] + p["shift"]
        return jnp.sum(jnp.where(jnp.signbit(h), 2.0 * h + 1.0, 3.0 * h + 5.0))

    params = {"scale": jnp.array([-1.0, 1.0]), "shift": jnp.array([-0.0, -0.0])}
    problem = made(loss, params, np.array([[0.0, -0.0], [1.0, -2.0], [-3.0, 0.0]]))
    grads = gradients(problem)
    np.testing.assert_array_equal(grads.values, jax.vmap(loss, (None, 0))(params, *problem.batch))
    np.testing.assert_array_equal(grads.values[0], 2.0)
    oracle.assert_close(jgd.materialize(grads), oracle.vmap_of_grad(problem), 1e-15)


def test_relu_has_no_slope_at_zero(x64):
    loss = lambda p, x: jnp.sum(jax.nn.relu(x @ p["w"] + p["b"]))
    problem = made(loss, {"w": np.ones((2, 3)), "b": np.zeros(3)}, np.array([[1.0, -1.0], [0.0, 0.0]]))
    grads = gradients(problem)
    for reduced in (jgd.materialize(grads), jgd.norms(grads), jgd.sum(grads), jgd.gram(grads)):
        assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(reduced))


@pytest.mark.parametrize("inside", ["plain", "scan", "checkpoint", "cond"])
def test_a_custom_vjp_whose_backward_is_not_linear(inside, x64):
    def loss(p, x):
        if inside == "scan":
            return jnp.sum(jnp.sin(lax.scan(lambda h, x: (cubed(h + x, p), None), x[0], x)[0]))
        body = lambda x: cubed(jnp.sin(x), p)
        if inside == "checkpoint":
            body = jax.checkpoint(body)
        if inside == "cond":
            return jnp.sum(jnp.sin(lax.cond(x[0, 0] > 0, body, lambda x: x * p, x)))
        return jnp.sum(jnp.sin(body(x)) * jnp.arange(1.0, 4))

    draw = Draw(3)
    problem = made(loss, draw(3), draw(B, 2, 3))
    blocks = oracle.vmap_of_grad(problem)
    arguments = {"weights": WEIGHTS, "max_norm": 0.5, "direction": draw(3)}
    want = oracle.answers(blocks, blocks, **arguments)
    for quantity, got in jax.jit(every_reduction)(gradients(problem), arguments).items():
        oracle.assert_close(got, want[quantity], 1e-9, what=quantity)


# Branches: one that was not taken has no part, whatever its derivative would be


def singular(p, x):
    """Fine above 0 alone."""
    return jnp.sum(p["opaque"] / x + jnp.log(x) ** p["power"] + jnp.sqrt(x) * p["power"])


def in_a_cond(p, x):
    return lax.cond(jnp.all(x > 1), lambda x: singular(p, x), lambda x: jnp.sum(jnp.sin(x * p["opaque"])), x)


def in_a_scan(p, x):
    step = lambda h, x: (h + in_a_cond(p, x[None]), None)
    return lax.scan(step, 0.0, x)[0]


def of_missing_data(p, x):
    """An example may hold nan, which its branch does not look at."""
    known = lambda x: jnp.sum(jnp.tanh(x @ p["matrix"])) + jnp.sum(x * p["opaque"])
    return lax.cond(jnp.all(x > 1), known, lambda x: jnp.sum(jnp.sin(p["opaque"])), x)


@pytest.mark.parametrize("loss", [in_a_cond, in_a_scan, of_missing_data])
def test_a_branch_not_taken_has_no_part(loss, x64):
    params = {"opaque": np.array([0.7]), "power": np.array([2.5]), "matrix": np.ones((3, 2))}
    x = np.array([[1.5, 2.0, 3.0], [-1.0, -2.0, 0.0], [2.0, 0.0, 1.5], [np.nan, 1.0, 1.0], [4.0, 1.1, 1.2]])
    problem = made(loss, params, x if loss is of_missing_data else np.nan_to_num(x))
    blocks = oracle.vmap_of_grad(problem)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(blocks))
    arguments = {"weights": WEIGHTS, "max_norm": 1.0, "direction": jax.tree.map(np.ones_like, params)}
    want = oracle.answers(blocks, blocks, **arguments)
    for quantity, got in jax.jit(every_reduction)(gradients(problem), arguments).items():
        oracle.assert_close(got, want[quantity], 1e-9, what=quantity)


# The second call


def test_the_second_call_compiles_nothing(x64):
    calls = []

    def loss(p, x):
        calls.append(None)
        return jnp.sum(jnp.sin(x @ p))

    draw = Draw(0)
    params, batch = jnp.asarray(draw(4, 3)), [jnp.asarray(draw(B, 2, 4)) for _ in range(2)]
    weights = jnp.asarray(WEIGHTS)

    def ask(x):
        grads = jgd.per_example_grad(loss, strategy="factored")(params, x)
        return (
            jgd.norms(grads), jgd.clipped_sum(grads, 1.0), jgd.gram(grads), jgd.sum(grads, weights),
            jgd.dot(grads, params), jgd.variance(grads), jgd.noise_scale(grads),
        )  # fmt: skip

    first = ask(batch[0])
    with compilations() as made:
        ask(batch[1])
        again = ask(batch[0])
    assert not made and len(calls) == 3
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("options", [{}, {"max_memory": 1 << 20}])
def test_what_a_loss_closes_over_goes_with_it(options):
    def asked():
        closed = jnp.ones((3, 3))
        loss = lambda w, x: jnp.sum(jnp.tanh(x @ w @ closed))
        gradients = jgd.per_example_grad(loss, strategy="factored", **options)
        jgd.norms(gradients(jnp.ones((4, 3)), jnp.ones((B, 4))))
        return weakref.ref(closed)

    found = asked()
    gc.collect()
    assert found() is None
