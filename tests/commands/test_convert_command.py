import json
import shutil
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vit_jax.models import build_model
from vit_jax.pretrained.convert import to_arrays, write_folder
from vit_jax.pretrained.files import open_weights, write_weights
from vit_jax.pretrained.source import open_source

pytest_plugins = ['command_fixtures']

# A ViT for images of 6x8 in patches of 2, with 3 classes: Google's names.
D, F, N, T = 192, 768, 3, 12


def google_arrays(grid=T, num_classes=3, depth=12):
    rng = np.random.default_rng(0)
    shapes = {
        'cls': (1, 1, D),
        'embedding/kernel': (2, 2, 3, D),
        'embedding/bias': (D,),
        'Transformer/posembed_input/pos_embedding': (1, 1 + grid, D),
        'Transformer/encoder_norm/scale': (D,),
        'Transformer/encoder_norm/bias': (D,),
    }
    for i in range(depth):
        block = f'Transformer/encoderblock_{i}'
        for norm in ('LayerNorm_0', 'LayerNorm_2'):
            shapes |= {f'{block}/{norm}/{leaf}': (D,) for leaf in ('scale', 'bias')}
        attention = f'{block}/MultiHeadDotProductAttention_1'
        for name in ('query', 'key', 'value'):
            shapes[f'{attention}/{name}/kernel'] = (D, N, D // N)
            shapes[f'{attention}/{name}/bias'] = (N, D // N)
        shapes[f'{attention}/out/kernel'] = (N, D // N, D)
        shapes[f'{attention}/out/bias'] = (D,)
        mlp = f'{block}/MlpBlock_3'
        shapes[f'{mlp}/Dense_0/kernel'], shapes[f'{mlp}/Dense_0/bias'] = (D, F), (F,)
        shapes[f'{mlp}/Dense_1/kernel'], shapes[f'{mlp}/Dense_1/bias'] = (F, D), (D,)
    if num_classes:
        shapes |= {'head/kernel': (D, num_classes), 'head/bias': (num_classes,)}
    return {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}


def read(path):
    return {k: x.read().copy() for k, x in open_weights(path).arrays.items()}


def assert_same(actual, expected):
    assert sorted(actual) == sorted(expected)
    for name, x in expected.items():
        assert actual[name].tobytes() == x.tobytes(), name


@pytest.fixture
def vit(tmp_path):
    """Google's file of a ViT, which does not say what it is."""
    path = tmp_path / 'vit.npz'
    write_weights(path, google_arrays(), {})
    return path


def test_round_trip(run, digits, tmp_path, make_image):
    """A run here, timm's file, and back: what the model says stays the same."""
    image = make_image('grey.png', 8, 8)
    expected = run('predict', f'--weights={digits}', image)
    assert expected.code == 0
    file, folder = tmp_path / 'a.safetensors', tmp_path / 'new' / 'folder'
    code, out, err = run('convert', digits, file)
    assert (code, out) == (0, '')
    first, note, last = err.splitlines()
    assert first.startswith(f'{digits} at step 3 ')
    assert note == (
        'the names do not tell num_heads=4, num_local_layers=1 (timm: '
        'local_up_to_layer=1): its reader must know'
    )
    assert last == f'wrote {file}: 34 arrays (the naming of timm)'
    assert open_weights(file).arrays['blocks.0.attn.qk.weight'].shape == (128, 64)
    code, out, err = run('convert', file, folder)
    assert (code, out) == (0, '')
    last = f"wrote {folder}: 37 arrays (this project's own names)"
    assert err.splitlines()[-1] == last
    for weights in (file, folder):
        assert run('predict', f'--weights={weights}', image) == expected
    # The same file again, and its metadata.
    assert run('convert', folder, tmp_path / 'b.safetensors').code == 0
    again = tmp_path / 'b.safetensors'
    assert_same(read(again), read(file))
    assert open_weights(again).metadata == open_weights(file).metadata


def test_the_model_and_its_classes_where_a_file_does_not_say(run, vit, tmp_path):
    """--model; the classes are counted, the size follows from the grid."""
    folder, back = tmp_path / 'folder', tmp_path / 'back.npz'
    code, _, err = run('convert', vit, folder, '--model=ViT-Ti/2', '--grid=3x4')
    assert code == 0
    assert err.startswith(f"{vit} (the naming of Google's ViT): ")
    about = json.loads((folder / 'metadata.json').read_text())
    assert about == {
        'model': {
            'name': 'ViT-Ti/2',
            'num_classes': 3,
            'dtype': 'float32',
            'kwargs': {},
            'grid': [3, 4],
        }
    }
    code, _, err = run('convert', folder, back)
    assert code == 0
    assert_same(read(back), google_arrays())
    # Google's code knows one kind of GELU, and it is not this one.
    note = "the names do not tell activation='gelu': its reader must know"
    assert err.splitlines()[1] == note


def test_square_grids_and_files_without_classes(run, tmp_path):
    """A grid of 5x5 is not the 112x112 of images of 224: nothing is resized."""
    path = tmp_path / 'vit.npz'
    write_weights(path, google_arrays(grid=25, num_classes=0), {})
    code, _, err = run('convert', path, tmp_path / 'a.safetensors', '--model=ViT-Ti/2')
    assert code == 0, err
    positions = open_weights(tmp_path / 'a.safetensors').arrays['pos_embed']
    assert positions.shape == (1, 26, D)
    assert 'resized' not in err
    assert 'head.weight' not in open_weights(tmp_path / 'a.safetensors').arrays


def test_copies_of_published_weights(run, tmp_path, monkeypatch):
    """--like: model, classes and preprocessing are those of the address."""
    from vit_jax.pretrained import published

    about = {'name': 'ViT-Ti/2', 'kwargs': {'activation': 'gelu_tanh'}}
    about |= {'num_classes': 3, 'dtype': 'float32', 'grid': [3, 4]}
    metadata = {
        'model': about,
        'class_names': ['a', 'b', 'c'],
        'preprocessing': {'image_size': [6, 8], 'channels': 3, 'mean': [0.5]},
    }
    monkeypatch.setattr(
        published, 'find_published', lambda name: {'augreg:Ti': metadata}.get(name)
    )
    path = tmp_path / 'copy.npz'
    write_weights(path, google_arrays(), {})
    folder = tmp_path / 'folder'
    code, _, err = run('convert', path, folder, '--like=augreg:Ti')
    assert code == 0, err
    assert json.loads((folder / 'metadata.json').read_text()) == metadata
    _, _, err = run('convert', folder, tmp_path / 'a.safetensors')
    told = "activation='gelu_tanh', num_heads=3"
    assert err.splitlines()[1] == f'the names do not tell {told}: its reader must know'


def test_exported_folders_leave_their_program_behind(run, digits, tmp_path):
    assert run('export', digits, tmp_path / 'exported').code == 0
    assert run('convert', tmp_path / 'exported', tmp_path / 'plain').code == 0
    assert not (tmp_path / 'plain' / 'program.bin').exists()
    told = [
        json.loads((tmp_path / name / 'metadata.json').read_text())
        for name in ('exported', 'plain')
    ]
    assert told[0].pop('program')
    assert told[0] == told[1]


def test_other_networks(run, colour, tmp_path):
    """A model without published names goes into our folder."""
    code, _, err = run('convert', colour, tmp_path / 'folder')
    assert code == 0, err


def test_pth(run, digits, tmp_path):
    pytest.importorskip('torch')
    paths = [tmp_path / name for name in ('a.safetensors', 'a.pth', 'b.safetensors')]
    assert run('convert', digits, paths[0]).code == 0
    assert run('convert', paths[0], paths[1]).code == 0
    assert_same(read(paths[1]), read(paths[0]))


def test_what_is_there_is_kept(run, fails, digits, tmp_path):
    file = tmp_path / 'a.safetensors'
    file.write_text('mine')
    message = f'{file} exists already; choose another, or pass --force'
    assert fails('convert', digits, file) == message
    assert file.read_text() == 'mine'
    assert run('convert', digits, file, '--force').code == 0
    assert len(read(file)) == 34
    # Onto itself, too.
    before = read(file)
    assert run('convert', file, file, '--force').code == 0
    assert_same(read(file), before)


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['none.npz', 'a'], 'no such file or folder: none.npz'),
        (
            ['{vit}', 'a.onnx', '--model=ViT-Ti/2'],
            "DST a.onnx ends in '.onnx'; let it end in one of .npz, .safetensors, "
            '.pth, .pt, .bin, or in nothing for a folder',
        ),
        (
            ['{vit}', 'a'],
            '{vit} does not say which model it is of; name it by --model=NAME, or '
            'by --like published weights that it is a copy of, or the workdir it is',
        ),
        (['{vit}', 'a', '--model=ViT-T/2'], "unknown size of ViT 'T'; did you mean"),
        (
            ['{vit}', 'a', '--like=augreg:none'],
            '--like=augreg:none is no address of published weights; `vit_jax ',
        ),
        (
            ['{vit}', 'a', '--model=ViT-Ti/2'],
            'Transformer/posembed_input/pos_embedding has 13 positions, and the file '
            'does not tell their grid',
        ),
        (
            ['{vit}', 'a', '--model=ViT-S/2', '--grid=3x4'],
            "{vit} (the naming of Google's ViT) does not fit the model: ",
        ),
        (
            ['{vit}', 'a', '--model=ViT-Ti/2', '--grid=3x4', '--image_size=6x10'],
            'params/posemb/grid would be resized, 3x4 -> 3x5, and `convert` changes no '
            'number: leave --image_size out',
        ),
        (
            ['{vit}', 'a', '--model=ViT-Ti/2', '--grid=3*5'],
            "--grid is 14 or 14x20 (height x width), not '3*5'",
        ),
        (['{vit}', '..'], "name a folder to make, not '..'"),
        (
            ['{digits}', 'a', '--grid=2x4'],
            '--grid=2x4, but {digits} says that the grid of its positions is 4x4; '
            'leave --grid out',
        ),
        (
            ['{vit}', '{vit}/a.npz', '--model=ViT-Ti/2', '--grid=3x4'],
            'cannot write {vit}/a.npz: ',
        ),
        (
            ['{digits}', 'a.npz'],
            "the naming of Google's ViT has no name for params/block00/attention/",
        ),
        (
            ['{colour}', 'a.safetensors'],
            'the naming of torchvision has no name for params/conv0/kernel',
        ),
    ],
)
def test_bad_input(fails, vit, digits, colour, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    known = {'vit': vit, 'digits': digits, 'colour': colour}
    found = fails('convert', *(word.format(**known) for word in argv))
    assert found.startswith(message.format(**known))
    assert [path.name for path in tmp_path.iterdir()] == ['vit.npz']


def test_without_pytorch(fails, digits, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', None)
    message = fails('convert', digits, tmp_path / 'a.pth')
    assert message.startswith(
        "writing a state dict needs PyTorch: pip install 'vit_jax"
    )


def test_the_way_back_of_a_model_of_ones_own(run, digits, tmp_path):
    """`.npz` and `.pth` have no place for what --like tells: fields, classes, grid."""
    there, bare, back = (tmp_path / name for name in ('a.safetensors', 'bare', 'back'))
    assert run('convert', digits, there).code == 0
    save_file(load_file(there), bare)
    code, _, err = run('convert', bare, back, f'--like={digits}')
    assert code == 0, err
    source = open_source(back)
    for name, array in open_source(digits).file.arrays.items():
        np.testing.assert_array_equal(source.file.arrays[name].read(), array.read())
    theirs = open_source(digits).metadata
    assert source.metadata['class_names'] == theirs['class_names']
    assert source.metadata['model'] == theirs['model']


def test_only_one_of_model_and_like(run, vit):
    code, _, err = run('convert', vit, 'a', '--model=ViT-Ti/2', '--like=x')
    assert code == 2
    assert 'not allowed with argument' in err


def test_folders_with_other_files_are_not_replaced(fails, digits, tmp_path):
    (tmp_path / 'thesis').mkdir()
    shutil.copy(__file__, tmp_path / 'thesis' / 'thesis.tex')
    message = fails('convert', digits, tmp_path / 'thesis', '--force')
    assert "'thesis.tex', which is not ours to replace" in message


SMALL = {'width': 8, 'depth': 1, 'mlp_dim': 6, 'num_heads': 2}


@pytest.fixture
def make_small(tmp_path):
    """Writes our folder of a small ViT for a grid of 3x4, with more fields."""

    def make_small(name='ViT-Ti/2', **kwargs):
        kwargs, patch = {**SMALL, **kwargs}, int(name.split('/')[1])
        size = [3 * patch, 4 * patch]
        model = build_model(name, 3, **kwargs)
        variables = model.init(jax.random.key(0), jnp.zeros((1, *size, 3)))
        about = {'name': name, 'kwargs': kwargs, 'num_classes': 3, 'dtype': 'float32'}
        about = {'model': about, 'preprocessing': {'image_size': size, 'channels': 3}}
        write_folder(tmp_path / 'small', to_arrays(variables), about)
        return tmp_path / 'small'

    return make_small


@pytest.mark.parametrize('suffix', ['.npz', '.safetensors', '.pth'])
@pytest.mark.parametrize('posemb', ['none', 'sincos2d'])
def test_fixed_positions_stay_in_a_folder(
    run, fails, make_small, tmp_path, posemb, suffix
):
    folder = make_small(posemb=posemb)
    message = fails('convert', folder, tmp_path / f'a{suffix}')
    assert message == (
        f"posemb='{posemb}' has no weights, and timm and Google's code would miss "
        'positions in the file; keep it as a folder: let DST end in nothing'
    )
    assert run('convert', folder, tmp_path / 'a').code == 0


def test_a_distilled_model_with_registers_stays_in_a_folder(
    run, fails, make_small, tmp_path
):
    folder = make_small(distilled=True, num_registers=2)
    message = fails('convert', folder, tmp_path / 'a.safetensors')
    assert message.startswith('timm has no model with both a distillation token and ')
    assert run('convert', folder, tmp_path / 'a').code == 0


# Of a hybrid: a stem and one block, which leave a quarter of the size.
TRUNK = {'stage_sizes': [1], 'width': 4, 'num_groups': 2}


@pytest.mark.parametrize(
    ('kwargs', 'suffix', 'notes'),
    [
        ({'activation': 'gelu_tanh'}, '.npz', []),
        (
            {'pool': 'mean', 'activation': 'gelu_tanh', 'layer_norm_eps': 1e-5},
            '.npz',
            [
                "the names do not tell layer_norm_eps=1e-05, pool='mean' (timm: "
                "global_pool='avg', class_token=False, fc_norm=False): its reader must "
                'know'
            ],
        ),
        (
            {'representation_size': 5},
            '.safetensors',
            [
                'the names do not tell num_heads=2: its reader must know',
                "pre_logits (representation_size=5) is read by Google's code and by "
                'older versions of timm, not by its newer ones',
            ],
        ),
        (
            {'name': 'ViT-Ti/4', 'stem': 'resnet', 'stem_kwargs': TRUNK},
            '.safetensors',
            [
                'the names do not tell num_heads=2: its reader must know',
                'weights are standardised by their deviation + 1e-05 here, in timm by '
                'sqrt(variance + 1e-8): its outputs differ a little',
            ],
        ),
        (
            {
                'name': 'ViT-Ti/4',
                'activation': 'gelu_tanh',
                'stem': 'resnet',
                'stem_kwargs': {**TRUNK, 'standardize_eps': 0.0},
            },
            '.npz',
            [
                'weights are standardised by their deviation + 0.0 here, in '
                "Google's code by + 1e-05"
            ],
        ),
    ],
)
def test_what_names_do_not_tell(run, make_small, tmp_path, kwargs, suffix, notes):
    code, _, err = run('convert', make_small(**kwargs), tmp_path / f'a{suffix}')
    assert code == 0, err
    assert err.splitlines()[1:-1] == notes


def test_a_grid_that_is_known_may_be_said_again(run, make_small, tmp_path):
    folder = make_small()
    assert run('convert', folder, tmp_path / 'a', '--grid=3x4').code == 0


def test_a_safetensors_file_tells_its_grid(run, fails, make_small, tmp_path):
    file = tmp_path / 'a.safetensors'
    assert run('convert', make_small(), file).code == 0
    message = fails('convert', file, tmp_path / 'a', '--grid=2x6')
    assert message.startswith(f'--grid=2x6, but {file} says that the grid of its ')


@pytest.mark.filterwarnings('ignore:overflow')
@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16, np.float64])
def test_numbers_of_other_dtypes(run, make_small, tmp_path, dtype):
    """All of half precision are float32's; those of float64 need not be."""
    source = make_small()
    about = json.loads((source / 'metadata.json').read_text())
    arrays = {name: x.astype(dtype) for name, x in read(source).items()}
    write_folder(source, arrays, about)
    folder = tmp_path / 'a'
    code, _, err = run('convert', source, folder)
    assert code == 0
    assert 'warning' not in err
    for name, x in read(folder).items():
        assert x.dtype == np.float32
        np.testing.assert_array_equal(np.float64(x), np.float64(arrays[name]))
    if dtype == np.float64:
        grid, bias = 'params/posemb/grid', 'params/head/logits/bias'
        arrays[grid][0, 0, :3] = 1 / 3, np.nan, 1 + 2**-20  # the first is rounded
        arrays[bias][:] = 0.1, 1e300, 3.0  # the first two are not float32
        write_folder(source, arrays, about)
        _, _, err = run('convert', source, folder, '--force')
        lines = [x for x in err.splitlines() if x.startswith('warning: 3 numbers')]
        assert lines == [
            'warning: 3 numbers of float64 were rounded to float32, in '
            + ', '.join(name for name in sorted(arrays) if name in (grid, bias))
        ]


def test_the_config_of_a_run_stays_with_it(run, digits, data_dir, tmp_path):
    """It tells where the data lie."""
    for name in ('a', 'a.safetensors'):
        assert run('convert', digits, tmp_path / name).code == 0
    texts = (tmp_path / 'a' / 'metadata.json', tmp_path / 'a.safetensors')
    for path in texts:
        assert str(data_dir).encode() not in path.read_bytes()
    about = json.loads((tmp_path / 'a' / 'metadata.json').read_text())
    assert sorted(about) == ['class_names', 'model', 'preprocessing']
