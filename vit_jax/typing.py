"""Types, and the letters that shapes are written with.

    B  batch                      N, H  heads, size per head
    T, S  query, key length       D, F  width, MLP hidden size
    R, C  rows, columns of the token grid (T = R * C)
    V  classes

Images are `[batch, height, width, channels]`, so `H` has one meaning.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax

Array: TypeAlias = jax.Array
PRNGKey: TypeAlias = jax.Array
Dtype: TypeAlias = Any
Shape = tuple[int, ...]
Grid = tuple[int, int]  # (rows, columns) of a token grid
Variables = Mapping[str, Any]  # {'params': ..., other collections: ...}
Batch = Mapping[str, Any]  # {'image': ..., 'label': ..., 'weight': ...}
Inputs = tuple[jax.ShapeDtypeStruct, ...]  # what a model takes, for one example
Metrics = dict[str, tuple[Array, Array]]  # name -> (sum, weight)
Initializer = Callable[..., Array]
