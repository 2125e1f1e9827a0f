"""Tasks: what a step computes.

A task is a module with four functions. `make_settings` reads what the task needs of a
config; the others are pure, and `build` completes them with model, optimizer and
settings:

    make_settings(config reader, data) -> settings
    init_state() -> TrainState
    train_step(state, batch) -> (state, metrics)
    eval_step(variables, batch) -> metrics

The training loop knows no more than that. A task of something else than images has
`make_data(config reader, parallel) -> TaskData`, and one that is judged by more than
metrics of batches `make_score(config reader, data, model, parallel) -> Score | None`.
A task whose models do not classify images may have `check_model(model)`, which raises
UserError for one that it cannot train. A task that learns from another model has
`load_teacher(settings, sharding) -> variables`, and one whose checkpoints should say
more of themselves `facts(settings) -> dict`, JSON.
"""

from typing import Any

from vit_jax.errors import unknown
from vit_jax.forks import import_path

TASKS = ('classify', 'distill', 'translate', 'gan')


def get_task(name: str) -> Any:
    """The task of that name, or a fork's module, 'my_fork.my_task'."""
    if '.' in name:
        return import_path(name)
    if name not in TASKS:
        raise unknown('task', name, TASKS)
    return import_path(f'vit_jax.tasks.{name}')
