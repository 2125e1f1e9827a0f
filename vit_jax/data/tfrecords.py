"""TFDS datasets stored as tfrecord files, for `prepare` to write as array_record.

A tfrecord is, for each record, its length (8 bytes), the masked CRC-32C of these, the
record, and its masked CRC-32C. TFDS's records are serialized `tf.train.Example`s in
both formats, so that they are copied as they are.
"""

import functools
import hashlib
import json
import pathlib
import re
import shutil
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import google_crc32c

from vit_jax.data.prepare import Plan, Shard, find_root
from vit_jax.data.prepared import read_info
from vit_jax.errors import UserError

_HEADER = struct.Struct('<QI')
_FOOTER = struct.Struct('<I')
_VERSION = re.compile(r'\d+\.\d+\.\d+')
_TEMPLATE = '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'


def read_records(path: pathlib.Path) -> Iterator[bytes]:
    """The records of a tfrecord file, checked.

    Raises:
      UserError: when the file is damaged or ends too early.
    """
    with open(path, 'rb') as file:
        start = 0
        while header := file.read(_HEADER.size):
            if len(header) == _HEADER.size:
                length, check = _HEADER.unpack(header)
                _check(path, start, header[:8], check)
                data, footer = file.read(length), file.read(_FOOTER.size)
            if len(header) < _HEADER.size or len(footer) < _FOOTER.size:
                raise UserError(
                    f'{path} ends in the middle of a record, which starts at byte '
                    f'{start:,}: it was not copied to its end'
                )
            _check(path, start, data, *_FOOTER.unpack(footer))
            yield data
            start += _HEADER.size + length + _FOOTER.size


def _check(path: pathlib.Path, start: int, data: bytes, expected: int) -> None:
    crc = google_crc32c.value(data)
    if ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF != expected:
        raise UserError(
            f'{path} is damaged, in the record that starts at byte {start:,}: its '
            'checksum is another'
        )


def find_source(root: pathlib.Path, name: str) -> pathlib.Path:
    """The folder of a version of `name` in tfrecords: `root`, or one below it.

    Args:
      root: that folder itself, or the data_dir which holds `name/version`.
      name: 'cifar10', 'cifar10:3.0.2', 'cifar10_corrupted/blur_1'.

    Raises:
      UserError: when there is none.
    """
    base, _, wanted = name.partition(':')
    if (root / 'dataset_info.json').exists():
        return root
    if not root.is_dir():
        raise UserError(f'--tfrecords={root} is no folder')
    folder = root / base
    versions = [
        path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if _VERSION.fullmatch(path.name) and any(path.glob('*.tfrecord*'))
    ]
    if wanted:
        versions = [path for path in versions if path.name == wanted]
    if not versions:
        raise UserError(
            f'{root} holds no tfrecords of {name}; they would be in '
            f'{folder / (wanted or "VERSION")}'
        )
    return max(versions, key=lambda path: [*map(int, path.name.split('.'))])


def plan_tfrecords(source: pathlib.Path, name: str, data_dir: str | None) -> Plan:
    """Plans the same dataset, version and files as array_record.

    Args:
      source: folder of one version, see `find_source`.
      name: of the dataset.
      data_dir: of TFDS; None for its default.

    Raises:
      UserError: when the folder is of another dataset, or lacks a file.
    """
    info = read_info(source)
    dataset, config = info.get('name', ''), info.get('configName', '')
    base = name.partition(':')[0]
    if base not in (dataset, f'{dataset}/{config}'):
        raise UserError(f'{source} holds {dataset}, not {base}')
    stored = info.get('fileFormat', 'tfrecord')
    if stored != 'tfrecord':
        raise UserError(f'{source} is stored as {stored}, not as tfrecord')
    version = str(info.get('version', ''))
    folder = find_root(data_dir).joinpath(dataset, config, version)
    shards, digest = [], hashlib.sha256()
    for split in info.get('splits', ()):
        lengths = [int(length) for length in split.get('shardLengths', ())]
        if not lengths:
            raise UserError(
                f'{source / "dataset_info.json"} does not tell the examples in each '
                f'file of {split.get("name")}; TFDS wrote it before 2020'
            )
        for i, length in enumerate(lengths):
            stem, end = f'{dataset}-{split["name"]}', f'{i:05}-of-{len(lengths):05}'
            path = source / f'{stem}.tfrecord-{end}'
            if not path.exists():
                raise UserError(f'{path} is missing')
            size, copy = path.stat().st_size, f'{stem}.array_record-{end}'
            digest.update(f'{copy} {length} {size}\n'.encode())
            read = functools.partial(read_records, path)
            shards.append(Shard(split['name'], copy, length, size, read))
    if not shards:
        raise UserError(f'{source / "dataset_info.json"} tells of no splits')
    return Plan(
        name=base,
        source=str(source.absolute()),
        folder=folder,
        shards=shards,
        digest=digest.hexdigest(),
        write_info=functools.partial(_write_info, source, base, info),
    )


def _write_info(
    source: pathlib.Path,
    name: str,
    info: dict[str, Any],
    folder: pathlib.Path,
    sizes: Mapping[str, int],
) -> None:
    """Copies what lies beside the records, with the format put right."""
    for path in source.iterdir():
        if path.is_file() and '.tfrecord' not in path.name:
            shutil.copyfile(path, folder / path.name)
    if not (folder / 'features.json').exists():  # TFDS before version 4
        import tensorflow_datasets as tfds

        features = tfds.builder(name).info.features
        features.save_config(str(folder))
    splits = [
        {**split, 'numBytes': str(sizes[split['name']]), 'filepathTemplate': _TEMPLATE}
        for split in info['splits']
    ]
    info = {**info, 'fileFormat': 'array_record', 'splits': splits}
    info.pop('alternativeFileFormats', None)
    text = json.dumps(info, indent=2, sort_keys=True)
    (folder / 'dataset_info.json').write_text(text)
