"""What the backward pass of a scan over layers makes of its steps, and what stays of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import B, Draw
from internals import FactoredGradients, Variant, form_of, pass_over, plan_of
from jax import lax
from rule_problems import WEIGHTS, gradients, made

import jgd


@pytest.mark.sample(lambda method, checkpointed: (method == "block") == checkpointed)
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
    form = gradients(problem)._form
    plan = plan_of(form.plan.program, Variant(keeps=False))
    forced = {
        key: tuple(
            dataclasses.replace(probe, rules=dataclasses.replace(probe.rules, method=method))
            for probe in some
        )
        for key, some in plan.probes.items()
    }
    probed = {plan.program.param_paths[probe.of.leaf] for some in plan.probes.values() for probe in some}
    assert probed == {"['layers']['w']", "['layers']['v']", "['layers']['skip']"}
    plan = dataclasses.replace(plan, probes=forced)
    *_, residuals, sums = pass_over(plan, form.model, form.residuals.inputs, fuse=True, together=True)
    assert {len(residuals.squares), *map(len, sums[:5])} == {3} and not sums.norms
    leaves = tuple((leaf,) for leaf in range(len(form.leaf_structs)))
    norms = [norm.length for norm in FactoredGradients(form.model, residuals, plan).norms(leaves)]
    blocks = jax.tree.leaves(oracle.vmap_of_grad(problem))
    want = [np.linalg.norm(np.reshape(x, (B, -1)), axis=1) for x in blocks]
    oracle.assert_close(norms, want, 1e-9)
    whole = [np.sum(x, axis=0) for x in blocks]
    held = FactoredGradients(form.model, residuals, plan, reductions=sums)
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
    twice = dataclasses.replace(held, reductions=jax.tree.map(lambda x: 2 * x, sums))
    doubled = lambda leaves: [(2 if leaf in plan.summed else 1) * x for leaf, x in enumerate(leaves)]
    oracle.assert_close(twice.weighted_sum(None), doubled(whole), 1e-9)
    oracle.assert_close(twice.second_moments(None), doubled(seconds), 1e-9)
    oracle.assert_close(twice.spreads(None), doubled(spreads), 1e-9)
    oracle.assert_close(twice.self_gram(), held.self_gram() + sums.gram, 1e-9)
    deviation = sum(B * np.var(x, axis=0).sum() for x in blocks)
    oracle.assert_close(held.deviation_and_squared_sum()[0], deviation, 1e-9)
    more = sum(sums.squares.values())
    oracle.assert_close(twice.squared_sum(), held.squared_sum() + more, 1e-9)
    # With weights they are of no use.
    for ask in (FactoredGradients.weighted_sum, FactoredGradients.second_moments, FactoredGradients.spreads):
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
    assert form_of(grads).plan.kept == {0, 1} and not form_of(grads).residuals.squares
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
