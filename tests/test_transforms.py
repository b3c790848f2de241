"""`per_example_grad` and its results under JAX's transforms, and at the edges of what it accepts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import problem
from compilations import compilations
from inside import form_of, sums_of

import jgd
from jgd import _whole

STRATEGIES = ("auto", "factored", "materialized")
FEW = ("tied_embedding_and_head", "stacked_layers_on_positions", "conv2d_same")

# "auto" is one of the other two; test_reductions puts it to every case.
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES[1:])
few_cases = pytest.mark.parametrize("name", FEW)


def gradients(case, strategy="auto"):
    return jgd.per_example_grad(case.loss, strategy=strategy, **case.options)(case.params, *case.batch)


def several(grads):
    """Reductions that between them take every way through the factors."""
    return (
        jgd.norms(grads),
        jgd.clipped_sum(grads, 0.5),
        jgd.gram(grads),
        jgd.variance(grads),
        jgd.materialize(grads),
        grads.values,
    )


def close(got, want, tolerance=1e-10):
    oracle.assert_close(got, jax.tree.map(np.asarray, want), tolerance)


def row(tree, k):
    return jax.tree.map(lambda x: x[k], tree)


def squared_error(p, x, y):
    return 0.5 * jnp.sum(jnp.square(jnp.tanh(x @ p["w"]) - y))


@pytest.fixture
def example():
    rng = np.random.default_rng(0)
    return {"w": rng.normal(size=(4, 3))}, rng.normal(size=(5, 4)), rng.normal(size=(5, 3))


# jit, vmap, scan


@every_strategy
@few_cases
def test_compiled_whole_gives_what_steps_outside_give(name, strategy, x64):
    case = problem(name)
    inside = jax.jit(lambda p, *b: several(jgd.per_example_grad(case.loss, strategy=strategy)(p, *b)))
    close(inside(case.params, *case.batch), several(gradients(case, strategy)))


@every_strategy
@few_cases
def test_an_outer_vmap_over_parameters(name, strategy, x64):
    case = problem(name)
    stack = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x, -x]), case.params)
    ask = lambda p: several(jgd.per_example_grad(case.loss, strategy=strategy)(p, *case.batch))
    got = jax.vmap(ask)(stack)
    for k in range(3):
        close(row(got, k), ask(row(stack, k)))


@every_strategy
def test_an_outer_vmap_over_batches(strategy, example, x64):
    params, x, y = example
    xs, ys = np.stack([x, 2 * x]), np.stack([y, -y])
    ask = lambda x, y: several(jgd.per_example_grad(squared_error, strategy=strategy)(params, x, y))
    got = jax.vmap(ask)(xs, ys)
    for k in range(2):
        close(row(got, k), ask(xs[k], ys[k]))


@every_strategy
@few_cases
def test_gradients_come_out_of_a_scan(name, strategy, x64):
    case = problem(name)
    batches = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), case.batch)

    def step(carry, batch):
        grads = jgd.per_example_grad(case.loss, strategy=strategy)(case.params, *batch)
        return carry, grads

    _, stacked = jax.lax.scan(step, 0, batches)
    assert isinstance(stacked, jgd.PerExampleGrads)
    for k in range(2):
        batch = row(batches, k)
        want = several(jgd.per_example_grad(case.loss, strategy=strategy)(case.params, *batch))
        close(several(row(stacked, k)), want)


@every_strategy
@few_cases
def test_gradients_carried_through_a_scan(name, strategy, x64):
    """Training by the gradients of the step before."""
    case = problem(name)
    gradient_of = jgd.per_example_grad(case.loss, strategy=strategy)

    def step(carry, _):
        params, grads = carry
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, jgd.mean(grads))
        return (params, gradient_of(params, *case.batch)), jgd.norms(grads)

    start = (case.params, gradient_of(case.params, *case.batch))
    (params, grads), norms = jax.lax.scan(step, start, None, length=3)

    want_params, want_norms = case.params, []
    for _ in range(3):
        blocks = jax.vmap(jax.grad(case.loss), case.in_axes)(want_params, *case.batch)
        want_norms.append(np.linalg.norm(oracle.matrix(blocks), axis=1))
        want_params = jax.tree.map(lambda p, g: p - 0.1 * g.mean(0), want_params, blocks)
    close(params, want_params)
    close(norms, np.stack(want_norms))
    close(jgd.materialize(grads), jax.vmap(jax.grad(case.loss), case.in_axes)(want_params, *case.batch))


@every_strategy
@pytest.mark.parametrize("name", ("relu_mlp_on_positions", "recurrence"))
def test_without_jit(name, strategy, x64):
    case = problem(name)
    want = several(gradients(case, strategy))
    with jax.disable_jit():
        close(several(gradients(case, strategy)), want)


# A pytree


@every_strategy
@few_cases
def test_in_and_out_of_jit_and_flattened(name, strategy, x64):
    case = problem(name)
    grads = gradients(case, strategy)
    want = several(grads)
    leaves, treedef = jax.tree.flatten(grads)
    assert all(isinstance(x, jax.Array) for x in leaves)
    close(several(jax.tree.unflatten(treedef, leaves)), want)
    close(several(jax.jit(lambda g: g)(grads)), want)
    assert jax.tree.structure(jax.jit(lambda g: g)(grads)) == treedef
    assert (
        jax.tree.structure(gradients(case, strategy)) == treedef
    )  # a carry of a scan, or a cache, compares them


def test_immutable_with_a_length_and_a_short_repr(example):
    grads = jgd.per_example_grad(squared_error)(*jax.tree.map(jnp.float32, example))
    assert len(grads) == 5
    assert len(repr(grads)) < 100
    assert "5 examples" in repr(grads) and "12 parameters" in repr(grads)
    with pytest.raises(AttributeError):
        grads.values = 0


# Caches


@every_strategy
def test_the_second_call_compiles_nothing(strategy, example):
    traces = []

    def loss(p, x, y):
        traces.append(1)
        return squared_error(p, x, y)

    params, x, y = jax.tree.map(jnp.float32, example)
    gradient_of = jgd.per_example_grad(loss, strategy=strategy)
    other = {"w": params["w"] * 2}, x + 1, y
    several(gradient_of(params, x, y))
    with compilations() as made:
        several(gradient_of(*other))
        several(jgd.per_example_grad(loss, strategy=strategy)(*other))
    assert not made and len(traces) == 3
    fewer = gradient_of(params, x[:3], y[:3])
    assert type(form_of(fewer)) is type(form_of(gradient_of(params, x, y)))
    if strategy == "factored":  # the loss sees one example: another batch size is the same program
        assert form_of(fewer).plan is form_of(gradient_of(params, x, y)).plan


def test_another_object_of_the_same_class_is_another_loss(example):
    class Model:
        def __init__(self, scale):
            self.scale = scale

        def loss(self, p, x, y):
            return self.scale * squared_error(p, x, y)

    args = jax.tree.map(jnp.float32, example)
    one, two = (jgd.per_example_grad(Model(scale).loss)(*args) for scale in (1.0, 2.0))
    close(two.values, 2 * one.values, 1e-6)


def test_the_cache_keeps_no_loss_alive(example):
    import gc
    import weakref

    def made():
        loss = lambda p, x, y: squared_error(p, x, y)
        jgd.norms(jgd.per_example_grad(loss)(*jax.tree.map(jnp.float32, example)))
        return weakref.ref(loss)

    alive = [made() for _ in range(3)]
    gc.collect()
    assert sum(ref() is not None for ref in alive) == 0


def test_what_a_loss_closes_over_may_change_under_jit(example, x64):
    """A closed-over value that is traced belongs to this trace alone."""
    params, x, y = example

    def ask(scale):
        loss = lambda p, x, y: scale * squared_error(p, x, y)
        return jgd.norms(jgd.per_example_grad(loss)(params, x, y))

    want = jgd.norms(jgd.per_example_grad(squared_error)(params, x, y))
    compiled = jax.jit(ask)
    for scale in (2.0, 3.0):
        close(compiled(scale), scale * want)
        close(ask(jnp.float64(scale)), scale * want)
    close(jax.vmap(ask)(jnp.arange(1.0, 4.0)), np.arange(1.0, 4.0)[:, None] * want)
    slope = jax.grad(lambda s: ask(s).sum())(2.0)
    close(slope, want.sum())


def test_one_function_called_in_two_traces(example, x64):
    """The same loss object, closing over a cell that a trace fills."""
    params, x, y = example
    box = {}

    def loss(p, x, y):
        return box["scale"] * squared_error(p, x, y)

    @jax.jit
    def ask(scale):
        box["scale"] = scale
        return jgd.norms(jgd.per_example_grad(loss)(params, x, y))

    first, second = ask(1.0), ask(jnp.array([2.0])[0].astype(jnp.float32))
    close(second, 2 * first, 1e-6)


# Derivatives of reductions


@every_strategy
@few_cases
def test_a_penalty_on_norms_trains(name, strategy, x64):
    case = problem(name)

    def penalty(p):
        return jnp.sum(jgd.norms(jgd.per_example_grad(case.loss, strategy=strategy)(p, *case.batch)) ** 2)

    def expected(p):
        blocks = jax.vmap(jax.grad(case.loss), case.in_axes)(p, *case.batch)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(blocks))

    close(jax.jit(jax.grad(penalty))(case.params), jax.jit(jax.grad(expected))(case.params), 1e-9)


def weighted(blocks, weights, max_norm):
    """What is asked with weights, from the gradients, so that JAX knows the derivatives by the weights."""
    norm = jnp.sqrt(sum(jnp.sum(x.reshape(len(weights), -1) ** 2, axis=1) for x in jax.tree.leaves(blocks)))
    whole = jnp.sum(weights)
    each = lambda w, of=lambda x: x: jax.tree.map(lambda x: jnp.tensordot(w, of(x), 1), blocks)
    mean = each(weights / whole)
    unbiased = whole - jnp.sum(weights**2) / whole
    deviation = lambda x, m: jnp.tensordot(weights, (x - m) ** 2, 1) / unbiased
    return (
        each(weights),
        mean,
        each(weights / whole, jnp.square),
        jax.tree.map(deviation, blocks, mean),
        each(weights * jnp.minimum(1, max_norm / norm)),
    )


def asked_with_weights(grads, weights, max_norm):
    return (
        jgd.sum(grads, weights),
        jgd.mean(grads, weights),
        jgd.second_moment(grads, weights),
        jgd.variance(grads, weights),
        jgd.clipped_sum(grads, max_norm, weights=weights),
    )


HELD = ({"strategy": "factored"}, {"strategy": "materialized"}, {"microbatch_size": 2})


@pytest.mark.parametrize("held", HELD, ids=str)
@pytest.mark.parametrize("name", (*FEW, "embedding_repeated_indices", "weight_normalisation", "recurrence"))
def test_derivatives_by_weights_that_are_partly_0(name, held, x64):
    """Of an absent example too: reweighting starts from weights of 0."""
    case = problem(name)
    blocks = jax.vmap(jax.grad(case.loss), case.in_axes)(case.params, *case.batch)
    size = jax.tree.leaves(blocks)[0].shape[0]
    weights = jnp.where(jnp.arange(size) < size // 2, 0, 1 + jnp.arange(size) / size)
    max_norm = 0.7 * float(jnp.median(jnp.linalg.norm(oracle.matrix(blocks), axis=1)))
    wave = lambda tree: sum(
        jnp.sum(x * jnp.sin(1 + jnp.arange(x.size)).reshape(x.shape)) for x in jax.tree.leaves(tree)
    )

    def ours(weights, max_norm):
        grads = jgd.per_example_grad(case.loss, **case.options, **held)(case.params, *case.batch)
        return [wave(x) for x in asked_with_weights(grads, weights, max_norm)]

    theirs = lambda weights, max_norm: [wave(x) for x in weighted(blocks, weights, max_norm)]
    at = (weights, max_norm)
    want = jax.jacobian(theirs, (0, 1))(*at)
    assert all(np.all(np.abs(by_weights) > 0) for by_weights, _ in want)
    close(jax.jit(jax.jacrev(ours, (0, 1)))(*at), want, 1e-9)
    close(jax.jit(jax.jacfwd(ours, (0, 1)))(*at), want, 1e-9)


@every_strategy
def test_weights_that_are_all_0_can_be_learned(strategy, example, x64):
    """As in "Learning to reweight examples" (Ren et al., 2018): a step with weights of 0, and its derivative."""
    params, x, y = example

    def after(weights, total):
        blocks = total(params, weights)
        stepped = jax.tree.map(lambda p, g: p - 0.1 * g, params, blocks)
        return jnp.sum(jax.vmap(squared_error, (None, 0, 0))(stepped, x[:2], y[:2]))

    ours = lambda p, w: jgd.sum(jgd.per_example_grad(squared_error, strategy=strategy)(p, x, y), w)
    theirs = jax.grad(lambda p, w: jnp.sum(w * jax.vmap(squared_error, (None, 0, 0))(p, x, y)))
    want = jax.grad(after)(jnp.zeros(5), theirs)
    assert np.all(np.abs(want) > 0)
    close(jax.grad(after)(jnp.zeros(5), ours), want)
    close(jax.jit(jax.grad(after), static_argnums=1)(jnp.zeros(5), ours), want)


@pytest.mark.parametrize("held", HELD, ids=str)
def test_no_derivative_by_the_weight_of_an_absent_example_that_is_not_finite(held, example, x64):
    params, x, y = example
    x = x.copy()
    x[1, 2] = np.nan
    weights = jnp.array([1.0, 0, 2, 0, 1])

    def ask(weights, x, y):
        grads = jgd.per_example_grad(squared_error, **held)(params, x, y)
        return [jnp.sin(z["w"]) for z in asked_with_weights(grads, weights, 0.3)]

    rest = np.array([0, 2, 3, 4])
    want = jax.jacrev(ask)(weights[rest], x[rest], y[rest])
    for jacobian in (jax.jacrev, jax.jacfwd):
        got = jacobian(ask)(weights, x, y)
        close([z[..., rest] for z in got], want, 1e-9)
        assert all(np.all(z[..., 1] == 0) for z in got[:1] + got[4:])
        assert all(np.all(np.isfinite(z)) for z in got)


@pytest.mark.parametrize("held", HELD, ids=str)
def test_one_example_that_is_left_has_no_variance(held, example):
    """Nor has a parameter that it does not reach."""
    params, x, y = example
    loss = lambda p, x, y: squared_error(p, x, y) + 0 * p["table"][jnp.argmax(x)]
    grads = jgd.per_example_grad(loss, **held)(params | {"table": jnp.ones(10)}, x, y)
    for leaf in jax.tree.leaves(jgd.variance(grads, jnp.array([0.0, 0, 2, 0, 0]))):
        assert np.all(np.isnan(leaf))


@every_strategy
def test_derivatives_of_the_other_reductions(strategy, example, x64):
    params, x, y = example
    direction = jax.tree.map(jnp.ones_like, params)
    asks = [
        lambda g: jgd.norms(g, per_leaf=True)["w"].sum(),
        lambda g: jnp.sin(jgd.gram(g)).sum(),
        lambda g: jnp.sin(jgd.clipped_sum(g, 0.9)["w"]).sum(),
        lambda g: jnp.sqrt(jgd.second_moment(g)["w"]).sum(),
        lambda g: jnp.sqrt(jgd.variance(g)["w"]).sum(),
        lambda g: jgd.noise_scale(g).trace_covariance,
        lambda g: jnp.sin(jgd.dot(g, direction)).sum(),
        lambda g: jnp.sin(jgd.project(g, jax.random.key(1), 3)).sum(),
        lambda g: jnp.sin(jgd.mean(g)["w"]).sum(),
    ]
    total = lambda g: sum((k + 1) * ask(g) for k, ask in enumerate(asks))
    got = jax.grad(lambda p: total(jgd.per_example_grad(squared_error, strategy=strategy)(p, x, y)))(params)
    want = jax.grad(lambda p: total(jax.vmap(jax.grad(squared_error), (None, 0, 0))(p, x, y)))(params)
    close(got, want, 1e-9)


def test_what_is_made_of_all_examples_together_is_made_in_compiled_programs_alone(monkeypatch):
    """Outside of them it would be work that nobody may ask for."""
    asked, ours = [], _whole.pass_over
    spy = lambda *args, together, **options: (
        asked.append(together),
        ours(*args, together=together, **options),
    )[1]
    monkeypatch.setattr(_whole, "pass_over", spy)
    params, x = jnp.ones((2, 4, 4)), np.ones((5, 4), np.float32)
    loss = lambda w, x: jnp.sum(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0])

    def norm(params):
        return jnp.sum(jgd.norms(jgd.per_example_grad(loss, strategy="factored")(params, x)))

    several = jnp.stack([params, params])
    scaled = jgd.per_example_grad(lambda p, x: p[1] * loss(p[0], x), strategy="factored")
    of_float = lambda scale: jnp.sum(jgd.norms(scaled((params, scale), x)))
    eager = (
        norm,
        jax.grad(norm),
        jax.hessian(norm),
        lambda p: jax.jvp(norm, (p,), (p,)),
        lambda p: jax.grad(of_float)(1.0),
    )
    for compiled, calls in ((False, eager), (True, map(jax.jit, eager))):
        for call in calls:
            jax.clear_caches()
            call(params)
        jax.clear_caches()
        (jax.jit if compiled else lambda f: f)(jax.vmap(norm))(several)
        assert len(asked) >= 5 and set(asked) == {compiled}
        asked.clear()


@pytest.mark.parametrize("positions", [1, 6])
def test_derivatives_of_what_the_pass_makes_of_a_scan(positions, x64):
    """First and second, in both directions: of sums, moments and inner products that one program asks for."""
    params = 0.5 * jax.random.normal(jax.random.key(0), (3, 4, 4))
    x = jax.random.normal(jax.random.key(1), (5, positions, 4))

    def loss(w, x):
        return jnp.sum(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0] ** 2)

    def total(grads):
        asked = jgd.mean(grads), jgd.second_moment(grads), jgd.variance(grads), jgd.gram(grads)
        tree = jax.tree.map(lambda x: jnp.sum(jnp.sin(x)), asked)
        return sum(tree) + jgd.noise_scale(grads).trace_covariance

    def ours(p):
        grads = jgd.per_example_grad(loss, strategy="factored")(p, x)
        assert sums_of(grads).parts
        return total(grads)

    theirs = lambda p: total(jax.vmap(jax.grad(loss), (None, 0))(p, x))
    close(jax.jit(jax.grad(ours))(params), jax.jit(jax.grad(theirs))(params), 1e-9)
    along = lambda f: jax.jit(lambda p: jax.jvp(jax.grad(f), (p,), (jnp.cos(p),)))
    close(along(ours)(params), along(theirs)(params), 1e-9)


@every_strategy
def test_a_zero_gradient_gives_no_nan(strategy, x64):
    x = jnp.array([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    loss = lambda p, x: jnp.sum(jnp.sin(x * p))
    ask = jgd.per_example_grad(loss, strategy=strategy)
    params = jnp.array([0.1, 0.2, 0.3])
    grads = ask(params, x)
    assert jgd.norms(grads)[0] == 0
    assert all(
        np.isfinite(t).all()
        for t in jax.tree.leaves((jgd.clipped_sum(grads, 0.0), jgd.clipped_sum(grads, 1.0)))
    )
    for reduction in (lambda g: jgd.norms(g).sum(), lambda g: jgd.clipped_sum(g, 1.0).sum()):
        assert np.isfinite(jax.grad(lambda p, r=reduction: r(ask(p, x)))(params)).all()


# Edges of a batch


@every_strategy
@few_cases
def test_no_examples(name, strategy, x64):
    case = problem(name)
    batch = jax.tree.map(lambda x: x[:0], case.batch)
    grads = jgd.per_example_grad(case.loss, strategy=strategy)(case.params, *batch)
    assert len(grads) == 0 and grads.values.shape == (0,)
    zeros = jax.tree.map(jnp.zeros_like, case.params)
    for tree in (jgd.sum(grads), jgd.clipped_sum(grads, 1.0), jgd.sum(grads, jnp.ones(0))):
        assert jax.tree.structure(tree) == jax.tree.structure(zeros)
        close(tree, zeros)
    assert jgd.norms(grads).shape == jgd.dot(grads, zeros).shape == (0,)
    assert jgd.gram(grads).shape == (0, 0)
    assert jgd.gram(grads, gradients(case, strategy)).shape == (0, 5)
    assert jgd.project(grads, jax.random.key(0), 3).shape == (0, 3)
    for block, leaf in zip(
        jax.tree.leaves(jgd.materialize(grads)), jax.tree.leaves(case.params), strict=True
    ):
        assert block.shape == (0, *leaf.shape)


@every_strategy
@few_cases
def test_one_example(name, strategy, x64):
    case = problem(name)
    batch = jax.tree.map(lambda x: x[2:3], case.batch)
    grads = jgd.per_example_grad(case.loss, strategy=strategy)(case.params, *batch)
    want = jax.grad(case.loss)(case.params, *jax.tree.map(lambda x: x[0], batch))
    close(jgd.sum(grads), want)
    close(jgd.mean(grads), want)
    norm = np.linalg.norm(oracle.matrix(jax.tree.map(lambda x: x[None], want)))
    close(jgd.norms(grads), np.array([norm]))
    close(jgd.gram(grads), np.array([[norm**2]]))


@every_strategy
def test_grams_of_batches_of_different_sizes(strategy, example, x64):
    params, x, y = example
    gradient_of = jgd.per_example_grad(squared_error, strategy=strategy)
    whole = jgd.gram(gradient_of(params, x, y))
    close(jgd.gram(gradient_of(params, x[:2], y[:2]), gradient_of(params, x[2:], y[2:])), whole[:2, 2:])
    plain = jax.vmap(jax.grad(squared_error), (None, 0, 0))(params, x[2:], y[2:])
    close(jgd.gram(gradient_of(params, x[:2], y[:2]), plain), whole[:2, 2:])


def test_grams_between_strategies(example, x64):
    params, x, y = example
    held = [jgd.per_example_grad(squared_error, strategy=s)(params, x, y) for s in STRATEGIES]
    whole = jgd.gram(held[-1])
    for one in held:
        for two in held:
            close(jgd.gram(one, two), whole)


# Arguments


@every_strategy
def test_auxiliary_output(strategy, x64):
    case = problem("auxiliary_output")
    grads = gradients(case, strategy)
    assert grads.aux["prediction"].shape == (5, 3)
    assert grads.aux["count"].dtype == jnp.int32 and grads.aux["count"].shape == (5,)


@every_strategy
@pytest.mark.parametrize("argnums", [2, -1, (0, 2), (2, 0), (-1,)])
def test_argnums(argnums, strategy, x64):
    rng = np.random.default_rng(0)
    w, x, b = rng.normal(size=(4, 3)), rng.normal(size=(5, 4)), {"b": rng.normal(size=3)}
    loss = lambda w, x, b: jnp.sum(jnp.sin(x @ w + b["b"]))
    axes = (None, 0, None)
    grads = jgd.per_example_grad(loss, argnums=argnums, in_axes=axes, strategy=strategy)(w, x, b)
    want = jax.vmap(jax.grad(loss, argnums), axes)(w, x, b)
    close(jgd.materialize(grads), want)
    close(jgd.sum(grads), jax.tree.map(lambda x: x.sum(0), want))


@every_strategy
@pytest.mark.parametrize(
    "axes",
    [
        (None, 0, 0, None),
        [None, 0, {"y": 0, "z": 0}, None],
        (None, 0, {"y": 0, "z": None}, 0),
        (None, 1, 0, 0),
    ],
)
def test_in_axes(axes, strategy, x64):
    rng = np.random.default_rng(0)
    loss = lambda w, x, e, s: jnp.sum(jnp.sin(x @ w * e["y"] + e["z"].sum())) + s.sum()
    w, x, y, z, s = (rng.normal(size=shape) for shape in ((5, 3), (5, 5), (5, 3), (5,), (5,)))
    args = (w, x, {"y": y, "z": z}, s)
    grads = jgd.per_example_grad(loss, in_axes=axes, strategy=strategy)(*args)
    close(jgd.materialize(grads), jax.vmap(jax.grad(loss), tuple(axes))(*args))


def test_in_axes_as_one_number(x64):
    rng = np.random.default_rng(0)
    loss = lambda w, x, y: jnp.sum(jnp.sin(x @ w) * y)
    w, x, y = rng.normal(size=(4, 3)), rng.normal(size=(4, 5)), rng.normal(size=(3, 5))
    grads = jgd.per_example_grad(loss, in_axes=1)(w, x, y)
    close(jgd.materialize(grads), jax.vmap(jax.grad(loss), (None, 1, 1))(w, x, y))


@every_strategy
@pytest.mark.parametrize("kind", ["bound", "partial", "lambda", "callable", "jitted", "checkpointed"])
def test_kinds_of_callables(kind, strategy, example, x64):
    class Model:
        def loss(self, p, x, y):
            return squared_error(p, x, y)

        __call__ = loss

    losses = {
        "bound": Model().loss,
        "partial": functools.partial(lambda scale, p, x, y: scale * squared_error(p, x, y), 1.0),
        "lambda": lambda p, x, y: squared_error(p, x, y),
        "callable": Model(),
        "jitted": jax.jit(squared_error),
        "checkpointed": jax.checkpoint(squared_error),
    }
    blocks = jax.vmap(jax.grad(squared_error), (None, 0, 0))(*example)
    for _ in range(2):
        close(jgd.materialize(jgd.per_example_grad(losses[kind], strategy=strategy)(*example)), blocks)


@every_strategy
def test_a_python_float_as_parameter(strategy):
    grads = jgd.per_example_grad(lambda p, x: p * p * x, strategy=strategy)(
        1.5, np.arange(3, dtype=np.float32)
    )
    close(jgd.norms(grads), np.array([0.0, 3.0, 6.0]), 1e-6)
    assert jgd.sum(grads).shape == ()
    close(jgd.sum(grads), np.float32(9.0), 1e-6)


@every_strategy
def test_numpy_arguments(strategy, example):
    params, x, y = jax.tree.map(np.float32, example)
    grads = jgd.per_example_grad(squared_error, strategy=strategy)(params, x, y)
    close(jgd.materialize(grads), jax.vmap(jax.grad(squared_error), (None, 0, 0))(params, x, y), 1e-6)
    close(jgd.sum(grads, [1, 0, 2, 0, 0]), jgd.sum(grads, jnp.array([1.0, 0, 2, 0, 0])), 1e-6)


def test_a_leaf_without_elements(x64):
    loss = lambda p, x: jnp.sum(jnp.sin(x @ p["w"])) + jnp.sum(p["empty"]) * x[0]
    params = {"w": np.ones((3, 2)), "empty": np.ones((0, 4))}
    x = np.random.default_rng(0).normal(size=(5, 3))
    want = jax.vmap(jax.grad(loss), (None, 0))(params, x)
    for strategy in STRATEGIES:
        grads = jgd.per_example_grad(loss, strategy=strategy)(params, x)
        for reduction in (jgd.norms, jgd.sum, jgd.gram, jgd.variance, jgd.materialize):
            close(reduction(grads), reduction(want))


# Numbers that are not finite, or too small


@every_strategy
def test_small_gradients_do_not_underflow(strategy):
    """1e-5² is 0 in float16: norms squared in half precision would leave such gradients unclipped."""
    x = jnp.full((3, 4), 1e-5, jnp.float16)
    grads = jgd.per_example_grad(lambda p, x: jnp.sum(x * p), strategy=strategy)(jnp.ones(4, jnp.float16), x)
    rows = np.asarray(x, np.float64)
    norms = np.linalg.norm(rows, axis=1)
    assert jgd.norms(grads).dtype == jnp.float32
    np.testing.assert_allclose(jgd.norms(grads), norms, rtol=1e-6)
    np.testing.assert_allclose(jgd.gram(grads), rows @ rows.T, rtol=1e-6)
    clipped = jgd.clipped_sum(grads, float(norms[0]) / 2)
    assert clipped.dtype == jnp.float16
    np.testing.assert_allclose(np.asarray(clipped, np.float64), 1.5 * rows[0], rtol=1e-2)


@every_strategy
def test_half_precision_sums_do_not_stall(strategy):
    """257 + 1 is 256 in bfloat16: a sum of 2,000 ones in it ends at 256."""
    x = jnp.ones((2000, 300), jnp.bfloat16)
    grads = jgd.per_example_grad(lambda p, x: jnp.sum(x * p), strategy=strategy)(
        jnp.ones(300, jnp.bfloat16), x
    )
    np.testing.assert_allclose(jgd.norms(grads), np.sqrt(300.0), rtol=1e-6)
    np.testing.assert_allclose(jgd.gram(grads)[:3, :3], 300.0, rtol=1e-6)
    np.testing.assert_allclose(jgd.sum(grads).astype(float), 2000.0, rtol=5e-2)
    np.testing.assert_allclose(jgd.mean(grads).astype(float), 1.0, rtol=5e-2)


@every_strategy
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite(bad, strategy, example, x64):
    params, x, y = example
    x = x.copy()
    x[1, 2] = bad
    loss = lambda p, x, y: jnp.sum(x @ p["w"] * y)
    grads = jgd.per_example_grad(loss, strategy=strategy)(params, x, y)
    rest = np.array([0, 2, 3, 4])
    good = jgd.per_example_grad(loss, strategy=strategy)(params, x[rest], y[rest])
    weights = np.ones(5)
    weights[1] = 0

    assert not np.isfinite(jgd.norms(grads)[1])
    close(jgd.norms(grads)[rest], jgd.norms(good))
    close(jgd.clipped_sum(grads, 0.3), jgd.clipped_sum(good, 0.3))
    close(jgd.clipped_sum(grads, np.inf), jgd.sum(good))
    close(jgd.sum(grads, weights), jgd.sum(good))
    close(jgd.mean(grads, weights), jgd.mean(good))
    close(jgd.second_moment(grads, weights), jgd.second_moment(good))
    close(jgd.variance(grads, weights), jgd.variance(good))
    close(jgd.clipped_sum(grads, 0.3, weights=weights), jgd.clipped_sum(good, 0.3))
    assert not np.isfinite(jgd.sum(grads)["w"]).all()


@every_strategy
def test_thresholds_at_the_ends(strategy, example, x64):
    grads = jgd.per_example_grad(squared_error, strategy=strategy)(*example)
    close(jgd.clipped_sum(grads, 0.0), jax.tree.map(np.zeros_like, example[0]))
    close(jgd.clipped_sum(grads, np.inf), jgd.sum(grads))
    close(jgd.clipped_sum(grads, 1e300), jgd.sum(grads))


def test_a_loss_that_asks_for_gradients_of_scanned_layers_itself(x64):
    """The pass has an axis of its own for the examples, and so has the one inside of it."""
    w, x = (jax.random.normal(jax.random.key(k), shape) for k, shape in enumerate([(3, 4, 4), (5, 6, 4)]))

    def inner(w, x):
        return jnp.sum(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0] ** 2)

    def outer(w, xs):
        grads = jgd.per_example_grad(inner, strategy="factored")(w, xs[:, None])
        return inner(w - 0.1 * jgd.sum(grads), xs) + jnp.sum(jgd.norms(grads))

    def by_hand(w, xs):
        grads = jax.vmap(jax.grad(inner), (None, 0))(w, xs[:, None])
        return inner(w - 0.1 * grads.sum(0), xs) + jnp.sum(
            jnp.linalg.norm(grads.reshape(len(xs), -1), axis=1)
        )

    grads = jgd.per_example_grad(outer, strategy="factored")(w, x)
    want = jax.vmap(jax.grad(by_hand), (None, 0))(w, x)
    np.testing.assert_allclose(jgd.materialize(grads), want, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(jgd.sum(grads), want.sum(0), rtol=1e-9, atol=1e-12)
