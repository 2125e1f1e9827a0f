"""The experiment of distances: models of one size, what is counted, what is told."""

from functools import partial

import jax
import numpy as np
import numpy_reference as reference
import pytest
from test_experiments import load_script

from vit_jax.build import build
from vit_jax.config import load_config, override
from vit_jax.data.buckets import make_buckets
from vit_jax.data.text import load_text
from vit_jax.data.tokenizer import BOS, EOS
from vit_jax.errors import UserError
from vit_jax.experiment import Cell, Experiment, FinalTest, run_cell, train_cell
from vit_jax.reproduce import update_results
from vit_jax.summary import count_params

CONFIG = 'configs/long_range.py'
TOKENS = (np.ones((1, 5), int),) * 2


@pytest.fixture(scope='module')
def sweep():
    return load_script('long_range/sweep.py')


def build_run(variant, *overrides):
    arguments = [f'--config.{each}' for each in overrides]
    return build(override(load_config(f'{CONFIG}:{variant}'), arguments))


def test_models_are_of_one_size(sweep):
    """Within 5%."""
    runs = {
        model: build_run(model, 'dataset.name=recall:length=24')
        for model in sweep.MODELS
    }
    sizes = {
        model: count_params(run.state_shape.variables['params'])
        for model, run in runs.items()
    }
    assert sizes == {'transformer': 92_160, 'lstm': 94_720, 'lstm_plain': 91_200}
    assert max(sizes.values()) < 1.05 * min(sizes.values())


@pytest.mark.parametrize('name', ['copy:length=24', 'recall:length=24'])
def test_the_bucket_follows_from_the_dataset(name):
    run = build_run('lstm', f'dataset.name={name}')
    assert run.batch_shape['source'].shape[1] == 26
    assert run.metadata['text']['buckets'] == [26]


def test_a_bucket_that_follows_from_nothing_is_told():
    with pytest.raises(UserError, match=r"buckets is empty.*'dates' are is not known"):
        build_run('lstm', 'dataset.name=dates')


def test_cells_differ_and_see_no_example_twice(sweep):
    cells = list(sweep.sweep())
    assert len({cell.name for cell in cells}) == len(cells) == 3 * 2 * 4 * 3
    for cell in cells:
        dataset = load_text(cell.overrides['dataset.name'])
        tokens = cell.overrides['text.tokens_per_batch']
        (bucket,) = make_buckets((dataset.longest + 2,), tokens, multiple=1)
        seen = cell.overrides['num_steps'] * bucket.rows
        assert seen == dataset.splits['train']


@pytest.mark.parametrize(
    'name', ['copy:length=11,symbols=5', 'recall:length=13,pairs=3']
)
def test_answers_alone_are_counted(sweep, name):
    """A random model, against its logits of single examples."""
    options = ['dataset.eval_split=validation', 'text.score=none']
    run = build_run('smoke', f'dataset.name={name}', *options)
    variables = {'params': reference.random_params(run.model, *TOKENS, scale=0.5)}
    measured = sweep.measure(run, variables)
    pairs = run.dataset.open('validation')
    tokenizer = run.vocabulary.tokenizer
    apply = jax.jit(run.model.apply)
    hits = {}
    for source, target in zip(*pairs):
        read, (begin, *symbols) = tokenizer.encode([source, target])
        given = [BOS, begin, *symbols[:-1]]
        logits = apply(variables, np.array([[*read, EOS]]), np.array([given]))[0]
        hit = np.asarray(logits.argmax(-1)[1:]) == symbols
        if name.startswith('copy'):
            hits.setdefault('all', []).extend(hit)
            continue
        for i in (1, 3, 5):
            pair = chr(0x2801 + 10 * 'ABCDEFGH'.index(target[i - 1]) + int(target[i]))
            distance = 13 - source.index(pair)
            octave = next(n for n in ('1', '2', '4', '8', '16') if distance <= int(n))
            hits.setdefault(octave, []).append(hit[i])
    every = [hit for found in hits.values() for hit in found]
    assert measured['answers'] == pytest.approx(np.mean(every))
    assert 0 < measured['answers'] < 0.5
    if name.startswith('recall'):
        shares = {octave: np.mean(found) for octave, found in hits.items()}
        assert measured['by_distance'] == pytest.approx(shares)


def test_a_trained_model_is_measured_on_the_split_that_is_asked_for(
    sweep, tmp_path, monkeypatch
):
    seen = []

    def measure(run, variables):
        seen.append(run.metadata['eval_split'])
        return sweep.measure(run, variables)

    overrides = {'text.score': 'none', 'log.every_steps': 2}
    cell = Cell('smoke', f'{CONFIG}:smoke', overrides)
    train = partial(train_cell, tests={'test': FinalTest(measure)})
    experiment = Experiment(lambda: [cell], sweep.render, sweep.draw, train)
    line = run_cell(experiment, cell, tmp_path, None)
    update_results(experiment, tmp_path, tmp_path)
    assert seen == ['test']
    assert set(line['test']) == {'answers'}
    assert line['rates']['step_seconds'] > 0
    assert line['rates']['tokens_per_second'] > 0
    assert (tmp_path / 'picture.png').read_bytes().startswith(b'\x89PNG')
    assert 'not run' in (tmp_path / 'table.md').read_text()


def make_line(sweep, model, learning_rate, validation, answers):
    cell = sweep.make_cell('recall', 512, model, learning_rate)
    return {
        **cell.key,
        'accuracy': 0.5,
        'validation': {'answers': validation},
        'params': 94_720,
        'test': {'answers': answers, 'by_distance': {'4': 0.5, '512': 0.25}},
        'rates': {'tokens_per_second': 12345.6},
    }


def test_the_learning_rate_is_chosen_by_validation_and_told_by_test(sweep):
    lines = [
        make_line(sweep, 'lstm', 1e-3, validation=0.7, answers=0.9),
        make_line(sweep, 'lstm', 3e-3, validation=0.8, answers=0.6),
    ]
    assert sweep.choose(lines, 'recall', 512, 'lstm') is None  # one has not run
    lines.append(make_line(sweep, 'lstm', 1e-2, validation=0.75, answers=0.7))
    table = sweep.render(lines)
    assert '| recall | LSTM with attention | 94,720 |' in table
    assert '| 60.0 (0.003) |' in table
    assert '| LSTM with attention | not run | not run | 50.0 | not run |' in table
    axes = sweep.draw(lines)['picture.png'].axes
    assert axes[1].lines[1].get_xydata().tolist() == [[512, 60]]
    points = axes[2].lines[1].get_xydata().tolist()
    assert points == [[4, 50], [512, 25]]
