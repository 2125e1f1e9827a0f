"""What loading does to each leaf, and what it refuses."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from vit_jax.errors import UserError
from vit_jax.models import build_model
from vit_jax.models.resnet import ResNet
from vit_jax.models.vit import ViT
from vit_jax.pretrained import load_params, load_variables
from vit_jax.pretrained.convert import to_published
from vit_jax.pretrained.source import NATIVE, open_source

D, F, V = 6, 10, 7
SIZE = (8, 12)  # a grid of 4x6


def small_vit(num_classes=V, **kwargs):
    fields = {'patch_size': 2, 'width': D, 'depth': 1, 'mlp_dim': F, 'num_heads': 3}
    return ViT(num_classes=num_classes, **{**fields, **kwargs})


def small_arrays(grid=(4, 6), seed=0):
    """A ViT of one block under timm's names, every number different."""
    rng = np.random.default_rng(seed)
    shapes = {
        'cls_token': (1, 1, D),
        'pos_embed': (1, 1 + np.prod(grid), D),
        'patch_embed.proj.weight': (D, 3, 2, 2),
        'patch_embed.proj.bias': (D,),
        'blocks.0.norm1.weight': (D,),
        'blocks.0.norm1.bias': (D,),
        'blocks.0.attn.qkv.weight': (3 * D, D),
        'blocks.0.attn.qkv.bias': (3 * D,),
        'blocks.0.attn.proj.weight': (D, D),
        'blocks.0.attn.proj.bias': (D,),
        'blocks.0.norm2.weight': (D,),
        'blocks.0.norm2.bias': (D,),
        'blocks.0.mlp.fc1.weight': (F, D),
        'blocks.0.mlp.fc1.bias': (F,),
        'blocks.0.mlp.fc2.weight': (D, F),
        'blocks.0.mlp.fc2.bias': (D,),
        'norm.weight': (D,),
        'norm.bias': (D,),
        'head.weight': (V, D),
        'head.bias': (V,),
    }
    return {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}


@pytest.fixture
def write(tmp_path):
    """Writes arrays as a file; `grid` as this project's files tell it."""

    def write(arrays, grid=None):
        about = {'vit_jax': json.dumps({'model': {'grid': grid}})} if grid else None
        path = tmp_path / 'weights.bin'
        save_file(dict(arrays), path, metadata=about)
        return path

    return write


def load(path, model=None, size=SIZE, **kwargs):
    return load_variables(path, model or small_vit(), size, **kwargs)


def refuses(path, model=None, size=SIZE, **kwargs):
    with pytest.raises(UserError) as caught:
        load(path, model, size, **kwargs)
    message = str(caught.value)
    assert '\n' not in message
    return message


class Net(nn.Module):
    """Has what models of images seldom have."""

    @nn.compact
    def __call__(self, image, train=False):
        self.variable('batch_stats', 'conv/kernel/u', jnp.ones, (2, 3))
        return image * self.param('gamma', nn.initializers.zeros, ())


def test_a_scalar_and_a_name_with_slashes_of_its_own(tmp_path):
    arrays = {
        'params/gamma': np.array(0.7, np.float32),
        'batch_stats/conv/kernel/u': np.arange(6, dtype=np.float32).reshape(2, 3),
    }
    save_file(arrays, tmp_path / 'weights', metadata={'format': NATIVE})
    variables, report = load(tmp_path / 'weights', Net())
    assert set(report.loaded) == set(arrays)
    assert variables.keys() == {'params', 'batch_stats'}
    assert variables['params']['gamma'] == arrays['params/gamma']
    found = variables['batch_stats']['conv/kernel/u']
    np.testing.assert_array_equal(found, arrays['batch_stats/conv/kernel/u'])


def test_every_array_lands_where_it_belongs(write):
    arrays = small_arrays()
    variables, report = load(write(arrays, grid=[4, 6]))
    params = variables['params']
    block = params['block00']
    qkv = arrays['blocks.0.attn.qkv.weight']
    for i, name in enumerate(('query', 'key', 'value')):
        for head in range(3):
            rows = qkv[i * D + 2 * head : i * D + 2 * head + 2]
            np.testing.assert_array_equal(
                block['attention'][name]['kernel'][:, head], rows.T
            )
            bias = arrays['blocks.0.attn.qkv.bias'][i * D + 2 * head :][:2]
            np.testing.assert_array_equal(block['attention'][name]['bias'][head], bias)
    out = block['attention']['out']['kernel']
    np.testing.assert_array_equal(
        out[2, 1], arrays['blocks.0.attn.proj.weight'][:, 2 * 2 + 1]
    )
    np.testing.assert_array_equal(
        params['patches']['embed']['kernel'][1, 0, 2],
        arrays['patch_embed.proj.weight'][:, 2, 1, 0],
    )
    np.testing.assert_array_equal(
        params['posemb']['grid'][2, 5], arrays['pos_embed'][0, 1 + 2 * 6 + 5]
    )
    np.testing.assert_array_equal(
        params['posemb']['prefix'][0], arrays['pos_embed'][0, 0]
    )
    np.testing.assert_array_equal(
        params['head']['logits']['kernel'], arrays['head.weight'].T
    )
    expected = flatten_dict(
        jax.eval_shape(small_vit().init, jax.random.key(0), jnp.zeros((1, *SIZE, 3))),
        sep='/',
    )
    assert set(report.loaded) == expected.keys()
    assert {k: x.shape for k, x in flatten_dict(variables, sep='/').items()} == {
        k: x.shape for k, x in expected.items()
    }
    assert not {**report.resized, **report.initialised, **report.ignored}
    assert report.notes == ()


def reports_once(report, variables):
    """Every leaf of the model is in one list, and in one only."""
    lists = [*report.loaded, *report.resized, *report.initialised]
    assert sorted(lists) == sorted(flatten_dict(variables, sep='/'))
    text = str(report)
    assert all(leaf in text for leaf in lists)
    return report


def test_positions_are_resized_from_the_grid_of_the_file(write):
    arrays = small_arrays(grid=(2, 12))  # as many as the model's 4x6
    rows = np.repeat(np.arange(2.0), 12)  # position = its row
    arrays['pos_embed'][0, 1:] = rows[:, None]
    variables, report = load(write(arrays, grid=[2, 12]))
    grid = variables['params']['posemb']['grid']
    assert grid.shape == (4, 6, D)
    np.testing.assert_allclose(
        grid, np.broadcast_to(grid[:, :1, :1], grid.shape), atol=1e-6
    )
    assert np.all(np.diff(grid[:, 0, 0]) > 0)
    assert report.resized == {'params/posemb/grid': '2x12 -> 4x6'}
    reports_once(report, variables)


def test_equal_grids_are_not_touched(write):
    arrays = small_arrays()
    variables, report = load(write(arrays), grid=(4, 6))
    grid = variables['params']['posemb']['grid']
    np.testing.assert_array_equal(grid.reshape(-1, D), arrays['pos_embed'][0, 1:])
    assert not report.resized


def test_a_square_is_assumed_aloud_and_only_where_nothing_else_is_as_likely(write):
    path = write(small_arrays(grid=(6, 6)))
    _, report = load(path)
    assert report.resized == {'params/posemb/grid': '6x6 -> 4x6'}
    (note,) = report.notes
    assert 'pos_embed: the file does not tell its grid, 6x6 is assumed' in note
    # 36 positions for a grid of 4x9: theirs, or a square?
    assert 'may be 4x9' in refuses(path, size=(8, 18))
    assert load(path, size=(8, 18), grid=(6, 6))[1].resized
    assert not load(path, size=(8, 18), grid=(4, 9))[1].resized
    assert 'may be 4x6' in refuses(write(small_arrays()))
    # 25 positions, of 4x6 and a class token: not of 5x5 alone.
    assert '25 positions' in refuses(write(small_arrays()), size=(8, 10))


def test_a_grid_that_is_not_that_of_the_positions(write):
    message = refuses(write(small_arrays(grid=(4, 4)), grid=[4, 6]))
    assert '17 positions' in message
    assert '4x6' in message


def test_positions_of_the_grid_alone_leave_the_prefix_zero(write):
    arrays = small_arrays()
    arrays['pos_embed'] = arrays['pos_embed'][:, 1:]
    variables, report = load(write(arrays, grid=[4, 6]))
    np.testing.assert_array_equal(variables['params']['posemb']['prefix'], 0)
    assert list(report.initialised) == ['params/posemb/prefix']
    reports_once(report, variables)


def test_a_new_head_is_that_of_a_fresh_model(write):
    model = small_vit(num_classes=5, head_init=jax.nn.initializers.normal(1.0))
    rng = jax.random.key(3)
    variables, report = load(
        write(small_arrays(), grid=[4, 6]), model, new_head=True, rng=rng
    )
    fresh = model.init({'params': rng}, jnp.zeros((1, *SIZE, 3)))
    ours = variables['params']['head']['logits']
    np.testing.assert_array_equal(
        ours['kernel'], fresh['params']['head']['logits']['kernel']
    )
    assert report.ignored.keys() == {'head.weight', 'head.bias'}
    assert report.initialised.keys() == {
        'params/head/logits/kernel',
        'params/head/logits/bias',
    }
    reports_once(report, variables)


def test_a_new_head_leaves_the_old_one_where_the_classes_are_as_many(write):
    variables, _ = load(write(small_arrays(), grid=[4, 6]), new_head=True)
    np.testing.assert_array_equal(variables['params']['head']['logits']['kernel'], 0)


def test_a_head_of_other_classes_is_refused_with_the_way_out(write):
    message = refuses(write(small_arrays(), grid=[4, 6]), small_vit(num_classes=5))
    assert 'head.weight is 7x6 in the file, the model needs 5x6' in message
    assert 'new_head=True' in message


def test_a_file_without_a_head(write):
    arrays = small_arrays()
    del arrays['head.weight'], arrays['head.bias']
    path = write(arrays, grid=[4, 6])
    message = refuses(path)
    assert 'params/head/logits/bias, params/head/logits/kernel' in message
    assert 'new_head=True' in message
    assert load(path, new_head=True)[1].initialised
    assert not load(path, small_vit(num_classes=None))[1].initialised


def test_a_model_without_a_head_leaves_that_of_the_file(write):
    path = write(small_arrays(), grid=[4, 6])
    variables, report = load(path, small_vit(num_classes=None))
    assert report.ignored.keys() == {'head.weight', 'head.bias'}
    assert set(report.ignored.values()) == {'the model has no head'}
    reports_once(report, variables)


def test_what_one_side_lacks_is_named_for_both(write):
    arrays = small_arrays()
    arrays['blocks.1.norm1.weight'] = arrays['norm.weight']
    del arrays['blocks.0.mlp.fc1.bias']
    message = refuses(write(arrays, grid=[4, 6]))
    assert 'the file has blocks.1.norm1.weight' in message
    assert 'the model has params/block00/mlp/fc1/bias' in message
    assert 'new_head' not in message
    assert 'weights.bin' in message


def test_a_name_that_no_table_has(write):
    arrays = {**small_arrays(), 'blocks.0.attn.mystery': np.zeros(3, np.float32)}
    assert 'blocks.0.attn.mystery' in refuses(write(arrays, grid=[4, 6]))
    path = write({'a.b': np.zeros(3, np.float32)})
    assert 'weights of no model that is known here: a.b' in refuses(path)


def test_two_arrays_for_one_leaf(write):
    arrays = small_arrays()
    query = arrays['blocks.0.attn.qkv.weight'][:D].copy()
    arrays['blocks.0.attn.q.weight'] = query
    message = refuses(write(arrays, grid=[4, 6]))
    assert 'blocks.0.attn.q.weight' in message
    assert 'for one params/block00/attention/query/kernel' in message


def test_another_size_of_model(write):
    path = write(small_arrays(), grid=[4, 6])
    message = refuses(path, small_vit(mlp_dim=11))
    assert 'fc1.weight is 10x6 in the file, the model needs 11x6' in message
    assert 'new_head' not in message
    message = refuses(path, small_vit(mlp_dim=11, num_classes=5))
    assert 'new_head' not in message


@pytest.mark.parametrize('dtype', [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_precisions_are_cast_and_said(write, dtype):
    arrays = small_arrays()
    exact = load(write(arrays, grid=[4, 6]))[0]
    arrays['norm.weight'] = arrays['norm.weight'].astype(dtype)
    variables, report = load(write(arrays, grid=[4, 6]))
    (note,) = report.notes
    assert note == f"1 array(s) of the file are {np.dtype(dtype)}, cast to the model's"
    ours = variables['params']['head']['norm']['scale']
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(
        ours, exact['params']['head']['norm']['scale'], rtol=1e-2
    )


def test_what_is_opened_is_not_opened_again(write):
    path = write(small_arrays(), grid=[4, 6])
    expected, _ = load(path)
    source = open_source(path)
    path.unlink()
    with pytest.raises(UserError, match='no such file'):
        load(path)
    path.touch()  # mapped already, and not asked for by name
    found, report = load(source)
    assert report.source.startswith(str(path))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_whole_numbers_are_no_weights(write):
    arrays = small_arrays()
    arrays['norm.weight'] = np.ones(D, np.int32)
    assert 'norm.weight is of int32' in refuses(write(arrays, grid=[4, 6]))


def test_values_that_are_not_finite_are_named(write):
    arrays = small_arrays()
    arrays['norm.bias'][2] = np.nan
    arrays['head.bias'][0] = np.inf
    report = load(write(arrays, grid=[4, 6]))[1]
    (note,) = report.notes
    assert 'warning' in note
    assert note.endswith(' in params/head/logits/bias, params/head/norm/bias')


def test_each_device_gets_its_slice(write):
    arrays = small_arrays()
    mesh = Mesh(np.asarray(jax.devices()[:2]), ('model',))
    path = write(arrays, grid=[4, 6])
    for spec in (PartitionSpec(), PartitionSpec(None)):
        variables, _ = load(path, sharding=NamedSharding(mesh, spec))
        leaf = variables['params']['head']['logits']['kernel']
        assert leaf.sharding == NamedSharding(mesh, spec)
        assert len(leaf.addressable_shards) == 2
        np.testing.assert_array_equal(leaf, arrays['head.weight'].T)


def test_the_file_may_change_afterwards(write):
    arrays = small_arrays()
    path = write(arrays, grid=[4, 6])
    variables, _ = load(path)
    with path.open('r+b') as file:
        file.seek(-4 * D, 2)
        file.write(b'\0' * 4 * D)
    for name in ('weight', 'bias'):
        leaf = {'weight': 'kernel', 'bias': 'bias'}[name]
        np.testing.assert_array_equal(
            variables['params']['head']['logits'][leaf], arrays[f'head.{name}'].T
        )


def test_load_params_is_for_models_of_parameters_alone(write):
    path = write(small_arrays(), grid=[4, 6])
    params, _ = load_params(path, small_vit(), SIZE)
    assert 'block00' in params
    model = ResNet(num_classes=3, stage_sizes=(1,), width=4, bottleneck=False)
    rng = np.random.default_rng(0)
    shapes = {'conv1.weight': (4, 3, 7, 7), 'fc.weight': (3, 4), 'fc.bias': (3,)}
    for n in (1, 2):
        shapes[f'layer1.0.conv{n}.weight'] = (4, 4, 3, 3)
    for norm in ('bn1', 'layer1.0.bn1', 'layer1.0.bn2'):
        for leaf in ('weight', 'bias', 'running_mean', 'running_var'):
            shapes[f'{norm}.{leaf}'] = (4,)
        shapes[f'{norm}.num_batches_tracked'] = ()
    arrays = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    path = write(arrays)
    variables, report = load_variables(path, model, 32)
    np.testing.assert_array_equal(
        variables['batch_stats']['stage1_block1']['norm2']['var'],
        arrays['layer1.0.bn2.running_var'],
    )
    assert set(report.ignored.values()) == {'a counter'}
    with pytest.raises(UserError, match='batch_stats'):
        load_params(path, model, 32)


def test_what_the_weights_were_trained_with_is_compared(tmp_path):
    about = {'model': {'grid': [4, 6], 'activation': 'gelu_tanh'}}
    path = tmp_path / 'x'
    save_file(small_arrays(), path, metadata={'vit_jax': json.dumps(about)})
    (note,) = load(path)[1].notes
    assert "trained with activation='gelu_tanh', the model has 'gelu'" in note
    assert load(path, small_vit(activation='gelu_tanh'))[1].notes == ()


def test_other_heads_are_refused(tmp_path):
    """Shapes do not show them."""
    about = {'model': {'grid': [4, 6], 'num_heads': 2}}
    path = tmp_path / 'x'
    save_file(small_arrays(), path, metadata={'vit_jax': json.dumps(about)})
    assert 'of a model with 2 heads, this one has 3: pass num_heads=2' in refuses(path)
    assert load(path, small_vit(num_heads=2))[1].loaded


def test_google_computes_the_other_gelu(tmp_path):
    variables = load_from(small_arrays(), tmp_path)
    arrays = to_published(variables, '.npz').arrays
    np.savez(tmp_path / 'x', **arrays)
    path = tmp_path / 'x.npz'
    (note,) = load(path, grid=(4, 6))[1].notes
    assert "trained with activation='gelu_tanh', the model has 'gelu'" in note
    assert load(path, small_vit(activation='gelu_tanh'), grid=(4, 6))[1].notes == ()


def load_from(arrays, tmp_path):
    save_file(arrays, tmp_path / 'y')
    return load(tmp_path / 'y', grid=(4, 6))[0]


def test_each_leaf_may_have_its_sharding(write):
    mesh = Mesh(np.asarray(jax.devices()[:2]), ('model',))

    def place(leaf, shape):
        rows = 'model' if leaf.endswith('fc1/kernel') else None
        return NamedSharding(mesh, PartitionSpec(rows))

    arrays = small_arrays()
    path = write(arrays, grid=[4, 6])
    params = load(path, sharding=place)[0]['params']
    kernel = params['block00']['mlp']['fc1']['kernel']
    assert [s.data.shape for s in kernel.addressable_shards] == [(D // 2, F)] * 2
    np.testing.assert_array_equal(kernel, arrays['blocks.0.mlp.fc1.weight'].T)
    whole = params['block00']['mlp']['fc2']['kernel']
    assert [s.data.shape for s in whole.addressable_shards] == [(F, D)] * 2
    mesh = Mesh(np.asarray(jax.devices()[:4]), ('model',))
    message = refuses(path, sharding=NamedSharding(mesh, PartitionSpec('model')))
    assert 'params/' in message
    assert 'cannot lie as' in message


def test_gpsa_needs_nothing_for_another_size(write):
    model = build_model('ConViT-Ti/16', 3, depth=2, num_local_layers=1)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    from vit_jax.pretrained.formats import TIMM
    from vit_jax.pretrained.naming import rename

    arrays = rename(TIMM, jax.device_get(flatten_dict(variables, sep='/')))
    loaded, report = load_variables(write(arrays, grid=[2, 2]), model, (48, 32))
    assert report.resized == {'params/posemb/grid': '2x2 -> 3x2'}
    image = jax.random.normal(jax.random.key(1), (2, 48, 32, 3))
    assert model.apply(loaded, image).shape == (2, 3)
    for path, leaf in flatten_dict(variables, sep='/').items():
        if path != 'params/posemb/grid':
            np.testing.assert_array_equal(leaf, flatten_dict(loaded, sep='/')[path])
