"""What a config says of images: where they are, how they are read and augmented."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax.config import ConfigReader
from vit_jax.data.augment import BatchAugment
from vit_jax.data.datasets import (
    Dataset,
    DataSource,
    load_dataset,
    pick_eval_split,
    subsample,
)
from vit_jax.data.input_pipeline import Shard, eval_batches, train_batches
from vit_jax.data.order import Order
from vit_jax.data.randaugment import parse_randaugment
from vit_jax.data.resident import MakeBatch, check_supported, load
from vit_jax.data.transforms import INTERPOLATIONS, EvalTransform, TrainTransform
from vit_jax.data.watch import Watch
from vit_jax.errors import UserError, unknown
from vit_jax.parallel import Parallel
from vit_jax.pretrained.zoo import HALF, IMAGENET
from vit_jax.task_data import IMAGES, TaskData

PLACEMENTS = ('host', 'device')

# Mean and standard deviation of the pixels, in [0, 1].
NORMALIZATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    'half': HALF,
    'imagenet': IMAGENET,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageData(TaskData):
    """The images of a run; no example has been read.

    The position in the data is the number of examples seen.

    Attributes:
      dataset: what is known of the images.
      image_shape: (height, width, channels), as the model sees them.
      mean, std: of the pixels, in [0, 1], one per channel or one for all.
      augment: what is done to whole batches, on the device.
      The others are those of `TaskData`.
    """

    dataset: Dataset
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: BatchAugment


def make_image_data(c: ConfigReader, parallel: Parallel) -> ImageData:
    """Reads the sections 'dataset' and 'augment' of a config, and the batch sizes.

    Raises:
      UserError: for values that do not fit each other, or data that is not there.
    """
    parallel.check_batch_size(c.batch_size, 'config.batch_size', c.accum_steps)
    name = c.dataset.name
    # Read only where it counts, so that setting it elsewhere is an error.
    elsewhere = name.partition(':')[0] in ('folder', 'synthetic')
    dataset = load_dataset(name, None if elsewhere else c.dataset.data_dir)
    height, width = _image_size(c, dataset)
    image_shape = (height, width, dataset.image_shape[2])
    mean, std = _normalization(c, dataset)
    transform = _train_transform(c, image_shape, mean)
    split, fraction, seed = c.dataset.train_split, c.dataset.train_fraction, c.seed
    _check_split(dataset, split)

    def open_train() -> DataSource:
        return subsample(dataset.open(split), fraction, seed)

    eval_data, probe_data = _eval_data(c, dataset, open_train, image_shape, parallel)
    count = dataset.splits.get(split)

    def seen(position: int) -> dict[str, float]:
        epoch = {'epoch': position / count} if count else {}
        return {'examples_seen': position, **epoch}  # repeats of an image count each

    return ImageData(
        dataset=dataset,
        num_classes=len(dataset.class_names),
        image_shape=image_shape,
        inputs=(jax.ShapeDtypeStruct((1, *image_shape), jnp.float32),),
        units=IMAGES,
        train_data=_train_data(c, open_train, transform),
        position_per_step=c.batch_size,
        seen=seen,
        load=lambda memory: load(open_train(), transform, memory),
        make_batch=_make_batch(c, parallel, dataset, open_train),
        eval_data=eval_data,
        probe_data=probe_data,
        batch_shape={
            'image': jax.ShapeDtypeStruct((c.batch_size, *image_shape), jnp.uint8),
            'label': jax.ShapeDtypeStruct((c.batch_size,), jnp.int32),
            'weight': jax.ShapeDtypeStruct((c.batch_size,), jnp.float32),
        },
        mean=mean,
        std=std,
        augment=_batch_augment(c, parallel),
        facts={
            'dataset': dataset.name,
            'eval_split': c.dataset.eval_split or pick_eval_split(dataset),
            'class_names': list(dataset.class_names),
            'num_train_examples': count,
            'preprocessing': {
                'image_size': [height, width],
                'channels': image_shape[2],
                'mean': list(mean),
                'std': list(std),
                'crop_fraction': c.dataset.eval_crop,
                'interpolation': c.dataset.interpolation,
            },
        },
    )


def _image_size(c: ConfigReader, dataset: Dataset) -> tuple[int, int]:
    """(height, width): the config's, or that of the dataset's images."""
    height, width, _ = dataset.image_shape
    size = c.dataset.image_size
    if size is not None:
        if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
            raise UserError(f'dataset.image_size must be (height, width), not {size}')
        return tuple(size)
    if height is None or width is None:
        raise UserError(
            f'the images of {dataset.name!r} differ in size; set dataset.image_size, '
            'such as (224, 224)'
        )
    return height, width


def _train_transform(
    c: ConfigReader, image_shape: tuple[int, int, int], mean: tuple[float, ...]
) -> TrainTransform:
    crop, spec = c.augment.crop, c.augment.randaugment
    randaugment = None
    if spec is not None:
        randaugment = parse_randaugment(spec, mean, _interpolation(c))
    return TrainTransform(
        size=image_shape[:2],
        channels=image_shape[2],
        crop=crop,
        interpolation=_interpolation(c),
        flip=c.augment.flip,
        randaugment=randaugment,
        skip_corrupt=c.dataset.skip_corrupt,
        # Read only where they count, so that setting them elsewhere is an error.
        **({'pad': c.augment.pad} if crop == 'pad' else {}),
        **({'min_scale': c.augment.min_scale} if crop == 'resized' else {}),
    )


def _train_data(
    c: ConfigReader, open_train: Callable[[], DataSource], transform: TrainTransform
) -> Callable[[int], Watch]:
    batches = partial(
        train_batches,
        transform=transform,
        batch_size=c.batch_size,
        seed=c.seed,
        repeats=c.augment.repeats,
        shard=Shard(jax.process_index(), jax.process_count()),
        num_workers=c.dataset.num_workers,
        timeout_seconds=c.dataset.timeout_seconds,
    )
    return lambda start: batches(open_train(), start=start)


def _make_batch(
    c: ConfigReader,
    parallel: Parallel,
    dataset: Dataset,
    open_train: Callable[[], DataSource],
) -> MakeBatch | None:
    placement = c.dataset.placement
    if placement not in PLACEMENTS:
        raise unknown('dataset.placement', placement, PLACEMENTS)
    if placement == 'host':
        return None
    if parallel.mode != 'jit':
        raise UserError(
            f"dataset.placement='device' needs parallel.mode='jit', not "
            f'{parallel.mode!r}'
        )
    check_supported(c.augment.crop, c.augment.randaugment)
    pad = c.augment.pad if c.augment.crop == 'pad' else 0
    count = dataset.splits.get(c.dataset.train_split)
    if count is None or c.dataset.train_fraction < 1.0:
        count = len(open_train())  # a subset's size depends on its labels
    order = Order(count, c.seed, c.batch_size, c.augment.repeats)
    return MakeBatch(order, pad, c.augment.flip)


def _eval_data(
    c: ConfigReader,
    dataset: Dataset,
    open_train: Callable[[], DataSource],
    image_shape: tuple[int, int, int],
    parallel: Parallel,
) -> tuple[Callable[[], Watch], Callable[[], Watch]]:
    batch_size = c.eval.batch_size
    if batch_size is None:
        batch_size = c.batch_size
    parallel.check_batch_size(batch_size, 'config.eval.batch_size')
    split = c.dataset.eval_split or pick_eval_split(dataset)
    _check_split(dataset, split)
    batches = partial(
        eval_batches,
        transform=EvalTransform(
            image_shape[:2],
            image_shape[2],
            c.dataset.eval_crop,
            _interpolation(c),
            c.dataset.skip_corrupt,
        ),
        batch_size=batch_size,
        shard=Shard(jax.process_index(), jax.process_count()),
        num_workers=c.dataset.num_workers,
        timeout_seconds=c.dataset.timeout_seconds,
    )
    return lambda: batches(dataset.open(split)), lambda: batches(open_train())


def _check_split(dataset: Dataset, split: str) -> None:
    """Raises UserError now, not when the split is first opened, after many steps."""
    name = split.partition('[')[0]  # TFDS knows 'test[:10%]' too
    if dataset.splits and name not in dataset.splits and '+' not in name:
        raise unknown(f'split of {dataset.name}', split, dataset.splits)
    if dataset.splits.get(split) == 0:
        raise UserError(f'split {split!r} of {dataset.name!r} has no examples')


def _batch_augment(c: ConfigReader, parallel: Parallel) -> BatchAugment:
    mixup, cutmix = c.augment.mixup, c.augment.cutmix
    mixing: dict[str, Any] = {}
    if mixup or cutmix:
        mixing = {'mix_mode': c.augment.mix_mode, 'mix_prob': c.augment.mix_prob}
        count = parallel.data if parallel.mode == 'pmap' else 1
        if c.batch_size // count % 2:
            raise UserError(
                'augment.mixup and augment.cutmix mix pairs of neighbouring images: '
                f'batch_size {c.batch_size} must be a multiple of {2 * count}'
            )
    if mixup and cutmix:
        mixing['switch_prob'] = c.augment.mix_switch_prob
    return BatchAugment(c.augment.erasing, mixup, cutmix, **mixing)


def _normalization(
    c: ConfigReader, dataset: Dataset
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    name, channels = c.dataset.normalize, dataset.image_shape[2]
    if name not in NORMALIZATIONS:
        raise unknown('dataset.normalize', name, NORMALIZATIONS)
    mean, std = NORMALIZATIONS[name]
    if len(mean) not in (1, channels):
        raise UserError(
            f'dataset.normalize={name!r} is for images of {len(mean)} channels, '
            f'{dataset.name!r} has {channels}'
        )
    return mean, std


def _interpolation(c: ConfigReader) -> str:
    if c.dataset.interpolation not in INTERPOLATIONS:
        raise unknown('dataset.interpolation', c.dataset.interpolation, INTERPOLATIONS)
    return c.dataset.interpolation
