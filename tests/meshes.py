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


def widened(name, dtype=None):
    """The case with eight examples in the place of five."""
    case, other = problem(name, dtype), problem(name, dtype, batch_seed=1)
    axes = tuple(case.in_axes)[1:]
    join = lambda axis, a, b: (
        a if axis is None else jax.tree.map(lambda x, y: _first(jnp.concatenate([x, y], axis), axis), a, b)
    )
    batch = tuple(join(axis, a, b) for axis, a, b in zip(axes, case.batch, other.batch, strict=True))
    return dataclasses.replace(case, batch=batch), axes


def _first(x, axis):
    return jax.lax.slice_in_dim(x, 0, B, axis=axis)


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

    def argument(axis, x):
        if axis is None:
            return put(x, P())
        return jax.tree.map(lambda x: put(x, P(*(None,) * (axis % x.ndim), "data")), x)

    return jax.tree.map(leaf, case.params), tuple(map(argument, axes, case.batch))
