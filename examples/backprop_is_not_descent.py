"""Back-propagation computes a derivative; descent uses one. Either does without the other."""

import jax
import jax.numpy as jnp
import optax

import jgd


def loss(w, x, y):
    """Half the squared error of ONE example."""
    return 0.5 * (jnp.tanh(x @ w) - y) ** 2


def by_hand(w, x, y):
    """The value and the gradient of the mean loss on paper: nothing is differentiated here."""
    guess = jnp.tanh(x @ w)
    return jnp.mean(0.5 * (guess - y) ** 2), x.T @ ((guess - y) * (1 - guess**2)) / len(y)


x = jax.random.normal(jax.random.key(0), (100, 3))
truth = jnp.array([1.0, -2.0, 0.5])
y = jnp.tanh(x @ truth)

# Descent with four derivatives, only the first by back-propagation: the same step, the same path.
paths = {}
for derivative in ("reverse", "forward", "finite_difference", by_hand):
    method = jgd.descent(loss, optax.sgd(0.3, momentum=0.9), derivative=derivative)
    result = jgd.fit(method, jnp.zeros(3), (x, y), batch_size=None, steps=400, key=jax.random.key(1))
    paths[derivative] = result.history.value
    name = getattr(derivative, "__name__", derivative)
    print(f"{name:>17}: loss {paths[derivative][0]:.3f} → {paths[derivative][-1]:.1e}, w = {result.params}")
    assert jnp.allclose(paths[derivative], paths["reverse"], atol=1e-4)
    assert jnp.allclose(result.params, truth, atol=1e-2)

# Back-propagation without descent: how much each input of one example moves its loss. Nothing is updated.
print(f"sensitivity of one loss to its inputs: {jax.grad(loss, argnums=1)(truth / 2, x[0], y[0])}")
