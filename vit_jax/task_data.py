"""What a task trains on and is evaluated on, whatever it is of."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from vit_jax.config import ConfigReader
from vit_jax.data.resident import MakeBatch
from vit_jax.data.vocabulary import Vocabulary
from vit_jax.data.watch import Watch
from vit_jax.errors import UserError
from vit_jax.typing import Inputs, Variables


class Units(NamedTuple):
    """What numbers of a run count.

    Attributes:
      rows: what a row of a batch is, in the plural.
      losses: what a loss is the mean over.
    """

    rows: str
    losses: str


IMAGES = Units('images', 'images')


class Source(Protocol):
    """What is known of a dataset before its examples are read."""

    @property
    def name(self) -> str:
        """As in the config."""

    @property
    def location(self) -> str:
        """Where it is read from, for people."""

    @property
    def splits(self) -> Mapping[str, int]:
        """Examples of each split."""


class Score(Protocol):
    """What no sum over batches tells, such as the BLEU of translated sentences."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the metrics."""

    @property
    def signature(self) -> str | None:
        """How they are counted, where that is to be told."""

    def __call__(
        self, variables: Variables, means: dict[str, float]
    ) -> dict[str, float]:
        """The metrics of a model, `means` being those of the pass over batches."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskData:
    """The data of a run; no example has been read.

    Attributes:
      dataset: what is known of the data.
      num_classes: V, size of the logits; None for a model that knows no classes.
      inputs: shapes and dtypes of what the model takes for one example.
      units: what is counted.
      batch_shape: shapes and dtypes of a global batch; where they differ from batch to
        batch, of the largest.
      train_data: position -> endless host batches, this process's rows.
      position_per_step: what a step adds to the position.
      seen: position -> what the log says of the data seen.
      load: memory= -> all examples to train on, decoded, for `make_batch`.
      make_batch: the batches, from examples on the device; None for batches that come
        from the host.
      eval_data: () -> host batches, every example of the split once.
      probe_data: the same of the examples to train on, not augmented, or None.
      vocabulary: of text; None for images.
      facts: for the metadata of a checkpoint.
      read_facts: () -> more of them, for which the data must be read.
    """

    dataset: Source
    num_classes: int | None
    inputs: Inputs
    units: Units
    batch_shape: dict[str, jax.ShapeDtypeStruct]
    train_data: Callable[[int], Watch]
    position_per_step: int
    seen: Callable[[int], dict[str, float]]
    load: Callable[..., dict[str, np.ndarray]] = lambda memory: {}
    make_batch: MakeBatch | None = None
    eval_data: Callable[[], Watch]
    probe_data: Callable[[], Watch] | None = None
    vocabulary: Vocabulary | None = None
    facts: dict[str, Any]
    read_facts: Callable[[], dict[str, Any]] = dict


def count_steps(c: ConfigReader, data: TaskData) -> int:
    """Steps in all, from one of num_steps and num_epochs.

    Raises:
      UserError: when both are set or none, or where the size of an epoch is unknown, as
        that of text is, whose batches are of so many tokens.
    """
    num_steps, num_epochs = c.num_steps, c.num_epochs
    if (num_steps is None) == (num_epochs is None):
        raise UserError('set one of config.num_steps and config.num_epochs, not both')
    if num_steps is None and data.units != IMAGES:
        raise UserError('set config.num_steps: steps of text are not counted by epochs')
    if num_steps is None:
        dataset = data.dataset
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
