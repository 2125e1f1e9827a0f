import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from vit_jax.build import build
from vit_jax.config import default_config
from vit_jax.layers.local_attention import LocalAttention
from vit_jax.models import build_model
from vit_jax.models.convit import ConViT
from vit_jax.models.resnet import ResNet
from vit_jax.models.vit import ViT
from vit_jax.summary import (
    OTHER,
    Cost,
    count,
    count_params,
    step_flops,
    summarize,
    total,
)

# A grid of 2 x 3 and a class token: 7 tokens of width 8.
T, D, F, V = 7, 8, 12, 5
IMAGE = (8, 12, 3)
FIELDS = {
    'num_classes': V,
    'patch_size': 4,
    'width': D,
    'depth': 2,
    'mlp_dim': F,
    'num_heads': 2,
}


def linear(inputs, outputs):
    return inputs * outputs + outputs


def test_costs_of_a_vit_by_hand():
    costs = summarize(ViT(**FIELDS), IMAGE)
    assert list(costs) == [
        'patches',
        'class_token',
        'posemb',
        'block00',
        'block01',
        'head',
    ]
    attention = 4 * linear(D, D)
    mlp = linear(D, F) + linear(F, D)
    norm = 2 * D
    params = {
        'patches': linear(4 * 4 * 3, D),
        'class_token': D,
        'posemb': T * D,
        'block00': attention + mlp + 2 * norm,
        'block01': attention + mlp + 2 * norm,
        'head': norm + linear(D, V),
    }
    block_macs = T * 4 * D * D + 2 * T * T * D + 2 * T * D * F
    macs = {
        'patches': 6 * 4 * 4 * 3 * D,
        'class_token': 0,
        'posemb': 0,
        'block00': block_macs,
        'block01': block_macs,
        'head': D * V,
    }
    assert {name: cost.params for name, cost in costs.items()} == params
    assert {name: cost.macs for name, cost in costs.items()} == macs


def test_blocks_are_in_the_order_of_the_forward_pass():
    """ConViT's class token joins after the GPSA blocks."""
    model = ConViT(**{**FIELDS, 'num_heads': 4, 'depth': 3, 'num_local_layers': 2})
    assert list(summarize(model, IMAGE)) == [
        'patches',
        'posemb',
        'block00',
        'block01',
        'class_token',
        'block02',
        'head',
    ]


@pytest.mark.parametrize(
    ('name', 'params', 'macs'),
    [('ConViT-Ti/16', 5.72e6, 1.26e9), ('DeiT-S/16', 22.05e6, 4.6e9)],
)
def test_costs_of_published_models(name, params, macs):
    costs = summarize(build_model(name, 1000), (224, 224, 3))
    cost = total(costs)
    assert cost.params == pytest.approx(params, rel=0.01)
    assert cost.macs == pytest.approx(macs, rel=0.01)
    variables = jax.eval_shape(
        build_model(name, 1000).init, jax.random.key(0), jnp.zeros((1, 224, 224, 3))
    )
    assert cost.params == count_params(variables['params'])


class Conv(nn.Module):
    @nn.compact
    def __call__(self, image, *, train=False):
        x = nn.Conv(6, (3, 5), strides=2, feature_group_count=2, name='conv')(image)
        x = nn.ConvTranspose(7, (2, 2), strides=(2, 2), name='up')(x)
        return jnp.einsum('bhwc,bhwd->bcd', x, x)


def test_costs_of_convolutions_and_products():
    """Groups see their share of the channels; the product is of no module."""
    costs = summarize(Conv(), (10, 14, 4))
    assert costs['conv'].macs == (5 * 7) * 3 * 5 * 2 * 6
    assert costs['conv'].params == 3 * 5 * 2 * 6 + 6
    assert costs['up'].macs == (5 * 7) * 2 * 2 * 6 * 7  # each position makes four
    assert costs[OTHER].macs == 7 * 7 * 10 * 14
    assert costs[OTHER].params == 0
    assert list(costs) == ['conv', 'up', OTHER]


class Loop(nn.Module):
    @nn.compact
    def __call__(self, image, *, train=False):
        return Body(name='body')(image)


class Body(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param('kernel', nn.initializers.ones, (3, 3))

        def once(x, _):
            return jax.nn.relu(jax.checkpoint(jnp.dot)(x, kernel)), None

        return jax.lax.scan(once, x, length=7)[0]


def test_loops_count_as_often_as_they_run():
    """Also within functions that JAX calls: relu, checkpoint."""
    costs = summarize(Loop(), (5, 3))
    assert costs['body'].macs == 7 * 5 * 3 * 3
    assert costs['body'].params == 9


class Sines(nn.Module):
    @nn.compact
    def __call__(self, image, *, train=False):
        for i, width in enumerate((5, 7)):
            image = Sine(width, name=f'sine{i}')(image)
        return nn.Dense(2, name='head')(image)


class Sine(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        return jnp.sin(nn.Dense(self.width)(x))


def test_activations_are_what_the_backward_pass_needs():
    """Of a sine the cosine, and of the next product its input; not the image.

    Eleven rows of float32. Nothing is kept of the last product's result.
    """
    costs = summarize(Sines(), (11, 3))
    kept = {name: cost.activation_bytes for name, cost in costs.items()}
    assert kept == {'sine0': 11 * 2 * 5 * 4, 'sine1': 11 * 2 * 7 * 4, 'head': 0}


def test_activations_grow_with_the_image_and_parameters_do_not():
    model = ViT(**{**FIELDS, 'posemb': 'sincos2d', 'pool': 'mean'})
    small, large = (summarize(model, (8, 4 * n, 3)) for n in (4, 8))
    for name in ('block00', 'block01'):
        assert small[name].activation_bytes > 8 * D * 4
        ratio = large[name].activation_bytes / small[name].activation_bytes
        assert 2 <= ratio < 4  # tokens twice, pairs of tokens four times
        assert large[name].params == small[name].params
    assert total(large).params == total(small).params


def test_total_is_the_sum():
    costs = {'a': Cost(2, 3, 5), 'b': Cost(7, 11, 13)}
    assert total(costs) == Cost(9, 14, 18)


def test_count_params():
    tree = {
        'a': jnp.zeros((3, 5)),
        'b': [jnp.zeros(()), jax.ShapeDtypeStruct((7,), int)],
    }
    assert count_params(tree) == 15 + 1 + 7


@pytest.mark.parametrize('kernel_size', [3, 7])
def test_local_attention_counts_what_it_multiplies(kernel_size):
    width, heads, positions = 8, 2, 6 * 10

    class Net(nn.Module):
        @nn.compact
        def __call__(self, image, *, train=False):
            layer = LocalAttention(width, num_heads=heads, kernel_size=kernel_size)
            return layer(image, train=train)

    (cost,) = summarize(Net(), (6, 10, width)).values()
    maps = 3 * positions * width * width
    # By a row and a column table, each for half of the channels.
    positional = 2 * positions * (width // 2) * kernel_size
    neighbours = 2 * positions * width * kernel_size**2  # q k, and weights v
    assert cost.macs == maps + positional + neighbours


def test_costs_of_a_resnet_with_its_statistics_and_its_stem():
    model = ResNet(V, stage_sizes=(1,), width=8, bottleneck=False, stem='small')
    costs = summarize(model, (4, 6, 3))
    assert set(costs) == {'stem', 'stem_norm', 'stage1_block1', 'head', OTHER}
    assert costs['stem'].params == 9 * 3 * 8
    assert costs['stem'].macs == 24 * 9 * 3 * 8
    assert costs['stem_norm'].params == 2 * 8  # running statistics are none
    assert costs['stage1_block1'].macs == 2 * 24 * 9 * 8 * 8
    assert costs[OTHER].macs == 0


def test_costs_of_both_nets_of_a_gan():
    """An image of 4x4 is made of a latent, and one is judged."""

    def products(positions, *kernels):
        """Of each kernel (inputs, outputs), its largest singular value included."""
        return sum(positions * d * f + 3 * d * f + f for d, f in kernels)

    model = build_model(
        'SAGAN',
        None,
        image_shape=(4, 4, 1),
        latent_dim=5,
        generator_widths=(3,),
        discriminator_widths=(2,),
        attention=False,
    )
    costs = summarize(model, (4, 4, 1))
    macs = {
        'generator': products(1, (5, 2 * 2 * 3))
        + products(4 * 4, (9 * 3, 3), (9 * 3, 3), (9 * 3, 1)),
        'discriminator': products(4 * 4, (9 * 1, 2), (9 * 2, 2), (1, 2))
        + products(1, (2, 1)),
    }
    assert {name: cost.macs for name, cost in costs.items()} == macs
    assert costs['generator'].activation_bytes > 4 * 4 * 3 * 4
    assert count(model, (4, 4, 1)) == (total(costs).params, total(costs).macs)


# --- A step -------------------------------------------------------------------

B, P, H, Z = 16, 5 * 5 * 3, 11, 13  # batch, pixels, hidden units, size of latents


def make_run(task='classify', **values):
    config = default_config(task)
    config.model.name = 'MLP'
    config.model.kwargs = {'widths': (H,)}
    config.dataset.name = 'synthetic:size=5,channels=3,num_examples=37,num_classes=5'
    config.batch_size = B
    config.num_steps = 3
    for key, value in values.items():
        config.update_from_flattened_dict({key: value})
    return build(config)


@pytest.mark.parametrize(
    'values',
    [{}, {'accum_steps': 2}, {'parallel.mode': 'pmap'}, {'optim.ema_decay': 0.9}],
)
def test_a_step_is_its_products(values):
    """Forward, the gradients of both kernels, and of the hidden layer."""
    macs = B * (2 * P * H + 3 * H * V)
    assert step_flops(make_run(**values)) == 2 * macs


def test_what_is_frozen_has_no_gradients():
    run = make_run(**{'optim.freeze': ('fc0',)})
    assert step_flops(run) == 2 * B * (P * H + 2 * H * V)


def test_what_is_computed_again_is_not_counted():
    def make_vit(remat, **kwargs):
        kwargs |= {'width': 8, 'depth': 1, 'mlp_dim': 12, 'num_heads': 2}
        model = {'model.name': 'ViT-Ti/5', 'model.kwargs': kwargs}
        return make_run(**model, **{'parallel.remat': remat})

    plain, again = make_vit('none'), make_vit('full', attention_impl='chunked')
    assert step_flops(plain) == step_flops(again)


class Nets(nn.Module):
    """A generator and a discriminator, each a product."""

    num_classes: int | None = None
    latent_dim: int = Z
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.generator, self.discriminator = nn.Dense(P), nn.Dense(1)

    def generate(self, latent, *, train=False):
        return self.generator(latent).reshape(-1, 5, 5, 3)

    def __call__(self, image, *, train=False):
        if self.is_initializing():
            self.generate(jnp.zeros((1, Z)))
        return self.discriminator(image.reshape(-1, P))[:, 0]


def test_a_step_of_two_nets():
    """An image is made, it and a real one are judged, it once more; then backwards.

    The discriminator's kernel has a gradient by both images. The made one has its own
    by the last judgement alone, and the generator's kernel by that.
    """
    run = make_run('gan', **{'model.name': 'test_summary:Nets', 'model.kwargs': {}})
    forward = Z * P + 2 * P + P
    backward = 2 * P + P + Z * P
    assert step_flops(run) == 2 * B * (forward + backward)
