"""Names of weights: a table of (their name, our path, layout), read both ways.

A row such as

    Rule('blocks.{i}.attn.proj.weight', ('params/block{i:02}/attention/out/kernel',),
         LINEAR_IN)

says where an array of a published file lies in our variables, and what becomes of its
axes. Reading and writing are the same table; a new format is one more table.
"""

import collections
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vit_jax.errors import UserError, some
from vit_jax.typing import Shape


class Layout(NamedTuple):
    """How an array of ours lies in a file.

    Attributes:
      shape: our shape -> theirs.
      read: their array, our shape -> our array.
      write: our array -> theirs.
    """

    shape: Callable[[Shape], Shape]
    read: Callable[[np.ndarray, Shape], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


def _size(lengths: Sequence[int]) -> int:
    return int(np.prod(lengths, dtype=int))


SAME = Layout(lambda s: s, lambda x, s: x, lambda x: x)
# Axes of ours that are one of theirs: heads and the size of each.
FLAT = Layout(lambda s: (_size(s),), lambda x, s: x.reshape(s), lambda x: x.reshape(-1))
# [in, *out] <-> [out, in]
LINEAR = Layout(
    lambda s: (_size(s[1:]), s[0]),
    lambda x, s: x.T.reshape(s),
    lambda x: x.reshape(len(x), -1).T,
)
# [*in, out] <-> [out, in]
LINEAR_IN = Layout(
    lambda s: (s[-1], _size(s[:-1])),
    lambda x, s: x.T.reshape(s),
    lambda x: x.reshape(-1, x.shape[-1]).T,
)
# [*size, in, out] <-> [out, in, *size]
CONV = Layout(
    lambda s: (s[-1], s[-2], *s[:-2]),
    lambda x, s: np.moveaxis(x, (0, 1), (-1, -2)),
    lambda x: np.moveaxis(x, (-1, -2), (0, 1)),
)
# [in, out] <-> [out, in, 1, 1], a classifier written as a convolution
CONV_HEAD = Layout(
    lambda s: (s[1], s[0], 1, 1),
    lambda x, s: x.reshape(s[::-1]).T,
    lambda x: x.T[:, :, None, None],
)
# [in, out] <-> [1, 1, in, out]
CONV_HEAD_LAST = Layout(
    lambda s: (1, 1, *s), lambda x, s: x.reshape(s), lambda x: x[None, None]
)
# [C] <-> [1, 1, 1, C]
MAP = Layout(
    lambda s: (1, 1, 1, *s), lambda x, s: x.reshape(s), lambda x: x.reshape(1, 1, 1, -1)
)


class Rule(NamedTuple):
    """One row: an array of theirs is one of ours, or several put together.

    Attributes:
      theirs: template of the name in the file; `{i}` stands for a number, `{i+1}` for
        that number plus one, `{i:02}` for two digits.
      ours: templates of our paths, with the same numbers. Several: theirs is their
        concatenation along its first axis, each in `layout`.
      layout: of each part.
      only_with: when writing, the row is for models (or blocks, where it has their
        number) that have this path too.
    """

    theirs: str
    ours: tuple[str, ...]
    layout: Layout = SAME
    only_with: str | None = None


class Positions(NamedTuple):
    """The row of learned positions: `[1, P + T, D]` is our prefix, then our grid."""

    theirs: str
    ours: tuple[str, ...] = ('params/posemb/prefix', 'params/posemb/grid')


class Format(NamedTuple):
    """A naming of weights. Where two rows are of the same path, the first is written.

    Attributes:
      name: in words, for reports.
      rules: the table.
      ignored: end of a name -> why it is left out.
      prefixes: what some or all names of a file may begin with.
      facts: what all models have whose weights are published so, and no file tells.
    """

    name: str
    rules: tuple[Rule | Positions, ...]
    ignored: Mapping[str, str] = {}
    prefixes: tuple[str, ...] = ('',)
    facts: Mapping[str, Any] = {}


class Place(NamedTuple):
    """Where an array of a file belongs: the row that says so, and paths of ours."""

    rule: Rule | Positions
    paths: tuple[str, ...]


_NUMBER = re.compile(r'\{(\w)(?:\+(\d))?(?::02)?\}')


def parse(template: str, name: str) -> dict[str, int] | None:
    """The numbers of a name, or None where it is not of that template.

    >>> parse('stage{s+1}/block{i:02}', 'stage3/block07')
    {'s': 2, 'i': 7}
    """
    texts = map(re.escape, _NUMBER.split(template)[::3])
    match = re.fullmatch(r'(\d+)'.join(texts), name)
    if match is None:
        return None
    fields = zip(_NUMBER.finditer(template), match.groups())
    numbers = {field[1]: int(text) - int(field[2] or 0) for field, text in fields}
    return numbers if fill(template, numbers) == name else None


def fill(template: str, numbers: Mapping[str, int]) -> str:
    """The name of that template with those numbers.

    >>> fill('stage{s+1}/block{i:02}', {'s': 2, 'i': 7})
    'stage3/block07'
    """

    def text(field: re.Match) -> str:
        number = numbers[field[1]] + int(field[2] or 0)
        return f'{number:02}' if field[0].endswith(':02}') else str(number)

    return _NUMBER.sub(text, template)


def find_places(format: Format, names: Iterable[str]) -> dict[str, Place]:
    """Where each name belongs; names that the table does not have are left out.

    Args:
      format: the table; of its `prefixes` that with which most names are found.
      names: of the arrays of a file.
    """
    rules = collections.defaultdict(list)
    for rule in format.rules:
        rules[_skeleton(_NUMBER.sub('0', rule.theirs))].append(rule)

    def find(name: str) -> Place | None:
        for rule in rules[_skeleton(name)]:
            numbers = parse(rule.theirs, name)
            if numbers is not None:
                return Place(rule, tuple(fill(path, numbers) for path in rule.ours))
        return None

    names = list(names)
    tried = [
        {name: find(name.removeprefix(prefix)) for name in names}
        for prefix in format.prefixes
    ]
    found = [{k: place for k, place in places.items() if place} for places in tried]
    return max(found, key=len)


def _skeleton(name: str) -> str:
    """A name without its numbers: what few rows have in common."""
    return re.sub(r'\d+', '#', name)


def rename(format: Format, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our arrays under a format's names, in its layouts.

    Args:
      format: the table.
      arrays: by our paths, such as 'params/head/logits/kernel'.

    Raises:
      UserError: when the format has no name for one of them.
    """
    named: dict[str, np.ndarray] = {}
    done: set[str] = set()
    for rule in format.rules:
        for path in arrays:
            # Learned positions may have a grid alone, without prefix tokens.
            numbers = parse(rule.ours[-1], path)
            if numbers is None or path in done:
                continue
            paths = [fill(template, numbers) for template in rule.ours]
            if isinstance(rule, Positions):
                paths = [path for path in paths if path in arrays]
                named[rule.theirs] = join_positions([arrays[path] for path in paths])
            else:
                with_path = rule.only_with and fill(rule.only_with, numbers)
                if not {*paths, with_path or path} <= arrays.keys():
                    continue
                parts = [rule.layout.write(arrays[path]) for path in paths]
                whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
                named[fill(rule.theirs, numbers)] = np.ascontiguousarray(whole)
            done.update(paths)
    if missing := sorted(arrays.keys() - done):
        raise UserError(
            f'{format.name} has no name for {some(missing)}; such a model is kept in '
            "this project's own format, a folder"
        )
    return named


def join_positions(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Rows `[..., D]` of prefix and grid as one list `[1, P + T, D]`."""
    width = parts[0].shape[-1]
    return np.concatenate([part.reshape(-1, width) for part in parts])[None]
