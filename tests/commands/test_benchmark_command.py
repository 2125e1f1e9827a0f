from vit_jax import benchmark
from vit_jax.benchmark import Measured
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
