"""Losses that solve: JAX's linear solves, and differential, nonlinear and linear solvers of other libraries."""

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optimistix
import pytest
from test_custom_derivatives import assert_as_vmap_of_grad

pytestmark = pytest.mark.usefixtures("x64")

rng = np.random.default_rng(0)
POINTS = rng.normal(size=(3, 4))
MATRIX = 4 * np.eye(4) + rng.normal(size=(4, 4)) / 4
SYMMETRIC = MATRIX + MATRIX.T


# Linear


def with_a_trained_preconditioner(p, x):
    solve = lambda matvec, b: b * p["m"]
    return jnp.sum(jax.lax.custom_linear_solve(lambda v: p["a"] * v, x, solve, symmetric=True) ** 2)


def with_matrix_and_transpose(a, x):
    transposed = a.T
    return jnp.sum(
        jax.lax.custom_linear_solve(
            lambda v: a @ v,
            x,
            lambda _, b: jnp.linalg.solve(a, b),
            transpose_solve=lambda _, b: jnp.linalg.solve(transposed, b),
        )
        ** 2
    )


def by_lineax(solver, *tags):
    return lambda a, x: jnp.sum(
        lineax.linear_solve(lineax.MatrixLinearOperator(a, *tags), jnp.tanh(a @ x), solver).value ** 2
    )


LINEAR = {
    "preconditioner": (with_a_trained_preconditioner, {"a": 1 + rng.random(4), "m": 1 + rng.random(4)}),
    "transpose": (with_matrix_and_transpose, MATRIX),
    "solve": (lambda a, x: jnp.sum(jnp.linalg.solve(a, x) ** 2), MATRIX),
    "cg": (lambda a, x: jnp.sum(jax.scipy.sparse.linalg.cg(lambda v: a @ v, x)[0] ** 2), SYMMETRIC),
    "lineax LU": (by_lineax(lineax.LU()), MATRIX),
    "lineax QR": (by_lineax(lineax.QR()), MATRIX),
    "lineax CG": (by_lineax(lineax.CG(1e-10, 1e-10), lineax.positive_semidefinite_tag), SYMMETRIC),
    "lineax GMRES": (by_lineax(lineax.GMRES(1e-10, 1e-10)), MATRIX),
}
ITERATIVE = ("cg", "lineax CG", "lineax GMRES")  # which end at a tolerance of their own


@pytest.mark.sample(lambda name: name in ("preconditioner", "transpose", "cg", "lineax LU"))
@pytest.mark.parametrize("name", LINEAR)
def test_linear_solves(name):
    assert_as_vmap_of_grad(*LINEAR[name], (POINTS,), tolerance=1e-5 if name in ITERATIVE else 1e-11)


# Differential and nonlinear

ADJOINTS = {
    "checkpointed": diffrax.RecursiveCheckpointAdjoint(),
    "direct": diffrax.DirectAdjoint(),
    "backsolve": diffrax.BacksolveAdjoint(),
    "implicit": diffrax.ImplicitAdjoint(),
}
NET = {"a": rng.normal(size=(4, 5)) / 2, "b": rng.normal(size=(5, 4)) / 2}


# The loops of the others, and implicit derivatives, are asked of below.
@pytest.mark.sample(lambda adjoint: adjoint == "backsolve")
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_neural_differential_equations(adjoint):
    def loss(p, y):
        field = diffrax.ODETerm(lambda t, y, p: jnp.tanh(y @ p["a"]) @ p["b"])
        y = jnp.tanh(y @ p["b"].T @ p["a"].T)  # ordinary sites before and behind
        made = diffrax.diffeqsolve(
            field, diffrax.Tsit5(), 0.0, 1.0, 0.25, y, p, max_steps=4, adjoint=ADJOINTS[adjoint]
        )
        return jnp.sum((made.ys[-1] @ p["a"]) ** 2)

    assert_as_vmap_of_grad(loss, NET, (POINTS,))


@pytest.mark.parametrize("kind", ["checkpointed", "bounded"])
def test_loops_of_equinox(kind):
    def loss(p, x):
        step = lambda c: (c[0] + 1, jnp.sin(c[1] * p))
        return eqxi.while_loop(lambda c: c[0] < 3, step, (0, x), max_steps=8, kind=kind)[1].sum()

    assert_as_vmap_of_grad(loss, np.array(0.7), (POINTS,))


@pytest.mark.sample(
    lambda solver, adjoint: (
        (solver, type(adjoint))
        in (("newton", optimistix.ImplicitAdjoint), ("fixed point", optimistix.RecursiveCheckpointAdjoint))
    )
)
@pytest.mark.parametrize("adjoint", [optimistix.ImplicitAdjoint(), optimistix.RecursiveCheckpointAdjoint()])
@pytest.mark.parametrize("solver", ["newton", "fixed point", "least squares", "minimise"])
def test_nonlinear_solvers(solver, adjoint):
    def loss(p, x):
        if solver == "newton":
            made = optimistix.root_find(
                lambda y, p: y + 0.1 * jnp.tanh(p["a"].T @ y @ p["b"]).sum() - x,
                optimistix.Newton(1e-10, 1e-10), x, p, adjoint=adjoint,
            )  # fmt: skip
        elif solver == "fixed point":
            made = optimistix.fixed_point(
                lambda y, p: 0.1 * jnp.tanh(y @ p["a"]) @ p["b"] + x,
                optimistix.FixedPointIteration(1e-10, 1e-10), x, p, adjoint=adjoint,
            )  # fmt: skip
        elif solver == "least squares":
            made = optimistix.least_squares(
                lambda y, p: jnp.concatenate([y - x, 0.1 * y @ p["a"]]),
                optimistix.LevenbergMarquardt(1e-10, 1e-10), x, p, adjoint=adjoint,
            )  # fmt: skip
        else:
            made = optimistix.minimise(
                lambda y, p: jnp.sum((y - x) ** 2) + 0.1 * jnp.sum((y @ p["a"]) ** 2),
                optimistix.BFGS(1e-10, 1e-10), x, p, adjoint=adjoint,
            )  # fmt: skip
        return jnp.sum(jnp.sin(made.value @ p["a"]))

    p = {"a": NET["a"][:, :1], "b": np.ones(1)} if solver == "newton" else NET
    assert_as_vmap_of_grad(loss, p, (POINTS,), tolerance=1e-6)


def test_custom_derivatives_of_equinox():
    @eqx.filter_custom_vjp
    def halves(inputs, scale):
        w, x = inputs
        return jnp.tanh(x @ w) * scale

    @halves.def_fwd
    def halves_fwd(perturbed, inputs, scale):
        del perturbed
        return halves.fn(inputs, scale) if hasattr(halves, "fn") else jnp.tanh(
            inputs[1] @ inputs[0]
        ) * scale, None

    @halves.def_bwd
    def halves_bwd(residuals, g, perturbed, inputs, scale):
        del residuals
        w, x = inputs
        _, pull = jax.vjp(lambda w, x: jnp.tanh(x @ w) * scale, w, x)
        given = pull(jnp.clip(g, -0.1, 0.1))
        number = sum(map(bool, jax.tree.leaves(perturbed)))
        return tuple(number * x for x in given)

    @eqx.filter_custom_jvp
    def counted(w, x):
        return w * x

    @counted.def_jvp
    def counted_jvp(primals, tangents):
        (w, x), (tw, tx) = primals, tangents
        moves = [t is not None for t in tangents]
        out = sum(t * y for t, y in ((tw, x), (tx, w)) if t is not None)
        return w * x, out * (1 + sum(moves))

    def loss(w, x):
        h = halves((w, x), 0.5)
        return jnp.sum(jnp.sin(halves((w, h), 2.0))) + jnp.sum(counted(w[0], x)) + jnp.sum(counted(w[1], h))

    assert_as_vmap_of_grad(loss, MATRIX, (POINTS,))
