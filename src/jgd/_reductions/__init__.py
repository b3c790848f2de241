"""What may be asked of per-example gradients. Each reduction takes `PerExampleGrads` or a plain pytree."""
