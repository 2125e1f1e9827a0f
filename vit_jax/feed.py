"""What the compiled step is given, from where the data lies.

The host reads, decodes and augments a batch for each step; or all the examples lie on
the device, and the step is told which positions are its own.
"""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from typing import Any

import jax
import numpy as np

from vit_jax.data.resident import MakeBatch
from vit_jax.data.watch import Watch
from vit_jax.parallel import Parallel
from vit_jax.typing import Batch


def feed_from_host(
    step: int,
    position: int,
    *,
    train_data: Callable[[int], Watch],
    parallel: Parallel,
) -> Generator[Batch]:
    """Batches, two of them on their way to the devices.

    Args:
      step: steps made before.
      position: examples seen before.
      train_data: examples seen before -> host batches.
      parallel: how they are spread over the devices.
    """
    del step  # a batch a step, from the position on
    with closing(train_data(position)) as data:
        yield from parallel.prefetch(data)


def feed_from_device(
    step: int,
    position: int,
    *,
    load: Callable[..., Mapping[str, np.ndarray]],
    make_batch: MakeBatch,
    calls: Callable[[int], Iterator[int]],
    parallel: Parallel,
    timeout_seconds: float,
) -> Generator[dict[str, Any]]:
    """The examples, whole on every device, and the positions of the next steps.

    Args:
      step: steps made before.
      position: examples seen before.
      load: memory= -> the decoded examples.
      make_batch: which of them a step takes.
      calls: steps made before -> the step after each call.
      parallel: where the devices are.
      timeout_seconds: of decoding, after which it is told that it goes on.
    """

    def put(tree: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        return {
            key: jax.make_array_from_process_local_data(parallel.replicated, value)
            for key, value in tree.items()
        }

    def examples() -> Iterator[Mapping[str, np.ndarray]]:
        memory = jax.local_devices()[0].memory_stats() or {}
        limit = memory.get('bytes_limit')
        yield load(memory=limit and limit - memory['bytes_in_use'])

    with closing(Watch(examples(), timeout_seconds)) as watched:
        data = put(next(watched))
    for end in calls(step):
        first = make_batch.first(position, end - step)
        position += make_batch.order.batch_size * (end - step)
        step = end
        yield {'data': data, 'first': put(first)}
