import json

import pytest

from vit_jax.models import build_model
from vit_jax.summary import summarize, total

pytest_plugins = ['command_fixtures']

MODEL = ['summarize', '--model=ConViT-Ti/16', '--image_size=32,48', '--num_classes=7']


@pytest.fixture(scope='module')
def costs():
    return summarize(build_model('ConViT-Ti/16', 7), (32, 48, 3))


def test_json(run, costs):
    code, out, err = run(*MODEL, '--json')
    assert (code, err) == (0, '')
    rows = json.loads(out)
    assert list(rows) == [*costs, 'total']
    for name, cost in costs.items():
        assert rows[name] == cost._asdict()
    for key in ('params', 'macs', 'activation_bytes'):
        assert rows['total'][key] == sum(rows[name][key] for name in costs)


def test_table(run, costs):
    code, out, err = run(*MODEL)
    assert (code, err) == (0, '')
    title, header, *rows = out.splitlines()
    assert title == 'ConViT-Ti/16 at 32x48x3, one image'
    assert header.split() == ['block', 'parameters', 'MACs', 'activations']
    assert [row.split()[0] for row in rows] == [*costs, 'total']
    for row, cost in zip(rows, [*costs.values(), total(costs)]):
        _, params, macs, memory, unit = row.split()
        assert int(params.replace(',', '')) == cost.params
        assert unit == 'MiB'
        assert float(memory) == pytest.approx(cost.activation_bytes / 2**20, abs=0.005)
        digits, suffix = macs.rstrip('kMGT'), macs[-1]
        factor = {'k': 1e3, 'M': 1e6, 'G': 1e9}.get(suffix, 1)
        assert float(digits) * factor == pytest.approx(cost.macs, rel=1e-3)


@pytest.mark.parametrize(
    ('argv', 'title'),
    [
        ([], 'CNN at 224x224x3, one image'),
        (['--image_size=8'], 'CNN at 8x8x3, one image'),
        (['--image_size=8,12', '--channels=1'], 'CNN at 8x12x1, one image'),
    ],
)
def test_sizes_of_images(run, argv, title):
    _, out, _ = run('summarize', '--model=CNN', *argv)
    assert out.splitlines()[0] == title
