"""`vit_jax attend --source`, of a Transformer and an LSTM that write dates."""

import json

import numpy as np
import pytest
from command_lines import DATES
from PIL import Image

import vit_jax.sequence_pictures
from vit_jax.build import build
from vit_jax.checkpoint import Checkpoints, shapes_on
from vit_jax.config import from_dict
from vit_jax.data.tokenizer import EOS, PAD
from vit_jax.data.vocabulary import load_tokenizer
from vit_jax.main import main
from vit_jax.sequence_maps import sequence_maps
from vit_jax.tasks.translate import shift_right
from vit_jax.translation import Decoding, Translator, decode_batch

pytest_plugins = ['command_fixtures']

SOURCE, TARGET = '3 March 1998', '1998-03-03'
NAMES = [
    'encoder/block00',
    'encoder/block01',
    'decoder/block00/self_attention',
    'decoder/block00/cross_attention',
    'decoder/block01/self_attention',
    'decoder/block01/cross_attention',
]


@pytest.fixture(scope='module')
def lstm(tmp_path_factory):
    """The workdir of an LSTM of sentences."""
    workdir = tmp_path_factory.mktemp('lstm') / 'run'
    argv = [DATES[0], '--config.model.name=LSTM-tiny']
    argv.append("--config.model.kwargs={'width': 16}")
    assert main(['train', *argv, f'--workdir={workdir}']) == 0
    return workdir


@pytest.fixture
def drawn(monkeypatch):
    """The arguments of every sheet that a command draws."""
    calls = []
    draw = vit_jax.sequence_pictures.draw_token_maps

    def record(*args):
        calls.append(args)
        return draw(*args)

    monkeypatch.setattr(vit_jax.sequence_pictures, 'draw_token_maps', record)
    return calls


def by_library(workdir, target=None):
    """(tokenizer, target without padding, maps of sentences padded to a bucket)."""
    run = build(from_dict(json.loads((workdir / 'config.json').read_text())))
    with Checkpoints(workdir, read_only=True) as checkpoints:
        like = shapes_on(run.parallel.replicated, run.state_shape)
        variables = checkpoints.restore_latest(like).state.variables
    tokenizer = load_tokenizer(workdir)

    def pad(line):
        (ids,) = tokenizer.encode([line])
        return np.pad([*ids, EOS], (0, 39 - ids.size), constant_values=PAD)[None]

    source = pad(SOURCE)
    if target is None:
        how = Decoding(beam=1, extra_length=0)
        said = np.asarray(decode_batch(variables, source, model=run.model, how=how))
    else:
        said = pad(target)
    maps = sequence_maps(run.model, variables, source, shift_right(said))
    length = np.flatnonzero(said[0] == EOS)[0] + 1 if EOS in said[0] else said.size
    return tokenizer, said[0, :length], maps


def test_files(run, dates, tmp_path, snapshot):
    """As printed: a picture for each layer, and one of all; the workdir stays."""
    out, workdir = tmp_path / 'new' / 'maps', snapshot(dates)
    argv = ['attend', f'--weights={dates}', f'--source={SOURCE}', f'--out={out}']
    code, text, err = run(*argv)
    assert (code, err) == (0, '')
    names = [*(name.replace('/', '-') for name in NAMES), 'cross_attention']
    expected = [out / f'{name}.png' for name in names]
    assert text.splitlines() == [str(path) for path in expected]
    assert sorted(out.iterdir()) == sorted(expected)
    for path in expected:
        with Image.open(path) as picture:
            assert min(picture.size) > 300
    assert snapshot(dates) == workdir


@pytest.mark.parametrize('target', [None, TARGET])
def test_what_is_shown(run, dates, drawn, tmp_path, target):
    """Every head's weights from token to token, none of padding."""
    argv = ['attend', f'--weights={dates}', f'--source={SOURCE}', f'--out={tmp_path}']
    assert run(*argv, *([f'--target={target}'] if target else [])).code == 0
    tokenizer, said, maps = by_library(dates, target)
    source = [*'▁3▁March▁1998', '</s>']
    following = tokenizer.pieces(said)
    if target:
        assert following == [*'▁1998-03-03', '</s>']
    so_far = ['<s>', *following[:-1]]
    whose = 'target as given' if target else 'translation by the model'
    rows_and_columns = {
        'encoder': (source, source, 'source token', 'attends to source token'),
        'decoder': (following, so_far, 'next target token', 'attends to target token'),
        'cross': (following, source, 'next target token', 'attends to source token'),
    }
    kinds = {'encoder': 'encoder self-attention', 'decoder': 'decoder self-attention'}
    means = []
    for layer, call in zip(maps.layers, drawn):
        panels, rows, columns, title, labels = call
        assert (rows, columns, *labels) == rows_and_columns[layer.kind]
        first, *more = title.split('\n')
        assert first == f'{layer.name}: {kinds.get(layer.kind, "cross-attention")}'
        assert more == ([] if layer.kind == 'encoder' else [whose])
        weights = np.asarray(layer.weights[0, :, : len(rows), : len(columns)])
        mean = weights.mean(axis=0)
        if layer.kind == 'decoder':
            hidden = ~np.tri(len(rows), dtype=bool)
            assert all(np.isnan(heat[hidden]).all() for _, heat in panels)
        assert [name for name, _ in panels] == [
            *(f'head {i}, ' for i in range(4)),
            'mean, ',
        ]
        for (_, heat), expected in zip(panels, [*weights, mean], strict=True):
            np.testing.assert_allclose(np.nan_to_num(heat), expected, atol=1e-5)
        if layer.kind == 'cross':
            means.append((layer.name, mean))

    panels, rows, columns, title, _ = drawn[6]
    assert title == f'cross-attention of each layer, mean of its heads\n{whose}'
    assert (rows, columns) == (following, source)
    for (name, heat), (layer, mean) in zip(panels, means, strict=True):
        assert f'{name[:-2]}/cross_attention' == layer
        np.testing.assert_allclose(heat, mean, atol=1e-5)
    assert len(drawn) == 7


@pytest.mark.parametrize(
    ('said', 'rows'),
    [([5, 6, EOS, PAD, PAD], 3), ([EOS, PAD], 1), ([5, 6, 7], 3)],
)
def test_a_translation_is_drawn_up_to_its_end(
    run, dates, drawn, tmp_path, monkeypatch, said, rows
):
    monkeypatch.setattr(Translator, 'decode_sources', lambda *_: [np.array(said)])
    argv = ['attend', f'--weights={dates}', f'--source={SOURCE}', f'--out={tmp_path}']
    assert run(*argv, '--layers=cross_attention').code == 0
    ((panels, labels, *_),) = drawn
    assert labels == load_tokenizer(dates).pieces(np.array(said[:rows]))
    assert {len(heat) for _, heat in panels} == {rows}


@pytest.mark.parametrize(
    ('layers', 'files'),
    [
        ('encoder/block01', ['encoder-block01']),
        (
            'cross_attention,decoder-block00-self_attention,',
            ['cross_attention', 'decoder-block00-self_attention'],
        ),
    ],
)
def test_some_layers(run, dates, tmp_path, layers, files):
    argv = ['attend', f'--weights={dates}@latest', f'--source={SOURCE}']
    code, text, _ = run(*argv, f'--out={tmp_path}/out', f'--layers={layers}')
    assert code == 0
    assert text.splitlines() == [f'{tmp_path}/out/{name}.png' for name in files]


def test_an_lstm_attends_to_the_source(run, lstm, drawn, tmp_path):
    argv = ['attend', f'--weights={lstm}', f'--source={SOURCE}', f'--out={tmp_path}']
    code, text, _ = run(*argv, f'--target={TARGET}')
    assert code == 0
    names = ['decoder', 'cross_attention']
    assert text.splitlines() == [f'{tmp_path}/{name}.png' for name in names]
    _, _, maps = by_library(lstm, TARGET)
    expected = maps.layers[0].weights[0, 0, :12, :14]
    for (((_, heat),), *_), name in zip(drawn, names, strict=True):
        np.testing.assert_allclose(heat, expected, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        ([], 'attend needs images; or --source=SENTENCE, of a model of sentences'),
        (['--target=a'], '--target is a translation of --source; give that too'),
        (
            ['a.png', '--source=a'],
            'attend draws images or --source, not both; leave a.png out',
        ),
        (['--source=a', '--query=mean'], '--query is for images; leave it out beside'),
        (['--source=a', '--like=x'], '--like is for images; leave it out beside'),
        (['--source=a', '--convert_channels'], '--convert_channels is for images; '),
        (['--source='], '--source has no tokens; give it a sentence'),
        (['--source=1', '--target= '], '--target has no tokens; give it a sentence'),
        (
            ['--source=' + 39 * '1'],  # and a space before
            '--source has 40 tokens; the longest sentences that the model was trained '
            'on have 39: shorten it',
        ),
        (['--source=1', '--target=' + 39 * '1'], '--target has 40 tokens; the longest'),
        (['--source=1', '--layers=block00'], "unknown layer 'block00'; did you mean "),
    ],
)
def test_mistakes(fails, dates, tmp_path, argv, message):
    line = fails('attend', f'--weights={dates}', f'--out={tmp_path}/out', *argv)
    assert line.startswith(message)
    assert not (tmp_path / 'out').exists()


def test_the_longest_sentences_are_drawn(run, dates, tmp_path):
    argv = [
        'attend',
        f'--weights={dates}',
        f'--out={tmp_path}',
        '--layers=encoder/block00',
    ]
    assert run(*argv, '--source=' + 38 * '1', '--target=' + 38 * '9').code == 0


def test_models_of_images_read_no_sentences(fails, digits, tmp_path):
    line = fails('attend', f'--weights={digits}', '--source=a', f'--out={tmp_path}')
    assert line.startswith(f'{digits} does not say that it is of a model of sentences')


@pytest.mark.parametrize('command', ['attend', 'predict'])
def test_models_of_sentences_see_no_images(fails, dates, make_image, tmp_path, command):
    argv = [f'--weights={dates}', make_image('a.png', 8, 8)]
    out = [f'--out={tmp_path}/out'] if command == 'attend' else []
    assert fails(command, *argv, *out) == (
        f'{dates} is of a model of sentences; `vit_jax translate` runs it, '
        '`vit_jax attend --source=SENTENCE` shows where it attends'
    )
