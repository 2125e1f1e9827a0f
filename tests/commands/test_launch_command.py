"""`launch`: its options, the processes' environments, and what is told of them."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from vit_jax import processes
from vit_jax.errors import UserError
from vit_jax.processes import Watch, count_gpus, environments, first_failed

pytest_plugins = ['command_fixtures']

TRAIN = ['train', '--config=x', '--workdir=y']


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--processes=2'], 'name the command to launch, such as .*train'),
        (['--processes=2', 'launch', '--processes=2', *TRAIN], 'name the command'),
        (TRAIN, 'give one of --processes=N, for this host, and --slurm'),
        (['--processes=2', '--slurm', *TRAIN], 'give one of --processes=N'),
        (['--proceses=2', *TRAIN], "'--proceses=2'; did you mean --processes"),
        (['--processes', '2', '--nodes=2', *TRAIN], '--nodes is for --slurm'),
        (['--processes=2', '--slurm_time=3', *TRAIN], '--slurm_time is for --slurm'),
        (['--slurm', '--verbose', *TRAIN], '--verbose is for --processes'),
        (['--slurm', '--slurm_time', *TRAIN], '--slurm_time needs a value'),
    ],
)
def test_options_that_do_not_fit(fails, argv, message):
    assert re.match(
        message, fails('launch', *argv).removeprefix('vit_jax launch does not take ')
    ), message


needs_submitit = pytest.mark.skipif(
    importlib.util.find_spec('submitit') is None, reason='submitit is not installed'
)


@needs_submitit
@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--slurm', *TRAIN], r'the job was not taken: .*"srun".* --slurm=local'),
        (['--slurm=local', '--nodes=2', *TRAIN], 'has one node, not 2'),
        (['--slurm=local', '--slurm_time=1:00', *TRAIN], "in minutes, not '1:00'"),
        (['--slurm=local', '--slurm_qeue=x', *TRAIN], "not taken: .*'qeue'"),
    ],
)
def test_jobs_that_cannot_be(fails, tmp_path, monkeypatch, argv, message):
    # Its first import would close the handlers of pytest's log.
    monkeypatch.setenv('SUBMITIT_LOG_LEVEL', 'NOCONFIG')
    monkeypatch.setenv('PATH', str(tmp_path))  # no srun
    monkeypatch.chdir(tmp_path)
    assert re.search(message, fails('launch', *argv))


def test_without_submitit_the_extra_is_named(fails, monkeypatch):
    monkeypatch.setitem(sys.modules, 'submitit', None)
    message = fails('launch', '--slurm', *TRAIN)
    assert message == "--slurm needs submitit: pip install 'vit_jax[slurm]'"


def test_environments_on_a_cpu():
    environ = {
        'HOME': '/root',
        'XLA_FLAGS': '--a=1 --xla_force_host_platform_device_count=8 --b',
        'JAX_LOCAL_DEVICE_IDS': '0',
    }
    first, second = environments(environ, 2, 3, 'host:5')
    assert first == {
        'HOME': '/root',
        'XLA_FLAGS': '--a=1 --b --xla_force_host_platform_device_count=3',
        'JAX_COORDINATOR_ADDRESS': 'host:5',
        'JAX_NUM_PROCESSES': '2',
        'JAX_PROCESS_ID': '0',
    }
    assert second == {**first, 'JAX_PROCESS_ID': '1'}
    assert (
        environments(environ, 1, None, 'host:5')[0]['XLA_FLAGS']
        == (environ['XLA_FLAGS'])
    )


@pytest.mark.parametrize(
    ('count', 'each', 'shares'),
    [
        (2, None, ['4,7', '5,1']),
        (3, None, ['4', '7', '5']),
        (2, 1, ['4', '7']),
        (3, 2, '3 processes need 6 GPUs, there are 4'),
        (5, None, '5 processes need 5 GPUs, there are 4; JAX_PLATFORMS=cpu uses none'),
    ],
)
def test_gpus_are_shared_out(count, each, shares):
    gpus = ['4', '7', '5', '1']
    if isinstance(shares, str):
        with pytest.raises(UserError, match=shares):
            environments({}, count, each, 'host:5', gpus)
        return
    result = environments({'XLA_FLAGS': '--a'}, count, each, 'host:5', gpus)
    assert [environ['CUDA_VISIBLE_DEVICES'] for environ in result] == shares
    assert {environ['XLA_FLAGS'] for environ in result} == {'--a'}


def test_gpus_that_are_seen(tmp_path, monkeypatch):
    smi = tmp_path / 'nvidia-smi'
    smi.write_text('#!/bin/sh\necho "GPU 0: A (UUID: 1)"\necho "GPU 1: A (UUID: 2)"\n')
    smi.chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    plugin = tmp_path / 'jax_plugins' / 'xla_cuda13'
    monkeypatch.setattr(sys, 'path', [*sys.path, str(tmp_path)])
    if importlib.util.find_spec('jax_plugins') is None:  # as `jax[cuda13]` brings it
        assert count_gpus({'CUDA_VISIBLE_DEVICES': '3'}) == []
    plugin.mkdir(parents=True)
    (plugin / '__init__.py').touch()
    importlib.invalidate_caches()
    assert count_gpus({}) == ['0', '1']
    assert count_gpus({'JAX_PLATFORMS': 'cpu'}) == []
    assert count_gpus({'CUDA_VISIBLE_DEVICES': '3,GPU-5'}) == ['3', 'GPU-5']
    assert count_gpus({'CUDA_VISIBLE_DEVICES': '', 'JAX_PLATFORMS': 'cuda'}) == []
    assert count_gpus({'CUDA_VISIBLE_DEVICES': '-1'}) == []
    assert count_gpus({'CUDA_VISIBLE_DEVICES': '1,-1,2'}) == ['1']


@pytest.mark.parametrize(
    ('codes', 'last', 'first'),
    [
        ([None, -9, None], ['', '', ''], 1),
        ([-6, -9], ['', ''], 1),  # jaxlib aborted what was left alone
        ([1, -11], ['', ''], 1),
        ([0, -6], ['', ''], 1),
        ([1, 1], ['RuntimeError: x', 'vit_jax: error: y'], 1),
        ([1, 1], ['vit_jax: error: y', 'vit_jax: error: y'], 0),
        ([-6, 1], ['', ''], 1),
    ],
)
def test_whose_failure_came_first(codes, last, first):
    assert first_failed(codes, [line.encode() for line in last]) == first


@pytest.fixture
def watch(capfd):
    """Watches shell scripts as processes of 'train'; returns code, stderr, seconds."""

    def watch(*scripts, verbose=False, signals=()):
        started = [
            subprocess.Popen(
                ['sh', '-c', script], stderr=subprocess.PIPE, start_new_session=True
            )
            for script in scripts
        ]
        watcher = Watch(started, 'train', verbose)
        for delay, number in signals:
            threading.Timer(delay, watcher.take_signal, (number, None)).start()
        begin = time.monotonic()
        code = watcher.run()
        seconds = time.monotonic() - begin
        watcher.kill()
        assert all(process.returncode is not None for process in started)
        return code, capfd.readouterr().err, seconds

    return watch


SAY = 'echo {0} >&2; '
CONTINUE = 'vit_jax launch: the same command goes on from the last checkpoint\n'


def test_what_processes_say(watch):
    # Gloo's sentence, and what becomes of it when two threads write at once.
    gloo = ' is connected to 7 peer ranks. '
    gloo += 'Expected number of connected peer ranks is : 7'
    code, err, _ = watch(
        'echo a >&2; echo shared >&2; printf rest >&2',
        f'sleep 0.2; echo shared >&2; echo b >&2; echo "[Gloo] Rank 1{gloo}" >&2; '
        f'echo "[Gloo] Rank [Gloo] Rank 1" >&2; echo "{gloo}" >&2; echo "[Gloo]" >&2',
    )
    assert code == 0
    lines = ['a', 'shared', 'rest', '[1] b', '[1] [Gloo]']
    assert sorted(err.splitlines()) == sorted(lines)


@pytest.mark.parametrize('verbose', [False, True])
def test_a_death_is_told_at_once_and_the_noise_after_it_is_not(watch, verbose):
    """Process 0 reacts as jaxlib does: it says much, and does not end when asked to."""
    code, err, seconds = watch(
        "trap '' TERM; echo begun >&2; sleep 0.9; echo early >&2; sleep 0.3; "
        'echo noise >&2; sleep 60; sleep 60',
        'sleep 1; echo "last words" >&2; kill -9 $$',
        verbose=verbose,
    )
    assert code == 128 + 9
    assert seconds < 10
    *lines, told, hint = err.splitlines()
    assert f'{hint}\n' == CONTINUE
    died = (
        'vit_jax launch: process 1 of 2 died by SIGKILL (out of memory?); the others '
        'are stopped'
    )
    if verbose:
        early = ['begun', 'early', '[1] last words']
        assert [*lines, told] == [*early, died, 'noise']
    else:
        assert [*lines, told] == ['begun', '[1] last words', died]


def test_a_mistake_of_all_is_told_once(watch):
    error = 'echo "vit_jax: error: no such file" >&2; exit 1'
    # The second finds it late, the third is aborted by jaxlib before.
    code, err, _ = watch(error, f'sleep 0.8; {error}', 'sleep 0.4; kill -6 $$')
    assert (code, err) == (1, 'vit_jax: error: no such file\n')
    code, err, _ = watch(f'sleep 0.8; {error}', error)
    assert (code, err) == (1, 'vit_jax: error: no such file\n')


def test_a_mistake_of_one_is_told_with_its_number(watch, monkeypatch):
    monkeypatch.setattr(processes, 'SAME_SECONDS', 0.5)
    code, err, seconds = watch(
        'sleep 60', 'echo "vit_jax: error: no such disk" >&2; exit 3'
    )
    assert code == 3
    assert seconds < 10
    error, died, hint = err.splitlines()
    assert error == '[1] vit_jax: error: no such disk'
    assert died.startswith('vit_jax launch: process 1 of 2 ended with exit code 3;')
    assert f'{hint}\n' == CONTINUE


def test_the_cause_is_told_not_its_consequence(watch):
    """Process 0 fails by an error of its own because process 1 has left it."""
    code, err, _ = watch(
        'sleep 0.3; echo "RuntimeError: connection lost" >&2; exit 1',
        'echo "vit_jax: error: no such disk" >&2; exit 1',
    )
    assert code == 1
    assert err.startswith('[1] vit_jax: error: no such disk\n')
    assert 'connection' not in err


def test_the_first_signal_is_passed_on(watch):
    end = 'echo "vit_jax: stopped" here >&2; exit 0'
    save = f"trap 'sleep 0.7; {end}' TERM; while :; do sleep 0.05; done"
    code, err, _ = watch(
        save, save.replace('sleep 0.7; ', ''), signals=[(0.5, signal.SIGINT)]
    )
    assert code == 0
    assert err == (
        'vit_jax launch: the processes save and end; the next signal kills them\n'
        'vit_jax: stopped here\n'
    )


def test_the_second_signal_kills(watch):
    hang = "trap '' TERM; sleep 60; sleep 60"
    signals = [(0.5, signal.SIGTERM), (1.0, signal.SIGTERM)]
    code, err, seconds = watch(hang, hang, signals=signals)
    assert code == 128 + 15
    assert seconds < 5
    assert err.count('\n') == 1


# A terminal's session, whose processes save when asked to.
IN_A_TERMINAL = """
import fcntl, sys, termios
from vit_jax import processes
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
processes.sys.executable = sys.argv[1]
sys.exit(processes.run_local(['train'], 2))
"""
SAVE = """#!/bin/sh
trap 'sleep 0.7; echo saved >&2; echo saved > saved$JAX_PROCESS_ID; exit 0' TERM
echo begun >&2
touch begun$JAX_PROCESS_ID
i=0; while [ $i -lt 400 ]; do i=$((i + 1)); sleep 0.05; done
"""


@pytest.mark.parametrize('closed', [True, False])
def test_a_closed_terminal_saves(tmp_path, closed):
    script = tmp_path / 'save.sh'
    script.write_text(SAVE)
    script.chmod(0o755)
    terminal, end = os.openpty()
    process = subprocess.Popen(
        [sys.executable, '-c', IN_A_TERMINAL, str(script)],
        **dict.fromkeys(('stdin', 'stdout', 'stderr'), end),
        start_new_session=True,
        cwd=tmp_path,
    )
    os.close(end)
    deadline = time.monotonic() + 90
    while len(list(tmp_path.glob('begun?'))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)  # the handlers are set after the processes are started
    if closed:
        os.close(terminal)
    else:
        process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    process.send_signal(signal.SIGHUP)  # shells say it too
    assert process.wait(90) == 0
    assert len(list(tmp_path.glob('saved?'))) == 2
    if not closed:
        os.close(terminal)


def test_nohup_is_respected(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    seen = []
    monkeypatch.setattr(
        Watch, 'run', lambda self: seen.append(signal.getsignal(signal.SIGHUP)) or 0
    )
    try:
        assert processes.run_local(['--help'], 1) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert seen == [signal.SIG_IGN]


# A task, with the signals as submitit sets them.
TASK = """
import os, runpy, signal, sys
from submitit.local.local import LocalJobEnvironment
from vit_jax.commands.launch import Task
LocalJobEnvironment()._handle_signals(None, None)
def queue(number, frame):
    print('queued again', flush=True)
    sys.exit(7)
signal.signal(signal.SIGUSR2, queue)
if sys.argv[1] == 'preempted':
    runpy.run_module = lambda *_, **__: os.kill(os.getpid(), signal.SIGUSR2)
Task(sys.argv[1:], None)()
os.kill(os.getpid(), signal.SIGTERM)
print('SIGTERM was passed over')
"""


def run_task(*command):
    argv = [sys.executable, '-c', TASK, *command]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60)


@needs_submitit
def test_sigterm_ends_a_task_that_does_not_train():
    done = run_task('help')
    assert done.returncode == -signal.SIGTERM, done.stdout
    assert 'passed over' not in done.stdout


@needs_submitit
def test_a_task_with_nothing_to_save_is_queued_again_at_once():
    done = run_task('preempted')
    assert (done.returncode, done.stdout) == (7, 'queued again\n'), done.stderr


def test_workers_of_a_killed_process_end_too(watch, tmp_path):
    pid = tmp_path / 'pid'
    watch('sleep 60', f'sleep 61 & echo $! > {pid}; sleep 0.3; kill -9 $$')
    deadline = time.monotonic() + 10
    while (state := state_of(int(pid.read_text()))) not in ('Z', 'gone'):
        assert time.monotonic() < deadline, state
        time.sleep(0.01)


def state_of(pid):
    """'Z' for a process that nobody has asked for yet."""
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rpartition(')')[2].split()[0]
    except FileNotFoundError:
        return 'gone'


def test_every_process_is_one_of_the_command_line(tmp_path):
    """The whole of it, for a command that fails before it joins."""
    argv = [sys.executable, '-m', 'vit_jax.main', 'launch', '--processes=2', 'trian']
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr == (
        "vit_jax: error: unknown command 'trian'; did you mean 'train'?\n"
    )
