"""The trained half of the experiment on positions: its task, its layers, its tables."""

import importlib
import pathlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest

from vit_jax.experiment import build_cell, load_experiment
from vit_jax.summary import count_params

FOLDER = pathlib.Path(__file__).parents[1] / 'experiments' / 'positional_encodings'
EXPERIMENT = load_experiment(FOLDER)


@pytest.fixture(scope='module')
def unseen():
    return importlib.import_module('experiment_positional_encodings.unseen')


@pytest.fixture(scope='module')
def positions():
    return importlib.import_module('experiment_positional_encodings.positions')


@pytest.fixture
def small(unseen, monkeypatch):
    sizes = {'WIDTH': 8, 'DEPTH': 1, 'HEADS': 2, 'BATCH': 3, 'STEPS': 5, 'WARMUP': 2}
    tested = {'WATCHED': 3, 'TRAINED': (3, 5), 'LENGTHS': (3, 5, 7), 'SEQUENCES': 2}
    for name, value in {**sizes, **tested}.items():
        monkeypatch.setattr(unseen, name, value)
    return unseen


# --- unseen -----------------------------------------------------------------------


def test_a_position_has_the_code_of_its_own_sequence(unseen):
    codes = unseen.code_table('normalized', 7)
    assert codes.shape == (8, 7, unseen.WIDTH)
    expected = np.zeros((8, 7))
    for length in range(1, 8):
        for i in range(length):
            expected[length, i] = i / length
    np.testing.assert_allclose(codes[..., 0], expected, atol=1e-7)
    assert not codes[..., 1:].any()
    assert unseen.code_table('integer', 7)[5, :, 0].tolist() == [0, 1, 2, 3, 4, 0, 0]


def test_what_is_asked_for_stood_two_places_before(unseen):
    lengths = np.array([5, 2, 7])
    codes = unseen.code_table('integer', 7)
    batch = unseen.draw_batch(np.random.default_rng(0), lengths, codes)
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(batch['codes'][row], codes[length])
        for i in range(7):
            assert batch['keep'][row, i] == (i < length)
            assert batch['weight'][row, i] == (2 <= i < length)
            if i >= 2:
                assert batch['target'][row, i] == batch['symbols'][row, i - 2]


@pytest.mark.parametrize('norm_first', [False, True])
def test_padding_tells_nothing(small, norm_first):
    codes = small.code_table('sincos', 7)
    batch = small.draw_batch(np.random.default_rng(0), np.array([5, 5]), codes)
    arrays = [batch[name] for name in ('symbols', 'codes', 'keep')]
    model = small.Reader(norm_first)
    params = reference.random_params(model, *arrays)
    padded = reference.apply(model, params, *arrays)
    alone = reference.apply(model, params, *(array[:, :5] for array in arrays))
    assert padded.shape == (2, 7, small.SYMBOLS)
    reference.assert_close(padded[:, :5], alone, 1e-5)


def test_what_has_no_weight_does_not_count(unseen):
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(2, 5, 8)), rng.integers(8, size=(2, 5))
    target[0, 2], target[0, 3] = logits[0, 2].argmax(), logits[0, 3].argmin()
    weight = np.zeros((2, 5))
    weight[0, 2] = weight[0, 3] = weight[1, 3] = 1
    model = SimpleNamespace(apply=lambda variables, *inputs: jnp.asarray(logits))
    batch = dict.fromkeys(('symbols', 'codes', 'keep'))
    batch |= {'target': target, 'weight': weight}
    loss, hits = unseen.score({}, batch, model)
    losses = [
        np.log(np.exp(logits[place]).sum()) - logits[place][target[place]]
        for place in ((0, 2), (0, 3), (1, 3))
    ]
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-6)
    assert hits[0, 2]
    assert not hits[0, 3]
    assert hits.sum() == sum(
        logits[place].argmax() == target[place] for place in np.ndindex(2, 5)
    )


def test_the_first_steps_are_watched_and_every_length_is_tested(small):
    (cell,) = EXPERIMENT.cells('unseen/integer/after')[:1]
    line = small.measure(cell)
    assert len(line['grad_norms']) == 3
    assert line['grad_norm']['max'] == pytest.approx(max(line['grad_norms']), abs=1e-4)
    mean = np.mean(line['grad_norms'])
    assert line['grad_norm']['mean'] == pytest.approx(mean, abs=1e-4)
    assert list(line['right_by_length']) == ['3', '5', '7']
    # The first gradient, of the first batch, by other means.
    rng = np.random.default_rng([cell.seed, 0])
    codes = small.code_table('integer', 5)
    batch = small.draw_batch(rng, rng.integers(3, 6, size=3), codes)
    arrays = [batch[name] for name in ('symbols', 'codes', 'keep')]
    model = small.Reader(norm_first=False)
    params = model.init(jax.random.key(cell.seed), *arrays)['params']

    def loss_of(params):
        logs = jax.nn.log_softmax(model.apply({'params': params}, *arrays))
        logs = jnp.take_along_axis(logs, batch['target'][..., None], -1)[..., 0]
        return -(logs * batch['weight']).sum() / batch['weight'].sum()

    leaves = jax.tree.leaves(jax.grad(loss_of)(params))
    norm = sum(float((leaf**2).sum()) for leaf in leaves) ** 0.5
    assert line['grad_norms'][0] == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize('reach', [5, 7])
def test_right_guesses_are_told_by_length_and_by_place(small, reach):
    """Of a model that sees two places back, but only up to a place."""

    def apply(variables, symbols, codes, keep):
        guesses = jnp.roll(symbols, small.BACK, axis=1)
        wrong = (guesses + 1) % small.SYMBOLS
        guesses = jnp.where(jnp.arange(symbols.shape[1]) < reach, guesses, wrong)
        return jax.nn.one_hot(guesses, small.SYMBOLS)

    model = SimpleNamespace(apply=apply)
    told = small.test(model, {}, small.code_table('sincos', 7), seed=0)
    far = reach == 7
    assert told['right'] == {'seen': 100.0, 'near': 100.0, 'far': 100.0 * far}
    assert told['right_by_place'] == [100.0] * 3 + [100.0 * far] * 2
    assert told['right_by_length'] == {
        '3': 100.0,
        '5': 100.0,
        '7': pytest.approx(100.0 if far else 60.0),
    }


def make_line(cell, gradient, seen, longer, unseen):
    return {
        **cell.key,
        'grad_norm': {'mean': gradient / 2, 'max': gradient},
        'loss_after': 1.5,
        'right': {'seen': seen, 'near': longer, 'far': 20.0},
        'right_by_length': {str(n): seen for n in unseen.LENGTHS},
        'right_by_place': [longer] * (max(unseen.LENGTHS) - unseen.BACK),
        'grad_norms': [gradient, gradient / 4],
    }


def test_claims_are_those_of_the_article(unseen):
    lines = []
    for cell in EXPERIMENT.cells('unseen'):
        encoding, norm = cell.overrides['encoding'], cell.overrides['norm']
        gradient = 8.0 if (encoding, norm) == ('integer', 'after') else 2.0
        longer = 20.0 if encoding == 'normalized' else 60.0
        lines.append(make_line(cell, gradient + cell.seed, 80.0, longer, unseen))
    told = EXPERIMENT.render(lines)
    row = '| norms after the sums | integer | 4.50 ± 0.50 (3 seeds) | 9.00 ± 1.00'
    assert row in told
    claims = {
        parts[1]: [part.partition(':')[0] for part in parts[2:4]]
        for line in told.splitlines()
        if len(parts := [part.strip() for part in line.split('|')]) == 5
    }
    gradient = 'largest gradient: integers above sine and cosine pairs'
    assert claims[gradient] == ['supports', 'inconclusive']
    loss = 'loss after: integers above sine and cosine pairs'
    assert claims[loss] == ['inconclusive', 'inconclusive']
    fails = 'index / length: right at seen lengths above known places of longer ones'
    assert claims[fails] == ['supports', 'supports']
    better = 'known places of longer ones: sine and cosine pairs above index / length'
    assert claims[better] == ['supports', 'supports']
    axes = EXPERIMENT.draw(lines)['unseen.png'].axes
    steps = axes[0].lines[0].get_xydata()  # of integers, the mean of the seeds
    np.testing.assert_allclose(steps, [[0, 9], [1, 9 / 4]])
    by_length, by_place = (panel.lines[0].get_xydata() for panel in axes[1:3])
    assert by_length.tolist() == [[n, 80] for n in unseen.LENGTHS]
    assert by_place[0].tolist() == [2, 60]
    assert len(by_place) == 62
    assert 'unseen.png' not in EXPERIMENT.draw([])


# --- digits -----------------------------------------------------------------------


def test_a_place_is_a_row_and_a_column(positions):
    grid, x = (3, 5), np.zeros((2, 17, 7), np.float32)
    module = positions.LearnedAxes()
    params = reference.random_params(module, x, grid=grid)
    out = reference.apply(module, params, x, grid=grid)
    expected = np.zeros((17, 7))
    expected[:2] = params['prefix']
    for row, col in np.ndindex(grid):
        expected[2 + 5 * row + col, :3] = params['rows'][row]
        expected[2 + 5 * row + col, 3:] = params['columns'][col]
    reference.assert_close(out, np.stack([expected, expected]), 1e-6)


@pytest.mark.parametrize('mutable', [False, 'intermediates'])
def test_relative_attention_equals_the_loops(positions, mutable):
    heads, size, length = 3, 2, 5
    (x,) = reference.random_arrays(0, (2, length, heads * size))
    module = positions.RelativeAttention(heads)
    params = reference.random_params(module, x)
    out = reference.apply(module, params, x, mutable=mutable)
    weights = np.zeros((2, heads, length, length))
    expected = np.zeros(x.shape)
    p = reference.float64(params)
    query, key, value = (
        np.einsum('BTD,DNH->BTNH', x, p[name]['kernel']) + p[name]['bias']
        for name in ('query', 'key', 'value')
    )
    for b, n, i in np.ndindex(2, heads, length):
        logits = [
            query[b, i, n] @ (key[b, j, n] + p['offsets'][length - 1 + j - i])
            for j in range(length)
        ]
        exps = np.exp(np.array(logits) / size**0.5)
        weights[b, n, i] = exps / exps.sum()
        head = weights[b, n, i] @ value[b, :, n]
        expected[b, i] += head @ p['out']['kernel'][n]
    expected += p['out']['bias']
    if mutable:
        out, state = out
        (sown,) = state['intermediates']['attention_weights']
        reference.assert_close(sown, weights, 1e-5)
    reference.assert_close(out, expected, 1e-5)


def test_models_differ_in_their_positions_alone(tmp_path):
    """Parameters beside those without positions: 17 tokens, 4 rows, 4 layers."""
    sizes = {}
    for cell in EXPERIMENT.cells('digits'):
        if cell.seed == 0:
            run = build_cell(cell, data_dir=str(tmp_path))
            params = run.state_shape.variables['params']
            sizes[cell.name.removeprefix('digits/')] = count_params(params)
    without = sizes['none']
    more = {name: size - without for name, size in sizes.items() if size != without}
    assert more == {
        'learned1d': 17 * 64,
        'learned2d': 64 + (4 + 4) * 32,
        'relative': 4 * (2 * 17 - 1) * 16,
    }
    assert len(sizes) == 10


def test_the_published_ablation_in_small():
    """Of each seed, the least gain over none by how far the others are apart."""
    accuracies = {'none': 0.5, 'learned1d': 0.9, 'learned2d': 0.91, 'relative': 0.93}
    lines = [
        {**cell.key, 'accuracy': accuracies[name] + cell.seed / 1000}
        for cell in EXPERIMENT.cells('digits')
        if (name := cell.name.removeprefix('digits/')) in accuracies
    ]
    told = EXPERIMENT.render(lines)
    assert '| none | 50.1 ± 0.1 (3 seeds) |  |' in told
    assert '| 93.1 ± 0.1 (3 seeds) | supports: +43.0 (95% interval' in told
    assert '| integer | not run | not run |' in told
    assert 'from none | supports: +37.0' in told  # 40 less 3


def test_the_published_ablation_is_of_pairs():
    """Margins 9, 6 and 3: 6 -+ 4.303 * 3 / sqrt(3)."""
    accuracies = {
        'none': (0.5, 0.5, 0.5),
        'learned1d': (0.6, 0.58, 0.56),
        'learned2d': (0.61, 0.6, 0.59),
        'relative': (0.6, 0.59, 0.57),
    }
    lines = [
        {**cell.key, 'accuracy': accuracies[name][cell.seed]}
        for cell in EXPERIMENT.cells('digits')
        if (name := cell.name.removeprefix('digits/')) in accuracies
    ]
    told = 'from none | inconclusive: +6.0 (95% interval -1.5 to +13.5, 3 seeds)'
    assert told in EXPERIMENT.render(lines)
