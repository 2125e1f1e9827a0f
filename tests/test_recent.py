"""What is told of the steps since the last log."""

import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.recent import MANY_SKIPPED, RecentSteps

PARAMS = {'block': {'bias': np.zeros(2), 'kernel': np.ones(3)}, 'head': np.ones(5)}


def sound(loss=6.0, weight=2.0):
    return {
        'loss': (np.float32(loss), np.float32(weight)),
        'grad_norm': (np.float32(1.0), np.float32(1.0)),
        'nonfinite_leaf': (np.float32(0.0), np.float32(1.0)),
    }


def skipped(was=True):
    return {
        **{key: (np.float32(0.0), np.float32(0.0)) for key in sound()},
        'skipped': (np.float32(was), np.float32(1.0)),
    }


def recent(*calls):
    steps = RecentSteps()
    for call in calls:
        steps.add(call)
    return steps


def test_the_mean_is_over_examples():
    steps = recent(sound(6.0, 2.0), sound(1.0, 5.0))
    assert steps.fetch(9, PARAMS) == {'loss': 1.0, 'grad_norm': 1.0}
    steps.clear()
    assert not steps


@pytest.mark.parametrize(
    ('params', 'leaf', 'told'),
    [
        (PARAMS, 2, 'parameters are finite; first gradient that is not: head'),
        (
            {**PARAMS, 'head': np.array([1.0, np.nan])},
            0,
            'first parameter that is not finite: head',
        ),
    ],
)
def test_the_first_bad_step_and_leaf_are_named(params, leaf, told):
    """Calls of one step and of two; the one before the last is bad."""
    pair = sound()
    bad = {key: (np.array([t, t]), np.array([w, w])) for key, (t, w) in pair.items()}
    bad['grad_norm'][0][1] = np.nan
    bad['nonfinite_leaf'][0][1] = leaf
    steps = recent(sound(), bad, sound())
    with pytest.raises(UserError) as error:
        steps.fetch(14, params)
    assert f'grad_norm is nan at step 13 ({told}); ' in str(error.value)


def test_a_loss_without_a_bad_gradient():
    with pytest.raises(UserError, match=r'loss is inf .*gradients are finite'):
        recent(sound(np.inf)).fetch(1, PARAMS)


def test_skipped_steps_are_counted():
    steps = recent(skipped(), {**sound(), 'skipped': (0.0, 1.0)}, skipped())
    values = steps.fetch(3, PARAMS)
    assert values['skipped'] == 2
    assert values['loss'] == 3.0  # of those that were not


def test_many_skipped_in_a_row_end_the_run_however_often_it_logs():
    steps = RecentSteps()
    for step in range(1, MANY_SKIPPED):
        steps.add(skipped())
        if step % 7 == 0:
            steps.fetch(step, PARAMS)  # as before a checkpoint: counts once
            steps.fetch(step, PARAMS)
            steps.clear()
    steps.fetch(MANY_SKIPPED - 1, PARAMS)
    steps.add(skipped())
    with pytest.raises(UserError, match='none of the 20 steps up to step 20 had'):
        steps.fetch(MANY_SKIPPED, PARAMS)


def test_a_sound_step_between_them_begins_anew():
    steps = RecentSteps()
    for step in range(1, 2 * MANY_SKIPPED):
        steps.add({**sound(), **skipped(was=step != MANY_SKIPPED)})
        steps.fetch(step, PARAMS)
        steps.clear()
