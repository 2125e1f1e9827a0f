"""Pictures of attention, drawn by matplotlib's Agg canvas: no display, no state."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from vit_jax.errors import times
from vit_jax.typing import Shape

# Inches: the longer side of a panel, and what lies around panels.
_PANEL, _STRIP, _GAP = 1.9, 0.25, 0.1
_SCALE = 2.0, 0.5  # with its numbers
_DPI = 120
_MAX_PIXELS = 8_000  # of a side: the canvas is in memory


def draw_image(pixels: np.ndarray) -> Figure:
    """The image alone, each pixel a square.

    Args:
      pixels: uint8 `[h, w, c]`, c = 1 or 3.
    """
    width, height = _panel_size(pixels)
    figure = _make_figure(2 * width, 2 * height)
    axes = figure.add_axes((0, 0, 1, 1))
    _show_image(axes, pixels)
    return figure


def draw_sheet(
    pixels: np.ndarray,
    maps: np.ndarray,
    title: str,
    cell: Shape | None = None,
    grid: Shape | None = None,
) -> Figure:
    """A contact sheet: the image, beside it each head's map, and the heads' mean.

    The heat maps share one colour scale, from 0 to the largest weight of a head, so
    that panels can be compared; each panel's own largest weight stands above it.

    Args:
      pixels: uint8 `[h, w, c]`, c = 1 or 3.
      maps: `[N, R, C]`, weights of the keys, which together cover the image.
      title: of the sheet, one line or more.
      cell: (row, column) of the query that attends, which gets a frame, or None.
      grid: (rows, columns) of the queries, where there is a `cell`.
    """
    panels = name_heads(maps)
    texts = ['image', *(f'{name}max {heat.max():.2g}' for name, heat in panels)]
    columns = _columns(len(texts))
    rows = -(-len(texts) // columns)
    # Panels of narrow images stand apart, as far as the text above them needs.
    width, height = _panel_size(pixels)
    pitch = _GAP + max(width, *(_text_size(text, 8)[0] for text in texts))
    title_width, title_height = _text_size(title, 9)
    total_width = 2 * _GAP + max(columns * pitch, title_width, _SCALE[0])
    total_height = 2 * _GAP + title_height + rows * (height + _STRIP) + _SCALE[1]
    figure = _make_figure(total_width, total_height)
    _add_title(figure, title)

    def add_panel(i: int) -> Axes:
        row, column = divmod(i, columns)
        left = _GAP + column * pitch + (pitch - width) / 2
        top = _GAP + title_height + row * (height + _STRIP) + _STRIP
        axes = _add_axes(figure, left, top, width, height)
        axes.set_title(texts[i], size=8, pad=3)
        return axes

    top_weight = maps.max() or 1.0
    all_axes = [add_panel(i) for i in range(len(texts))]
    _show_image(all_axes[0], pixels)
    for axes, (_, heat) in zip(all_axes[1:], panels):
        heat_image = _show_heat(axes, pixels, heat, top_weight)
    if cell is not None and grid is not None:
        for axes in all_axes:
            _frame(axes, pixels, cell, grid)
    _add_scale(figure, heat_image, top_weight)
    return figure


def draw_token_maps(
    panels: Sequence[tuple[str, np.ndarray]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    axis_labels: tuple[str, str],
) -> Figure:
    """A sheet of heat maps between the tokens of sentences, on one colour scale.

    Args:
      panels: name and weights `[T, S]` of each; NaN where a query may not look, which
        is drawn grey.
      rows: the T tokens that attend.
      columns: the S tokens that they attend to.
      title: of the sheet, one line or more.
      axis_labels: what the rows are, and the columns.
    """
    # A cell is at least as wide as a line of text is high.
    cell = float(np.clip(_PANEL / max(len(rows), len(columns)), 0.15, 0.3))
    width, height = cell * len(columns), cell * len(rows)
    texts = [f'{name}max {np.nanmax(heat):.2g}' for name, heat in panels]
    beside, below = (
        3 * _GAP + max(_text_size(token, 7)[0] for token in tokens)
        for tokens in (rows, columns)
    )
    # What is written along a panel may be longer than its side.
    band_height = max(height, _text_size(axis_labels[0], 7)[0])
    band_width = max(width, _text_size(axis_labels[1], 7)[0])
    band_width = max(band_width, *(_text_size(text, 8)[0] for text in texts))
    pitch = beside + band_width + _GAP, _STRIP + band_height + below
    across = math.ceil(math.sqrt(len(panels) * pitch[1] / pitch[0]))  # about a square
    across = min(across, len(panels))
    title_width, title_height = _text_size(title, 9)
    total_width = 2 * _GAP + max(across * pitch[0], title_width, _SCALE[0])
    total_height = 2 * _GAP + title_height + -(-len(panels) // across) * pitch[1]
    figure = _make_figure(total_width, total_height + _SCALE[1])
    _add_title(figure, title)
    top_weight = max(np.nanmax(heat) for _, heat in panels) or 1.0
    for i, (text, (_, heat)) in enumerate(zip(texts, panels)):
        row, column = divmod(i, across)
        left = _GAP + column * pitch[0] + beside
        top = _GAP + title_height + row * pitch[1] + _STRIP
        axes = _add_axes(figure, left, top, width, height)
        axes.set_facecolor('0.85')
        heat_image = axes.imshow(
            heat, cmap='viridis', vmin=0.0, vmax=top_weight, interpolation='nearest'
        )
        # From the corner on, where text that is longer than its side has room.
        axes.set_title(text, loc='left', size=8, pad=3)
        axes.set_ylabel(axis_labels[0], loc='top', size=7, labelpad=2)
        axes.set_xlabel(axis_labels[1], loc='left', size=7, labelpad=2)
        look: dict[str, Any] = {'size': 7, 'parse_math': False}
        # By the line they stand on, as '▁' and ',' are low.
        axes.set_yticks(range(len(rows)), rows, va='center_baseline', **look)
        axes.set_xticks(range(len(columns)), columns, rotation=90, **look)
        axes.tick_params(length=0, pad=2)
    _add_scale(figure, heat_image, top_weight)
    return figure


def name_heads(maps: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """The panels of a layer: each head, and the heads' mean; one head has no name.

    Args:
      maps: `[N, ...]`.

    >>> [name for name, _ in name_heads(np.ones((2, 3, 5)))]
    ['head 0, ', 'head 1, ', 'mean, ']
    """
    if len(maps) == 1:
        return [('', maps[0])]
    heads = [(f'head {n}, ', heat) for n, heat in enumerate(maps)]
    return [*heads, ('mean, ', maps.mean(axis=0))]


def draw_non_locality(
    names: Sequence[str], values: Sequence[np.ndarray], grids: Sequence[Shape]
) -> Figure:
    """How far each layer looks: a dot per head, a line through the means.

    A cell is another length on another grid, so each grid has a line of its own.

    Args:
      names: of the layers, in their order.
      values: `[N]` per layer, in cells of its grid; N may differ.
      grids: of the layers' queries.
    """
    title = "non-locality: mean distance of attention, in cells of the layer's grid"
    below = 0.2 + max(_text_size(name, 7)[0] for name in names)
    beside = 0.8 + max(_text_size(times(grid), 7)[0] for grid in grids)
    plot_width = 0.3 * (len(names) + 1)
    total_width = max(0.6 + plot_width + beside, 2 * _GAP + _text_size(title, 9)[0])
    plot_width, plot_height = total_width - 0.6 - beside, 2.2
    total_height = 0.4 + plot_height + below
    figure = _make_figure(total_width, total_height)
    _add_title(figure, title)
    place = (0.6, below, plot_width, plot_height)
    axes = figure.add_axes(tuple(np.divide(place, 2 * (total_width, total_height))))
    for i, grid in enumerate(dict.fromkeys(grids)):
        layers = [layer for layer, other in enumerate(grids) if other == grid]
        for layer in layers:
            heads = values[layer]
            axes.plot([layer] * len(heads), heads, 'o', color=f'C{i}', alpha=0.3, ms=5)
        means = [values[layer].mean() for layer in layers]
        axes.plot(layers, means, '.-', color=f'C{i}', ms=4, label=times(grid))
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(0, 1.05 * max(map(np.max, values)) or 1.0)
    axes.set_xticks(range(len(names)), names, rotation=90, size=7)
    axes.tick_params(axis='y', labelsize=7)
    axes.set_ylabel('cells (dots: heads)', size=8)
    axes.legend(loc='upper left', bbox_to_anchor=(1, 1), fontsize=7, frameon=False)
    axes.spines[['top', 'right']].set_visible(False)
    return figure


def draw_heads(
    runs: Sequence[Mapping[int, Sequence[Sequence[float]]]], label: str
) -> Figure:
    """What each head of each layer does over training: a panel for each layer.

    Args:
      runs: step -> layer -> head -> value; runs of one model have a line each.
      label: of the values.
    """
    layers = len(next(iter(runs[0].values())))
    columns = min(layers, 4)
    rows = -(-layers // columns)
    size = (3 * columns, 0.6 + 2.2 * rows)
    figure = Figure(figsize=size, dpi=_DPI, layout='constrained')
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for layer, axes in enumerate(panels.flat):
        axes.set_visible(layer < layers)
        axes.spines[['top', 'right']].set_visible(False)
        if layer >= layers:
            continue
        axes.set_title(f'block{layer:02d}', size=10)
        for run, values in enumerate(runs):
            heads = zip(*(at_step[layer] for at_step in values.values()))
            for head, line in enumerate(heads):
                name = f'head {head}' if run == 0 else None
                axes.plot(
                    list(values), line, color=f'C{head}', lw=1, alpha=0.8, label=name
                )
    for axes in panels[:, 0]:
        axes.set_ylabel(label)
    for axes in panels.flat[max(layers - columns, 0) : layers]:
        axes.set_xlabel('updates')
    panels[0, 0].legend(fontsize=7, frameon=False)
    return figure


def _make_figure(width: float, height: float) -> Figure:
    dpi = min(_DPI, _MAX_PIXELS / max(width, height))
    figure = Figure(figsize=(width, height), dpi=dpi)
    FigureCanvasAgg(figure)
    return figure


def _add_axes(
    figure: Figure, left: float, top: float, width: float, height: float
) -> Axes:
    """Axes at a place given in inches, from the top left."""
    size = figure.get_size_inches()
    place = (left, size[1] - top - height, width, height)
    return figure.add_axes(tuple(np.divide(place, (*size, *size))))


def _add_scale(figure: Figure, heat_image: AxesImage, top_weight: float) -> None:
    """The colour scale, at the bottom left."""
    # It is as long as three numbers need, whatever the image's proportions.
    top = figure.get_size_inches()[1] - _SCALE[1]
    place = _add_axes(figure, 3 * _GAP, top, _SCALE[0] - 0.5, 0.12)
    bar = figure.colorbar(
        heat_image,
        cax=place,
        orientation='horizontal',
        ticks=[0, top_weight / 2, top_weight],
        format='{x:.2g}',
    )
    bar.ax.tick_params(labelsize=7)


def _text_size(text: str, size: float) -> tuple[float, float]:
    """(width, height) in inches."""
    drawn = _make_figure(1, 1).text(0, 0, text, size=size, parse_math=False)
    box = drawn.get_window_extent()
    return box.width / _DPI, box.height / _DPI


def _add_title(figure: Figure, title: str) -> None:
    """At the top left; a class named '$5' is no formula."""
    x, y = 1 - _GAP / figure.get_size_inches()
    figure.text(1 - x, y, title, ha='left', va='top', size=9, parse_math=False)


def _panel_size(pixels: np.ndarray) -> tuple[float, float]:
    """(width, height) in inches, in the image's proportions."""
    height, width = pixels.shape[:2]
    return _PANEL * width / max(height, width), _PANEL * height / max(height, width)


def _columns(panels: int) -> int:
    """As many as make a sheet about as wide as high, rather wider."""
    return min(panels, max(3, math.ceil(math.sqrt(panels))))


def _show_image(axes: Axes, pixels: np.ndarray) -> None:
    height, width = pixels.shape[:2]
    rgb = np.broadcast_to(pixels, (height, width, 3))
    axes.imshow(rgb, extent=(0, width, height, 0), interpolation='nearest')
    axes.set_axis_off()


def _show_heat(
    axes: Axes, pixels: np.ndarray, heat: np.ndarray, top: float
) -> AxesImage:
    """A heat map, opaque: each weight is the colour that the scale gives it."""
    height, width = pixels.shape[:2]
    axes.set_axis_off()
    return axes.imshow(
        heat,
        cmap='viridis',
        vmin=0.0,
        vmax=top,
        extent=(0, width, height, 0),
        interpolation='nearest',
    )


def _frame(axes: Axes, pixels: np.ndarray, cell: Shape, grid: Shape) -> None:
    """A frame around a cell of the grid."""
    height, width = pixels.shape[0] / grid[0], pixels.shape[1] / grid[1]
    corner = (cell[1] * width, cell[0] * height)
    axes.add_patch(
        Rectangle(corner, width, height, fill=False, edgecolor='red', lw=1.5)
    )
