"""Real parameters among complex numbers: their gradient is the real part of what the factors give.

JAX's derivative by a complex number is not conjugated, so a gradient is linear in the operand a and in the cotangent
δ, and Re(a·δ) = Re a · Re δ − Im a · Im δ. Taken apart here, where a use's factors are made, complex numbers reach
neither the rules nor anything behind them: where both are complex, the real parts are some positions and the
imaginary parts are as many more.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from jgd._engine.factors import add, concatenate
from jgd._engine.regions import Side, Value
from jgd._engine.uses import SiteData, Use


def by_real_parts(use: Use) -> Use | None:
    """A use that only sees real numbers; None where its gradient is not known to be linear in one complex operand."""
    data = [x for x in use.site.inputs if x.side == Side.DATA and _is_inexact(x)]
    complex_delta = any(map(_is_complex, use.site.outputs))
    complex_data = any(map(_is_complex, data))
    if not complex_delta and not complex_data:
        return use
    if len(data) > 1:
        return None
    factor, block, square, batch_factor = use.factor, use.block, use.square, use.batch_factor
    twice = complex_data and complex_delta
    if twice:
        square = None  # a sum of two squares is not the square of the sum
    return replace(
        use,
        positions=use.positions * (1 + twice),
        factor=lambda data: concatenate([factor(x) for x in _apart(data)]),
        block=block and (lambda data: add([block(x) for x in _apart(data)])),
        square=square and (lambda data: square(_apart(data)[0])),
        batch_factor=batch_factor
        and (lambda data, weights: concatenate([batch_factor(x, weights) for x in _apart(data)])),
    )


def _apart(data: SiteData) -> list[SiteData]:
    """The real parts and, where operand and cotangent are complex, the imaginary ones: what they make adds up."""
    real = SiteData(
        {i: jnp.real(x) if jnp.iscomplexobj(x) else x for i, x in data.values.items()},
        [jnp.real(x) if jnp.iscomplexobj(x) else x for x in data.deltas],
        {},
    )
    if not any(map(jnp.iscomplexobj, data.values.values())) or not any(map(jnp.iscomplexobj, data.deltas)):
        return [real]
    values: dict[int, jax.Array] = {
        i: -jnp.imag(x) if jnp.iscomplexobj(x) else x for i, x in data.values.items()
    }
    return [real, SiteData(values, [jnp.imag(x) for x in data.deltas], {})]


def _is_inexact(x: Value) -> bool:
    return jnp.issubdtype(x.aval.dtype, jnp.inexact)


def _is_complex(x: Value) -> bool:
    return jnp.issubdtype(x.aval.dtype, jnp.complexfloating)
