"""Pictures, read back pixel by pixel."""

import io

import numpy as np
import pytest
from PIL import Image

from vit_jax.pictures import draw_image, draw_non_locality, draw_sheet

GRID, PATCH = (3, 5), (2, 4)
SIZE = (GRID[0] * PATCH[0], GRID[1] * PATCH[1])


def read_back(figure):
    """The saved picture, `[h, w, 3]` from 0 to 1."""
    file = io.BytesIO()
    figure.savefig(file, format='png')
    return np.asarray(Image.open(file).convert('RGB'), np.float64) / 255


def cells(figure, picture, axes, grid, place=(0.5, 0.5)):
    """The colour of each cell of a panel, `[rows, columns, 3]`, at a place in it."""
    box = axes.get_window_extent()
    out = np.zeros((*grid, 3))
    for row, column in np.ndindex(grid):
        x = box.x0 + (column + place[1]) / grid[1] * box.width
        y = box.y1 - (row + place[0]) / grid[0] * box.height
        out[row, column] = picture[int(len(picture) - y), int(x)]
    return out


def brightest(colours):
    luminance = colours @ [0.2126, 0.7152, 0.0722]
    return np.unravel_index(np.argmax(luminance), luminance.shape)


@pytest.mark.parametrize('channels', [1, 3])
def test_the_image_stays_as_it_is(channels):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (*SIZE, channels)).astype(np.uint8)
    figure = draw_image(pixels)
    picture = read_back(figure)
    expected = np.broadcast_to(pixels / 255, (*SIZE, 3))
    (axes,) = figure.axes
    for place in ((0.5, 0.5), (0.2, 0.2), (0.8, 0.8)):  # squares, not smoothed
        found = cells(figure, picture, axes, SIZE, place)
        np.testing.assert_allclose(found, expected, atol=0.01)
    height, width = picture.shape[:2]
    assert width / height == pytest.approx(SIZE[1] / SIZE[0], rel=0.02)


def test_the_brightest_cell_is_where_the_attention_is():
    """Of every head, also over an image that is brightest elsewhere."""
    planted = [(0, 4), (2, 1), (1, 3)]
    maps = np.full((3, *GRID), 0.02)
    for heat, (cell, weight) in zip(maps, zip(planted, (0.9, 0.5, 0.3))):
        heat[cell] = weight
    pixels = np.zeros((*SIZE, 1), np.uint8)
    pixels[4, 2] = 255
    figure = draw_sheet(pixels, maps, 'title', 'seven')
    picture = read_back(figure)
    image, *heads, mean, _ = figure.axes
    assert brightest(cells(figure, picture, image, SIZE)) == (4, 2)
    peaks = []
    for axes, cell in zip(heads, planted, strict=True):
        colours = cells(figure, picture, axes, GRID)
        assert brightest(colours) == cell
        peaks.append(colours[cell])
    assert brightest(cells(figure, picture, mean, GRID)) == (0, 4)
    # One colour scale: a smaller weight is another colour, and darker.
    green = [colour[1] for colour in peaks]
    assert green[0] > green[1] > green[2]
    titles = [axes.get_title() for axes in figure.axes[:-1]]
    assert titles == [
        'seven',
        'head 0, max 0.9',
        'head 1, max 0.5',
        'head 2, max 0.3',
        'mean, max 0.31',
    ]


def test_the_query_has_a_frame():
    """Of its cell, in the grid of the queries; each edge is two cells' edge."""
    pixels = np.full((*SIZE, 3), 128, np.uint8)
    maps = np.full((2, 3, 5), 0.2)
    figure = draw_sheet(pixels, maps, 'title', cell=(2, 1), grid=(6, 4))
    picture = read_back(figure)
    for axes in figure.axes[:-1]:
        for place, framed in (
            ((0.5, 0.01), [(2, 1), (2, 2)]),  # at their left edge
            ((0.01, 0.5), [(2, 1), (3, 1)]),  # at their top
        ):
            colours = cells(figure, picture, axes, (6, 4), place)
            red = colours[..., 0] - colours[..., 1:].max(axis=-1)
            assert [tuple(cell) for cell in np.argwhere(red > 0.3)] == framed


@pytest.mark.parametrize('heads', [1, 2, 3, 9, 16])
def test_panels_do_not_overlap(heads):
    pixels = np.zeros((*SIZE, 1), np.uint8)
    figure = draw_sheet(pixels, np.ones((heads, *GRID)), 'title')
    boxes = [axes.get_window_extent() for axes in figure.axes]
    assert len(boxes) == 1 + heads + (heads > 1) + 1  # image, heads, mean, scale
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
    *panels, scale = boxes
    assert 0 < scale.x0 - max(box.x1 for box in panels) < 0.2 * figure.dpi


def test_non_locality_has_a_dot_per_head_and_a_line_of_means():
    values = [np.array([1.0, 3.0]), np.array([0.5, 0.25, 3.0])]
    (axes,) = draw_non_locality(['a', 'b'], values).axes
    *dots, line = axes.get_lines()
    for i, (heads, expected) in enumerate(zip(dots, values, strict=True)):
        np.testing.assert_allclose(heads.get_xdata(), i)
        np.testing.assert_allclose(heads.get_ydata(), expected)
    np.testing.assert_allclose(line.get_ydata(), [2.0, 1.25])
    assert [label.get_text() for label in axes.get_xticklabels()] == ['a', 'b']
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylim()[1] > 3
