"""`per_example_grad` and its results under JAX's transforms."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import problem
from internals import whole as _execution
from strategies import FEW, close, every_strategy, few_cases, gradients, row, several, squared_error

import jgd

# jit, vmap, scan


@pytest.mark.sample(lambda name: name != FEW[2])
@every_strategy
@few_cases
def test_compiled_whole_gives_what_steps_outside_give(name, strategy, x64):
    case = problem(name)
    inside = jax.jit(lambda p, *b: several(jgd.per_example_grad(case.loss, strategy=strategy)(p, *b)))
    close(inside(case.params, *case.batch), several(gradients(case, strategy)))


@pytest.mark.sample(lambda name: name != FEW[2])
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


@pytest.mark.sample(lambda name: name != FEW[1])
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


@pytest.mark.sample(lambda name: name != FEW[2])
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


@pytest.mark.sample(lambda name, strategy: (name, strategy) == ("recurrence", "factored"))
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


@pytest.mark.sample(
    lambda kind, compiled: kind in ("grad", "vmap") or (kind, compiled) == ("of_float", False)
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["norm", "grad", "hessian", "jvp", "of_float", "vmap"])
def test_what_is_made_of_all_examples_together_is_made_in_compiled_programs_alone(
    kind, compiled, monkeypatch, forget
):
    """Outside of them it would be work that nobody may ask for."""
    asked, ours = [], _execution.pass_over
    spy = lambda *args, together, **options: (
        asked.append(together),
        ours(*args, together=together, **options),
    )[1]
    monkeypatch.setattr(_execution, "pass_over", spy)
    params, x = jnp.ones((2, 4, 4)), np.ones((5, 4), np.float32)
    loss = lambda w, x: jnp.sum(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0])

    def norm(params):
        return jnp.sum(jgd.norms(jgd.per_example_grad(loss, strategy="factored")(params, x)))

    scaled = jgd.per_example_grad(lambda p, x: p[1] * loss(p[0], x), strategy="factored")
    of_float = lambda scale: jnp.sum(jgd.norms(scaled((params, scale), x)))
    call, argument = {
        "norm": (norm, params),
        "grad": (jax.grad(norm), params),
        "hessian": (jax.hessian(norm), params),
        "jvp": (lambda p: jax.jvp(norm, (p,), (p,)), params),
        "of_float": (lambda p: jax.grad(of_float)(1.0), params),
        "vmap": (jax.vmap(norm), jnp.stack([params, params])),
    }[kind]
    (jax.jit if compiled else lambda f: f)(call)(argument)
    assert asked and set(asked) == {compiled}


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
