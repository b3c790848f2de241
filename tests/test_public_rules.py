"""Rules that are registered from outside: they take part in everything, and are gone once they are removed."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import B, Draw
from internals import form_of
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from meshes import mesh_of
from rule_problems import WEIGHTS, every_reduction, gradients, made

import jgd
import jgd.rules

ROOT = Path(__file__).parents[1]
P = lax.dynamic_update_slice_p
CODE = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.DOTALL | re.MULTILINE
)


@pytest.fixture
def update():
    """The rule of CONTRIBUTING, registered by its own last line."""
    names: dict = {"__name__": "contributed"}
    exec(compile(CODE[0], "contributing.py", "exec"), names)
    yield names["Update"]
    jgd.rules.unregister(P)


def pasted(p, x, i):
    """A parameter that is written into data, beside one that is multiplied."""
    return jnp.sum(jnp.sin(lax.dynamic_update_slice(x @ p["w"], p["patch"], (i, i))) ** 2)


def pasted_in_a_scan(p, x, i):
    """One that every step writes, and one of each step's own."""

    def step(h, own):
        h = lax.dynamic_update_slice(jnp.tanh(h @ p["w"]), p["patch"], (i, i))
        return lax.dynamic_update_slice(h, jnp.broadcast_to(own, (2, 3)), (i, i // 2)), None

    h, _ = lax.scan(step, x @ p["w"], p["steps"])
    return jnp.sum(jnp.sin(h))


def problem_of(loss):
    draw = Draw(3)
    params = {"w": draw(6, 6), "patch": draw(2, 3), "steps": draw(4, 1, 3)}
    if loss is pasted:
        del params["steps"]
    return made(loss, params, draw(B, 5, 6), draw.integers(4, B))


def answers(problem):
    blocks = oracle.vmap_of_grad(problem)
    direction = jax.tree.map(np.cos, problem.params)
    arguments = {"weights": WEIGHTS, "max_norm": 1.0, "direction": direction}
    got = jax.jit(lambda grads: every_reduction(grads, arguments))(gradients(problem))
    return got, oracle.answers(blocks, blocks, **arguments)


@pytest.mark.parametrize("loss", [pasted, pasted_in_a_scan])
def test_it_takes_part_in_every_reduction(loss, update, x64):
    problem = problem_of(loss)
    plan = form_of(gradients(problem)).plan
    rules = [rule for part in plan.parts for rule in part.rules.rules]
    assert sum(isinstance(rule, update) for rule in rules) == len(problem.params) - 1
    assert not plan.dense and not plan.computed
    got, want = answers(problem)
    for quantity, answer in got.items():
        oracle.assert_close(answer, want[quantity], 1e-9, what=quantity)


def test_it_takes_part_in_microbatches(update, x64):
    problem = problem_of(pasted)
    make = jgd.per_example_grad(problem.loss, strategy="factored", microbatch_size=2)
    blocks = oracle.vmap_of_grad(problem)
    norms = np.linalg.norm(oracle.matrix(blocks), axis=1)
    np.testing.assert_allclose(jgd.norms(make(problem.params, *problem.batch)), norms, rtol=1e-9)


def test_it_takes_part_over_several_devices(update, x64):
    problem, mesh = problem_of(pasted), mesh_of(5)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    batch = tuple(jax.device_put(x, rows) for x in problem.batch)
    grads = jgd.per_example_grad(problem.loss, strategy="factored")(problem.params, *batch)
    blocks = oracle.vmap_of_grad(problem)
    want = oracle.answers(blocks, blocks, WEIGHTS, 1.0, problem.params)
    oracle.assert_close(jgd.norms(grads), want["norms"], 1e-9)
    oracle.assert_close(jgd.clipped_sum(grads, 1.0, weights=WEIGHTS), want["weighted_clipped_sum"], 1e-9)


def test_it_is_explained(update, x64):
    problem = problem_of(pasted)
    rows = jgd.explain(problem.loss, problem.params, *problem.batch).rows
    (row,) = [row for row in rows if row.primitive == P.name]
    assert (row.leaf, row.n, row.rule) == ("['patch']", 6, "block")


def test_without_it_the_leaf_is_dense_before_and_after(x64):
    """What was traced and planned with other rules does not serve again."""
    problem = problem_of(pasted)
    dense = lambda: form_of(gradients(problem)).plan.dense
    assert dense() == {0}
    names: dict = {"__name__": "contributed"}
    exec(compile(CODE[0], "contributing.py", "exec"), names)
    assert not dense()
    jgd.rules.unregister(P)
    assert dense() == {0}


def test_a_rule_in_the_place_of_a_built_in_one(x64):
    """One that is wrong on purpose shows that it is the one that is asked."""

    @dataclasses.dataclass(frozen=True)
    class Twice(jgd.rules.OperandRule):
        def at_step(self, data):
            return 2 * data.cotangent

    loss = lambda p, x: jnp.sum(jnp.sin(x + p))
    problem = made(loss, Draw(0)(3), Draw(1)(B, 3))
    want = jgd.norms(gradients(problem))
    jgd.rules.register(lax.add_p, lambda site, position, view: Twice.of(site, view))
    try:
        np.testing.assert_allclose(jgd.norms(gradients(problem)), 2 * want)
    finally:
        jgd.rules.unregister(lax.add_p)
    np.testing.assert_allclose(jgd.norms(gradients(problem)), want)


def test_what_is_wrong_is_said(x64):
    with pytest.raises(TypeError, match=r"`primitive` must be a JAX primitive such as .*, got 'add'"):
        jgd.rules.register("add", lambda site, position, view: None)
    with pytest.raises(TypeError, match="`match` must be a function"):
        jgd.rules.register(P, None)
    with pytest.raises(KeyError, match="no rule was registered for the primitive dynamic_update_slice"):
        jgd.rules.unregister(P)

    @dataclasses.dataclass(frozen=True)
    class Holding(jgd.rules.OperandRule):
        sizes: list

        def at_step(self, data):
            return data.cotangent

    jgd.rules.register(P, lambda site, position, view: Holding.of(site, view, sizes=[1]))
    try:
        with pytest.raises(TypeError, match="must be hashable: make it a frozen dataclass without arrays"):
            gradients(problem_of(pasted))
    finally:
        jgd.rules.unregister(P)


def test_the_case_of_the_contributors_page_is_one(update, x64):
    from cases.dense import squared

    names: dict = {"case": lambda build: build, "squared": squared, "B": B, "jax": jax}
    exec(compile(CODE[1], "case.py", "exec"), names)
    problem = made(
        *(lambda loss, params, batch: (loss, params, *batch))(*names["written_into_data"](Draw(0)))
    )
    got, want = answers(problem)
    for quantity, answer in got.items():
        oracle.assert_close(answer, want[quantity], 1e-9, what=quantity)
