"""ImageNet (ILSVRC 2012) from its tars or from a folder, as TFDS's `imagenet2012`.

Examples are ordered so that the j-th of n images of a class stands at (j + 1/2) / n of
its split, by name within a class. Any slice of a split (`train[:10%]`) then has its
share of every class, and all sources give the same files. Images are kept byte for
byte: TFDS's own preparation writes 23 of the training images anew (22 are CMYK, one is
a PNG), which decoders that go by content read as they are.
"""

import dataclasses
import functools
import hashlib
import itertools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from vit_jax.data.imagenet_files import (
    Classes,
    Entry,
    find_in_folder,
    find_in_tars,
    read_classes,
)
from vit_jax.data.prepare import Plan, Shard, find_root
from vit_jax.errors import UserError, some

_NAME = 'imagenet2012'
_MAGIC = (b'\xff\xd8\xff', b'\x89PNG')


@dataclasses.dataclass(frozen=True)
class ImageNetLayout:
    """What a complete set is, and how it is cut.

    Attributes:
      num_train: training images.
      num_val: validation images.
      synsets: classes that must have training images; None for all 1,000.
      shard_bytes: images of a file, about; also what a worker holds in memory.
    """

    num_train: int = 1_281_167
    num_val: int = 50_000
    synsets: tuple[str, ...] | None = None
    shard_bytes: int = 128 << 20

    @property
    def splits(self) -> dict[str, int]:
        """Images of each split."""
        return {'train': self.num_train, 'validation': self.num_val}


def find_folder(data_dir: str | None) -> pathlib.Path:
    """Where TFDS looks for ImageNet."""
    import tensorflow_datasets as tfds

    version = tfds.builder_cls(_NAME).VERSION
    return find_root(data_dir) / _NAME / str(version)


def plan_imagenet(
    source: pathlib.Path,
    data_dir: str | None,
    tars: bool,
    layout: ImageNetLayout | None = None,
    allow_partial: bool = False,
) -> Plan:
    """Plans ImageNet; reads where its images lie, and none of them.

    Args:
      source: folder of the two tars, or of `train/` and `val/`.
      data_dir: of TFDS; None for its default.
      tars: which of the two `source` is.
      layout: what a complete set is.
      allow_partial: take what there is, also when it is not complete.

    Raises:
      UserError: when something is missing, damaged, or nothing of ImageNet.
    """
    classes = read_classes()
    find = find_in_tars if tars else find_in_folder
    splits = find(source, classes, allow_partial)
    for split, entries in splits.items():
        if not entries:
            raise UserError(f'{source} has no {split} images')
    layout = layout or ImageNetLayout()
    if not allow_partial:
        _check_complete(splits, layout, classes)
    return _make_plan(splits, data_dir, layout, source)


def spread(labels: Sequence[int]) -> np.ndarray:
    """The order in which every class is spread evenly, as indices `[n]`.

    Args:
      labels: `[n]`; examples of a class come in the order that they have here.

    >>> spread([0, 0, 0, 0, 1, 1])
    array([0, 4, 1, 2, 5, 3])
    """
    label = np.asarray(labels, np.int64)
    count = np.bincount(label)
    grouped = np.argsort(label, kind='stable')
    start = np.cumsum(count) - count
    position = np.empty(len(label))
    position[grouped] = np.arange(len(label)) - start[label[grouped]]
    return np.lexsort((label, (position + 0.5) / count[label]))


def _make_plan(
    splits: Mapping[str, list[Entry]],
    data_dir: str | None,
    layout: ImageNetLayout,
    source: pathlib.Path,
) -> Plan:
    import tensorflow_datasets as tfds

    # Its version and its features.
    builder = tfds.builder(_NAME, data_dir=data_dir, file_format='array_record')
    serializer = tfds.core.example_serializer.ExampleSerializer(
        builder.info.features.get_serialized_info()
    )
    digest = hashlib.sha256()
    shards = []
    for split, entries in splits.items():
        entries = sorted(entries, key=lambda entry: (entry.label, entry.name))
        for before, entry in itertools.pairwise(entries):
            if (before.label, before.name) == (entry.label, entry.name):
                raise UserError(f'{source} has {entry.name} twice')
        entries = [entries[i] for i in spread([entry.label for entry in entries])]
        total = sum(entry.size for entry in entries)
        count = min(len(entries), max(1, round(total / layout.shard_bytes)))
        bounds = [len(entries) * i // count for i in range(count + 1)]
        for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
            part = entries[start:stop]
            name = f'{_NAME}-{split}.array_record-{i:05}-of-{count:05}'
            digest.update(f'{name}\n'.encode())
            for entry in part:
                line = f'{entry.name} {entry.label} {entry.size}\n'
                digest.update(line.encode())
            num_bytes = sum(entry.size for entry in part)
            read = functools.partial(_read_examples, part, serializer)
            shards.append(Shard(split, name, len(part), num_bytes, read))

    def write_info(folder: pathlib.Path, sizes: Mapping[str, int]) -> None:
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=_NAME, filetype_suffix='array_record'
        )
        infos = [
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[s.num_examples for s in shards if s.split == split],
                num_bytes=num_bytes,
                filename_template=template,
            )
            for split, num_bytes in sizes.items()
        ]
        builder.info.set_splits(tfds.core.SplitDict(infos))
        builder.info.write_to_directory(folder)

    return Plan(
        name=_NAME,
        source=str(source.absolute()),
        folder=find_folder(data_dir),
        shards=shards,
        digest=digest.hexdigest(),
        write_info=write_info,
    )


def _read_examples(entries: Sequence[Entry], serializer) -> Iterator[bytes]:
    """The records of a shard."""
    images = dict(_read_images(entries))
    for i, entry in enumerate(entries):
        example = {
            'image': images.pop(i),
            'label': entry.label,
            'file_name': entry.name,
        }
        proto = serializer.get_tf_example(example)
        # The order of its fields is otherwise that of a hash table.
        yield proto.SerializeToString(deterministic=True)


def _read_images(entries: Sequence[Entry]) -> Iterator[tuple[int, bytes]]:
    """(index, bytes) of each, in the order in which they lie on the disk."""
    order = sorted(
        range(len(entries)), key=lambda i: (entries[i].path, entries[i].offset)
    )
    for path, group in itertools.groupby(order, lambda i: entries[i].path):
        with open(path, 'rb', buffering=0) as file:
            for i in group:
                entry = entries[i]
                data = os.pread(file.fileno(), entry.size, entry.offset)
                if len(data) != entry.size or not data.startswith(_MAGIC):
                    where = (
                        path if path.endswith(entry.name) else f'{path}: {entry.name}'
                    )
                    raise UserError(f'{where} is no JPEG or PNG, or was cut short')
                yield i, data


def _check_complete(
    splits: Mapping[str, Sequence[Entry]],
    layout: ImageNetLayout,
    classes: Classes,
) -> None:
    names = list(classes.labels)
    found = {names[entry.label] for entry in splits['train']}
    wanted = layout.synsets or names
    missing = [synset for synset in wanted if synset not in found]
    advice = '; to take what there is, pass --allow_partial'
    if missing:
        raise UserError(
            f'{len(missing):,} of {len(wanted):,} synsets have no training image: '
            f'{some(missing)}{advice}'
        )
    for split, entries in splits.items():
        count, expected = len(entries), layout.splits[split]
        if count != expected:
            raise UserError(
                f'{count:,} {split} images, where ImageNet has {expected:,}{advice}'
            )
