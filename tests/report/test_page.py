"""Pages: what a file says is text in them, and they load nothing."""

import base64
import html.parser
import io
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from vit_jax.errors import UserError
from vit_jax.report.page import (
    NONE,
    Part,
    code,
    details,
    draw,
    embed,
    join,
    listing,
    plain,
    show,
    to_html,
    write,
)
from vit_jax.results import table

ODD = [
    '<script>alert(1)</script>',
    'a|b',
    r'a\|b',
    r'\\',
    '`tick` ``',
    '**b** _i_ __x__ a_b',
    '[link](javascript:alert(1))',
    '![x](http://example.org/x.png)',
    '&amp; & &lt;',
    '# no heading',
    '~~no~~',
    '</details>',
]


class Page(html.parser.HTMLParser):
    """A page as a browser has it: elements, cells of tables, attributes, in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells, self.attributes, self.open = [], [], [], []
        self.text = ''
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ('meta', 'img'):
            self.open.append(tag)
        if tag in ('td', 'th'):
            self.cells.append('')

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if 'style' not in self.open:
            self.text += data
        if {'td', 'th'} & {*self.open}:
            self.cells[-1] += data


def lines_figure():
    figure = Figure(figsize=(3, 2))
    figure.subplots().plot([1, 3, 2])
    return figure


def heat_figure():
    figure = Figure(figsize=(3, 2))
    figure.subplots().imshow(np.eye(3))
    return figure


@pytest.mark.parametrize('write_cell', [plain, code])
def test_cells_say_what_they_were_given(write_cell):
    text = table(['a', 'b'], [[write_cell(x), write_cell(x)] for x in ODD])
    page = Page(to_html('t', Part(text)))
    assert page.cells == ['a', 'b', *(x for x in ODD for _ in range(2))]
    assert {'script', 'a', 'img', 'em', 'strong'}.isdisjoint(page.tags)


def test_everywhere_else_too():
    parts = [Part(f'# {plain(x)}\n\nSo {plain(x)}.\n\n{listing([x])}') for x in ODD]
    parts += [Part(details(x, f'({plain(x)})')) for x in ODD]
    page = Page(to_html(ODD[0], join(parts)))
    for x in ODD:
        assert f'So {x}.' in page.text
        assert f'({x})' in page.text
    assert page.tags.count('details') == len(ODD)
    assert {'script', 'a', 'img', 'em', 'strong'}.isdisjoint(page.tags)


def test_markup_of_a_file_is_shown_not_run():
    text = (
        '<b>bold</b>\n\n<details>\n<summary><img src=x onerror=y></summary>\n\nin\n\n'
    )
    text += '</details>\n\n<script>alert(1)</script>'
    page = Page(to_html('t', Part(text)))
    assert {'script', 'b', 'img'}.isdisjoint(page.tags)
    assert '<b>bold</b>' in page.text
    assert '<img src=x onerror=y>' in page.text


def test_nothing_is_loaded():
    pictures = {'a b/100%.png': draw(lines_figure()), 'heat.png': draw(heat_figure())}
    shown = [show(name, 'what it shows') for name in pictures]
    text = '\n\n'.join(
        ['## One', '## Two', *shown, '![gone](http://example.org/x.png)']
    )
    page = Page(to_html('t', Part(text, pictures)))
    for name, value in page.attributes:
        if name in ('src', 'href'):
            assert value.startswith(('data:image/', '#part'))
    assert 'url(' not in to_html('t', Part(text, pictures))
    assert 'gone' in page.text
    vector, pixels = (value for name, value in page.attributes if name == 'src')
    svg, png = (base64.b64decode(x.partition(',')[2]) for x in (vector, pixels))
    assert svg == pictures['a b/100%.png'].svg
    assert png == pictures['heat.png'].png
    assert vector.startswith('data:image/svg+xml;')
    assert Image.open(io.BytesIO(png)).size == (300, 200)  # at 100 dots an inch
    assert ('width', '288') in page.attributes  # 3 inches of 96 CSS pixels


def test_pictures_of_pixels_are_no_lines():
    assert draw(heat_figure()).svg is None
    assert draw(lines_figure()) == draw(lines_figure())


def test_columns_of_numbers():
    header = ['name', 'n', 'mean', 'mixed', 'none']
    rows = [
        ['1st', '1,234', '99.5 ± 0.4 (3 seeds)', '3', NONE],
        ['x', NONE, 'not run', 'three', NONE],
        ['y', '-2e-05', '97.21%', '3', NONE],
    ]
    page = to_html('t', Part(table(header, rows)))
    numbers = re.findall(r'<t[hd] class="number">([^<]*)<', page)
    assert numbers == [x for row in [header, *rows] for x in row[1:3]]


def test_contents_lead_to_the_parts():
    page = to_html('t', Part('# T\n\n## A <b>\n\n### C\n\n## B\n'.replace('<', r'\<')))
    assert '<a href="#part0">A &lt;b&gt;</a> <a href="#part1">B</a>' in page
    assert '<h2 id="part1">B</h2>' in page
    assert '<nav>' not in to_html('t', Part('# T\n\n## A'))


def test_a_readme_below_a_heading():
    readme = (
        '# Title\n\nSee ![gates](gates.png), ![lost](lost.png), [here](table.md) and '
        '[there](https://example.org).\n\n    # a comment\n\n```\n# another\n```\n\n'
        '## Part\n'
    )
    assert embed(readme, {'gates.png': 'experiments/a b/gates.png'}, level=2) == (
        '### Title\n\nSee ![gates](experiments/a%20b/gates.png), lost, here and '
        '[there](https://example.org).\n\n    # a comment\n\n```\n# another\n```\n\n'
        '#### Part'
    )


def test_files(tmp_path):
    page = Part(
        f'# T\n\n{show("x/lines.png", "l")}', {'x/lines.png': draw(lines_figure())}
    )
    out = tmp_path / 'new' / 'out'
    assert write('T', page, out) == [out / 'report.html', out / 'report.md']
    assert (out / 'report.md').read_text() == f'{page.text}\n'
    assert Image.open(out / 'x' / 'lines.png').size == (300, 200)
    first = (out / 'report.html').read_bytes()
    write('T', page._replace(pictures={'x/lines.png': draw(lines_figure())}), out)
    assert (out / 'report.html').read_bytes() == first


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / 'out').write_text('a file')
    with pytest.raises(UserError, match=r'cannot write .*out/report'):
        write('T', Part('# T'), tmp_path / 'out')
