import json

import pytest

from vit_jax.errors import UserError
from vit_jax.models import build_model
from vit_jax.pretrained import zoo
from vit_jax.pretrained.zoo import Weights
from vit_jax.summary import count, summarize, total

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


def test_models_of_sequences_are_not_summarised(fails):
    assert fails('summarize', '--model=Transformer-base') == (
        'a Transformer takes sequences of tokens, not images; choose a model of '
        'images, such as ViT-S/16'
    )
    with pytest.raises(UserError, match='sequences of tokens, not images'):
        count(build_model('Transformer-base', 7), (32, 48, 3))


ROWS = (
    Weights(
        'DeiT-Ti/16', 71.25, ('hf:a/b', 'https://c/d.pth'), 'ConViT', image_size=32
    ),
    Weights('CNN', None, ('hf:e/f',), num_classes=None, image_size=16),
)


@pytest.fixture
def small_zoo(monkeypatch):
    monkeypatch.setattr(zoo, 'ZOO', ROWS)
    monkeypatch.setattr(zoo, 'COMPARED', {'CNN': 'that of x 1.2'})


def test_zoo_as_json(run, small_zoo):
    code, out, err = run('summarize', '--zoo', '--json')
    assert (code, err) == (0, '')
    first, second = json.loads(out)
    cost = total(summarize(build_model('DeiT-Ti/16', 1000), (32, 32, 3)))
    assert first == {
        'model': 'DeiT-Ti/16',
        'image_size': 32,
        'num_classes': 1000,
        'params': cost.params,
        'macs': cost.macs,
        'top1': 71.25,
        'source': 'ConViT',
        'compared': None,
        'addresses': ['hf:a/b', 'https://c/d.pth'],
    }
    cost = total(summarize(build_model('CNN', None), (16, 16, 3)))
    assert (second['params'], second['macs']) == (cost.params, cost.macs)
    assert (second['num_classes'], second['top1']) == (None, None)
    assert second['compared'] == 'that of x 1.2'


def test_zoo_as_a_table(run, small_zoo):
    code, out, err = run('summarize', '--zoo')
    assert (code, err) == (0, '')
    header, line, first, second, empty, *notes = out.splitlines()
    assert header.split(' | ')[-1] == 'weights |'
    assert line == '| --- | --- | --- | --- | --- | --- | --- | --- |'
    params, macs = count(build_model('DeiT-Ti/16', 1000), (32, 32, 3))
    assert first == (
        f'| DeiT-Ti/16 | 32² | 1,000 | {params / 1e6:.4g}M | {macs / 1e6:.4g}M | '
        '71.25 (ConViT) | no | `hf:a/b`<br>`https://c/d.pth` |'
    )
    assert second.startswith('| CNN | 16² | features | ')
    assert second.endswith(' | – | that of x 1.2 | `hf:e/f` |')
    assert empty == ''
    assert 'ConViT: arXiv 2103.10697' in notes[0]


@pytest.mark.parametrize(
    ('name', 'size'),
    [('ConViT-Ti/16', 48), ('R26+ViT-S/32', 64), ('ResNet-18', 40), ('BiT-R50x1', 40)],
)
def test_the_zoo_counts_what_the_blocks_sum_up_to(name, size):
    model = build_model(name, 7)
    cost = total(summarize(model, (size, size, 3)))
    assert count(model, (size, size, 3)) == (cost.params, cost.macs)


@pytest.mark.parametrize(
    'option', ['--model=CNN', '--image_size=32', '--channels=1', '--num_classes=7']
)
def test_the_zoo_takes_no_model(fails, option):
    name = option.partition('=')[0]
    assert fails('summarize', '--zoo', option) == (
        f'--zoo takes no {name}: each row has its own'
    )
