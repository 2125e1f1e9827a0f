"""Where parameters lie on the mesh, and how a block gets them whole.

A device keeps a part of every large parameter ('fsdp'), and of heads and hidden units
('tensor'), as `RULES` says. While a block works, it needs the first kind whole.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import PartitionSpec

from vit_jax.typing import Array, Dtype, Shape

# Where the axes of a parameter lie: the first rule whose pattern is found in the path
# counts. The state of the optimizer has its parameter's path within its own, and is
# sharded alike. What no rule names, or has other axes than its rule (Adafactor's rows
# and columns), or lengths that the devices do not divide, is split over 'fsdp' along
# the longest axis that they do divide.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r'attention/(query|key|value)/kernel', ('fsdp', 'tensor', None)),  # [D, N, H]
    (r'attention/(query|key|value)/bias', ('tensor', None)),  # [N, H]
    (r'attention/out/kernel', ('tensor', None, 'fsdp')),  # [N, H, D]
    (r'mlp/fc1/kernel', ('fsdp', 'tensor')),  # [D, F]
    (r'mlp/fc1/bias', ('tensor',)),  # [F]
    (r'mlp/fc2/kernel', ('tensor', 'fsdp')),  # [F, D]
)
# Of elements. Below, what is kept whole costs less than its messages would: norms and
# biases. Above are the columns that Adafactor keeps of a query's kernel, `[D, N]`.
MIN_SIZE = 2**11


def param_spec(path: str, shape: Shape, mesh: Mapping[str, int]) -> PartitionSpec:
    """Where a parameter of that path ('block00/mlp/fc1/kernel') and shape lies.

    Args:
      path: names of modules and the parameter, from the model or from a block.
      shape: of the parameter, or of what the optimizer keeps of it.
      mesh: sizes of the axes of the mesh.
    """
    if math.prod(shape) < MIN_SIZE:
        return PartitionSpec()
    rule = _rule(path)
    if len(rule) != len(shape):
        rule = (None,) * len(shape)

    def fits(axis: str | None, n: int) -> bool:
        return axis is not None and mesh[axis] > 1 and n % mesh[axis] == 0

    axes = [axis if fits(axis, n) else None for axis, n in zip(rule, shape)]
    if 'fsdp' not in axes:
        for i in np.argsort(shape)[::-1]:
            if axes[i] is None and fits('fsdp', shape[i]):
                axes[i] = 'fsdp'
                break
    return PartitionSpec(*axes)


def gather_params(body: Callable, module: nn.Module, dtype: Dtype) -> Callable:
    """`body(module, ...)`, which sees the parameters of `module` whole over 'fsdp'.

    When the body begins, the devices send each other their parts; where it is computed
    again in the backward pass, so is this. The gradient goes the other way: it is
    summed over the devices, and each keeps its part.

    Left to itself, XLA for TPUs may multiply activations with one part after the other,
    in a loop for each product and each gradient. These loops hold on to the activations
    of all blocks, which `nn.remat` was to be rid of.

    Args:
      body: a function of a module and other arguments, as `nn.remat` takes.
      module: the one that it will be called with.
      dtype: of the computation. The kernels that `RULES` names are sent in it: half the
        bytes in bfloat16, to which their layers would round them anyhow.

    Returns:
      `body` itself where the mesh in context has no axis 'fsdp', or none is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.shape.get('fsdp', 1) == 1 or module.is_initializing():
        return body

    def whole(path: Any, x: Array) -> Array:
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        part = param_spec(name, x.shape, mesh.shape)
        if 'fsdp' not in part:
            return x
        axes = (None if axis == 'fsdp' else axis for axis in part)
        if _rule(name):
            x = x.astype(dtype)
        # The first is where it lies, and where its gradient will: a constraint is its
        # own transpose.
        x = jax.lax.with_sharding_constraint(x, part)
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))

    def gather(variables: Any) -> Any:
        return jax.tree_util.tree_map_with_path(whole, variables)

    return nn.map_variables(body, 'params', gather)


def _rule(path: str) -> tuple[str | None, ...]:
    """The axes that `RULES` has for a parameter, or ()."""
    return next((axes for pattern, axes in RULES if re.search(pattern, path)), ())
