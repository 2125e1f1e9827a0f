"""Real processes over `jax.distributed`: the same run, and what happens to faults."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from vit_jax.writer import read_metrics

pytestmark = pytest.mark.slow

# All that may depend on how a batch is split: augmentation on the host and on the
# device, dropout, and examples that do not fill the batches of an evaluation.
CONFIG = """
from vit_jax.config import default_config

def get_config(variant=None):
    config = default_config()
    config.model.name = 'ViT-Ti/4'
    config.model.kwargs = {
        'width': 8, 'depth': 1, 'mlp_dim': 12, 'num_heads': 2,
        'dropout_rate': 0.1, 'drop_path_rate': 0.5,
    }
    config.dataset.name = 'mortal.data:images'
    config.augment.crop = 'pad'
    config.augment.pad = 1
    config.augment.flip = True
    config.augment.erasing = 0.5
    config.augment.mixup = 0.8
    config.augment.cutmix = 1.0
    config.augment.mix_mode = 'elem'
    config.batch_size = 16
    config.num_steps = 10
    config.eval.every_steps = 5
    config.checkpoint.every_steps = 3
    config.log.every_steps = 1
    config.log.tensorboard = False
    return config
"""
# The victim dies in the evaluation after step 5, when checkpoint step 3 is there.
DATA = """
import dataclasses, os, pathlib, signal, time
from vit_jax.data.datasets import load_dataset

class Mortal:
    def __init__(self, source, checkpoint):
        self.source, self.checkpoint = source, checkpoint

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        while not self.checkpoint.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

def images(data_dir):
    name = 'synthetic:size=8,channels=3,num_examples=37,num_classes=3'
    dataset = load_dataset(name)
    victim = os.environ.get('VICTIM')
    if victim is None or victim != os.environ.get('JAX_PROCESS_ID'):
        return dataset
    checkpoint = pathlib.Path(os.environ['WORKDIR'], 'checkpoints', '3')
    def open_split(split):
        source = dataset.open(split)
        return Mortal(source, checkpoint) if split == 'test' else source
    return dataclasses.replace(dataset, open=open_split)
"""


TRANSLATE = """
from vit_jax.config import default_config

def get_config(variant=None):
    config = default_config('translate')
    config.model.name = 'Transformer-tiny'
    config.model.kwargs = {'width': 16, 'depth': 1, 'mlp_dim': 24, 'num_heads': 2}
    config.dataset.name = 'dates:num_examples=61'
    config.dataset.eval_split = 'train'
    config.text.tokenizer = 'char'
    config.text.vocab_size = 100
    config.text.buckets = (24, 40)
    config.text.tokens_per_batch = 400
    config.text.extra_length = 0
    config.num_steps = 120
    config.optim.learning_rate = 0.02
    config.optim.warmup_steps = 5
    config.checkpoint.every_steps = 120
    config.log.every_steps = 1
    config.log.tensorboard = False
    return config
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('processes')
    (folder / 'config.py').write_text(CONFIG)
    (folder / 'translate.py').write_text(TRANSLATE)
    (folder / 'mortal').mkdir()
    (folder / 'mortal' / 'data.py').write_text(DATA)
    return folder


@pytest.fixture(scope='module')
def start(folder):
    """Starts `vit_jax` in the folder."""

    def start(*words, devices=None, **variables):
        environ = {k: v for k, v in os.environ.items() if not k.startswith('JAX_')}
        environ |= {'JAX_PLATFORMS': 'cpu', **variables}
        environ['XLA_FLAGS'] = f'--xla_force_host_platform_device_count={devices or 1}'
        # Most of the time goes into compiling the same steps again.
        environ['JAX_COMPILATION_CACHE_DIR'] = str(folder / 'cache')
        environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
        return subprocess.Popen(
            [sys.executable, '-m', 'vit_jax.main', *words],
            cwd=folder,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


TRAIN = ['train', '--config=config.py']
TWO = ['launch', '--processes=2', '--devices_per_process=4']


@pytest.fixture(scope='module')
def runs(folder, start):
    """Workdirs: uninterrupted runs, and runs gone on with where one was killed."""

    def finish(*processes):
        for process in processes:
            out, err = process.communicate()
            assert process.returncode == 0, err
            assert out.startswith('finished at step 10: '), out

    def train(name, *words, **kwargs):
        return start(*words, *TRAIN, f'--workdir={name}', **kwargs)

    finish(train('2x4', *TWO))
    finish(train('1x8', devices=8), train('1x1', devices=1))

    victim = {'VICTIM': '1', 'WORKDIR': 'killed'}
    killed = train('killed', *TWO, **victim)
    out, err = killed.communicate()
    assert killed.returncode == 137, err
    fault = (out, err, folder / 'killed')
    for name in ('2x4 again', '1x8 again', '1x2 again'):
        subprocess.run(['cp', '-r', folder / 'killed', folder / name], check=True)
    finish(train('2x4 again', *TWO))
    finish(train('1x8 again', devices=8), train('1x2 again', devices=2))
    return fault, folder


def losses(workdir):
    lines = read_metrics(workdir)
    train = [[m['step'], m['train/loss']] for m in lines if 'train/loss' in m]
    test = [[m['step'], m['eval/loss']] for m in lines if 'eval/loss' in m]
    assert [step for step, _ in train] == list(range(1, 11))  # each written once
    assert [step for step, _ in test] == [5, 10]
    return np.array(train + test)


@pytest.mark.parametrize('name', ['1x8', '1x1', '1x8 again', '1x2 again'])
def test_losses_do_not_depend_on_processes(runs, name):
    _, folder = runs
    np.testing.assert_allclose(losses(folder / name), losses(folder / '2x4'), rtol=1e-5)


def test_a_killed_process_is_named_and_ends_the_run(runs):
    (out, err, workdir), _ = runs
    assert out == ''
    *_, died, hint = err.splitlines()
    assert died.startswith('vit_jax launch: process 1 of 2 died by SIGKILL')
    assert hint.endswith('the same command goes on from the last checkpoint')
    assert 'Traceback' not in err
    assert 'absl' not in err  # no word of jaxlib's about it
    steps = [line['step'] for line in read_metrics(workdir)]
    assert 4 <= steps[-1] < 10
    assert [path.name for path in (workdir / 'checkpoints').iterdir()] == ['3']


def test_the_restart_is_exact(runs):
    _, folder = runs
    assert losses(folder / '2x4 again').tolist() == losses(folder / '2x4').tolist()
    states = []
    for name in ('2x4', '2x4 again'):
        states.append({})
        for item in ('variables', 'optimizer'):
            path = folder / name / 'checkpoints' / '10' / item
            with ocp.StandardCheckpointer() as checkpointer:
                tree = checkpointer.metadata(path).item_metadata.tree
                like = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)
                states[-1][item] = checkpointer.restore(path, like)
    left, right = map(jax.tree.leaves, states)
    assert len(left) > 20
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_one_process_speaks(runs, start):
    _, folder = runs
    process = start(*TWO, *TRAIN, '--workdir=2x4')
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert re.fullmatch(
        r'2 processes, at 127\.0\.0\.1:\d+\n2x4 holds this run, already finished\n', err
    )
    assert out.count('finished at step 10: ') == 1
    launches = (folder / '2x4' / 'launches.jsonl').read_text().splitlines()
    assert [json.loads(line)['processes'] for line in launches] == [2]  # left alone


def test_evaluation_over_processes(runs, start):
    """Of 37 examples in batches of 16, each counts once."""
    _, folder = runs
    process = start(*TWO, 'evaluate', '--workdir=2x4')
    out, err = process.communicate()
    assert process.returncode == 0, err
    result = json.loads(out)  # once, and nothing else
    last = read_metrics(folder / '2x4')[-1]
    assert result['examples'] == 37
    assert result['loss'] == pytest.approx(last['eval/loss'], rel=1e-6)


def test_translation_over_processes(folder, start):
    """Losses, and the score of what is translated, 61 pairs in batches of 10 to 16."""

    def finish(*words, **kwargs):
        process = start(*words, **kwargs)
        out, err = process.communicate()
        assert process.returncode == 0, err
        return out

    train = ['train', '--config=translate.py']
    finish(*TWO, *train, '--workdir=t2x4')
    finish(*train, '--workdir=t1x8', devices=8)
    two, one = read_metrics(folder / 't2x4'), read_metrics(folder / 't1x8')
    # Rounding grows over the steps.
    losses = [[line['train/loss'] for line in lines[:10]] for lines in (two, one)]
    np.testing.assert_allclose(*losses, rtol=1e-5)

    result = json.loads(finish('evaluate', '--workdir=t2x4', devices=8))
    assert result['bleu'] > 0  # or there would be nothing to compare
    for name in ('loss', 'perplexity', 'bleu', 'bleu_lower_case'):
        assert result[name] == pytest.approx(two[-1][f'eval/{name}'], rel=1e-5), name


ENDLESS = [*TRAIN, '--config.num_steps=100000', '--config.eval.every_steps=100000']


def test_sigterm_saves_and_ends(folder, start):
    workdir = folder / 'stopped'
    process = start(*TWO, *ENDLESS, '--workdir=stopped')
    wait_for((workdir / 'checkpoints' / '3').exists, process.pid)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=180)
    assert (process.returncode, out) == (0, ''), err
    (step,) = re.findall(r'stopped after step (\d+)', err)
    assert (workdir / 'checkpoints' / step).is_dir()


def test_a_job_saves_before_it_is_queued_again(folder, start):
    """Through submitit's local executor, which queues as that of Slurm does."""
    pytest.importorskip('submitit')
    process = start(
        *['launch', '--slurm=local', '--tasks_per_node=2', '--log_dir=logs'],
        *[*ENDLESS, '--workdir=job'],
        devices=4,
    )
    out = ''.join(process.stdout.readline() for _ in range(3))  # which the job keeps
    told = re.fullmatch(
        r'job (\d+): 1 node\(s\) x 2 task\(s\), 1440 minutes\n'
        r'output: (\S+err), and (\S+out) beside it\nto stop it: kill (\d+)\n',
        out,
    )
    assert told, process.stderr.read()
    job = int(told[1])
    launches, checkpoints = (
        folder / 'job' / n for n in ('launches.jsonl', 'checkpoints')
    )
    try:
        wait_for((checkpoints / '3').exists, job)
        children = pathlib.Path(f'/proc/{job}/task/{job}/children').read_text().split()
        assert len(children) == 2
        for pid in children:
            os.kill(int(pid), signal.SIGUSR2)
        wait_for(lambda: launches.read_text().count('\n') == 2, job)
        log = pathlib.Path(told[2])
        (first,) = stops(log)
        wait_for(lambda: read_metrics(folder / 'job')[-1]['step'] > first + 1, job)
    finally:
        os.kill(job, signal.SIGTERM)
    wait_for(lambda: not is_alive(job), None)
    assert stops(log)[0] == first
    assert stops(log)[1] > first
    assert [json.loads(line)['processes'] for line in launches.open()] == [2, 2]


def stops(log):
    found = re.findall(r'stopped after step (\d+)', log.read_text())
    return [int(step) for step in found]


def wait_for(condition, pid):
    """Until the condition holds; fails where the process ends before, or in 180 s."""
    deadline = time.monotonic() + 180
    while not condition():
        assert pid is None or is_alive(pid)
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid):
    try:
        state = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2]
    except FileNotFoundError:
        return False
    return state.split()[0] != 'Z'
