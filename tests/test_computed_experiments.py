"""Experiments that are computed, not trained: their numbers on cases done by hand."""

import functools
import operator
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from test_experiments import load_script

from vit_jax.errors import UserError
from vit_jax.experiment import Cell, load_experiment, read_lines
from vit_jax.results import status
from vit_jax.summary import count

HERE = pathlib.Path()
EXPERIMENTS = pathlib.Path(__file__).parents[1] / 'experiments'


@pytest.fixture(scope='module')
def psa():
    return load_script('psa_expresses_conv/sweep.py')


@pytest.fixture(scope='module')
def field():
    return load_script('receptive_field/sweep.py')


@pytest.fixture(scope='module')
def jacobians():
    return load_script('aggregate_transform/sweep.py')


@pytest.fixture(scope='module')
def encodings():
    return load_script('positional_encodings/computed.py')


@pytest.fixture(scope='module')
def table1():
    return load_script('convit_table1/sweep.py')


# --- psa_expresses_conv ---------------------------------------------------------


def test_the_convolution_equals_the_loop(psa):
    rng = np.random.default_rng(0)
    image, kernel = rng.normal(size=(4, 7, 2)), rng.normal(size=(3, 3, 2, 5))
    expected = np.zeros((4, 7, 5))
    for y, x, i, j in np.ndindex(4, 7, 3, 3):
        row, col = np.clip((y + i - 1, x + j - 1), 0, (3, 6))
        expected[y, x] += image[row, col] @ kernel[i, j]
    np.testing.assert_allclose(psa.convolve(image, kernel), expected, atol=1e-12)


@pytest.mark.parametrize('encoding', ['quadratic', 'table'])
def test_attention_becomes_the_convolution(psa, encoding):
    rng = np.random.default_rng(0)
    errors = psa.measure_error(encoding, 3, rng)['errors']
    relative = [errors[key]['inside']['relative'] for key in errors]
    assert relative[:6] == sorted(relative[:6], reverse=True)  # then float32 ends it
    assert relative[0] > 0.5
    assert errors['64']['inside']['max'] < 1e-4
    # Only the quadratic features say what a head does whose offset leaves the image.
    assert (errors['64']['everywhere']['relative'] < 1e-6) == (encoding == 'quadratic')


def shifts(psa, centres):
    """Heads that attend to one offset each, of which the last are outside."""
    rows, cols = psa.MODEL_GRID
    weights = np.zeros((len(centres), rows * cols, rows * cols))
    for head, (dx, dy) in enumerate(centres):
        for y, x in np.ndindex(rows, cols):
            row, col = np.clip((y + dy, x + dx), 0, (rows - 1, cols - 1))
            weights[head, y * cols + x, row * cols + col] = 1.0
    return weights


def test_attention_that_is_a_convolution_is_at_no_distance_from_it(psa):
    centres = psa.head_centres(9).astype(int)
    np.testing.assert_array_equal(centres[:4], [[-1, -1], [-1, 0], [-1, 1], [0, -1]])
    told = psa.describe_weights(shifts(psa, centres), centres)
    assert told == {'own': 1.0, 'distance': {'3': 0.0, '5': 0.0, '7': 0.0}}


def test_attention_to_all_tokens_alike_is_far_from_a_small_convolution(psa):
    tokens = np.prod(psa.MODEL_GRID)
    uniform = np.full((4, tokens, tokens), 1 / tokens)
    told = psa.describe_weights(uniform, psa.head_centres(4))
    assert told['own'] == pytest.approx(4 / tokens)  # between four tokens
    for size, distance in told['distance'].items():
        assert distance == pytest.approx((1 - int(size) ** 2 / tokens) ** 0.5)


def test_weights_that_change_from_place_to_place_are_no_convolution(psa):
    """Half of the queries look right, half left: each is as far from the mean."""
    right, left = shifts(psa, [(1, 0), (-1, 0)])
    mixed = np.where(np.arange(len(right))[:, None] % 2, right, left)[None]
    told = psa.describe_weights(mixed, np.array([[1, 0]]))
    assert told['own'] == pytest.approx(0.5)
    assert told['distance']['3'] == pytest.approx(0.5**0.5)


# --- receptive_field --------------------------------------------------------------


@pytest.mark.parametrize('distance', [1, 3, 7])
@pytest.mark.parametrize(
    'method', ['stacked', 'large', 'dilated', 'strided', 'windows']
)
def test_each_way_reaches_as_far_as_it_says(field, method, distance):
    line = field.measure(
        Cell('', None, {'method': method, 'distance': distance}), HERE, None
    )
    assert line['reach'] == distance == line['border'] - 1
    assert line['covered'] == 1.0
    assert 0 < line['rms_distance'] <= distance


def test_global_attention_reaches_the_border(field):
    cell = Cell('', None, {'method': 'global', 'distance': 7})
    line = field.measure(cell, HERE, None)
    assert (line['layers'], line['reach']) == (1, 8)
    width, positions = field.CHANNELS, 15**2
    assert line['params'] == 4 * (width**2 + width)
    products = 4 * width**2 + 2 * positions * width
    assert line['macs_per_position'] == products
    assert np.shape(line['gradient']) == (17, 17)


@pytest.mark.parametrize(
    ('method', 'layers', 'kernels'),
    [('stacked', 7, 7 * 9), ('large', 1, 15**2), ('dilated', 3, 3 * 9)],
)
def test_convolutions_cost_a_product_for_each_weight(field, method, layers, kernels):
    stack = field.make_stack(method, 7, channels=16)
    assert len(stack.layers) == layers
    assert count(stack, (15, 15, 16)) == (kernels * 16**2, kernels * 16**2 * 15**2)


def test_distances_are_to_the_further_axis(field):
    found = field.distances_from((3, 5), np.array([1, 2]))
    np.testing.assert_array_equal(
        found, [[2, 1, 1, 1, 2], [2, 1, 0, 1, 2], [2, 1, 1, 1, 2]]
    )


# --- aggregate_transform ----------------------------------------------------------


@pytest.mark.parametrize('terms', [1, 3])
def test_a_sum_of_kronecker_products_has_its_rank(jacobians, terms):
    rng = np.random.default_rng(0)
    positions, channels = rng.normal(size=(terms, 5, 7)), rng.normal(size=(terms, 2, 3))
    matrix = sum(map(np.kron, positions, channels))  # [5 * 2, 7 * 3]
    values = jacobians.kronecker_values(matrix.reshape(5, 2, 7, 3))
    assert len(values) == 6
    assert np.sum(values > 1e-12 * values[0]) == terms
    if terms == 1:
        norms = np.linalg.norm(positions) * np.linalg.norm(channels)
        assert values[0] == pytest.approx(norms)


def test_the_share_between_positions(jacobians):
    matrix = np.zeros((3, 2, 3, 2))
    matrix[0, :, 0] = matrix[2, :, 2] = 1.0
    assert jacobians.share_off_diagonal(matrix) == 0.0
    matrix[0, 1, 1, 0] = 2.0
    assert jacobians.share_off_diagonal(matrix) == pytest.approx(4 / 12)


def test_with_weights_held_attention_is_a_product_for_each_head(jacobians):
    """sum over heads of (weights) x (value map, then output map)."""
    layer = jacobians.LAYERS['attention/3'].module
    rngs = jax.random.split(jax.random.key(0))  # as `jacobian` draws
    x = jax.random.normal(rngs[0], (1, jacobians.POSITIONS, jacobians.WIDTH))
    variables = layer.init(rngs[1], x)
    _, state = layer.apply(variables, x, mutable='intermediates')
    (weights,) = state['intermediates']['attention_weights']
    value = variables['params']['value']['kernel']  # [D, N, H]
    out = variables['params']['out']['kernel']  # [N, H, D]
    expected = np.einsum('NTS,ENH,NHD->TDSE', weights[0], value, out)
    found = jacobians.jacobian('attention/3', 0)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize('name', ['conv/3x3', 'attention/6', 'mlp', 'attention/whole'])
def test_ranks_are_as_predicted(jacobians, name):
    line = jacobians.measure(Cell(name, None, {'layer': name}, seed=7), HERE, None)
    assert line['rank'] == jacobians.LAYERS[name].rank
    assert line['last'] > 100 * jacobians.TOLERANCE
    assert line['next'] < 0.01 * jacobians.TOLERANCE
    assert (line['between_positions'] == 0) == (name == 'mlp')


# --- positional_encodings ---------------------------------------------------------


def test_every_encoding_has_the_properties_that_it_is_said_to_have(encodings):
    for cell in encodings.cells():
        line = encodings.measure(cell)
        assert status([line['value']], cell.expected) == 'reproduced', cell.name


def test_numbers_of_encodings_by_hand(encodings):
    """Integers are 1 apart and largest at the end; digits 1 to the root of 12 apart."""
    assert encodings.largest_feature('integer') == encodings.LONG - 1
    here, there = 63 / encodings.SHORT, 63 / encodings.LONG
    assert encodings.dependence_on_length('normalized') == pytest.approx(here - there)
    digits = [bin(n ^ (n + 1)).count('1') ** 0.5 for n in range(encodings.LONG - 1)]
    digits += digits[: encodings.SHORT - 1]
    spread = (max(digits) - 1) / np.mean(digits)
    assert encodings.spread_of_steps('binary') == pytest.approx(spread)
    # What is best for i -> a i is wrong by the whole step at i = 0.
    assert encodings.miss_of_shift('integer') == pytest.approx(1.0, abs=1e-3)


def test_a_linear_shift_is_found(encodings):
    angle = 0.3
    rotation = np.array(
        [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    )
    code = [np.array([0.0, 2.0])]
    for _ in range(10):
        code.append(rotation @ code[-1])
    found = encodings.fit_shift(np.array(code), 3)
    np.testing.assert_allclose(found, np.linalg.matrix_power(rotation, 3), atol=1e-12)


# --- convit_table1 ----------------------------------------------------------------


@pytest.mark.parametrize('name', ['DeiT-Ti', 'ConViT-Ti'])
def test_what_is_no_product_of_tokens_is_a_product_for_each_weight(table1, name):
    model = table1.make(name)
    image = jnp.zeros((1, 224, 224, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), image)['params']
    expected = 0
    for (block, *path), leaf in flatten_dict(params).items():
        if path[-1] != 'kernel':
            continue
        late = name == 'DeiT-Ti' or block in ('block10', 'block11')
        tokens = 196 + late
        tokens = {'head': 1, 'patches': 196}.get(block, tokens)
        expected += tokens * leaf.size
    _, macs = count(model, (224, 224, 3))
    assert macs - table1.attention_macs(model) == expected


def test_parameters_without_the_classifier(table1):
    line = table1.measure_params('DeiT-Ti', None)
    assert line['params'] == 5_717_416
    assert line['value'] == 5.717416
    assert line['headless'] == pytest.approx(5.717416 - 0.193)


def test_operations_of_cells_that_train_nothing(table1):
    """Of 50,000 images, or 21 batches of each model in turns; counting takes none."""
    of_image = 2 * 1_253_683_200  # of DeiT-Ti, see `vit_jax.summary.count`
    other = 2 * count(table1.make('ConViT-Ti'), (224, 224, 3))[1]
    expected = {
        'params/DeiT-Ti': 0,
        'macs/DeiT-Ti': 0,
        'top1/DeiT-Ti': 50_000 * of_image,
        'speed/ConViT-Ti': 21 * 128 * (of_image + other),
    }
    cells = {cell.name: cell for cell in table1.sweep()}
    assert {name: table1.flops(cells[name]) for name in expected} == expected


def test_rounded_values_have_the_tolerance_of_their_rounding(table1):
    assert [table1.rounding(value) for value in (6, 27, 5.4)] == [0.5, 0.5, 0.05]
    weights = {name: table1.published_weights(name) for name in table1.ROWS}
    assert weights['ConViT-S'] == 'hf:timm/convit_small.fb_in1k'
    assert [name for name, address in weights.items() if address is None] == [
        f'{family}-{size}+'
        for size in ('Ti', 'S', 'B')
        for family in ('DeiT', 'ConViT')
    ]


def test_without_imagenet_accuracy_says_so_in_one_line(table1, tmp_path):
    cells = {cell.name: cell for cell in table1.sweep()}
    with pytest.raises(UserError, match="'imagenet2012' is not prepared at") as told:
        table1.measure(cells['top1/ConViT-S'], tmp_path, str(tmp_path))
    assert '\n' not in str(told.value)


def test_accuracy_is_that_of_the_command(table1, tmp_path, monkeypatch):
    class Prepared:
        def open(self, split):
            assert split == 'validation'

    def main(argv):
        seen.extend(argv)
        print('{"accuracy": 0.813, "examples": 50000}')

    seen = []
    monkeypatch.setattr(table1, 'load_dataset', lambda name, data_dir: Prepared())
    monkeypatch.setattr(table1.evaluate, 'main', main)
    line = table1.measure_top1('ConViT-S', '/data/tfds')
    assert line['accuracy'] == 0.813
    assert line['weights'] == 'hf:timm/convit_small.fb_in1k'
    assert '--weights=hf:timm/convit_small.fb_in1k' in seen
    assert '--config.model.name=ConViT-S/16' in seen
    assert '--config.dataset.data_dir=/data/tfds' in seen


def test_a_picture_of_the_zoo_has_what_was_counted(table1):
    lines = [
        {'cell': 'params/ConViT-S', 'seed': 0, 'value': 54.0, 'headless': 13.5},
        {
            'cell': 'speed/ConViT-B',
            'seed': 0,
            'images_per_second': {'ConViT-B': 3.0, 'DeiT-B': 4.0},
        },
    ]
    sizes, speeds = table1.draw(lines)['zoo.png'].axes
    drawn = [line.get_xydata().tolist() for line in sizes.lines]
    assert [[5, 2.0]] in drawn  # the sixth of the zoo, by 27
    assert [[5, 0.5]] in drawn
    assert [[4, 0.75]] in [line.get_xydata().tolist() for line in speeds.lines]


# --- Statuses ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ('name', 'cell', 'path'),
    [
        ('psa_expresses_conv', 'quadratic/5x5', ('errors', '64', 'everywhere', 'max')),
        ('psa_expresses_conv', 'table/3x3', ('errors', '64', 'inside', 'max')),
        ('aggregate_transform', 'attention/3', ('rank',)),
        ('receptive_field', 'dilated/15', ('reach',)),
        ('receptive_field', 'global/7', ('reach',)),
    ],
)
def test_one_value_that_is_off_differs(name, cell, path):
    folder = EXPERIMENTS / name
    experiment, lines = load_experiment(folder), read_lines(folder / 'results.jsonl')
    assert 'differs' not in experiment.render(lines)
    line = next(line for line in lines if line['cell'] == cell)
    *above, last = path
    functools.reduce(operator.getitem, above, line)[last] += 1
    assert experiment.render(lines).count('differs') == 1
