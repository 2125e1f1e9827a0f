"""Translation: the next token of the target, from the source and the tokens before.

"Attention Is All You Need", arXiv 1706.03762.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from vit_jax.axes import batch_sum
from vit_jax.config import ConfigReader
from vit_jax.data.tokenizer import BOS, PAD
from vit_jax.errors import UserError
from vit_jax.losses import label_cross_entropy
from vit_jax.models.transformer import Transformer
from vit_jax.parallel import Parallel
from vit_jax.state import TrainState
from vit_jax.tasks.classify import init_state
from vit_jax.text_data import TextData, make_text_data
from vit_jax.translation import Decoding, TranslationScore, Translator
from vit_jax.typing import Array, Batch, Metrics, PRNGKey, Variables
from vit_jax.update import Updates, accumulate, apply_gradients, make_updates

__all__ = [
    'eval_step',
    'init_state',
    'make_data',
    'make_score',
    'make_settings',
    'train_step',
]

make_data = make_text_data


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a step needs beside model and optimizer.

    Attributes:
      label_smoothing: see `label_cross_entropy`.
      updates: accumulation, averaging, what is done with steps that are not finite.
    """

    label_smoothing: float = 0.0
    updates: Updates = dataclasses.field(default_factory=Updates)


def make_settings(c: ConfigReader, data: TextData) -> Settings:
    """The settings of a config.

    Raises:
      UserError: for values that make no sense.
    """
    del data
    return Settings(c.optim.label_smoothing, make_updates(c))


def make_score(
    c: ConfigReader, data: TextData, model: nn.Module, parallel: Parallel
) -> TranslationScore:
    """What an evaluation tells beside the metrics of batches.

    Raises:
      UserError: for values that make no sense.
    """
    how = Decoding(c.text.beam, c.text.length_penalty, c.text.extra_length)
    longest = data.buckets[-1].length + how.extra_length
    if isinstance(model, Transformer) and longest > model.max_length:
        raise UserError(
            f'a translation may have {longest} tokens (the last of config.text.buckets '
            f'and config.text.extra_length), the model holds {model.max_length}; set '
            'config.model.kwargs.max_length'
        )

    return TranslationScore(
        kind=c.text.score,
        translator=Translator(model, how, parallel),
        buckets=data.buckets,
        pairs=data.eval_pairs,
        tokenizer=lambda: data.vocabulary.tokenizer,
    )


def shift_right(target: Array) -> Array:
    """What the decoder is given, so that each token is predicted from those before.

    Args:
      target: `[B, T]`, tokens, EOS, then PAD.

    Returns:
      `[B, T]`: BOS, then all but the last.

    >>> shift_right(jnp.array([[7, 8, 2, 0]]))
    Array([[1, 7, 8, 2]], dtype=int32)
    """
    return jnp.pad(target, ((0, 0), (1, 0)), constant_values=BOS)[:, :-1]


def token_metrics(logits: Array, target: Array, losses: Array) -> Metrics:
    """Loss and accuracy of the tokens of a batch, and how many sentences it has.

    Args:
      logits: `[B, T, V]`.
      target: `[B, T]` int32; PAD does not count.
      losses: `[B, T]`, of each token.

    Returns:
      name -> (sum, weight), float32 scalars.
    """
    weight = (target != PAD).astype(jnp.float32)
    hit = jnp.argmax(logits, axis=-1) == target
    total = jnp.sum(weight)
    examples = jnp.sum(jnp.any(target != PAD, axis=1).astype(jnp.float32))
    return {
        'loss': (jnp.sum(losses * weight), total),
        'accuracy': (jnp.sum(hit * weight), total),
        'examples': (examples, examples),
    }


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

    Args:
      state: before the step.
      batch: source `[B, S]` and target `[B, T]` int32, tokens, EOS, then PAD.
      model: called as `model(source, shifted target, train=...)`.
      tx: the optimizer.
      rng: key of the run's randomness; a step folds its number in.
      settings: see `Settings`.

    Returns:
      The state after the step, and the metrics of the batch.
    """
    rng = jax.random.fold_in(rng, state.step)
    weight = (batch['target'] != PAD).astype(jnp.float32)
    total_weight = jnp.maximum(batch_sum(jnp.sum(weight)), 1.0)

    def loss_fn(params: Any, others: Variables, batch: Batch, rng: PRNGKey):
        logits, others = model.apply(
            {'params': params, **others},
            batch['source'],
            shift_right(batch['target']),
            train=True,
            rngs={'dropout': rng},
            mutable=list(others),
        )
        losses = label_cross_entropy(logits, batch['target'], settings.label_smoothing)
        metrics = token_metrics(logits, batch['target'], losses)
        del metrics['examples']  # told exactly by the position in the data
        return metrics['loss'][0] / total_weight, (metrics, others)

    grads, others, metrics = accumulate(
        loss_fn, state.variables, batch, rng, settings.updates
    )
    return apply_gradients(
        state, grads, others, metrics, tx=tx, updates=settings.updates
    )


def eval_step(
    variables: Variables, batch: Batch, *, model: nn.Module, settings: Settings
) -> Metrics:
    """The metrics of a batch; the loss is unsmoothed."""
    target = batch['target']
    logits: Array = model.apply(  # type: ignore[assignment]
        variables, batch['source'], shift_right(target), train=False
    )
    return batch_sum(token_metrics(logits, target, label_cross_entropy(logits, target)))
