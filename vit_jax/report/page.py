"""A page of text, tables and pictures: as Markdown, and as one HTML file.

Its text is Markdown, and the HTML is rendered from it, so that both say the same. The
HTML holds its pictures and its style itself, has no scripts, and loads nothing; what a
user's file says is text in it, never markup.
"""

import base64
import html
import io
import pathlib
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import OptionsDict
from matplotlib.figure import Figure

from vit_jax import results
from vit_jax.errors import UserError, reason

NONE = '–'  # in a table, where there is no value

_CSS = pathlib.Path(__file__).with_name('page.css')
_PIXELS_PER_INCH = 96  # of CSS
# An underscore inside of a word is none.
_SPECIAL = re.compile(r'([\\`*\[\]<>&~]|(?<![^\W_])_|_(?![^\W_]))')
_DETAILS = re.compile(
    r'^<details>\n<summary>([^\n]*)</summary>\n\n(.*?)\n\n</details>$', re.M | re.S
)
_NUMBER = re.compile(r'[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?%?( ± .*)?( \(.*\))?')


class Picture(NamedTuple):
    """A picture, drawn.

    Attributes:
      png: the file.
      svg: the same in lines, sharp at any size; None of a picture that holds pixels.
      size: (width, height) on the page, in CSS pixels.
    """

    png: bytes
    svg: bytes | None
    size: tuple[int, int]


class Part(NamedTuple):
    """A part of a page.

    Attributes:
      text: Markdown; shows pictures by `show`.
      pictures: by the names of their files, which may lie in folders.
    """

    text: str
    pictures: Mapping[str, Picture] = {}


def stack(*blocks: str) -> str:
    """Blocks of Markdown below each other; empty ones are left out."""
    return '\n\n'.join(block.strip('\n') for block in blocks if block)


def join(parts: Iterable[Part]) -> Part:
    """Parts below each other."""
    parts = list(parts)
    pictures = {k: v for part in parts for k, v in part.pictures.items()}
    return Part(stack(*(part.text for part in parts)), pictures)


def draw(figure: Figure) -> Picture:
    """The same figure is the same bytes."""
    png, svg = io.BytesIO(), io.BytesIO()
    width, height = figure.get_size_inches() * _PIXELS_PER_INCH
    figure.savefig(png, format='png')
    lines = not any(axes.images for axes in figure.axes)
    if lines:
        with matplotlib.rc_context({'svg.hashsalt': 'vit_jax'}):
            figure.savefig(svg, format='svg', metadata={'Date': None})
    size = round(width), round(height)
    return Picture(png.getvalue(), svg.getvalue() if lines else None, size)


def plain(value: object) -> str:
    r"""Any text as Markdown that shows it, in one line.

    >>> print(plain('a_b _c_ <d>\n*e*'))
    a_b \_c\_ \<d\> \*e\*
    """
    return _SPECIAL.sub(r'\\\1', ' '.join(str(value).split()))


def code(value: object) -> str:
    """The same, as code.

    >>> code('optim.name'), code('a `quoted` word')
    ('`optim.name`', '`` a `quoted` word ``')
    """
    text = ' '.join(str(value).split())
    ticks = '`' * (1 + max(map(len, re.findall('`+', text)), default=0))
    space = ' ' if len(ticks) > 1 or not text else ''
    return f'{ticks}{space}{text}{space}{ticks}'


def listing(lines: Iterable[str]) -> str:
    """Lines as they are, such as commands."""
    return '\n'.join(f'    {" ".join(line.split())}' for line in lines)


def details(summary: str, text: str) -> str:
    """What is folded away behind a line of plain text."""
    summary = html.escape(' '.join(summary.split()))
    return f'<details>\n<summary>{summary}</summary>\n\n{text.strip()}\n\n</details>'


def show(name: str, alt: str) -> str:
    """A picture of the part; several in one paragraph stand beside each other."""
    return f'![{plain(alt)}]({urllib.parse.quote(name)})'


def embed(text: str, pictures: Mapping[str, str], level: int) -> str:
    """Markdown of a file, to stand below a heading of a page.

    Args:
      text: of the file.
      pictures: names that it may use, and those that they have on the page. Of other
        pictures the alternative text is left, and of links to files beside it the
        text: they would lead nowhere.
      level: of the heading; those of the text begin below it.
    """
    lines = text.splitlines()
    for token in MarkdownIt().parse(text):
        if token.type == 'heading_open' and token.markup.startswith('#') and token.map:
            row = token.map[0]
            deeper = min(level + len(token.markup), 6) - len(token.markup)
            lines[row] = lines[row].replace('#', '#' + '#' * deeper, 1)
    text = '\n'.join(lines)

    def picture(found: re.Match) -> str:
        alt, name = found.groups()
        if name not in pictures:
            return alt
        return f'![{alt}]({urllib.parse.quote(pictures[name])})'

    text = re.sub(r'!\[([^\]]*)\]\(([^)\s]+)\)', picture, text)
    return re.sub(r'(?<!!)\[([^\]]*)\]\((?!https?:)[^)\s]+\)', r'\1', text)


def to_html(title: str, page: Part) -> str:
    """The page as one file, which loads nothing."""
    parser, headings = _parser(), list[str]()
    env = {'pictures': page.pictures, 'headings': headings}
    body, end = [], 0
    for found in _DETAILS.finditer(page.text):
        summary, text = found.groups()
        summary = html.escape(html.unescape(summary))  # a file may have written it
        body.append(parser.render(page.text[end : found.start()], env))
        body.append(f'<details>\n<summary>{summary}</summary>\n')
        body.append(parser.render(text, env))
        body.append('</details>\n')
        end = found.end()
    body.append(parser.render(page.text[end:], env))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
img-src data:; style-src 'unsafe-inline'">
<title>{html.escape(title)} – vit_jax report</title>
<style>
{_CSS.read_text()}</style>
</head>
<body>
<main>
{_contents(headings)}{''.join(body)}</main>
</body>
</html>
"""


def write(title: str, page: Part, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes report.html, report.md and the pictures; returns the paths of the two.

    Raises:
      UserError: when they cannot be written.
    """
    files = {name: picture.png for name, picture in page.pictures.items()}
    files['report.md'] = f'{page.text}\n'.encode()
    files['report.html'] = to_html(title, page).encode()
    for name, content in files.items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except OSError as error:
            raise UserError(f'cannot write {path}: {reason(error)}') from error
    return [folder / 'report.html', folder / 'report.md']


def _parser() -> MarkdownIt:
    """CommonMark and tables; what looks like HTML is shown as it is written."""
    parser = MarkdownIt('commonmark', {'html': False}).enable('table')
    parser.core.ruler.push('numbers', lambda state: _mark_numbers(state.tokens))
    parser.core.ruler.push('headings', lambda state: _anchor(state.tokens, state.env))
    parser.add_render_rule('image', _render_image)
    # What is too wide for a phone scrolls by itself.
    parser.add_render_rule('table_open', lambda *_: '<div class="wide"><table>\n')
    parser.add_render_rule('table_close', lambda *_: '</table></div>\n')
    return parser


def _render_image(
    renderer: RendererHTML,
    tokens: Sequence[Token],
    index: int,
    options: OptionsDict,
    env: MutableMapping[str, Any],
) -> str:
    token = tokens[index]
    alt = html.escape(renderer.renderInlineAsText(token.children or [], options, env))
    picture = env['pictures'].get(urllib.parse.unquote(str(token.attrs['src'])))
    if picture is None:
        return alt
    kind, content = ('svg+xml', picture.svg) if picture.svg else ('png', picture.png)
    source = f'data:image/{kind};base64,{base64.b64encode(content).decode()}'
    width, height = picture.size
    return f'<img alt="{alt}" width="{width}" height="{height}" src="{source}">'


def _mark_numbers(tokens: Sequence[Token]) -> None:
    """Columns of numbers are set to the right, that digits stand below each other."""
    for cells in _columns(tokens):
        _, *values = (inline.content for _, inline in cells)
        known = [value for value in values if value not in ('', NONE, results.NOT_RUN)]
        if known and all(map(_NUMBER.fullmatch, known)):
            for cell, _ in cells:
                cell.attrSet('class', 'number')


def _columns(tokens: Sequence[Token]) -> Iterator[list[tuple[Token, Token]]]:
    """The columns of each table: for each cell the tokens that open and fill it."""
    rows: list[list[tuple[Token, Token]]] = []
    for token, after in zip(tokens, [*tokens[1:], None]):
        if token.type == 'table_open':
            rows = []
        elif token.type == 'tr_open':
            rows.append([])
        elif token.type in ('th_open', 'td_open') and after:
            rows[-1].append((token, after))
        elif token.type == 'table_close':
            yield from map(list, zip(*rows))


def _anchor(tokens: Sequence[Token], env: MutableMapping[str, Any]) -> None:
    """Names the headings below the title, for the table of contents."""
    for token, after in zip(tokens, [*tokens[1:], None]):
        if token.type == 'heading_open' and token.tag == 'h2' and after:
            token.attrSet('id', f'part{len(env["headings"])}')
            text = ''.join(t.content for t in after.children or [])
            env['headings'].append(text)


def _contents(headings: Sequence[str]) -> str:
    """Links to the parts of a page that has several."""
    if len(headings) < 2:
        return ''
    links = [
        f'<a href="#part{i}">{html.escape(text)}</a>' for i, text in enumerate(headings)
    ]
    return f'<nav>{" ".join(links)}</nav>\n'
