"""A ten-armed bandit played by ascent on the score function, with the baseline that per-example norms give.

The policy's gradient is the mean over plays of (reward - baseline) ∇ log π(action). Any baseline leaves the
mean as it is; the one of least variance weighs each reward with the squared norm of its score, ‖∇ log π‖².
"""

import jax
import jax.numpy as jnp
import optax

import jgd

ARMS, PLAYS, UPDATES = 10, 64, 300
PAYS = 2 + jnp.linspace(0, 1, ARMS)  # the mean reward of each arm; the last is best


def score(logits: jax.Array, action: jax.Array) -> jax.Array:
    """The log-probability of ONE action."""
    return jax.nn.log_softmax(logits)[action]


def objective(logits: jax.Array, action: jax.Array, reward: jax.Array, baseline: jax.Array) -> jax.Array:
    """What ONE play adds to the score-function estimate of the mean reward."""
    return (reward - baseline) * score(logits, action)


def play(key: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Actions drawn from the policy, and their noisy rewards."""
    for_actions, for_rewards = jax.random.split(key)
    actions = jax.random.categorical(for_actions, logits, shape=(PLAYS,))
    return actions, PAYS[actions] + 0.5 * jax.random.normal(for_rewards, (PLAYS,))


def best_baseline(logits: jax.Array, actions: jax.Array, rewards: jax.Array) -> jax.Array:
    """Σ ‖s_i‖² r_i / Σ ‖s_i‖², with s_i = ∇ log π(action_i)."""
    weights = jgd.norms(jgd.per_example_grad(score)(logits, actions)) ** 2
    return jnp.sum(weights * rewards) / jnp.sum(weights)


in_axes = (None, 0, 0, None)  # the baseline is shared by the plays
method = jgd.ascent(objective, optax.sgd(1.0), in_axes=in_axes)


def update(state: jgd.MethodState, key: jax.Array) -> tuple[jgd.MethodState, jax.Array]:
    """Plays once a batch, and climbs."""
    actions, rewards = play(key, state.params)
    baseline = best_baseline(state.params, actions, rewards)
    state, _ = method.step(state, actions, rewards, baseline)
    return state, rewards.mean()


start = method.init(jnp.zeros(ARMS))
keys = jax.random.split(jax.random.key(0), UPDATES)
state, rewards = jax.lax.scan(update, start, keys)
expected = jax.nn.softmax(state.params) @ PAYS
print(f"mean reward: {rewards[:10].mean():.2f} at first, {rewards[-10:].mean():.2f} after {UPDATES} updates")
print(f"the policy's expected reward is {expected:.3f}; the best arm pays {PAYS.max():.2f}")
assert expected > PAYS.max() - 0.1, expected

# What a baseline is worth, measured on a policy that has begun to prefer the better arms.
logits = 3 * (PAYS - PAYS.mean())
actions, rewards = play(jax.random.key(1), logits)
gradients = jgd.per_example_grad(objective, in_axes=in_axes)
baselines = {
    "none": jnp.zeros(()),
    "the mean reward": rewards.mean(),
    "of least variance": best_baseline(logits, actions, rewards),
}
spread = {}
for name, baseline in baselines.items():
    spread[name] = jgd.variance(gradients(logits, actions, rewards, baseline)).sum()
    print(f"baseline {name}: {baseline:.3f}; variance of one play's gradient: {spread[name]:.4f}")
assert spread["of least variance"] < spread["the mean reward"] < spread["none"] / 5
