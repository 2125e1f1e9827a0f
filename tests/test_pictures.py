"""Pictures, read back pixel by pixel."""

import io

import numpy as np
import pytest
from PIL import Image

from vit_jax.pictures import (
    draw_heads,
    draw_image,
    draw_non_locality,
    draw_sheet,
    draw_token_maps,
    name_heads,
)

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
    """Of every head, also of an image that is brightest elsewhere."""
    planted = [(0, 4), (2, 1), (1, 3)]
    maps = np.full((3, *GRID), 0.02)
    for heat, (cell, weight) in zip(maps, zip(planted, (0.9, 0.5, 0.3))):
        heat[cell] = weight
    pixels = np.zeros((*SIZE, 1), np.uint8)
    pixels[4, 2] = 255
    figure = draw_sheet(pixels, maps, 'title')
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
        'image',
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


def test_each_weight_has_the_colour_of_the_scale():
    """Whatever the image below it: the smallest dark, half of the largest green."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (*SIZE, 3)).astype(np.uint8)
    maps = 3e-5 * rng.random((2, *GRID))
    maps[0, 1, 2], maps[1, 2, 0], maps[1, 0, 3] = 4e-5, 2e-5, 0.0
    figure = draw_sheet(pixels, maps, 'title')
    picture = read_back(figure)
    _, *heads, _, scale = figure.axes
    bar = cells(figure, picture, scale, (1, 101))[0]
    for axes, heat in zip(heads, maps, strict=True):
        found = cells(figure, picture, axes, GRID)
        expected = bar[
            np.rint(100 * heat / 4e-5).clip(1, 99).astype(int)
        ]  # not its edge
        np.testing.assert_allclose(found, expected, atol=0.04)
    ticks = [label.get_text() for label in scale.get_xticklabels()]
    assert ticks == ['0', '2e−05', '4e−05']  # the minus sign of print


def assert_text_is_whole(figure):
    """Each text lies inside of the figure, and apart from the others."""
    figure.canvas.draw()
    titles = [t for axes in figure.axes for t in (axes.title, axes._left_title)]
    texts = [*figure.texts, *titles]
    for axes in figure.axes:
        if axes.axison:
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                ticks = zip(axis.get_majorticklocs(), axis.get_majorticklabels())
                texts += [label for place, label in ticks if low <= place <= high]
                texts += [axis.label, axis.get_offset_text()]
        if axes.get_legend():
            texts += axes.get_legend().get_texts()
    texts = [text for text in texts if text.get_text()]
    boxes = [text.get_window_extent() for text in texts]
    for i, box in enumerate(boxes):
        inside = box.x0 >= 0 <= box.y0
        inside &= box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert inside, texts[i]
        others = [text for text, other in zip(texts, boxes[:i]) if box.overlaps(other)]
        assert not others, (texts[i], others)
    return [text.get_text() for text in texts]


def test_no_attention_at_all_can_be_drawn():
    figure = draw_sheet(np.zeros((*SIZE, 1), np.uint8), np.zeros((1, *GRID)), 'title')
    assert {'max 0', '0', '1'} <= set(assert_text_is_whole(figure))


LONG = 'a class that has a very long name, and costs $5, or $7, ' * 2


@pytest.mark.parametrize('size', [(9, 4), (4, 9), (64, 3), (3, 64)])
@pytest.mark.parametrize('heads', [1, 2, 16])
@pytest.mark.parametrize('title', ['title', f'seven, block00\npredicted: {LONG}'])
@pytest.mark.parametrize('weight', [0.99, 1.234e-5])
def test_text_of_a_sheet_is_whole(size, heads, title, weight):
    maps = np.full((heads, 3, 2), weight)
    figure = draw_sheet(np.zeros((*size, 1), np.uint8), maps, title)
    assert title in assert_text_is_whole(figure)
    assert not figure.texts[0].get_parse_math()  # between dollars
    panels = [axes.get_window_extent() for axes in figure.axes[:-1]]
    titles = [axes.title.get_window_extent() for axes in figure.axes[:-1]]
    assert not any(a.overlaps(b) for a in titles for b in panels)


@pytest.mark.parametrize('layers', [1, 2, 24])
@pytest.mark.parametrize('name', ['a', 'stage4_block1/conv2', 'a_long_name_' * 5])
def test_text_of_non_locality_is_whole(layers, name):
    grids = [(5, 7) if i < 3 else (112, 112) for i in range(layers)]
    names = [f'{name}#{i}' for i in range(layers)]
    figure = draw_non_locality(names, [np.array([1e3, 2e3])] * layers, grids)
    found = assert_text_is_whole(figure)
    assert {*names, '5x7'} <= set(found)
    plot, legend = figure.axes[0], figure.axes[0].get_legend()
    assert not plot.get_window_extent().overlaps(legend.get_window_extent())


@pytest.mark.parametrize(
    ('heads', 'rows', 'columns'), [(1, 1, 2), (2, 2, 3), (9, 3, 4), (16, 4, 5)]
)
def test_a_sheet_has_rows_and_columns(heads, rows, columns):
    pixels = np.zeros((*SIZE, 1), np.uint8)
    figure = draw_sheet(pixels, np.ones((heads, *GRID)), 'title')
    boxes = [axes.get_window_extent() for axes in figure.axes[:-1]]
    assert len({round(box.y0) for box in boxes}) == rows
    assert len({round(box.x0) for box in boxes}) == columns
    assert boxes == sorted(boxes, key=lambda box: (-round(box.y0), box.x0))


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
    assert 0 < min(box.y0 for box in panels) - scale.y1 < 0.2 * figure.dpi


def test_non_locality_has_a_dot_per_head_and_a_line_of_means_per_grid():
    values = [np.array([1.0, 3.0]), np.array([2.0]), np.array([0.5, 0.25, 3.0])]
    figure = draw_non_locality(['a', 'b', 'c'], values, [(3, 5), (2, 2), (3, 5)])
    (axes,) = figure.axes
    drawn = [(list(line.get_xdata()), line) for line in axes.get_lines()]
    expected = [
        ([0, 0], [1.0, 3.0]),
        ([2, 2, 2], [0.5, 0.25, 3.0]),
        ([0, 2], [2.0, 1.25]),
        ([1], [2.0]),
        ([1], [2.0]),
    ]
    assert [xs for xs, _ in drawn] == [xs for xs, _ in expected]
    for (_, line), (_, ys) in zip(drawn, expected):
        np.testing.assert_allclose(line.get_ydata(), ys)
    first, second = drawn[0][1].get_color(), drawn[-1][1].get_color()
    assert first != second
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ['3x5', '2x2']
    assert [label.get_text() for label in axes.get_xticklabels()] == ['a', 'b', 'c']
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylim()[1] > 3


TOKENS = ('▁Ein', '▁Hund', '▁läuf', 't', '.', '▁$5,', '▁$7', '▁weiß', '▁Übung', '</s>')
LABELS = ('next target token', 'attends to source token')


def test_tokens_attend_to_tokens():
    """A row is a query; grey is what it may not see, unlike what it gives nothing."""
    maps = np.where(np.tri(3, 4, dtype=bool), 0.0, np.nan)[None].repeat(2, axis=0)
    planted = [(2, 0), (1, 1)]
    for heat, (cell, weight) in zip(maps, zip(planted, (0.9, 0.5))):
        heat[cell] = weight
    figure = draw_token_maps(name_heads(maps), TOKENS[:3], TOKENS[:4], 'title', LABELS)
    picture = read_back(figure)
    *panels, _ = figure.axes
    assert [axes.get_title(loc='left') for axes in panels] == [
        'head 0, max 0.9',
        'head 1, max 0.5',
        'mean, max 0.45',
    ]
    greens = []
    for axes, (row, column) in zip(panels, [*planted, planted[0]], strict=True):
        colours = cells(figure, picture, axes, (3, 4))
        hidden = ~np.tri(3, 4, dtype=bool)
        np.testing.assert_allclose(colours[hidden], 0.85, atol=0.01)
        seen = np.where(hidden[..., None], 0.0, colours)
        assert brightest(seen) == (row, column)
        greens.append(seen[row, column, 1])
        labels = axes.get_yticklabels(), axes.get_xticklabels()
        found = [tuple(text.get_text() for text in texts) for texts in labels]
        assert found == [TOKENS[:3], TOKENS[:4]]
        assert (axes.get_ylabel(), axes.get_xlabel()) == LABELS
    assert greens[0] > greens[1] > greens[2]  # one colour scale


@pytest.mark.parametrize(
    ('rows', 'columns'), [(1, 1), (1, 9), (9, 1), (5, 6), (9, 40), (41, 40)]
)
@pytest.mark.parametrize('heads', [1, 8])
def test_text_of_token_maps_is_whole(rows, columns, heads):
    rows, columns = ([*TOKENS[4:-1] * 10][:n] for n in (rows, columns))
    maps = np.full((heads, len(rows), len(columns)), 0.123)
    title = 'decoder/block00/cross_attention: cross-attention\ntarget as given'
    figure = draw_token_maps(name_heads(maps), rows, columns, title, LABELS)
    found = assert_text_is_whole(figure)
    panels = heads + (heads > 1)
    assert found.count(LABELS[0]) == found.count(LABELS[1]) == panels
    assert found.count('▁$5,') == panels * (rows + columns).count('▁$5,')
    boxes = [axes.get_window_extent() for axes in figure.axes]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
    cell = (boxes[0].width / len(columns), boxes[0].height / len(rows))
    assert cell[0] == pytest.approx(cell[1])
    assert cell[0] > 17.9  # pixels: text of size 7 is 12 high


def test_a_sheet_of_very_long_sentences_fits_in_memory():
    tokens = ['▁Hund'] * 300
    maps = np.full((4, 300, 300), 0.1)
    figure = draw_token_maps(name_heads(maps), tokens, tokens, 'title', LABELS)
    assert max(figure.bbox.size) == pytest.approx(8_000)


def test_heads_have_a_panel_per_layer_and_a_line_per_head_and_run():
    def at(step, seed):
        return [[step + 10 * seed + layer, -layer] for layer in range(5)]

    runs = [{step: at(step, seed) for step in (0, 7, 20)} for seed in (0, 1, 2)]
    figure = draw_heads(runs, 'gate')
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == [f'block0{i}' for i in range(5)]
    for layer, axes in enumerate(panels):
        lines = [
            (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines
        ]
        expected = [
            ([0, 7, 20], list(values))
            for seed in (0, 1, 2)
            for values in zip(*(at(step, seed)[layer] for step in (0, 7, 20)))
        ]
        assert lines == expected
