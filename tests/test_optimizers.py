"""Every optimizer that optax exports steps down and up, and each is told what it takes."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import jgd

PARAMS = {"a": jnp.ones(3), "b": jnp.ones((2, 3))}
BATCH = jnp.linspace(-1, 1, 24).reshape(8, 3), jnp.linspace(0, 1, 8)

# What needs more than a number for each of its arguments, is no optimizer by itself, or takes other gradients.
ARGUMENTS = {
    "conditionally_mask": (optax.sgd(0.1), lambda step: step > 0),
    "conditionally_transform": (optax.sgd(0.1), lambda step: step > 0),
    "measure_with_ema": None,  # measures what another transformation holds
    "ema": (0.9,),
    "scale_by_schedule": (lambda step: 0.1,),
    "snapshot": ("norm", optax.tree.norm),
    "stateless": (lambda updates, params: updates,),
    "stateless_with_tree_map": (lambda update, param: update,),
    "sam": (optax.sgd(0.1), optax.sgd(0.01)),
    "scale_by_muon": None,  # asks for a tree of specifications
    "lookahead": None,  # has parameters of a kind of its own
    "dpsgd": None,  # and what it is made of: gradients of each example as arrays
    "differentially_private_aggregate": None,
}


def loss(w, x, y):
    return 0.5 * (x @ w["a"] + jnp.sum(w["b"] ** 2) - y) ** 2


def made(module, name):
    """The transformation with the simplest arguments; None for what is none."""
    fun = getattr(module, name)
    if name.startswith("_") or not callable(fun) or inspect.isclass(fun):
        return None
    if name in ARGUMENTS:
        return ARGUMENTS[name] and fun(*ARGUMENTS[name])
    try:
        required = [
            one for one in inspect.signature(fun).parameters.values()
            if one.default is one.empty and one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
        ]  # fmt: skip
        inner = ("opt", "base", "inner")
        of = lambda name: (
            optax.sgd(0.01) if any(part in name for part in inner) else 0.01 if "rate" in name else 1
        )
        found = fun(*[of(one.name) for one in required])
    except Exception:  # what is no transformation may ask for anything
        return None
    return found if hasattr(found, "init") and hasattr(found, "update") else None


NAMES = [
    pytest.param(module, name, id=f"{module.__name__}.{name}")
    for module in (optax, optax.contrib)
    for name in sorted(dir(module))
    if made(module, name) is not None
]


def test_there_are_many():
    assert len(NAMES) > 80


@pytest.mark.sample(
    lambda module, name: name in ("adam", "sam", "sophia", "lbfgs", "scale_by_zoom_linesearch")
)
@pytest.mark.parametrize(("module", "name"), NAMES)
def test_an_optimizer_takes_what_it_is_told(module, name):
    for kind in (jgd.descent, jgd.ascent):
        method = kind(loss, made(module, name))
        state = method.init(PARAMS)
        for _ in range(2):
            state, info = method.step(state, *BATCH)
        assert np.isfinite(info.value) and int(state.step) == 2


@pytest.mark.parametrize("kind", [jgd.descent, jgd.ascent])
def test_sam_sees_the_gradient_that_reduce_makes(kind):
    """At the point that its own step leads to: of clipped sums, clipped sums."""
    adversary = optax.sgd(0.05)
    clip = lambda grads: jgd.clipped_sum(grads, 0.5)
    sam = optax.contrib.sam(optax.sgd(0.1), adversary, opaque_mode=True)
    method = kind(loss, sam, reduce=clip)
    state, _ = method.step(method.init(PARAMS), *BATCH)
    sign = 1 if kind is jgd.descent else -1
    gradient = lambda p: jax.tree.map(lambda g: sign * g, clip(jgd.per_example_grad(loss)(p, *BATCH)))
    beside = jax.tree.map(lambda p, g: p + 0.05 * g, PARAMS, gradient(PARAMS))
    want = jax.tree.map(lambda p, g: p - 0.1 * g, PARAMS, gradient(beside))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state.params, want)


def test_two_players_with_sam():
    game = lambda p, x: p[0] ** 2 * x + p[0] * p[1] - p[1] ** 2 * x
    sam = lambda: optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05), opaque_mode=True)
    method = jgd.descent_ascent(game, sam(), sam())
    state, _ = method.step(method.init((jnp.ones(()), jnp.ones(()))), jnp.ones(4))
    # The slopes at (1, 1) are 3 and -1. Each looks where it is worst for itself: at (1.15, 1) and (1, 1.05).
    np.testing.assert_allclose(state.params, (1 - 0.1 * 3.3, 1 + 0.1 * -1.1), rtol=1e-5)
