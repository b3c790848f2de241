"""What makes a run the run that it is: everything that its numbers follow from, in JSON."""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from jgd._fit.data import splat
from jgd._fit.fingerprint import fingerprints
from jgd._fit.position import add_to_digest
from jgd._fit.processes import gathered_text
from jgd._fit.traced import digest_of
from jgd._methods.method import Method, MethodState
from jgd._methods.optimizers import told

Identity = dict[str, Any]

# What is known only once there is a batch: a loader gives none before it stands where the run does.
BY_BATCH = ("batch", "loss", "gradient")


def name_of(identity: Identity) -> str:
    """A name for the run, the same each time that the program is started, and no other run's."""
    known = {part: value for part, value in identity.items() if part not in BY_BATCH}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:12]


def key_identity(key: jax.Array) -> list[Any]:
    """The kind of a key and its bits."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return [str(jax.random.key_impl(key)), np.asarray(jax.random.key_data(key)).tolist()]
    return [str(jax.config.jax_default_prng_impl), np.asarray(key).tolist()]  # type: ignore


def start_identity(state: MethodState) -> dict[str, str]:
    """The contents of each leaf that a run starts from, by its path."""
    names = [keystr(path)[1:] for path, _ in tree_flatten_with_path(state)[0]]
    return dict(zip(names, fingerprints(state), strict=True))


def list_identity(batches: list[Any]) -> str:
    """A digest of the batches in memory, those of all processes."""
    digest = ""
    for element in batches:
        digest = add_to_digest(digest, element)
    return hashlib.sha256("".join(gathered_text(digest)).encode()).hexdigest()[:16]


def optimizer_identity(method: Method, state: MethodState) -> str:
    """A digest of the optimizer: what it keeps for parameters like these, and what it makes of a gradient."""

    def value_fn(params: Any) -> jax.Array:
        return sum((jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(params)), jnp.float32(0))

    def optimize(params: Any, opt_state: Any, gradient: Any, value: jax.Array) -> Any:
        extra = told(value, gradient, value_fn, lambda params, *_: params)
        return method.optimizer.init(params), method.optimizer.update(gradient, opt_state, params, **extra)

    return digest_of(optimize, state.params, state.opt_state, state.params, jnp.float32(0))


def batch_identity(method: Method, params: Any, like: Any, leaves: list[Any] | None = None) -> Identity:
    """What a batch is, and digests of the loss and of its gradient as they are traced for it.

    Args:
        method: the method.
        params: the parameters.
        like: the shapes and dtypes of a batch.
        leaves: those to trace for in the place of this one's, where batches differ in length.
    """
    own, treedef = jax.tree.flatten(like)
    if leaves is None:
        leaves = [[list(x.shape), str(x.dtype)] for x in own]
    shapes = [
        jax.ShapeDtypeStruct(tuple(shape), _dtype(dtype, x))
        for (shape, dtype), x in zip(leaves, own, strict=True)
    ]
    batch = splat(jax.tree.unflatten(treedef, shapes))
    traced = {name: digest_of(fun, params, *batch) for name, fun in method.evaluate.reference.items()}
    kinds = [f"{dtype}[{'axis ' * len(shape)}]".replace(" ]", "]") for shape, dtype in leaves]
    return {"batch": {"structure": str(treedef), "kinds": kinds, "leaves": leaves}, **traced}


def _dtype(name: str, leaf: Any) -> Any:
    return leaf.dtype if str(leaf.dtype) == name else jnp.dtype(name)
