"""The rows of the global batch, however they are spread over devices.

A step is written once. Under `jit` over a mesh the batch is one global array, split
over the axes `ROW_AXES`, and most of the functions below do nothing. Under `pmap` the
same step sees one device's rows, and they speak to the other devices over the axis
named `BATCH_AXIS`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vit_jax.typing import Array, PRNGKey

BATCH_AXIS = 'batch'
ROW_AXES = ('data', 'fsdp')


def batch_axis() -> str | None:
    """`BATCH_AXIS` where the batch is mapped over devices (`pmap`), else None."""
    try:
        jax.lax.axis_index(BATCH_AXIS)
    except NameError:  # JAX's own error for an axis that is not bound
        return None
    return BATCH_AXIS


def batch_sum(tree: Any) -> Any:
    """Sums each leaf over the devices that share the batch."""
    return jax.lax.psum(tree, BATCH_AXIS) if batch_axis() else tree


def batch_mean(tree: Any) -> Any:
    """Averages each leaf over the devices that share the batch; integers stay."""
    if not batch_axis():
        return tree

    def mean(x: Array) -> Array:
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return jax.lax.pmean(x, BATCH_AXIS) if floating else x

    return jax.tree.map(mean, tree)


def keep_rows(x: Array) -> Array:
    """`x` `[B, ...]`, its rows where those of the batch are, its other axes whole.

    Where parameters are split over 'fsdp', the compiler may else move activations to
    them, and not them to the activations.
    """
    if 'fsdp' not in jax.sharding.get_abstract_mesh().axis_names:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(ROW_AXES))


def gather_rows(tree: Any) -> Any:
    """Each leaf `[B, ...]` with the rows of all devices that share the batch."""
    if not batch_axis():
        return tree
    return jax.lax.all_gather(tree, BATCH_AXIS, tiled=True)


def example_keys(rng: PRNGKey, num_rows: int) -> Array:
    """One key per row, the same for a row of the global batch on any device layout.

    Args:
      rng: one PRNG key, the same on every device.
      num_rows: rows of the batch in sight.

    Returns:
      `[num_rows]` typed keys, `fold_in(rng, row of the global batch)`.
    """
    first = jax.lax.axis_index(BATCH_AXIS) * num_rows if batch_axis() else 0
    rows = first + jnp.arange(num_rows)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, rows)
