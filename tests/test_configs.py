"""Every config: its real step traced, its smoke variant run."""

import pathlib
import re

import chex
import jax
import pytest
import tensorflow_datasets as tfds
import tensorflow_datasets.translate

from vit_jax.build import build
from vit_jax.config import flatten, load_config
from vit_jax.errors import UserError
from vit_jax.train import train

CONFIGS = sorted((pathlib.Path(__file__).parent.parent / 'configs').glob('*.py'))


@pytest.fixture(scope='module', autouse=True)
def data_dir(tmp_path_factory):
    """Digits are prepared once, out of the way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TFDS_DATA_DIR', str(tmp_path_factory.mktemp('tfds')))
        yield


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_the_real_step_traces_without_the_data(path):
    run = build(load_config(str(path)))
    before = run.state_shape
    after, metrics = jax.eval_shape(run.train_step, before, run.batch_shape)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    assert {'loss', 'accuracy'} <= set(metrics)
    params = jax.tree.leaves(before.variables['params'])
    assert all(x.dtype == 'float32' for x in params)


@pytest.mark.slow
@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_the_smoke_variant_trains(path, tmp_path):
    run = build(load_config(f'{path}:smoke'))
    result = train(run, tmp_path)
    assert run.num_steps == 3
    assert result['examples'] in (64, 359)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_a_config_opens_with_its_card(path):
    card = load_card(path)
    for word in ('data', 'model', 'recipe'):
        assert re.search(rf'^{word} ', card, re.MULTILINE)
    assert f'--config=configs/{path.name}' in card


def load_card(path):
    return path.read_text().split('"""')[1]


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_an_unknown_variant_is_refused(path):
    with pytest.raises(UserError, match='smoke'):
        load_config(f'{path}:smok')


# "Training data-efficient image transformers", arXiv 2012.12877, table 9, column
# DeiT-B; ConViT (arXiv 2103.10697, appendix) takes them over. What the table does not
# say (floor, erasing and mixing as they are called, average, batch of ConViT: 8 x 64)
# is in the defaults of main.py of github.com/facebookresearch/{deit,convit}.
PAPER = {
    'num_epochs': 300.0,
    'optim.name': 'adamw',
    'optim.schedule': 'cosine',
    'optim.end_learning_rate': 1e-5,
    'optim.weight_decay': 0.05,
    'optim.b1': 0.9,
    'optim.b2': 0.999,
    'optim.label_smoothing': 0.1,
    'optim.clip_norm': None,
    'model.kwargs.drop_path_rate': 0.1,
    'augment.repeats': 3,
    'augment.randaugment': 'rand-m9-mstd0.5-inc1',
    'augment.mixup': 0.8,
    'augment.cutmix': 1.0,
    'augment.mix_prob': 1.0,
    'augment.mix_switch_prob': 0.5,
    'augment.mix_mode': 'batch',
    'augment.erasing': 0.25,
    'augment.crop': 'resized',
    'augment.min_scale': 0.08,
    'augment.flip': True,
    'dataset.interpolation': 'bicubic',
    'dataset.image_size': (224, 224),
    'dataset.eval_crop': 224 / 256,
}
PAPERS = {
    'imagenet_deit': {
        'model.name': 'DeiT-S/16',
        'batch_size': 1024,
        'optim.learning_rate': 5e-4 * 1024 / 512,
        'optim.warmup_steps': 6256,  # 5 x 1,281,167 / 1024
        'optim.ema_decay': 0.99996,
    },
    'imagenet_convit': {
        'model.name': 'ConViT-S/16',
        'batch_size': 512,
        'optim.learning_rate': 5e-4,
        'optim.warmup_steps': 12511,  # 5 x 1,281,167 / 512
        'optim.ema_decay': None,
    },
}


@pytest.mark.parametrize('name', PAPERS)
def test_recipes_of_papers_have_their_numbers(name):
    (path,) = (path for path in CONFIGS if path.stem == name)
    config = dict(flatten(load_config(str(path))))
    expected = PAPER | PAPERS[name]
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize('name', PAPERS)
def test_the_learning_rate_of_a_paper_ends_on_its_floor(name):
    (path,) = (path for path in CONFIGS if path.stem == name)
    run = build(load_config(str(path)))
    peak = PAPERS[name]['optim.learning_rate']
    warmup_steps = PAPERS[name]['optim.warmup_steps']
    rates = [run.schedule(step) for step in (0, warmup_steps, run.num_steps)]
    assert [float(rate) for rate in rates] == pytest.approx([0, peak, 1e-5])


@pytest.mark.parametrize(('name', 'width'), [('base', 512), ('big', 1024)])
def test_the_learning_rate_of_translation_is_that_of_the_formula(name, width):
    """Of arXiv 1706.03762, equation 3."""
    (path,) = (path for path in CONFIGS if path.stem == f'wmt14_transformer_{name}')
    run = build(load_config(str(path)))
    for step in (1, 37, 4000, 4001, 100_000):
        rate = width**-0.5 * min(step**-0.5, step * 4000**-1.5)
        assert float(run.schedule(step)) == pytest.approx(rate, rel=1e-4)


@pytest.mark.parametrize('name', ['base', 'big'])
def test_wmt14_is_read_as_tfds_prepares_it(name, tmp_path):
    """The config as it is, but for its sizes, on records of the real dataset's form."""
    with tfds.core.registered.skip_registration():

        class Wmt14Translate(tensorflow_datasets.translate.Wmt14Translate):
            def _split_generators(self, dl_manager):
                sizes = {'train': 7, 'validation': 3, 'test': 2}
                return {k: self._generate_examples(n) for k, n in sizes.items()}

            def _generate_examples(self, count):
                for i in range(count):
                    yield i, {'de': f'Satz {i} ist süß.', 'en': f'Line {i} is sweet.'}

    builder = Wmt14Translate(
        config='de-en', data_dir=tmp_path, file_format='array_record'
    )
    builder.download_and_prepare()

    (path,) = (path for path in CONFIGS if path.stem == f'wmt14_transformer_{name}')
    config = load_config(str(path))
    config.dataset.data_dir = str(tmp_path)
    with config.unlocked():
        config.model.kwargs = {'width': 16, 'depth': 1, 'mlp_dim': 24, 'num_heads': 2}
    config.text.vocab_size = 48
    config.text.buckets = (24, 48)
    config.text.tokens_per_batch = 192
    config.num_steps = config.optim.warmup_steps = 2
    run = build(config)
    assert run.dataset.splits == {'train': 7, 'validation': 3, 'test': 2}
    result = train(run, tmp_path / 'run')
    assert result['examples'] == 3
    assert {'bleu', 'average_bleu'} <= set(result)
    assert run.score.pairs().source[0].startswith('Line ')
