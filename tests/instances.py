"""Instances of the primitives that JAX's catalogue lacks, or has in a form that cannot be differentiated."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from catalogue import Instance
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from programs.derivatives import asks_jvp, backward_of_two


def _instance(group: str, fun: Callable[..., Any], *shapes: tuple[int, ...], name: str = "own") -> Instance:
    def draw(rng: np.random.RandomState) -> list[Any]:
        return [rng.uniform(0.4, 1.2, size=shape) for shape in shapes]

    return Instance(group, name, fun, draw)


def _complex(group: str, fun: Callable[..., Any], *shapes: tuple[int, ...]) -> Instance:
    draw = lambda rng: [rng.normal(size=shape) + 1j * rng.normal(size=shape) for shape in shapes]
    return Instance(group, "own", fun, draw)


def _scatter_mul(x: Any, y: Any) -> Any:
    return x.at[np.array([2, 0])].mul(y, unique_indices=True)


def _scan(w: Any, xs: Any) -> Any:
    return lax.scan(lambda c, x: (jnp.tanh(c @ w + x), c), jnp.zeros(w.shape[0]), xs)


def _while(x: Any) -> Any:
    # Differentiated forward only; backward where it counts, which makes it a scan.
    return lax.stop_gradient(lax.while_loop(lambda s: jnp.sum(s) < 50.0, lambda s: s * 1.5, x)) * x


def _through_a_reference(x: Any, y: Any) -> Any:
    ref = jax.new_ref(x)
    ref[...] = ref[...] * y
    ref[0] += y[0]
    return jax.freeze(ref)


def _seen(x: Any, y: Any) -> Any:
    jax.debug.callback(lambda x: None, x * y)
    return x * y


def own_instances() -> list[Instance]:
    """In the same form as the catalogue's."""
    found = [
        _instance("mul", lambda x, y: x * y, (3, 4), (3, 4)),
        _complex("conj", lambda z: jnp.conj(z) * z, (3, 4)),
        _instance("scatter_mul", _scatter_mul, (4, 3), (2, 3)),
        _instance("square", lax.square, (3, 4)),
        _instance("exp2", lax.exp2, (3, 4)),
        _instance("split", lambda x: lax.split(x, (1, 2)), (3, 4)),
        _instance("polygamma", lambda x: lax.polygamma(jnp.ones_like(x), x), (3,)),
        _instance("scan", _scan, (3, 3), (4, 3)),
        _instance("while", _while, (3,)),
        _instance("cond", lambda x, y: lax.cond(jnp.sum(x) > 2.0, jnp.multiply, jnp.add, x, y), (3,), (3,)),
        _instance("checkpoint", jax.checkpoint(lambda x, y: jnp.sin(x) * y), (3,), (3,)),
        _instance("jit", jax.jit(lambda x, y: jnp.sin(x) * y), (3,), (3,)),
        _instance("custom_jvp_call", asks_jvp, (3,), (3,)),
        _instance("custom_vjp_call", backward_of_two(), (3,), (3,)),
        _instance("name", lambda x: checkpoint_name(x, "kept"), (3,)),
        _instance("copy", jnp.copy, (3,)),
        _instance("optimization_barrier", lambda x, y: lax.optimization_barrier((x, y)), (3,), (3,)),
        _instance("pad", lambda x, y: lax.pad(x, y[0], [(1, 2, 1)]), (3,), (1,)),
        _instance("clamp", lambda low, x, high: lax.clamp(low, x, high), (3,), (3,), (3,)),
        _instance(
            "reduce_window",
            lambda x: lax.reduce_window(x, np.float64(0.5), _either, (2,), (1,), "SAME"),
            (4,),
        ),
        _instance("stack", lambda x, y: jnp.stack([x, y, x]), (3,), (3,)),
        _instance("unstack", lambda x: jnp.unstack(jnp.sin(x)), (3, 2)),
        _instance("tile", lambda x: jnp.tile(x, (2, 1)), (3, 2)),
        _instance("reduce", lambda x: lax.reduce(x, np.float64(0.5), _either, (0,)), (3, 4)),
        _instance("scatter-sub", lambda x, y: x.at[np.array([2, 2])].subtract(y), (4, 3), (2, 3)),
        _instance("composite", lax.composite(lambda x, y: jnp.sin(x) * y, "tests.product"), (3,), (3,)),
        _instance("new_ref", _through_a_reference, (3,), (3,)),
        _instance("debug_callback", _seen, (3,), (3,)),
    ]
    if hasattr(lax, "log2"):
        found.append(_instance("log2", lax.log2, (3, 4)))
    return found


def _either(x: Any, y: Any) -> Any:
    return x + y * x


# Why a primitive has no row of its own, by primitive. One that JAX adds is in neither list, and a test says so.
_INTEGERS = "it takes and gives integers, booleans or keys"
_NONE = "JAX has no derivative of it"
_MESH = "it exists inside of `shard_map` only, which tests/test_mesh.py covers"
_STATE = "it acts on references, boxes or logs inside of a function that JAX discharges"
_INTERNAL = "JAX makes it inside of its own transformations; no function of the public interface binds it"
_VMAP = "`jax.vmap` of it is not implemented, and so is `vmap(grad)`"
_EFFECT = "it calls back into Python, and has no derivative or none of its own"

NOT_COVERED: dict[str, str] = {
    **dict.fromkeys(
        ("and", "or", "xor", "not", "shift_left", "shift_right_arithmetic", "shift_right_logical", "population_count",
         "clz", "mulhi", "iota", "rng_bit_generator", "random_bits", "random_fold_in", "random_seed", "random_split",
         "random_wrap", "random_unwrap", "threefry2x32", "reduce_and", "reduce_or", "reduce_xor", "rng_uniform",
         "create_token", "after_all", "empty2", "from_edtype", "to_edtype"), _INTEGERS),
    **dict.fromkeys(
        ("igamma_grad_a", "zeta", "hessenberg", "householder_product", "schur", "tridiagonal", "select_and_scatter",
         "eq_to", "le_to", "lt_to", "ffi_call"), _NONE),
    **dict.fromkeys(
        ("all_gather", "all_gather_invariant", "all_gather_reduced", "all_to_all", "axis_index", "pbroadcast", "pmax",
         "pmin", "ppermute", "preduced", "psum", "psum_invariant", "pvary", "ragged_all_to_all", "reduce_scatter",
         "reduced_vary_cast_p", "reduced_vary_cast", "unreduced_psum", "unreduced_reduce_scatter",
         "vary_unreduced_cast_p", "vary_unreduced_cast", "pbroadcast_dynamic", "reshard", "relayout",
         "sharding_constraint", "layout_constraint", "inspect_sharding", "with_memory_space_constraint"), _MESH),
    **dict.fromkeys(
        ("accum_grad_in_ref", "empty_ref", "free_ref", "box_get", "box_set", "new_box", "new_log", "log_extend",
         "log_read", "run_state", "addupdate"), _STATE),
    **dict.fromkeys(
        ("call", "closed_call", "custom_lin", "call_hi_primitive", "check", "dce_sink", "eval_jaxpr", "remat_opt",
         "stage", "tie", "one_minus_square", "polynomial"), _INTERNAL),
    **dict.fromkeys(("ragged_dot_general", "linear_call", "custom_vmap_call"), _VMAP),
    **dict.fromkeys(("debug_print", "io_callback", "pure_callback"), _EFFECT),
}  # fmt: skip
