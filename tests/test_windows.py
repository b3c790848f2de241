"""Windows: rows that follow each other, looked up by `dynamic_slice` and `gather`, anywhere and beyond the ends."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import B, Draw, Problem
from internals import form_of, rules_of
from jax import lax
from jax.lax import GatherDimensionNumbers, GatherScatterMode
from questions import check_asked, wave

import jgd
from jgd._engine import factors


def windows_of(mode, sizes=(3, 4), collapsed=()):
    """Gathers windows of a matrix at `(row, column)`, several an example."""
    kept = tuple(d for d in (0, 1) if d not in collapsed)
    numbers = GatherDimensionNumbers(tuple(range(1, 1 + len(kept))), collapsed, (0, 1))
    return lambda p, at: wave(lax.gather(p, at, numbers, sizes, mode=mode))


def stepping(p, starts):
    """Each step slices a layer of its own, and one that all steps share."""

    def step(total, layer):
        own, start = layer
        return total + wave(
            lax.dynamic_slice_in_dim(own, start, 2) * lax.dynamic_slice_in_dim(p["all"], start, 2)
        ), None

    return lax.scan(step, 0.0, (p["each"], starts))[0]


STARTS = np.array([-9, 0, 3, 6, 40])
PLACES = np.stack([np.stack([STARTS, STARTS[::-1] - 2], 1), np.stack([STARTS // 2, STARTS + 1], 1)], 1)
LAYERS = np.array([[0, 1, 2], [2, 1, 0], [-3, 5, 9], [1, 1, 1], [4, 0, 4]])
CASES = {
    "rows": (lambda p, s: wave(lax.dynamic_slice_in_dim(p, s, 3)), (9, 4), STARTS),
    "columns": (lambda p, s: wave(lax.dynamic_slice_in_dim(p, s, 3, axis=1)), (4, 9), STARTS),
    "a_patch": (lambda p, at: wave(lax.dynamic_slice(p, at, (3, 2))), (7, 9), PLACES[:, 0]),
    "a_patch_of_channels": (
        lambda p, at: wave(lax.dynamic_slice(p, (*at, 0), (3, 2, 5))),
        (7, 9, 5),
        PLACES[:, 0],
    ),
    "a_window_and_a_row": (lambda p, at: wave(lax.dynamic_slice(p, at, (1, 3))), (7, 9), PLACES[:, 0]),
    "all_but_one": (lambda p, s: wave(lax.dynamic_slice_in_dim(p, s, 8)), (9, 2), STARTS),
    "of_a_transpose": (lambda p, s: wave(lax.dynamic_slice_in_dim(p.T, s, 3)), (4, 9), STARTS),
    "of_a_row": (lambda p, s: wave(lax.dynamic_slice_in_dim(p[1], s, 3)), (3, 9), STARTS),
    "flat": (lambda p, s: wave(lax.dynamic_slice_in_dim(p.reshape(-1), s, 7)), (6, 5), STARTS),
    "several": (
        lambda p, at: wave(jax.vmap(lambda s: lax.dynamic_slice_in_dim(p, s, 3))(at[:, 0])),
        (9, 4),
        PLACES,
    ),
    "overlapping": (
        lambda p, at: wave(jax.vmap(lambda s: lax.dynamic_slice(p, s, (2, 3)))(at)),
        (5, 6),
        PLACES,
    ),
    "clamped": (windows_of(GatherScatterMode.CLIP), (7, 9), PLACES),
    "dropped": (windows_of(GatherScatterMode.FILL_OR_DROP), (7, 9), PLACES),
    "collapsed": (windows_of(GatherScatterMode.CLIP, (1, 4), (0,)), (7, 9), PLACES),
    "narrow_starts": (lambda p, s: wave(lax.dynamic_slice_in_dim(p, s, 3)), (300, 2), STARTS.astype(np.int8)),
    "in_a_scan": (stepping, {"each": (3, 6, 2), "all": (5, 2)}, LAYERS),
    "tied": (lambda p, s: wave(lax.dynamic_slice_in_dim(p, s, 3)) + wave(p @ jnp.cos(p[0])), (9, 4), STARTS),
}


def of(case):
    loss, shapes, batch = CASES[case]
    draw = Draw(1)
    params = jax.tree.map(
        lambda shape: jnp.asarray(draw(*shape)), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    return Problem(loss, params, (jnp.asarray(batch),))


@pytest.mark.sample(lambda case, microbatch_size: microbatch_size is None)
@pytest.mark.parametrize("microbatch_size", [None, 2])
@pytest.mark.parametrize("case", CASES)
def test_windows(case, microbatch_size, x64):
    check_asked(of(case), microbatch_size)


@pytest.mark.parametrize("case", [case for case in CASES if case != "tied"])
def test_they_are_lookups(case):
    problem = of(case)
    grads = jgd.per_example_grad(problem.loss, strategy="factored")(problem.params, *problem.batch)
    assert rules_of(form_of(grads).plan) == {"Lookup"}


@pytest.mark.parametrize("reduction", [jgd.norms, jgd.second_moment, jgd.variance, jgd.gram])
def test_many_lookups_are_sorted(reduction, monkeypatch, x64):
    """So many that not each pair is compared; ids out of bounds among them."""
    ids = jnp.asarray(Draw(2).integers(9, B * 12).reshape(B, 12))
    loss = lambda p, ids: wave(
        jnp.where(ids[:, None] < 7, jnp.take(p, ids, axis=0, mode="fill", fill_value=0), 0)
    )
    params = jnp.asarray(Draw(3)(7, 3))
    ask = lambda: reduction(jgd.per_example_grad(lambda *args: loss(*args), strategy="factored")(params, ids))
    pairs = ask()
    monkeypatch.setattr(factors, "_PAIRED", 4)
    jax.clear_caches()
    oracle.assert_close(ask(), np.asarray(pairs), 1e-12, what="sorted")


def test_the_memory_of_a_window_is_the_windows():
    """Nothing of the size of the table is made for each example."""
    table, starts = jnp.ones((20_000, 64)), jnp.arange(B)
    loss = lambda p, s, x: jnp.sum(jnp.tanh(lax.dynamic_slice_in_dim(p, s, 16) * x))
    norms = jax.jit(lambda *args: jgd.norms(jgd.per_example_grad(loss)(*args)))
    compiled = norms.lower(table, starts, jnp.ones((B, 16, 64))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < table.nbytes / 4
