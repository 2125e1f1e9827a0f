"""Which layers `attend` draws, and the files it writes."""

import pathlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vit_jax.errors import UserError, unknown

if TYPE_CHECKING:  # --help is quick
    from matplotlib.figure import Figure


def choose(names: Iterable[str], chosen: str | None) -> list[str]:
    """The layers that --layers names, also by their files; None for all.

    Raises:
      UserError: for a layer that is not there.

    >>> choose(['a/b', 'a/c', 'd'], 'd,a-b')
    ['d', 'a/b']
    """
    by_file = {file_name(name): name for name in names}
    if chosen is None:
        return list(by_file.values())
    wanted = chosen.removesuffix(',').split(',')
    wanted = [by_file.get(name, name) for name in wanted]
    for name in wanted:
        if name not in by_file.values():
            raise unknown('layer', name, by_file.values())
    return wanted


def file_name(layer: str) -> str:
    """Without the ending."""
    return layer.replace('/', '-')


def save(path: pathlib.Path, what: 'Figure | str') -> None:
    """Writes a picture or a table, in a folder that is made if need be; tells the path.

    Raises:
      UserError: when it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(what, str):
            path.write_text(what)
        else:
            what.savefig(path)
    except OSError as error:
        raise UserError(f'cannot write {path}: {error.strerror}') from error
    print(path)
