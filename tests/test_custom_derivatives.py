"""Derivatives of a user's own: rules that are not linear, or that ask what is differentiated, at every place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.custom_derivatives import SymbolicZero

import jgd

pytestmark = pytest.mark.usefixtures("x64")

B, STEPS, WIDTH = 3, 4, 3


def by_cotangent(rule):
    """The identity, whose cotangent goes through `rule`."""
    f = jax.custom_vjp(lambda z: z)
    f.defvjp(lambda z: (z, None), lambda _, g: (rule(g),))
    return f


@jax.custom_jvp
def counts(a, b):
    """A product whose derivative is multiplied by how many factors are differentiated."""
    return a * b


@functools.partial(counts.defjvp, symbolic_zeros=True)
def _counts_jvp(primals, tangents):
    (a, b), moves = primals, [not isinstance(t, SymbolicZero) for t in tangents]
    ta, tb = (t if m else jnp.zeros_like(x) for t, m, x in zip(tangents, moves, primals, strict=True))
    return a * b, (ta * b + a * tb) * (1 + sum(moves))


@jax.custom_vjp
def counts_backwards(a, b):
    """The same by a cotangent's rule."""
    return a * b


def _counts_forward(a, b):
    return a.value * b.value, (a.value, b.value, jnp.asarray(1.0 + a.perturbed + b.perturbed))


def _counts_backward(kept, g):
    a, b, number = kept
    return (g * b * number).astype(a.dtype), (g * a * number).astype(b.dtype)


counts_backwards.defvjp(_counts_forward, _counts_backward, symbolic_zeros=True)


@jax.custom_jvp
def stops_what_does_not_move(out, given):
    """`out`, whose derivative is dropped where nothing that it was made of is differentiated."""
    return out


@functools.partial(stops_what_does_not_move.defjvp, symbolic_zeros=True)
def _stops_jvp(primals, tangents):
    (out, _), (t, given) = primals, tangents
    dropped = isinstance(given, SymbolicZero) or isinstance(t, SymbolicZero)
    return out, jnp.zeros_like(out) if dropped else t


doubles = jax.custom_vjp(lambda z: z)
doubles.defvjp(lambda z: (2 * z, z), lambda z, g: (g * z,))
triples = jax.custom_jvp(lambda z: z)
triples.defjvp(lambda primals, tangents: (3 * primals[0], tangents[0] * primals[0]))

ONE = {
    "clips": by_cotangent(lambda g: jnp.clip(g, -0.1, 0.1)),
    "reverses": by_cotangent(lambda g: -g),
    "rounds": by_cotangent(lambda g: jnp.round(8 * g) / 8),
    "normalizes": by_cotangent(lambda g: g / (1e-3 + jnp.sqrt(jnp.sum(g * g)))),
    "changes the value": doubles,
    "changes the value forward": triples,
    "counts one": lambda z: counts(z, jnp.full_like(z, 0.5)),
    "counts twice": lambda z: counts(z, z),
    "counts one backwards": lambda z: counts_backwards(z, jnp.full_like(z, 0.5)),
}


def _loop(step, s):
    return jax.lax.scan(lambda c, u: ((c2 := step(c, u)), c2), jnp.zeros(WIDTH), s)[1]


def _branch(s, f):
    return lambda z: jax.lax.cond(s[0, 0] > 0, f, lambda z: 2 * z, z)


# Each is a loss of a weight (WIDTH, WIDTH) and steps (STEPS, WIDTH), in which `f` stands somewhere.
PLACES = {
    "weight": lambda f, w, s: jnp.tanh(s @ f(w)),
    "weight, used plainly too": lambda f, w, s: jnp.tanh(s @ f(w)) + jnp.sin(s @ w) + w[0],
    "weight, twice": lambda f, w, s: jnp.tanh(s @ f(f(w))),
    "weight, through a path": lambda f, w, s: jnp.tanh(s @ f(2 * w.T + 1)),
    "activation": lambda f, w, s: jnp.tanh(f(s @ w) @ w),
    "data": lambda f, w, s: jnp.tanh(f(s) @ w),
    "weight in a map": lambda f, w, s: jax.lax.map(lambda u: jnp.tanh(u @ f(w)), s),
    "weight in maps": lambda f, w, s: jax.lax.map(
        lambda u: jax.lax.map(lambda x: jnp.sum(jnp.sin(x * f(w))), u), s
    ),
    "weight in a scan": lambda f, w, s: _loop(lambda c, u: jnp.tanh(c @ w + u @ f(w)), s),
    "carry of a scan": lambda f, w, s: _loop(lambda c, u: jnp.tanh(f(c) @ w + u), s),
    "around a scan": lambda f, w, s: f(_loop(lambda c, u: jnp.tanh(c @ w + u), s)),
    "weight before a scan": lambda f, w, s: (lambda v: _loop(lambda c, u: jnp.tanh(c @ v + u), s))(f(w)),
    "scanned weight": lambda f, w, s: jax.lax.scan(lambda c, v: (jnp.tanh(c * f(v)), c), s[0], w)[0],
    "weight in a loop": lambda f, w, s: jax.lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ f(w)), s),
    "weight in a branch": lambda f, w, s: jnp.tanh(s @ _branch(s, f)(w)),
    "weight in a branch with data": lambda f, w, s: _branch(s, lambda z: jnp.tanh(z @ f(w)))(s),
    "activation in a branch": lambda f, w, s: _branch(s, f)(s @ w),
    "weight in a branch of a scan": lambda f, w, s: _loop(
        lambda c, u: jax.lax.cond(u[0] > 0, lambda c: jnp.tanh(c + u @ f(w)), lambda c: c, c), s
    ),
    "weight in a checkpoint": lambda f, w, s: jax.checkpoint(lambda w, s: jnp.tanh(s @ f(w)))(w, s),
    "weight in a checkpoint of a scan": lambda f, w, s: _loop(
        jax.checkpoint(lambda c, u: jnp.tanh(c @ w + u @ f(w))), s
    ),
    "weight under vmap": lambda f, w, s: jax.vmap(lambda u: jnp.tanh(u @ f(w)))(s),
    "activation under vmap": lambda f, w, s: jax.vmap(lambda u: jnp.tanh(f(u @ w)))(s),
    "weight under jit": lambda f, w, s: jax.jit(lambda w: jnp.tanh(s @ f(w)))(w),
}

# Each is a loss of weights a, b (WIDTH,) and of steps, in which `g` of two arguments stands somewhere.
PAIRS = {
    "weight and data": lambda g, a, b, s: g(a, s[0]) + b,
    "data and weight": lambda g, a, b, s: g(s[0] * b, a),
    "two weights": lambda g, a, b, s: s[0] * g(a, b),
    "two activations": lambda g, a, b, s: g(a * s[0], b * s[1]),
    "activation and data": lambda g, a, b, s: g(a * s[0], s[1]) * b,
    "data alone": lambda g, a, b, s: g(s[0], s[1]) * a + b,
    "weight and stopped weight": lambda g, a, b, s: g(a * s[0], jax.lax.stop_gradient(b)) + b * s[1],
    "in a scan": lambda g, a, b, s: _loop(lambda c, u: jnp.tanh(c * b + g(a, u)), s),
    "carry in a scan": lambda g, a, b, s: _loop(lambda c, u: jnp.tanh(g(c, u) + a * u), s),
    "scanned": lambda g, a, b, s: jax.lax.map(lambda x: g(x[0], x[1]), (s, s * a)),
    "of several outputs": lambda g, a, b, s: g(*jax.lax.sort((a * s[0], s[1]), num_keys=1)),
    "sorted beside data": lambda g, a, b, s: g(*jax.lax.sort((a, s[1]), num_keys=1)) * b,
    "in a branch": lambda g, a, b, s: jax.lax.cond(s[0, 0] > 0, g, lambda x, y: x - y, a, s[1] * b),
    "under vmap": lambda g, a, b, s: jax.vmap(g, (None, 0))(a, s),
    "in a checkpoint": lambda g, a, b, s: jax.checkpoint(g)(a, b * s[0]),
    "after a site": lambda g, a, b, s: g(jnp.sin(a * s[0]), a),
}
TWO = {"counts": counts, "counts backwards": counts_backwards, "stops": stops_what_does_not_move}


def several(grads, weights, direction):
    """Reductions that between them take every way to a gradient."""
    return {
        "each": jgd.materialize(grads),
        "norms": jgd.norms(grads),
        "sum": jgd.sum(grads),
        "weighted": jgd.sum(grads, weights),
        "clipped": jgd.clipped_sum(grads, 0.3, weights=weights),
        "dot": jgd.dot(grads, direction),
        "gram": jgd.gram(grads),
        "second": jgd.second_moment(grads, weights),
    }


def assert_as_vmap_of_grad(loss, params, batch, tolerance=1e-12, **options):
    weights, direction = np.array([0.5, 0.0, 2.0]), jax.tree.map(np.cos, params)

    @jax.jit
    def both(params, *batch):
        blocks = jax.vmap(jax.grad(loss), (None, *(0 for _ in batch)))(params, *batch)
        grads = jgd.per_example_grad(loss, strategy="factored", **options)(params, *batch)
        return several(grads, weights, direction), several(blocks, weights, direction)

    got, want = both(params, *batch)
    assert any(np.any(x != 0) for x in jax.tree.leaves(want["each"]))
    for name, answer in got.items():
        oracle.assert_close(answer, jax.tree.map(np.asarray, want[name]), tolerance, what=name)


@pytest.fixture
def steps():
    return np.random.default_rng(0).normal(size=(B, STEPS, WIDTH))


def table(rules, places):
    """Every rule at every place; by default each place by one rule."""
    pairs = [(rule, place) for place in places for rule in rules]
    often = {(list(rules)[i % len(rules)], place) for i, place in enumerate(places)}
    return [pytest.param(*pair, marks=() if pair in often else pytest.mark.slow) for pair in pairs]


@pytest.mark.parametrize(("rule", "place"), table(ONE, PLACES))
def test_a_rule_at_every_place(rule, place, steps):
    w = np.random.default_rng(1).normal(size=(WIDTH, WIDTH))
    assert_as_vmap_of_grad(lambda w, s: jnp.sum(PLACES[place](ONE[rule], w, s) ** 2), w, (steps,))


@pytest.mark.parametrize(("rule", "place"), table(TWO, PAIRS))
def test_a_rule_that_asks_is_shown_what_grad_shows_it(rule, place, steps):
    a, b = np.random.default_rng(2).normal(size=(2, WIDTH))
    loss = lambda p, s: jnp.sum(jnp.sin(PAIRS[place](TWO[rule], p["a"], p["b"], s)))
    assert_as_vmap_of_grad(loss, {"a": a, "b": b}, (steps,))


def test_a_rule_of_jax_that_changes_the_value(steps):
    """`eigh` symmetrizes a matrix only where it is differentiated."""

    def loss(w, s):
        values, vectors = jnp.linalg.eigh(w + 3 * jnp.diag(jnp.arange(WIDTH)), symmetrize_input=False)
        return jnp.sum(jnp.sin(s @ (vectors * values)))

    assert_as_vmap_of_grad(loss, np.random.default_rng(1).normal(size=(WIDTH, WIDTH)), (steps,))


@pytest.mark.parametrize(
    ("usual", "rule"), [("relu", "elementwise"), ("softplus", "elementwise"), ("log_sigmoid", "elementwise")]
)
def test_usual_functions_of_weights_keep_their_factors(usual, rule):
    """Their rules compute the function's own value, which is found by tracing them."""
    loss = lambda w, x: jnp.sum(jnp.sin(x @ getattr(jax.nn, usual)(w)))
    rows = jgd.explain(loss, jnp.ones((3, 4)), jnp.ones((B, 3))).rows
    assert [row.rule for row in rows] == [rule]


def test_derivatives_of_answers_go_through_a_rule_that_is_not_linear(steps):
    w = np.random.default_rng(1).normal(size=(WIDTH, WIDTH))
    loss = lambda w, s: jnp.sum(PLACES["weight in a scan"](ONE["normalizes"], w, s) ** 2)

    def penalty(gradients, w):
        return jnp.sum(jgd.norms(gradients(w, steps)) ** 3)

    got = jax.grad(lambda w: penalty(jgd.per_example_grad(loss, strategy="factored"), w))(w)
    want = jax.grad(lambda w: penalty(jax.vmap(jax.grad(loss), (None, 0)), w))(w)
    oracle.assert_close(got, np.asarray(want), 1e-10)


@pytest.mark.parametrize("rule", ["clips", "counts twice"])
def test_microbatches_and_small_memory(rule, steps):
    w = np.random.default_rng(1).normal(size=(WIDTH, WIDTH))
    loss = lambda w, s: jnp.sum(PLACES["weight in a map"](ONE[rule], w, s) ** 2)
    assert_as_vmap_of_grad(loss, w, (steps,), microbatch_size=2)


# What has no derivative


STOPPED = {
    "stop_gradient": jax.lax.stop_gradient,
    "floor": jnp.floor,
    "round": lambda w: jnp.round(3 * w),
    "a jitted sign": jax.jit(jnp.sign),
    "through integers": lambda w: w.astype(int).astype(w.dtype),
}


@pytest.mark.parametrize("stop", STOPPED)
def test_what_has_no_tangent_is_a_constant(stop, steps):
    def loss(w, s):
        h = jnp.tanh(s @ STOPPED[stop](w))
        h = jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 0.5), (0, h))[1]
        h = jax.pure_callback(lambda h: h * 2, h, h, vmap_method="expand_dims")
        return jnp.sum(jnp.sin(h + s @ w))

    assert_as_vmap_of_grad(loss, np.random.default_rng(1).normal(size=(WIDTH, WIDTH)), (steps,))


# Array references


@pytest.mark.parametrize("inside", ["plainly", "in a scan", "under checkpoint"])
def test_array_references_hold_what_was_written(inside, steps):
    def loss(w, s):
        kept = jax.new_ref(jnp.zeros(WIDTH))
        write = lambda u: kept.__setitem__(slice(None), kept[...] + jnp.tanh(u @ w))
        if inside == "in a scan":
            jax.lax.scan(lambda _, u: (write(u), None), None, s)
        else:
            write(s[0])
        read = lambda w: jnp.sum(jnp.sin(w @ kept[...]) * kept[1])
        return (jax.checkpoint(read) if inside == "under checkpoint" else read)(w)

    if inside == "under checkpoint" and not _grad_takes(loss, steps):
        pytest.skip("jax.grad does not take a reference under checkpoint either")
    assert_as_vmap_of_grad(loss, np.random.default_rng(1).normal(size=(WIDTH, WIDTH)), (steps,))


def _grad_takes(loss, steps):
    try:
        jax.vmap(jax.grad(loss), (None, 0))(np.ones((WIDTH, WIDTH)), steps)
    except Exception:
        return False
    return True
