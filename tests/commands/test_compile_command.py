"""`vit_jax compile`: the table, the JSON, what does not fit, what is refused."""

import importlib.util
import json
import re

import pytest
from command_lines import CONFIGS

from vit_jax import topology

pytest_plugins = ['command_fixtures']

HAS_LIBTPU = importlib.util.find_spec('libtpu') is not None
needs_libtpu = pytest.mark.skipif(not HAS_LIBTPU, reason='needs libtpu')


@pytest.fixture
def mlp(tmp_path):
    """The command line of a recipe that is compiled in a second."""
    recipe = tmp_path / 'mlp.py'
    recipe.write_text(
        'from vit_jax.config import default_config\n'
        'def get_config():\n'
        '    config = default_config()\n'
        "    config.model.name = 'MLP'\n"
        "    config.model.kwargs = {'widths': (64,)}\n"
        "    config.dataset.name = 'synthetic:size=5,channels=3,num_classes=7'\n"
        '    config.batch_size = 16\n'
        '    config.num_steps = 3\n'
        '    return config\n'
    )
    return ['compile', f'--config={recipe}', '--quick']


@needs_libtpu
def test_table(run, mlp):
    code, out, err = run(*mlp, '--topology=v5e:2x4')
    assert (code, err) == (0, '')
    first, hosts, batch, *lines = out.splitlines()
    assert first == 'MLP, float32, on v5e:2x4: 8 chips'
    assert hosts.startswith('2 host(s), 8 TPU v5 lite device(s), mesh of data 8 x')
    assert batch == 'batch of 16 = 8 device(s) x 1 micro-batch(es) x 2 images'
    names = [line.split()[0] for line in lines]
    for name in ('parameters', 'optimizer', 'temporaries', 'program', 'total', 'fits:'):
        assert name in names, out
    assert re.search(r'fits: needs 0\.\d\d GiB of 15\.75 GiB', out)
    assert re.search(r'compute +\d+\.\d+ TFLOP, \d+\.\d ms at 197 TFLOP/s', out)
    assert re.search(
        r'images/s +at most [\d,]+ by compute, about [\d,]+ by memory\n', out
    )
    assert lines[-1].startswith('compiled with the least effort: jax 0.')


@needs_libtpu
def test_mesh_and_micro_batches_come_from_the_config(run, mlp):
    values = ['--config.parallel.fsdp=4', '--config.accum_steps=2']
    code, out, _ = run(*mlp, '--topology=v5e:2x4', *values)
    assert code == 0
    assert 'mesh of data 2 x fsdp 4 x tensor 1\n' in out
    assert '\nbatch of 16 = 8 device(s) x 2 micro-batch(es) x 1 images\n' in out


@needs_libtpu
def test_json_with_the_largest_batch(run, mlp, monkeypatch):
    # Less than the chip's: of large batches the compiler thinks for minutes.
    monkeypatch.setattr(topology, 'memory_limit', lambda device: 2**23)
    values = ['--config.batch_size=1024', '--json', '--max_batch']
    code, out, err = run(*mlp, '--topology=v5e:1x1', *values)
    assert (code, err) == (0, '')
    values = json.loads(out)
    assert values['topology'] == 'v5e:1x1'
    assert set(values['versions']) == {'jax', 'libtpu'}
    assert values['report']['device_kind'] == 'TPU v5 lite'
    assert values['report']['batch_size'] == 2**10
    assert values['report']['memory']['arguments']['batch'] == 2**10 * (75 + 4 + 4)
    largest = values['largest_batch']
    assert largest['batch_size'] > 2**10
    assert largest['memory']['fits']
    assert largest['memory']['total'] > 0.8 * largest['memory']['limit']


@needs_libtpu
def test_chips_of_two_devices(run, mlp):
    code, out, _ = run(*mlp, '--topology=tpu7x:2x2x1', '--json')
    report = json.loads(out)['report']
    assert code == 0
    assert (report['chips'], report['num_devices']) == (4, 8)


@needs_libtpu
def test_what_does_not_fit_is_a_table_and_code_1(run, mlp):
    values = ['--config.batch_size=16777216', '--config.model.kwargs.widths=(512,)']
    code, out, err = run(*mlp, '--topology=v5e:1x1', *values)
    assert (code, err) == (1, '')
    assert re.search(r'\n  does not fit: needs \d\d\.\d\d GiB of 15\.75 GiB\n', out)
    assert re.search(r'\n  parameters +\d', out)


@needs_libtpu
def test_imagenet_need_not_be_here(run, tmp_path):
    argv = [
        f'--config={CONFIGS}/imagenet_convit.py',
        f'--config.dataset.data_dir={tmp_path}',
        '--config.dataset.image_size=(32,32)',
        '--config.batch_size=16',
        '--config.model.kwargs.width=72',
        '--config.model.kwargs.depth=2',
        '--config.model.kwargs.mlp_dim=96',
        '--config.model.kwargs.num_local_layers=1',
    ]
    code, out, _ = run('compile', *argv, '--topology=v5e:2x4', '--quick')
    assert code == 0
    assert out.startswith('ConViT-S/16, bfloat16, on v5e:2x4: 8 chips\n')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('v9:2x2', "unknown TPU generation 'v9'"),
        ('v5e:3x3', "no v5e slice of up to 256 chips has the shape '3x3'; choose one"),
        ('v4:4x4', "no v4 slice of up to 256 chips has the shape '4x4'; choose one"),
    ],
)
def test_slices_that_there_are_not(fails, mlp, name, message):
    assert fails(*mlp, f'--topology={name}').startswith(message)


@pytest.mark.skipif(HAS_LIBTPU, reason='libtpu is installed')
def test_libtpu_is_asked_for(fails, mlp):
    message = "compiling for TPUs needs libtpu: pip install 'vit_jax[tpu]'"
    assert fails(*mlp, '--topology=v5e:2x2') == message


@needs_libtpu
def test_batches_that_the_slice_cannot_split(fails, mlp):
    message = fails(*mlp, '--topology=v5e:2x4', '--config.batch_size=12')
    assert message.startswith('config.batch_size 12 cannot be split over 8 device(s)')
