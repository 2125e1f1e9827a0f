"""Weights on their way out: which names, which files, and that no bit is lost."""

import errno
import itertools
import json
import os
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.errors import UserError
from vit_jax.models.cnn import CNN
from vit_jax.models.convit import ConViT
from vit_jax.models.resnet import ResNet
from vit_jax.models.vit import ViT
from vit_jax.pretrained import load_variables
from vit_jax.pretrained.convert import (
    Renamed,
    check_free,
    count_classes,
    to_arrays,
    to_published,
    with_grid,
    write_file,
    write_folder,
)
from vit_jax.pretrained.files import open_weights
from vit_jax.pretrained.source import open_source

SIZE = (32, 48)
V, REGISTERS = 7, 2
SIZES = {'width': 12, 'depth': 2, 'mlp_dim': 10, 'num_heads': 3, 'patch_size': (8, 16)}
TRUNK = FrozenDict(stage_sizes=(1, 1), width=4, num_groups=2)


def vit(num_classes: int | None = V, **fields):
    return ViT(num_classes, **{**SIZES, **fields})


BIT = {'preactivation': True, 'norm': 'group', 'num_groups': 2}
# Model, and whether Google published such a one.
MODELS: dict[str, tuple[nn.Module, bool]] = {
    'vit': (vit(representation_size=5), True),
    'no_head': (vit(None), True),
    'mean': (vit(pool='mean'), True),
    'hybrid': (vit(stem='resnet', stem_kwargs=TRUNK, patch_size=8), True),
    'bit': (ResNet(V, (2, 1), width=4, **BIT), True),
    'distilled': (vit(distilled=True), False),
    'map': (vit(pool='map'), False),
    'dinov2': (vit(layer_scale=0.1), False),
    'registers': (vit(None, num_registers=REGISTERS, layer_scale=0.1), False),
    'convit': (
        ConViT(V, **{**SIZES, 'num_heads': 4}, num_local_layers=1),
        False,
    ),
    'resnet': (ResNet(V, (1, 2), width=4), False),
    'basic': (ResNet(V, (1, 2), width=4, bottleneck=False), False),
}


def draw(model, seed=0):
    """Variables of which no two numbers are equal, by path."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *SIZE, 3)))
    rng = np.random.default_rng(seed)
    return {
        path: np.float32(rng.normal(size=x.shape)) ** (2 if 'var' in path else 1)
        for path, x in flatten_dict(shapes, sep='/').items()
    }


def nested(arrays):
    return unflatten_dict(arrays, sep='/')


def load(path, model):
    """The arrays by path; the grid of positions is that of the images here."""
    patch = getattr(model, 'patch_size', 1)
    grid = tuple(np.array(SIZE) // patch)
    variables, report = load_variables(path, model, SIZE, grid=grid)
    assert not report.resized
    return to_arrays(variables), report


def assert_same(actual, expected):
    """The same names, shapes, dtypes and bits."""
    assert sorted(actual) == sorted(expected)
    for name, x in expected.items():
        assert actual[name].dtype == x.dtype, name
        assert actual[name].shape == x.shape, name
        assert actual[name].tobytes() == x.tobytes(), name


def read(path):
    return {k: x.read().copy() for k, x in open_weights(path).arrays.items()}


def go_round(name, suffixes, tmp_path):
    """Writes and reads one format after the other; '' is our folder."""
    model = MODELS[name][0]
    original = arrays = draw(model)
    if name == 'registers':  # see the test of the prefix
        original['params/posemb/prefix'] = np.zeros((1, 12), np.float32)
    for i, suffix in enumerate(suffixes):
        path = tmp_path / f'{i}{suffix}'
        if suffix:
            write_file(path, to_published(nested(arrays), suffix), {'model': {}})
        else:
            write_folder(path, arrays, {'model': {}})
        arrays, _ = load(path, model)
        assert_same(arrays, original)


@pytest.mark.parametrize('name', MODELS)
def test_no_bit_is_lost_without_pytorch(name, tmp_path):
    google = ('.npz',) if MODELS[name][1] else ()
    go_round(name, (*google, '', '.safetensors', *google, '.safetensors'), tmp_path)


@pytest.mark.parametrize('name', MODELS)
def test_no_bit_is_lost_with_pytorch(name, tmp_path):
    pytest.importorskip('torch')
    google = ('.npz',) if MODELS[name][1] else ()
    go_round(name, (*google, '', '.safetensors', '.pth', '', *google), tmp_path)


def test_files_come_back_as_they_were(tmp_path):
    """Not only our arrays: theirs, name by name."""
    model, first = MODELS['hybrid'][0], tmp_path / 'first.npz'
    write_file(first, to_published(nested(draw(model)), '.npz'), {})
    path = first
    for name in ('ours', 'b.safetensors', 'last.npz'):
        arrays, _ = load(path, model)
        path = tmp_path / name
        if path.suffix:
            write_file(path, to_published(nested(arrays), path.suffix), {})
        else:
            write_folder(path, arrays, {})
    assert_same(read(path), read(first))


@pytest.mark.parametrize(
    ('name', 'suffix', 'format', 'one_of_them', 'shape'),
    [
        ('convit', '.safetensors', 'timm', 'blocks.0.attn.qk.weight', (24, 12)),
        ('convit', '.pth', 'timm', 'blocks.1.attn.qkv.weight', (36, 12)),
        ('bit', '.bin', "timm's naming of BiT", 'head.fc.weight', (V, 32, 1, 1)),
        ('resnet', '.pt', 'torchvision', 'layer1.0.conv1.weight', (4, 4, 1, 1)),
        ('vit', '.npz', "Google's ViT", 'pre_logits/kernel', (12, 5)),
        ('hybrid', '.npz', "Google's ViT", 'gn_root/scale', (1, 1, 1, 4)),
        ('bit', '.npz', "Google's BiT", 'resnet/group_norm/gamma', (32,)),
        (
            'hybrid',
            '.safetensors',
            'timm',
            'patch_embed.backbone.stem.conv.weight',
            (4, 3, 7, 7),
        ),
    ],
)
def test_the_naming_follows_from_suffix_and_model(
    name, suffix, format, one_of_them, shape
):
    renamed = to_published(nested(draw(MODELS[name][0])), suffix)
    assert format in renamed.format
    assert renamed.arrays[one_of_them].shape == shape
    assert renamed.notes == []


@pytest.mark.parametrize(
    ('model', 'suffix', 'message'),
    [
        ('convit', '.npz', "Google's ViT has no name for .*gating, .* a folder"),
        ('distilled', '.npz', "Google's ViT has no name for .*class_token/dist"),
        ('resnet', '.npz', 'no .npz of such a model .* write .safetensors'),
        ('vit', '.onnx', "'.onnx' is no kind of weight file; use one of .npz, "),
        (CNN(V), '.pth', 'torchvision has no name for params/conv0/kernel.* folder'),
    ],
)
def test_what_has_no_names(model, suffix, message):
    model = MODELS[model][0] if isinstance(model, str) else model
    with pytest.raises(UserError, match=message):
        to_published(nested(draw(model)), suffix)


def test_positions_of_the_class_token_join_it_beside_registers(tmp_path):
    """timm has no place for them; the model is the same function, to the last bit."""
    model = vit(num_registers=REGISTERS)
    ours = draw(model)
    renamed = to_published(nested(ours), '.safetensors')
    assert renamed.arrays['pos_embed'].shape == (1, 4 * 3, 12)
    token = ours['params/class_token/cls'] + ours['params/posemb/prefix']
    np.testing.assert_array_equal(renamed.arrays['cls_token'], token)
    (note,) = renamed.notes
    assert 'positions of the class token were added to it' in note
    write_file(tmp_path / 'a.safetensors', renamed, {})
    back, report = load(tmp_path / 'a.safetensors', model)
    assert list(report.initialised) == ['params/posemb/prefix']
    image = np.random.default_rng(1).normal(size=(2, *SIZE, 3)).astype(np.float32)
    out, expected = (jax.jit(model.apply)(nested(x), image) for x in (back, ours))
    np.testing.assert_array_equal(out, expected)
    assert np.ptp(expected) > 0.1

    # Without a position nothing changes, not even the sign of a zero.
    ours['params/posemb/prefix'] = np.zeros((1, 12), np.float32)
    ours['params/class_token/cls'][..., 0] = -0.0
    renamed = to_published(nested(ours), '.safetensors')
    assert renamed.notes == []
    token = ours['params/class_token/cls']
    assert renamed.arrays['cls_token'].tobytes() == token.tobytes()


def test_the_grid_in_the_metadata_is_that_of_the_positions():
    metadata = {'model': {'name': 'x', 'grid': [14, 14]}, 'class_names': ['a']}
    told = with_grid(metadata, nested(draw(vit())))
    assert told == {'model': {'name': 'x', 'grid': [4, 3]}, 'class_names': ['a']}
    assert metadata['model']['grid'] == [14, 14]
    assert with_grid(metadata, nested(draw(MODELS['bit'][0]))) == metadata


@pytest.mark.parametrize(
    ('name', 'suffix', 'count'),
    [
        *itertools.product(('vit', 'bit'), ('.npz', '.safetensors'), (V,)),
        *itertools.product(('distilled', 'map', 'resnet'), ('.safetensors',), (V,)),
        ('no_head', '.npz', None),
        ('registers', '.safetensors', None),
    ],
)
def test_the_classes_of_a_file(name, suffix, count, tmp_path):
    path = tmp_path / f'a{suffix}'
    write_file(path, to_published(nested(draw(MODELS[name][0])), suffix), {})
    assert count_classes(open_source(path)) == count


# Files and folders.


def test_a_safetensors_file_tells_its_metadata(tmp_path):
    metadata = {'model': {'name': 'ViT', 'grid': [4, 3]}, 'class_names': ['Käse']}
    for suffix, expected in (('.safetensors', metadata), ('.npz', None)):
        path = tmp_path / 'new' / f'a{suffix}'
        write_file(path, to_published(nested(draw(vit())), suffix), metadata)
        source = open_source(path)
        assert source.metadata == expected
        assert not source.native


def test_a_folder_tells_its_metadata(tmp_path):
    metadata = {'model': {'name': 'ViT'}, 'class_names': ['Käse']}
    arrays = {'params/a/b': np.arange(6.0, dtype=np.float32).reshape(2, 3)}
    folder = tmp_path / 'new' / 'run.1'
    write_folder(folder, arrays, metadata, b'program')
    names = ['metadata.json', 'model.safetensors', 'program.bin']
    assert sorted(os.listdir(folder)) == names
    assert (folder / 'program.bin').read_bytes() == b'program'
    for path in (folder, folder / 'model.safetensors'):
        source = open_source(path)
        assert (source.metadata, source.native) == (metadata, True)
    assert_same(read(folder), arrays)
    assert os.listdir(folder.parent) == ['run.1']


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    arrays = {'a': np.ones(3, np.float32)}
    wrong = {'model': object()}  # no JSON: fails behind the weights
    with pytest.raises(TypeError):
        write_folder(tmp_path / 'a', arrays, wrong)
    assert list(tmp_path.iterdir()) == []
    write_folder(tmp_path / 'a', arrays, {'model': 1}, b'old')
    with pytest.raises(TypeError):
        write_folder(tmp_path / 'a', arrays, wrong)
    assert json.loads((tmp_path / 'a/metadata.json').read_text()) == {'model': 1}
    write_folder(tmp_path / 'a', arrays, {'model': 2})
    assert json.loads((tmp_path / 'a/metadata.json').read_text()) == {'model': 2}
    assert not (tmp_path / 'a/program.bin').exists()
    assert os.listdir(tmp_path) == ['a']


def test_paths_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('mine')
    message = f'cannot write {tmp_path}/file/a(.npz)?: '
    with pytest.raises(UserError, match=message):
        write_folder(tmp_path / 'file' / 'a', {'a': np.ones(1)}, {})
    with pytest.raises(UserError, match=message):
        write_file(tmp_path / 'file' / 'a.npz', Renamed('', {'a': np.ones(1)}, []), {})
    assert (tmp_path / 'file').read_text() == 'mine'


def test_what_is_there_is_kept(tmp_path):
    check_free(tmp_path / 'new' / 'a')
    (tmp_path / 'empty').mkdir()
    check_free(tmp_path / 'empty')
    (tmp_path / 'file').write_text('')
    write_folder(tmp_path / 'ours', {'a': np.ones(1)}, {}, b'')
    for name in ('file', 'ours'):
        taken = tmp_path / name
        check_free(taken, force=True)
        with pytest.raises(UserError, match=f'{taken} exists already; .* --force'):
            check_free(taken)
    with pytest.raises(UserError, match='exists already'):
        check_free(tmp_path)
    with pytest.raises(UserError, match="holds 'empty', which is not ours to replace"):
        check_free(tmp_path, force=True)


@pytest.mark.parametrize('name', ['', '.', '..', 'a/..'])
def test_paths_without_a_name(name):
    for force in (False, True):
        with pytest.raises(UserError, match=r"^name a folder to make, not '"):
            check_free(pathlib.Path(name), force)


ARRAYS = {'a': np.ones(3, np.float32)}


def version(folder):
    return json.loads((folder / 'metadata.json').read_text())['model']


@pytest.fixture
def meanwhile(monkeypatch):
    """Does something just before a folder is renamed to that path."""

    def meanwhile(path, do):
        rename = pathlib.Path.rename

        def patched(self, target):
            if target == path:
                do()
            return rename(self, target)

        monkeypatch.setattr(pathlib.Path, 'rename', patched)

    return meanwhile


def test_what_appears_meanwhile_is_kept(tmp_path, meanwhile):
    """Before the check, which is the second; and behind it."""
    path = tmp_path / 'a'
    path.mkdir()
    (path / 'thesis').write_text('mine')
    for force, message in ((False, 'exists already'), (True, "'thesis', .* not ours")):
        with pytest.raises(UserError, match=message):
            write_folder(path, ARRAYS, {}, force=force)
        assert os.listdir(tmp_path) == ['a']
        assert os.listdir(path) == ['thesis']
    (path / 'thesis').unlink()  # an empty folder may be there
    meanwhile(path, lambda: (path / 'thesis').write_text('mine'))
    for force in (False, True):
        with pytest.raises(UserError, match=f'^cannot write {path}: '):
            write_folder(path, ARRAYS, {}, force=force)
        assert os.listdir(tmp_path) == ['a']
        assert os.listdir(path) == ['thesis']
        (path / 'thesis').unlink()


def test_without_force_not_even_a_folder_of_ours_is_replaced(tmp_path):
    path = tmp_path / 'a'
    write_folder(path, ARRAYS, {'model': 1}, force=False)
    with pytest.raises(UserError, match=f'{path} exists already'):
        write_folder(path, ARRAYS, {'model': 2}, force=False)
    assert (version(path), os.listdir(tmp_path)) == (1, ['a'])


def test_what_comes_into_a_folder_while_it_is_replaced(tmp_path, meanwhile):
    """It lies where the old folder was put, which is then not removed."""
    path, aside = tmp_path / 'a', tmp_path / 'a.replaced'
    write_folder(path, ARRAYS, {'model': 1})
    meanwhile(path, lambda: (aside / 'thesis').write_text('mine'))
    write_folder(path, ARRAYS, {'model': 2})
    assert (version(path), version(aside)) == (2, 1)
    assert (aside / 'thesis').read_text() == 'mine'
    message = f'{aside} is in the way'
    with pytest.raises(UserError, match=message):
        write_folder(path, ARRAYS, {'model': 3})
    with pytest.raises(UserError, match=message):
        check_free(path, force=True)
    assert (version(path), version(aside)) == (2, 1)


def test_a_failure_between_the_renames(tmp_path, monkeypatch):
    """The old folder is put back; the message names the new one."""
    path, rename = tmp_path / 'a', pathlib.Path.rename
    write_folder(path, ARRAYS, {'model': 1})

    def full(self, target):
        if self.suffix == '.tmp':
            assert not path.exists()
            raise OSError(errno.ENOSPC, 'No space left on device')
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, 'rename', full)
    with pytest.raises(UserError, match=f'^cannot write {path}: No space left'):
        write_folder(path, ARRAYS, {'model': 2})
    assert (version(path), os.listdir(tmp_path)) == (1, ['a'])


@pytest.mark.parametrize('there', [False, True])
def test_a_kill_between_or_behind_the_renames(there, tmp_path):
    """The next write with force removes what lies aside."""
    path, aside = tmp_path / 'a', tmp_path / 'a.replaced'
    write_folder(aside, ARRAYS, {'model': 1})
    if there:
        write_folder(path, ARRAYS, {'model': 2}, force=False)
    assert version(aside) == 1
    check_free(path, force=True)
    write_folder(path, ARRAYS, {'model': 3}, force=True)
    assert (version(path), os.listdir(tmp_path)) == (3, ['a'])


def test_links_are_followed(tmp_path):
    path, link = tmp_path / 'disk' / 'a', tmp_path / 'link'
    write_folder(path, ARRAYS, {'model': 1})
    link.symlink_to(path)
    check_free(link, force=True)
    write_folder(link, ARRAYS, {'model': 2})
    assert link.is_symlink()
    assert version(path) == 2
    assert sorted(os.listdir(tmp_path)) == ['disk', 'link']
    assert os.listdir(path.parent) == ['a']
    (path / 'thesis').write_text('mine')
    with pytest.raises(UserError, match=f"{link} holds 'thesis'"):
        check_free(link, force=True)
    (tmp_path / 'round').symlink_to(tmp_path / 'round')
    with pytest.raises(UserError, match=f'^cannot write {tmp_path}/round: '):
        write_folder(tmp_path / 'round', ARRAYS, {})


def test_a_full_disk(tmp_path, monkeypatch):
    """The message names what was asked for, and nothing is left."""

    def full(path, data):
        path.touch()
        raise OSError(errno.ENOSPC, 'No space left on device')

    path = tmp_path / 'a'
    with monkeypatch.context() as patched:
        patched.setattr(pathlib.Path, 'write_bytes', full)
        with pytest.raises(UserError, match=f'^cannot write {path}: No space left'):
            write_folder(path, ARRAYS, {}, b'program')
    monkeypatch.setattr('safetensors.numpy.save_file', lambda *a, **k: full(a[1], b''))
    with pytest.raises(UserError, match=rf'^cannot write {path}/model.saf.*: No space'):
        write_folder(path, ARRAYS, {})
    assert os.listdir(tmp_path) == []


def test_what_is_told_of_a_run(tmp_path):
    """Not where its data lie."""
    told = {'model': {}, 'class_names': ['a'], 'preprocessing': {}}
    metadata = {**told, 'config': {'data_dir': '/home/me'}, 'dataset': 'folder:/home'}
    metadata |= {'eval_split': 'test', 'num_train_examples': 3, 'position': 9}
    write_folder(tmp_path / 'a', ARRAYS, {**metadata, 'program': {}})
    found = json.loads((tmp_path / 'a/metadata.json').read_text())
    assert found == {**told, 'program': {}}
    write_file(tmp_path / 'a.safetensors', Renamed('', ARRAYS, []), metadata)
    header = open_weights(tmp_path / 'a.safetensors').metadata
    assert json.loads(header['vit_jax']) == told
