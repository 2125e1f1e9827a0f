"""The commands, one a file; `vit_jax.main` lists them."""
