"""A method's state as named arrays for the store, and back; with sums that tell whether they are what was saved."""

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from jgd._errors import describe
from jgd._fit.fingerprint import sums_of
from jgd._fit.history import History
from jgd._methods.method import MethodState


class Stored(NamedTuple):
    """Copies that nobody updates in place.

    Attributes:
        leaves: the state's leaves by number, those without elements left out, keys as their data.
        checksums: `(leaves, 2)`, of the same.
    """

    leaves: dict[str, jax.Array]
    checksums: jax.Array


@jax.jit
def stored(state: MethodState) -> Stored:
    """Copies of what a checkpoint holds; it waits for nothing."""
    leaves = {name: jnp.copy(leaf) for name, leaf in _named(state).items()}
    return Stored(leaves, sums_of(list(leaves.values())))


def names_of(state: MethodState) -> dict[str, str]:
    """What each leaf is, by its path: `{"params['w']": "float32[3]"}`."""
    return {keystr(path)[1:]: describe(leaf) for path, leaf in tree_flatten_with_path(state)[0]}


def targets_of(state: MethodState) -> dict[str, jax.ShapeDtypeStruct]:
    """What to read for a state like this one: it comes back where the leaves of `state` lie."""
    named = _named(state)
    return {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for k, x in named.items()}


def state_from(leaves: dict[str, jax.Array], like: MethodState) -> MethodState:
    """The state that was stored, shaped and placed like another."""

    def leaf_from(number: int, old: jax.Array) -> jax.Array:
        new = leaves.get(_name(number), old)
        if not old.committed and old.size:
            new = jnp.array(np.asarray(new))  # free to go where the other arguments are, as the old one was
        if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
            new = jax.random.wrap_key_data(new, impl=jax.random.key_impl(old))
        return new

    old, treedef = jax.tree.flatten(like)
    return jax.tree.unflatten(treedef, [leaf_from(k, x) for k, x in enumerate(old)])


def checksums_of(state: MethodState) -> list[list[int]]:
    """Sums over the bits of each leaf that is stored, the same wherever its parts lie."""
    return np.asarray(_checksums_of_state(state)).tolist()


@jax.jit
def _checksums_of_state(state: MethodState) -> jax.Array:
    return sums_of(list(_named(state).values()))


def history_checksum(history: History) -> int:
    """A sum over the bits of a history."""
    return zlib.crc32(history.grad_norm.tobytes(), zlib.crc32(history.value.tobytes()))


def _name(number: int) -> str:
    return f"{number:05}"


def _named(state: MethodState) -> dict[str, jax.Array]:
    """The leaves that the store takes: it refuses arrays without elements, and keys are data to it."""

    def data(x: jax.Array) -> jax.Array:
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return {_name(k): data(x) for k, x in enumerate(jax.tree.leaves(state)) if x.size}
