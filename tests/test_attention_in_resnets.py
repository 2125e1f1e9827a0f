"""The experiment of attention in the stages of a ResNet: its cells, what is told."""

import functools
import json
import re

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from test_experiments import load_script

from vit_jax.experiment import build_cell
from vit_jax.results import status

# arXiv 1906.05909: the groups of layers that attend, and the accuracy on images held
# out of the training split.
PAPER = {
    (): 79.5,
    (1,): 79.7,
    (1, 2): 79.6,
    (1, 2, 3): 79.9,
    (1, 2, 3, 4): 80.2,
    (2, 3, 4): 80.7,
    (3, 4): 80.7,
    (4,): 80.2,
}


@pytest.fixture(scope='module')
def sweep():
    return load_script('attention_in_resnets/sweep.py')


@pytest.fixture(scope='module')
def shapes(sweep, tmp_path_factory):
    """Those of each cell's parameters, by path; of the data only digits are there."""
    data_dir = str(tmp_path_factory.mktemp('tfds'))
    cells = {cell.name: cell for cell in sweep.sweep()}

    @functools.cache
    def build(name):
        run = build_cell(cells[name], data_dir=data_dir)
        return flatten_dict(run.state_shape.variables['params'])

    return build


def stages_of(name):
    """Those that the name of a cell says attend: 'digits/local/2-4'."""
    split = name.rpartition('/')[2]
    if split == 'none':
        return ()
    first, last = int(split[0]), int(split[-1])
    return tuple(range(first, last + 1))


def test_the_splits_are_those_of_the_paper(sweep):
    assert dict(sweep.SPLITS.values()) == PAPER
    for split, (stages, _) in sweep.SPLITS.items():
        assert stages == stages_of(split)
    assert sweep.SPLITS[sweep.LATE][1] == max(PAPER.values())


def test_cells_are_as_many_as_told_and_differ(sweep):
    cells = list(sweep.sweep())
    keys = {(cell.name, cell.seed) for cell in cells}
    assert len(keys) == len(cells)
    runs = {(cell.config, str(cell.overrides), cell.seed) for cell in cells}
    assert len(runs) == len(cells)
    counts = {}
    for cell in cells:
        kind, *_ = cell.name.split('/')
        counts[kind] = counts.get(kind, 0) + 1
    assert counts == {
        'digits': 8 * 3,
        'params': 3,
        'flops': 3,
        'cifar10': (8 + 3 * 2) * 3,
        'imagenet': 8,
        'top1': 3,
    }


# What a block has that a convolution has not, in the place of the 3x3 one.
LAYERS = {
    'local': 'columns',
    'global': 'relative_position',
    'augmented': 'relative_position',
    'sagan': 'gamma',
}


@pytest.mark.parametrize(
    ('dataset', 'blocks'),
    [
        ('digits', (1, 1, 1, 1)),
        ('cifar10', (2, 2, 2, 2)),
        ('imagenet', (3, 4, 6, 3)),
    ],
)
def test_cells_build_and_attend_in_the_stages_that_they_name(
    sweep, shapes, dataset, blocks
):
    names = {c.name for c in sweep.sweep() if c.name.startswith(f'{dataset}/')}
    for name in names:
        paths = shapes(name)
        layer = LAYERS.get(name.split('/')[1])
        attending = {path[0] for path in paths if path[1:3] == ('conv2', layer)}
        convolving = {path[0] for path in paths if path[1:] == ('conv2', 'kernel')}
        stages = stages_of(name)
        expected = {
            f'stage{i}_block{j}'
            for i, count in enumerate(blocks, start=1)
            for j in range(1, count + 1)
        }
        assert attending == {block for block in expected if int(block[5]) in stages}
        assert convolving == expected - attending


def test_the_variants_of_the_config_are_those_of_the_paper(sweep, shapes):
    """The stem of convolution, then of attention."""
    attending, stems = {}, {}
    for variant in sweep.PUBLISHED:
        paths = shapes(f'top1/{variant}')
        layers = [path for path in paths if path[1:3] == ('conv2', 'columns')]
        attending[variant] = len(layers)
        stems[variant] = ('stem', 'value', 'mixtures') in paths
    assert attending == {'resnet50': 0, 'sasa_conv_stem': 16, 'sasa': 16}
    assert stems == {'resnet50': False, 'sasa_conv_stem': False, 'sasa': True}


def test_images_that_are_held_out_are_not_trained_on(sweep):
    (cell,) = (c for c in sweep.sweep() if c.name == 'imagenet/local/3-4')
    assert cell.overrides['dataset.train_split'] == 'train[:96%]'
    assert cell.overrides['dataset.eval_split'] == 'train[96%:]'
    images = cell.overrides['num_steps'] * 4096
    assert images / 1_281_167 == pytest.approx(130 * 0.96, rel=1e-4)


def expected_params(stages, width=8, kernel_size=3, classes=10):
    """Of the digits' ResNet, added up by hand: a bottleneck block a stage."""
    total, channels = 9 * width + 2 * width, width  # the stem and its norm
    for stage in (1, 2, 3, 4):
        w = width * 2 ** (stage - 1)
        attention = 3 * w * w + kernel_size * w  # two tables of half the channels
        total += channels * w + (attention if stage in stages else 9 * w * w)
        total += w * 4 * w + channels * 4 * w  # and the shortcut
        total += 2 * (w + w + 4 * w + 4 * w)  # norms
        channels = 4 * w
    return total + (channels + 1) * classes


def test_sizes_on_digits(sweep, shapes):
    """Of one width, as in the paper, whose sizes differ by 30%."""
    sizes = {}
    for split in sweep.SPLITS:
        name = sweep.name_cell('digits', split)
        sizes[stages_of(name)] = sum(leaf.size for leaf in shapes(name).values())
    assert sizes == {stages: expected_params(stages) for stages in PAPER}
    assert min(sizes.values()) == sizes[1, 2, 3, 4] > 0.75 * sizes[()]
    assert max(sizes.values()) == sizes[()]


@pytest.mark.parametrize(
    ('cell', 'value', 'said'),
    [
        ('params/resnet50', 25.557032, 'reproduced'),
        ('flops/resnet50', 8.178, 'reproduced'),
        ('params/sasa_conv_stem', 18.038632, 'reproduced'),
        ('flops/sasa', 6.833, 'differs'),  # of 7.2
    ],
)
def test_what_is_counted_of_the_published_models(sweep, cell, value, said, tmp_path):
    (found,) = (c for c in sweep.sweep() if c.name == cell)
    line = sweep.measure(found, tmp_path, None)
    assert line['value'] == pytest.approx(value, abs=1e-3)
    assert status([line['value']], found.expected) == said


def test_averaged_parameters_are_what_is_compared(sweep, tmp_path, monkeypatch):
    """As the paper's were, not those of the last step."""

    def train_cell(cell, workdir, data_dir):
        evaluations = [(1, 0.125), (2, 0.25)]
        with (workdir / 'metrics.jsonl').open('w') as file:
            for step, average in evaluations:
                more = {'eval/ema_accuracy': average} if averaged else {}
                metrics = {'step': step, 'eval/loss': 1.0, 'eval/accuracy': 0.5}
                file.write(json.dumps(metrics | more) + '\n')
        return {'accuracy': 0.5}

    monkeypatch.setattr(sweep, 'train_cell', train_cell)
    (cell,) = (c for c in sweep.sweep() if c.name == 'digits/none' and c.seed == 0)
    averaged = False
    line = sweep.measure(cell, tmp_path, str(tmp_path))
    assert 'value' not in line
    # 3x3 convolutions of the stem and of stage 1, on all 16x16 pixels, and more.
    assert line['macs'] > 256 * 9 * (8 + 8 * 8)
    averaged = True
    assert sweep.measure(cell, tmp_path, str(tmp_path))['value'] == 25.0


def make_lines(name, accuracies, params=97_578):
    return [
        {'cell': name, 'seed': i, 'accuracy': x, 'params': params, 'macs': 1_234_567}
        for i, x in enumerate(accuracies)
    ]


def test_late_attention_is_best_where_it_is_above_all_rivals(sweep):
    late = make_lines('digits/local/3-4', [0.98, 0.981, 0.982])
    lines = late + make_lines('digits/none', [0.95, 0.951, 0.952], params=129_858)
    assert sweep.answer(lines, 'digits') == 'not run'
    lines += make_lines('digits/local/1-2', [0.9, 0.901, 0.902])
    for alone, said in (
        ([0.94, 0.941, 0.942], 'supports'),
        ([0.979, 0.982, 0.983], 'inconclusive'),
        ([0.99, 0.991, 0.992], 'contradicts'),
        ([0.9], 'inconclusive'),
    ):
        more = make_lines('digits/local/1-4', alone)
        assert sweep.answer(lines + more, 'digits') == said
        claim = rf'best\*\*: above all three \| \*\*{said}\*\* \|'
        assert re.search(claim, sweep.render(lines + more))
    assert sweep.answer(lines + more, 'cifar10') == 'not run'


def test_the_table_says_what_each_split_costs_and_whether_late_is_above_it(sweep):
    lines = make_lines('digits/local/3-4', [0.98, 0.981, 0.982])
    lines += make_lines('digits/none', [0.95, 0.951, 0.952], params=129_858)
    lines += make_lines('cifar10/none', [0.9, 0.91, 0.92])
    lines += make_lines('cifar10/sagan/4', [0.8, 0.81, 0.82])
    lines += [{'cell': 'imagenet/local/3-4', 'seed': 0, 'accuracy': 0.1, 'value': 80.5}]
    told = sweep.render(lines).splitlines()
    row = next(line for line in told if line.startswith('| none |'))
    assert '129,858 | 1.23M | 95.1 ± 0.1 (3 seeds) | supports: +3.0 (95%' in row
    late = next(line for line in told if line.startswith('| 3-4 |'))
    assert late == '| 3-4 | 97,578 | 1.23M | 98.1 ± 0.1 (3 seeds) |  |'
    assert '| 1-2 | not run | not run | not run | not run |' in told
    sagan = next(line for line in told if line.startswith('| sagan | 4 |'))
    assert 'contradicts: -10.0' in sagan
    published = next(line for line in told if line.startswith('| imagenet/local/3-4 |'))
    assert '80.7 (arXiv 1906.05909' in published
    assert published.endswith('| 80.5 (1 seed) | reproduced |')
    top1 = next(line for line in told if line.startswith('| top1/sasa |'))
    assert top1.endswith('77.6 (arXiv 1906.05909, table 1) | not run | not run |')


def test_the_picture_has_a_row_of_squares_for_each_split(sweep):
    def read(figure):
        stages, *panels = figure.axes
        _, attention = stages.lines
        rows = np.asarray(attention.get_xydata(), int)
        return [tuple(rows[rows[:, 1] == i, 0].tolist()) for i in range(8)], panels

    lines = make_lines('digits/local/3-4', [0.98, 0.981, 0.982])
    squares, panels = read(sweep.draw(lines)['stages.png'])
    assert squares == list(PAPER)
    assert [axes.get_title() for axes in panels] == [
        'digits, here',
        'ImageNet, published',
    ]
    here, published = (axes.lines[-1].get_xydata() for axes in panels)
    np.testing.assert_allclose(here, [[98.1, 6]])
    assert published[:, 0].tolist() == list(PAPER.values())
    _, (published,) = read(sweep.draw([])['stages.png'])
    assert published.get_title() == 'ImageNet, published'
