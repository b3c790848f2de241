"""Measures `jgd` against the plain gradient and `vmap(grad)` on a suite of models."""
