import json
import re

import pytest

from vit_jax.errors import UserError
from vit_jax.sweep import Cell, main, percent, run_sweep

CONFIG = 'configs/digits_cnn.py:smoke'


def test_a_name_serves_as_a_folder():
    cell = Cell('configs/digits_road.py:sagan', {'dataset.train_fraction': 0.1}, 3)
    assert cell.name == 'digits_road-sagan-dataset.train_fraction=0.1-3'


def test_a_sweep_runs_what_has_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'tfds'))
    results = tmp_path / 'results.jsonl'
    first, second = (Cell(CONFIG, {'num_steps': n}, seed=7) for n in (1, 2))
    (line,) = run_sweep([first], results, tmp_path / 'runs')
    assert line['steps'] == 1
    assert line['examples'] == 359
    assert 0 <= line['accuracy'] <= 1
    assert line['accuracies'] == {'1': line['accuracy']}
    assert line['params'] > 100_000
    config = json.loads((tmp_path / 'runs' / first.name / 'config.json').read_text())
    assert config['seed'] == 7
    assert json.loads(results.read_text()) == line
    assert (tmp_path / 'runs' / first.name / 'config.json').exists()

    # A line says that its cell has run, whatever it holds.
    results.write_text(json.dumps({**line, 'accuracy': -1.0}) + '\n')
    lines = run_sweep([first, second], results, tmp_path / 'runs')
    assert [each['accuracy'] >= 0 for each in lines] == [False, True]
    assert [each['steps'] for each in lines] == [1, 2]
    assert [json.loads(text) for text in results.read_text().splitlines()] == lines


def test_a_cell_with_a_tuple_runs_once(tmp_path):
    results = tmp_path / 'results.jsonl'
    overrides = {'dataset.image_size': (8, 18)}
    line = {'config': 'a', 'overrides': overrides, 'seed': 0, 'accuracy': 0.5}
    results.write_text(json.dumps(line) + '\n')
    (found,) = run_sweep([Cell('a', overrides, 0)], results, tmp_path)  # no such config
    assert percent([found], 'a', dataset__image_size=(8, 18)) == '50.0 (1 seed)'
    assert percent([found], 'a', dataset__image_size=(8, 8)) == 'not run'


def test_an_experiment_writes_its_table_or_one_line(tmp_path, capsys):
    line = {'config': 'a', 'overrides': {}, 'seed': 0, 'accuracy': 0.5}
    (tmp_path / 'results.jsonl').write_text(json.dumps(line) + '\n')

    def run(*cells):
        def render(lines):
            return percent(lines, 'a') + '\n'

        return main(
            'An experiment.', tmp_path, cells, render, [f'--workdir={tmp_path}']
        )

    assert run(Cell('a', {}, 0)) == 0
    assert (tmp_path / 'table.md').read_text() == '50.0 (1 seed)\n'
    capsys.readouterr()
    assert run(Cell('configs/digits_none.py', {}, 0)) == 1
    out, err = capsys.readouterr()
    assert out == ''
    assert re.fullmatch(r'\S+: error: .*digits_none.py.*\n', err)


def test_half_a_line_is_told(tmp_path):
    results = tmp_path / 'results.jsonl'
    results.write_text('{"config": "a", "overrides": {}, "seed": 0}\n{"config": "a')
    with pytest.raises(UserError, match=r'results.jsonl:2 is no JSON.*delete the line'):
        run_sweep([], results, tmp_path)


def test_an_unknown_key_is_told(tmp_path):
    cells = [Cell(CONFIG, {'num_stps': 1}, 0)]
    with pytest.raises(UserError, match='num_stps'):
        run_sweep(cells, tmp_path / 'results.jsonl', tmp_path)
    assert not (tmp_path / 'results.jsonl').exists()


def test_percent_of_one_seed_has_no_spread():
    lines = [{'config': 'a', 'overrides': {}, 'accuracy': 0.25}]
    assert percent(lines, 'a') == '25.0 (1 seed)'
