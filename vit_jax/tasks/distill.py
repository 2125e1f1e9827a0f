"""Classification that also learns from another model, the teacher.

DeiT, "Training data-efficient image transformers & distillation through attention",
arXiv 2012.12877, section 4. A student with a distillation token ('DeiT-S/16-distilled')
has a classifier for each: the class token's learns from the label, the distillation
token's from the teacher. Any other student learns both with its one output.

The teacher sees the images that the student sees, augmented and mixed. It is no part
of a checkpoint: a run that goes on reads it again.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from vit_jax.axes import batch_sum
from vit_jax.config import ConfigReader
from vit_jax.errors import UserError, unknown
from vit_jax.frozen import Frozen, find_frozen
from vit_jax.image_data import ImageData
from vit_jax.losses import cross_entropy
from vit_jax.metrics import classification_metrics
from vit_jax.pretrained.load import Placement
from vit_jax.state import TrainState
from vit_jax.tasks import classify
from vit_jax.tasks.classify import eval_step, prepare
from vit_jax.typing import (
    Array,
    Batch,
    Inputs,
    Metrics,
    PRNGKey,
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(classify.Settings):
    """What a step needs beside model and optimizer.

    Attributes:
      teacher: the other model; its variables lie in the state.
      kind: 'hard', its most likely class; 'soft', its probabilities.
      weight: share of the loss that is the teacher's, in [0, 1].
      temperature: by which both logits are divided, for 'soft'.
    """

    teacher: Frozen
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
    path = c.distill.teacher
    if not path:
        raise UserError(
            "task='distill' needs a teacher: set config.distill.teacher to the workdir "
            'of a run, or other weights'
        )
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
        teacher=find_frozen('teacher', path, images),
        kind=kind,
        weight=weight,
        **values,
    )


def facts(settings: Settings) -> dict[str, Any]:
    """For the metadata of a checkpoint: a run goes on with the same teacher only."""
    return {'teacher': settings.teacher.path}


def load_teacher(settings: Settings, sharding: Placement = None) -> Variables:
    """The teacher's variables, see `Frozen.load`."""
    return settings.teacher.load(sharding)


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
