import json
import shutil

import pytest
from command_lines import COLOUR, DIGITS

pytest_plugins = ['command_fixtures']


@pytest.fixture(scope='session')
def trained(digits):
    """What training wrote of its last evaluation."""
    lines = (digits / 'metrics.jsonl').read_text().splitlines()
    values = json.loads(lines[-1])
    return {k.removeprefix('eval/'): v for k, v in values.items() if k != 'step'}


def evaluate(run, *argv):
    code, out, err = run('evaluate', *argv)
    assert (code, err) == (0, '')
    assert out.count('\n') == 1
    return json.loads(out)


def test_a_workdir(run, digits, trained):
    about = {'dataset': 'digits', 'split': 'test', 'step': 3}
    metrics = evaluate(run, f'--workdir={digits}')
    assert metrics == {**about, **trained}
    assert metrics['examples'] == 359


def test_a_config_with_weights(run, digits, data_dir, trained):
    metrics = evaluate(
        run, *DIGITS, f'--weights={digits}', f'--config.dataset.data_dir={data_dir}'
    )
    assert {k: metrics[k] for k in trained} == trained


@pytest.mark.parametrize('batch_size', [8, 360, 1000])
def test_any_batch_size_is_exact(run, digits, trained, batch_size):
    metrics = evaluate(
        run, f'--workdir={digits}', f'--config.eval.batch_size={batch_size}'
    )
    assert metrics['examples'] == 359
    assert {k: metrics[k] for k in trained} == pytest.approx(trained, rel=1e-5)


def test_another_split(run, digits):
    metrics = evaluate(run, f'--workdir={digits}', '--config.dataset.eval_split=train')
    assert (metrics['split'], metrics['examples']) == ('train', 1438)


def test_fields_that_are_tuples_come_back_from_the_checkpoint(run, colour):
    """A CNN's widths are a list in JSON."""
    metrics = evaluate(run, f'--workdir={colour}')
    assert metrics['examples'] == 20
    assert 'accuracy_top5' not in metrics
    assert evaluate(run, *COLOUR, f'--weights={colour}') == metrics


def test_the_newest_checkpoint_counts(run, fails, digits, tmp_path):
    shutil.copytree(digits, tmp_path / 'run')
    folder = tmp_path / 'run' / 'checkpoints'
    shutil.move(folder / '3', folder / '2')
    assert evaluate(run, f'--workdir={tmp_path}/run')['step'] == 2


def test_the_workdir_is_left_as_it_is(run, digits, snapshot):
    before = snapshot(digits)
    evaluate(run, f'--workdir={digits}')
    assert snapshot(digits) == before
