"""Descent and ascent: a derivative gives the gradient of a batch, an optax transformation the update."""
