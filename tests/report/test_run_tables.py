"""What is told of the workdirs of runs, by tables written here by hand."""

import json
import pathlib

import pytest

from vit_jax.config import default_config
from vit_jax.errors import UserError
from vit_jax.report.runs import (
    RunFolder,
    config_differences,
    config_from_default,
    environment,
    label_paths,
    last_evaluations,
    overview,
    rates,
    read_runs,
)


def make_run(label, lines=(), launches=(), **changes):
    config = json.loads(json.dumps(default_config().to_dict()))
    for key, value in changes.items():
        section, _, name = key.rpartition('__')
        (config[section] if section else config)[name] = value
    return RunFolder(label, pathlib.Path(label), config, list(lines), list(launches))


@pytest.mark.parametrize(
    ('paths', 'labels'),
    [
        (['/r/a'], ['a']),
        (['/r/a', '/r/b'], ['a', 'b']),
        (['/r/a/0', '/r/a/1', '/r/b/0'], ['a/0', 'a/1', 'b/0']),
        (['/r/a', '/r/x/../a/'], ['a']),
        ([], []),
    ],
)
def test_labels(paths, labels):
    assert list(label_paths([pathlib.Path(path) for path in paths])) == labels


def test_a_run_is_read_up_to_where_it_was_cut_off(tmp_path):
    config = make_run('a').config
    (tmp_path / 'config.json').write_text(json.dumps(config))
    lines = ['{"step": 3, "train/loss": 1.5}', '{"note": 1}', '{"step": 6, "train/lo']
    (tmp_path / 'metrics.jsonl').write_text('\n'.join(lines))
    (tmp_path / 'launches.jsonl').write_text('{"time": "now"}\n{"ti')
    (run,) = read_runs([tmp_path])
    assert run.label == tmp_path.name
    assert run.lines == [{'step': 3, 'train/loss': 1.5}]
    assert run.launches == [{'time': 'now'}]


def test_a_run_that_has_just_begun(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(make_run('a').config))
    (run,) = read_runs([tmp_path])
    assert last_evaluations([run]) == rates([run]) == environment([run]) == ''
    assert '| – | digits | 0 | 0 |' in overview([run], {})


@pytest.mark.parametrize('content', ['{}', '[1]', '{"task": '])
def test_what_is_no_run(tmp_path, content):
    (tmp_path / 'config.json').write_text(content)
    with pytest.raises(UserError, match=r'config\.json is (damaged|not the config)'):
        read_runs([tmp_path])


def test_overview():
    runs = [
        make_run('a', [{'step': 1200}, {'step': 1100}], num_steps=2000, seed=3),
        make_run('b_c', [{'step': 7}], num_epochs=2.5, model__name='CNN'),
    ]
    assert overview(runs, {'a': 1234567}).splitlines()[2:] == [
        '| a | ViT-S/16 | 1,234,567 | digits | 1,200 of 2,000 | 3 |',
        '| b_c | CNN | – | digits | 7, 2.5 epochs in all | 0 |',
    ]


def test_last_and_best_evaluation():
    a = make_run(
        'a',
        [
            {
                'step': 100,
                'eval/loss': 0.5,
                'eval/accuracy': 0.75,
                'eval/examples': 359,
            },
            {'step': 200, 'train/loss': 0.1},
            {
                'step': 200,
                'eval/loss': 0.25,
                'eval/accuracy': 0.5,
                'eval/examples': 359,
            },
        ],
    )
    b = make_run('b', [{'step': 10, 'eval/loss': 3.0}, {'step': 20, 'eval/loss': 4.0}])
    c = make_run('c', [{'step': 10, 'eval/fid': 3.0}])
    assert last_evaluations([a, b, c, make_run('d')]) == (
        '| run | step | loss | accuracy | fid | examples | best |\n'
        '| --- | --- | --- | --- | --- | --- | --- |\n'
        '| a | 200 | 0.25 | 50.00% | – | 359 | accuracy 75.00% at step 100 |\n'
        '| b | 20 | 4 | – | – | – | loss 3 at step 10 |\n'
        '| c | 10 | – | – | 3 | – | – |\n'
    )


def test_rates_are_medians_and_compilation_a_sum():
    lines = [
        {'step': i, 'train/step_seconds': x, 'train/images_per_second': 1e4 / x}
        for i, x in enumerate([0.5, 100.0, 0.25])
    ]
    lines[0] |= {'train/compile_seconds': 3.5, 'train/data_wait': 0.5}
    lines[2] |= {'train/compile_seconds': 1.5, 'train/loss': 3.0}
    assert rates([make_run('a', lines), make_run('b')]) == (
        '| run | step seconds | images per second | data wait | compile seconds |\n'
        '| --- | --- | --- | --- | --- |\n'
        '| a | 0.5 | 20,000 | 50.00% | 5 |\n'
    )


def test_keys_that_differ():
    runs = [
        make_run('a', optim__learning_rate=0.1, model__kwargs={'depth': 2}),
        make_run('b', optim__learning_rate=0.2),
    ]
    assert config_differences(runs) == (
        '| key | a | b |\n| --- | --- | --- |\n'
        '| `model.kwargs.depth` | `2` | – |\n'
        '| `optim.learning_rate` | `0.1` | `0.2` |\n'
    )
    assert config_differences(runs[:1]) == config_differences([]) == ''


def test_a_sweep_has_a_row_for_each_run():
    runs = [make_run(name, seed=i) for i, name in enumerate('abc')]
    assert config_differences(runs) == (
        '| run | `seed` |\n| --- | --- |\n| a | `0` |\n| b | `1` |\n| c | `2` |\n'
    )


def test_keys_that_are_not_at_their_default():
    run = make_run('a', seed=7, model__kwargs={'widths': [3, 5]})
    run.config['gone'] = None  # of an older version
    assert config_from_default(run) == (
        '<details>\n<summary>a: 3 keys that are not at their default</summary>\n\n'
        '| key | value | default |\n| --- | --- | --- |\n'
        '| `gone` | `null` | – |\n'
        '| `model.kwargs.widths` | `[3, 5]` | – |\n'
        '| `seed` | `7` | `0` |\n\n</details>'
    )


def test_environment():
    launch = {
        'time': '2026-11-28T10:00:00+0000',
        'command': ['/venv/bin/vit_jax', 'train', '--config.task=a b'],
        'python': '3.11.7',
        'versions': {'jax': '0.10.2', 'vit_jax': None},
        'devices': ['TPU v5e'] * 3 + ['cpu'],
        'processes': 2,
    }
    again = {**launch, 'time': 'later'}
    assert environment([make_run('a', launches=[launch, again]), make_run('b')]) == (
        '| run | started | devices | processes | versions |\n'
        '| --- | --- | --- | --- | --- |\n'
        '| a | 2026-11-28T10:00:00+0000 | 3 x TPU v5e, 1 x cpu | 2 '
        '| python 3.11.7, jax 0.10.2 |\n'
        '| a | later | 3 x TPU v5e, 1 x cpu | 2 | python 3.11.7, jax 0.10.2 |\n\n'
        "    # a\n    vit_jax train '--config.task=a b'"
    )
