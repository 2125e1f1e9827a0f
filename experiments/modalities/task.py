"""The task 'classify', for signals of any number of axes: text, audio, images, video.

The input pipeline of images cuts, mirrors and resizes along two axes, and so takes
nothing else. Here examples are taken as they are; what is left of a task for images is
its steps. For `config.task = 'experiments.modalities.task'`, see docs/extending.md.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.config import ConfigReader
from vit_jax.data.datasets import load_dataset, pick_eval_split
from vit_jax.data.input_pipeline import Shard, eval_batches, train_batches
from vit_jax.data.watch import Watch
from vit_jax.parallel import Parallel
from vit_jax.task_data import TaskData, Units
from vit_jax.tasks.classify import Settings, eval_step, init_state, train_step
from vit_jax.update import make_updates

__all__ = ['eval_step', 'init_state', 'make_data', 'make_settings', 'train_step']

EXAMPLES = Units('examples', 'examples')


def make_data(c: ConfigReader, parallel: Parallel) -> TaskData:
    """The examples of `dataset.name`, uint8 arrays `[*size, channels]` of one shape.

    Raises:
      UserError: for a dataset that is not there, and batches that cannot be split.
    """
    batch_size, eval_size = c.batch_size, c.eval.batch_size or c.batch_size
    parallel.check_batch_size(batch_size, 'config.batch_size', c.accum_steps)
    parallel.check_batch_size(eval_size, 'config.eval.batch_size')
    dataset = load_dataset(c.dataset.name, c.dataset.data_dir)
    count, shape, seed = dataset.splits['train'], dataset.image_shape, c.seed
    eval_split = pick_eval_split(dataset)
    shard = Shard(jax.process_index(), jax.process_count())

    def train_data(start: int) -> Watch:
        return train_batches(
            dataset.open('train'),
            to_arrays,
            batch_size=batch_size,
            seed=seed,
            start=start,
            shard=shard,
        )

    def eval_data() -> Watch:
        source = dataset.open(eval_split)
        return eval_batches(source, to_arrays, batch_size=eval_size, shard=shard)

    def seen(position: int) -> dict[str, float]:
        return {'examples_seen': position, 'epoch': position / count}

    return TaskData(
        dataset=dataset,
        num_classes=len(dataset.class_names),
        inputs=(jax.ShapeDtypeStruct((1, *shape), jnp.float32),),
        units=EXAMPLES,
        batch_shape={
            'image': jax.ShapeDtypeStruct((batch_size, *shape), jnp.uint8),
            'label': jax.ShapeDtypeStruct((batch_size,), jnp.int32),
            'weight': jax.ShapeDtypeStruct((batch_size,), jnp.float32),
        },
        train_data=train_data,
        position_per_step=batch_size,
        seen=seen,
        eval_data=eval_data,
        facts={
            'dataset': dataset.name,
            'eval_split': eval_split,
            'class_names': list(dataset.class_names),
            'num_train_examples': count,
        },
    )


def to_arrays(
    example: dict[str, Any], rng: np.random.Generator | None = None
) -> dict[str, Any]:
    """An example of a source as one of a batch.

    Args:
      example: with 'weight' where it is of an evaluation, whose padding has none.
      rng: of augmentation; there is none.
    """
    weighed = {'weight': 1.0, **example}
    return {
        'image': example['image'],
        'label': np.int32(example['label']),
        'weight': np.float32(weighed['weight']),
    }


def make_settings(c: ConfigReader, data: TaskData) -> Settings:
    """The settings of a config. 0 to 255 become 0 to 2: silence and black stay 0."""
    assert data.num_classes is not None
    return Settings(
        data.num_classes,
        mean=(0.0,),
        label_smoothing=c.optim.label_smoothing,
        updates=make_updates(c),
    )
