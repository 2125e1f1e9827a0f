import json
import shutil

import pytest
from command_lines import COLOUR, DIGITS

from vit_jax.commands.evaluate import _take_facts, _take_preprocessing
from vit_jax.config import default_config, override

pytest_plugins = ['command_fixtures']


@pytest.fixture(scope='session')
def trained(digits):
    """What training wrote of its last evaluation."""
    lines = (digits / 'metrics.jsonl').read_text().splitlines()
    values = json.loads(lines[-1])
    return {k.removeprefix('eval/'): v for k, v in values.items() if k != 'step'}


def evaluate(run, *argv):
    code, out, err = run('evaluate', *argv)
    assert code == 0, err
    assert err == '' or '--weights=' in str(argv)
    assert out.count('\n') == 1
    return json.loads(out)


def test_a_workdir(run, digits, trained):
    about = {'dataset': 'digits', 'split': 'test', 'step': 3}
    metrics = evaluate(run, f'--workdir={digits}')
    assert metrics == {**about, **trained}
    assert metrics['examples'] == 359


def test_a_config_with_weights(run, digits, data_dir, trained):
    metrics = evaluate(
        run, *DIGITS, f'--weights={digits}', f'--config.dataset.data_dir={data_dir}'
    )
    assert {k: metrics[k] for k in trained} == trained


def test_images_of_another_size(run, digits, data_dir, trained):
    """Learned positions are resized, and said to be."""
    argv = ['--config.dataset.image_size=(8,12)', f'--weights={digits}']
    data = f'--config.dataset.data_dir={data_dir}'
    code, out, err = run('evaluate', *DIGITS, *argv, data)
    assert code == 0
    assert '1 resized (4x4 -> 4x6)' in err
    assert json.loads(out)['examples'] == 359


def test_a_model_with_other_fields_is_said(run, digits, data_dir):
    argv = ['--config.model.kwargs.activation=relu', f'--weights={digits}']
    data = f'--config.dataset.data_dir={data_dir}'
    code, _, err = run('evaluate', *DIGITS, *argv, data)
    assert code == 0
    assert "trained with activation='gelu', the model has 'relu'" in err
    assert "'activation': 'relu'" in err


def test_gelu_is_that_of_the_weights_unless_the_user_says_otherwise(capsys):
    config = override(default_config(), ['--config.model.name=ViT-Ti/16'])
    theirs = {'activation': 'gelu_tanh', 'layer_norm_eps': 1e-6}
    _take_facts(config, ['model.kwargs.activation'], theirs)
    assert config.model.kwargs.to_dict() == {}
    _take_facts(config, [], theirs)
    assert config.model.kwargs.to_dict() == {'activation': 'gelu_tanh'}
    assert 'activation=gelu_tanh, as the weights have it' in capsys.readouterr().err
    config = override(default_config(), ['--config.model.name=ResNet-18'])
    _take_facts(config, [], theirs)  # which has no such fields
    assert config.model.kwargs.to_dict() == {}


def test_pixels_are_seen_as_in_training_unless_the_user_says_otherwise(capsys):
    theirs = {
        'mean': [0.485, 0.456, 0.406],
        'std': [0.229, 0.224, 0.225],
        'crop_fraction': 0.9,
        'interpolation': 'bilinear',
    }
    config = default_config()
    _take_preprocessing(config, ['dataset.eval_crop'], theirs)
    assert config.dataset.normalize == 'imagenet'
    assert config.dataset.interpolation == 'bilinear'
    assert config.dataset.eval_crop == 1.0
    capsys.readouterr()
    _take_preprocessing(config, [], {**theirs, 'mean': [0.1], 'std': [0.2]})
    assert (config.dataset.normalize, config.dataset.eval_crop) == ('imagenet', 0.9)
    assert 'mean [0.1] and std [0.2]' in capsys.readouterr().err


@pytest.mark.parametrize('batch_size', [8, 360, 1000])
def test_any_batch_size_is_exact(run, digits, trained, batch_size):
    metrics = evaluate(
        run, f'--workdir={digits}', f'--config.eval.batch_size={batch_size}'
    )
    assert metrics['examples'] == 359
    assert {k: metrics[k] for k in trained} == pytest.approx(trained, rel=1e-5)


def test_another_split(run, digits):
    metrics = evaluate(run, f'--workdir={digits}', '--config.dataset.eval_split=train')
    assert (metrics['split'], metrics['examples']) == ('train', 1438)


def test_fields_that_are_tuples_come_back_from_the_checkpoint(run, colour):
    """A CNN's widths are a list in JSON."""
    metrics = evaluate(run, f'--workdir={colour}')
    assert metrics['examples'] == 20
    assert 'accuracy_top5' not in metrics
    assert evaluate(run, *COLOUR, f'--weights={colour}') == metrics


def test_the_newest_checkpoint_counts(run, fails, digits, tmp_path):
    shutil.copytree(digits, tmp_path / 'run')
    folder = tmp_path / 'run' / 'checkpoints'
    shutil.move(folder / '3', folder / '2')
    assert evaluate(run, f'--workdir={tmp_path}/run')['step'] == 2


def test_the_workdir_is_left_as_it_is(run, digits, snapshot):
    before = snapshot(digits)
    evaluate(run, f'--workdir={digits}')
    assert snapshot(digits) == before


# --- Probes ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        (['knn'], {'probe_k': 20, 'probe_temperature': 0.07}),
        (['knn', '--probe_k=3', '--probe_temperature=1'], {'probe_k': 3}),
        (['few_shot', '--shots=2', '--trials=3'], {'shots': 2, 'trials': 3}),
        (['linear', '--l2=0.1'], {'l2': 0.1, 'converged': True}),
    ],
)
def test_a_probe_of_a_workdir(run, digits, options, expected):
    probe, *options = options
    metrics = evaluate(run, f'--workdir={digits}', f'--probe={probe}', *options)
    about = {'dataset': 'digits', 'split': 'test', 'step': 3, 'probe': probe}
    about |= {'train_split': 'train', 'train_examples': 1438, 'width': 64}
    assert metrics.items() >= {**about, **expected, 'examples': 359}.items()
    assert 0.15 < metrics['accuracy'] < 1  # three steps teach little; chance is 0.1
    assert ('accuracy_sd' in metrics) == (probe == 'few_shot')
    if probe == 'few_shot':
        assert 0 < metrics['accuracy_sd'] < 0.2


def test_a_probe_is_of_any_classes(run, fails, digits):
    """Weights that know ten digits, and data of three classes."""
    argv = [
        *DIGITS,
        '--config.dataset.name=synthetic:size=8,channels=1,num_examples=30,num_classes=3',
        '--config.dataset.train_fraction=0.5',
        f'--weights={digits}',
    ]
    assert 'knows 10 classes' in fails('evaluate', *argv)
    metrics = evaluate(run, *argv, '--probe=knn', '--probe_k=5')
    assert (metrics['train_examples'], metrics['examples']) == (15, 30)
    message = fails('evaluate', *argv, '--probe=knn', late=True)
    assert message == 'k=20 neighbours are more than the 15 training examples'


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--probe_k=3'], '--probe_k is an option of --probe=knn'),
        (['--probe=knn', '--shots=3'], '--shots is an option of --probe=few_shot'),
        (['--probe=few_shot', '--l2=1'], '--l2 is an option of --probe=linear'),
    ],
)
def test_options_of_another_probe(fails, digits, options, message):
    assert fails('evaluate', f'--workdir={digits}', *options) == message


@pytest.mark.parametrize(
    ('option', 'told'),
    [
        ('--probe=nearest', "invalid choice: 'nearest'"),
        ('--probe_k=0', "a whole number above 0, not '0'"),
        ('--l2=-1', "a number above 0, not '-1'"),
    ],
)
def test_impossible_options(run, digits, option, told):
    code, out, err = run('evaluate', f'--workdir={digits}', option)
    assert (code, out) == (2, '')
    assert f'argument {option.partition("=")[0]}: {told}' in err
