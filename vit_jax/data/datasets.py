"""From a dataset's name to random access: 'digits', any TFDS name, folders, synthetic.

A `DataSource` gives example i as `{'image', 'label', 'name'}`, the image still
encoded. What is done with it is the business of `transforms`.
"""

import contextlib
import dataclasses
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from vit_jax.data.progress import Progress
from vit_jax.data.tfds_builder import Splits, check_split, find_builder, reading
from vit_jax.errors import UserError, unknown
from vit_jax.forks import import_path, is_path

_CHUNK = 256  # records read at a time for their labels
_FOLDER_SPLITS = ('train', 'validation', 'val', 'test')
IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp')

# Splits of datasets that are often planned for (`summarize`, schedules) on machines
# that do not hold them. Examples per split, from the datasets' own pages.
_PUBLISHED_SPLITS = {
    'imagenet2012': {'train': 1_281_167, 'validation': 50_000},
    'cifar10': {'train': 50_000, 'test': 10_000},
    'cifar100': {'train': 50_000, 'test': 10_000},
}


class DataSource(Protocol):
    """Random access to examples; must survive pickling, for worker processes.

    A source that knows its labels without reading its images may have a method
    `read_labels(advance)`, which returns them all as an array, and calls `advance` with
    a number of examples as it goes.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`{'image': encoded bytes or uint8 [h, w, c], 'label': int, 'name': str}`."""
        ...


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What is known of a dataset before its examples are read.

    Attributes:
      name: as in the config.
      location: where it is read from, for people.
      splits: examples of each split; what is prepared by TFDS also knows those of a
        part, `splits['train[:10%]']`.
      class_names: a name per label.
      image_shape: (height, width, channels); None where sizes differ.
      open: split -> DataSource; raises UserError for what is not there.
    """

    name: str
    location: str
    splits: Mapping[str, int]
    class_names: tuple[str, ...]
    image_shape: tuple[int | None, int | None, int]
    open: Callable[[str], DataSource]


def load_dataset(name: str, data_dir: str | None = None) -> Dataset:
    """Finds a dataset by name.

    Args:
      name: 'digits'; a TFDS name ('cifar10', 'cifar10:3.0.2'); 'folder:/path' with
        `train/<class>/*.jpg` and so on; 'synthetic', optionally with options
        ('synthetic:num_classes=10,size=32,channels=3,num_examples=512'); or the
        path of a fork's function, 'my_fork.data:make', called with `data_dir`.
      data_dir: where TFDS keeps its datasets; None for its default.

    Raises:
      UserError: for an unknown name or a folder that is not laid out so.
    """
    kind, _, rest = name.partition(':')
    if kind == 'folder':
        return _folder(name, pathlib.Path(rest).expanduser())
    if kind == 'synthetic':
        return _synthetic(name, rest)
    if '.' in kind and is_path(name):
        return import_path(name)(data_dir)
    return _tfds(name, data_dir)


def pick_eval_split(dataset: Any) -> str:
    """The split to evaluate on when the config names none."""
    for split in ('validation', 'val', 'test'):
        if split in dataset.splits:
            return split
    if not dataset.splits:
        dataset.open('test')  # raises, and says what is missing
    raise UserError(
        f'dataset {dataset.name!r} has no validation, val or test split; set '
        f'dataset.eval_split to one of: {", ".join(dataset.splits)}'
    )


@dataclasses.dataclass(frozen=True)
class Subset:
    """The examples of `source` at `indices`."""

    source: DataSource
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[int(self.indices[index])]


def subsample(source: DataSource, fraction: float, seed: int) -> DataSource:
    """Keeps the same fraction of every class, at least one example of each.

    The subset of a smaller fraction lies within that of a larger one. This is the
    protocol of ConViT's table 2 (arXiv 2103.10697). Reads every label once.

    Args:
      source: all examples.
      fraction: in (0, 1].
      seed: chooses the examples.

    Raises:
      UserError: when `fraction` is out of range.
    """
    if not 0.0 < fraction <= 1.0:
        raise UserError(f'dataset.train_fraction must be in (0, 1], not {fraction}')
    if fraction == 1.0:
        return source
    with Progress('reading labels', len(source), unit='example') as progress:
        labels = _read_labels(source, progress.advance)
    rng = np.random.default_rng(seed)
    kept = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        kept.append(members[: max(1, round(fraction * len(members)))])
    return Subset(source, np.sort(np.concatenate(kept)))


def _read_labels(source: DataSource, advance: Callable[[int], None]) -> np.ndarray:
    if hasattr(source, 'read_labels'):
        return source.read_labels(advance)
    labels = []
    for i in range(len(source)):
        labels.append(source[i]['label'])
        advance(1)
    return np.asarray(labels)


# --- TFDS ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _TfdsSource:
    source: Any
    name: str
    location: str

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = f'{self.name}[{index}]'
        with reading(name, self.location):
            example = self.source[index]
            if example['label'] is None:  # of a file cut where a block of it ended
                raise RuntimeError('there is no such record')
        file_name = example.get('file_name')
        if isinstance(file_name, bytes):
            name += f' ({file_name.decode(errors="replace")})'
        return {'image': example['image'], 'label': int(example['label']), 'name': name}

    def read_labels(self, advance: Callable[[int], None]) -> np.ndarray:
        """See `DataSource`: records are read whole, many at a time."""
        import tensorflow_datasets as tfds

        label = self.source.dataset_info.features['label']
        # Not `PartialDecoding`, for which TFDS needs TensorFlow.
        features = tfds.features.FeaturesDict({'label': label})
        labels = []
        for start in range(0, len(self), _CHUNK):
            places = range(start, min(start + _CHUNK, len(self)))
            with reading(f'{self.name}[{start}:{places.stop}]', self.location):
                records = self.source.data_source.__getitems__(places)
                found = [features.deserialize_example_np(x)['label'] for x in records]
                if None in found:
                    raise RuntimeError('there is no such record')
            labels += found
            advance(len(found))
        return np.asarray(labels)


def _tfds(name: str, data_dir: str | None) -> Dataset:
    import tensorflow_datasets as tfds

    if data_dir is not None:
        data_dir = os.path.expanduser(data_dir)
    if name == 'digits':
        builder = _prepare_digits(data_dir)
    else:
        builder = find_builder(name, data_dir)
    features = dict(builder.info.features.items())
    if not isinstance(features.get('image'), tfds.features.Image) or not isinstance(
        features.get('label'), tfds.features.ClassLabel
    ):
        raise UserError(
            f'dataset {name!r} is not for image classification: it needs the features '
            f'image and label, and has {", ".join(features)}'
        )
    prepared = Splits(builder.info.splits)

    where = f' --data_dir={data_dir}' if data_dir else ''
    if builder.name == 'imagenet2012':  # which is never downloaded
        source = '--tars=DIR' if name == builder.name else '--tfrecords=DIR'
        where = f' {source}{where}'

    def open_split(split: str) -> DataSource:
        check_split(builder, name, split, where)
        source = builder.as_data_source(
            split=split, decoders={'image': tfds.decode.SkipDecoding()}
        )
        return _TfdsSource(source, f'{name}/{split}', str(builder.data_path))

    return Dataset(
        name=name,
        location=str(builder.data_path),
        splits=prepared or _PUBLISHED_SPLITS.get(builder.name, {}),
        class_names=tuple(features['label'].names),
        image_shape=features['image'].shape,
        open=open_split,
    )


def _prepare_digits(data_dir: str | None):
    import tensorflow_datasets as tfds

    from vit_jax.data.digits import Digits

    builder = Digits(data_dir=data_dir, file_format='array_record')
    if not builder.is_prepared():
        tfds.disable_progress_bar()
        try:
            # TFDS announces on stdout, which belongs to our commands' results.
            with contextlib.redirect_stdout(sys.stderr):
                builder.download_and_prepare()
        except OSError as error:
            # Another process may have been quicker.
            builder = Digits(data_dir=data_dir, file_format='array_record')
            if not builder.is_prepared():
                raise UserError(
                    f'cannot prepare digits in {builder.data_path}: {error}'
                ) from error
    return builder


# --- Folders of images --------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _FolderSource:
    paths: list[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        return {
            'image': pathlib.Path(path).read_bytes(),
            'label': int(self.labels[index]),
            'name': path,
        }

    def read_labels(self, advance: Callable[[int], None]) -> np.ndarray:
        """See `DataSource`."""
        advance(len(self))
        return self.labels


def _folder(name: str, root: pathlib.Path) -> Dataset:
    if not root.is_dir():
        raise UserError(f'no such folder: {root} (from dataset {name!r})')
    train = root / 'train'
    if not train.is_dir():
        raise UserError(
            f'{root} has no folder train/ with a folder of images per class'
        )
    splits = {name: root / name for name in _FOLDER_SPLITS if (root / name).is_dir()}
    class_names = tuple(sorted(p.name for p in train.iterdir() if _is_visible_dir(p)))
    if not class_names:
        raise UserError(f'{train} has no folders; it needs one per class')
    sources = {
        split: _scan(path, class_names, complete=split == 'train')
        for split, path in splits.items()
    }

    def open_split(split: str) -> DataSource:
        if split not in sources:
            raise unknown(f'split of {name}', split, sources)
        return sources[split]

    return Dataset(
        name=name,
        location=str(root.absolute()),
        splits={split: len(source) for split, source in sources.items()},
        class_names=class_names,
        image_shape=(None, None, 3),
        open=open_split,
    )


def _scan(
    root: pathlib.Path, class_names: tuple[str, ...], complete: bool
) -> _FolderSource:
    """Lists the images of a split; labels follow the classes of `train`."""
    paths, labels = [], []
    for folder in sorted(root.iterdir()):
        if folder.name.startswith('.'):
            continue
        if not folder.is_dir():
            raise UserError(f'{folder} is not in the folder of a class')
        if folder.name not in class_names:
            raise UserError(f'{folder} is a class that the train split does not have')
        label = class_names.index(folder.name)
        files = sorted(p for p in folder.iterdir() if not p.name.startswith('.'))
        for path in files:
            if path.suffix.lower() not in IMAGE_SUFFIXES or not path.is_file():
                raise UserError(
                    f'{path} is not an image ({", ".join(IMAGE_SUFFIXES)}); '
                    'take it out of the dataset'
                )
            paths.append(str(path))
            labels.append(label)
        if complete and not files:
            raise UserError(f'{folder} is a class without images')
    return _FolderSource(paths, np.asarray(labels, np.int32))


def _is_visible_dir(path: pathlib.Path) -> bool:
    return path.is_dir() and not path.name.startswith('.')


# --- Synthetic ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _SyntheticSource:
    """Noise around a pattern per class; example i is a function of (split, i)."""

    num_examples: int
    num_classes: int
    shape: tuple[int, int, int]
    split: str

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = index % self.num_classes
        pattern = np.random.default_rng(label).integers(64, 192, self.shape)
        seed = [index, *self.split.encode()]
        noise = np.random.default_rng(seed).integers(-48, 49, self.shape)
        return {
            'image': (pattern + noise).astype(np.uint8),
            'label': label,
            'name': f'synthetic/{self.split}[{index}]',
        }

    def read_labels(self, advance: Callable[[int], None]) -> np.ndarray:
        """See `DataSource`."""
        advance(len(self))
        return np.arange(len(self)) % self.num_classes


def _synthetic(name: str, options: str) -> Dataset:
    values = {'num_classes': 10, 'size': 32, 'channels': 3, 'num_examples': 512}
    for option in filter(None, options.split(',')):
        key, _, value = option.partition('=')
        if key not in values:
            raise unknown('option of synthetic', key, values)
        if not value.isdecimal() or int(value) == 0:
            raise UserError(f'{name!r}: {key} needs a whole number above 0')
        values[key] = int(value)
    shape = (values['size'], values['size'], values['channels'])

    def open_split(split: str) -> DataSource:
        if split not in ('train', 'test'):
            raise unknown('split of synthetic', split, ['train', 'test'])
        return _SyntheticSource(
            values['num_examples'], values['num_classes'], shape, split
        )

    return Dataset(
        name=name,
        location='generated',
        splits={'train': values['num_examples'], 'test': values['num_examples']},
        class_names=tuple(f'class_{i}' for i in range(values['num_classes'])),
        image_shape=shape,
        open=open_split,
    )
