"""Every primitive that has a derivative, with a parameter meeting data in it: by which rule it goes, exact or not.

An instance of a primitive becomes a loss with one group of leaves for each *role*: an operand is a parameter and
the others are data, all but one are parameters, all are parameters and their result meets data, all are data that
a parameter scaled. `python tests/primitive_table.py` writes docs/primitives.md; `--all` asks every instance.
"""

import collections
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from cases import Problem
from catalogue import Instance
from questions import ask, compare

import jgd

EXAMPLES = 3
WEIGHTS = np.array([1.5, 0.0, 0.5])
QUANTITIES = (
    "sum",
    "norms",
    "leaf_norms",
    "gram",
    "second_moment",
    "weighted_clipped_sum",
    "dot",
    "materialize",
)

# Tried in this order, until all gradients are finite: many primitives have a derivative on a part of the line only.
# In 64 bits, so that exactness can be asked for; instances that compute with constants of 32 bits refuse that.
DOMAINS: dict[str, Callable[[Any], Any]] = {
    "as drawn": lambda x: x.astype(np.float64),
    "in (0, 1)": lambda x: 0.1 + 0.8 / (1 + np.abs(x.astype(np.float64))),
    "above 1": lambda x: 1.1 + np.abs(x.astype(np.float64)),
    "in 32 bits": lambda x: x.astype(np.float32),
}


class NoDerivative(Exception):
    """There is nothing to compare: `args[0]` says why."""


@dataclass(frozen=True)
class Answer:
    """What became of an instance in one role."""

    instance: Instance
    role: str
    rules: tuple[str, ...]  # of the rows of `jgd.explain`: "primitive: rule"
    is_zero: bool = False  # the derivative, everywhere
    error: str = ""  # empty where every quantity was exact


def is_inexact(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)


def roles_of(args: Sequence[Any]) -> dict[str, frozenset[int]]:
    """The operands that are parameters, by the name of the role."""
    inexact = [k for k, x in enumerate(args) if is_inexact(x)]
    found = {f"operand {k}": frozenset([k]) for k in inexact if len(args) > 1}
    if len(inexact) > 2:
        found |= {f"all but {k}": frozenset(inexact) - {k} for k in inexact}
    return found | {"path": frozenset(inexact), "data": frozenset()}


def problem_of(instance: Instance, names: Iterable[str] | None = None, domain: str = "as drawn") -> Problem:
    """The instance as a loss in these roles; all of them by default."""
    draws = [instance.draw(np.random.RandomState(seed)) for seed in range(EXAMPLES + 1)]
    draws = [[widened(x, DOMAINS[domain]) for x in args] for args in draws]
    first, rows = draws[0], draws[1:]
    roles = roles_of(first)
    names = list(roles if names is None else names)
    inexact = roles["path"]
    if not inexact:
        raise NoDerivative("no operand is a floating-point array")
    params = {name: {str(k): leaf_of(first[k]) for k in sorted(roles[name])} for name in names}
    if "data" in names:
        params["data"] = {str(k): np.asarray(1.1) for k in sorted(inexact)}
    # One row each: of what every draw gives anew, and of what is the same at every draw as well.
    batch = tuple(
        np.stack([row[k] for row in rows]) if is_array(first[k]) else None for k in range(len(first))
    )
    batch = tuple(x for x in batch if x is not None)
    at = [k for k in range(len(first)) if is_array(first[k])]

    def loss(params: Any, scale: Any, *example: Any) -> Any:
        data = list(first)
        for k, x in zip(at, example, strict=True):
            data[k] = x
        total = 0.0
        for name, leaves in params.items():
            args = list(first) if name == "path" else list(data)
            for k, leaf in leaves.items():
                k = int(k)
                args[k] = (
                    data[k] * leaf.astype(data[k].dtype) if name == "data" else operand_of(leaf, first[k])
                )
            total = total + reduced(instance.fun(*args), scale if name == "path" else 1.0)
        return total

    scales = np.linspace(0.5, 1.5, EXAMPLES)
    return Problem(loss, jax.tree.map(jnp.asarray, params), (jnp.asarray(scales), *map(jnp.asarray, batch)))


def is_array(x: Any) -> bool:
    return isinstance(x, np.ndarray)


def widened(x: Any, domain: Callable[[Any], Any]) -> Any:
    if not is_array(x) or not is_inexact(x):
        return x
    if np.issubdtype(x.dtype, np.complexfloating):
        return x if domain is DOMAINS["in 32 bits"] else x.astype(np.complex128)
    return np.asarray(domain(x))


def leaf_of(x: Any) -> Any:
    """A real leaf for every number: parameters are real, and two make a complex operand."""
    return np.stack([x.real, x.imag]) if np.iscomplexobj(x) else x


def operand_of(leaf: jax.Array, like: Any) -> jax.Array:
    return jax.lax.complex(leaf[0], leaf[1]) if np.iscomplexobj(like) else leaf


def reduced(outputs: Any, scale: Any) -> Any:
    """A number that depends on each element of the outputs in its own way."""
    total = jnp.zeros(())
    for x in jax.tree.leaves(outputs):
        for part in (jnp.real(x), jnp.imag(x)) if jnp.iscomplexobj(x) else (x,):
            if is_inexact(part):
                weights = np.linspace(0.5, 1.5, math.prod(part.shape)).reshape(part.shape)
                total = total + jnp.sum(jnp.sin(part.astype(float) * scale) * weights)
    return total


def finite_problem(instance: Instance) -> tuple[Problem, Any, str]:
    """The instance in the roles that JAX can differentiate, its gradients by `vmap(grad)`, and in which domain."""
    refusal = "its gradients are finite nowhere that was tried"
    for domain in DOMAINS:
        try:
            problem = problem_of(instance, domain=domain)
            blocks = oracle.vmap_of_grad(problem)
        except NoDerivative:
            raise
        except Exception as error:  # of JAX's own: one role may be what it refuses
            refusal = f"`jax.grad` of it raises {type(error).__name__}: {first_line(error)}"
            roles = [
                role for role in roles_of_instance(instance) if is_differentiable(instance, role, domain)
            ]
            if not roles:
                continue
            problem = problem_of(instance, roles, domain)
            blocks = oracle.vmap_of_grad(problem)
        if all(np.all(np.isfinite(x)) for x in jax.tree.leaves(blocks)):
            return problem, blocks, domain
    raise NoDerivative(refusal)


def roles_of_instance(instance: Instance) -> list[str]:
    return list(roles_of(instance.draw(np.random.RandomState(0))))


def is_differentiable(instance: Instance, role: str, domain: str) -> bool:
    try:
        blocks = oracle.vmap_of_grad(problem_of(instance, [role], domain))
    except Exception:  # any error of JAX's says no
        return False
    return all(np.all(np.isfinite(x)) for x in jax.tree.leaves(blocks))


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]


def tolerance_of(problem: Problem) -> float:
    """Exact to float64, but where the instance computes in less."""
    example = [x[0] for x in problem.batch]
    text = str(jax.make_jaxpr(problem.loss)(problem.params, *example))
    narrow = {
        " f32[": 1e-4,
        ":f32[": 1e-4,
        ":c64[": 1e-4,
        ":bf16[": 5e-2,
        ":f16[": 1e-2,
        "f32": 1e-4,
        "reduce_precision": 5e-2,
    }
    return max([1e-9, *(limit for word, limit in narrow.items() if word in text)])


def answers_of(
    instance: Instance, quantities: Sequence[str] = QUANTITIES, *, with_rules: bool = True
) -> list[Answer]:
    """What becomes of the instance in each role; all roles in one loss, or one by one where that fails."""
    problem, blocks, domain = finite_problem(instance)
    names = list(problem.params)
    error = error_of(problem, blocks, quantities)
    if not error:
        rules = rules_of(problem) if with_rules else collections.defaultdict(tuple)
        zero = [name for name in names if not any(np.any(x) for x in blocks[name].values())]
        return [Answer(instance, name, rules[name], name in zero) for name in names]
    found = []
    for name in names:
        single = problem_of(instance, [name], domain)
        own = error_of(single, {name: blocks[name]}, quantities)
        if own and not is_consistent(single, {name: blocks[name]}):
            continue  # an index out of bounds where JAX was promised none: nothing is defined
        found.append(Answer(instance, name, () if own else rules_of(single)[name], False, own))
    return found


def is_consistent(problem: Problem, blocks: Any) -> bool:
    """Whether JAX's derivative forward is its derivative backward."""
    direction = jax.tree.map(lambda x: np.cos(np.arange(x[0].size)).reshape(x.shape[1:]), blocks)
    forward = lambda *example: jax.jvp(lambda p: problem.loss(p, *example), (problem.params,), (direction,))[
        1
    ]
    rows = oracle.matrix(blocks) @ oracle.matrix(jax.tree.map(lambda x: x[None], direction))[0]
    return np.allclose(jax.jit(jax.vmap(forward))(*problem.batch), rows, rtol=tolerance_of(problem))


def error_of(problem: Problem, blocks: Any, quantities: Sequence[str]) -> str:
    """What is wrong with the answers: empty where nothing is."""
    norms = np.linalg.norm(oracle.matrix(blocks), axis=1)
    direction = jax.tree.map(lambda x: np.cos(np.arange(x[0].size)).reshape(x.shape[1:]), blocks)
    arguments = {"weights": WEIGHTS, "max_norm": max(0.9 * np.median(norms), 1e-3), "direction": direction}

    @jax.jit
    def answers(params, batch, arguments):
        grads = jgd.per_example_grad(problem.loss, strategy="factored")(params, *batch)
        return ask(grads, quantities, **arguments)

    want = oracle.answers(blocks, blocks, **arguments)
    try:
        compare(answers(problem.params, problem.batch, arguments), want, tolerance_of(problem))
    except AssertionError as error:
        lines = [x.strip() for x in str(error).splitlines() if x.strip()]
        return "wrong: " + " ".join(lines[:6])[:300]
    except Exception as error:
        return f"raises {type(error).__name__}: {first_line(error)}"
    return ""


def rules_of(problem: Problem) -> dict[str, tuple[str, ...]]:
    """The rules of each role's leaves."""
    found: dict[str, dict[str, None]] = collections.defaultdict(dict)
    for row in jgd.explain(problem.loss, problem.params, *problem.batch).rows:
        role = row.leaf.split("'")[1]
        found[role][f"{row.primitive}: {row.rule}"] = None
    return collections.defaultdict(tuple, {role: tuple(rows) for role, rows in found.items()})


def representative(instances: Sequence[Instance]) -> Instance:
    """The one to ask by default: of 32 bits or more, and with no axis of size 0 or 1 where there is one."""

    def penalty(instance: Instance) -> tuple[int, int, int]:
        args = instance.draw(np.random.RandomState(0))
        arrays = [x for x in args if is_array(x)]
        narrow = any(is_inexact(x) and x.dtype.itemsize < 4 for x in arrays)
        inexact = any(is_inexact(x) and not np.iscomplexobj(x) for x in arrays)
        sizes = [size for x in arrays for size in x.shape]
        return (2 * (not inexact) + narrow, sum(s == 0 for s in sizes), sum(s == 1 for s in sizes))

    return min(instances, key=penalty)


# What is known to fail, by primitive and role, and why.
EXCEPTIONS: dict[tuple[str, str], str] = {}


def cell(answers: Sequence[Answer], roles: Callable[[str], bool]) -> str:
    """What stands in the table for these roles: the rules of the primitive, and what is not exact."""
    found = [x for x in answers if roles(x.role)]
    rules = sorted({rule for x in found for rule in x.rules if not x.error})
    words = [f"`{rule}`" for rule in rules]
    if found and all(x.is_zero for x in found):
        words.append("derivative 0")
    words += sorted({f"**{x.role}: {x.error.split(':')[0]}**" for x in found if x.error})
    return ", ".join(words) or "—"


def page(chosen: dict[str, Instance], plain: Iterable[str], not_covered: dict[str, str]) -> str:
    """docs/primitives.md."""
    lines = [
        "# Every primitive that has a derivative, with a parameter meeting data in it",
        "",
        f"Made by `python tests/primitive_table.py` on JAX {jax.__version__}, out of JAX's own catalogue of instances.",
        "Each row is one instance, asked for norms, sums, Grams, second moments, weighted clipped sums, inner",
        'products and the gradients themselves with `strategy="factored"`, and compared with',
        "`jax.vmap(jax.grad(loss))` in float64. A cell holds `primitive: rule` of the places where the parameter meets",
        "data, as `jgd.explain` tells them; what is not exact is in bold. *Operand*: one operand is a parameter, or",
        "all but one are, and the others are data. *Path*: all are parameters, and the result meets data. *Data*: all",
        "are data that a parameter scaled before.",
        "",
        "| primitive | operand | path | data | exact |",
        "|---|---|---|---|---|",
    ]
    refused = {}
    for group in sorted(set(chosen) - set(plain)):
        try:
            answers = answers_of(chosen[group])
        except NoDerivative as error:
            refused[group] = str(error.args[0])
            continue
        exact = "yes" if not any(x.error for x in answers) else "**no**"
        cells = [cell(answers, lambda role: role not in ("path", "data"))]
        cells += [cell(answers, lambda role, name=name: role == name) for name in ("path", "data")]
        lines.append(f"| {group} | {' | '.join(cells)} | {exact} |")
        jax.clear_caches()
    lines += [
        "",
        "`linear_call`, `custom_vmap`, exported functions and ahead-of-time compiled ones have no row: on JAX 0.10.1",
        "`jax.vmap(jax.grad(loss))` itself refuses a parameter that meets data in them.",
    ]
    lines += ["", "## Without a row", "", "| primitive | why |", "|---|---|"]
    reasons = {
        **not_covered,
        **dict.fromkeys(plain, "it takes and gives integers, booleans or keys"),
        **refused,
    }
    lines += [f"| {name} | {why} |" for name, why in sorted(reasons.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    import test_primitive_table as table
    from instances import NOT_COVERED

    jax.config.update("jax_enable_x64", True)
    text = page(table.CHOSEN, table.PLAIN, NOT_COVERED)
    (Path(__file__).parents[1] / "docs" / "primitives.md").write_text(text)


if __name__ == "__main__":
    import conftest  # noqa: F401  (sets how XLA compiles)

    main()
