"""`vit_jax reproduce`: cells run once, whatever ends the command in between."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

pytest_plugins = ['command_fixtures']

# A cell waits for a file, tells who it is, and measures the cores that it may use.
SWEEP = '''"""Cells that wait.

More of them.
"""

import os
import pathlib
import time

import jax

from vit_jax.errors import Stopped, UserError
from vit_jax.experiment import Cell, Expected, Experiment
from vit_jax.results import mean_sd, table, values_of

NAMES = ('a', 'b/1%', 'b/2%')


def sweep():
    for seed in (0, 1):
        for name in NAMES:
            expected = Expected(30.0, 'table 1', 5.0) if name == 'a' else None
            yield Cell(name, None, {'x': len(name) - seed}, seed, expected)


def measure(cell, workdir, data_dir):
    if data_dir == 'bad' and cell.name == 'a':
        raise UserError('no such data')
    if data_dir == 'stop' and cell.name == 'b/1%':
        raise Stopped(7)  # as `train` does when it is asked to
    if data_dir == 'huge' and cell.name == 'b/1%':
        jax.numpy.zeros(2**48).block_until_ready()  # a PiB of memory
    (workdir / 'pid').write_text(str(os.getpid()))
    go = None if data_dir in (None, 'bad', 'stop', 'huge') else pathlib.Path(data_dir)
    while go and not go.exists():
        time.sleep(0.02)
    cpus = len(os.sched_getaffinity(0))
    return {'accuracy': cell.overrides['x'] / 10, 'cpus': cpus}


def render(lines):
    return table(NAMES, [[mean_sd(values_of(lines, name)) for name in NAMES]])


def flops(cell):
    return None if cell.name == 'a' else cell.overrides['x'] * 10**18


EXPERIMENT = Experiment(sweep, render, measure=measure, flops=flops)
'''
TABLE = (
    '| a | b/1% | b/2% |\n| --- | --- | --- |\n'
    '| 5.0 ± 7.1 (2 seeds) | 35.0 ± 7.1 (2 seeds) | 35.0 ± 7.1 (2 seeds) |\n'
)


@pytest.fixture
def folder(tmp_path):
    """Of experiments."""
    (tmp_path / 'experiments' / 'wait').mkdir(parents=True)
    (tmp_path / 'experiments' / 'wait' / 'sweep.py').write_text(SWEEP)
    return tmp_path


@pytest.fixture
def words(folder):
    return [f'--workdir={folder / "runs"}', f'--experiments={folder / "experiments"}']


def test_all_cells_then_none_then_one(run, folder, words):
    code, out, err = run('reproduce', 'wait', *words)
    assert (code, out) == (0, TABLE)
    assert err.startswith('6 of 6 cells are to run\nwait/a, seed 0: done\n')
    results = folder / 'runs' / 'wait'
    assert (results / 'table.md').read_text() == TABLE
    assert len((results / 'results.jsonl').read_text().splitlines()) == 6
    code, out, err = run('reproduce', 'wait', *words)
    assert (code, out) == (0, TABLE)
    assert err.startswith('0 of 6 cells are to run\n')
    (results / 'b' / '1%' / '1' / 'result.json').unlink()
    _, out, err = run('reproduce', 'wait', *words)
    assert out == TABLE
    assert err.splitlines()[:2] == [
        '1 of 6 cells are to run',
        'wait/b/1%, seed 1: done',
    ]


def test_some_cells(run, folder, words):
    _, _, err = run('reproduce', 'wait/b', *words, '--part=1/2')
    assert err.splitlines()[1:3] == [
        'wait/b/2%, seed 0: done',
        'wait/b/2%, seed 1: done',
    ]
    _, _, err = run('reproduce', 'wait/b/1%', *words, '--seed=1')
    assert err.startswith('1 of 1 cells are to run\nwait/b/1%, seed 1: done\n')


def test_a_cell_that_fails_stops_no_other(run, folder, words):
    code, out, err = run('reproduce', 'wait', *words, '--data_dir=bad')
    assert code == 1
    lines = err.splitlines()
    assert lines[1:3] == ['wait/a, seed 0: no such data', 'wait/b/1%, seed 0: done']
    assert lines[-1] == ('vit_jax: error: 2 of 6 cells did not run, as told above')
    assert '| not run | 35.0' in out


@pytest.mark.parametrize(
    ('name', 'jobs', 'cells'), [('wait', 1, 6), ('wait/b/1%', 2, 2)]
)
def test_a_cell_without_memory_stops_no_other(run, folder, words, name, jobs, cells):
    """Any error of a cell is told in a line; its traceback is in the log."""
    argv = ['reproduce', name, *words, '--data_dir=huge', f'--jobs={jobs}']
    code, out, err = run(*argv)
    assert code == 1
    assert 'Traceback' not in err
    assert out.splitlines()[2].count('2 seeds') == (cells - 2) // 2
    for seed in (0, 1):
        log = folder / 'runs' / 'wait' / 'b' / '1%' / str(seed) / 'log.txt'
        (told,) = (x for x in err.splitlines() if f'b/1%, seed {seed}: ' in x)
        assert 'RuntimeError: RESOURCE_EXHAUSTED: Out of memory' in told
        assert told.count(f'see {log})') == 1
        assert 'in measure\n' in log.read_text()
    assert err.splitlines()[-1].endswith(
        f'2 of {cells} cells did not run, as told above'
    )


def test_a_training_that_is_stopped_ends_the_sweep(run, words):
    code, _, err = run('reproduce', 'wait', *words, '--data_dir=stop')
    assert code == 0
    assert err.splitlines()[1:] == [
        'wait/a, seed 0: done',
        'vit_jax: stopped after step 7, saved; the same command goes on',
    ]


def test_a_cell_that_fails_alone(run, words):
    code, _, err = run('reproduce', 'wait/b/1%', *words, '--data_dir=huge', '--seed=1')
    assert code == 1
    last = err.splitlines()[-1]
    assert re.search(r'error: .*RESOURCE_EXHAUSTED.* \(see .*/1/log\.txt\)$', last)


def test_cells_side_by_side(run, folder, words, monkeypatch):
    """Each has a core of its own, and a failure is told as if it were the only one."""
    monkeypatch.delenv('PYTHONUNBUFFERED', raising=False)
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip('one core')
    before = os.sched_getaffinity(0)
    code, _, err = run('reproduce', 'wait', *words, '--jobs=2', '--data_dir=bad')
    assert code == 1
    assert os.sched_getaffinity(0) == before
    results = folder / 'runs' / 'wait'
    lines = [json.loads(x) for x in (results / 'results.jsonl').open()]
    assert [line['cpus'] for line in lines] == [len(before) // 2] * 4
    log = results / 'a' / '0' / 'log.txt'
    assert f'wait/a, seed 0: no such data (ended with exit code 1; see {log})\n' in err


def test_a_sweep_that_is_ended_loses_nothing(folder, words, run):
    go = folder / 'go'
    command = [sys.executable, '-m', 'vit_jax.main', 'reproduce', 'wait', *words]
    command += ['--jobs=2', f'--data_dir={go}']
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    results = folder / 'runs' / 'wait'

    def pids():
        return [int(file.read_text() or 0) for file in results.glob('**/pid')]

    deadline = time.monotonic() + 120
    while len(pids()) < 2 or 0 in pids():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert 'Traceback' not in err
    for pid in pids():
        assert not pathlib.Path(f'/proc/{pid}').exists()
    go.touch()
    code, out, _ = run('reproduce', 'wait', *words, f'--data_dir={go}')
    assert (code, out) == (0, TABLE)


def test_results_are_kept_beside_the_experiment(run, folder, words):
    kept = folder / 'experiments' / 'wait'
    run('reproduce', 'wait/a', *words, f'--results={kept}')
    other = [f'--workdir={folder / "other"}', words[1], f'--results={kept}']
    _, out, err = run('reproduce', 'wait', *other)
    assert err.startswith('4 of 6 cells are to run\n')
    assert out == (kept / 'table.md').read_text() == TABLE
    sweep = kept / 'sweep.py'
    sweep.write_text(sweep.read_text().replace("'b/1%', 'b/2%'", "'b/2%'"))
    _, _, err = run('reproduce', 'wait', *other)
    assert '\n2 lines of results.jsonl are of no cell of the sweep; delete' in err
    assert len((kept / 'results.jsonl').read_text().splitlines()) == 6


def test_what_there_is(run, folder, words):
    _, experiments = words
    code, out, _ = run('reproduce', '--list', experiments)
    assert code == 0
    assert out.splitlines()[2:] == ['| wait | 0 of 6 | 0 | Cells that wait. |']
    ran = {'cell': 'a', 'config': None, 'overrides': {'x': 1}, 'seed': 0, 'seconds': 91}
    results = folder / 'experiments' / 'wait' / 'results.jsonl'
    results.write_text(json.dumps(ran))
    _, out, _ = run('reproduce', '--list', experiments)
    assert out.splitlines()[2:] == ['| wait | 1 of 6 | 2 | Cells that wait. |']
    results.unlink()
    run('reproduce', 'wait/a', *words, '--seed=0')
    _, out, _ = run('reproduce', 'wait', '--list', *words)
    assert out.splitlines()[2:] == [
        '| a | 1 of 2 seeds, differs | 30 (table 1) |',
        '| b/1% | 0 of 2 seeds |  |',
        '| b/2% | 0 of 2 seeds |  |',
    ]


def test_what_is_left_would_cost(run, folder, words):
    """Of all seeds that are left, at 0.4 x 989 TFLOP/s; the first one tells."""
    where = [*words, '--data_dir=/my data']
    run('reproduce', 'wait/b/1%', *words, '--seed=0')
    code, out, err = run('reproduce', 'wait/b', '--costs', *where)
    assert (code, err) == (0, '')
    header, _, *rows = out.splitlines()
    assert header == '| not run | seeds | FLOP | one H100, at least | command |'
    rest = f"--workdir={folder / 'runs'} '--data_dir=/my data'"
    assert rows[:3] == [
        f'| b/2% | 2 | 8.0e18 | 5.6 hours | `vit_jax reproduce wait/b/2% {rest}` |',
        f'| b/1% | 1 | 3.0e18 | 2.1 hours | `vit_jax reproduce wait/b/1% {rest}` |',
        f'| all | 3 | 1.1e19 | 7.7 hours | `vit_jax reproduce wait/b {rest}` |',
    ]
    assert 'at 40% of its 989 TFLOP/s in bfloat16, an assumption' in out
    _, out, _ = run('reproduce', 'wait/a', '--costs', *words)
    assert '| a | 2 | not counted |  | ' in out
    run('reproduce', 'wait/b', *words)
    _, out, _ = run('reproduce', 'wait/b', '--costs', *words)
    assert out == 'every cell of wait/b has run\n'


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['wiat'], "unknown experiment in .* 'wiat'; did you mean 'wait'"),
        (['wait/c'], "unknown cell of wait 'c'; choose one of: a, b/1%, b/2%"),
        (['wait/b', '--seed=7'], 'wait/b has no seed 7'),
        (['wait', '--jobs=9999'], '9999 jobs have not one each of .* CPU cores'),
        ([], 'name an experiment; --list tells which there are'),
        (['wait', '--list', '--part=0/2'], '--part is of what runs; --list and'),
        (['wait', '--jbos=2'], "does not take '--jbos=2'; did you mean --jobs"),
    ],
)
def test_mistakes(run, words, argv, message):
    code, out, err = run('reproduce', *words, *argv)
    assert (code, out) == (1, '')
    assert re.search(message, err.splitlines()[-1])


@pytest.mark.parametrize('part', ['9/9', '1', '-1/9', 'a/b', '0/0'])
def test_parts_that_are_none(run, words, part):
    code, _, err = run('reproduce', 'wait', *words, f'--part={part}')
    assert code == 2
    assert err.endswith(f'--part: I/N with I below N, not {part!r}\n')


@pytest.mark.parametrize('option', ['--workdir', '--results'])
def test_folders_that_cannot_be_written(fails, folder, words, option):
    """Told before a cell runs."""
    (folder / 'file').write_text('mine')
    where = f'{option}={folder / "file"}'
    told = fails('reproduce', 'wait', *words, where)
    assert told.startswith(f'cannot write to {folder / "file"}')
    assert not [*folder.glob('runs/wait/*/0')]
    assert (folder / 'file').read_text() == 'mine'


def test_a_folder_without_experiments(fails, tmp_path, folder, words):
    told = fails('reproduce', 'wait', f'--experiments={tmp_path / "none"}')
    assert 'no such folder' in told
    assert 'where the project is' in told
    assert 'name a folder for the runs' in fails('reproduce', 'wait', words[1])
