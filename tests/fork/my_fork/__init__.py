"""A research fork in miniature: it adds to vit_jax without editing it."""
