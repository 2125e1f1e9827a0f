"""Signals: the first one saves and stops, the second one acts at once."""

import dataclasses
import itertools
import os
import pathlib
import signal
import subprocess
import sys
import threading

import jax
import optax
import pytest
from test_train import NUM_STEPS, assert_bit_equal, final_state, small_config

from vit_jax.build import build
from vit_jax.checkpoint import Checkpoints
from vit_jax.errors import Stopped
from vit_jax.interrupt import StopSignals
from vit_jax.train import train
from vit_jax.writer import read_evaluations


def signalled_in_data(run, number, batches):
    """The same run, whose process gets the signal while it waits for a batch more."""

    def feed(step, position):
        for count, batch in enumerate(run.feed(step, position)):
            if count == batches:
                os.kill(os.getpid(), number)
            yield batch

    return dataclasses.replace(run, feed=feed)


def signalled_in_evaluation(run, number, evaluations):
    """The same run, whose process gets the signal when that evaluation begins."""
    calls = itertools.count()  # the first one only looks whether the data is there

    def eval_data():
        if next(calls) == evaluations:
            os.kill(os.getpid(), number)
        return run.eval_data()

    return dataclasses.replace(run, eval_data=eval_data)


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('uninterrupted')
    config = small_config(**{'optim.ema_decay': 0.5})
    # Without dropout, whose random numbers take long to compile.
    config.model.kwargs = {'width': 8, 'depth': 1, 'mlp_dim': 12, 'num_heads': 2}
    run = build(config)
    return run, workdir, train(run, workdir)


def check_stops_and_goes_on(run, uninterrupted, tmp_path, step):
    whole, workdir, result = uninterrupted
    with pytest.raises(Stopped, match=f'after step {step}, saved') as stopped:
        train(run, tmp_path)
    assert stopped.value.step == step
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest_step() == step  # no multiple of the period
    assert train(whole, tmp_path) == result
    assert_bit_equal(final_state(whole, tmp_path), final_state(whole, workdir))


@pytest.mark.parametrize(
    ('number', 'batches'), [(signal.SIGTERM, 0), (signal.SIGINT, 7)]
)
def test_a_run_stopped_while_it_waits_for_data(
    uninterrupted, tmp_path, number, batches
):
    run = signalled_in_data(uninterrupted[0], number, batches)
    check_stops_and_goes_on(run, uninterrupted, tmp_path, batches)


@pytest.mark.parametrize(('evaluations', 'step'), [(1, 5), (3, NUM_STEPS)])
def test_a_run_stopped_in_an_evaluation(uninterrupted, tmp_path, evaluations, step):
    """It does not wait for its end, and makes it up when it goes on."""
    run = signalled_in_evaluation(uninterrupted[0], signal.SIGTERM, evaluations)
    check_stops_and_goes_on(run, uninterrupted, tmp_path, step)
    _, workdir, _ = uninterrupted
    assert list(read_evaluations(tmp_path)) == [5, 10, NUM_STEPS]
    assert read_evaluations(tmp_path) == read_evaluations(workdir)


def test_the_best_is_known_of_a_step_that_was_stopped_at(uninterrupted, tmp_path):
    """Step 4 is evaluated and saved; there a signal comes, in the evaluation."""
    run = uninterrupted[0]
    periods = dataclasses.replace(run.periods, evaluate=4, save=4)
    run = dataclasses.replace(run, periods=periods, keep=1, keep_best='loss')

    start = jax.device_get(run.init().variables['params'])

    def eval_step(variables, batch):  # the loss grows with the way from the start
        metrics = uninterrupted[0].eval_step(variables, batch)
        weight = metrics['loss'][1]
        way = optax.tree.norm(optax.tree.sub(variables['params'], start))
        return {**metrics, 'loss': (way * weight, weight)}

    run = dataclasses.replace(run, eval_step=eval_step)
    with pytest.raises(Stopped):
        train(signalled_in_evaluation(run, signal.SIGTERM, 1), tmp_path)
    train(run, tmp_path)
    losses = {step: line['loss'] for step, line in read_evaluations(tmp_path).items()}
    assert min(losses, key=losses.get) == 4
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [4, NUM_STEPS]


def test_a_signal_in_the_last_save_stops_what_comes_after(
    uninterrupted, tmp_path, monkeypatch
):
    """The run itself is whole; of several seeds, the next does not begin."""
    run, _, result = uninterrupted
    save = Checkpoints.save

    def signalled(self, step, *args):
        save(self, step, *args)
        if step == NUM_STEPS:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Checkpoints, 'save', signalled)
    with pytest.raises(Stopped, match=f'finished at step {NUM_STEPS}, and stopped'):
        train(run, tmp_path)
    assert train(run, tmp_path) == result


HANGING = '''
"""A dataset whose training examples stop coming."""
import dataclasses, time
from vit_jax.data.datasets import load_dataset

def make(data_dir):
    dataset = load_dataset('synthetic:size=6,channels=1,num_examples=37,num_classes=3')

    def open_split(split):
        source = dataset.open(split)
        return Hanging(source) if split == 'train' else source

    return dataclasses.replace(dataset, open=open_split)

class Hanging:
    def __init__(self, source):
        self.source, self.count = source, 0

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        self.count += 1
        if self.count > 100:
            time.sleep(1000)
        return self.source[index]
'''


@pytest.mark.slow
def test_a_run_that_hangs_for_want_of_data_is_told_and_can_be_stopped(tmp_path):
    recipe = tmp_path / 'recipe.py'
    here = pathlib.Path(__file__).parent
    recipe.write_text(
        f'import sys; sys.path.insert(0, {str(here)!r})\n'
        'from test_train import small_config\n'
        'def get_config():\n'
        "    config = small_config(**{'dataset.timeout_seconds': 1})\n"
        "    config.dataset.name = 'hang.data:make'\n"
        '    config.num_steps = 1000\n'
        '    return config\n'
    )
    (tmp_path / 'hang').mkdir()
    (tmp_path / 'hang' / 'data.py').write_text(HANGING)
    workdir = tmp_path / 'run'
    process = subprocess.Popen(
        [
            *(sys.executable, '-m', 'vit_jax.main', 'train'),
            *(f'--config={recipe}', f'--workdir={workdir}'),
        ],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    said = []
    for line in process.stderr:
        said.append(line)
        if 'no batch for' in line:
            break
    assert 'still waiting' in said[-1]
    assert 'data.py' in said[-1]  # where the readers are
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert 'saved; the same command goes on' in process.stderr.read()
    with Checkpoints(workdir, read_only=True) as checkpoints:
        assert checkpoints.latest_step() > 0


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_handlers_are_ours_until_the_first_signal(number):
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signal.getsignal(number) != before
        assert not signals.stop()
        os.kill(os.getpid(), number)
        assert signals.stop()
        assert signal.getsignal(number) == before  # the second one acts at once
    assert signal.getsignal(number) == before


def test_handlers_are_given_back():
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(ZeroDivisionError), StopSignals():
        raise ZeroDivisionError
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_other_threads_have_no_handlers():
    seen = []

    def enter():
        with StopSignals() as signals:
            seen.append(signals.stop())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [False]
