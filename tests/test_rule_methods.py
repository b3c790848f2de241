"""Each rule by each of its methods, which of them the planner takes, and parts that are alike."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import B, Draw
from internals import PartRules, batch_sums, forced, form_of, rules_of
from rule_problems import (
    WEIGHTS,
    both_ways,
    convolved,
    dense,
    depthwise,
    every_reduction,
    gradients,
    in_groups,
    looked_up,
    made,
    parameter_first,
    recurrent,
    several_contracted,
    stacked,
    tied,
)

import jgd

RULED = {
    "DotGeneral": (dense, parameter_first, in_groups, several_contracted, both_ways, recurrent, stacked),
    "Convolution": (
        functools.partial(convolved, 1, 1),
        functools.partial(convolved, 2, 1),
        functools.partial(convolved, 2, 2),
        depthwise,
    ),
    "Lookup": (looked_up, tied),
}


FORCED = [(rule, build) for rule, builds in RULED.items() for build in builds]


def named(value):
    if isinstance(value, functools.partial):
        return "convolved_in_{}_groups_{}d".format(*value.args)
    return getattr(value, "__name__", None)


@pytest.mark.sample(lambda rule, build, t: t == (1, 7)[FORCED.index((rule, build)) % 2])
@pytest.mark.parametrize("t", [1, 2, 7])
@pytest.mark.parametrize(("rule", "build"), FORCED, ids=named)
def test_each_method_of_each_rule(rule, build, t, x64):
    problem = build(Draw(t), t)
    grads, blocks = gradients(problem), oracle.vmap_of_grad(problem)
    plan = form_of(grads).plan
    (part,) = plan.parts
    assert rule in rules_of(plan) and part.rules.has_pairs and plan.factored == (0,)
    norms = oracle.answers(blocks, blocks, WEIGHTS, 1.0, problem.params)["norms"]
    for method in ("pairs", "block"):
        held = forced(grads, method)
        oracle.assert_close(jgd.norms(held), norms, 1e-9, what=method)
        clipped = oracle.answers(blocks, blocks, WEIGHTS, 0.7 * norms.mean(), problem.params)["clipped_sum"]
        oracle.assert_close(jgd.clipped_sum(held, 0.7 * norms.mean()), clipped, 1e-9, what=method)
    oracle.assert_close(jgd.gram(grads), oracle.matrix(blocks) @ oracle.matrix(blocks).T, 1e-9)


def test_the_planner_takes_either_method(x64):
    """Pairs where there are few positions, the block where there are many."""
    methods = [gradients(dense(Draw(0), t))._form.plan.parts[0].rules.method for t in (1, 40)]
    assert methods == ["pairs", "block"]


@pytest.mark.parametrize("weights", [np.ones(B), WEIGHTS])
@pytest.mark.parametrize("broken", [None, 1, 3])
@pytest.mark.parametrize("long", [1, 1000])
def test_blocks_that_were_kept_for_the_clipped_sum(long, broken, weights, monkeypatch, forget, x64):
    """Of an example without weight, or without a finite norm, nothing is left in the sum."""
    monkeypatch.setattr(batch_sums, "_LONG", long)
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
    for name in ("norm", "norm_of_pairs", "native"):
        of_part = getattr(PartRules, name)
        count = lambda part, data, of_part=of_part, name=name: (traced.append(name), of_part(part, data))[1]
        monkeypatch.setattr(PartRules, name, count)
    grads = gradients(problem)
    each = {part.rules for part in form_of(grads).plan.parts}
    assert len(each) == kinds
    blocks = oracle.vmap_of_grad(problem)
    arguments = {"weights": WEIGHTS, "max_norm": 1.0, "direction": problem.params}
    want = oracle.answers(blocks, blocks, **arguments)
    oracle.assert_close(jgd.norms(grads), want["norms"], 1e-9)
    oracle.assert_close(jgd.second_moment(grads), want["second_moment"], 1e-9)
    by_blocks = sum(rules.method == "block" for rules in each)  # whose square is taken of what is native
    assert traced.count("norm") == by_blocks and traced.count("norm_of_pairs") == kinds - by_blocks
    assert traced.count("native") == kinds
    for quantity, got in jax.jit(every_reduction)(grads, arguments).items():
        oracle.assert_close(got, want[quantity], 1e-9, what=quantity)
