"""What weights say of themselves: checked before anything believes it."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vit_jax.data.transforms import INTERPOLATIONS
from vit_jax.errors import UserError
from vit_jax.forks import is_path
from vit_jax.pretrained.damage import reading


def _is_count(x: Any, lowest: int = 1) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and lowest <= x < 2**31


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 2**31


def _are(each: Callable[[Any], bool], *lengths: int) -> Callable[[Any], bool]:
    """A list of such things, of one of those lengths, if any are given."""

    def holds(x: Any) -> bool:
        fits = isinstance(x, list | tuple) and (not lengths or len(x) in lengths)
        return fits and all(map(each, x))

    return holds


# What each value must be, where it is there. Others are not read.
_VALUES: dict[str, dict[str, Callable[[Any], bool]]] = {
    'model': {
        'name': lambda x: isinstance(x, str),
        'kwargs': lambda x: isinstance(x, dict),
        'num_classes': lambda x: x is None or _is_count(x),
        'dtype': lambda x: isinstance(x, str),
        'grid': _are(_is_count),
        'prefix_tokens': lambda x: _is_count(x, lowest=0),
        'activation': lambda x: isinstance(x, str),
        'layer_norm_eps': _is_number,
        'num_heads': _is_count,
    },
    'preprocessing': {
        'image_size': _are(_is_count, 2),
        'channels': lambda x: x in (1, 3),
        'mean': _are(_is_number, 1, 3),
        'std': _are(lambda x: _is_number(x) and x > 0, 1, 3),
        'crop_fraction': lambda x: _is_number(x) and 0 < x <= 1,
        'interpolation': lambda x: isinstance(x, str) and x in INTERPOLATIONS,
    },
}
# Without these a section is of no use.
_NEEDED = {
    'model': ('name', 'kwargs', 'num_classes', 'dtype'),
    'preprocessing': ('image_size', 'channels', 'mean', 'std', 'crop_fraction'),
}


def parse_metadata(text: str, where: str) -> dict[str, Any]:
    """A JSON object that somebody wrote.

    Raises:
      UserError: when it is none.
    """
    with reading(where):
        content = json.loads(text)
    if not isinstance(content, dict):
        raise UserError(f'{where} is damaged: it holds no JSON object')
    return content


def check_metadata(metadata: dict[str, Any], where: str) -> dict[str, Any]:
    """Metadata of which every value is what it should be.

    Args:
      metadata: as of a checkpoint, see `vit_jax.build`; sections may lack.
      where: they were read.

    Returns:
      The same, with what older checkpoints left out.

    Raises:
      UserError: for a value that cannot be; names it.
    """
    for section, values in _VALUES.items():
        if section not in metadata:
            continue
        about = metadata[section]
        if not isinstance(about, dict):
            raise _wrong(where, section, about)
        for key, holds in values.items():
            if key in about and not holds(about[key]):
                raise _wrong(where, f'{section}.{key}', about[key])
    names = metadata.get('class_names')
    if names is not None and not _are(lambda x: isinstance(x, str))(names):
        raise _wrong(where, 'class_names', names)
    count = metadata.get('model', {}).get('num_classes')
    if names is not None and count is not None and len(names) != count:
        raise UserError(
            f'the metadata of {where} are damaged: {len(names)} class_names, but '
            f'num_classes is {count}'
        )
    if 'preprocessing' in metadata:
        metadata['preprocessing'].setdefault('interpolation', 'bicubic')
    return metadata


def is_complete(metadata: Mapping[str, Any] | None, *sections: str) -> bool:
    """Whether metadata have these sections, and in them all that is needed."""
    return metadata is not None and all(
        set(_NEEDED[section]) <= set(metadata.get(section, ())) for section in sections
    )


def default_class_names(num_classes: int | None) -> list[str]:
    """Names for classes of which only the numbers are known.

    >>> default_class_names(3)
    ['0', '1', '2']
    """
    return [str(i) for i in range(num_classes or 0)]


def check_runs_no_code(about: Mapping[str, Any], where: str) -> None:
    """Raises UserError for a model whose name or fields are paths of code.

    The metadata of a run may name a fork's code, as its config does; those of a file
    that came from anywhere may not: to import is to run.

    Args:
      about: the section 'model'.
      where: it was read.
    """
    for text in _texts([about['name'], about['kwargs']]):
        if is_path(text):
            raise UserError(
                f'{where} names code to import, {text[:80]!r}, and weights run none; '
                'name the model yourself, in a config or by --model, or take the '
                'workdir of the run'
            )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in (*value.keys(), *value.values()):
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _wrong(where: str, key: str, value: Any) -> UserError:
    shown = ' '.join(repr(value).split())[:60]
    return UserError(f'the metadata of {where} are damaged: {key} is {shown}')
