"""Aggregation and transformation at once or in two steps: what the Jacobians say.

vit_jax reproduce aggregate_transform --workdir=/tmp/runs
"""

import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
from matplotlib.figure import Figure

from vit_jax.experiment import Cell, Expected, Experiment, Line
from vit_jax.layers.attention import MultiHeadAttention
from vit_jax.layers.conv import Conv
from vit_jax.layers.mlp import MlpBlock
from vit_jax.layers.psa import GPSA, PSA, psa_from_conv
from vit_jax.results import NOT_RUN, status, table, values_of
from vit_jax.typing import Array, Variables

GRID, WIDTH = (4, 5), 12
POSITIONS = math.prod(GRID)
SEEDS = (0, 1, 2, 3, 4)
TOLERANCE = 1e-5  # of the largest singular value: float32 is 1e-7
KEPT = 80  # singular values that are told


class Layer(NamedTuple):
    """What is differentiated.

    Attributes:
      title: for the table.
      module: of tokens `[B, T, D]`, or of a map if `on_map`.
      rank: the Kronecker rank that is predicted.
      on_map: whether it takes `[B, R, C, D]`.
      through_values: whether the weights of attention are held, so that the
        derivative goes through its values alone.
      make_params: (rng) -> its parameters, where they are not drawn.
    """

    title: str
    module: nn.Module
    rank: int
    on_map: bool = False
    through_values: bool = False
    make_params: Callable[[jax.Array], dict] | None = None


def _conv(size: int) -> Layer:
    """An offset, a channel map."""
    title = f'convolution {size}x{size}'
    return Layer(title, Conv(WIDTH, kernel_size=size), size**2, on_map=True)


def _attention(heads: int) -> Layer:
    """A head, a matrix of weights and a channel map."""
    title = f'attention through its values, heads: {heads}'
    return Layer(title, MultiHeadAttention(heads), heads, through_values=True)


def _whole_attention(heads: int) -> Layer:
    """Beside the values: queries and keys.

    Through its query each position has a channel map of its own; through the keys a
    head has the products of its H output directions and its H key directions.
    """
    rank = POSITIONS + heads * ((WIDTH // heads) ** 2 + 1)
    title = f'attention, its weights too, heads: {heads}'
    return Layer(title, MultiHeadAttention(heads), rank)


def _convolution_as_attention(rng: jax.Array) -> dict:
    return psa_from_conv(jax.random.normal(rng, (3, 3, WIDTH, WIDTH)))


LAYERS = {
    'conv/1x1': _conv(1),
    'conv/3x3': _conv(3),
    'conv/5x5': _conv(5),
    'attention/1': _attention(1),
    'attention/3': _attention(3),
    'attention/6': _attention(6),
    'gpsa/4': Layer(
        'GPSA through its values, heads: 4', GPSA(4, GRID), 4, through_values=True
    ),
    'psa_from_conv/3x3': Layer(
        'PSA that imitates a convolution 3x3',
        PSA(9, GRID, head_dim=WIDTH),
        9,
        make_params=_convolution_as_attention,
    ),
    # Each position has a channel map of its own.
    'mlp': Layer('MLP', MlpBlock(4 * WIDTH), POSITIONS),
    'attention/whole': _whole_attention(3),
}
DRAWN = {
    'conv/3x3': 'convolution 3x3',
    'attention/3': 'attention through its values, 3 heads',
    'mlp': 'MLP',
    'attention/whole': 'attention, its weights too',
}


def sweep() -> Iterator[Cell]:
    """Every cell."""
    for name, layer in LAYERS.items():
        for seed in SEEDS:
            yield Cell(name, None, {'layer': name}, seed, expected_rank(layer))


def expected_rank(layer: Layer) -> Expected:
    """The rank that is predicted, to the last one."""
    return Expected(layer.rank, 'derived of the layer', tolerance=0.0, path=('rank',))


# --- Jacobians --------------------------------------------------------------------


@functools.cache
def jacobian(name: str, seed: int) -> np.ndarray:
    """The derivative of a layer at a random input, with random parameters.

    Args:
      name: a key of `LAYERS`.
      seed: draws both, from a normal distribution.

    Returns:
      `[T, D, T, D]`, of the outputs (position, channel) by the inputs.
    """
    layer = LAYERS[name]
    rngs = jax.random.split(jax.random.key(seed))
    shape = (1, *GRID, WIDTH) if layer.on_map else (1, POSITIONS, WIDTH)
    x = jax.random.normal(rngs[0], shape)
    if layer.make_params:
        variables: Variables = {'params': layer.make_params(rngs[1])}
    else:
        variables = layer.module.init(rngs[1], x)

    def apply(x: Array) -> Array:
        if not layer.through_values:
            return layer.module.apply(variables, x)
        with nn.intercept_methods(hold_weights):
            return layer.module.apply(variables, x)

    with jax.default_matmul_precision('highest'):
        found = jax.jit(jax.jacobian(apply))(x)
    return np.float64(found).reshape(POSITIONS, WIDTH, POSITIONS, WIDTH)


def hold_weights(call, args, kwargs, context):
    """Makes queries and keys constants, and with them the weights of attention."""
    out = call(*args, **kwargs)
    return (
        jax.lax.stop_gradient(out) if context.module.name in ('query', 'key') else out
    )


def kronecker_values(jacobian: np.ndarray) -> np.ndarray:
    """The singular values of a Jacobian as a sum of (positions) x (channels).

    A sum of n Kronecker products of a matrix over positions and one over channels is,
    with its entries rearranged to a row for each pair of positions and a column for
    each pair of channels, a matrix of rank n: C. F. Van Loan and N. Pitsianis,
    "Approximation with Kronecker products", in Linear Algebra for Large Scale and
    Real-Time Applications, 1993.

    Args:
      jacobian: `[T, D, S, E]`.

    Returns:
      `[min(T S, D E)]`, the largest first.
    """
    rows, out, cols, inner = jacobian.shape
    by_pair = jacobian.transpose(0, 2, 1, 3).reshape(rows * cols, out * inner)
    return np.linalg.svd(by_pair, compute_uv=False)


def share_off_diagonal(jacobian: np.ndarray) -> float:
    """The share of squared entries between different positions, `[T, D, T, D]`."""
    energy = np.sum(jacobian**2, axis=(1, 3))
    between = ~np.eye(len(energy), dtype=bool)
    return float(np.sum(energy[between]) / np.sum(energy))


def measure(cell: Cell, workdir: pathlib.Path, data_dir: str | None) -> Line:
    """The Kronecker rank, the values around it, and how much is between positions."""
    del workdir, data_dir
    found = jacobian(cell.overrides['layer'], cell.seed)
    values = kronecker_values(found)
    values = values / values[0]
    rank = int(np.sum(values > TOLERANCE))
    return {
        'rank': rank,
        'last': float(values[rank - 1]),
        'next': float(values[rank]) if rank < len(values) else 0.0,
        'between_positions': share_off_diagonal(found),
        'values': [float(f'{value:.2e}') for value in values[:KEPT]],
    }


# --- What is told -----------------------------------------------------------------


def render(lines: Sequence[Line]) -> str:
    """Ranks, and how sure they are."""
    rows = []
    for name, layer in LAYERS.items():
        ranks = values_of(lines, name, 'rank')
        if not ranks:
            rows.append([layer.title, str(layer.rank), *[NOT_RUN] * 5])
            continue
        said = {status([rank], expected_rank(layer)) for rank in ranks}
        between = values_of(lines, name, 'between_positions')
        rows.append(
            [
                layer.title,
                str(layer.rank),
                ', '.join(map(str, sorted(set(ranks)))),
                ', '.join(sorted(said)),
                f'{min(values_of(lines, name, "last")):.1e}',
                f'{max(values_of(lines, name, "next")):.1e}',
                f'{min(between):.2f} to {max(between):.2f}' if max(between) else '0',
            ]
        )
    header = ['layer', 'rank predicted', 'rank', 'status', 'last value', 'next value']
    return f"""Kronecker rank of the Jacobian: {POSITIONS} positions, {WIDTH} channels,
{len(SEEDS)} seeds. Last value: the smallest singular value that counts; next: the
largest that does not; both by the largest of all, and {TOLERANCE:g} lies between them.
Between positions: the share of the squared Jacobian.

{table([*header, 'between positions'], rows)}"""


def draw(lines: Sequence[Line]) -> dict[str, Figure]:
    """The Jacobians of one seed; singular values of all."""
    figure = Figure(figsize=(12, 5.2), dpi=120, layout='constrained')
    axes = figure.subplots(2, len(DRAWN), height_ratios=(2, 1))
    for (top, bottom), (name, title) in zip(axes.T, DRAWN.items()):
        matrix = jacobian(name, SEEDS[0]).reshape((POSITIONS * WIDTH,) * 2)
        bound = np.quantile(np.abs(matrix[matrix != 0]), 0.95)
        top.imshow(
            matrix, cmap='RdBu', vmin=-bound, vmax=bound, interpolation='nearest'
        )
        top.set(xticks=[], yticks=[])
        top.set_title(title, size=10)
        for values in values_of(lines, name, 'values'):
            shown = np.maximum(values, 1e-9)
            bottom.plot(range(1, len(shown) + 1), shown, '.-', ms=4, lw=0.6)
        bottom.axhline(TOLERANCE, color='0.6', lw=0.8)
        bottom.set_yscale('log')
        bottom.set_ylim(5e-10, 2)
        bottom.set_xlabel('singular value of the rearranged Jacobian', size=8)
        bottom.spines[['top', 'right']].set_visible(False)
    axes[0, 0].set_ylabel('outputs, position by position')
    axes[0, 0].set_xlabel('inputs')
    axes[1, 0].set_ylabel('by the largest')
    return {'picture.png': figure}


EXPERIMENT = Experiment(sweep, render, draw, measure)
