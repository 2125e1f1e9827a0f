"""Layers: pure functions, and thin Flax modules over them."""
