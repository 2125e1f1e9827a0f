import jax
import jax.numpy as jnp
import pytest

from vit_jax.errors import UserError
from vit_jax.models import build_model
from vit_jax.param_groups import Group, decay_mask, group_params, map_paths
from vit_jax.param_groups import number_layers as number

SMALL = {'width': 8, 'depth': 2, 'mlp_dim': 12, 'num_heads': 4}


def shapes(name, image_shape=(4, 6, 3), **fields):
    model = build_model(name, 7, **fields)
    image = jnp.zeros((1, *image_shape))
    return jax.eval_shape(model.init, jax.random.key(0), image)['params']


# --- Which parameters decay -------------------------------------------------------

DECAYS = {'kernel', 'position_kernel'}


@pytest.mark.parametrize(
    ('name', 'fields', 'others'),
    [
        (
            'ConViT-Ti/2',
            {'num_local_layers': 1, 'qkv_bias': True},
            {'bias', 'scale', 'position_bias', 'gating', 'cls', 'grid'},
        ),
        ('ViT-Ti/2', {}, {'bias', 'scale', 'cls', 'prefix', 'grid'}),
        (
            'ViT-Ti/2',
            {'pool': 'map', 'representation_size': 5},
            {'bias', 'scale', 'probe', 'grid'},
        ),
        (
            'ViT-Ti/2',
            {'distilled': True, 'num_registers': 3, 'layer_scale': 0.1},
            {'bias', 'scale', 'cls', 'dist', 'tokens', 'prefix', 'grid'},
        ),
    ],
)
def test_kernels_decay_and_nothing_else(name, fields, others):
    params = shapes(name, **SMALL, **fields)
    found = {True: set(), False: set()}
    for path, decays in jax.tree_util.tree_leaves_with_path(decay_mask(params)):
        found[decays].add(path[-1].key)
    assert found[True] == (DECAYS if 'Con' in name else {'kernel'})
    assert found[False] == others


def test_a_decay_mask_has_the_form_of_the_parameters():
    params = {'conv0': {'kernel': 3}, 'norm0': {'scale': 5, 'bias': 7}}
    expected = {'conv0': {'kernel': True}, 'norm0': {'scale': False, 'bias': False}}
    assert decay_mask(params) == expected


# --- Layers -------------------------------------------------------------------------


def layers_of(params):
    """Module -> layer; the parameters of one module are of one layer."""
    layers = {}
    for name, layer in number(jax.tree.leaves(map_paths(str, params))).items():
        assert layers.setdefault(name.split('/')[0], layer) == layer
    return layers


def test_layers_of_a_transformer():
    params = shapes('DeiT-Ti/16-distilled', (32, 48, 3), **SMALL, num_registers=3)
    assert layers_of(params) == {
        'patches': 0,
        'class_token': 0,
        'posemb': 0,
        'registers': 0,
        'block00': 1,
        'block01': 2,
        'head': 3,
    }


def test_layers_of_a_hybrid_begin_after_its_stem():
    layers = layers_of(shapes('R+ViT-Ti/16', (32, 64, 3), **SMALL))
    names = {'stem', 'patches', 'class_token', 'posemb', 'block00', 'block01', 'head'}
    assert set(layers) == names
    assert {name for name in names if layers[name] == 0} == {
        'stem',
        'patches',
        'class_token',
        'posemb',
    }
    assert layers['block00'] == 1


@pytest.mark.parametrize(
    ('name', 'blocks', 'stem', 'last'),
    [
        ('ResNet-18', (2, 2, 2, 2), {'stem', 'stem_norm'}, {'head'}),
        ('BiT-R50x1', (3, 4, 6, 3), {'stem'}, {'head', 'norm'}),
    ],
)
def test_layers_of_a_resnet_count_through_its_stages(name, blocks, stem, last):
    expected = dict.fromkeys(stem, 0)
    for stage, count in enumerate(blocks, start=1):
        for block in range(1, count + 1):
            expected[f'stage{stage}_block{block}'] = (
                1 + sum(blocks[: stage - 1]) + (block - 1)
            )
    expected |= dict.fromkeys(last, sum(blocks) + 1)
    assert layers_of(shapes(name, (32, 48, 3))) == expected


def test_layers_of_the_plain_networks():
    assert layers_of(shapes('MLP')) == {'fc0': 1, 'fc1': 2, 'head': 3}
    layers = layers_of(shapes('CNN', (32, 48, 3)))
    assert layers['conv0'] == layers['norm0'] == 1
    assert layers['conv4'] == layers['norm4'] == 5
    assert layers['head'] == 6


def test_ten_layers_are_counted_not_spelt():
    names = [f'block{i}/kernel' for i in range(12)]
    assert list(number(names).values()) == list(range(1, 13))


def test_layers_of_an_unknown_module():
    with pytest.raises(UserError, match=r"layer of 'Dense_0': .* set optim\.rules"):
        group_params({'Dense_0': {'kernel': 0}}, layer_decay=0.5)


# --- Rules --------------------------------------------------------------------------

PARAMS = {
    'block00': {'mlp': {'kernel': 0, 'bias': 0}, 'gating': 0},
    'head': {'kernel': 0, 'bias': 0},
}


def test_the_first_pattern_that_is_found_counts():
    rules = [('mlp/k', 0.5, 3.0), ('^block', None, 0.0), ('kernel', 7.0, None)]
    assert group_params(PARAMS, rules=rules) == {
        'block00/mlp/kernel': Group(0.5, 3.0),
        'block00/mlp/bias': Group(1.0, 0.0),
        'block00/gating': Group(1.0, 0.0),
        'head/kernel': Group(7.0, 1.0),
        'head/bias': Group(1.0, 1.0),
    }


def test_rules_multiply_the_decay_of_layers():
    groups = group_params(PARAMS, layer_decay=0.5, rules=[('bias', 3.0, None)])
    assert groups['block00/mlp/bias'].learning_rate == 1.5
    assert groups['block00/gating'].learning_rate == 0.5
    assert groups['head/bias'].learning_rate == 3.0


def test_layers_are_counted_before_some_are_frozen():
    groups = group_params(PARAMS, layer_decay=0.5, freeze=['head', 'block00/gating'])
    assert groups['block00/mlp/bias'] == Group(0.5)
    assert [name for name, group in groups.items() if group.frozen] == [
        'block00/gating',
        'head/bias',
        'head/kernel',
    ]


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (
            {'rules': [('pos_embed', 0.1, 1.0)]},
            r"rules 'pos_embed' is found in no trained parameter, such as block00/gat",
        ),
        (
            {'rules': [('head', 0.1, 1.0), ('bias', 2.0, 1.0), ('head/b', 3.0, 1.0)]},
            r"'head/b' is found in no trained parameter that no rule before it is for",
        ),
        (
            {'rules': [('head', 0.1, 1.0)], 'freeze': ['head']},
            "'head' is found in no trained parameter, such as block00/gating",
        ),
        ({'rules': [('(head', 1.0, 1.0)]}, r"'\(head' is no regular expression: miss"),
        ({'rules': [('head', -1.0, 1.0)]}, 'must be 0 or more, or None, not -1.0'),
        ({'rules': [('head', 1.0, float('nan'))]}, 'must be 0 or more.* not nan'),
        ({'rules': [('head', 1.0, '2')]}, "must be 0 or more.* not '2'"),
        ({'rules': [('head', 2.0)]}, 'must be triples'),
        ({'rules': ('head', 2.0, 1.0)}, 'must be triples'),
        ({'rules': 'abc'}, 'must be triples'),
        ({'rules': [(3, 2.0, 1.0)]}, 'a pattern must be text, not 3'),
        (
            {'freeze': ['block00/', 'bias']},
            r"freeze 'bias' matches the start of no parameter, such as block00/gating",
        ),
        ({'freeze': ['**']}, r"freeze '\*\*' is no regular expression: nothing to"),
        ({'freeze': 'head'}, r"freeze must be patterns, \('head',\)"),
        ({'freeze': ['head', 'block']}, 'nothing to train: .* all 5 parameters'),
    ],
)
def test_patterns_that_cannot_be_meant(options, message):
    with pytest.raises(UserError, match=message) as error:
        group_params(PARAMS, **options)
    assert '\n' not in str(error.value)


def test_without_shapes_there_are_no_groups():
    assert group_params()['any/path'] == Group()
    with pytest.raises(ValueError, match='need the shapes'):
        group_params(freeze=['head'])
