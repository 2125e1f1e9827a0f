import json
import sys

import jax
import pytest

from vit_jax.config import default_config, flatten
from vit_jax.errors import UserError
from vit_jax.workdir import open_workdir, write_launch


def make_config(**values):
    config = default_config()
    config.update_from_flattened_dict(values)
    return config.to_dict()


def hold(path, config, **kwargs):
    with open_workdir(path, config, **kwargs):
        write_launch(path, config)


def start(path, config):
    """Opens a workdir as a run does that then writes metrics."""
    hold(path, config)
    (path / 'metrics.jsonl').touch()
    (path / 'checkpoints' / '3').mkdir(parents=True, exist_ok=True)


def test_a_new_workdir_holds_config_and_launch(tmp_path):
    path = tmp_path / 'some' / 'where'
    config = make_config(**{'dataset.image_size': (3, 5)})
    hold(path, config)
    held = json.loads((path / 'config.json').read_text())
    assert held == json.loads(json.dumps(config))
    assert held['dataset']['image_size'] == [3, 5]
    (launch,) = map(json.loads, (path / 'launches.jsonl').read_text().splitlines())
    assert launch['command'] == sys.argv
    assert launch['versions']['jax'] == jax.__version__
    assert launch['python'] == '.'.join(map(str, sys.version_info[:3]))
    assert launch['devices'] == ['cpu'] * 8
    assert launch['processes'] == 1
    assert {'vit_jax', 'flax', 'optax', 'grain'} < set(launch['versions'])


def test_each_launch_is_noted(tmp_path):
    config = make_config(**{'dataset.image_size': (3, 5)})
    for _ in range(3):
        start(tmp_path, config)
    launches = (tmp_path / 'launches.jsonl').read_text().splitlines()
    assert len(launches) == 3


def test_a_folder_with_other_things_will_do(tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    hold(tmp_path, make_config())
    assert (tmp_path / 'notes.txt').read_text() == 'mine'


ANOTHER = {
    bool: lambda x: not x,
    int: lambda x: x + 1,
    float: lambda x: x + 0.5,
    str: lambda x: x + '1',
    type(None): lambda x: 7,
    tuple: lambda x: ['7'],
}


# A run and its continuation may differ in these: the result is the same.
RESUMABLE = {
    'dataset.data_dir',
    'dataset.num_workers',
    'dataset.steps_per_call',
    'dataset.timeout_seconds',
    'parallel.mode',
    'parallel.data',
    'parallel.fsdp',
    'parallel.tensor',
    'parallel.remat',
    'parallel.heartbeat_seconds',
    'eval.every_steps',
    'eval.batch_size',
    'checkpoint.every_steps',
    'checkpoint.keep',
    'checkpoint.keep_best',
    'checkpoint.average',
    'log.every_steps',
    'log.tensorboard',
    'log.wandb',
    'log.profile_steps',
}


@pytest.mark.parametrize(
    'key', [k for k, _ in flatten(default_config()) if k != 'model.kwargs']
)
def test_another_config_is_refused_unless_the_result_is_the_same(tmp_path, key):
    config = make_config()
    start(tmp_path, config)
    before = (tmp_path / 'config.json').read_text()
    *sections, name = key.split('.')
    section = config
    for part in sections:
        section = section[part]
    value = section[name]
    section[name] = ANOTHER[type(value)](value)
    if key in RESUMABLE:
        hold(tmp_path, config)
        held = json.loads((tmp_path / 'config.json').read_text())
        assert held == json.loads(json.dumps(config))
        return
    with pytest.raises(UserError, match=f'holds another run: config.{key} is ') as e:
        hold(tmp_path, config)
    there = list(value) if isinstance(value, tuple) else value  # as JSON has it
    assert f'is {there!r} there and {section[name]!r} here' in str(e.value)
    assert (tmp_path / 'config.json').read_text() == before


@pytest.mark.parametrize(
    ('there', 'here'),
    [
        ({'depth': 3}, {'depth': 5}),
        ({'depth': 3}, {}),
        ({}, {'depth': 3}),
        ({'depth': 3}, {'depth': 3, 'width': 5}),
        ({'depth': 3, 'width': 5}, {'depth': 3}),
    ],
)
def test_another_model_is_refused(tmp_path, there, here):
    config = make_config()
    config['model']['kwargs'] = there
    start(tmp_path, config)
    config['model']['kwargs'] = here
    with pytest.raises(UserError, match=r'another run: config.model.kwargs'):
        hold(tmp_path, config)


def test_results_without_a_config_are_not_touched(tmp_path):
    (tmp_path / 'checkpoints' / '3').mkdir(parents=True)
    with pytest.raises(UserError, match=r'holds results but no config\.json'):
        hold(tmp_path, make_config())
    assert {path.name for path in tmp_path.iterdir()} == {'checkpoints', '.lock'}


def test_a_run_that_saved_nothing_can_be_started_anew(tmp_path):
    """It failed for want of data, say, and is mended by another config."""
    hold(tmp_path, make_config(seed=3))
    (tmp_path / 'checkpoints').mkdir()
    hold(tmp_path, make_config(seed=5))
    assert json.loads((tmp_path / 'config.json').read_text())['seed'] == 5


def test_a_damaged_config(tmp_path):
    start(tmp_path, make_config())
    text = (tmp_path / 'config.json').read_text()
    for damaged in (text[:50].encode(), b'', b'[]', b'"\xff"'):
        (tmp_path / 'config.json').write_bytes(damaged)
        with pytest.raises(UserError, match=r'config\.json is damaged'):
            hold(tmp_path, make_config())


def test_a_file_in_the_way(tmp_path):
    (tmp_path / 'file').touch()
    for path in (tmp_path / 'file', tmp_path / 'file' / 'run'):
        with pytest.raises(UserError, match=f'cannot write to workdir {path}: '):
            hold(path, make_config())


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, 'process_index', lambda: 1)
    hold(tmp_path, make_config())
    assert list(tmp_path.iterdir()) == []


def test_all_differences_are_told_and_can_be_allowed(tmp_path, caplog):
    start(tmp_path, make_config(seed=3, num_steps=5))
    config = make_config(seed=7, num_steps=11)
    differences = [
        'config.num_steps is 5 there and 11 here',
        'config.seed is 3 there and 7 here',
    ]
    with pytest.raises(UserError, match='; '.join(differences) + '.*--allow_changes'):
        hold(tmp_path, config)
    hold(tmp_path, config, allow_changes=True)
    assert [r.getMessage() for r in caplog.records] == [
        f'changed: {line}' for line in differences
    ]
    assert json.loads((tmp_path / 'config.json').read_text())['seed'] == 7


def test_a_config_of_an_older_version_had_the_defaults(tmp_path):
    config = make_config()
    start(tmp_path, config)
    older = json.loads((tmp_path / 'config.json').read_text())
    del older['nan_policy'], older['optim']['b1']
    (tmp_path / 'config.json').write_text(json.dumps(older))
    hold(tmp_path, config)
    (tmp_path / 'config.json').write_text(json.dumps(older))
    with pytest.raises(UserError, match=r'config\.optim\.b1 is 0\.9 there'):
        hold(tmp_path, make_config(**{'optim.b1': 0.8}))


def test_one_run_at_a_time(tmp_path):
    config = make_config()
    with (
        open_workdir(tmp_path, config),
        pytest.raises(UserError, match='another run uses'),
    ):
        hold(tmp_path, config)
    hold(tmp_path, config)


def test_the_folder_is_free_after_an_error(tmp_path):
    start(tmp_path, make_config(seed=3))
    with pytest.raises(UserError, match='holds another run'):
        hold(tmp_path, make_config(seed=5))
    with pytest.raises(ZeroDivisionError), open_workdir(tmp_path, make_config(seed=3)):
        raise ZeroDivisionError
    hold(tmp_path, make_config(seed=3))
