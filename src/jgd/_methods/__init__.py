"""Descent and ascent: a derivative gives the batch's gradient, an optax transformation turns it into an update."""
