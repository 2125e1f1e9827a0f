import json

import pytest
from command_lines import COLOUR

from vit_jax import benchmark
from vit_jax.benchmark import Measured, Pace, Training
from vit_jax.layers.psa import GPSA_IMPLS

pytest_plugins = ['command_fixtures']


def test_every_impl_runs(run):
    argv = ['--tokens=6', '--rounds=1', '--batch_size=3', '--heads=2', '--head_dim=5']
    code, out, err = run('benchmark', 'gpsa', *argv)
    assert (code, err) == (0, '')
    title, _, heading, columns, *rows = out.splitlines()
    assert title == 'GPSA, forward + backward, float32, cpu'
    assert heading == '6 tokens (2x3), batch 3, 2 heads of 5'
    assert columns.split() == ['ms', 'ratio', 'temporary']
    names = [row[:14].strip() for row in rows]
    assert names[:3] == ['plain xla', 'plain dense', 'plain chunked']
    assert names[3:] == [f'gpsa {impl}' for impl in GPSA_IMPLS]


def test_ratios_are_to_the_fastest_plain_impl(run, monkeypatch):
    """Here 2 ms and 1 MiB for the first function, and so much more for each next."""
    sizes = []

    def compare(functions, args, rounds):
        sizes.append((args[0].shape, args[0].dtype, rounds))
        return {
            name: Measured(0.002 * i, 2**20 * i)
            for i, name in enumerate(functions, start=1)
        }

    monkeypatch.setattr(benchmark, 'compare', compare)
    _, out, _ = run(
        'benchmark', 'gpsa', '--tokens=12,7', '--heads=2', '--dtype=bfloat16'
    )
    title, *tables = out.split('\n\n')
    assert title == 'GPSA, forward + backward, bfloat16, cpu'
    headings = [table.splitlines()[0] for table in tables]
    assert headings == [
        '12 tokens (3x4), batch 682, 2 heads of 48',
        '7 tokens (1x7), batch 1170, 2 heads of 48',
    ]
    assert sizes == [
        ((682, 12, 2, 48), 'bfloat16', 20),
        ((1170, 7, 2, 48), 'bfloat16', 20),
    ]
    for table in tables:
        for i, row in enumerate(table.splitlines()[2:], start=1):
            expected = [f'{2 * i:.2f}', f'{i:.2f}', f'{i}.0', 'MiB']
            assert row.split()[2:] == expected


def test_a_config_is_measured(run):
    """Batches of 16 on 8 devices."""
    code, out, err = run('benchmark', 'train', *COLOUR, '--steps=1', '--data', '--json')
    assert (code, err) == (0, '')
    values = json.loads(out)
    assert values['model'] == 'CNN'
    assert (values['devices'], values['batch_size'], values['steps']) == (8, 16, 1)
    for name in ('batch', 'data'):
        seconds = values[name]['step_seconds']
        assert values[name]['images_per_second'] == pytest.approx(16 / seconds)
    code, out, err = run('benchmark', 'train', *COLOUR, '--steps=1')
    assert (code, err) == (0, '')
    rows = out.splitlines()
    assert rows[0].startswith(
        'CNN, float32, 1 host(s), 8 cpu device(s), mesh of data 8'
    )
    assert rows[2].startswith('compiled in ')
    assert rows[3].startswith('memory of a device: ')
    assert [row[:9] for row in rows[5:]] == ['one batch']


def test_the_table_of_a_config(run, monkeypatch):
    asked = []

    def measure(run, steps, data):
        asked.append((steps, data))
        batch = Pace(0.05, (0.04, 0.075), 12345.6, 1543.2, 0.0, 0.4321)
        data = Pace(0.1, (0.09, 0.125), 6172.8, 771.6, 0.5, None)
        return Training(12.34, 3 * 2**29, batch, data)

    monkeypatch.setattr(benchmark, 'measure_training', measure)
    _, out, _ = run('benchmark', 'train', *COLOUR, '--data')
    assert asked == [(20, True)]
    *_, compiled, memory, columns, batch, data = out.splitlines()
    assert compiled == 'compiled in 12.3 s'
    assert memory == 'memory of a device: 1.500 GiB'
    words = 'ms/step quartiles images/s a device data wait of peak'
    assert columns.split() == words.split()
    words = 'one batch 50.00 40.00 to 75.00 12,346 1,543 0% 43.2%'
    assert batch.split() == words.split()
    words = 'its data 100.00 90.00 to 125.00 6,173 772 50% not known'
    assert data.split() == words.split()


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--config=/none.py'], 'no such config file: /none.py'),
        ([*COLOUR, '--config.batch_size=13'], 'config.batch_size 13 cannot be split'),
        (
            [*COLOUR, '--config.sede=1'],
            "unknown config key 'sede'; did you mean 'seed'",
        ),
        (
            [*COLOUR, '--config.dataset.name=cifar10', '--data'],
            "dataset 'cifar10' is not prepared at ",
        ),
    ],
)
def test_configs_that_cannot_be_measured(fails, monkeypatch, tmp_path, argv, message):
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
    assert fails('benchmark', 'train', *argv).startswith(message)
