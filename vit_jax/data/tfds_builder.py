"""What all datasets of TFDS share: finding one, its splits, and whether they are there.

What the examples are is the business of `datasets` (images) and `text` (sentences).
"""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vit_jax.errors import UserError, reason, unknown


def find_builder(
    name: str, data_dir: str | None = None, others: Iterable[str] = ('digits',)
) -> Any:
    """The builder of a dataset, prepared or not.

    Args:
      name: as TFDS has it, 'cifar10:3.0.2' or 'wmt14_translate/de-en'.
      data_dir: where TFDS keeps its datasets; None for its default.
      others: names that are not TFDS's, of which one may have been meant.

    Raises:
      UserError: for an unknown name, version or configuration.
    """
    import tensorflow_datasets as tfds
    import tensorflow_datasets.translate  # which registers those of WMT

    if data_dir is not None:
        data_dir = os.path.expanduser(data_dir)
    try:
        return tfds.builder(name, data_dir=data_dir)
    except (ValueError, AssertionError, ImportError) as error:
        # Community datasets are listed over the network, and with TensorFlow.
        known = [*others, *tfds.list_builders(with_community_datasets=False)]
        if re.split('[:/]', name)[0] not in known:
            raise unknown('dataset', name, known) from error
        first_line, _, _ = str(error).partition('\n')
        raise UserError(f'dataset {name!r}: {first_line}') from error


class Splits(Mapping[str, int]):
    """Examples of each split, and of the parts that TFDS knows: 'train[:10%]'."""

    def __init__(self, splits: Any):
        self._splits = splits

    def __getitem__(self, split: str) -> int:
        try:
            return self._splits[split].num_examples
        except ValueError:
            raise KeyError(split) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._splits)

    def __len__(self) -> int:
        return len(self._splits)


def check_split(builder: Any, name: str, split: str, where: str = '') -> None:
    """Raises UserError unless a split is prepared, as array_record, and all there.

    Args:
      builder: of the dataset.
      name: of the dataset, as the user wrote it.
      split: or a part of it.
      where: options that `vit_jax prepare` needs besides the name, ' --data_dir=DIR'.
    """
    import tensorflow_datasets as tfds

    prepared = Splits(builder.info.splits)
    if not prepared:
        raise UserError(
            f'dataset {name!r} is not prepared at {builder.data_path}; run '
            f'`vit_jax prepare {name}{where}`, or point dataset.data_dir to the '
            'folder that holds it'
        )
    if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        raise UserError(
            f'dataset {name!r} at {builder.data_path} is stored as '
            f'{builder.info.file_format.value}; it must be array_record: `vit_jax '
            f'prepare {name} --tfrecords={builder.data_path} --data_dir=DIR` '
            'writes it so'
        )
    if split not in prepared:
        raise unknown(f'split of {name}', split, prepared)
    if prepared[split] == 0:
        raise UserError(f'split {split!r} of {name!r} has no examples')
    for path in builder.info.splits[split].filepaths:
        if not path.exists():
            raise UserError(
                f'{path} is missing; copy dataset {name!r} there again, or remove '
                'its folder and prepare it anew'
            )


@contextlib.contextmanager
def reading(name: str, location: str) -> Iterator[None]:
    """Says of what array_record cannot read where it lies, and what to do."""
    try:
        yield
    except RuntimeError as error:  # of array_record, which knows no OSError
        raise UserError(
            f'{name} cannot be read: {reason(error)}; a file in {location} is '
            'missing or damaged: copy the dataset there again, or prepare it anew'
        ) from error
