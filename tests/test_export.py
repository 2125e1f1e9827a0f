"""Exported folders: the same numbers, for any batch and platform, without the model."""

import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax import export as jax_export

from vit_jax.checkpoint import Checkpoints
from vit_jax.errors import UserError
from vit_jax.export import (
    export,
    is_exported,
    load_exported,
    load_program,
    make_program,
)
from vit_jax.layers import attention
from vit_jax.models import build_model
from vit_jax.pretrained.convert import to_arrays, to_published, write_file, write_folder
from vit_jax.state import TrainState

V = 7
SIZES = {'width': 8, 'depth': 1, 'mlp_dim': 10, 'num_heads': 4}
LOCAL = {**SIZES, 'depth': 2, 'num_local_layers': 1}
STAGES = {'stage_sizes': (1, 1), 'width': 4}
# Name, fields, image.
MODELS = {
    'vit': ('ViT-Ti/2', SIZES, (6, 10, 3)),
    'distilled': ('DeiT-Ti/2-distilled', SIZES, (6, 10, 1)),
    'registers': ('DINOv2-S/2-registers', SIZES, (6, 10, 3)),
    'map': ('ViT-Ti/2', {**SIZES, 'pool': 'map'}, (6, 10, 3)),
    'factored': ('ConViT-Ti/2', LOCAL, (6, 10, 3)),
    'dense': ('ConViT-Ti/2', {**LOCAL, 'gpsa_impl': 'dense'}, (6, 10, 3)),
    # More tokens than plain attention is for, in blocks that do not divide them.
    'chunked': ('ConViT-Ti/1', LOCAL, (27, 29, 1)),
    'hybrid': (
        'R26+ViT-S/32',
        {**SIZES, 'stem_kwargs': {'stage_sizes': (1,), 'width': 4, 'num_groups': 2}},
        (32, 64, 3),
    ),
    'resnet': ('ResNet-18', {**STAGES, 'bottleneck': False}, (13, 22, 3)),
    'bit': ('BiT-R50x1', {**STAGES, 'num_groups': 2}, (13, 22, 3)),
    'botnet': ('BoTNet-50', {**STAGES, 'attention_stages': (2,)}, (16, 24, 3)),
    'cnn': ('CNN', {'widths': (8, 16), 'strides': (1, 2)}, (6, 10, 3)),
    'mlp': ('MLP', {}, (6, 10, 3)),
}
PIXELS = {'mean': [0.4, 0.5, 0.6], 'std': [0.2, 0.3, 0.4]}


def preprocessing(shape):
    return {
        'image_size': list(shape[:2]),
        'channels': shape[2],
        'mean': PIXELS['mean'][: shape[2]],
        'std': PIXELS['std'][: shape[2]],
        'crop_fraction': 0.875,
        'interpolation': 'bicubic',
    }


def describe(name, fields, shape, num_classes=V):
    about = {'name': name, 'kwargs': fields, 'num_classes': num_classes}
    return {
        'model': {**about, 'dtype': 'float32'},
        'class_names': [f'kind {i}' for i in range(V)],
        'preprocessing': preprocessing(shape),
    }


def draw(model, shape, seed=0):
    """Variables of which no two numbers are equal."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))
    rng = np.random.default_rng(seed)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: np.float32(
            rng.uniform(0.5, 1.5, x.shape)
            if path[-1].key in ('scale', 'var')
            else rng.normal(0, 0.1, x.shape)
        ),
        shapes,
    )


def make_images(count, shape):
    rng = np.random.default_rng(count)
    return rng.integers(0, 256, (count, *shape)).astype(np.uint8)


def reference(model, variables, images):
    """jit(apply) of images normalised in NumPy."""
    channels = images.shape[-1]
    mean, std = (np.float32(PIXELS[k][:channels]) for k in ('mean', 'std'))
    pixels = (np.float32(images) / np.float32(255) - mean) / std
    return np.asarray(jax.jit(model.apply)(variables, pixels))


@pytest.fixture
def make_folder(tmp_path):
    """An exported folder of a model, which is returned with it."""

    def make_folder(kind='factored', name='exported'):
        title, fields, shape = MODELS[kind]
        model = build_model(title, V, **fields)
        arrays = to_arrays(draw(model, shape))
        write_folder(tmp_path / 'native', arrays, describe(title, fields, shape))
        export(tmp_path / 'native', tmp_path / name)
        return model, tmp_path / name

    return make_folder


def damaged(folder, message):
    with pytest.raises(UserError, match=message) as caught:
        load_exported(folder)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('kind', MODELS)
def test_the_program_is_the_model(kind):
    name, fields, shape = MODELS[kind]
    model = build_model(name, V, **fields)
    variables = draw(model, shape)
    program = make_program(model, variables, preprocessing(shape))
    assert program.platforms == ('cpu', 'cuda', 'tpu')
    run = jax.jit(jax_export.deserialize(program.serialize()).call)
    # A program is compiled for each size of the batch, which takes seconds.
    for count in (1, 3, 7) if kind in ('factored', 'cnn') else (3,):
        images = make_images(count, shape)
        out, expected = run(variables, images), reference(model, variables, images)
        assert out.shape == (count, V)
        assert out.dtype == jnp.float32
        atol = 1e-6 * max(1, np.abs(expected).max())
        np.testing.assert_allclose(out, expected, rtol=0, atol=atol)
        assert count == 1 or np.ptp(expected, axis=0).max() > 1e-3  # images matter


def test_the_folder_holds_all(make_folder):
    """Written, read, and run."""
    model, folder = make_folder()
    *_, shape = MODELS['factored']
    files = {'model.safetensors', 'metadata.json', 'program.bin'}
    assert {path.name for path in folder.iterdir()} == files
    assert is_exported(folder)
    assert not is_exported(folder.parent / 'native')
    found, images = load_exported(folder), make_images(3, shape)
    expected = reference(model, draw(model, shape), images)
    np.testing.assert_allclose(
        found.program(found.variables, images), expected, rtol=0, atol=1e-6
    )
    np.testing.assert_array_equal(
        load_program(folder)(found.variables, images),
        found.program(found.variables, images),
    )
    about = json.loads((folder / 'metadata.json').read_text())
    assert about == found.metadata
    assert about['class_names'] == [f'kind {i}' for i in range(V)]
    assert about['model']['grid'] == [3, 5]
    program = about.pop('program')
    assert program['platforms'] == ['cpu', 'cuda', 'tpu']
    assert program['jax'] == jax.__version__
    assert 'uint8 [b, 6, 10, 3]' in program['input']
    assert 'float32 [b, 7]' in program['output']


def test_an_exported_folder_is_weights_too(make_folder, tmp_path):
    _, folder = make_folder()
    report = export(folder, tmp_path / 'again')
    assert not {**report.resized, **report.initialised, **report.ignored}
    first, again = load_exported(folder), load_exported(tmp_path / 'again')
    jax.tree.map(np.testing.assert_array_equal, first.variables, again.variables)
    assert first.metadata == again.metadata


def test_published_weights_at_another_size(tmp_path):
    """Positions are resized, and the metadata say the new grid, not the file's."""
    name, fields, shape = MODELS['vit']
    model = build_model(name, V, **fields)
    metadata = describe(name, fields, (8, 14, 3))
    metadata['model']['grid'] = [3, 5]
    renamed = to_published(draw(model, shape), '.safetensors')
    write_file(tmp_path / 'a.safetensors', renamed, metadata)
    report = export(tmp_path / 'a.safetensors', tmp_path / 'out')
    assert report.resized == {'params/posemb/grid': '3x5 -> 4x7'}
    found = load_exported(tmp_path / 'out')
    assert found.metadata['model']['grid'] == [4, 7]
    assert found.variables['params']['posemb']['grid'].shape == (4, 7, 8)
    assert found.program(found.variables, make_images(2, (8, 14, 3))).shape == (2, V)


def test_features_are_exported_too(tmp_path):
    name, fields, shape = MODELS['registers']
    model = build_model(name, None, **fields)
    metadata = describe(name, fields, shape, num_classes=None)
    write_folder(tmp_path / 'native', to_arrays(draw(model, shape)), metadata)
    export(tmp_path / 'native', tmp_path / 'out')
    found = load_exported(tmp_path / 'out')
    assert found.program(found.variables, make_images(2, shape)).shape == (2, 8)
    assert 'float32 [b, 8]' in found.metadata['program']['output']


FORK = """
import flax.linen as nn

class Net(nn.Module):
    num_classes: int
    dtype: object

    @nn.compact
    def __call__(self, image, *, train=False):
        return nn.Dense(self.num_classes)(image.reshape(image.shape[0], -1))
"""


def test_neither_the_class_nor_the_config_is_needed(tmp_path, monkeypatch):
    (tmp_path / 'fork_of_today.py').write_text(FORK)
    shape = (3, 5, 1)
    with monkeypatch.context() as patched:
        patched.syspath_prepend(str(tmp_path))
        model = build_model('fork_of_today:Net', V, dtype=jnp.float32)
        variables, images = draw(model, shape), make_images(3, shape)
        expected = reference(model, variables, images)
        metadata = describe('fork_of_today:Net', {}, shape)
        # The workdir of a run may name code; a folder from anywhere may not.
        write_folder(tmp_path / 'native', to_arrays(variables), metadata)
        with pytest.raises(UserError, match='names code to import'):
            export(tmp_path / 'native', tmp_path / 'out')
        step = jnp.zeros((), jnp.int32)
        with Checkpoints(tmp_path / 'run') as checkpoints:
            state = TrainState(step, variables, opt_state={'count': step})
            checkpoints.save(1, state, metadata)
        export(tmp_path / 'run', tmp_path / 'out')
    del sys.modules['fork_of_today']
    shutil.rmtree(tmp_path / 'run')
    (tmp_path / 'fork_of_today.py').unlink()
    with pytest.raises(UserError, match="No module named 'fork_of_today'"):
        build_model('fork_of_today:Net', V)
    found = load_exported(tmp_path / 'out')
    out = found.program(found.variables, images)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize('impl', ['auto', 'cudnn'])
def test_kernels_of_one_platform_are_left_out(impl, monkeypatch):
    """Traced where cuDNN's attention is the best, a program still runs elsewhere."""
    monkeypatch.setattr(attention, '_has_cudnn_attention', lambda: True)
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    sizes = {**SIZES, 'width': 16, 'num_heads': 2}
    shape = (6, 10, 3)
    model = build_model('ViT-Ti/2', V, dtype=jnp.bfloat16, attention_impl=impl, **sizes)
    query = jax.ShapeDtypeStruct((3, 15, 2, 8), jnp.bfloat16)
    assert attention.auto_impl(query, query) == 'cudnn'
    variables = draw(model.clone(attention_impl='dense'), shape)
    program = make_program(model, variables, preprocessing(shape))
    monkeypatch.undo()
    out = program.call(variables, make_images(3, shape))
    assert out.shape == (3, V)
    assert 'cudnn' not in program.mlir_module()


def test_programs_tell_nothing_of_where_they_were_made(make_folder):
    _, folder = make_folder()
    data = (folder / 'program.bin').read_bytes()
    assert b'.py' not in data
    assert jax.config.jax_traceback_in_locations_limit > 0  # as it was


def test_damaged_folders(make_folder):
    _, folder = make_folder()
    program = folder / 'program.bin'
    data = program.read_bytes()
    for bad in (b'', b'hello', data[: len(data) // 2], data[: len(data) // 2] * 2):
        program.write_bytes(bad)
        damaged(folder, f'{program} is damaged or cut off')
    program.unlink()
    damaged(folder, f'cannot read {program}: No such file')
    program.write_bytes(data)
    text = (folder / 'metadata.json').read_text()
    (folder / 'metadata.json').write_text('{')
    damaged(folder, 'metadata.json is damaged')
    for bad in ('{}', '{"model": {}}', '{"preprocessing": {}}'):
        (folder / 'metadata.json').write_text(bad)
        damaged(folder, 'has no metadata.json, or half of it')
    metadata = json.loads(text)
    metadata['preprocessing']['image_size'] = [97, 89]
    (folder / 'metadata.json').write_text(json.dumps(metadata))
    damaged(folder, 'not of the image size that metadata.json tells')
    (folder / 'metadata.json').unlink()
    damaged(folder, f'{folder} has no metadata.json')


def test_weights_and_program_must_be_of_each_other(make_folder):
    _, folder = make_folder()
    _, other = make_folder('vit', 'other')
    shutil.copy(other / 'program.bin', folder)
    damaged(folder, 'program.bin is not the program of .*model.safetensors')


def test_programs_that_call_the_machines_code_are_refused(make_folder):
    """A file must not choose which of the machine's functions to call."""
    _, folder = make_folder()
    cholesky = jax_export.export(jax.jit(jnp.linalg.cholesky), platforms=('cpu',))
    program = cholesky(jax.ShapeDtypeStruct((3, 3), jnp.float32))
    (folder / 'program.bin').write_bytes(program.serialize())
    damaged(folder, 'program.bin calls lapack_spotrf_ffi, which is not part of it')


def test_models_that_call_the_machines_code_are_not_exported():
    class Net:
        def apply(self, variables, images, train):
            return jnp.linalg.svd(images[..., 0], compute_uv=False)

    with pytest.raises(UserError, match=r'the model calls .*svd.* cannot be exported'):
        make_program(Net(), {}, preprocessing((3, 5, 3)))


def test_too_little_is_known(tmp_path):
    arrays = {'params/a': np.ones(3, np.float32)}
    for i, metadata in enumerate(({}, {'model': {}}, {'preprocessing': {}})):
        write_folder(tmp_path / f'{i}', arrays, metadata)
        with pytest.raises(UserError, match=f'{i} does not say of which model it is'):
            export(tmp_path / f'{i}', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_a_folder_that_is_there_is_kept(make_folder, tmp_path):
    _, folder = make_folder()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=f'{folder} exists already'):
        export(tmp_path / 'native', folder)
    (folder / 'model.safetensors').write_bytes(b'old')
    export(tmp_path / 'native', folder, force=True)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_names_are_paths_of_the_variables(make_folder):
    _, folder = make_folder()
    found = load_exported(folder)
    paths = flatten_dict(found.variables, sep='/')
    assert 'params/block00/attention/gating' in paths
