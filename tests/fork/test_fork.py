"""What a fork adds by dotted path: data, a model, attention, a block, a task."""

import json
import pathlib

import pytest

from vit_jax.main import main

HERE = pathlib.Path(__file__).parent


@pytest.mark.parametrize('variant', ['model', 'layer', 'block', 'task'])
def test_what_a_fork_adds_trains_and_is_evaluated(
    variant, tmp_path, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(str(HERE))
    config = f'{HERE / "recipe.py"}:{variant}'
    assert main(['train', f'--config={config}', f'--workdir={tmp_path}']) == 0
    capsys.readouterr()
    assert main(['evaluate', f'--workdir={tmp_path}']) == 0
    result = json.loads(capsys.readouterr().out)
    assert result['examples'] == 24
    assert result['accuracy'] > 0.9
