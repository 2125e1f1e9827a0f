"""Where the images of ImageNet (ILSVRC 2012) lie: in its two tars, or in folders.

Tars are not unpacked: their headers are read, and an image is a path, an offset and a
number of bytes.
"""

import concurrent.futures
import os
import pathlib
import re
import tarfile
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from vit_jax.data.progress import Progress
from vit_jax.errors import UserError, reason, some

TRAIN_TAR = 'ILSVRC2012_img_train.tar'
VAL_TAR = 'ILSVRC2012_img_val.tar'
_TAR_BYTES = {TRAIN_TAR: 147_897_477_120, VAL_TAR: 6_744_924_160}
_WHERE = 'https://image-net.org/download-images (a login is needed)'
_VAL_NAME = re.compile(r'ILSVRC2012_val_(\d{8})\.JPEG')
_SUFFIXES = ('.jpeg', '.jpg', '.png')


class _File(NamedTuple):
    """A file in a tar."""

    name: str
    offset: int
    size: int


class Entry(NamedTuple):
    """An image: its class, its name, and where its bytes lie."""

    label: int
    name: str
    path: str
    offset: int
    size: int


class Classes(NamedTuple):
    """TFDS's own lists: the label of each synset, and of each validation image."""

    labels: dict[str, int]
    val: list[int]

    def of_val(self, name: str, where: str) -> int:
        match = _VAL_NAME.fullmatch(name)
        if match is None or not 1 <= int(match[1]) <= len(self.val):
            raise UserError(
                f'{where} holds {name!r}; validation images are named '
                'ILSVRC2012_val_00000001.JPEG and so on'
            )
        return self.val[int(match[1]) - 1]


def read_classes() -> Classes:
    import tensorflow_datasets as tfds

    folder = tfds.core.tfds_path('datasets/imagenet2012')
    synsets = (folder / 'labels.txt').read_text().split()
    labels = {synset: i for i, synset in enumerate(synsets)}
    val = (folder / 'validation_labels.txt').read_text().split()
    return Classes(labels, [labels[synset] for synset in val])


# --- Tars ---------------------------------------------------------------------


def find_in_tars(
    tars: pathlib.Path, classes: Classes, allow_partial: bool = False
) -> dict[str, list[Entry]]:
    """The images of each split in the two official tars.

    Args:
      tars: the folder that holds them.
      classes: see `read_classes`.
      allow_partial: one of the two is enough.

    Raises:
      UserError: when a tar is missing, damaged or another one.
    """
    if not tars.is_dir():
        raise UserError(f'--tars={tars} is no folder; it should hold {TRAIN_TAR}')
    missing = [name for name in (TRAIN_TAR, VAL_TAR) if not (tars / name).exists()]
    if len(missing) > (1 if allow_partial else 0):
        raise UserError(f'{tars} has no {some(missing)}; get it from {_WHERE}')
    splits = {}
    if TRAIN_TAR not in missing:
        splits['train'] = _index_train(tars / TRAIN_TAR, classes.labels)
    if VAL_TAR not in missing:
        path = tars / VAL_TAR
        splits['validation'] = [
            Entry(classes.of_val(file.name, f'{path}'), file.name, f'{path}', *file[1:])
            for file in _index_tar(path)
        ]
    return splits


def _index_train(path: pathlib.Path, labels: Mapping[str, int]) -> list[Entry]:
    """Reads the headers of a tar of tars: one per class, each with its images."""
    inner = {}
    for file in _index_tar(path):
        synset = file.name.removesuffix('.tar')
        if synset == file.name or synset not in labels:
            raise UserError(
                f'{path} holds {file.name!r}; it should hold a tar per synset, such as '
                'n01440764.tar'
            )
        inner[synset] = file

    def index(synset: str) -> list[Entry]:
        tar = inner[synset]
        entries = []
        for file in _index_tar(path, tar.offset, tar.size, tar.name):
            if not file.name.startswith(f'{synset}_'):
                raise UserError(f'{path}: {tar.name} holds {file.name!r}')
            entries.append(Entry(labels[synset], file.name, f'{path}', *file[1:]))
        return entries

    # Threads wait for the disk together.
    with (
        concurrent.futures.ThreadPoolExecutor(8) as pool,
        Progress(f'index of {path.name}', len(inner), unit='synset') as progress,
    ):
        entries: list[Entry] = []
        for found in pool.map(index, sorted(inner)):
            entries += found
            progress.advance()
    return entries


def _index_tar(
    path: pathlib.Path, start: int = 0, length: int | None = None, inner: str = ''
) -> list[_File]:
    """The files in the tar at `start`."""
    where = f'{path}: {inner}' if inner else f'{path}'
    found = []
    try:
        with open(path, 'rb') as file:
            end = os.fstat(file.fileno()).st_size if length is None else start + length
            file.seek(start)
            with tarfile.open(fileobj=file, mode='r:') as tar:
                for member in tar:
                    if member.offset_data + member.size > end:
                        raise tarfile.ReadError('unexpected end of data')
                    if member.isfile():
                        name = os.path.basename(member.name)
                        found.append(_File(name, member.offset_data, member.size))
    except tarfile.TarError as error:
        official = _TAR_BYTES.get(path.name, 0)
        raise UserError(
            f'{where} cannot be read as a tar: {reason(error)}; it has '
            f'{path.stat().st_size:,} bytes, the official {path.name} {official:,}'
        ) from error
    return found


# --- Folders ------------------------------------------------------------------


def find_in_folder(
    root: pathlib.Path, classes: Classes, allow_partial: bool = False
) -> dict[str, list[Entry]]:
    """The images of each split in a folder.

    Args:
      root: holds `train/<synset>/*.JPEG`, and `val/` or `validation/` with either the
        same or all files of the official tar side by side.
      classes: see `read_classes`.
      allow_partial: one of the two is enough.

    Raises:
      UserError: for another layout.
    """
    folders = {'train': root / 'train', 'validation': root / 'val'}
    if not folders['validation'].is_dir():
        folders['validation'] = root / 'validation'
    there = {split: path for split, path in folders.items() if path.is_dir()}
    if len(there) < (1 if allow_partial else 2):
        raise UserError(
            f'--folder={root} should hold train/ with a folder of images per synset, '
            'and val/'
        )
    return {
        split: list(_scan(path, classes, flat=split == 'validation'))
        for split, path in there.items()
    }


def _scan(root: pathlib.Path, classes: Classes, flat: bool) -> Iterator[Entry]:
    """Lists a split: folders of synsets or, where `flat`, the official names."""
    folders: list[os.DirEntry[str]] = []
    files: list[os.DirEntry[str]] = []
    for item in sorted(os.scandir(root), key=lambda item: item.name):
        if not item.name.startswith('.'):
            (folders if item.is_dir() else files).append(item)
    if files and not flat:
        raise UserError(f'{files[0].path} is not in the folder of a synset')
    if files and folders:
        raise UserError(
            f'{root} holds both files and folders, {files[0].name} and '
            f'{folders[0].name}; let it hold one or the other'
        )
    for file in files:
        yield _file_entry(file, classes.of_val(file.name, f'{root}'))
    for folder in folders:
        if folder.name not in classes.labels:
            raise UserError(
                f"{folder.path} is none of ImageNet's {len(classes.labels):,} synsets, "
                'such as n01440764'
            )
        label = classes.labels[folder.name]
        for file in os.scandir(folder.path):
            if file.name.startswith('.'):
                continue
            official = _VAL_NAME.fullmatch(file.name)
            if official and classes.of_val(file.name, folder.path) != label:
                raise UserError(f'{file.path} is of another synset')
            yield _file_entry(file, label)


def _file_entry(file: 'os.DirEntry[str]', label: int) -> Entry:
    if not file.is_file() or not file.name.lower().endswith(_SUFFIXES):
        raise UserError(f'{file.path} is no image ({", ".join(_SUFFIXES)})')
    return Entry(label, file.name, file.path, 0, file.stat().st_size)
