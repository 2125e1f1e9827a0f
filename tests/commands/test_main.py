import importlib
import logging
import os
import re
import subprocess
import sys

import jax
import pytest

from vit_jax.commands import options
from vit_jax.main import COMMANDS, main

pytest_plugins = ['command_fixtures']


@pytest.mark.parametrize('argv', [['--help'], ['-h'], ['help']])
def test_help_names_every_command(run, argv):
    code, out, err = run(*argv)
    assert (code, err) == (0, '')
    assert out.startswith('usage: vit_jax <command>')
    for name, text in COMMANDS.items():
        assert f'  {name}' in out
        assert text in out


def test_no_command_shows_the_help(run):
    assert run() == (2, run('--help').out, '')


@pytest.mark.parametrize('command', COMMANDS)
def test_each_command_has_help(run, command):
    code, out, err = run(command, '--help')
    assert (code, err) == (0, '')
    assert out.startswith(f'usage: vit_jax {command} ')
    assert f'\n  vit_jax {command} ' in out  # an example


def test_help_is_quick():
    """No command imports readers of data or of checkpoints to say what it takes."""
    program = (
        'import contextlib, sys\n'
        'from vit_jax.main import COMMANDS, main\n'
        'for command in COMMANDS:\n'
        '    with contextlib.suppress(SystemExit):\n'
        '        main([command, "--help"])\n'
        'slow = {"grain", "matplotlib", "orbax", "tensorflow", "tensorflow_datasets",'
        ' "torch"}\n'
        'sys.exit(str(slow & set(sys.modules)) if slow & set(sys.modules) else 0)\n'
    )
    argv = [sys.executable, '-c', program]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.count('usage: ') == len(COMMANDS)


@pytest.mark.parametrize(
    ('command', 'nearest'),
    [('trian', 'train'), ('check-data', 'check_data'), ('predictt', 'predict')],
)
def test_unknown_commands(fails, command, nearest):
    expected = f'unknown command {command!r}; did you mean {nearest!r}?'
    assert fails(command) == expected


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['train', '--wokdir=/x'], "'--wokdir=/x'; did you mean --workdir?"),
        (['train', '--confg', 'x'], "'--confg'; did you mean --config?"),
        (['evaluate', '--weight=/x'], "'--weight=/x'; did you mean --weights?"),
        (['predict', '--jsn', 'a.png'], "'--jsn'; did you mean --json?"),
        (['predict', 'a.png', '--weights=x', '--topk=3'], "'--topk=3'"),
        (['attend', '--quary=1,2', 'a.png'], "'--quary=1,2'; did you mean --query?"),
        (['summarize', '--modle=CNN'], "'--modle=CNN'; did you mean --model?"),
        (['check_data', '--workdir=/x', '--config=x'], "'--workdir=/x'"),
        (['benchmark', '--tokens=3', 'gpsa'], "'--tokens=3'"),
        # No abbreviations, no stray words, no config where none is read.
        (['train', '--work=/x', '--config=x'], "'--work=/x'; did you mean --workdir?"),
        (['train', 'more', '--workdir=/x', '--config=x'], "'more'"),
        (['summarize', '--model=CNN', '--config.seed=3'], "'--config.seed=3'"),
    ],
)
def test_unknown_options(fails, argv, message):
    assert fails(*argv) == f'vit_jax {argv[0]} does not take {message}'


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['gpsa', '--round=3'], "'--round=3'; did you mean --rounds?"),
        (['gpsa', '--config.seed=3'], "'--config.seed=3'"),
        (['train', '--step=3', '--config=x'], "'--step=3'; did you mean --steps?"),
        (['train', '--tokens=3', '--config=x'], "'--tokens=3'"),
    ],
)
def test_unknown_options_of_benchmarks(fails, argv, message):
    what = f'vit_jax benchmark {argv[0]}'
    assert fails('benchmark', *argv) == f'{what} does not take {message}'


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['train'], 'required: --config, --workdir'),
        (['predict', '--weights=/x'], 'required: IMAGE'),
        (['attend', 'a.png', '--weights=/x'], 'required: --out'),
        (['summarize'], 'required: --model'),
        (
            ['summarize', '--model=CNN', '--channels=0'],
            "--channels: a whole number above 0, not '0'",
        ),
        (['summarize', '--model=CNN', '--num_classes=x'], "above 0, not 'x'"),
        (['benchmark', 'gpsa', '--rounds=0'], "above 0, not '0'"),
        (['benchmark', 'speed'], "invalid choice: 'speed'"),
        (['benchmark', 'train'], 'required: --config'),
        (['benchmark', 'train', '--config=x', '--steps=0'], "above 0, not '0'"),
        (['benchmark', 'gpsa', '--dtype=float16'], "invalid choice: 'float16'"),
    ],
)
def test_misuse_shows_the_usage(run, argv, message):
    code, out, err = run(*argv)
    assert (code, out) == (2, '')
    assert err.startswith(f'usage: vit_jax {argv[0]} ')
    assert message in err.splitlines()[-1]


def test_interrupts_are_quiet(run, monkeypatch):
    def interrupt(argv):
        raise KeyboardInterrupt

    train = importlib.import_module('vit_jax.commands.train')
    monkeypatch.setattr(train, 'main', interrupt)
    assert run('train') == (130, '', '\nvit_jax: interrupted\n')


def test_late_readers_of_a_damaged_checkpoint_are_quiet(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'unraisablehook', sys.__unraisablehook__)
    monkeypatch.setattr(logging, 'basicConfig', lambda **_: None)
    options.quiet()

    class Reader:
        def __init__(self, message):
            self.message = message

        def __del__(self):  # where Python has nowhere to raise to
            raise RuntimeError(self.message)

    Reader('Event loop is closed')
    assert capsys.readouterr().err == ''
    Reader('a fault of ours')
    assert 'a fault of ours' in capsys.readouterr().err


def test_errors_that_are_not_the_users_keep_their_traceback(run, monkeypatch):
    def fail(argv):
        raise RuntimeError('a fault of ours')

    train = importlib.import_module('vit_jax.commands.train')
    monkeypatch.setattr(train, 'main', fail)
    with pytest.raises(RuntimeError, match='a fault of ours'):
        run('train')


def test_a_device_without_room_is_one_line(fails, monkeypatch):
    def fail(argv):
        jax.jit(jax.numpy.zeros, static_argnums=0)((2**50,)).block_until_ready()

    train = importlib.import_module('vit_jax.commands.train')
    monkeypatch.setattr(train, 'main', fail)
    line = fails('train')
    assert line.startswith('out of memory: RESOURCE_EXHAUSTED: ')
    assert line.endswith('; a smaller batch, or a narrower beam, needs less')


def test_a_closed_stdout_is_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'stdout', None)
    assert main(['summarize', '--model=CNN', '--image_size=8']) == 1
    monkeypatch.undo()
    assert capsys.readouterr().err == (
        'vit_jax: error: stdout is closed; send it to a file, or to /dev/null\n'
    )


def test_a_forks_modules_are_found_where_the_user_is(run, tmp_path, monkeypatch):
    (tmp_path / 'nets_here.py').write_text('from vit_jax.models.cnn import CNN as Net')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [p for p in sys.path if p != str(tmp_path)])
    code, out, _ = run('summarize', '--model=nets_here:Net', '--image_size=8')
    assert code == 0
    assert out.startswith('nets_here:Net at 8x8x3')


@pytest.mark.parametrize(
    ('argv', 'code', 'err'),
    [
        (['trian'], 1, "vit_jax: error: unknown command 'trian'; .*'train'"),
        (
            ['predict', '--weights=/none', __file__],
            1,
            'vit_jax: error: no such file or folder: /none',
        ),
        (['summarize', '--model=CNN', '--image_size=8'], 0, ''),
        (['train', '--help'], 0, ''),
    ],
)
def test_the_module_is_a_program(argv, code, err):
    command = [sys.executable, '-m', 'vit_jax.main', *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == code
    assert 'Traceback' not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == bool(err)
    assert all(re.match(err, line) for line in lines)
