"""What JAX writes down differently from version to version, tested with equations made by hand."""

import contextlib
import pathlib
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from internals import jaxprs

import jgd

SOURCES = sorted(pathlib.Path(jgd.__file__).parent.rglob("*.py"))


class Tree(list):
    """One group of a scan's operands, as the newer JAX holds it."""


class Groups(SimpleNamespace):
    """`ft_in` of the newer JAX."""

    def unpack(self):
        return self.consts, self.carry, self.xs


BODY = SimpleNamespace(eqns=[], invars=[], outvars=[], constvars=["c"])
COMMON = {"length": 7, "reverse": True, "unroll": 2}
SCANS = {
    "counts, closed body": {
        "num_consts": 2,
        "num_carry": 1,
        "jaxpr": SimpleNamespace(jaxpr=BODY, consts=[3.0]),
    },
    "groups, closed body": {
        "ft_in": Groups(consts=Tree("ab"), carry=Tree("c"), xs=Tree("de")),
        "jaxpr": SimpleNamespace(jaxpr=BODY, consts=[3.0]),
    },
}


@pytest.mark.parametrize("params", [pytest.param(value, id=key) for key, value in SCANS.items()])
def test_a_scan_reads_the_same_in_either_format(params):
    scan = jaxprs.scan_of(SimpleNamespace(params=params | COMMON))
    assert scan == jaxprs.Scan(BODY, [3.0], num_consts=2, num_carry=1, length=7, reverse=True, unroll=2)


def test_a_body_of_one_class_is_its_own_inside():
    body = SimpleNamespace(eqns=[], constvars=["c"], consts=[3.0])
    assert jaxprs.inner_jaxpr(body) == (body, [3.0])
    bare = SimpleNamespace(eqns=[], constvars=[])
    assert jaxprs.inner_jaxpr(bare) == (bare, [])


def test_the_scan_of_this_version_is_read():
    def loop(w, h, xs):
        return jax.lax.scan(lambda h, x: (h * w + x, h), h, xs, reverse=True, unroll=2)

    jaxpr, consts, shape = jaxprs.trace_jaxpr(loop, jnp.ones(3), jnp.ones(3), jnp.ones((5, 3)))
    (eqn,) = (e for e in jaxpr.eqns if e.primitive is jaxprs.prim.scan_p)
    scan = jaxprs.scan_of(eqn)
    assert (scan.num_consts, scan.num_carry, scan.length, scan.reverse, scan.unroll) == (1, 1, 5, True, 2)
    assert len(scan.jaxpr.invars) == 3 and scan.consts == [] and consts == []
    assert [x.shape for x in jax.tree.leaves(shape)] == [(3,), (5, 3)]


class Recorder:
    """A primitive that notes how it was bound."""

    def __init__(self, bound, multiple_results):
        self.bound, self.multiple_results = bound, multiple_results

    def get_bind_params(self, params):
        return self.bound(params)

    def bind(self, *args, **params):
        self.seen = args, params, list(ENTERED)
        return ("out", "more") if self.multiple_results else "out"


ENTERED: list[str] = []


@contextlib.contextmanager
def entered():
    ENTERED.append("context")
    yield
    ENTERED.pop()


@pytest.mark.parametrize("multiple_results", [False, True])
@pytest.mark.parametrize(
    ("bound", "functions"),
    [
        pytest.param(lambda params: dict(params), (), id="dict"),
        pytest.param(lambda params: (["fun"], dict(params)), ("fun",), id="pair of functions and dict"),
        pytest.param(lambda params: ((), dict(params)), (), id="pair of nothing and dict"),
    ],
)
def test_bind_takes_parameters_in_either_format(bound, functions, multiple_results):
    primitive = Recorder(bound, multiple_results)
    eqn = SimpleNamespace(primitive=primitive, params={"axis": 1}, ctx=SimpleNamespace(manager=entered()))
    out = jaxprs.bind(eqn, ["x", "y"])
    assert out == (["out", "more"] if multiple_results else ["out"])
    assert primitive.seen == ((*functions, "x", "y"), {"axis": 1}, ["context"])
    assert ENTERED == []


def test_mentions_looks_inside_of_either_kind_of_jaxpr():
    wanted, other = object(), object()
    leaf = SimpleNamespace(primitive=wanted, params={})
    open_body = SimpleNamespace(eqns=[leaf])
    closed = SimpleNamespace(jaxpr=open_body, consts=[])
    for params in ({"jaxpr": open_body}, {"jaxpr": closed}, {"branches": (SimpleNamespace(eqns=[]), closed)}):
        eqn = SimpleNamespace(primitive=other, params=params)
        outer = SimpleNamespace(primitive=other, params={"jaxpr": SimpleNamespace(eqns=[eqn]), "name": "f"})
        assert jaxprs.mentions(outer, wanted)
        assert not jaxprs.mentions(outer, object())


def test_evaluate_gives_back_what_a_jaxpr_passes_on():
    """Outputs may be literals, inputs, or the same variable twice."""

    def fun(x, y):
        z = jnp.sin(x)
        return z, y, 2.0, z

    jaxpr, _, _ = jaxprs.trace_jaxpr(fun, 1.0, 2.0)
    out = jaxprs.evaluate(jaxpr, dict(zip(jaxpr.invars, (0.5, 3.0), strict=True)))
    np.testing.assert_allclose(out, [np.sin(0.5), 3.0, 2.0, np.sin(0.5)], rtol=1e-6)


def test_split_is_known_by_its_primitive():
    jaxpr, _, _ = jaxprs.trace_jaxpr(lambda x: jnp.split(x, 2), jnp.ones(4))
    assert jaxprs.mentions(SimpleNamespace(primitive=None, params={"jaxpr": jaxpr}), jaxprs.split_p)


def test_one_module_alone_touches_what_jax_does_not_promise():
    assert SOURCES
    private = re.compile(r"jax\._src|from jax import .*_src")
    extend = re.compile(
        r"^\s*(?:import|from)\s+jax\.extend|from jax import .*\bextend\b|jax\.extend\.", re.MULTILINE
    )
    touching = [path.name for path in SOURCES if extend.search(path.read_text())]
    assert touching == ["jaxprs.py"]
    assert not [path.name for path in SOURCES if private.search(path.read_text())]
