import json
import shutil
import sys

import pytest
from command_lines import DIGITS

from vit_jax.main import main

pytest_plugins = ['command_fixtures']


@pytest.fixture(scope='module')
def exported(digits, tmp_path_factory):
    """The digits' ConViT as a folder of its own."""
    folder = tmp_path_factory.mktemp('exported') / 'digits'
    assert main(['export', str(digits), str(folder)]) == 0
    return folder


def read_json(out):
    return [json.loads(line) for line in out.splitlines()]


def test_it_says_what_it_did(run, digits, tmp_path):
    code, out, err = run('export', digits, tmp_path / 'out')
    assert (code, out) == (0, '')
    first, last = err.splitlines()
    assert first.startswith(f'{digits} at step 3 ')
    assert ' leaves loaded' in first
    assert last == f'wrote {tmp_path}/out'


def test_predictions_are_the_same(run, digits, exported, make_image):
    images = [make_image(f'{i}.png', 8, 8, seed=i) for i in range(3)]
    here, there = (
        read_json(run('predict', f'--weights={weights}', '--json', *images).out)
        for weights in (digits, exported)
    )
    assert [line['image'] for line in there] == list(map(str, images))
    for ours, theirs in zip(here, there):
        for a, b in zip(ours['classes'], theirs['classes'], strict=True):
            assert a['class'] == b['class']
            assert a['probability'] == pytest.approx(b['probability'], abs=1e-6)


def test_every_command_that_takes_weights_takes_a_folder(
    run, digits, exported, make_image, data_dir, tmp_path
):
    image = make_image('grey.png', 8, 8)
    argv = [f'--weights={exported}', image, f'--out={tmp_path}/maps']
    assert run('attend', *argv).code == 0
    data = f'--config.dataset.data_dir={data_dir}'
    _, out, _ = run('evaluate', f'--workdir={digits}')
    _, again, _ = run('evaluate', *DIGITS, data, f'--weights={exported}')
    expected, found = json.loads(out), json.loads(again)
    assert expected.pop('step') == 3
    assert found == pytest.approx(expected)


FORK = """
from vit_jax.models.vit import ViT

class Net(ViT):
    pass
"""


def test_a_forks_model_runs_without_the_fork(run, tmp_path, monkeypatch, make_image):
    here = tmp_path / 'fork'
    here.mkdir()
    (here / 'fork_of_yesterday.py').write_text(FORK)
    workdir, folder = tmp_path / 'run', tmp_path / 'exported'
    small = {'patch_size': 2, 'width': 8, 'depth': 1, 'mlp_dim': 8, 'num_heads': 2}
    (tmp_path / 'recipe.py').write_text(
        'from vit_jax.config import default_config\n'
        'def get_config(variant=None):\n'
        '    config = default_config()\n'
        "    config.dataset.name = 'synthetic:size=6,num_classes=3,num_examples=16'\n"
        "    config.model.name = 'fork_of_yesterday:Net'\n"
        f'    config.model.kwargs = {small}\n'
        '    config.batch_size = 8\n'
        '    config.num_steps = 1\n'
        '    return config\n'
    )
    with monkeypatch.context() as patched:
        patched.syspath_prepend(str(here))
        recipe = f'--config={tmp_path}/recipe.py'
        assert run('train', recipe, f'--workdir={workdir}').code == 0
        assert run('export', workdir, folder).code == 0
        image = make_image('colour.png', 6, 6, 3)
        expected = run('predict', f'--weights={workdir}', image)
        assert expected.code == 0
    del sys.modules['fork_of_yesterday']
    shutil.rmtree(here)
    code, _, err = run('predict', f'--weights={workdir}', image)
    assert code == 1
    assert "No module named 'fork_of_yesterday'" in err
    assert run('predict', f'--weights={folder}', image) == expected


def test_folders_that_are_taken(fails, run, digits, exported, tmp_path, snapshot):
    before = snapshot(exported)
    expected = f'{exported} exists already; choose another, or pass --force'
    assert fails('export', digits, exported) == expected
    assert snapshot(exported) == before
    (tmp_path / 'ours').mkdir()
    (tmp_path / 'ours' / 'thesis.tex').write_text('')
    assert fails('export', digits, tmp_path / 'ours', '--force') == (
        f"{tmp_path}/ours holds 'thesis.tex', which is not ours to replace; take "
        'another folder'
    )
    (tmp_path / 'file').write_text('mine')
    message = fails('export', digits, tmp_path / 'file' / 'out')
    assert message == f'cannot write {tmp_path}/file/out: Not a directory'


def test_weights_that_cannot_be_exported(fails, digits, exported, tmp_path):
    out = tmp_path / 'out'
    assert fails('export', tmp_path / 'none', out) == (
        f'no such file or folder: {tmp_path}/none'
    )
    bare = tmp_path / 'bare.safetensors'
    shutil.copy(exported / 'model.safetensors', bare)
    message = fails('export', bare, out)
    assert message.startswith(f'{bare} does not say which model it is of; name the ')
    message = fails('export', digits, out, '--like=hf:no/such')
    assert message.startswith('--like=hf:no/such is no address of published weights')
    assert not out.exists()


def test_a_damaged_program(fails, exported, make_image, tmp_path):
    folder = shutil.copytree(exported, tmp_path / 'copy')
    (folder / 'program.bin').write_bytes(b'\0' * 100)
    message = fails('predict', f'--weights={folder}', make_image('grey.png', 8, 8))
    assert message.startswith(f'{folder}/program.bin is damaged or cut off (')
