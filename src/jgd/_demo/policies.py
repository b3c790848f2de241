"""Policies that learn by ascent: the score function on a bandit, REINFORCE on CartPole, and the baseline "
"of least variance."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import jgd
from jgd._demo import cartpole
from jgd._demo.cartpole import Episode

ARMS = np.array([0.1, 0.9, 0.4, 1.5, 0.7, 1.1, 0.2, 2.0, 1.6, 0.5], np.float32)  # mean rewards of the bandit
REWARD_NOISE = 1.0
SIDE_BY_SIDE = 32  # episodes
RETURN_UNIT = 100.0  # returns are hundreds of steps; in this unit the gradient's scale suits the usual rates


def bandit_objective(logits: Float[Array, "K"], arm: Array, reward: Array) -> Array:
    """Reward × log π(arm): its gradient, averaged over pulls, is the gradient of the expected reward."""
    return reward * jax.nn.log_softmax(logits)[arm]


def learn_bandit(key: jax.Array, *, updates: int, pulls: int = 64) -> np.ndarray:
    """Expected reward before the first update and after each, `(updates + 1,)`; rewards are seen with "
    "noise."""
    method = jgd.ascent(bandit_objective, optax.sgd(0.4))

    def update(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        arm_key, noise_key = jax.random.split(key)
        arms = jax.random.categorical(arm_key, state.params, shape=(pulls,))
        rewards = jnp.asarray(ARMS)[arms] + REWARD_NOISE * jax.random.normal(noise_key, (pulls,))
        after, _ = method.step(state, arms, rewards - jnp.mean(rewards))
        return after, jax.nn.softmax(after.params) @ ARMS

    start = method.init(jnp.zeros(len(ARMS)))
    _, expected = jax.lax.scan(update, start, jax.random.split(key, updates))
    return np.concatenate([[ARMS.mean()], expected])


def first_policy(seed: int, *, width: int = 16) -> dict[str, np.ndarray]:
    """A network of one hidden layer that pushes left and right about equally often."""
    rng = np.random.default_rng(seed)
    params = {
        "w": 0.5 * rng.normal(size=(4, width)),
        "b": np.zeros(width),
        "v": 0.01 * rng.normal(size=(width, 2)),
    }
    return {name: p.astype(np.float32) for name, p in params.items()}


def policy_logits(params: Any, state: Float[Array, "*T 4"]) -> Float[Array, "*T 2"]:
    """Unnormalised log-probabilities of a push to the left and to the right."""
    return jnp.tanh(state @ params["w"] + params["b"]) @ params["v"]


def log_likelihood(params: Any, episode: Episode) -> Float[Array, ""]:
    """log π of the actions of ONE episode; its gradient is the episode's score."""
    log_probs = jax.nn.log_softmax(policy_logits(params, episode.states))
    taken = jnp.take_along_axis(log_probs, episode.actions[:, None], axis=1)[:, 0]
    return jnp.sum(episode.alive * taken)


def reinforce_objective(params: Any, episode: Episode, advantage: Float[Array, ""]) -> Float[Array, ""]:
    """(Return − baseline) × log π: what REINFORCE ascends, one episode being one example."""
    return advantage * log_likelihood(params, episode)


def play_many(params: Any, key: jax.Array, episodes: int) -> Episode:
    """Plays episodes, `SIDE_BY_SIDE` at a time so that one program serves any number; leaves get an axis "
    "of them."""
    rounds = -(-episodes // SIDE_BY_SIDE)
    played = jax.device_get([_play(params, key, round) for round in range(rounds)])
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:episodes], *played)


@jax.jit
def _play(params: Any, key: jax.Array, round: int | jax.Array) -> Episode:
    keys = jax.random.split(jax.random.fold_in(key, round), SIDE_BY_SIDE)
    return jax.vmap(lambda key: cartpole.play(lambda state: policy_logits(params, state), key))(keys)


def returns_of(episodes: Episode) -> Float[np.ndarray, "B"]:
    """How long each pole stood, in steps: CartPole pays 1 a step."""
    return np.sum(episodes.alive, axis=1)


scores = jgd.per_example_grad(log_likelihood)  # of each episode


def least_variance_baseline(score_norms: Float[Array, "B"], returns: Float[np.ndarray, "B"]) -> float:
    """b = Σ ‖s_i‖² R_i / Σ ‖s_i‖², with s_i the score of episode i: it minimises the variance of s (R − b).

    Source: Greensmith, Bartlett and Baxter, "Variance reduction techniques for gradient estimates in
    reinforcement learning", 2004.
    """
    squares = np.square(score_norms, dtype=np.float64)
    return float(np.sum(squares * returns) / np.sum(squares))


class Training(NamedTuple):
    """A policy, how it came there, and how well it does."""

    policies: list[Any]  # the parameters before the first update and after each
    returns: np.ndarray  # (updates, episodes), of the episodes that each update learned from
    evaluation: np.ndarray  # (100,), of new episodes under the last policy


def train_cartpole(seed: int, *, updates: int = 100, episodes: int = SIDE_BY_SIDE) -> Training:
    """REINFORCE by `jgd.ascent`, with the baseline of least variance and Adam."""
    key = jax.random.key(seed)
    method = jgd.ascent(reinforce_objective, optax.adam(optax.cosine_decay_schedule(0.05, updates)))
    state = method.init(first_policy(seed))
    policies, returns = [jax.device_get(state.params)], []
    for update in range(updates):
        played = play_many(state.params, jax.random.fold_in(key, update), episodes)
        returns.append(returns_of(played))
        baseline = least_variance_baseline(jgd.norms(scores(state.params, played)), returns[-1])
        state, _ = method.step(state, played, (returns[-1] - baseline) / RETURN_UNIT)
        policies.append(jax.device_get(state.params))
    evaluation = returns_of(play_many(state.params, jax.random.fold_in(key, updates), 100))
    return Training(policies, np.stack(returns), evaluation)
