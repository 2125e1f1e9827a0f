"""The experiment of SAGAN: its cells, what is measured, what is told and drawn."""

import dataclasses

import numpy as np
import pytest
from test_experiment import ROOT
from test_experiments import load_script

from vit_jax.build import build
from vit_jax.config import load_config
from vit_jax.experiment import Cell, load_experiment, run_cell
from vit_jax.reproduce import update_results
from vit_jax.summary import count_params


@pytest.fixture(scope='module')
def sweep():
    return load_script('sagan/sweep.py')


def test_cells_differ_by_attention_alone(sweep):
    cells = list(sweep.sweep())
    assert len({(cell.name, cell.seed) for cell in cells}) == len(cells) == 2 * 3 * 2
    for dataset in sweep.DATASETS:
        configs = {
            cell.name.partition('/')[2]: load_config(cell.config)
            for cell in cells
            if cell.name.startswith(f'{dataset}/')
        }
        with_it, without = (configs[name].to_dict() for name in ('attention', 'plain'))
        assert with_it['model']['kwargs'].pop('attention')
        assert not without['model']['kwargs'].pop('attention')
        assert with_it == without
        sizes = [
            count_params(build(config).state_shape.variables['params'])
            for config in configs.values()
        ]
        assert 1.0 < max(sizes) / min(sizes) < 1.02


def test_images_are_tiled_and_kept(sweep):
    pixels = np.random.default_rng(0).integers(0, 255, (36, 3, 5, 1)).astype(np.uint8)
    tiled = sweep.tile(pixels)
    assert tiled.shape == (6 * 4, 6 * 6, 1)
    np.testing.assert_array_equal(tiled[4:7, 12:17], pixels[6 + 2])
    found = sweep.decode(sweep.encode(tiled))
    np.testing.assert_allclose(255 * found[..., :3], tiled.repeat(3, axis=2), atol=1e-4)


def make_line(cell, seed, frechet, **fields):
    test = {
        'frechet': frechet,
        'frechet_of_few': frechet + 0.5,
        'floor': 0.25,
        'frechet_by_step': {'10': 9.0, '20': frechet},
        'gamma_by_step': {'generator': {'5': 0.1}, 'discriminator': {}},
    }
    line = {'cell': cell, 'seed': seed, 'test': test, 'params': 71_012, 'seconds': 90}
    return {**line, **fields}


def test_the_table_compares_plain_with_attention(sweep):
    lines = [make_line('digits/attention', seed, 2.0 + 0.1 * seed) for seed in (0, 1)]
    lines += [make_line('digits/plain', seed, 4.0 + 0.1 * seed) for seed in (0, 1)]
    table = sweep.render(lines).splitlines()
    row = (
        '| digits/attention | 71,012 | 2.05 ± 0.07 (2 seeds) | 2.55 ± 0.07 (2 seeds) |'
    )
    assert any(line.startswith(row) for line in table)
    assert any(line.startswith('| digits | supports: +2.00 ') for line in table)
    assert '| cifar10 | not run |' in table
    left, right = sweep.draw(lines)['digits_curves.png'].axes
    assert left.lines[0].get_xydata().tolist() == [[10, 9], [20, 2]]
    assert right.lines[0].get_xydata().tolist() == [[5, 0.1]]


@pytest.mark.slow
def test_a_cell_is_measured_and_drawn(tmp_path, monkeypatch):
    """On three steps, judged by a classifier of three steps that is trained first."""
    experiment = load_experiment(ROOT / 'experiments' / 'sagan')
    module = experiment.measure.__globals__
    config = 'configs/digits_cnn.py:smoke'
    monkeypatch.setitem(module['CLASSIFIERS'], 'digits', config)
    overrides = {'gan.num_samples': 100, 'log.every_steps': 1}
    cell = Cell('digits/attention', 'configs/digits_sagan.py:smoke', overrides)
    experiment = dataclasses.replace(experiment, sweep=lambda: [cell])
    line = run_cell(experiment, cell, tmp_path, None)
    assert line['overrides'] == overrides  # not where the classifier lies
    test = line['test']
    assert test['frechet'] > test['floor'] > 0
    assert (test['samples'], test['held_out']) == (100, 359)
    assert test['frechet'] == pytest.approx(test['frechet_by_step']['3'], rel=1e-4)
    for net in ('generator', 'discriminator'):
        assert list(test['gamma_by_step'][net]) == ['1', '2', '3']
        weights = np.array(line['pictures']['maps'][net])
        assert weights.shape == (3, 3, 8, 8)
        np.testing.assert_allclose(weights.sum(axis=(2, 3)), 1.0, atol=1e-3)
    update_results(experiment, tmp_path, tmp_path)
    pictures = {path.name for path in tmp_path.glob('*.png')}
    assert pictures == {f'digits_{x}.png' for x in ('curves', 'samples', 'maps')}
