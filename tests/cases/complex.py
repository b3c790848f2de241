"""Real parameters that meet complex activations: a gradient is the real part of what the factors give."""

import jax
import jax.numpy as jnp
from jax import lax

from cases import B, case
from cases.dense import squared


def spun(x):
    """Complex numbers made of real ones, of which none is real."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return lax.complex(jnp.sin(2 * x), 0.5 + x)


def as_complex(p):
    """A real parameter as a complex number: a cast alone."""
    return p.astype(jnp.promote_types(p.dtype, jnp.complex64))


def energy(z):
    return squared(jnp.abs(jnp.sin(z) + 0.3j * z))


@case
def complex_operand_of_a_dense_layer(draw):
    return lambda p, x: energy(jnp.fft.fft(spun(x)) @ p), draw(4, 6), (draw(B, 4),)


@case
def complex_operand_at_positions(draw):
    return lambda p, x: energy(spun(x) @ p["w"] + p["b"]), {"w": draw(4, 6), "b": draw(6)}, (draw(B, 7, 4),)


@case
def complex_cotangent_alone(draw):
    """Real data meet a parameter that was cast, and a real parameter makes a complex product of real data."""

    def loss(p, x):
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        dims = (((1,), (0,)), ((), ()))
        by_cast = lax.dot_general(wide, as_complex(p["cast"]), dims)
        by_type = lax.dot_general(wide, p["plain"], dims, preferred_element_type=by_cast.dtype)
        return energy(by_cast * (1 + 2j)) + energy(by_type * (2 - 1j))

    return loss, {"cast": draw(4, 6), "plain": draw(4, 3)}, (draw(B, 3, 4),)


@case
def cast_to_complex_through_views(draw):
    def loss(p, x):
        w = as_complex(p.transpose(2, 0, 1)).reshape(4, 15).T[:, ::-1]
        back = jnp.conj(w).real.astype(p.dtype)
        return energy(spun(x) @ w) + energy(spun(x) @ jnp.conj(w)) + squared(x @ back)

    return loss, draw(5, 3, 4), (draw(B, 15),)


@case
def complex_parameter_of_two_parts(draw):
    def loss(p, x):
        w = lax.complex(p["re"], p["im"]) if p["re"].dtype.itemsize > 2 else spun(p["re"]) + 1j * p["im"]
        return energy(spun(x) @ w) + energy(spun(x) @ jnp.conj(w)) + squared(x @ w.imag)

    return loss, {"re": draw(4, 6), "im": draw(4, 6)}, (draw(B, 3, 4),)


@case
def tied_complex_and_real_uses(draw):
    def loss(p, x):
        return energy(spun(x) @ p) + squared(jnp.tanh(x @ p)) + energy(spun(x[:, ::-1]) @ as_complex(p))

    return loss, draw(4, 6), (draw(B, 2, 4),)


@case
def tied_complex_transposed(draw):
    return lambda p, x: energy((spun(x) @ p) @ p.T) + squared(x @ p), draw(4, 6), (draw(B, 2, 4),)


@case
def complex_products_in_groups(draw):
    loss = lambda p, x: energy(jnp.einsum("tgi,goi->tgo", spun(x), p))
    return loss, draw(3, 5, 4), (draw(B, 2, 3, 4),)


@case
def complex_convolution(draw):
    def loss(p, x):
        z = spun(x)[None]
        names = {"dimension_numbers": ("NHC", "HIO", "NHC")}
        options = {"rhs_dilation": (2,), "feature_group_count": 2}
        z = lax.conv_general_dilated(z, as_complex(p["first"]), (1,), [(1, 0)], **names, **options)
        return energy(lax.conv_general_dilated(z, as_complex(p["second"]), (2,), "SAME", **names))

    return loss, {"first": draw(2, 2, 6), "second": draw(3, 6, 2)}, (draw(B, 7, 4),)


@case
def complex_lookups(draw):
    """Rows of a table that was cast, and the table as the head."""

    def loss(p, ids):
        rows = as_complex(p)[ids]
        scores = (rows * jnp.exp(1j * jnp.arange(ids.shape[0]))[:, None]) @ p.T
        return energy(0.3 * scores) + energy(lax.dynamic_index_in_dim(as_complex(p), ids[0]) * (1 + 1j))

    return loss, draw(8, 3), (draw.integers(8, B, 4),)


@case
def complex_elementwise(draw):
    def loss(p, x):
        z = spun(x) * p["scale"] + p["shift"]
        z = jnp.conj(z) / as_complex(p["divisor"]) - as_complex(p["row"])[:, None]
        return energy(z) + squared((z * p["scale"]).real) + squared(lax.complex(p["part"], z.imag).real)

    def in_one_dtype(p, x):
        p = {key: value.astype(jnp.promote_types(value.dtype, jnp.float32)) for key, value in p.items()}
        return loss(p, x)

    params = {"scale": draw(5), "shift": draw(5), "divisor": draw.uniform(5), "row": draw(3)}
    return in_one_dtype, params | {"part": draw(3, 5)}, (draw(B, 3, 5),)


@case
def complex_recurrence(draw):
    def loss(p, xs):
        w, first = as_complex(p["w"]), spun(xs[0])

        def step(h, x):
            h = h @ w + spun(x) @ p["u"] + p["b"]
            h = h / (1 + jnp.abs(h))
            return h.astype(first.dtype), h

        return energy(lax.scan(step, first, xs)[1])

    return loss, {"w": draw(4, 4), "u": draw(4, 4), "b": draw(4)}, (draw(B, 3, 4),)


@case
def complex_stacked_layers(draw):
    def loss(p, x):
        def layer(z, p):
            made = jnp.sin(z @ p["w"]) * 0.5 + z @ as_complex(p["v"])
            return made.astype(z.dtype), None

        return energy(lax.scan(layer, spun(x), p)[0])

    return loss, {"w": draw(2, 4, 4), "v": draw(2, 4, 4, scale=0.2)}, (draw(B, 6, 4),)


@case
def complex_in_branches_and_checkpoints(draw):
    def loss(p, x):
        body = jax.checkpoint(lambda z: jnp.sin(z @ p["w"]) * p["s"])
        z = lax.cond(x[0] > 0, body, lambda z: (z @ p["w"].T).astype(z.dtype)[:4] * p["s"], spun(x))
        return energy(z)

    def in_one_dtype(p, x):
        return loss(jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), p), x)

    return in_one_dtype, {"w": draw(4, 4), "s": draw(4)}, (draw(B, 4),)


@case
def diagonal_state_space(draw):
    """Poles that are computed: exp(−p + iq)."""

    def loss(p, x):
        poles = jnp.exp(-jnp.exp(p["decay"]) + 1j * p["angle"])
        powers = poles[None] ** jnp.arange(x.shape[0])[:, None]
        states = jnp.einsum("tn,tc,cn->tn", powers, spun(x), p["into"])
        return squared((states @ spun(p["out"])).real)

    return loss, {"decay": draw(5), "angle": draw(5), "into": draw(3, 5), "out": draw(5)}, (draw(B, 4, 3),)


@case
def spectral_convolution(draw):
    def loss(p, x):
        z = jnp.fft.rfft(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis=0)
        z = jnp.einsum("kc,kcd->kd", z, p["re"]) + 1j * jnp.einsum("kc,kcd->kd", z, p["im"])
        return squared(jnp.tanh(jnp.fft.irfft(z, axis=0)))

    return loss, {"re": draw(4, 2, 3), "im": draw(4, 2, 3)}, (draw(B, 6, 2),)
