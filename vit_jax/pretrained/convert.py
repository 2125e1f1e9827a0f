"""Variables on their way out: under the names that others read, or as our folder."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from vit_jax.errors import UserError, reason
from vit_jax.pretrained.files import write_weights
from vit_jax.pretrained.formats import (
    GOOGLE_BIT,
    GOOGLE_VIT,
    TIMM,
    TIMM_BIT,
    TORCHVISION,
)
from vit_jax.pretrained.naming import rename
from vit_jax.pretrained.plan import GRID, PREFIX, find_format
from vit_jax.pretrained.source import NATIVE, Source
from vit_jax.typing import Variables

# What a folder of this project holds; a program only where it was exported.
WEIGHTS, METADATA, PROGRAM = 'model.safetensors', 'metadata.json', 'program.bin'
_OURS = {WEIGHTS, METADATA, PROGRAM}
# What is told of weights that leave; the config of a run, with its local paths, stays.
_TOLD = ('model', 'class_names', 'preprocessing', 'program')

# Which table is written: by the end of the file's name, and by what the model is.
_TORCH = {'patches': TIMM, 'bit': TIMM_BIT, 'resnet': TORCHVISION}
_GOOGLE = {'patches': GOOGLE_VIT, 'bit': GOOGLE_BIT}
NAMINGS = {
    '.npz': _GOOGLE,
    '.safetensors': _TORCH,
    '.pth': _TORCH,
    '.pt': _TORCH,
    '.bin': _TORCH,
}


class Renamed(NamedTuple):
    """Variables as a file has them.

    Attributes:
      format: the naming, in words.
      arrays: by the names of the format.
      notes: what is not as it was, one line each.
    """

    format: str
    arrays: dict[str, np.ndarray]
    notes: list[str]


def to_published(variables: Variables, suffix: str) -> Renamed:
    """The names that Google's code, timm or torchvision read, by a file's suffix.

    Args:
      variables: of a ViT, ConViT, hybrid, BiT or ResNet.
      suffix: '.npz' for Google's naming; '.safetensors', '.pth', '.pt' or '.bin' for
        that of timm, which for ResNets is torchvision's too.

    Raises:
      UserError: for another suffix, and where the naming has no name for a leaf.

    >>> import jax.numpy as jnp
    >>> from vit_jax.models import build_model
    >>> model = build_model('ResNet-18', 7)
    >>> shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    >>> variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    >>> renamed = to_published(variables, '.safetensors')
    >>> renamed.format, renamed.arrays['fc.weight'].shape
    ('the naming of torchvision', (7, 512))
    """
    if suffix not in NAMINGS:
        raise UserError(
            f'{suffix!r} is no kind of weight file; use one of {", ".join(NAMINGS)}, '
            'or no suffix for a folder'
        )
    arrays, notes = to_arrays(variables), []
    kind = _kind(arrays)
    if kind not in NAMINGS[suffix]:
        raise UserError(
            f'no {suffix} of such a model is published, whose names could be taken; '
            'write .safetensors, .pth, or a folder'
        )
    format = NAMINGS[suffix][kind]
    if format is TIMM and 'params/registers/tokens' in arrays and PREFIX in arrays:
        notes += _fold_prefix(arrays)
    return Renamed(format.name, rename(format, arrays), notes)


def to_arrays(variables: Variables) -> dict[str, np.ndarray]:
    """Path -> array on the host."""
    return dict(jax.device_get(flatten_dict(variables, sep='/')))


def _kind(arrays: Mapping[str, np.ndarray]) -> str:
    if 'params/patches/embed/kernel' in arrays:
        return 'patches'
    # Behind the last block of a pre-activation network stands a norm.
    return 'bit' if 'params/norm/scale' in arrays else 'resnet'


def _fold_prefix(arrays: dict[str, np.ndarray]) -> list[str]:
    """Adds the positions of prefix tokens to the tokens, for they are constants.

    In timm, models with registers have positions of the grid alone.
    """
    prefix = arrays.pop(PREFIX)
    tokens = [f'params/class_token/{name}' for name in ('cls', 'dist')]
    if not prefix.any():  # 0 would change -0
        return []
    for token, position in zip(tokens, prefix):
        arrays[token] = arrays[token] + position
    return [
        'the positions of the class token were added to it: with registers, timm has '
        'positions of the grid alone (the same function)'
    ]


def with_grid(metadata: Mapping[str, Any], variables: Variables) -> dict[str, Any]:
    """Metadata whose grid is that of the learned positions, which may be resized."""
    positions = flatten_dict(variables, sep='/').get(GRID)
    if positions is None:
        return dict(metadata)
    grid = list(positions.shape[:-1])
    return {**metadata, 'model': {**metadata['model'], 'grid': grid}}


def count_classes(source: Source) -> int | None:
    """The outputs of a file's classifier; None where it has none."""
    biases = ('params/head/logits/bias', 'params/head/bias')
    for name, place in find_format(source)[1].items():
        if place.paths[0] in biases:
            return int(np.prod(source.file.arrays[name].shape))
    return None


# Files and folders.


def check_free(path: pathlib.Path, force: bool = False) -> None:
    """Raises UserError for a path that may not be written.

    Args:
      path: of a file or folder to come; an empty folder may be there.
      force: whether a file, or a folder that this project wrote, may be replaced.
    """
    if path.name in ('', '..'):
        raise UserError(f"name a folder to make, not '{path}'")
    if path.is_dir():
        real = _real(path)
        others, aside = _others(real), _aside(real)
        if others and force:
            raise UserError(
                f'{path} holds {others[0]!r}, which is not ours to replace; take '
                'another folder'
            )
        if force and aside.exists() and _others(aside):
            raise UserError(
                f'{aside} is in the way: what is replaced lies there for a moment; '
                'move it, or take another folder'
            )
        taken = any(path.iterdir())
    else:
        taken = path.exists()
    if taken and not force:
        raise UserError(f'{path} exists already; choose another, or pass --force')


def write_file(
    path: pathlib.Path, renamed: Renamed, metadata: Mapping[str, Any]
) -> None:
    """Writes a file that others read; a safetensors file tells its metadata too.

    Raises:
      UserError: when it cannot be written.
    """
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    header = {'format': 'pt', NATIVE: json.dumps(_told(metadata))}
    write_weights(path, renamed.arrays, header)


def write_folder(
    path: pathlib.Path,
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, Any],
    program: bytes | None = None,
    force: bool = True,
) -> None:
    """Writes weights under our own names, and what is known of them: all or nothing.

    A folder is replaced by two renames. A kill between them leaves no `path`, and the
    old folder, whole, as `path.replaced`: rename it back, or write with `force` again,
    which removes it.

    Args:
      path: see `check_free`; of a link, the folder that it names is written.
      arrays: see `to_arrays`.
      metadata: as of a checkpoint, of which model, classes and preprocessing are told.
      program: see `vit_jax.export`.
      force: whether a folder of ours may be replaced, even one that appeared since.

    Raises:
      UserError: when the folder cannot be written.
    """
    given, path = path, _real(path)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with _writing(given):
            temporary.mkdir(parents=True)
            write_weights(temporary / WEIGHTS, arrays, {'format': NATIVE})
            text = json.dumps(_told(metadata), indent=2)
            (temporary / METADATA).write_text(f'{text}\n', encoding='utf-8')
            if program is not None:
                (temporary / PROGRAM).write_bytes(program)
            check_free(given, force)  # again: much may have happened
            _swap(temporary, path, force)
    except UserError as error:
        raise UserError(str(error).replace(str(temporary), str(given))) from error
    finally:
        _remove(temporary)


def _told(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {key: metadata[key] for key in _TOLD if key in metadata}


def _swap(new: pathlib.Path, path: pathlib.Path, force: bool) -> None:
    """Renames a folder, onto nothing or an empty one; with force, onto one of ours."""
    aside, taken = _aside(path), force and path.is_dir() and any(path.iterdir())
    if taken:
        _remove(aside)
        path.rename(aside)
    try:
        new.rename(path)  # fails on all else that may have come there
    finally:
        if taken and not path.exists():
            aside.rename(path)
    if force:
        _remove(aside)


def _aside(path: pathlib.Path) -> pathlib.Path:
    """Where a folder lies while another takes its place; seen, and always the same."""
    return path.with_name(f'{path.name}.replaced')


def _real(path: pathlib.Path) -> pathlib.Path:
    """Where links lead; unlike `resolve` no error where they go round."""
    return pathlib.Path(os.path.realpath(path))


def _others(path: pathlib.Path) -> list[str]:
    """What is there beside our files: in a folder, or a file itself."""
    if path.is_symlink() or not path.is_dir():
        return [path.name]
    return sorted({entry.name for entry in path.iterdir()} - _OURS)


def _remove(folder: pathlib.Path) -> None:
    """Removes a folder, if no files but ours are in it."""
    with contextlib.suppress(OSError):
        if not _others(folder):
            for name in _OURS:
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()  # not if something has come since


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f'cannot write {path}: {reason(error)}') from error
