"""Cells and what becomes of them: run once, gathered, written, compared."""

import json
import pathlib

import matplotlib.figure
import pytest

from vit_jax.errors import UserError
from vit_jax.experiment import (
    Cell,
    Expected,
    Experiment,
    FinalTest,
    load_experiment,
    run_cell,
    train_cell,
)
from vit_jax.reproduce import gather, update_results, write_results
from vit_jax.results import published_table, status, values_of

CONFIG = 'configs/digits_cnn.py:smoke'
ROOT = pathlib.Path(__file__).parents[1]


def make_experiment(*cells, **fields):
    """An experiment that counts how often a cell is measured."""
    runs = []

    def measure(cell, workdir, data_dir):
        runs.append(cell)
        return {'accuracy': cell.overrides['x'] / 10}

    def render(lines):
        return ' '.join(f'{values_of([x], x["cell"])[0]:.0f}' for x in lines) + '\n'

    options = {'sweep': lambda: cells, 'render': render, 'measure': measure}
    return Experiment(**{**options, **fields}, name='e'), runs


def test_a_cell_is_trained_as_it_says(tmp_path):
    cell = Cell('CNN/10%', CONFIG, {'num_steps': 2, 'eval.every_steps': 1}, seed=7)
    seen = []

    def measure(run, variables):
        seen.append((run.metadata['eval_split'], set(variables)))
        return {'seen': len(seen)}

    tests = {'more': FinalTest(measure), 'most': FinalTest(measure, 'train')}
    line = train_cell(cell, tmp_path, None, tests)
    assert json.loads((tmp_path / 'config.json').read_text())['seed'] == 7
    assert line['steps'] == 2
    assert line['examples'] == 359
    assert 0 <= line['accuracy'] <= 1
    assert list(line['accuracies']) == ['1', '2']
    assert line['accuracies']['2'] == line['accuracy']
    assert line['params'] > 100_000
    assert (line['more'], line['most']) == ({'seen': 1}, {'seen': 2})
    assert seen == [('test', {'params'}), ('train', {'params'})]


def test_a_cell_that_has_run_does_not_run_again(tmp_path):
    cells = Cell('a/b', None, {'x': 3}), Cell('a/b', None, {'x': 5}, seed=1)
    experiment, runs = make_experiment(*cells)
    lines = [run_cell(experiment, cell, tmp_path, None) for cell in cells]
    assert [run_cell(experiment, cell, tmp_path, None) for cell in cells] == lines
    assert runs == [*cells]
    assert lines[0].items() >= {'cell': 'a/b', 'seed': 0, 'accuracy': 0.3}.items()
    assert {'seconds', 'date', 'hardware', 'jax'} < set(lines[0])

    # Of a cell that has changed nothing is known.
    changed, runs = make_experiment(Cell('a/b', None, {'x': 4}))
    (cell,) = changed.cells()
    assert run_cell(changed, cell, tmp_path, None)['accuracy'] == 0.4
    assert runs == [cell]


def test_a_tuple_is_what_json_has_for_it(tmp_path):
    cell = Cell('a', None, {'x': 1, 'size': (8, 18)})
    experiment, runs = make_experiment(cell)
    run_cell(experiment, cell, tmp_path, None)
    run_cell(experiment, cell, tmp_path, None)
    assert len(runs) == 1


def test_results_are_those_of_the_folders_then_of_the_file(tmp_path):
    """Where a cell's folder is deleted its line is gone, but for what is kept."""
    cells = [Cell(f'c{x}', None, {'x': x}) for x in (3, 1, 2)]
    experiment, _ = make_experiment(*cells)
    workdir, kept = tmp_path / 'runs', tmp_path / 'kept'
    for cell in cells[::-1]:
        run_cell(experiment, cell, workdir, None)
    assert update_results(experiment, workdir, workdir) == '30 10 20\n'
    assert update_results(experiment, kept, workdir) == '30 10 20\n'
    assert (kept / 'table.md').read_text() == '30 10 20\n'
    (workdir / 'c1' / '0' / 'result.json').unlink()
    assert update_results(experiment, workdir, workdir) == '30 20\n'
    assert update_results(experiment, kept, workdir) == '30 10 20\n'
    # Nor is a cell told of that is none any more; its line is kept.
    other = Cell('c1', None, {'x': 7})
    fewer, _ = make_experiment(cells[0], other, cells[2])
    assert update_results(fewer, kept, tmp_path / 'none') == '30 20\n'
    run_cell(fewer, other, tmp_path / 'more', None)
    assert update_results(fewer, kept, tmp_path / 'more') == '30 70 20\n'
    lines = [json.loads(line) for line in (kept / 'results.jsonl').open()]
    assert [line['overrides']['x'] for line in lines] == [3, 7, 2, 1]
    assert update_results(experiment, kept, tmp_path / 'none') == '30 10 20\n'


def test_pictures_are_written(tmp_path):
    def draw(lines):
        figure = matplotlib.figure.Figure()
        figure.text(0, 0, str(len(lines)))
        return {'a.png': figure}

    experiment, _ = make_experiment(draw=draw)
    write_results(experiment, [], tmp_path)
    assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('line', [b'{"cell": "b', b'null', b'', b'{"cell": "\xff"}'])
def test_a_damaged_line_is_told(tmp_path, line):
    (tmp_path / 'results.jsonl').write_bytes(b'{"cell": "a"}\n' + line + b'\n')
    experiment, _ = make_experiment(Cell('a', None, {}))
    with pytest.raises(UserError, match=r'results.jsonl:2 is no JSON.*delete the line'):
        gather(experiment, tmp_path)


@pytest.mark.parametrize('path', [(), ('test', 'bleu'), ('seed', 'bleu')])
def test_a_line_without_the_value_is_told(path):
    what = '.'.join(path) or 'accuracy'
    with pytest.raises(UserError, match=f'line of a, seed 3, has no {what}, as'):
        values_of([{'cell': 'a', 'seed': 3}], 'a', *path)


@pytest.mark.parametrize(
    ('cells', 'message'),
    [
        ([('a', 0), ('a', 1), ('a', 1)], "2 cells of e are called 'a' and have seed 1"),
        ([('a', 0), ('ab', 0), ('a/b/c', 1)], "'a/b/c' of e lies below cell 'a', "),
    ],
)
def test_cells_that_would_take_each_others_place(cells, message):
    sweep = [Cell(name, None, {'x': i}, seed) for i, (name, seed) in enumerate(cells)]
    experiment, _ = make_experiment(*sweep)
    with pytest.raises(UserError, match=message):
        experiment.cells()


def test_a_sweep_that_does_not_run():
    experiment, _ = make_experiment(sweep=lambda: (1 / x for x in (1, 0)))
    with pytest.raises(UserError, match='sweep of e does not run: ZeroDivisionError: '):
        experiment.cells()


def test_cells_by_name():
    names = 'ViT/10%', 'ViT/100%', 'ViT+/10%', 'digits/ViT/10%'
    experiment, _ = make_experiment(*(Cell(name, None, {}) for name in names))

    def found(below):
        return [cell.name for cell in experiment.cells(below)]

    assert found('') == [*names]
    assert found('ViT') == ['ViT/10%', 'ViT/100%']
    assert found('ViT/10%') == ['ViT/10%']
    assert found('digits') == ['digits/ViT/10%']
    with pytest.raises(UserError, match="unknown cell of e 'ViT/1%'; did you mean 'Vi"):
        experiment.cells('ViT/1%')


def test_published_values_have_a_status():
    expected = Expected(59.6, 'table 2')
    cells = [
        *(Cell('ConViT', None, {}, seed, expected) for seed in (0, 1)),
        Cell('other', None, {}),
        Cell('ViT', None, {}, 0, Expected(48.0, 'table 2', tolerance=2)),
        Cell('ResNet', None, {}, 0, Expected(3.0, 'table 2')),
    ]
    accuracies = {('ConViT', 0): 0.59, ('ConViT', 1): 0.60, ('ViT', 0): 0.4599}
    lines = [
        {'cell': name, 'seed': seed, 'accuracy': value}
        for (name, seed), value in accuracies.items()
    ]
    assert published_table(cells, lines).splitlines()[2:] == [
        '| ConViT | 59.6 (table 2) | 59.5 ± 0.7 (2 seeds) | reproduced |',
        '| ViT | 48 (table 2) | 46.0 (1 seed) | differs |',
        '| ResNet | 3 (table 2) | not run | not run |',
    ]


@pytest.mark.parametrize(('value', 'told'), [(10.0, 'reproduced'), (10.01, 'differs')])
def test_the_tolerance_is_within(value, told):
    assert status([value], Expected(9.95, 'table 1', tolerance=0.05)) == told


def test_a_published_value_is_of_what_it_names():
    expected = Expected(41.0, 'table 2', path=('test', 'bleu'))
    line = {'cell': 'a', 'seed': 0, 'accuracy': 0.61, 'test': {'bleu': 40.7}}
    (row,) = published_table([Cell('a', None, {}, 0, expected)], [line]).splitlines()[
        2:
    ]
    assert row == '| a | 41 (table 2) | 40.7 (1 seed) | reproduced |'


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        (None, r'x is no experiment: it has no sweep\.py'),
        ('1 / 0', r'sweep\.py does not run: ZeroDivisionError'),
        ('', r'sweep\.py does not run: AttributeError: .*EXPERIMENT'),
    ],
)
def test_experiments_that_are_none(tmp_path, text, message):
    folder = tmp_path / 'x'
    folder.mkdir()
    if text is not None:
        (folder / 'sweep.py').write_text(text)
    with pytest.raises(UserError, match=message) as told:
        load_experiment(folder)
    assert '\n' not in str(told.value)


def test_a_sweep_imports_what_lies_beside_it(tmp_path):
    """In two folders of one name."""
    for text in ('one', 'other'):
        folder = tmp_path / text / 'x'
        folder.mkdir(parents=True)
        (folder / 'beside.py').write_text(f'NAME = {text!r}')
        (folder / 'sweep.py').write_text(
            'from vit_jax.experiment import Cell, Experiment\n'
            'from . import beside\n'
            'CELLS = [Cell(beside.NAME, None, {})]\n'
            'EXPERIMENT = Experiment(lambda: CELLS, lambda lines: "")'
        )
        (cell,) = load_experiment(folder).cells()
        assert cell.name == text


def folders():
    return sorted(file.parent for file in (ROOT / 'experiments').glob('*/sweep.py'))


@pytest.mark.parametrize('folder', folders(), ids=lambda folder: folder.name)
def test_tables_follow_from_the_results(folder):
    """Nothing in a table was typed: it is rendered again to the byte."""
    experiment = load_experiment(folder)
    lines = gather(experiment, folder)
    assert experiment.title.endswith('.')
    cells = experiment.cells()
    keys = {json.dumps([cell.name, cell.seed]) for cell in cells}
    assert len(keys) == len(cells)  # which are folders
    file = folder / 'results.jsonl'
    if file.exists():
        assert len(lines) == len(file.read_text().splitlines())  # none is of no cell
        assert experiment.render(lines) == (folder / 'table.md').read_text()
    else:
        assert 'not run' in experiment.render([])
    readme = (folder / 'README.md').read_text()
    assert f'vit_jax reproduce {folder.name}' in readme
