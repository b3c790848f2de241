"""Policies that learn by ascent: the score function on a bandit, REINFORCE on CartPole, and the baseline of least variance."""

from functools import partial
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
RETURN_UNIT = 100.0  # returns are hundreds of steps; in this unit the gradient's scale suits the usual rates


def bandit_objective(logits: Float[Array, "K"], arm: Array, reward: Array) -> Array:
    """Reward × log π(arm): its gradient, averaged over pulls, is the gradient of the expected reward."""
    return reward * jax.nn.log_softmax(logits)[arm]


def learn_bandit(key: jax.Array, *, updates: int, pulls: int = 64) -> np.ndarray:
    """Expected reward before the first update and after each, `(updates + 1,)`; rewards are seen with noise."""
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


def first_policy(key: jax.Array, *, width: int = 16) -> dict[str, jax.Array]:
    """A network of one hidden layer that pushes left and right about equally often."""
    inner, outer = jax.random.split(key)
    return {
        "w": 0.5 * jax.random.normal(inner, (4, width)),
        "b": jnp.zeros(width),
        "v": 0.01 * jax.random.normal(outer, (width, 2)),
    }


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


@jax.jit(static_argnums=2)
def play_many(params: Any, key: jax.Array, episodes: int) -> Episode:
    """Episodes side by side; every leaf gets a leading axis of them."""
    policy = lambda state: policy_logits(params, state)
    return jax.vmap(lambda key: cartpole.play(policy, key))(jax.random.split(key, episodes))


def returns_of(episodes: Episode) -> Float[Array, "B"]:
    """How long each pole stood, in steps: CartPole pays 1 a step."""
    return jnp.sum(episodes.alive, axis=1)


def least_variance_baseline(params: Any, episodes: Episode) -> Float[Array, ""]:
    """b = Σ ‖s_i‖² R_i / Σ ‖s_i‖², with s_i the score of episode i: it minimises the variance of s (R − b).

    Source: Greensmith, Bartlett and Baxter, "Variance reduction techniques for gradient estimates in
    reinforcement learning", 2004.
    """
    squares = jnp.square(jgd.norms(_scores(params, episodes)))
    return jnp.sum(squares * returns_of(episodes)) / jnp.sum(squares)


class Training(NamedTuple):
    """A policy, how it came there, and how well it does."""

    policies: list[Any]  # the parameters before the first update and after each
    returns: np.ndarray  # (updates, episodes), of the episodes that each update learned from
    evaluation: np.ndarray  # (100,), of new episodes under the last policy


def train_cartpole(key: jax.Array, *, updates: int = 100, episodes: int = 32) -> Training:
    """REINFORCE by `jgd.ascent`, with the baseline of least variance and Adam."""
    init_key, evaluation_key, key = jax.random.split(key, 3)
    method = jgd.ascent(reinforce_objective, optax.adam(optax.cosine_decay_schedule(0.05, updates)))
    experience = jax.jit(_experience, static_argnums=2)

    state = method.init(first_policy(init_key))
    policies, returns = [jax.tree.map(np.asarray, state.params)], []
    for update_key in jax.random.split(key, updates):
        played, advantage = experience(state.params, update_key, episodes)
        state, _ = method.step(state, played, advantage)
        policies.append(jax.tree.map(np.asarray, state.params))
        returns.append(np.asarray(returns_of(played)))
    evaluation = returns_of(play_many(state.params, evaluation_key, 100))
    return Training(policies, np.stack(returns), np.asarray(evaluation))


def _experience(params: Any, key: jax.Array, episodes: int) -> tuple[Episode, jax.Array]:
    played = play_many(params, key, episodes)
    return played, (returns_of(played) - least_variance_baseline(params, played)) / RETURN_UNIT


class Variances(NamedTuple):
    """tr Σ of one episode's gradient under three baselines, measured on episodes that chose none of them."""

    mean_return: float
    baselines: dict[str, float]
    traces: dict[str, float]
    grid: np.ndarray  # other baselines,
    grid_traces: np.ndarray  # and theirs


def gradient_variance(params: Any, key: jax.Array, *, episodes: int = 512) -> Variances:
    """Estimates the baselines on one set of episodes, and the variance of the gradient on another."""
    fitting, measuring = (play_many(params, k, episodes) for k in jax.random.split(key))
    mean_return = float(jnp.mean(returns_of(fitting)))
    baselines = {"none": 0.0, "mean return": mean_return, "least variance": float(least_variance_baseline(params, fitting))}
    grid = np.linspace(0, 2 * baselines["least variance"], 41)
    scores = jgd.materialize(_scores(params, measuring))
    trace = partial(_trace_of_covariance, scores, returns_of(measuring))
    return Variances(
        mean_return,
        baselines,
        traces={name: float(trace(b)) for name, b in baselines.items()},
        grid=grid,
        grid_traces=np.array([trace(b) for b in grid]),
    )


_scores = jgd.per_example_grad(log_likelihood)


@jax.jit
def _trace_of_covariance(scores: Any, returns: jax.Array, baseline: Any) -> jax.Array:
    advantage = (returns - baseline) / RETURN_UNIT
    grads = jax.tree.map(lambda s: s * advantage.reshape(-1, *[1] * (s.ndim - 1)), scores)
    return jgd.noise_scale(grads).trace_covariance
