"""Training: interrupted and resumed runs, periods, faults, what a workdir holds."""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import jax
import numpy as np
import pytest

from vit_jax.build import build
from vit_jax.checkpoint import Checkpoints, shapes_on
from vit_jax.config import default_config
from vit_jax.errors import UserError
from vit_jax.feed import feed_from_host
from vit_jax.train import _check_continues, _describe, train
from vit_jax.writer import read_metrics

NUM_STEPS = 11


def small_config(**overrides):
    config = default_config()
    config.model.name = 'ViT-Ti/2'
    config.model.kwargs = {
        'width': 8,
        'depth': 2,
        'mlp_dim': 12,
        'num_heads': 2,
        'dropout_rate': 0.1,
        'drop_path_rate': 0.3,
    }
    config.dataset.name = 'synthetic:size=6,channels=1,num_examples=37,num_classes=3'
    config.augment.crop = 'pad'
    config.augment.pad = 1
    config.batch_size = 8
    config.num_steps = NUM_STEPS
    config.eval.every_steps = 5
    config.checkpoint.every_steps = 3
    config.log.every_steps = 2
    config.log.tensorboard = False
    config.update_from_flattened_dict(overrides)
    return config


def final_state(run, workdir):
    with Checkpoints(workdir) as checkpoints:
        like = shapes_on(run.parallel.replicated, run.state_shape)
        return checkpoints.restore_latest(like)


def assert_bit_equal(left, right):
    assert left.step == right.step
    for a, b in zip(*map(jax.tree.leaves, (left.state, right.state)), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


class InterruptedData:
    """The training data of a run whose machine goes away after some batches."""

    def __init__(self, batches, count):
        self._batches, self._count = batches, count

    def __iter__(self):
        return self

    def __next__(self):
        self._count -= 1
        if self._count < 0:
            raise KeyboardInterrupt
        return next(self._batches)

    def close(self):
        self._batches.close()


def interrupt(run, batches):
    """The same run, interrupted when it asks for one batch more than these."""
    read = run.train_data
    feed = partial(
        feed_from_host,
        train_data=lambda position: InterruptedData(read(position), batches),
        parallel=run.parallel,
    )
    return dataclasses.replace(run, feed=feed)


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('uninterrupted')
    run = build(small_config())
    result = train(run, workdir)
    return run, workdir, result


@pytest.mark.parametrize(
    'batches', [2, 9, 12], ids=['before a save', 'between', 'late']
)
def test_an_interrupted_run_ends_like_one_that_was_not(
    uninterrupted, tmp_path, batches
):
    run, workdir, result = uninterrupted
    # Two batches are read ahead, so the loop ends two steps after the data; the last
    # batch of all is number 11.
    with pytest.raises(KeyboardInterrupt):
        train(interrupt(run, min(batches, NUM_STEPS - 1)), tmp_path)
    resumed = train(run, tmp_path)
    assert_bit_equal(final_state(run, tmp_path), final_state(run, workdir))
    assert resumed == result
    untimed = [
        [
            {k: v for k, v in line.items() if 'second' not in k and 'wait' not in k}
            for line in read_metrics(folder)
        ]
        for folder in (tmp_path, workdir)
    ]
    # The means that a resumed run logs may cover fewer steps, nothing else differs.
    assert [line['step'] for line in untimed[0]] == [
        line['step'] for line in untimed[1]
    ]
    evaluations = [[x for x in lines if 'eval/loss' in x] for lines in untimed]
    assert evaluations[0] == evaluations[1]


@pytest.mark.slow
def test_a_killed_process_resumes_bit_for_bit(tmp_path):
    steps = {'num_steps': 90, 'checkpoint.every_steps': 30, 'eval.every_steps': 90}
    run = build(small_config(**steps))
    train(run, tmp_path / 'uninterrupted')

    recipe = tmp_path / 'recipe.py'
    recipe.write_text(
        f'import sys; sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})\n'
        'from test_train import small_config\n'
        f'def get_config(): return small_config(**{steps})\n'
    )
    workdir = tmp_path / 'killed'
    command = [
        *(sys.executable, '-m', 'vit_jax.main', 'train'),
        *(f'--config={recipe}', f'--workdir={workdir}'),
    ]
    process = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (workdir / 'checkpoints' / '30').exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (workdir / 'checkpoints' / '90').exists()

    subprocess.run(command, check=True)
    final = final_state(run, workdir)
    assert final.step == 90
    assert_bit_equal(final, final_state(run, tmp_path / 'uninterrupted'))


@pytest.mark.parametrize('steps_per_call', [None, 4])
def test_data_on_the_device_is_trained_on_as_on_the_host(tmp_path, steps_per_call):
    """With all on that both can draw, and interrupted in the middle."""
    common = {
        'augment.crop': 'pad',
        'augment.pad': 1,
        'augment.flip': True,
        'augment.mixup': 0.8,
        'augment.cutmix': 1.0,
        'augment.erasing': 0.5,
        'augment.repeats': 3,
        'optim.ema_decay': 0.9,
        'log.every_steps': 4,
        'eval.every_steps': 4,
        'checkpoint.every_steps': 4,
    }
    on_host = build(small_config(**common))
    result = train(on_host, tmp_path / 'host')
    device = {'dataset.placement': 'device', 'dataset.steps_per_call': steps_per_call}
    on_device = build(small_config(**common, **device))
    assert on_device.periods.call == (steps_per_call or 1)  # None: this is a CPU

    def eight_steps(step, position):
        calls = 8 // on_device.periods.call
        yield from itertools.islice(on_device.feed(step, position), calls)
        raise KeyboardInterrupt

    workdir = tmp_path / 'device'
    with pytest.raises(KeyboardInterrupt):
        train(dataclasses.replace(on_device, feed=eight_steps), workdir)
    found = train(on_device, workdir)
    assert found == pytest.approx(result, rel=1e-5)
    lines = [read_metrics(folder) for folder in (tmp_path / 'host', workdir)]
    keys = ['step', 'train/loss', 'train/grad_norm', 'train/examples_seen']
    seen = [
        [[line[key] for key in keys] for line in each if 'train/loss' in line]
        for each in lines
    ]
    assert [step for step, *_ in seen[0]] == [4, 8, 11]
    np.testing.assert_allclose(seen[1], seen[0], rtol=1e-5)


def test_a_finished_run_is_left_as_it_is(uninterrupted, capsys, monkeypatch):
    run, workdir, result = uninterrupted
    before = (workdir / 'metrics.jsonl').read_bytes()
    # Nothing is compiled or read.
    monkeypatch.setattr(type(run.parallel), 'train_step', None)
    run = dataclasses.replace(run, feed=None)
    assert train(run, workdir) == result
    assert 'already finished' in capsys.readouterr().err
    assert (workdir / 'metrics.jsonl').read_bytes() == before


def test_a_finished_run_whose_last_checkpoint_is_damaged_is_finished_again(
    uninterrupted, tmp_path, capsys
):
    run, workdir, result = uninterrupted
    copy = tmp_path / 'copy'
    shutil.copytree(workdir, copy)
    for file in (copy / 'checkpoints' / str(NUM_STEPS)).rglob('*'):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert train(run, copy) == result
    assert 'already finished' not in capsys.readouterr().err
    assert_bit_equal(final_state(run, workdir), final_state(run, copy))


def test_devices_that_repeat_the_same_work_are_told():
    config = small_config(**{'parallel.tensor': 2})
    config.model.name = 'CNN'
    config.model.kwargs = {'widths': (8,), 'strides': (2,)}
    run = build(config)
    shardings = run.parallel.state_sharding(run.state_shape)
    assert 'parallel.tensor divides no parameter' in _describe(run, 0, shardings)
    whole = build(small_config())
    shardings = whole.parallel.state_sharding(whole.state_shape)
    assert 'parallel.tensor' not in _describe(whole, 0, shardings)


def test_compile_time_is_without_the_wait_for_data(tmp_path):
    run = build(small_config(**{'num_steps': 2, 'log.every_steps': 1}))

    def late(step, position):
        time.sleep(30)
        yield from run.feed(step, position)

    train(dataclasses.replace(run, feed=late), tmp_path)
    first = read_metrics(tmp_path)[0]
    assert 0 < first['train/compile_seconds'] < 25


def test_each_period_is_its_own(uninterrupted, tmp_path):
    run, workdir, _ = uninterrupted
    lines = read_metrics(workdir)
    steps = {
        name: [line['step'] for line in lines if f'{name}/loss' in line]
        for name in ('train', 'eval')
    }
    assert steps == {'train': [2, 4, 6, 8, 10, 11], 'eval': [5, 10, 11]}
    train(dataclasses.replace(run, keep=100), tmp_path)
    saved = sorted(int(p.name) for p in (tmp_path / 'checkpoints').iterdir())
    assert saved == [3, 6, 9, 11]
    # The uninterrupted run keeps the newest two.
    kept = sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir())
    assert kept == [9, 11]


def test_the_learning_rate_logged_is_the_one_used(uninterrupted):
    run, workdir, _ = uninterrupted
    for line in read_metrics(workdir):
        if 'train/learning_rate' in line:
            assert line['train/learning_rate'] == float(run.schedule(line['step'] - 1))


def test_the_workdir_says_what_ran(uninterrupted):
    run, workdir, _ = uninterrupted
    config = json.loads((workdir / 'config.json').read_text())
    assert config == json.loads(json.dumps(run.metadata['config']))
    launch = json.loads((workdir / 'launches.jsonl').read_text().splitlines()[0])
    assert launch['command'] == sys.argv
    assert launch['versions']['jax'] == jax.__version__
    metadata = final_state(run, workdir).metadata
    assert metadata['position'] == NUM_STEPS * 8
    assert metadata['model']['grid'] == [3, 3]
    assert metadata['model']['prefix_tokens'] == 1
    assert metadata['class_names'] == ['class_0', 'class_1', 'class_2']


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(tmp_path):
    overrides = {'optim.learning_rate': 1e38, 'optim.warmup_steps': 5}
    run = build(small_config(**overrides))
    with pytest.raises(UserError, match=r'\w+ is (nan|inf) at step (\d+)') as error:
        train(run, tmp_path)
    step = int(str(error.value).split('at step ')[1].split()[0])
    saved = [int(p.name) for p in (tmp_path / 'checkpoints').iterdir()]
    assert all(s < step for s in saved)
    for s in saved:
        with Checkpoints(tmp_path) as checkpoints:
            like = shapes_on(run.parallel.replicated, run.state_shape)
            assert checkpoints.restore_latest(like).step == s
    assert re.search(r'that is not( finite)?: (block|head|patch)', str(error.value))


@pytest.mark.parametrize('log_every', [1, 50])
def test_the_leaf_that_was_not_finite_first_is_named(tmp_path, log_every):
    """Not whatever it has spoiled by the time that somebody looks."""
    run = build(small_config(**{'log.every_steps': log_every}))

    def poisoned(state, batch):
        def poison(path, x):
            name = jax.tree_util.keystr(path, simple=True, separator='/')
            hit = (state.step == 2) & (name == 'head/norm/scale')
            return jax.numpy.where(hit, np.nan, x)

        params = jax.tree_util.tree_map_with_path(poison, state.variables['params'])
        variables = {**state.variables, 'params': params}
        return run.train_step(state.replace(variables=variables), batch)

    with pytest.raises(UserError, match=r'at step 3 .*not finite: head/norm/scale\)'):
        train(dataclasses.replace(run, train_steps=poisoned), tmp_path)


def test_another_run_s_workdir_is_refused(uninterrupted):
    _, workdir, _ = uninterrupted
    before = (workdir / 'config.json').read_bytes()
    with pytest.raises(UserError, match=r'config\.seed is 0 there and 7 here'):
        train(build(small_config(seed=7)), workdir)
    assert (workdir / 'config.json').read_bytes() == before


def test_a_model_learns(tmp_path):
    config = small_config(num_steps=60, **{'optim.learning_rate': 1e-2})
    config.model.kwargs = {'width': 16, 'depth': 1, 'mlp_dim': 32, 'num_heads': 2}
    config.augment.crop = 'none'
    config.augment.pad = default_config().augment.pad
    assert train(build(config), tmp_path)['accuracy'] > 0.9


def test_a_gradient_that_is_not_finite_is_never_saved(tmp_path):
    def poisoned(state, batch):
        state, metrics = run.train_step(state, batch)
        bad = jax.tree.map(lambda x: x * np.nan, state.variables)
        return state.replace(variables=bad), {**metrics, 'grad_norm': (np.nan, 1.0)}

    run = build(small_config(**{'checkpoint.every_steps': 1}))
    with pytest.raises(UserError, match='grad_norm is nan at step 1 '):
        train(dataclasses.replace(run, train_steps=poisoned), tmp_path)
    assert not list((tmp_path / 'checkpoints').glob('[0-9]*'))


def test_a_run_that_saved_nothing_does_not_hold_its_workdir(tmp_path):
    with pytest.raises(UserError, match='finite'):
        train(build(small_config(**{'optim.learning_rate': 1e38})), tmp_path)
    train(build(small_config()), tmp_path)


@pytest.mark.parametrize(
    ('key', 'value'), [('class_names', ['b', 'a', 'c']), ('num_train_examples', 36)]
)
def test_other_data_is_refused(uninterrupted, tmp_path, key, value):
    run, _, _ = uninterrupted
    with pytest.raises(KeyboardInterrupt):
        train(interrupt(run, 7), tmp_path)
    metadata = {**run.metadata, key: value}
    with pytest.raises(UserError, match=f'begun with {key}'):
        train(dataclasses.replace(run, metadata=metadata), tmp_path)


def test_missing_evaluation_data_is_found_before_the_first_step(tmp_path):
    run = build(small_config())

    def missing():
        raise UserError('not there')

    with pytest.raises(UserError, match='not there'):
        train(dataclasses.replace(run, eval_data=missing), tmp_path)
    assert not read_metrics(tmp_path)


def test_checkpoints_that_say_less_of_their_model_are_gone_on_from():
    run = build(small_config())
    there = json.loads(json.dumps(run.metadata))
    del there['model']['activation'], there['model']['num_heads']

    class Older:
        def latest_step(self):
            return 1

        def load_metadata(self, step):
            return there

    _check_continues(run, Older(), run.metadata)
    there['model']['grid'] = [1, 9]
    with pytest.raises(UserError, match='was begun with model'):
        _check_continues(run, Older(), run.metadata)
