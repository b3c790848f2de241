"""CartPole-v1 in JAX: a pole on a cart, pushed left or right; one reward for every step until it falls.

The physics, the limits and the start are those of gymnasium's CartPole-v1, after Barto, Sutton and Anderson,
"Neuronlike adaptive elements that can solve difficult learning control problems", 1983.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

GRAVITY = 9.8
CART_MASS = 1.0
POLE_MASS = 0.1
HALF_LENGTH = 0.5
FORCE = 10.0
STEP_SECONDS = 0.02
MAX_ANGLE = math.radians(12)
MAX_POSITION = 2.4
MAX_STEPS = 500
START_RANGE = 0.05


class Episode(NamedTuple):
    """One episode, padded to `MAX_STEPS`."""

    states: Float[Array, "T 4"]  # before each action: position, velocity, angle, angular velocity
    actions: Int[Array, "T"]  # 0 pushes left, 1 right
    alive: Float[Array, "T"]  # 1 where the action was taken, 0 in the padding; also the reward


def start(key: jax.Array) -> Float[Array, "4"]:
    """A state near rest, with the pole nearly upright."""
    return jax.random.uniform(key, (4,), minval=-START_RANGE, maxval=START_RANGE)


def push(state: Float[Array, "4"], action: Int[Array, ""]) -> Float[Array, "4"]:
    """The state after one step of 20 ms, by Euler's method."""
    _, velocity, angle, spin = state
    force = jnp.where(action == 1, FORCE, -FORCE)
    mass = CART_MASS + POLE_MASS
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    pushed = (force + POLE_MASS * HALF_LENGTH * spin**2 * sine) / mass
    spin_rate = (GRAVITY * sine - cosine * pushed) / (HALF_LENGTH * (4 / 3 - POLE_MASS * cosine**2 / mass))
    acceleration = pushed - POLE_MASS * HALF_LENGTH * spin_rate * cosine / mass
    return state + STEP_SECONDS * jnp.stack([velocity, acceleration, spin, spin_rate])


def stands(state: Float[Array, "4"]) -> Bool[Array, ""]:
    """Whether the pole is within 12° of upright and the cart on its track."""
    return (jnp.abs(state[0]) <= MAX_POSITION) & (jnp.abs(state[2]) <= MAX_ANGLE)


def play(policy: Callable[[Float[Array, "4"]], Float[Array, "2"]], key: jax.Array) -> Episode:
    """Plays one episode with actions drawn from the policy's logits."""
    start_key, action_key = jax.random.split(key)

    def step(carry, key):
        state, alive = carry
        action = jax.random.categorical(key, policy(state))
        after = jnp.where(alive, push(state, action), state)
        return (after, alive & stands(after)), (state, action, alive)

    first = (start(start_key), jnp.asarray(True))
    _, (states, actions, alive) = jax.lax.scan(step, first, jax.random.split(action_key, MAX_STEPS))
    return Episode(states, actions, alive.astype(jnp.float32))
