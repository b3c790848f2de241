"""Microbatches: the answers of the whole batch, to rounding, at the memory of a few examples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from cases import B, problem
from internals import SECOND_PASS, form_of

import jgd

CASES = ("mlp_classifier", "tied_embedding_and_head", "auxiliary_output")
WEIGHTS = np.array([1.5, 0.0, 0.5, 2.0, 1.0])


def ask(grads, other, direction):
    scale = jgd.noise_scale(grads)
    return {
        "values": grads.values,
        "aux": grads.aux,
        "materialize": jgd.materialize(grads),
        "sum": jgd.sum(grads),
        "weighted_sum": jgd.sum(grads, WEIGHTS),
        "mean": jgd.mean(grads),
        "norms": jgd.norms(grads),
        "leaf_norms": jgd.norms(grads, per_leaf=True),
        "dot": jgd.dot(grads, direction),
        "gram": jgd.gram(grads),
        "cross_gram": jgd.gram(grads, other),
        "cross_gram_turned": jgd.gram(other, grads),
        "clipped_sum": jgd.clipped_sum(grads, 0.5, weights=WEIGHTS),
        "second_moment": jgd.second_moment(grads),
        "variance": jgd.variance(grads),
        "weighted_variance": jgd.variance(grads, WEIGHTS),
        "noise_scale": (scale.trace_covariance, scale.squared_norm),
        "project": jgd.project(grads, jax.random.key(0), 3),
    }


def _each_case_and_size():
    for name in CASES:
        for size in (1, 2, 3, B):
            marks = [pytest.mark.slow]
            if (name, size) == ("auxiliary_output", 3):
                marks = []
            elif (name, size) == ("mlp_classifier", 2):
                marks.append(pytest.mark.sample)
            yield pytest.param(name, size, marks=marks)


@pytest.mark.parametrize(("name", "size"), list(_each_case_and_size()))
def test_microbatches_answer_as_the_whole_batch_does(name, size, x64):
    case = problem(name, jnp.float64)
    whole = jgd.per_example_grad(case.loss, **case.options)
    some = jgd.per_example_grad(case.loss, **case.options, strategy="factored", microbatch_size=size)
    direction = jax.tree.map(jnp.cos, case.params)
    want = whole(case.params, *case.batch)
    got = jax.jit(lambda p, batch, other: ask(some(p, *batch), other, direction))(
        case.params, case.batch, want
    )
    oracle.assert_close(got, ask(want, want, direction), 1e-11)


def test_a_microbatch_is_no_multiple_and_no_example_is_lost_or_counted_twice():
    loss = lambda w, x: w * x
    grads = jgd.per_example_grad(loss, microbatch_size=4)(jnp.array(1.0), jnp.arange(1.0, 11.0))
    assert jgd.sum(grads) == 55 and jgd.second_moment(grads) == 38.5
    np.testing.assert_allclose(jgd.variance(grads), np.var(np.arange(1, 11), ddof=1), rtol=1e-6)
    np.testing.assert_array_equal(jgd.norms(grads), np.arange(1, 11))
    assert len(grads) == 10


def test_an_absent_example_that_is_not_finite_stays_absent():
    x = jnp.array([1.0, jnp.nan, 3.0])
    grads = jgd.per_example_grad(lambda w, x: w * x, microbatch_size=2)(jnp.array(1.0), x)
    assert jgd.sum(grads, jnp.array([1.0, 0.0, 1.0])) == 4
    assert jgd.clipped_sum(grads, 2.0) == 3


def mlp(width, size):
    keys = jax.random.split(jax.random.key(0), 4)
    params = [jax.random.normal(k, (width, width)) / width**0.5 for k in keys[:2]]
    loss = lambda params, x: jnp.sum(jnp.square(functools.reduce(lambda h, w: jnp.tanh(h @ w), params, x)))
    return loss, params, jax.random.normal(keys[2], (size, 8, width))


def temporary(fun, *args):
    return jax.jit(fun).lower(*args).compile().memory_analysis().temp_size_in_bytes


def clipped(loss, **options):
    grads = jgd.per_example_grad(loss, **options)
    return lambda params, x: jgd.clipped_sum(grads(params, x), 1.0)


def test_max_memory_chooses_a_microbatch_that_stays_within():
    loss, params, x = mlp(64, 64)
    whole = temporary(clipped(loss), params, x)
    limit = whole // 3
    within = clipped(loss, max_memory=limit)
    # Beside the microbatch there is the sum that grows: the parameters' size. A product's operand that would be made in
    # its loop may be stored too.
    assert temporary(within, params, x) <= limit + 4 * sum(p.nbytes for p in params)
    want = clipped(loss)(params, x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), within(params, x), want)


def test_max_memory_that_is_too_little_or_plenty():
    loss, params, x = mlp(16, 8)
    with pytest.raises(ValueError, match=r"`max_memory`=10 bytes is less than .* one example needs: [0-9,]+"):
        jgd.per_example_grad(loss, max_memory=10)(params, x)
    plenty = jgd.per_example_grad(loss, max_memory=1 << 30)(params, x)
    assert "microbatched" not in repr(plenty)


def deep(length):
    """A checkpointed stack of layers of one width: what an example leaves there is much more than the parameters."""

    def loss(params, x):
        layer = jax.checkpoint(lambda h, w: (h + jnp.tanh(h @ w["up"]) @ w["down"], None))
        return jnp.mean(jax.lax.scan(layer, x, params)[0])

    keys = jax.random.split(jax.random.key(0), 3)
    up, down = jax.random.normal(keys[0], (16, 8, 64)) / 3, jax.random.normal(keys[1], (16, 64, 8)) / 8
    return loss, {"up": up, "down": down}, jax.random.normal(keys[2], (4, length, 8))


def test_a_second_backward_pass_where_one_example_leaves_too_much():
    loss, params, x = deep(512)
    one = temporary(clipped(loss), params, x[:1])
    assert jgd.per_example_grad(loss, max_memory=one)(params, x)._form.strategy == "auto"
    plain = jax.grad(lambda params, x: jnp.sum(jax.vmap(loss, (None, 0))(params, x)))
    least = temporary(plain, params, x)
    assert least < one / 2
    grads = jgd.per_example_grad(loss, max_memory=least)(params, x)
    assert form_of(grads).strategy == SECOND_PASS
    assert temporary(clipped(loss, max_memory=least), params, x) <= least + 3 * sum(
        p.nbytes for p in params.values()
    )
    want = clipped(loss)(params, x)
    got = clipped(loss, max_memory=least)(params, x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, want)
    np.testing.assert_allclose(jgd.norms(grads), jgd.norms(jgd.per_example_grad(loss)(params, x)), rtol=1e-5)


def test_no_second_backward_pass_through_what_need_not_be_linear():
    @jax.custom_vjp
    def signed(x):
        return x

    signed.defvjp(lambda x: (x, None), lambda _, ct: (jnp.sign(ct),))
    loss, params, x = deep(512)
    least = temporary(clipped(loss), params, x[:1]) // 2
    with pytest.raises(ValueError, match="one example needs"):
        jgd.per_example_grad(lambda params, x: signed(loss(params, x)), max_memory=least)(params, x)


def test_a_method_walks_the_same_path_in_microbatches():
    loss, params, x = mlp(16, 10)
    reduce = functools.partial(jgd.clipped_sum, max_norm=0.5)
    whole = jgd.descent(loss, optax.sgd(0.1), reduce=reduce)
    some = jgd.descent(loss, optax.sgd(0.1), reduce=reduce, microbatch_size=4)
    states = [method.init(params) for method in (whole, some)]
    for _ in range(3):
        steps = [method.step(state, x) for method, state in zip((whole, some), states, strict=True)]
        states = [state for state, _ in steps]
        np.testing.assert_allclose(steps[0][1].value, steps[1][1].value, rtol=1e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), *(s.params for s in states)
    )


def test_reductions_of_microbatches_are_differentiable():
    loss, params, x = mlp(8, 5)
    penalty = lambda params, **options: jnp.sum(jgd.norms(jgd.per_example_grad(loss, **options)(params, x)))
    want, got = jax.grad(penalty)(params), jax.grad(functools.partial(penalty, microbatch_size=2))(params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), got, want)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"microbatch_size": 0}, ValueError, "`microbatch_size` must be at least 1, got 0"),
        (
            {"microbatch_size": 2.0},
            TypeError,
            "`microbatch_size` must be an int, a number of examples, got float 2.0",
        ),
        ({"max_memory": -1}, ValueError, "`max_memory` must be at least 1, got -1"),
        ({"max_memory": "1GB"}, TypeError, "`max_memory` must be an int, a number of bytes, got str '1GB'"),
        ({"microbatch_size": 2, "max_memory": 9}, ValueError, "give at most one of"),
    ],
)
def test_limits_that_make_no_sense(options, error, message):
    with pytest.raises(error, match=message):
        jgd.per_example_grad(lambda w, x: w * x, **options)
    with pytest.raises(error, match=message):
        jgd.descent(lambda w, x: w * x, optax.sgd(0.1), **options)


def test_limits_belong_to_reverse_mode():
    with pytest.raises(ValueError, match="belong to derivative='reverse'"):
        jgd.descent(lambda w, x: w * x, optax.sgd(0.1), derivative="forward", microbatch_size=2)


def _by_a_rule_with_branches(x):
    @jax.custom_jvp
    def f(x):
        return jnp.sin(x)

    def rule(primals, tangents):
        (x,), (dx,) = primals, tangents
        return f(x), jax.lax.cond(jnp.sum(x) > 0, lambda d: d * jnp.cos(x), lambda d: 2 * d, dx)

    f.defjvp(rule)
    return f(x)


@pytest.mark.sample(lambda options: not options)
@pytest.mark.parametrize("options", [{}, {"autotune": jgd.norms}], ids=["planned", "timed"])
def test_max_memory_where_jax_cannot_differentiate_the_sum_of_the_losses(options):
    """Each loss has a derivative, but with `vmap` inside there is none: no second backward pass."""
    loss = lambda p, x: jnp.sum(_by_a_rule_with_branches(jnp.tanh(x @ p)) ** 2)
    p, x = jnp.ones((64, 64)) / 64, jnp.sin(jnp.arange(8 * 16 * 64.0)).reshape(8, 16, 64)
    with pytest.raises(ValueError, match=r"`max_memory`=10 bytes is less than .* one example needs"):
        jgd.per_example_grad(loss, max_memory=10, **options)(p, x)
    grads = jgd.per_example_grad(loss, max_memory=60_000, **options)(p, x)
    oracle.assert_close(jgd.norms(grads), jgd.norms(jax.vmap(jax.grad(loss), (None, 0))(p, x)), 1e-5)


@pytest.mark.parametrize("options", [{}, {"strategy": "materialized"}, {"microbatch_size": 3}])
def test_the_norms_of_a_clipped_sum_come_with_it(options):
    case = problem("tied_embedding_and_head", jnp.float32)
    grads = jgd.per_example_grad(case.loss, **case.options, **options)(case.params, *case.batch)
    weights = jnp.arange(len(grads)) % 3
    clipped, norms = jgd.clipped_sum(grads, 0.5, weights=weights, return_norms=True)
    oracle.assert_close(clipped, jgd.clipped_sum(grads, 0.5, weights=weights), 1e-6)
    oracle.assert_close(norms, jgd.norms(grads), 1e-6)


def test_a_key_in_aux():
    def own(w, x):
        return jnp.sum(w * x), (jax.random.fold_in(jax.random.key(0), jnp.int32(x[0])), x[1])

    w, x = jnp.ones(3), jnp.arange(15.0).reshape(5, 3)
    whole, some = (jgd.per_example_grad(own, has_aux=True, microbatch_size=n)(w, x) for n in (None, 2))
    assert jnp.array_equal(jax.random.key_data(some.aux[0]), jax.random.key_data(whole.aux[0]))
    assert jnp.array_equal(some.aux[1], whole.aux[1])


def test_in_microbatches_they_take_no_pass_of_their_own():
    case = problem("mlp_classifier", jnp.float32)
    make = jgd.per_example_grad(case.loss, **case.options, microbatch_size=2)
    loops = lambda ask: str(jax.make_jaxpr(lambda *a: ask(make(*a)))(case.params, *case.batch)).count(
        " scan["
    )
    alone = loops(lambda grads: jgd.clipped_sum(grads, 1.0))
    assert loops(lambda grads: jgd.clipped_sum(grads, 1.0, return_norms=True)) == alone
    assert loops(lambda grads: (jgd.clipped_sum(grads, 1.0), jgd.norms(grads))) > alone


@pytest.mark.usefixtures("x64")
def test_a_gram_of_a_recurrence_in_microbatches():
    """What the pass keeps of one microbatch is collected inside the loop over the others, and stays there."""

    def rnn(p, xs):
        step = lambda h, x: (jnp.tanh(h @ p["u"] + x @ p["w"] + p["b"]), None)
        return jnp.sum(jax.lax.scan(step, jnp.zeros(4), xs)[0] ** 2)

    rng = np.random.default_rng(0)
    params = {"u": rng.normal(size=(4, 4)), "w": rng.normal(size=(3, 4)), "b": rng.normal(size=4)}
    xs, others = rng.normal(size=(6, 5, 3)), rng.normal(size=(4, 5, 3))
    of = lambda xs, **options: jgd.per_example_grad(rnn, **options)(params, xs)
    rows, columns = (oracle.matrix(jax.vmap(jax.grad(rnn), (None, 0))(params, x)) for x in (xs, others))
    for options in ({"microbatch_size": 2}, {"microbatch_size": 4, "strategy": "factored"}):
        np.testing.assert_allclose(jgd.gram(of(xs, **options)), rows @ rows.T, rtol=1e-10)
        np.testing.assert_allclose(jgd.gram(of(xs, **options), of(others)), rows @ columns.T, rtol=1e-10)


def test_a_gram_holds_no_gradients():
    """Of factors, or of microbatches; those take the lead, whichever of the two batches comes first."""
    loss = lambda p, x: jnp.sum(jnp.tanh(x @ p))
    params, xs = jnp.zeros((256, 256)), jnp.ones((32, 256))
    whole = jgd.per_example_grad(loss, strategy="factored")
    some = jgd.per_example_grad(loss, strategy="factored", microbatch_size=2)
    of_two = [lambda p, x, f=f, g=g: jgd.gram(f(p, x), g(p, x)) for f, g in ((whole, some), (some, whole))]
    for ask in (lambda p, x: jgd.gram(whole(p, x)), *of_two):
        memory = jax.jit(ask).lower(params, xs).compile().memory_analysis()
        assert memory is not None
        assert memory.temp_size_in_bytes < 4 * len(xs) * params.size / 2
