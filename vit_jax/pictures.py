"""Pictures of attention, drawn by matplotlib's Agg canvas: no display, no state."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from vit_jax.typing import Shape

# Inches: the longer side of a panel, and what lies around panels.
_PANEL, _STRIP, _GAP, _MARGIN = 1.9, 0.25, 0.1, 0.55
_DPI = 120


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
    image_title: str = '',
    cell: Shape | None = None,
    grid: Shape | None = None,
) -> Figure:
    """A contact sheet: the image, each head's map over it, and the heads' mean.

    The heat maps share one colour scale, from 0 to the largest weight of a head, so
    that panels can be compared; each panel's own largest weight stands above it.

    Args:
      pixels: uint8 `[h, w, c]`, c = 1 or 3.
      maps: `[N, R, C]`, weights of the keys, which together cover the image.
      title: of the sheet.
      image_title: of the image's panel.
      cell: (row, column) of the query that attends, which gets a frame, or None.
      grid: (rows, columns) of the queries, where there is a `cell`.
    """
    panels = [(f'head {n}, ', heat) for n, heat in enumerate(maps)]
    if len(maps) > 1:
        panels.append(('mean, ', maps.mean(axis=0)))
    else:
        panels = [('', maps[0])]
    columns = _columns(1 + len(panels))
    rows = -(-(1 + len(panels)) // columns)
    # A strip for the title and above each panel; a margin for the colour scale.
    width, height = _panel_size(pixels)
    total_width = columns * (width + _GAP) + _GAP + _MARGIN
    total_height = _STRIP + rows * (height + _STRIP) + _GAP
    figure = _make_figure(total_width, total_height)
    corner = _GAP / total_width, 1 - _GAP / total_height
    figure.suptitle(title, x=corner[0], y=corner[1], ha='left', va='top', size=9)

    def add_axes(left: float, top: float, width: float, height: float) -> Axes:
        """Axes at a place given in inches, from the top left."""
        place = (left, total_height - top - height, width, height)
        return figure.add_axes(tuple(np.divide(place, 2 * (total_width, total_height))))

    def add_panel(i: int, text: str) -> Axes:
        row, column = divmod(i, columns)
        left, top = _GAP + column * (width + _GAP), (1 + row) * _STRIP + row * height
        axes = add_axes(left, top + _STRIP, width, height)
        axes.set_title(text, size=8, pad=3)
        return axes

    axes = add_panel(0, image_title)
    _show_image(axes, pixels)
    if cell is not None and grid is not None:
        _frame(axes, pixels, cell, grid)
    for i, (name, heat) in enumerate(panels):
        axes = add_panel(1 + i, f'{name}max {heat.max():.2g}')
        heat_image = _show_heat(axes, pixels, heat, maps.max())
        if cell is not None and grid is not None:
            _frame(axes, pixels, cell, grid)
    left = total_width - _MARGIN
    bar = figure.colorbar(heat_image, cax=add_axes(left, 2 * _STRIP, 0.12, height))
    bar.ax.tick_params(labelsize=7)
    return figure


def draw_non_locality(names: Sequence[str], values: Sequence[np.ndarray]) -> Figure:
    """How far each layer looks: a dot per head, a line through the means.

    Args:
      names: of the layers, in their order.
      values: `[N]` per layer, in cells of its grid; N may differ.
    """
    figure = _make_figure(max(4.0, 0.45 * len(names) + 1.5), 3.2)
    axes = figure.add_axes((0.13, 0.27, 0.84, 0.62))
    for i, heads in enumerate(values):
        axes.plot([i] * len(heads), heads, 'o', color='0.75', ms=5)
    axes.plot([heads.mean() for heads in values], '.-', color='C0', ms=4)
    axes.set_ylim(0, 1.05 * max(map(np.max, values)))
    axes.set_xticks(range(len(names)), names, rotation=45, ha='right', size=7)
    axes.tick_params(axis='y', labelsize=7)
    axes.set_ylabel('cells', size=8)
    axes.set_title('non-locality: mean distance of attention (dots: heads)', size=9)
    axes.spines[['top', 'right']].set_visible(False)
    return figure


def _make_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=_DPI)
    FigureCanvasAgg(figure)
    return figure


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
    """A heat map over the image, which is faint and grey: colour means attention."""
    height, width = pixels.shape[:2]
    faint = 0.25 + 0.5 * pixels.mean(axis=-1, keepdims=True) / 255
    _show_image(axes, faint)
    return axes.imshow(
        heat,
        cmap='viridis',
        vmin=0.0,
        vmax=top,
        alpha=0.7,
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
