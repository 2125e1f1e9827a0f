"""What the experiments on ConViT tell of their lines, on numbers made by hand."""

import pathlib

import pytest

from vit_jax.experiment import build_cell, load_experiment
from vit_jax.results import by_seed, verdict_of_pairs

EXPERIMENTS = pathlib.Path(__file__).parents[1] / 'experiments'


def load(name):
    return load_experiment(EXPERIMENTS / name)


def lines_of(cells):
    """Lines of {cell: {seed: what was measured}}."""
    return [
        {'cell': name, 'seed': seed, **line}
        for name, seeds in cells.items()
        for seed, line in seeds.items()
    ]


def cells_of(told, row):
    """Of the first row of a table that begins with that."""
    line = next(x for x in told.splitlines() if x.startswith(f'| {row} |'))
    return [cell.strip() for cell in line.strip('|').split('|')]


def test_pairs_are_compared_by_students_interval():
    """t is 12.706 at one degree of freedom, 4.303 at two, of any table."""
    assert verdict_of_pairs([1.0, 3.0], '.2f') == (
        'inconclusive: +2.00 (95% interval -10.71 to +14.71, 2 seeds)'
    )
    half = 4.303 * 2 / 3**0.5
    told = verdict_of_pairs([8, 10, 12], '.1f')
    assert told == (
        f'supports: +10.0 (95% interval +{10 - half:.1f} to +{10 + half:.1f}, 3 seeds)'
    )
    assert verdict_of_pairs([-8, -10, -12]).startswith('contradicts: -10.0')
    assert verdict_of_pairs([2.0, 2.0, 2.0]).startswith('supports: +2.0')


def test_seeds_are_told_apart():
    lines = lines_of({'a': {2: {'accuracy': 0.5}, 0: {'accuracy': 0.25}}, 'b': {}})
    assert by_seed(lines, 'a') == {0: 25.0, 2: 50.0}
    assert list(by_seed(lines, 'a')) == [0, 2]


def test_the_gap_grows_as_the_part_shrinks():
    """By seed: of seeds 1 and 3 one cell or another has not run."""
    lines = lines_of(
        {
            'digits/ConViT/5%': {s: {'accuracy': 0.6} for s in (0, 1, 2, 3)},
            'digits/ViT/5%': {s: {'accuracy': 0.5 - (s == 0) / 10} for s in (0, 2, 3)},
            'digits/ConViT/100%': {s: {'accuracy': 0.99} for s in (0, 1, 2)},
            'digits/ViT/100%': {s: {'accuracy': 0.9} for s in (0, 1, 2)},
        }
    )
    experiment = load('convit_table2')
    told = experiment.render(lines)
    # 50%, 20% and 20% on the part, 10% on all: they grow by 40 and 10 points.
    row = cells_of(told, 'ConViT')
    assert row[1:6] == ['+30%', 'not run', 'not run', 'not run', '+10%']
    half = 12.706 * 15  # of a mean of two, 15 from either
    assert f'+25.0 (95% interval {25 - half:+.1f} to {25 + half:+.1f}, 2' in row[6]
    assert list(experiment.draw(lines)) == ['digits.png']
    assert experiment.draw([]) == {}


@pytest.mark.parametrize('cell', ['', 'digits/e/10%', 'cifar10/e/100%', 'b/10%'])
def test_a_picture_of_ablations_has_what_has_run(cell):
    lines = lines_of({cell: {0: {'accuracy': 0.7}}} if cell else {})
    figure = load('convit_table3').draw(lines)['ablations.png']
    titles = [axes.get_title() for axes in figure.axes]
    data = {'digits': 'digits', 'cifar10': 'cifar10', 'b': 'ImageNet'}
    found = [f'{data[cell.split("/")[0]]}, here'] if cell else []
    assert titles == [*found, 'ImageNet, published']
    drawn = [x for line in figure.axes[0].lines for x in line.get_xdata()]
    assert (70.0 in drawn) == bool(cell)


def test_differences_are_asked_in_the_direction_of_the_paper():
    lines = lines_of(
        {
            'digits/f/10%': {s: {'accuracy': 0.8 + s / 100} for s in (0, 1, 2)},
            'digits/e/10%': {s: {'accuracy': 0.5 + s / 100} for s in (0, 1, 2)},
        }
    )
    told = load('convit_table3').render(lines).splitlines()
    rows = [line for line in told if 'frozen at the convolutional start' in line]
    full, tenth, *cifar10 = rows
    assert [row.endswith('| not run |') for row in cifar10] == [True, True]
    assert 'e above f | +0.5 | not run' in full
    assert 'f above e | +6.5 | supports: +30.0' in tenth


@pytest.mark.parametrize('data', ['digits', 'cifar10'])
def test_only_attention_differs_between_rows_d_and_e(data):
    """The kernels of DeiT start as those of ConViT do."""
    params = {}
    for row in 'de':
        cell = load('convit_table3').cells(f'{data}/{row}/100%')[0]
        params[row] = build_cell(cell).init().variables['params']
    for module in ('block00', 'block03'):
        d, e = (params[row][module]['mlp'] for row in 'de')
        for name in sorted(set(d) & set(e)):
            x, y = d[name]['kernel'], e[name]['kernel']
            assert x.shape == y.shape
            assert float(y.std()) == pytest.approx(float(x.std()), rel=0.05)


def gates_at(first, last, more=()):
    """Two heads; what lies between the ends is of no account."""
    steps = [*range(0, 2501, 100), *more]
    return {
        'gates': {
            str(step): [[0.6, 0.8], [0.5, 0.5], [0.6, 0.8]]
            if step < 2500
            else [[first - 0.1, first + 0.1], [0.5, 0.5], [last, last]]
            for step in sorted(steps)
        }
    }


def test_gates_are_told_from_the_first_step_to_the_last():
    """Also where one run was stopped, and has a checkpoint more than the others."""
    experiment = load('convit_gating')
    lines = lines_of(
        {
            'digits': {
                0: gates_at(0.7, 0.4, more=[150, 1234]),
                1: gates_at(0.6, 0.2),
                2: gates_at(0.8, 0.3),
            }
        }
    )
    told = experiment.render(lines)
    header = cells_of(told, 'digits, updates')
    assert header[1:] == ['0', '400', '800', '1,200', '1,700', '2,100', '2,500']
    assert cells_of(told, 'block02')[1::6] == ['0.700', '0.300']
    keeps = cells_of(told, 'the first layer keeps more than the last')[1]
    assert keeps.startswith('supports: +0.400 ')  # 0.3, 0.4 and 0.5
    assert cells_of(told, 'the last layer lets go')[1].startswith('supports: +0.400 ')
    assert list(experiment.draw(lines)) == ['digits.png']


def test_how_far_layers_look_is_compared_within_a_run():
    """Runs that begin far apart, and go as far."""
    starts = {0: 1.0, 1: 2.0, 2: 6.0}
    steps = {0: (0.5, 0.0, 0.2, 0.6), 1: (0.6, 0.0, 0.3, 0.5), 2: (0.4, 0.0, 0.1, 0.7)}
    lines = lines_of(
        {
            'digits/ConViT': {
                seed: {
                    'non_locality_of_heads': {
                        '0': [[start, start]] * 4,
                        '1200': [[9.0, 9.0]] * 4,
                        '2500': [[start, start + 2 * x] for x in steps[seed]],
                    },
                    'maps': {step: [[[[0.1] * 4] * 4] * 4] * 4 for step in ('0', '9')},
                }
                for seed, start in starts.items()
            }
        }
    )
    experiment = load('convit_nonlocality')
    told = experiment.render(lines)
    _, before, after, further = cells_of(told, 'block00')
    assert (before, after) == ('3.000', '3.500')
    assert further.startswith('supports: +0.500 ')
    assert cells_of(told, 'block01')[3].startswith('inconclusive: +0.000 ')
    half = 4.303 * 0.1 / 3**0.5
    least = cells_of(told, 'block01 looks least far')[3]
    assert least.startswith(f'inconclusive: +0.200 (95% interval {0.2 - half:+.3f} to ')
    heads, maps = 'digits_ConViT_heads.png', 'digits_ConViT_maps.png'
    assert list(experiment.draw(lines)) == ['digits.png', heads, maps]
    assert experiment.draw([]) == {}


@pytest.mark.parametrize('seeds', [(0, 1, 2), (0, 2)])
def test_locality_is_compared_by_seed(seeds):
    """Accuracy: 10 by seed, 2 by layer, log2 of the strength; one cell lacks a seed."""
    lines = lines_of(
        {
            f'digits/{layers}/{strength:g}': {
                seed: {'accuracy': (50 + 10 * seed + 2 * layers + power) / 100}
                for seed in (seeds if (layers, power) == (3, 1) else (0, 1, 2))
            }
            for layers in (1, 2, 3)
            for power, strength in zip((-2, -1, 0, 1), (0.25, 0.5, 1.0, 2.0))
        }
        | {'digits/0': {s: {'accuracy': (40 + 10 * s) / 100} for s in (0, 1, 2)}}
    )
    experiment = load('convit_locality')
    told, count = experiment.render(lines), len(seeds)
    row = cells_of(told, '1 above 0 layers, mean over strengths')
    assert row[1] == 'supports: +11.5 (95% interval +11.5 to +11.5, 3 seeds)'
    row = cells_of(told, '3 above 1 layers, mean over strengths')
    assert row[1] == f'supports: +4.0 (95% interval +4.0 to +4.0, {count} seeds)'
    row = cells_of(told, 'strength 2 above 0.25, mean over layers')
    assert row[1] == f'supports: +3.0 (95% interval +3.0 to +3.0, {count} seeds)'
    assert list(experiment.draw(lines)) == ['digits.png']
    assert experiment.draw([]) == {}
