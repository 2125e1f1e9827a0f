"""Residual networks against NumPy loops, with convolutions and with attention."""

import re

import conv_reference
import jax
import jax.numpy as jnp
import model_checks
import numpy as np
import numpy_reference as reference
import pytest
from flax import linen as nn

from vit_jax.axes import BATCH_AXIS, batch_mean, batch_sum
from vit_jax.errors import UserError
from vit_jax.models import build_model
from vit_jax.models.resnet import RESNETS, ResNet
from vit_jax.parallel import Parallel

B, V, W = 2, 7, 4
IMAGE = (B, 10, 22, 3)


def make_model(**kwargs):
    fields = {'num_classes': V, 'stage_sizes': (1, 2), 'width': W, 'num_groups': 2}
    return ResNet(**{**fields, **kwargs})


class Scale(nn.Module):
    """A spatial block of a fork: a 1x1 convolution, every s-th pixel kept."""

    features: int
    strides: int = 1
    dtype: jnp.dtype = jnp.float32
    bias: bool = False

    @nn.compact
    def __call__(self, x, *, train=False):
        s = self.strides
        return nn.Dense(self.features, self.bias, dtype=self.dtype)(x[:, ::s, ::s])


class Loops:
    """The forward pass in NumPy, for the fields of `model`."""

    def __init__(self, model, variables, train):
        self.model, self.train = model, train
        self.params = reference.float64(variables['params'])
        self.running = reference.float64(variables.get('batch_stats', {}))
        self.batch = {}  # statistics of the batch, by the path of the norm

    def conv(self, params, x, strides):
        kernel = params['kernel']
        if self.model.standardize_eps is not None:
            kernel = conv_reference.standardize(kernel, self.model.standardize_eps)
        return conv_reference.convolve(x, kernel, strides, self.model.padding)

    def norm(self, x, *path):
        params, running = self.params, self.running
        for name in path:
            params, running = params[name], running.get(name, {})
        eps = self.model.norm_eps
        if self.model.norm == 'group':
            return conv_reference.group_norm(params, x, self.model.num_groups, eps)
        axes = (0, 1, 2)
        self.batch[path] = {'mean': x.mean(axes), 'var': x.var(axes)}
        stats = self.batch[path] if self.train else running
        return conv_reference.batch_norm(params, x, **stats, eps=eps)

    def block(self, x, name, strides):
        params, pre = self.params[name], self.model.preactivation
        num_layers = 3 if self.model.bottleneck else 2
        strided = 2 if self.model.bottleneck else 1
        y = shortcut = x
        for i in range(1, num_layers + 1):
            if pre:
                y = np.maximum(self.norm(y, name, f'norm{i}'), 0)
            if pre and i == 1 and 'shortcut' in params:
                shortcut = self.conv(params['shortcut'], y, strides)
            y = self.conv(params[f'conv{i}'], y, strides if i == strided else 1)
            if not pre:
                y = self.norm(y, name, f'norm{i}')
                y = np.maximum(y, 0) if i < num_layers else y
        if pre:
            return shortcut + y
        if 'shortcut' in params:
            shortcut = self.conv(params['shortcut'], x, strides)
            shortcut = self.norm(shortcut, name, 'shortcut_norm')
        return np.maximum(shortcut + y, 0)

    def __call__(self, x):
        model = self.model
        x = self.conv(self.params['stem'], x, 2 if model.stem == 'conv' else 1)
        if not model.preactivation:
            x = np.maximum(self.norm(x, 'stem_norm'), 0)
        if model.stem == 'conv':
            x = conv_reference.max_pool(x, 3, 2, model.padding)
        for i, size in enumerate(model.stage_sizes, start=1):
            for j in range(1, size + 1):
                x = self.block(x, f'stage{i}_block{j}', 2 if i > 1 and j == 1 else 1)
        if model.preactivation:
            x = np.maximum(self.norm(x, 'norm'), 0)
        if model.pool == 'mean':
            x = x.mean(axis=(1, 2))
        return reference.linear(self.params['head'], x) if model.num_classes else x


TORCH = {'norm_eps': 0.1}  # BatchNorm, symmetric padding, plain kernels
BIT = {'norm': 'group', 'preactivation': True, 'standardize_eps': 0.0}
HYBRID = {
    'norm': 'group',
    'norm_eps': 0.1,
    'standardize_eps': 0.2,
    'padding': 'same',
    'pool': 'none',
    'num_classes': None,
}
SMALL = {'stem': 'small'}


@pytest.mark.parametrize('bottleneck', [False, True])
@pytest.mark.parametrize(
    ('fields', 'train'),
    [
        (TORCH, False),
        (TORCH, True),
        (SMALL, True),
        (BIT, False),
        (HYBRID, True),
    ],
)
def test_forward_pass_equals_the_loops(fields, bottleneck, train):
    model = make_model(bottleneck=bottleneck, **fields)
    (image,) = reference.random_arrays(0, IMAGE)
    variables = conv_reference.random_variables(model, IMAGE)
    out, updated = jax.jit(
        lambda v, x: model.apply(v, x, train=train, mutable=['batch_stats'])
    )(variables, jnp.asarray(image, jnp.float32))
    loops = Loops(model, variables, train)
    reference.assert_close(out, loops(image), 5e-5)
    assert len(loops.batch) == len(jax.tree.leaves(loops.running)) / 2
    for path, batch in loops.batch.items():
        old, new = loops.running, updated['batch_stats']
        for name in path:
            old, new = old[name], new[name]
        for name, value in batch.items():
            mixed = 0.9 * old[name] + 0.1 * value if train else old[name]
            reference.assert_close(new[name], mixed, 5e-5)


def train_pass(mode, num_devices):
    """Logits, running statistics and gradients of 16 unlike images."""
    model = make_model(stage_sizes=(1, 1), bottleneck=False)
    variables = conv_reference.random_variables(model, IMAGE)
    image, weights = reference.random_arrays(1, (16, 6, 10, 3), (16, V))
    image *= np.arange(1, 17)[:, None, None, None]  # devices see unlike statistics
    batch = {'image': np.float32(image), 'weights': np.float32(weights)}

    def step(variables, batch):
        def loss(params):
            out, updated = model.apply(
                {**variables, 'params': params},
                batch['image'],
                train=True,
                mutable=['batch_stats'],
            )
            return jnp.sum(jnp.tanh(out) * batch['weights']), (out, updated)

        grads, (out, updated) = jax.grad(loss, has_aux=True)(variables['params'])
        return out, {'stats': batch_mean(updated), 'grads': batch_sum(grads)}

    parallel = Parallel(mode, tuple(jax.devices()[:num_devices]))
    if mode == 'pmap':
        run = jax.pmap(
            step, axis_name=BATCH_AXIS, in_axes=(None, 0), out_axes=(0, None)
        )
    else:
        run = jax.jit(step)
    out, rest = run(variables, parallel.put(batch))
    return jax.device_get((out.reshape(16, V), rest))


@pytest.fixture(scope='module')
def on_one_device():
    return train_pass('jit', 1)


@pytest.mark.parametrize('mode', ['jit', 'pmap'])
def test_statistics_are_those_of_the_global_batch(on_one_device, mode):
    (out, rest), (expected, expected_rest) = train_pass(mode, 8), on_one_device
    reference.assert_close(out, expected)
    for name in ('stats', 'grads'):
        reference.assert_gradients_close(rest[name], expected_rest[name])


@pytest.mark.parametrize(
    ('fields', 'grid'),
    [
        ({}, (2, 3)),
        ({'stem': 'small'}, (5, 11)),
        ({'stage_sizes': (1, 1, 1)}, (1, 2)),
        ({'stage_sizes': ()}, (3, 6)),
        ({'padding': 'same'}, (2, 3)),
    ],
)
def test_map_is_kept_without_pooling(fields, grid):
    model = make_model(**fields, pool='none', num_classes=None)
    image = jax.ShapeDtypeStruct(IMAGE, jnp.float32)
    out = jax.eval_shape(model.init_with_output, jax.random.key(0), image)[0]
    assert out.shape[:3] == (B, *grid)
    logits = model.clone(num_classes=V)
    out = jax.eval_shape(logits.init_with_output, jax.random.key(0), image)[0]
    assert out.shape == (B, *grid, V)


@pytest.mark.parametrize('bottleneck', [False, True])
@pytest.mark.parametrize('stages', [(2,), (1, 3), (1, 2, 3)])
def test_only_the_3x3_convolutions_of_the_named_stages_are_replaced(bottleneck, stages):
    model = make_model(
        stage_sizes=(1, 2, 1),
        bottleneck=bottleneck,
        attention_stages=stages,
        attention=Scale,
        attention_kwargs={'bias': True},
    )
    params = reference.init_shapes(model, jnp.ones(IMAGE))
    spatial = {'conv2'} if bottleneck else {'conv1', 'conv2'}
    for stage, blocks in enumerate((1, 2, 1), start=1):
        for j in range(1, blocks + 1):
            block = params[f'stage{stage}_block{j}']
            replaced = {name for name in block if 'Dense_0' in block[name]}
            assert replaced == (spatial if stage in stages else set())
            for name in replaced:
                assert 'bias' in block[name]['Dense_0']


def test_block_with_a_forks_attention_equals_the_loops():
    """Its strides and its features are those of the convolution it replaces."""
    model = make_model(attention_stages=(2,), attention=Scale)
    (image,) = reference.random_arrays(0, IMAGE)
    variables = conv_reference.random_variables(model, IMAGE)
    out = jax.jit(model.apply)(variables, jnp.asarray(image, jnp.float32))
    # A 3x3 kernel whose centre alone is not zero sees every s-th pixel too.
    params = dict(variables['params'])
    for name in ('stage2_block1', 'stage2_block2'):
        block = dict(params[name])
        kernel = np.zeros((3, 3, 2 * W, 2 * W))
        kernel[1, 1] = block.pop('conv2')['Dense_0']['kernel']
        params[name] = {**block, 'conv2': {'kernel': jnp.asarray(kernel)}}
    loops = Loops(make_model(), {**variables, 'params': params}, train=False)
    reference.assert_close(out, loops(image), 5e-5)


def test_bfloat16_reaches_every_module():
    model = make_model(dtype=jnp.bfloat16, attention_stages=(2,), attention=Scale)
    float32 = ['', 'head']
    model_checks.check_dtype_reaches_every_module(model, IMAGE, float32)
    stem = make_model(**HYBRID, dtype=jnp.bfloat16)
    model_checks.check_dtype_reaches_every_module(stem, IMAGE, [])


def test_every_field_matters():
    def make(**kwargs):
        fields = {
            'norm': 'group',  # where the number of groups matters
            'width': 8,
            'attention_stages': (2,),
            'attention': Scale,
        }
        return make_model(**{**fields, **kwargs})

    others = {
        'num_classes': 5,
        'stage_sizes': (2, 1),
        'width': 4,
        'bottleneck': False,
        'preactivation': True,
        'norm': 'batch',
        'norm_eps': 1e-3,
        'num_groups': 1,
        'standardize_eps': 0.1,
        'padding': 'same',
        'stem': 'small',
        'attention_stages': (1,),
        'attention': 'global',
        'attention_kwargs': {'bias': True},
        'pool': 'none',
        'kernel_init': nn.initializers.ones,
        'dtype': jnp.bfloat16,
    }
    model_checks.check_every_field_matters(make, IMAGE, others)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'attention_stages': (0,)}, r'\(0,\) must be among the stages \(1, 2\)'),
        ({'attention_stages': (2, 3)}, r'\(2, 3\) must be among the stages \(1, 2\)'),
        ({'attention': 'local'}, "attention='local' .* need attention_stages, such as"),
        ({'attention_kwargs': {'num_heads': 2}}, 'need attention_stages, such as'),
        (
            {'attention_stages': (2,), 'attention_kwargs': {'features': 8}},
            "features of attention 'global' is set by the model",
        ),
        ({'attention': 'globl'}, "unknown attention 'globl'; did you mean 'global'"),
        (
            {'attention': Scale, 'attention_kwargs': {'bais': True}},
            "unknown field of attention .*Scale.* 'bais'; did you mean 'bias'",
        ),
        ({'attention': 3}, 'attention is a name .* or a callable.* got 3'),
        ({'attention_kwargs': 3}, 'its fields are a mapping; got .* and 3'),
        ({'norm': 'bach'}, "unknown norm 'bach'; did you mean 'batch'"),
        ({'stem': 'large'}, "unknown stem 'large'; choose one of: attention, conv"),
        ({'pool': 'cls'}, "unknown pool 'cls'; choose one of: mean, none"),
        ({'padding': 'valid'}, "unknown padding 'valid'; choose one of: same, sym"),
        (
            {'norm': 'group', 'num_groups': 3},
            'num_groups 3 does not divide the width 4',
        ),
    ],
)
def test_fields_that_do_not_fit_are_told(fields, message):
    with pytest.raises(UserError, match=message):
        reference.init_shapes(make_model(**fields), jnp.ones(IMAGE))


@pytest.mark.parametrize('stem', ['conv', 'small', 'attention'])
def test_other_images_than_the_parameters_are_told(stem):
    shape = (B, 8, 12, 3)
    model = make_model(stem=stem, width=8)
    variables = conv_reference.random_variables(model, shape)
    with pytest.raises(UserError, match='takes images of 3 channels; got 1'):
        jax.eval_shape(model.apply, variables, jnp.ones((*shape[:3], 1)))
    with pytest.raises(UserError, match=r'ResNet takes images \[B, h, w, channels\]'):
        jax.eval_shape(model.apply, variables, jnp.ones(shape[1:]))


def test_attention_stem_is_pooled_by_its_blocks():
    model = make_model(stem='attention', width=8, stage_sizes=())
    model = model.clone(num_classes=None, pool='none')
    shape = (B, 8, 20, 3)
    (image,) = reference.random_arrays(0, shape)
    variables = conv_reference.random_variables(model, shape)
    image = jnp.asarray(image, jnp.float32)
    out, state = model.apply(variables, image, capture_intermediates=True)
    x = reference.float64(state['intermediates']['stem']['__call__'][0])
    params, stats = (
        reference.float64(variables[name]['stem_norm'])
        for name in ('params', 'batch_stats')
    )
    x = np.maximum(conv_reference.batch_norm(params, x, **stats, eps=1e-5), 0)
    expected = x.reshape(B, 2, 4, 5, 4, 8).max(axis=(2, 4))
    reference.assert_close(out, expected)


def test_config_can_choose_attention_by_name_and_by_path():
    by_name = build_model('ResNet-50', 10, attention_stages=[3, 4], attention='local')
    assert by_name.attention_stages == (3, 4)
    by_path = build_model('ResNet-50', 10, attention=f'{__name__}:Scale')
    assert by_path.attention is Scale
    with pytest.raises(UserError, match="norm of ResNet-50 is like 'batch'"):
        build_model('ResNet-50', 10, norm=f'{__name__}:Scale')


def test_deep_names_have_the_depth_they_say():
    for name, fields in RESNETS.items():
        depth = int(re.search(r'\d+', name)[0])
        per_block = 3 if fields.get('bottleneck', True) else 2
        blocks = sum(fields.get('stage_sizes', ResNet.stage_sizes))
        assert per_block * blocks + 2 == depth, name
