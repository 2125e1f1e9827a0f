"""What lies in the folder of a prepared dataset, and whether it is whole."""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from vit_jax.errors import UserError, reason, some


def is_prepared(
    folder: pathlib.Path, expected: Mapping[str, int] | None = None
) -> bool:
    """Whether `folder` holds a whole dataset that can be read here.

    Args:
      folder: of a version.
      expected: examples of each split that must be there; None for any.

    Raises:
      UserError: when it holds something else, other numbers of examples, or not all
        of its files as they were written.
    """
    info = folder / 'dataset_info.json'
    if not info.exists():
        if folder.exists() and any(folder.iterdir()):
            raise UserError(
                f'{folder} holds files, but no dataset_info.json; move it away, or '
                'choose another --data_dir'
            )
        return False
    stored = read_info(folder).get('fileFormat', 'tfrecord')
    if stored != 'array_record':
        raise UserError(
            f'{folder} is stored as {stored}; to convert it, choose another '
            '--data_dir, and pass --tfrecords with the one it is in now'
        )
    advice = 'to prepare it anew, remove that folder or choose another --data_dir'
    splits = count_examples(folder)
    if expected and any(splits.get(split) != n for split, n in expected.items()):
        raise UserError(
            f'{folder} holds {list_splits(splits)} examples instead of '
            f'{list_splits(expected)}; {advice}'
        )
    damaged = list(_find_damaged(folder))
    if damaged:
        raise UserError(
            f'{folder} lacks files, or they are damaged: {some(damaged)}; {advice}'
        )
    return True


def read_info(folder: pathlib.Path) -> dict[str, Any]:
    """What TFDS has noted of the dataset in `folder`.

    Raises:
      UserError: when its dataset_info.json cannot be read.
    """
    path = folder / 'dataset_info.json'
    try:
        info = json.loads(path.read_text())
        if not isinstance(info, dict):
            raise ValueError('it is no JSON object')
    except (OSError, ValueError) as error:
        raise UserError(f'{path} cannot be read: {reason(error)}') from error
    return info


def count_examples(folder: pathlib.Path) -> dict[str, int]:
    """Examples of each split, as TFDS has noted them."""
    return {
        split['name']: sum(map(int, split.get('shardLengths', ())))
        for split in read_info(folder).get('splits', ())
    }


def list_splits(splits: Mapping[str, int]) -> str:
    """Numbers of examples for people.

    >>> list_splits({'train': 1_281_167, 'validation': 50_000})
    '1,281,167 train, 50,000 validation'
    """
    return ', '.join(f'{count:,} {split}' for split, count in splits.items())


def _find_damaged(folder: pathlib.Path) -> Iterator[str]:
    """Names of files that do not hold as many records as TFDS has noted."""
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module

    info = read_info(folder)
    for split in info.get('splits', ()):
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder,
            template=split.get('filepathTemplate', ''),
            dataset_name=info['name'],
            split=split['name'],
            filetype_suffix='array_record',
        )
        lengths = [int(length) for length in split.get('shardLengths', ())]
        for path, length in zip(template.sharded_filepaths(len(lengths)), lengths):
            # The end of a file tells; of a missing one the count is 0 at first.
            try:
                reader = array_record_module.ArrayRecordReader(str(path))
                count = reader.num_records()
                reader.close()
            except RuntimeError:
                count = None
            if count != length:
                yield path.name
