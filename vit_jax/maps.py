"""Where a model attends, read from a real forward pass.

Attention modules sow `intermediates/attention_weights` (and GPSA `gates`) when that
collection is mutable. Here these are laid out on the grid of patches or pixels, and
summed up: attention rollout, and the non-locality of ConViT.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError, times
from vit_jax.layers.patch import PatchEmbed
from vit_jax.layers.pooling import AttentionPool
from vit_jax.sown import run_and_capture
from vit_jax.typing import Array, Shape, Variables


@flax.struct.dataclass
class LayerMaps:
    """Where one layer attends.

    In a patch model queries and keys are P prefix tokens, which come first (class
    token, distillation token, registers, in this order), and the T = S cells of the
    grid. Inside a CNN P = 0, and the keys may lie on another grid than the queries.

    Attributes:
      weights: `[B, N, P + T, P + S]` float32, from queries to keys.
      gates: `[N]`, the share of position in GPSA; None in other layers.
      name: path of the module without a last 'attention', such as 'block00'; its
        second call is 'block00#2'.
      grid: lengths of the grid of queries, one to three; their product is T.
      key_grid: of the keys; their product is S.
    """

    weights: Array
    gates: Array | None
    name: str = flax.struct.field(pytree_node=False)
    grid: Shape = flax.struct.field(pytree_node=False)
    key_grid: Shape = flax.struct.field(pytree_node=False)

    @property
    def num_prefix(self) -> int:
        """P; layers differ: ConViT's class token joins after the GPSA layers."""
        return self.weights.shape[2] - math.prod(self.grid)

    @property
    def grid_weights(self) -> Array:
        """`[B, N, *grid, *key_grid]`: from cell to cell; rows sum to 1 if P = 0."""
        cells = self.weights[:, :, self.num_prefix :, self.num_prefix :]
        return cells.reshape(*cells.shape[:2], *self.grid, *self.key_grid)

    @property
    def prefix_weights(self) -> Array:
        """`[B, N, P, *key_grid]`: from the prefix tokens to the cells."""
        prefix = self.weights[:, :, : self.num_prefix, self.num_prefix :]
        return prefix.reshape(*prefix.shape[:3], *self.key_grid)

    @property
    def non_locality(self) -> Array:
        """`[B, N]`: how far the cells look, see `non_locality`."""
        return non_locality(self.grid_weights)


@flax.struct.dataclass
class AttentionMaps:
    """Where each layer of a model attends, in one forward pass.

    Attributes:
      logits: what the model returned, `[B, V]`.
      layers: the self-attention layers in the order of the calls, with distinct
        names: a module that is called twice makes two.
      rollout: attention through all layers, see `rollout`, as a layer of one head;
        None where layers attend over other grids than that of the patches.
      pool: `[B, N, *grid]`, where the query of pool='map' attends; else None.
    """

    logits: Array
    layers: tuple[LayerMaps, ...]
    rollout: LayerMaps | None
    pool: Array | None

    @property
    def by_name(self) -> dict[str, 'LayerMaps | Array']:
        """What there is to look at: the layers, 'rollout', and `[N, *grid]` 'pool'."""
        found: dict[str, LayerMaps | Array] = {x.name: x for x in self.layers}
        if self.rollout is not None:
            found['rollout'] = self.rollout
        if self.pool is not None:
            found['pool'] = self.pool[0]
        return found


def attention_maps(
    model: nn.Module, variables: Variables, images: Array
) -> AttentionMaps:
    """Runs a model as in evaluation, and returns where its layers attend.

    A pure function of variables and images: it runs under `jit` with the model
    static. Whatever its `impl`, the model forms its weights densely in this pass,
    and all of them are kept: 4 B N (P + T) (P + S) bytes a layer. For ConViT-S/16 at
    224x224 that is 17 MB an image, for eight heads on 56x56 pixels of a CNN 315 MB a
    layer. Take few images at a time.

    Tokens beside the patches are taken to come before them: tokens that a model
    appends cannot be told from these. The attention stem of SASA-ResNet-50 is not
    shown, as its weights are not sown.

    Args:
      model: an unbound module that is called as `model(images, train=False)`.
      variables: its variables.
      images: `[B, height, width, channels]`, or what else the model takes.

    Returns:
      The maps; see `AttentionMaps` and `LayerMaps`.

    Raises:
      UserError: when no module of the model sows attention weights, or they are not
        between the tokens of one `PatchEmbed`, or stacked, as by `nn.scan`; and what
        the model itself raises.

    >>> import jax
    >>> from vit_jax.models import build_model
    >>> model = build_model(
    ...     'ConViT-Ti/2', 7, width=8, depth=2, mlp_dim=16, num_local_layers=1)
    >>> images = jnp.ones((3, 4, 10, 1))
    >>> variables = jax.jit(model.init)(jax.random.key(0), images)
    >>> maps = jax.jit(attention_maps, static_argnums=0)(model, variables, images)
    >>> local, last = maps.layers
    >>> local.name, local.grid_weights.shape, local.prefix_weights.shape
    ('block00', (3, 4, 2, 5, 2, 5), (3, 4, 0, 2, 5))
    >>> last.name, last.grid_weights.shape, last.prefix_weights.shape
    ('block01', (3, 4, 2, 5, 2, 5), (3, 4, 1, 2, 5))
    >>> maps.rollout.weights.shape
    (3, 1, 11, 11)
    """
    # The output of a PatchEmbed shows the grid.
    found = run_and_capture(model, variables, images, keep=PatchEmbed)
    patches = found.kept
    of_tokens = any(call.weights.ndim == 4 for call in found.calls)
    if of_tokens and len(patches) != 1:
        raise UserError(
            f'{type(model).__name__} has {len(patches)} PatchEmbed modules; maps of '
            'tokens need one, on whose grid the tokens lie'
        )
    grid: Shape = patches[0].shape[1:-1] if of_tokens else ()

    layers, pool, through = [], None, None
    for path, name, weights, gates in found.calls:
        if isinstance(found.modules.get(path[:-1]), AttentionPool):
            cells = weights[:, :, 0, -math.prod(grid) :]
            pool = cells.reshape(*cells.shape[:2], *grid)
        else:
            layers.append(_lay_out(weights, gates, name, grid))
    if layers and all(layer.grid == layer.key_grid == grid for layer in layers):
        weights = rollout([layer.weights for layer in layers])[:, None]
        through = LayerMaps(weights, None, 'rollout', grid, grid)
    return AttentionMaps(found.out, tuple(layers), through, pool)


Query: TypeAlias = Shape | str | None  # (row, column), 'mean', or the default


class View(NamedTuple):
    """Where one query attends.

    Attributes:
      maps: `[N, R, C]`, over the keys.
      query: what attends, in words.
      cell: (row, column) of the query, where it is one cell.
      grid: (rows, columns) of the queries.
    """

    maps: Array
    query: str
    cell: Shape | None
    grid: Shape


def view(layer: LayerMaps | Array, query: Query, class_token: bool) -> View:
    """Where a query attends in the first image.

    Args:
      layer: of `AttentionMaps.by_name`; of an array, the query is the pooling one.
      query: (row, column), or 'mean' over all; None for the class token, and for the
        centre patch of a layer without.
      class_token: whether the first of the prefix tokens is one.

    Raises:
      UserError: for a query outside of the grid.
    """
    if not isinstance(layer, LayerMaps):
        return View(layer, 'the pooling query', None, layer.shape[1:])
    rows, columns = layer.grid
    if query is None and class_token and layer.num_prefix:
        return View(layer.prefix_weights[0, :, 0], 'the class token', None, layer.grid)
    weights = layer.grid_weights[0]  # [N, R, C, *key_grid]
    if isinstance(query, str):
        return View(weights.mean(axis=(1, 2)), 'all patches, mean', None, layer.grid)
    row, column = query or (rows // 2, columns // 2)
    if row >= rows or column >= columns:
        raise UserError(
            f'the query {row},{column} is outside of the {times(layer.grid)} grid of '
            f'{layer.name}; the last is {rows - 1},{columns - 1}'
        )
    words = f'patch {row},{column}'
    return View(weights[:, row, column], words, (row, column), layer.grid)


def _lay_out(
    weights: Array, gates: Array | None, name: str, patches: Shape
) -> LayerMaps:
    """A layer from what it sowed: `[B, N, T, S]` or `[B, N, *grid, *key_grid]`."""
    if weights.ndim == 4:
        *_, queries, keys = weights.shape
        if queries != keys or keys < math.prod(patches):
            raise UserError(
                f'{name} attends from {queries} to {keys} tokens; maps need attention '
                f'among the {times(patches)} patches and the tokens before them'
            )
        return LayerMaps(weights, gates, name, patches, patches)
    axes, odd = divmod(weights.ndim - 2, 2)
    if odd or not axes:
        raise UserError(
            f'the weights of {name} have rank {weights.ndim}; maps need [B, N, T, S], '
            'or [B, N, *grid, *key_grid] in a CNN, of one layer: not the stacked '
            'layers of nn.scan'
        )
    grid, key_grid = weights.shape[2 : 2 + axes], weights.shape[2 + axes :]
    flat = weights.reshape(*weights.shape[:2], math.prod(grid), math.prod(key_grid))
    return LayerMaps(flat, gates, name, grid, key_grid)


def rollout(weights: Sequence[Array]) -> Array:
    """How much each token at the end draws on each token at the start.

    "Quantifying Attention Flow in Transformers", arXiv 2005.00928, section 3: the
    mean A of a layer's heads, and the residual connection beside it, make
    0.5 A + 0.5 I; the product over layers follows the paths through all of them.
    A token that joins later stands before the others, and layers until then leave
    it as it is.

    Args:
      weights: `[B, N, T, T]` of each layer, the first layer first; N and T may
        differ.

    Returns:
      `[B, T, T]` for the largest T: row t tells what the last layer's token t is
      made of, and sums to 1.

    >>> half = jnp.array([[[[0.0, 1.0], [1.0, 0.0]]]])
    >>> rollout([half, half])
    Array([[[0.5, 0.5],
            [0.5, 0.5]]], dtype=float32)
    """
    total = max(layer.shape[-1] for layer in weights)
    flow = identity = jnp.eye(total)[None]
    for layer in weights:
        mixed = 0.5 * jnp.mean(layer, axis=1)
        mixed += 0.5 * jnp.eye(mixed.shape[-1])[None]
        mixed /= jnp.sum(mixed, axis=-1, keepdims=True)
        absent = total - mixed.shape[-1]
        step = jnp.tile(identity, (len(mixed), 1, 1))
        step = step.at[:, absent:, absent:].set(mixed)
        flow = jnp.matmul(step, flow, precision='highest')
    return flow


def non_locality(grid_weights: Array) -> Array:
    """How far the cells of a grid look on average, in cells of their grid.

    "ConViT", arXiv 2103.10697, section 4: D = (1 / T) sum_ij A_ij |delta_ij|, of
    the weights that the model forms in its forward pass. What a cell gives to
    prefix tokens counts as distance 0.

    Args:
      grid_weights: `[B, N, *grid, *key_grid]`. Where the keys' grid is another one,
        both span the same image, and distances are between centres of cells.

    Returns:
      `[B, N]`.

    >>> uniform = jnp.full((1, 1, 1, 3, 1, 3), 1 / 3)  # mean of 0, 1, 2, 1, 0, 1, ...
    >>> round(float(non_locality(uniform)[0, 0]), 4)
    0.8889
    """
    axes = grid_weights.ndim // 2 - 1
    distance = _distances(grid_weights.shape[2 : 2 + axes], grid_weights.shape[-axes:])
    weights = grid_weights.reshape(*grid_weights.shape[:2], *distance.shape)
    total = jnp.einsum('BNTS,TS->BN', weights, distance, precision='highest')
    return total / len(distance)


def _distances(grid: Shape, key_grid: Shape) -> np.ndarray:
    """From each cell to each key, `[T, S]` float32."""
    cells, keys = (np.indices(g).reshape(len(g), -1) for g in (grid, key_grid))
    centres = (keys + 0.5) * np.divide(grid, key_grid)[:, None] - 0.5
    delta = centres[:, None, :] - cells[:, :, None]
    return np.linalg.norm(delta, axis=0).astype(np.float32)
