"""Experiments in a report: rendered again in place, from what was measured alone."""

import json
import pathlib
import shutil

import pytest

from vit_jax.errors import UserError
from vit_jax.report.experiments import experiment_parts

ROOT = pathlib.Path(__file__).parents[2]
SWEEP = '''"""Means & <tags>.

More.
"""

from matplotlib.figure import Figure

from vit_jax.experiment import Cell, Experiment
from vit_jax.results import mean_sd, table, values_of


def sweep():
    return [Cell('a', None, {'x': seed}, seed) for seed in (0, 1)]


def render(lines):
    return table(['a'], [[mean_sd(values_of(lines, 'a'))]])


def draw(lines):
    figure = Figure(figsize=(3, 2))
    figure.subplots().plot([line['accuracy'] for line in lines])
    return {'curve.svg': figure, 'shown.png': figure}


EXPERIMENT = Experiment(sweep, render, draw)
'''
README = '# What it is\n\nAs ![one](shown.png) shows.\n'


def make_line(seed, x, accuracy, **more):
    key = {'cell': 'a', 'config': None, 'overrides': {'x': x}, 'seed': seed}
    return {**key, 'accuracy': accuracy, 'date': '2026-01-02', 'jax': '1', **more}


@pytest.fixture
def folder(tmp_path):
    """Of an experiment, of which both cells have run, and one that is none any more."""
    folder = tmp_path / 'experiments' / 'e'
    folder.mkdir(parents=True)
    (folder / 'sweep.py').write_text(SWEEP)
    (folder / 'README.md').write_text(README)
    lines = [make_line(0, 0, 0.5), make_line(0, 9, 0.0), make_line(1, 1, 0.75)]
    (folder / 'results.jsonl').write_text(''.join(f'{json.dumps(x)}\n' for x in lines))
    return folder


def test_what_was_rendered_is_rendered_again_byte_for_byte(tmp_path):
    for name in ('digits_road', 'cifar10_sample_efficiency'):
        folder = tmp_path / name
        shutil.copytree(ROOT / 'experiments' / name, folder)
        before = {path.name: path.read_bytes() for path in folder.glob('*.*')}
        (folder / 'table.md').write_text('stale')
        (part,) = experiment_parts([folder], tmp_path).values()
        after = {path.name: path.read_bytes() for path in folder.glob('*.*')}
        assert {k: v for k, v in after.items() if k in before} == before
        assert (folder / 'table.md').read_text() in f'{part.text}\n'


def test_what_is_told(folder):
    (part,) = experiment_parts([folder], folder.parent).values()
    assert part.text == (
        '## e\n\nMeans \\& \\<tags\\>.\n\n'
        '| a |\n| --- |\n| 62.5 ± 17.7 (2 seeds) |\n\n'
        '![e: curve.svg](experiments/e/curve.png)\n\n'
        '2 of 2 cells have run; 2026-01-02; jax 1. By `vit_jax reproduce e`.\n\n'
        'Lines of results.jsonl that are of no cell of its sweep, and left out: 1.\n\n'
        '<details>\n<summary>Every cell that has run</summary>\n\n'
        '| cell | seed | accuracy | date | jax | overrides |\n'
        '| --- | --- | --- | --- | --- | --- |\n'
        '| a | 0 | 50.00% | 2026-01-02 | 1 | `{"x": 0}` |\n'
        '| a | 1 | 75.00% | 2026-01-02 | 1 | `{"x": 1}` |\n\n</details>\n\n'
        '### What it is\n\nAs ![one](experiments/e/shown.png) shows.'
    )
    assert set(part.pictures) == {
        'experiments/e/curve.png',
        'experiments/e/shown.png',
    }


def test_lines_of_no_cell_are_kept_where_they_are(folder):
    before = (folder / 'results.jsonl').read_bytes()
    experiment_parts([folder], folder.parent)
    assert (folder / 'results.jsonl').read_bytes() == before
    names = {path.name for path in folder.iterdir()} - {'.lock', '__pycache__'}
    new = {'table.md', 'curve.svg', 'shown.png'}
    assert names == new | {'sweep.py', 'README.md', 'results.jsonl'}


def test_results_elsewhere_are_of_the_experiment_of_their_name(folder, tmp_path):
    results = tmp_path / 'runs' / 'e'
    results.mkdir(parents=True)
    shutil.copy(folder / 'results.jsonl', results)
    parts = experiment_parts([folder, results], folder.parent)
    assert list(parts) == ['experiments/e', 'runs/e']
    assert '62.5 ± 17.7' in (results / 'table.md').read_text()
    assert '### What it is' in parts['runs/e'].text
    with pytest.raises(UserError, match=r'holds results.jsonl but no sweep.py'):
        experiment_parts([results], tmp_path)


def test_what_has_not_run_writes_nothing(folder):
    (folder / 'results.jsonl').unlink()
    before = {path.name for path in folder.iterdir()}
    (part,) = experiment_parts([folder], folder.parent).values()
    assert '| not run |' in part.text
    assert '0 of 2 cells have run. By' in part.text
    assert '.png' not in part.text
    assert {path.name for path in folder.iterdir()} - {'__pycache__'} == before
