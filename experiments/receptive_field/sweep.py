"""What it costs to see as far as a distance, by convolution and by attention.

vit_jax reproduce receptive_field --workdir=/tmp/runs
"""

import pathlib
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import flax.linen as nn
import jax
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from vit_jax.experiment import Cell, Expected, Experiment, Line
from vit_jax.layers.attention import MultiHeadAttention
from vit_jax.layers.local_attention import LocalAttention
from vit_jax.results import NOT_RUN, status, table
from vit_jax.summary import count
from vit_jax.typing import Array

METHODS = {
    'stacked': 'convolutions 3x3, stacked',
    'large': 'one large convolution',
    'dilated': 'convolutions 3x3, dilated',
    'strided': 'convolutions 3x3 of stride 2',
    'windows': 'attention to 7x7 windows, stacked',
    'global': 'global attention',
}
DISTANCES = (1, 3, 7, 15, 31)  # 2^n - 1, which dilation and stride reach exactly
DEPICTED = 7
CHANNELS, GRADIENT_CHANNELS, HEADS = 64, 16, 4
WINDOW = 7


def sweep() -> Iterator[Cell]:
    """Every cell, the near ones first."""
    for distance in DISTANCES:
        for method in METHODS:
            overrides = {'method': method, 'distance': distance}
            expected = expected_reach(method, distance)
            yield Cell(f'{method}/{distance}', None, overrides, expected=expected)


def expected_reach(method: str, distance: int) -> Expected:
    """The distance, or of global attention the border of the map, one further."""
    reach = distance + (method == 'global')
    return Expected(reach, 'derived of the layers', tolerance=0.0, path=('reach',))


# --- The modules ----------------------------------------------------------------


class Stack(nn.Module):
    """Layers, one after the other.

    Nothing bends between them, and convolutions have no biases: neither changes how
    far a layer sees, nor the number of products.
    """

    layers: tuple[Callable[[], nn.Module], ...]

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x, `[B, R, C, D]`. Returns a map of D channels."""
        del train
        for layer in self.layers:
            x = layer()(x)
        return x


class GlobalAttention(nn.Module):
    """Multi-head self-attention over all positions of a map, as in ViT."""

    impl: str = 'dense'

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Args: x, `[B, R, C, D]`. Returns the same shape."""
        tokens = x.reshape(len(x), -1, x.shape[-1])
        return MultiHeadAttention(HEADS, impl=self.impl)(tokens).reshape(x.shape)


def make_stack(method: str, distance: int, channels: int, impl: str = 'dense') -> Stack:
    """What sees as far as a distance, and no further where it could.

    Args:
      method: a key of `METHODS`.
      distance: to a row or column, one of `DISTANCES`.
      channels: of the map, before and behind every layer.
      impl: of global attention, see `dot_product_attention`.
    """

    def conv(size: int = 3, stride: int = 1, dilation: int = 1):
        margin = dilation * (size // 2)
        return partial(
            nn.Conv,
            channels,
            (size, size),
            strides=stride,
            kernel_dilation=dilation,
            padding=[(margin, margin)] * 2,
            use_bias=False,
        )

    def window(size: int):
        return partial(LocalAttention, channels, num_heads=HEADS, kernel_size=size)

    octaves = range((distance + 1).bit_length() - 1)
    most = WINDOW // 2
    steps = [min(most, distance - start) for start in range(0, distance, most)]
    layers = {
        'stacked': [conv()] * distance,
        'large': [conv(2 * distance + 1)],
        'dilated': [conv(dilation=2**i) for i in octaves],
        'strided': [conv(stride=2) for _ in octaves],
        'windows': [window(2 * step + 1) for step in steps],
        'global': [partial(GlobalAttention, impl)],
    }
    return Stack(tuple(layers[method]))


# --- What is measured -------------------------------------------------------------


def measure(cell: Cell, workdir: pathlib.Path, data_dir: str | None) -> Line:
    """Its cost on a map whose borders are as far from the centre as the distance.

    And how far the gradient reaches on a map that is wider by one on each side.
    """
    del workdir, data_dir
    method, distance = cell.overrides['method'], cell.overrides['distance']
    side = 2 * distance + 1
    stack = make_stack(method, distance, CHANNELS)
    params, macs = count(stack, (side, side, CHANNELS))
    support = gradient_size(
        make_stack(method, distance, GRADIENT_CHANNELS, 'auto'), side + 2, cell.seed
    )
    away = distances_from(support.shape, np.array(support.shape) // 2)
    energy = support**2
    line = {
        'layers': len(stack.layers),
        'params': params,
        'macs': macs,
        'macs_per_position': macs / side**2,
        'reach': int(away[support > 0].max()),
        'border': distance + 1,
        'covered': float(np.mean(support[away <= distance] > 0)),
        'rms_distance': float(np.sqrt(np.sum(energy * away**2) / np.sum(energy))),
    }
    if distance == DEPICTED:
        relative = support / support.max()
        line['gradient'] = [[float(f'{x:.2e}') for x in row] for row in relative]
    return line


def gradient_size(stack: Stack, side: int, seed: int) -> np.ndarray:
    """How much each position of a map counts for the output at its centre.

    Args:
      stack: of `GRADIENT_CHANNELS`.
      side: of the map, odd.
      seed: draws parameters, input and the direction in which the output is changed.

    Returns:
      `[side, side]`, the norm over the channels of the gradient.
    """
    rngs = jax.random.split(jax.random.key(seed), 3)
    shape = (1, side, side, GRADIENT_CHANNELS)
    x = jax.random.normal(rngs[0], shape)
    direction = jax.random.normal(rngs[1], shape[-1:])
    variables = jax.jit(stack.init)(rngs[2], x)

    def centre(x: Array) -> Array:
        out = stack.apply(variables, x)
        return out[0, out.shape[1] // 2, out.shape[2] // 2] @ direction

    gradient = jax.jit(jax.grad(centre))(x)
    return np.linalg.norm(np.float64(gradient[0]), axis=-1)


def distances_from(shape: tuple[int, ...], centre: np.ndarray) -> np.ndarray:
    """To the row or the column of the centre, whichever is further, `[R, C]`."""
    rows, cols = (np.abs(np.arange(n) - c) for n, c in zip(shape, centre))
    return np.maximum(rows[:, None], cols[None, :])


# --- What is told -----------------------------------------------------------------


def render(lines: Sequence[Line]) -> str:
    """Costs by distance, and what the gradients say."""
    return f"""Reached distance, by the gradient, on a map that ends one position
further ("all": up to its border), how many of the positions within the distance count,
and whether the layers are to reach so far:

{_by_distance(lines, _describe_reach)}
Layers:

{_by_distance(lines, lambda line: f'{line["layers"]}')}
Parameters, in thousands, of maps of {CHANNELS} channels:

{_by_distance(lines, lambda line: f'{line["params"] / 1e3:,.1f}')}
Multiply-adds per position, in thousands, on a map that ends at the distance:

{_by_distance(lines, lambda line: f'{line["macs_per_position"] / 1e3:,.1f}')}
How far what counts lies before training: root mean square distance, weighted by the
squared gradient:

{_by_distance(lines, lambda line: f'{line["rms_distance"]:.2f}')}"""


def _describe_reach(line: Line) -> str:
    reach = 'all' if line['reach'] == line['border'] else f'{line["reach"]}'
    said = status([line['reach']], expected_reach(**line['overrides']))
    return f'{reach} ({line["covered"]:.0%}): {said}'


def _by_distance(lines: Sequence[Line], describe: Callable[[Line], str]) -> str:
    found = {line['cell']: describe(line) for line in lines}
    rows = [
        [title, *(found.get(f'{method}/{distance}', NOT_RUN) for distance in DISTANCES)]
        for method, title in METHODS.items()
    ]
    return table(['distance', *map(str, DISTANCES)], rows)


def draw(lines: Sequence[Line]) -> dict[str, Figure]:
    """Costs by distance; where the gradient is."""
    return {'costs.png': _draw_costs(lines), 'gradients.png': _draw_gradients(lines)}


def _draw_costs(lines: Sequence[Line]) -> Figure:
    figure = Figure(figsize=(11, 4.4), dpi=120, layout='constrained')
    panels = {
        'layers': 'layers',
        'params': f'parameters, {CHANNELS} channels',
        'macs_per_position': 'multiply-adds per position',
    }
    all_axes = figure.subplots(1, len(panels))
    for axes, (key, title) in zip(all_axes, panels.items()):
        for i, (method, label) in enumerate(METHODS.items()):
            found = [line for line in lines if line['cell'].startswith(f'{method}/')]
            distances = [line['overrides']['distance'] for line in found]
            style = 's--' if method in ('windows', 'global') else 'o-'
            values = [line[key] for line in found]
            # What lies on each other is seen by markers in each other.
            look = {'ms': 10 - 1.5 * i, 'mfc': 'none', 'lw': 1.2}
            axes.plot(distances, values, style, label=label, **look)
        axes.set_xscale('log', base=2)
        axes.set_yscale('log', base=2 if key == 'layers' else 10)
        axes.set_xticks(DISTANCES, map(str, DISTANCES))
        if key == 'layers':
            axes.yaxis.set_major_formatter('{x:.0f}')
        axes.set_xlabel('distance')
        axes.set_title(title, size=10)
        axes.spines[['top', 'right']].set_visible(False)
    handles = all_axes[0].get_legend_handles_labels()
    figure.legend(
        *handles, loc='outside lower center', ncols=3, fontsize=8, frameon=False
    )
    return figure


def _draw_gradients(lines: Sequence[Line]) -> Figure:
    """At the one distance of which they are kept."""
    figure = Figure(figsize=(12, 2.4), dpi=120, layout='constrained')
    found = {line['cell']: line for line in lines}
    scale = ScalarMappable(LogNorm(1e-4, 1.0), 'viridis')
    all_axes = figure.subplots(1, len(METHODS))
    for axes, (method, title) in zip(all_axes, METHODS.items()):
        axes.set(xticks=[], yticks=[], facecolor='0.85')
        axes.set_title(textwrap.fill(title, 18), size=8)
        if line := found.get(f'{method}/{DEPICTED}'):
            gradient = np.ma.masked_equal(line['gradient'], 0.0)
            axes.imshow(gradient, norm=scale.norm, cmap=scale.cmap)
    bar = figure.colorbar(scale, ax=all_axes, shrink=0.7, pad=0.01)
    bar.set_label('gradient, by the largest', size=8)
    bar.ax.tick_params(labelsize=7)
    return figure


EXPERIMENT = Experiment(sweep, render, draw, measure)
