"""Tasks: what a step computes.

A task is a module with three pure functions, which `build` completes with model,
optimizer and settings:

    init_state() -> TrainState
    train_step(state, batch) -> (state, metrics)
    eval_step(variables, batch) -> metrics

The training loop knows no more than that.
"""

from typing import Any

from vit_jax.errors import unknown
from vit_jax.forks import import_path


def get_task(name: str) -> Any:
    """The task of that name, or a fork's module, 'my_fork.my_task'."""
    if '.' in name:
        return import_path(name)
    if name != 'classify':
        raise unknown('task', name, ['classify'])
    from vit_jax.tasks import classify

    return classify
