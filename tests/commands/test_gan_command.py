"""A run of a GAN and the commands around it."""

import json

import pytest
from PIL import Image

from vit_jax.main import main

pytest_plugins = ['command_fixtures']

CONFIG = '--config=configs/digits_sagan.py:smoke'


@pytest.fixture(scope='module')
def gan(data_dir, tmp_path_factory):
    """The workdir of a GAN of three steps."""
    workdir = tmp_path_factory.mktemp('gan') / 'run'
    data = f'--config.dataset.data_dir={data_dir}'
    assert main(['train', CONFIG, data, f'--workdir={workdir}']) == 0
    return workdir


def test_a_trained_gan_is_evaluated_next(run, gan, digits, data_dir):
    data = f'--config.dataset.data_dir={data_dir}'
    code, out, _ = run('train', CONFIG, data, f'--workdir={gan}')
    assert code == 0
    assert out.splitlines()[-1] == f'next: vit_jax evaluate --workdir={gan}'
    judged = f'--config.gan.classifier={digits}', '--config.gan.num_samples=50'
    code, out, _ = run('evaluate', f'--workdir={gan}@ema', *judged)
    assert code == 0
    result = json.loads(out)
    assert result['frechet'] > 0
    for told in ('50 samples', f'in the features of {digits}'):
        assert told in result['signature']


@pytest.mark.parametrize('command', ['predict', 'attend'])
def test_a_gan_has_no_classes(fails, gan, tmp_path, command):
    Image.new('L', (8, 8)).save(tmp_path / 'a.png')
    options = [f'--out={tmp_path}/maps'] if command == 'attend' else []
    message = fails(command, f'--weights={gan}', f'{tmp_path}/a.png', *options)
    assert message == f'{gan} is of a model that makes images and knows no classes'
