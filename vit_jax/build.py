"""The hinge: `build(config) -> Run`, the only reader of a config.

All that trains, evaluates or looks at an experiment takes a `Run`.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from vit_jax.config import ConfigReader, check_ranges, check_unread
from vit_jax.data.datasets import Dataset, load_dataset, pick_eval_split, subsample
from vit_jax.data.input_pipeline import Shard, eval_batches, train_batches
from vit_jax.data.transforms import INTERPOLATIONS, EvalTransform, TrainTransform
from vit_jax.errors import UserError, unknown
from vit_jax.models import build_model
from vit_jax.optim import make_optimizer, make_schedule
from vit_jax.parallel import Parallel, make_parallel
from vit_jax.pretrained import Report, load_variables
from vit_jax.pretrained.metadata import check_runs_no_code
from vit_jax.pretrained.published import model_facts
from vit_jax.pretrained.zoo import HALF, IMAGENET
from vit_jax.state import TrainState
from vit_jax.tasks import get_task
from vit_jax.tasks.classify import Settings
from vit_jax.typing import Batch, Metrics, PRNGKey, Variables

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}

# Mean and standard deviation of the pixels, in [0, 1].
NORMALIZATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    'half': HALF,
    'imagenet': IMAGENET,
}


@dataclasses.dataclass(frozen=True)
class Run:
    """An experiment, assembled; no example has been read, no array computed.

    Attributes:
      model: the Flax module.
      dataset: what is known of the data.
      init: () -> TrainState; pure.
      load: sharding= -> (variables, report), the weights that the run starts from; or
        None, where it starts from `init` alone.
      train_step: (state, batch) -> (state, metrics); pure.
      eval_step: (variables, batch) -> metrics; pure.
      train_data: examples seen before -> endless host batches, this process's rows.
      eval_data: () -> host batches, every example of the split once.
      schedule: step -> learning rate.
      parallel: how steps run on the devices.
      state_shape: shapes and dtypes of the TrainState.
      batch_shape: shapes and dtypes of a global batch.
      num_steps: updates in all.
      batch_size: images per step, over all devices.
      eval_every_steps, checkpoint_every_steps, log_every_steps: periods.
      checkpoint_keep: how many of the newest checkpoints are kept.
      tensorboard: whether metrics go to TensorBoard events too.
      metadata: what a checkpoint says of itself: model, classes, preprocessing and
        the resolved config; JSON.
    """

    model: nn.Module
    dataset: Dataset
    init: Callable[[], TrainState]
    load: Callable[..., tuple[Variables, Report]] | None
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    eval_step: Callable[[Variables, Batch], Metrics]
    train_data: Callable[[int], grain.DatasetIterator]
    eval_data: Callable[[], grain.DatasetIterator]
    schedule: optax.Schedule
    parallel: Parallel
    state_shape: TrainState
    batch_shape: dict[str, jax.ShapeDtypeStruct]
    num_steps: int
    batch_size: int
    eval_every_steps: int
    checkpoint_every_steps: int
    checkpoint_keep: int
    log_every_steps: int
    tensorboard: bool
    metadata: dict[str, Any]


def build(config: ConfigDict, named: Collection[str] = ()) -> Run:
    """Assembles the experiment that a config describes.

    Args:
      config: from `default_config`, by way of a recipe.
      named: keys that the user named; one that this run does not read is an error,
        even at its default.

    Raises:
      UserError: for values that do not fit each other, and for keys that were set
        but that this run does not read.
    """
    c = ConfigReader(config)
    check_ranges(config)
    _check_json(config)
    parallel = make_parallel(c.parallel.mode)
    batch_size = c.batch_size
    parallel.check_batch_size(batch_size, 'config.batch_size')

    dataset = load_dataset(c.dataset.name, c.dataset.data_dir)
    image_size = _image_size(c, dataset)
    image_shape = (*image_size, dataset.image_shape[2])
    train_data = _train_data(c, dataset, image_shape)
    eval_data = _eval_data(c, dataset, image_shape, parallel)
    num_steps = _num_steps(c, dataset)

    model = make_model(c.model.name, len(dataset.class_names), c.dtype, c.model.kwargs)
    schedule = make_schedule(
        c.optim.schedule, c.optim.learning_rate, num_steps, c.optim.warmup_steps
    )
    tx = make_optimizer(c.optim.name, schedule, c.optim.weight_decay, c.optim.clip_norm)

    task = get_task(c.task)
    mean, std = _normalization(c, dataset)
    settings = Settings(mean, std, c.optim.label_smoothing)
    init_rng, step_rng = jax.random.split(jax.random.key(c.seed))
    init = partial(
        task.init_state, model=model, tx=tx, rng=init_rng, image_shape=image_shape
    )
    train_step = partial(
        task.train_step, model=model, tx=tx, rng=step_rng, settings=settings
    )
    eval_step = partial(task.eval_step, model=model, settings=settings)

    run = Run(
        model=model,
        dataset=dataset,
        init=init,
        load=_load(c, model, image_shape, init_rng),
        train_step=train_step,
        eval_step=eval_step,
        train_data=train_data,
        eval_data=eval_data,
        schedule=schedule,
        parallel=parallel,
        state_shape=jax.eval_shape(init),  # a model that does not fit fails here
        batch_shape={
            'image': jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.uint8),
            'label': jax.ShapeDtypeStruct((batch_size,), jnp.int32),
            'weight': jax.ShapeDtypeStruct((batch_size,), jnp.float32),
        },
        num_steps=num_steps,
        batch_size=batch_size,
        eval_every_steps=c.eval.every_steps,
        checkpoint_every_steps=c.checkpoint.every_steps,
        checkpoint_keep=c.checkpoint.keep,
        log_every_steps=c.log.every_steps,
        tensorboard=c.log.tensorboard,
        metadata={
            'model': {
                'name': c.model.name,
                'kwargs': c.model.kwargs,
                'num_classes': len(dataset.class_names),
                'dtype': c.dtype,
                **model_facts(model, image_size),
            },
            'dataset': dataset.name,
            'eval_split': c.dataset.eval_split or pick_eval_split(dataset),
            'class_names': list(dataset.class_names),
            'num_train_examples': dataset.splits.get(c.dataset.train_split),
            'preprocessing': {
                'image_size': list(image_size),
                'channels': image_shape[2],
                'mean': list(mean),
                'std': list(std),
                'crop_fraction': c.dataset.eval_crop,
                'interpolation': c.dataset.interpolation,
            },
            'config': config.copy_and_resolve_references().to_dict(),
        },
    )
    check_unread(config, c.unread(), named)
    return run


def make_model(
    name: str, num_classes: int, dtype: str, kwargs: dict[str, Any]
) -> nn.Module:
    """The model of a config's values.

    Raises:
      UserError: for an unknown name, dtype or field.
    """
    if dtype not in DTYPES:
        raise unknown('dtype', dtype, DTYPES)
    for key in ('name', 'num_classes', 'dtype'):
        if key in kwargs:
            raise UserError(f'model.kwargs.{key} is not for the config to set')
    return build_model(name, num_classes, dtype=DTYPES[dtype], **kwargs)


def make_stored_model(about: Mapping[str, Any], path: str | os.PathLike) -> nn.Module:
    """The model that weights say they are of.

    Args:
      about: the section 'model' of their metadata.
      path: of the weights.

    Raises:
      UserError: for a model that cannot be made; and for one that is code of a fork,
        unless `path` is the workdir of a run.
    """
    if not (pathlib.Path(path) / 'checkpoints').is_dir():
        check_runs_no_code(about, os.fspath(path))
    return make_model(
        about['name'], about['num_classes'], about['dtype'], dict(about['kwargs'])
    )


def _check_json(config: ConfigDict) -> None:
    """Raises UserError for values that a workdir could not store."""
    try:
        json.dumps(config.copy_and_resolve_references().to_dict())
    except TypeError as error:
        raise UserError(
            f'the config must be plain values ({error}); name a function or class by '
            "its path, 'package.module:name'"
        ) from error


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


def _train_data(
    c: ConfigReader, dataset: Dataset, image_shape: tuple[int, int, int]
) -> Callable[[int], grain.DatasetIterator]:
    crop = c.augment.crop
    transform = TrainTransform(
        size=image_shape[:2],
        channels=image_shape[2],
        crop=crop,
        interpolation=_interpolation(c),
        flip=c.augment.flip,
        # Read only where they count, so that setting them elsewhere is an error.
        **({'pad': c.augment.pad} if crop == 'pad' else {}),
        **({'min_scale': c.augment.min_scale} if crop == 'resized' else {}),
    )
    split, fraction, seed = c.dataset.train_split, c.dataset.train_fraction, c.seed
    _check_split(dataset, split)
    batches = partial(
        train_batches,
        transform=transform,
        batch_size=c.batch_size,
        seed=seed,
        shard=Shard(jax.process_index(), jax.process_count()),
        num_workers=c.dataset.num_workers,
    )
    return lambda start: batches(
        subsample(dataset.open(split), fraction, seed), start=start
    )


def _eval_data(
    c: ConfigReader,
    dataset: Dataset,
    image_shape: tuple[int, int, int],
    parallel: Parallel,
) -> Callable[[], grain.DatasetIterator]:
    batch_size = c.eval.batch_size
    if batch_size is None:
        batch_size = c.batch_size
    parallel.check_batch_size(batch_size, 'config.eval.batch_size')
    split = c.dataset.eval_split or pick_eval_split(dataset)
    _check_split(dataset, split)
    batches = partial(
        eval_batches,
        transform=EvalTransform(
            image_shape[:2], image_shape[2], c.dataset.eval_crop, _interpolation(c)
        ),
        batch_size=batch_size,
        shard=Shard(jax.process_index(), jax.process_count()),
        num_workers=c.dataset.num_workers,
    )
    return lambda: batches(dataset.open(split))


def _check_split(dataset: Dataset, split: str) -> None:
    """Raises UserError now, not when the split is first opened, after many steps."""
    name = split.partition('[')[0]  # TFDS knows 'test[:10%]' too
    if dataset.splits and name not in dataset.splits and '+' not in name:
        raise unknown(f'split of {dataset.name}', split, dataset.splits)
    if dataset.splits.get(split) == 0:
        raise UserError(f'split {split!r} of {dataset.name!r} has no examples')


def _num_steps(c: ConfigReader, dataset: Dataset) -> int:
    """Updates in all, from one of num_steps and num_epochs."""
    num_steps, num_epochs = c.num_steps, c.num_epochs
    if (num_steps is None) == (num_epochs is None):
        raise UserError('set one of config.num_steps and config.num_epochs, not both')
    if num_steps is None:
        if c.dataset.train_split not in dataset.splits:
            raise UserError(
                f'the size of {dataset.name!r} split {c.dataset.train_split!r} is not '
                'known here; set config.num_steps instead of num_epochs'
            )
        examples = num_epochs * dataset.splits[c.dataset.train_split]
        num_steps = round(examples / c.batch_size)
    if num_steps <= 0:
        raise UserError(f'the run has {num_steps} steps; it needs at least one')
    return num_steps


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


def _load(
    c: ConfigReader, model: nn.Module, image_shape: tuple[int, int, int], rng: PRNGKey
) -> Callable[..., tuple[Variables, Report]] | None:
    if c.init.weights is None:
        return None
    return partial(
        load_variables,
        c.init.weights,
        model,
        image_shape[:2],
        channels=image_shape[2],
        new_head=c.init.new_head,
        rng=rng,  # as in `init`: a new head is the one that a fresh model has
    )
