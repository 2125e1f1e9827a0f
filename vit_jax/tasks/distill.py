"""Classification that also learns from another model, the teacher.

DeiT, "Training data-efficient image transformers & distillation through attention",
arXiv 2012.12877, section 4. A student with a distillation token ('DeiT-S/16-distilled')
has a classifier for each: the class token's learns from the label, the distillation
token's from the teacher. Any other student learns both with its one output.

The teacher sees the images that the student sees, augmented and mixed. It is no part
of a checkpoint: a run that goes on reads it again.
"""

import dataclasses
import os
import sys
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from vit_jax.axes import batch_sum
from vit_jax.config import ConfigReader
from vit_jax.errors import UserError, unknown
from vit_jax.image_data import ImageData
from vit_jax.losses import cross_entropy
from vit_jax.metrics import classification_metrics
from vit_jax.modules import make_stored_model
from vit_jax.pretrained import load_variables
from vit_jax.pretrained.classes import check_classes
from vit_jax.pretrained.load import Placement
from vit_jax.pretrained.metadata import is_complete
from vit_jax.pretrained.published import find_published
from vit_jax.pretrained.source import open_source
from vit_jax.state import TrainState
from vit_jax.tasks import classify
from vit_jax.tasks.classify import eval_step, prepare
from vit_jax.typing import (
    Array,
    Batch,
    Inputs,
    Metrics,
    PRNGKey,
    Shape,
    Variables,
)
from vit_jax.update import accumulate, apply_gradients

__all__ = [
    'eval_step',
    'facts',
    'init_state',
    'load_teacher',
    'make_settings',
    'train_step',
]

KINDS = ('hard', 'soft')


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A model to learn from; its variables lie in the state.

    Attributes:
      path: of the weights, see `load_variables`.
      model: the Flax module.
      image_shape: (height, width, channels) of the run's images.
      mean, std: of the pixels that it was trained with, in [0, 1].
      grid: of the positions in the weights, where it is known.
    """

    path: str
    model: nn.Module
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    grid: Shape | None = None

    @property
    def shapes(self) -> Any:
        """Shapes and dtypes of its variables."""
        image = jnp.zeros((1, *self.image_shape))
        return jax.eval_shape(
            lambda: self.model.init({'params': jax.random.key(0)}, image, train=False)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(classify.Settings):
    """What a step needs beside model and optimizer.

    Attributes:
      teacher: see `Teacher`.
      kind: 'hard', its most likely class; 'soft', its probabilities.
      weight: share of the loss that is the teacher's, in [0, 1].
      temperature: by which both logits are divided, for 'soft'.
    """

    teacher: Teacher
    kind: str = 'hard'
    weight: float = 0.5
    temperature: float = 1.0


def make_settings(c: ConfigReader, images: ImageData) -> Settings:
    """The settings of a config.

    Raises:
      UserError: for values that make no sense, and a teacher that is not there, does
        not say what it is, or knows other classes or images.
    """
    kind, weight, values = c.distill.kind, c.distill.weight, {}
    if kind not in KINDS:
        raise unknown('distill.kind', kind, KINDS)
    if not 0.0 <= weight <= 1.0:
        raise UserError(f'config.distill.weight must be in [0, 1], not {weight}')
    if kind == 'soft':
        values['temperature'] = c.distill.temperature
        if not 0.0 < values['temperature'] < float('inf'):
            raise UserError(
                f'config.distill.temperature must be above 0, not '
                f'{values["temperature"]}'
            )
    return Settings(
        **vars(classify.make_settings(c, images)),
        teacher=_find_teacher(c.distill.teacher, images),
        kind=kind,
        weight=weight,
        **values,
    )


def facts(settings: Settings) -> dict[str, Any]:
    """For the metadata of a checkpoint: a run goes on with the same teacher only."""
    return {'teacher': settings.teacher.path}


def _find_teacher(path: str, images: ImageData) -> Teacher:
    """The teacher behind a path; none of its arrays is read."""
    if not path:
        raise UserError(
            "task='distill' needs a teacher: set config.distill.teacher to the workdir "
            'of a run, or other weights'
        )
    # What is known of published weights is known before they are fetched.
    metadata = find_published(path)
    if metadata is None:
        source = open_source(path)
        metadata = source.metadata
        if source.step is not None and os.path.exists(path):  # not 'workdir@step'
            path = f'{path}@{source.step}'  # the teacher stays, its run may go on
    if metadata is None or not is_complete(metadata, 'model', 'preprocessing'):
        raise UserError(
            f'the teacher {path} does not say which model it is of; take a workdir, an '
            'exported folder or an address that `vit_jax summarize --zoo` lists, or '
            'convert it with --like'
        )
    about, seen = metadata['model'], metadata['preprocessing']
    _check_fits(f'the teacher {path}', metadata, images)
    teacher = Teacher(
        path=path,
        model=make_stored_model(about, path),
        image_shape=images.image_shape,
        mean=tuple(seen['mean']),
        std=tuple(seen['std']),
        grid=tuple(about['grid']) if 'grid' in about else None,
    )
    try:
        _ = teacher.shapes
    except UserError as error:  # patches that do not divide the images
        raise UserError(f'the teacher {path} does not fit here: {error}') from error
    return teacher


def _check_fits(teacher: str, metadata: Mapping[str, Any], images: ImageData) -> None:
    """Raises UserError for a teacher of other classes or other images."""
    num_classes = metadata['model']['num_classes']
    names, channels = images.dataset.class_names, images.image_shape[2]
    if num_classes is None:
        raise UserError(
            f'{teacher} has no classifier, only features; fine-tune it first'
        )
    if num_classes != len(names):
        raise UserError(
            f'{teacher} knows {num_classes} classes, the data has {len(names)}'
        )
    check_classes(teacher, metadata, names)
    if metadata['preprocessing']['channels'] != channels:
        raise UserError(
            f'{teacher} sees images of {metadata["preprocessing"]["channels"]} '
            f'channel(s), those of the data have {channels}'
        )


def load_teacher(settings: Settings, sharding: Placement = None) -> Variables:
    """The teacher's variables, learned positions resized to the run's images.

    Args:
      settings: see `Settings`.
      sharding: see `load_variables`.

    Raises:
      UserError: for weights that cannot be read, or do not fit its model.
    """
    teacher = settings.teacher
    variables, report = load_variables(
        teacher.path,
        teacher.model,
        teacher.image_shape[:2],
        channels=teacher.image_shape[2],
        grid=teacher.grid,
        sharding=sharding,
    )
    print(f'teacher: {report.summary()}', file=sys.stderr)
    return variables


def init_state(
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    rng: PRNGKey,
    inputs: Inputs,
    settings: Settings,
) -> TrainState:
    """As `classify.init_state`; the teacher is zeros until `load_teacher`."""
    state = classify.init_state(
        model=model, tx=tx, rng=rng, inputs=inputs, settings=settings
    )
    shapes = settings.teacher.shapes
    teacher = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return state.replace(teacher=teacher)  # type: ignore[attr-defined]


def teach(variables: Variables, images: Array, settings: Settings) -> Array:
    """The teacher's logits `[B, V]`, float32; nothing flows back through them.

    Args:
      variables: the teacher's.
      images: `[B, h, w, c]` float32, as `prepare` returns them; they are normalised as
        the teacher knows them.
      settings: see `Settings`.
    """
    teacher = settings.teacher
    if (teacher.mean, teacher.std) != (settings.mean, settings.std):
        mean, std, new_mean, new_std = (
            jnp.asarray(v, jnp.float32)
            for v in (settings.mean, settings.std, teacher.mean, teacher.std)
        )
        images = (images * std + mean - new_mean) / new_std
    logits: Array = teacher.model.apply(variables, images, train=False)  # type: ignore
    return jax.lax.stop_gradient(logits.astype(jnp.float32))


def teacher_loss(
    logits: Array, taught: Array, kind: str, temperature: float = 1.0
) -> Array:
    """How far the student is from the teacher.

    'hard': cross entropy against the teacher's most likely class. 'soft': the
    Kullback-Leibler divergence of the student's distribution from the teacher's, both
    at a temperature, times its square, so that gradients keep their size ("Distilling
    the Knowledge in a Neural Network", arXiv 1503.02531, section 2). DeiT's public code
    divides 'soft' by the number of classes too; here it is summed over them.

    Args:
      logits: the student's, `[B, V]`.
      taught: the teacher's, `[B, V]`.
      kind: 'hard' or 'soft'.
      temperature: for 'soft'.

    Returns:
      `[B]` float32.

    >>> logits, taught = jnp.array([[0.0, 0.0]]), jnp.log(jnp.array([[3.0, 1.0]]))
    >>> teacher_loss(logits, taught, 'hard').round(4)  # log 2
    Array([0.6931], dtype=float32)
    >>> teacher_loss(logits, taught, 'soft').round(4)  # log 2 - entropy of (3/4, 1/4)
    Array([0.1308], dtype=float32)
    """
    if kind == 'hard':
        target = jax.nn.one_hot(jnp.argmax(taught, axis=-1), taught.shape[-1])
        return cross_entropy(logits, target)
    divergence = optax.losses.kl_divergence_with_log_targets(
        jax.nn.log_softmax(logits.astype(jnp.float32) / temperature),
        jax.nn.log_softmax(taught.astype(jnp.float32) / temperature),
    )
    return divergence * temperature**2


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    rng: PRNGKey,
    settings: Settings,
) -> tuple[TrainState, Metrics]:
    """One update, on the global batch or on one device's rows of it (`axes`).

    The teacher works on one micro-batch at a time, as the student does.

    Args:
      state: before the step.
      batch: image `[B, h, w, c]` uint8, label `[B]` int32, weight `[B]` float32.
      model, tx: as for `init_state`.
      rng: key of the run's randomness; a step folds its number in.
      settings: see `Settings`.

    Returns:
      The state after the step, and the metrics of the batch: those of `classify`, the
      teacher's part of the loss (unweighted) and the teacher's own accuracy.
    """
    augment_rng, model_rng = jax.random.split(jax.random.fold_in(rng, state.step))
    batch = prepare(batch, augment_rng, settings)
    total_weight = jnp.maximum(batch_sum(jnp.sum(batch['weight'])), 1.0)

    def loss_fn(params: Any, others: Variables, batch: Batch, rng: PRNGKey):
        logits, mutated = model.apply(
            {'params': params, **others},
            batch['image'],
            train=True,
            rngs={'dropout': rng},
            mutable=[*others, 'distillation'],
        )
        others = {k: v for k, v in mutated.items() if k != 'distillation'}
        # Of the class token and the distillation token; else the one output twice.
        both = jax.tree.leaves(mutated.get('distillation'))
        by_cls, by_dist = both or (logits, logits)
        assert state.teacher is not None
        taught = teach(state.teacher, batch['image'], settings)
        from_label = cross_entropy(by_cls, batch['target'])
        from_teacher = teacher_loss(
            by_dist, taught, settings.kind, settings.temperature
        )
        losses = (1.0 - settings.weight) * from_label + settings.weight * from_teacher
        metrics = classification_metrics(
            logits, batch['label'], batch['weight'], losses
        )
        weight, (_, total) = batch['weight'], metrics['loss']
        hit = jnp.argmax(taught, axis=-1) == batch['label']
        metrics['teacher_loss'] = (jnp.sum(from_teacher * weight), total)
        metrics['teacher_accuracy'] = (jnp.sum(hit * weight), total)
        return metrics['loss'][0] / total_weight, (metrics, others)

    grads, others, metrics = accumulate(
        loss_fn, state.variables, batch, model_rng, settings.updates
    )
    return apply_gradients(
        state, grads, others, metrics, tx=tx, updates=settings.updates
    )
