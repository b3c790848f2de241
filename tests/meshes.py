"""Meshes of the simulated devices that conftest.py asks for, and cases spread over them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from cases import problem
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

B = 8  # of the cases' examples, on as many devices
PLACEMENTS = ("replicated", "sharded", "explicit")


def mesh_of(*shape, kind=AxisType.Auto):
    names = ("data", "model")[: len(shape)]
    return Mesh(
        np.array(jax.devices()[: math.prod(shape)]).reshape(shape), names, axis_types=(kind,) * len(shape)
    )


def is_none(x):
    return x is None


def widened(name, dtype=None):
    """The case with eight examples in the place of five, and where they lie in each array of the batch."""
    case, other = problem(name, dtype), problem(name, dtype, batch_seed=1)
    axes = jax.tree.broadcast(tuple(case.in_axes)[1:], case.batch, is_leaf=is_none)

    def join(axis, x, y):
        return (
            x
            if axis is None
            else jax.lax.slice_in_dim(jnp.concatenate([x, y], axis), 0, B, axis=axis % x.ndim)
        )

    batch = jax.tree.map(join, axes, case.batch, other.batch, is_leaf=is_none)
    return dataclasses.replace(case, batch=batch), axes


def placed(case, axes, placement):
    """The arguments of a case on a mesh: parameters on every device, or each over as many axes as divide it."""
    shape = (8,) if placement == "replicated" else (4, 2)
    mesh = mesh_of(*shape, kind=AxisType.Explicit if placement == "explicit" else AxisType.Auto)
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))

    def leaf(x):
        spec = [None] * x.ndim
        if placement != "replicated":
            for name in ("model", "data"):
                free = [
                    d
                    for d in range(x.ndim)
                    if spec[d] is None and x.shape[d] % mesh.shape[name] == 0 != x.shape[d]
                ]
                if free:
                    spec[free[-1]] = name
        return put(x, P(*spec))

    spread = lambda axis, x: put(x, spec_of(axis, x))
    return jax.tree.map(leaf, case.params), jax.tree.map(spread, axes, case.batch, is_leaf=is_none)


def spec_of(axis, x):
    """Over the mesh's first axis where the examples lie, or on every device."""
    return P() if axis is None else P(*(None,) * (axis % x.ndim), "data")
