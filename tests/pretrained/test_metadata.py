"""Metadata that somebody wrote: believed only where they can be, and never run."""

import json
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from vit_jax.errors import UserError
from vit_jax.main import main
from vit_jax.pretrained.metadata import check_metadata, is_complete, parse_metadata
from vit_jax.pretrained.source import open_source

GOOD = {
    'model': {
        'name': 'ViT-Ti/4',
        'kwargs': {'depth': 1},
        'num_classes': 3,
        'dtype': 'float32',
        'grid': [2, 3],
    },
    'class_names': ['a', 'b', 'c'],
    'preprocessing': {
        'image_size': [8, 12],
        'channels': 3,
        'mean': [0.5],
        'std': [0.5, 0.5, 0.5],
        'crop_fraction': 0.9,
        'interpolation': 'bilinear',
    },
}


def change(section, key, value):
    return {**GOOD, section: {**GOOD[section], key: value}}


def test_as_many_names_as_classes():
    bad = {**GOOD, 'class_names': ['a', 'b']}
    with pytest.raises(UserError, match='2 class_names, but num_classes is 3'):
        check_metadata(bad, 'there')


def test_good_metadata_stay_as_they_are():
    assert check_metadata(json.loads(json.dumps(GOOD)), 'there') == GOOD
    assert is_complete(GOOD, 'model', 'preprocessing')


@pytest.mark.parametrize(
    ('bad', 'key'),
    [
        ({'model': []}, 'model'),
        ({'preprocessing': 'x'}, 'preprocessing'),
        ({'class_names': 'abc'}, 'class_names'),
        ({'class_names': ['a', 2]}, 'class_names'),
        (change('model', 'name', None), 'model.name'),
        (change('model', 'kwargs', []), 'model.kwargs'),
        (change('model', 'num_classes', True), 'model.num_classes'),
        (change('model', 'num_classes', 0), 'model.num_classes'),
        (change('model', 'grid', [2, -3]), 'model.grid'),
        (change('model', 'grid', 6), 'model.grid'),
        (change('model', 'num_heads', '3'), 'model.num_heads'),
        (change('preprocessing', 'image_size', [8]), 'preprocessing.image_size'),
        (change('preprocessing', 'channels', 2), 'preprocessing.channels'),
        (change('preprocessing', 'mean', [0.5, 0.5]), 'preprocessing.mean'),
        (change('preprocessing', 'std', [0.0]), 'preprocessing.std'),
        (change('preprocessing', 'crop_fraction', 'x'), 'preprocessing.crop_fraction'),
        (change('preprocessing', 'crop_fraction', 2), 'preprocessing.crop_fraction'),
        (change('preprocessing', 'interpolation', []), 'preprocessing.interpolation'),
    ],
)
def test_values_that_cannot_be_are_named(bad, key):
    with pytest.raises(UserError, match=rf'there are damaged: {key} is ') as caught:
        check_metadata(bad, 'there')
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'text', ['[' * 100_000, '{"a": ', '"a"', '', '{"a": 1}}', '\ud800']
)
def test_text_that_is_no_object(text):
    with pytest.raises(UserError, match='there is damaged') as caught:
        parse_metadata(text, 'there')
    assert '\n' not in str(caught.value)


def test_what_is_needed():
    for section, key in (('model', 'kwargs'), ('preprocessing', 'std')):
        about = {k: v for k, v in GOOD[section].items() if k != key}
        assert not is_complete({**GOOD, section: about}, 'model', 'preprocessing')
    assert not is_complete({}, 'model')
    assert not is_complete(None, 'model')


def test_older_checkpoints_were_bicubic():
    old = json.loads(json.dumps(GOOD))
    del old['preprocessing']['interpolation']
    assert check_metadata(old, 'there')['preprocessing']['interpolation'] == 'bicubic'


@pytest.fixture
def payload(tmp_path, monkeypatch):
    """A module that leaves a trace when it is imported, where the user is."""
    (tmp_path / 'payload.py').write_text('open("ran", "w").close()\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    ran = (tmp_path / 'ran').exists()
    sys.modules.pop('payload', None)
    assert not ran


@pytest.mark.parametrize(
    'about',
    [
        {'name': 'payload:net'},
        {'kwargs': {'attention': 'payload:net'}},
        {'kwargs': {'stem': 'subprocess:run', 'stem_kwargs': {'a': ['payload:x']}}},
    ],
)
@pytest.mark.parametrize('argv', [['predict', '{image}', '--weights={file}'],
    ['attend', '{image}', '--weights={file}', '--out=o'],
    ['export', '{file}', 'o'], ['convert', '{file}', 'o']])  # fmt: skip
def test_no_code_is_run_that_a_file_names(payload, capsys, about, argv):
    from PIL import Image

    Image.fromarray(np.zeros((8, 12, 3), np.uint8)).save('i.png')
    metadata = {**GOOD, 'model': {**GOOD['model'], **about}}
    array = np.zeros((1, 1, 4), np.float32)
    save_file({'cls_token': array}, 'w.safetensors', {'vit_jax': json.dumps(metadata)})
    argv = [word.format(image='i.png', file='w.safetensors') for word in argv]
    assert main(argv) == 1
    err = capsys.readouterr().err
    assert 'names code to import' in err
    assert err.count('\n') == 1


def test_a_file_beside_that_is_not_text(tmp_path):
    save_file({'cls_token': np.zeros(4, np.float32)}, tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_bytes(b'\xff\xfe{')
    with pytest.raises(UserError, match=r'config\.json is damaged'):
        open_source(tmp_path)


def test_an_empty_path_is_not_the_folder_one_is_in():
    with pytest.raises(UserError, match='the path is empty'):
        open_source('')
