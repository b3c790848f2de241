"""Least squares on real data: descent reaches the published answer, and gradients say which patients pull.

The data are scikit-learn's diabetes, its feature 2 (body mass index), the last 20 patients held out.
"""

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_diabetes

import jgd


def loss(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """Half the squared error of ONE patient."""
    return 0.5 * (params["slope"] * x + params["intercept"] - y) ** 2


features, disease = load_diabetes(return_X_y=True)
bmi, disease = jnp.asarray(features[:, 2], jnp.float32), jnp.asarray(disease, jnp.float32)
center, scale = bmi[:-20].mean(), bmi[:-20].std()
x = (bmi - center) / scale
train, test = (x[:-20], disease[:-20]), (x[-20:], disease[-20:])

method = jgd.descent(loss, optax.sgd(0.5))
start = {"slope": jnp.zeros(()), "intercept": jnp.zeros(())}
fitted = jgd.fit(method, start, train, batch_size=None, epochs=50, key=jax.random.key(0)).params

slope = fitted["slope"] / scale
errors = fitted["slope"] * test[0] + fitted["intercept"] - test[1]
mse = jnp.mean(errors**2)
r2 = 1 - mse / jnp.var(test[1])
print(f"slope {slope:.2f} (published: 938.24), test MSE {mse:.2f} (2548.07), R² {r2:.2f} (0.47)")
assert abs(slope - 938.2379) < 0.01
assert abs(mse - 2548.07) < 0.1
assert abs(r2 - 0.4726) < 1e-3

# At the minimum the gradients are not small: they cancel.
grads = jgd.per_example_grad(loss)(fitted, *train)
norms, total = jgd.norms(grads), optax.tree.norm(jgd.mean(grads))
strongest = jnp.argsort(norms)[-3:][::-1]
print(f"one patient's gradient has norm {norms.mean():.1f} on average, their mean has norm {total:.1e}")
print(f"patients {', '.join(map(str, strongest))} pull hardest, with norms {norms[strongest].round(0)}")
assert total < 1e-3 < norms.mean()
