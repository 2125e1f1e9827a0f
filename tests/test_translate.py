"""Translation: the task, its data and scores, over devices and interruptions."""

import dataclasses
import itertools
import math
import shutil
import sys
from contextlib import closing
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sacrebleu.metrics import BLEU

import vit_jax.sharding
from vit_jax import translation
from vit_jax.build import build
from vit_jax.checkpoint import Checkpoints
from vit_jax.config import default_config
from vit_jax.data.buckets import make_buckets
from vit_jax.data.text import load_text
from vit_jax.data.tokenizer import BOS, EOS, PAD, train_tokenizer
from vit_jax.data.vocabulary import FILE
from vit_jax.decode import beam_search
from vit_jax.errors import UserError
from vit_jax.evaluate import evaluate
from vit_jax.pretrained import load_variables
from vit_jax.tasks.translate import shift_right, token_metrics
from vit_jax.train import train
from vit_jax.translation import Decoding, decode_batch
from vit_jax.writer import read_metrics

TRANSFORMER = {'width': 16, 'depth': 1, 'mlp_dim': 24, 'num_heads': 2}
LSTM = {'width': 12, 'depth': 1}


def make_config(**values):
    """Dates, in two buckets; everything random is on."""
    config = default_config('translate')
    config.model.name = 'Transformer-tiny'
    config.model.kwargs = {**TRANSFORMER, 'dropout_rate': 0.2}
    config.dataset.name = 'dates:num_examples=200'
    config.text.tokenizer = 'char'
    config.text.vocab_size = 100
    config.text.buckets = (24, 40)
    config.text.tokens_per_batch = 16 * 40
    config.text.extra_length = 0
    config.text.score = 'exact_match'
    config.num_steps = 5
    config.optim.label_smoothing = 0.1
    config.optim.ema_decay = 0.9
    config.log.tensorboard = False
    for key, value in values.items():
        config.update_from_flattened_dict({key: value})
    return config


def small_eval(config):
    """The same, evaluated on the 200 pairs that it trains on."""
    config.dataset.eval_split = 'train'
    return config


# --- Steps --------------------------------------------------------------------


def test_the_decoder_is_given_what_comes_before():
    target = jnp.array([[7, 8, 9, EOS, PAD], [EOS, PAD, PAD, PAD, PAD]])
    assert shift_right(target).tolist() == [[BOS, 7, 8, 9, EOS], [BOS, EOS, 0, 0, 0]]


def test_metrics_of_tokens_by_hand():
    """Of five places three are tokens, two of which are hit; a row is padding."""
    target = np.array([[4, 3, PAD], [EOS, PAD, PAD], [PAD, PAD, PAD]])
    logits = np.zeros((3, 3, 5))
    logits[0, 0, 4] = logits[0, 1, 2] = logits[1, 0, EOS] = 1.0
    losses = np.arange(9.0).reshape(3, 3)
    found = token_metrics(jnp.asarray(logits), jnp.asarray(target), losses)
    assert jax.tree.map(float, found) == {
        'loss': (0.0 + 1.0 + 3.0, 3.0),
        'accuracy': (2.0, 3.0),
        'examples': (2.0, 2.0),
    }


def losses_and_evaluation(num_devices, mode, **mesh):
    """Of some steps on the first devices."""
    # One bucket, for each shape is a program of its own; of 15 examples, which eight
    # devices cannot share.
    values = {'text.buckets': (40,), 'text.tokens_per_batch': 15 * 40}
    values |= {f'parallel.{axis}': size for axis, size in mesh.items()}
    devices = jax.devices()[:num_devices]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, 'devices', lambda: devices)
        config = make_config(accum_steps=2, **values, **{'parallel.mode': mode})
        run = build(small_eval(config))
    parallel = run.parallel
    assert len(parallel.devices) == num_devices
    state = parallel.init(run.init)
    step = parallel.train_step(run.train_step, run.state_shape)
    losses = []
    with closing(run.train_data(0)) as data:
        for batch in itertools.islice(parallel.prefetch(data), 4):
            state, metrics = step(state, batch)
            total, weight = metrics['loss']
            losses.append(float(total / weight))
    ids = run.vocabulary.tokenizer.encode(run.score.pairs().source)
    decode = run.score.translator.decode_sources
    tokens = decode(state.variables, ids, run.score.buckets)
    return losses, evaluate(run, state.variables), tokens


@pytest.fixture(scope='module')
def on_one_device():
    return losses_and_evaluation(1, 'jit')


@pytest.mark.parametrize(
    ('mode', 'mesh'), [('jit', {}), ('pmap', {}), ('jit', {'fsdp': 2, 'tensor': 2})]
)
def test_eight_devices_give_the_losses_of_one(on_one_device, mode, mesh, monkeypatch):
    monkeypatch.setattr(vit_jax.sharding, 'MIN_SIZE', 2)  # so that all is sharded
    losses, found, tokens = losses_and_evaluation(8, mode, **mesh)
    expected_losses, expected, expected_tokens = on_one_device
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert found['examples'] == 200
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5)
    same = [(a == b).all() for a, b in zip(tokens, expected_tokens, strict=True)]
    assert len(same) == 200
    assert np.mean(same) > 0.98  # logits that are nearly equal may change places
    assert len({row.tobytes() for row in tokens}) > 1


def test_rows_of_padding_change_no_gradient():
    run = build(make_config(**{'model.kwargs.dropout_rate': 0.0, 'optim.name': 'sgd'}))
    state = run.init()
    with closing(run.train_data(0)) as data:
        batch = next(data)
    wider = {k: np.pad(x, ((0, 3), (0, 4))) for k, x in batch.items()}
    step = jax.jit(run.train_step)
    (after, metrics), (after_wider, others) = step(state, batch), step(state, wider)
    for name in ('loss', 'accuracy', 'grad_norm'):
        np.testing.assert_allclose(metrics[name], others[name], rtol=1e-5)
    for x, y in zip(*map(jax.tree.leaves, (after.variables, after_wider.variables))):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_micro_batches_weigh_by_their_tokens():
    """Of unequal numbers of tokens they give the update of the whole batch."""
    values = {'model.kwargs.dropout_rate': 0.0, 'optim.name': 'sgd'}
    states = []
    for accum_steps in (1, 2):
        run = build(make_config(accum_steps=accum_steps, **values))
        with closing(run.train_data(0)) as data:
            batch = next(data)
        batch['target'][::2, 5:] = PAD  # of every other row little is left
        states.append(jax.jit(run.train_step)(run.init(), batch))
    (one, metrics), (two, others) = states
    for name in ('loss', 'accuracy', 'grad_norm'):
        np.testing.assert_allclose(metrics[name], others[name], rtol=1e-5)
    for x, y in zip(*map(jax.tree.leaves, (one.variables, two.variables))):
        np.testing.assert_allclose(x, y, atol=1e-6)


# --- Runs ---------------------------------------------------------------------


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    """A run of six steps, with a checkpoint after three."""
    path = tmp_path_factory.mktemp('translate') / 'run'
    values = {'num_steps': 6, 'checkpoint.every_steps': 3, 'log.every_steps': 3}
    values |= {'eval.every_steps': 3, 'checkpoint.average': 2}
    run = build(small_eval(make_config(**values)))
    return run, path, train(run, path)


def test_a_run_tells_of_tokens(workdir):
    run, path, result = workdir
    assert result['perplexity'] == pytest.approx(math.exp(result['loss']))
    assert result['examples'] == 200
    lines = [line for line in read_metrics(path) if 'train/loss' in line]
    assert [line['step'] for line in lines] == [3, 6]
    assert any(line.get('train/tokens_per_second', 0) > 0 for line in lines)
    with closing(run.train_data(0)) as data:
        rows = [
            (batch['source'] != PAD).any(axis=1) for batch in itertools.islice(data, 6)
        ]
    assert lines[-1]['train/examples_seen'] == sum(map(np.sum, rows))
    with Checkpoints(path, read_only=True) as checkpoints:
        assert checkpoints.load_metadata(6)['signature'] is None  # no BLEU
    # One for each shape of a batch that has come up, of two.
    assert lines[0]['train/programs'] in (1, 2)


def test_averages_are_scored_too(workdir):
    run, path, result = workdir
    assert result['ema_perplexity'] != result['perplexity']
    run.vocabulary.load(path)
    for prefix, weights in (('ema_', '@ema'), ('average_', '@last:2')):
        variables, _ = load_variables(f'{path}{weights}', run.model, run.inputs)
        found = evaluate(run, variables)
        for name in ('loss', 'perplexity', 'exact_match'):
            assert result[prefix + name] == pytest.approx(found[name], rel=1e-6)


def test_a_run_goes_on_bit_for_bit(workdir, tmp_path):
    run, path, result = workdir
    again = tmp_path / 'again'
    shutil.copytree(path, again)
    shutil.rmtree(again / 'checkpoints' / '6')
    assert train(run, again) == result
    old, new = read_metrics(path), read_metrics(again)
    for a, b in zip(old, new, strict=True):
        for key in set(a) & set(b):
            if key.startswith('eval/') or key in ('train/loss', 'train/grad_norm'):
                assert a[key] == b[key], key


def test_the_tokenizer_is_that_of_the_run(workdir, tmp_path):
    _, path, _ = workdir
    again = tmp_path / 'again'
    shutil.copytree(path, again)
    (again / FILE).write_bytes(b'damaged')
    shutil.rmtree(again / 'checkpoints' / '6')
    run = build(small_eval(make_config(num_steps=6)))
    with pytest.raises(UserError, match='tokenizer of 7 bytes is damaged'):
        train(run, again, allow_changes=True)


def test_tokens_that_got_lost_are_not_learned_anew(workdir, tmp_path):
    run, path, _ = workdir
    again = tmp_path / 'again'
    shutil.copytree(path, again)
    (again / FILE).unlink()
    with pytest.raises(UserError, match=r'tokenizer\.model cannot be read: No such'):
        train(run, again)


def test_other_tokens_or_pairs_are_not_gone_on_with(workdir, tmp_path):
    _, path, _ = workdir
    again = tmp_path / 'again'
    shutil.copytree(path, again)
    values = {'num_steps': 6, 'checkpoint.every_steps': 3, 'text.buckets': (24, 40)}
    values['dataset.name'] = 'dates:num_examples=150'
    with pytest.raises(UserError, match='num_train_examples 200, now it is 150'):
        train(build(make_config(**values)), again, allow_changes=True)
    lines = load_text('dates:num_examples=150').open('train').source
    (again / FILE).write_bytes(train_tokenizer(lines, 100, 'char'))
    values['dataset.name'] = 'dates:num_examples=200'
    with pytest.raises(UserError, match='was begun with tokenizer '):
        train(build(make_config(**values)), again, allow_changes=True)


def test_who_starts_from_weights_has_their_tokens(workdir, tmp_path):
    _, path, _ = workdir
    values = {'init.weights': f'{path}@latest', 'optim.learning_rate': 0.0}
    values |= {'dataset.name': 'dates:num_examples=31', 'num_steps': 1}
    train(build(make_config(**values)), tmp_path / 'new')
    assert (tmp_path / 'new' / FILE).read_bytes() == (path / FILE).read_bytes()


def test_a_tokenizer_that_is_missing_or_of_another_run(workdir, tmp_path):
    run, path, _ = workdir
    with pytest.raises(UserError, match=r'tokenizer\.model cannot be read: No such'):
        run.vocabulary.load(tmp_path)
    other = build(make_config(**{'text.vocab_size': 9}))
    with pytest.raises(UserError, match=r'tokens, the config 9; it is of another run'):
        other.vocabulary.load(path)


# --- Decoding -----------------------------------------------------------------


@pytest.fixture(params=['Transformer-tiny', 'LSTM-tiny'])
def trained(request):
    """A model of random parameters, far from uniform, and sentences for it."""
    # Not tied, or all that it says is the same.
    kwargs = {**TRANSFORMER, 'tie_output': False}
    if request.param == 'LSTM-tiny':
        kwargs = LSTM
    config = make_config(**{'model.name': request.param, 'text.vocab_size': 61})
    with config.unlocked():
        config.model.kwargs = kwargs
    model = build(config).model
    rng = np.random.default_rng(0)
    source = rng.integers(4, 61, (5, 7)).astype(np.int32)
    for row, length in zip(source, (7, 2, 5, 4, 1)):
        row[length - 1 :] = PAD
        row[length - 1] = EOS
    shapes = jax.eval_shape(model.init, jax.random.key(0), source, source)
    draw = partial(rng.normal, 0.0, 0.7)
    variables = jax.tree.map(lambda x: jnp.asarray(draw(x.shape), jnp.float32), shapes)
    return model, variables, source


def test_greedy_decoding_is_the_likeliest_token_of_the_whole_pass(trained):
    model, variables, source = trained
    how = Decoding(beam=1, extra_length=4)
    found = jax.jit(partial(decode_batch, model=model, how=how))(variables, source)
    assert found.shape == (5, 11)
    given = np.full((5, 12), PAD, np.int32)
    given[:, 0] = BOS
    apply = jax.jit(model.apply)
    ended = np.zeros(5, bool)
    for t in range(11):
        logits = np.array(apply(variables, source, given)[:, t])
        logits[:, [PAD, BOS, 3]] = -np.inf
        token = np.where(ended, PAD, logits.argmax(axis=1))
        given[:, t + 1] = token
        ended |= token == EOS
    np.testing.assert_array_equal(found, given[:, 1:])
    assert len({tuple(row) for row in found.tolist()}) > 1


def test_beams_share_the_source(trained):
    """What is not moved with the hypotheses is the same for all of them."""
    model, variables, source = trained
    how = Decoding(beam=3, extra_length=4, length_penalty=0.6)
    found = jax.jit(partial(decode_batch, model=model, how=how))(variables, source)

    @jax.jit
    def score(tokens):
        logits = model.apply(variables, source, shift_right(tokens))
        log_probs = jax.nn.log_softmax(logits)
        each = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
        real = tokens != PAD
        penalty = ((5 + real.sum(axis=1)) / 6) ** 0.6
        return jnp.sum(each * real, axis=1) / penalty

    def step(tokens, prefix):  # without a cache: the whole prefix each time
        prefix, length = prefix['tokens'], prefix['length']
        prefix = prefix.at[:, length].set(tokens)
        rows = jnp.repeat(source, len(tokens) // 5, axis=0)
        logits = model.apply(variables, rows, prefix)[:, length]
        return logits, {'tokens': prefix, 'length': length + 1}

    empty = {'tokens': jnp.zeros((5, 12), jnp.int32), 'length': jnp.int32(0)}
    logits, cache = step(jnp.full(5, BOS), empty)
    tokens, scores = jax.jit(
        lambda logits, cache: beam_search(
            logits, cache, step, beam=3, max_length=11, eos=EOS, forbidden=(BOS, 3)
        )
    )(logits, cache)
    np.testing.assert_array_equal(found, tokens[:, 0])
    np.testing.assert_allclose(score(found), scores[:, 0], rtol=1e-4)


def test_translations_keep_their_order(workdir, caplog):
    run, path, _ = workdir
    run.vocabulary.load(path)
    tokenizer = run.vocabulary.tokenizer
    translator = run.score.translator
    variables = run.init().variables
    shapes = make_buckets((13, 30), tokens=8 * 30, multiple=8)
    lines = [
        '3 May 1998',
        '',
        'Tuesday, 3rd of March 1998',
        '1.2.2003',
        ' ',
        'May' * 20,
    ]
    found = translator.translate(variables, lines, tokenizer, shapes, first=11)
    assert [bool(text) for text in found[1:5:3]] == [False, False]
    for i in (0, 2, 3):
        alone = translator.translate(variables, [lines[i]], tokenizer, shapes)
        assert alone == [found[i]]
    assert caplog.messages == [
        'line 16 has 61 tokens; what follows the first 29 is left out'
    ]


def test_few_lines_are_few_rows(workdir, monkeypatch):
    run, path, _ = workdir
    run.vocabulary.load(path)
    variables, translator = run.init().variables, run.score.translator
    shapes = []
    decode = translation.decode_batch

    def watched(variables, source, **options):
        shapes.append(source.shape)
        return decode(variables, source, **options)

    monkeypatch.setattr(translation, 'decode_batch', watched)
    tokenizer = run.vocabulary.tokenizer
    # A translator of its own, which has compiled nothing.
    translator = dataclasses.replace(translator)
    lines = ['3 May 1998'] * 3
    translator.translate(variables, lines, tokenizer, make_buckets((13, 30), 3900, 1))
    assert shapes == [(8, 13)]  # four, on eight devices


# --- Scores -------------------------------------------------------------------


def test_bleu_is_that_of_sacrebleu():
    run = build(small_eval(make_config(**{'text.score': 'bleu'})))
    variables = run.init().variables
    sources, references = load_text('dates:num_examples=200').open('train')
    tokenizer = run.vocabulary.tokenizer
    texts = run.score.translator.translate(
        variables, sources, tokenizer, run.score.buckets
    )
    found = run.score(variables, {'loss': 2.0})
    assert found['bleu'] == BLEU().corpus_score(texts, [references]).score
    assert found['perplexity'] == pytest.approx(math.exp(2.0))
    assert run.score.names == ('perplexity', 'bleu', 'bleu_lower_case')
    assert 'tok:13a' in run.score.signature


def test_what_counts_is_stored_and_missed_before_training(tmp_path, monkeypatch):
    run = build(make_config(**{'text.score': 'bleu', 'num_steps': 1}))
    monkeypatch.setattr(type(run.score), '__call__', lambda *_: {'bleu': 0.0})
    monkeypatch.setitem(sys.modules, 'sacrebleu.metrics', None)
    with pytest.raises(UserError, match='BLEU needs sacrebleu: install the extra'):
        train(run, tmp_path)
    assert not (tmp_path / 'metrics.jsonl').exists()
    monkeypatch.delitem(sys.modules, 'sacrebleu.metrics')
    train(run, tmp_path)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert 'tok:13a' in checkpoints.load_metadata(1)['signature']


# --- Mistakes -----------------------------------------------------------------


class Uncached(nn.Module):
    num_classes: int
    dtype: type = jnp.float32

    def encode(self, source):
        raise AssertionError

    decode = encode


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'text.score': 'blue'}, "unknown text.score 'blue'; did you mean 'bleu'"),
        ({'text.tokens_per_batch': 39}, 'tokens_per_batch 39 has no room for 40'),
        ({'text.extra_length': 300}, 'may have 340 tokens .* holds 256'),
        ({'dataset.placement': 'device'}, 'placement is set to .* does not read it'),
        ({'text.buckets': (16, 8)}, 'config.text.buckets must be ascending'),
        ({'num_steps': None, 'num_epochs': 3.0}, 'set config.num_steps: steps of text'),
        ({'dataset.image_size': (8, 8)}, 'image_size is set to .* does not read it'),
        ({'dataset.name': 'digits'}, 'digits'),
        ({'model.name': 'ViT-Ti/16', 'model.kwargs': {}}, 'a ViT cannot encode'),
        (
            {'model.name': f'{__name__}:Uncached', 'model.kwargs': {}},
            'a Uncached needs a field cache_length',
        ),
        ({'text.length_penalty': -1.0}, 'length_penalty must be from 0 to 10'),
        ({'text.length_penalty': 11.0}, 'length_penalty must be from 0 to 10'),
        ({'checkpoint.keep_best': 'blue'}, 'unknown metric in checkpoint.keep_best'),
    ],
)
def test_mistakes_are_told(values, message):
    config = make_config()
    if 'model.kwargs' in values:
        with config.unlocked():
            config.model.kwargs = values.pop('model.kwargs')
    config.update_from_flattened_dict(values)
    with pytest.raises(UserError, match=message):
        build(config)
