"""Examples taken some at a time: tiles of every size, and rows one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import B, Draw
from internals import DEVICES, batch_sums, form_of, lookups, rules_of, tiles
from jax import lax
from rule_problems import WEIGHTS, cubed, every_reduction, gradients, looked_up, made, tied

import jgd


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


def tiled_answers(monkeypatch, tile=None, elements=None):
    if elements is not None:
        monkeypatch.setattr(tiles, "TILE", elements)
        monkeypatch.setitem(DEVICES, "cpu", DEVICES["cpu"]._replace(tile=elements))
    if tile is not None:
        monkeypatch.setattr(tiles, "tile_of", lambda size, elements, room=None: min(tile, size))
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


@pytest.mark.sample(lambda tile: tile == 3)
@pytest.mark.parametrize("tile", [1, 2, 3, 4])
def test_tiles_of_every_number_of_examples(tile, monkeypatch, forget, x64):
    plan = tiled_answers(monkeypatch, tile=tile)
    assert rules_of(plan) == {"DotGeneral", "Convolution", "Lookup", "Product"}
    assert len(plan.factored) == 4 and len(plan.computed) == 1 and len(plan.dense) == 1


@pytest.mark.sample(lambda tile: tile == 2)
@pytest.mark.parametrize("tile", [1, 2, 5])
def test_rows_one_by_one(tile, monkeypatch, forget, x64):
    """As `batch_sums.sum_present` takes few and long ones."""
    monkeypatch.setattr(batch_sums, "_LONG", 1)
    tiled_answers(monkeypatch, tile=tile)


@pytest.mark.parametrize("fun", [None, lambda x: jnp.square(x - 3)])
def test_rows_one_by_one_have_the_same_derivative(fun, monkeypatch, forget, x64):
    rows, weights = jnp.asarray(Draw(0)(B, 2, 3)).at[1].set(np.nan), jnp.asarray(WEIGHTS)
    total = lambda rows, weights: batch_sums.sum_present(rows, weights, fun, one_device=True)
    made = []
    for long in (1, 1000):
        monkeypatch.setattr(batch_sums, "_LONG", long)
        assert batch_sums.unrolls_rows(rows) == (long == 1)
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


@pytest.mark.sample(lambda elements: False)
@pytest.mark.parametrize("elements", [1, 40, 100])
def test_tiles_of_every_number_of_elements(elements, monkeypatch, forget, x64):
    tiled_answers(monkeypatch, elements=elements)


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
