"""`jgd.explain`: that what it says of a plan is so."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from internals import build
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of

import jgd


def explained(name, small=True):
    model = build(name, small=small)
    shapes = jax.eval_shape(lambda: (model.params, model.batch))
    return jgd.explain(model.loss, shapes[0], *shapes[1], in_axes=model.in_axes), model


def by_leaf(explanation):
    return {row.leaf: row for row in explanation.rows}


def test_the_rows_of_an_mlp():
    explanation, model = explained("mlp", small=False)
    weights = [row for row in explanation.rows if row.primitive == "dot_general"]
    assert [(row.n, row.t, row.p, row.q) for row in weights] == [
        (1, 1, 784, 1024),
        (1, 1, 1024, 1024),
        (1, 1, 1024, 10),
    ]
    assert {row.rule for row in weights} == {"norms"}
    assert [row.flops for row in weights] == [2 * (p + q) for p, q in ((784, 1024), (1024, 1024), (1024, 10))]
    assert explanation.parameters == model.num_params and explanation.examples == 128
    assert explanation.strategy == "factored" and explanation.norms < 0.7 < explanation.clipped_sum < 1.1


def test_the_tied_transformer_reads_like_an_account():
    explanation, model = explained("gpt")
    embedding = [row for row in explanation.rows if row.leaf == "['embedding']"]
    assert [(row.primitive, row.uses) for row in embedding] == [("gather", 2), ("dot_general", 2)]
    assert all("2 uses add up before the square" in row.why for row in embedding)
    layers = model.params["layers"]["qkv"]["w"].shape
    row = by_leaf(explanation)["['layers']['qkv']['w']"]
    assert (row.n, row.p, row.q) == layers  # the stacked layers are block axes
    assert "the backward pass takes their square as it goes" in row.why
    paths = {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(model.params)}
    assert {row.leaf for row in explanation.rows} == paths
    lines = str(explanation).splitlines()
    assert len(lines) == len(explanation.rows) + 4 and all(
        row.why in str(explanation) for row in explanation.rows
    )


def test_the_rule_is_the_cheaper_one():
    loss = lambda w, x: jnp.sum(jnp.tanh(x @ w))
    for positions, rule in ((1, "norms"), (4, "pairs"), (400, "block")):
        (row,) = jgd.explain(loss, jnp.ones((64, 64)), jnp.ones((300, positions, 64))).rows
        assert (row.t, row.rule) == (positions, rule)


def test_leaves_that_never_meet_data_and_leaves_behind_a_computed_path():
    def loss(params, x):
        return jnp.sum((x @ (params["w"] / jnp.linalg.norm(params["w"]))) ** 2) + 0.0 * jnp.sum(
            params["unused"]
        )

    params = {"w": jnp.ones((8, 8)), "unused": jnp.ones(3), "never": jnp.ones(2)}
    rows = by_leaf(jgd.explain(loss, params, jnp.ones((5, 8))))
    assert rows["['w']"].rule == "whole leaf" and "carried back" in rows["['w']"].why
    assert rows["['never']"].rule == "none" and "its gradient is 0" in rows["['never']"].why


@pytest.mark.parametrize(("spec", "rows"), [(P(), 64), (P("model"), 32)])
def test_what_each_device_holds_and_sends(spec, rows):
    mesh = mesh_of(4, 2)
    w = jax.device_put(jnp.ones((64, 32)), NamedSharding(mesh, spec))
    x = jax.device_put(jnp.ones((16, 64)), NamedSharding(mesh, P("data")))
    explanation = jgd.explain(lambda w, x: jnp.sum(jnp.tanh(x @ w)), w, x)
    share = explanation.share
    assert (share.devices, share.examples) == (4, 4)
    assert share.parameter_bytes == share.sum_bytes == rows * 32 * 4
    # Of each example the products' δ; the other factor is the example itself, and tanh keeps nothing for the site.
    assert share.factor_bytes == 4 * 32 * 4
    assert share.norm_bytes == (0 if rows == 64 else 4 * 4)
    assert "4 devices share the examples. Each holds 4 of them" in str(explanation)


def test_on_one_device_nothing_is_shared():
    explanation = jgd.explain(
        lambda w, x: jnp.sum(x @ w), np.ones((3, 2), np.float32), np.ones((4, 3), np.float32)
    )
    assert explanation.share is None and "devices" not in str(explanation)
    assert math.isfinite(explanation.norms)
