"""Every naming of weights: models of public libraries read, and their names written.

See golden/README.md for where the numbers come from.
"""

import math
import operator
import pathlib
import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from vit_jax.models.convit import ConViT
from vit_jax.models.resnet import ResNet
from vit_jax.models.vit import ViT
from vit_jax.pretrained import formats, load_variables, naming
from vit_jax.pretrained.formats import (
    FORMATS,
    GOOGLE_BIT,
    GOOGLE_VIT,
    HUGGING_FACE,
    HUGGING_FACE_RESNET,
    TIMM,
    TIMM_BIT,
    TORCHVISION,
)
from vit_jax.pretrained.naming import Positions, fill, find_places, parse, rename

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
PREFIX = 'params/posemb/prefix'


class Case(NamedTuple):
    """A model of a public library, its arrays under their own names.

    Attributes:
      format: the table of these names.
      model: ours.
      arrays: theirs, by name.
      image, out: `[B, height, width, channels]`, and what their model makes of it.
      grid: of the learned positions, of which only square ones are found out.
      ignored: names that are no weights of the model.
      initialised: paths that the file lacks.
    """

    format: naming.Format
    model: nn.Module
    arrays: dict[str, np.ndarray]
    image: np.ndarray
    out: np.ndarray
    grid: tuple[int, int] | None = None
    ignored: tuple[str, ...] = ()
    initialised: tuple[str, ...] = ()


def golden(name):
    with np.load(GOLDEN / name, allow_pickle=False) as arrays:
        return unflatten_dict(dict(arrays), sep='/')


def make_case(format, model, recorded, grid=None, **more):
    arrays = recorded.get('arrays') or recorded['params']
    image = recorded.get('image')
    image = recorded['inputs']['image'] if image is None else image
    image = np.moveaxis(image, 1, -1)
    return Case(format, model, arrays, image, recorded['out'], grid, **more)


def vit(patch_size=(2, 4), num_classes=7, depth=2, mlp_dim=18, **fields):
    sizes = {'width': 12, 'num_heads': 3, 'mlp_dim': mlp_dim, 'depth': depth}
    return ViT(num_classes, patch_size=patch_size, **sizes, **fields)


def convit(**fields):
    sizes = {'width': 20, 'num_heads': 4, 'mlp_dim': 22, 'depth': 3}
    return ConViT(7, patch_size=2, num_local_layers=2, **sizes, **fields)


def epsilons(recorded):
    return {field: float(eps) for field, eps in recorded['eps'].items()}


def counters(recorded):
    return tuple(n for n in recorded['arrays'] if n.endswith('num_batches_tracked'))


def make_cases():
    theirs, tiny = golden('published.npz'), golden('models.npz')
    rectangle, scaled = (3, 5), {'layer_scale': 1.0}
    cases = {
        # timm
        'deit': make_case(TIMM, vit(), tiny['deit'], rectangle),
        'distilled': make_case(TIMM, vit(distilled=True), tiny['distilled'], rectangle),
        'dinov2': make_case(TIMM, vit(**scaled), tiny['dinov2'], rectangle),
        'registers': make_case(
            TIMM,
            vit(**scaled, num_registers=4),
            tiny['registers'],
            rectangle,
            initialised=(PREFIX,),
        ),
        'convit': make_case(TIMM, convit(), tiny['convit']),
        'convit_bias': make_case(TIMM, convit(qkv_bias=True), tiny['convit_bias']),
        'siglip': make_case(TIMM, vit(pool='map'), theirs['siglip'], rectangle),
    }
    for name, stage_sizes, grid in (
        ('hybrid', (2, 1), (2, 3)),
        ('hybrid_stem', (), (2, 3)),
    ):
        eps = epsilons(theirs[name])
        trunk = {'stage_sizes': stage_sizes, 'width': 8, 'num_groups': 4}
        trunk |= {'norm_eps': eps.pop('norm_eps'), 'standardize_eps': 0.0}
        model = vit(8, stem='resnet', stem_kwargs=FrozenDict(trunk), **eps)
        cases[name] = make_case(TIMM, model, theirs[name], grid)

    # ResNets
    for name, format, stage_sizes, fields in (
        ('resnet', TORCHVISION, (2, 1), {'width': 4}),
        ('resnet_basic', TORCHVISION, (1, 1), {'width': 4, 'bottleneck': False}),
        ('hf_resnet', HUGGING_FACE_RESNET, (2, 1), {'width': 4}),
        (
            'bit',
            TIMM_BIT,
            (2, 1),
            {
                'width': 8,
                'num_groups': 4,
                'preactivation': True,
                'norm': 'group',
                'standardize_eps': 0.0,
            },
        ),
    ):
        recorded = theirs[name]
        model = ResNet(7, stage_sizes, **fields, **epsilons(recorded))
        ignored = counters(recorded)
        cases[name] = make_case(format, model, recorded, ignored=ignored)

    # transformers
    for name, grid, fields in (
        ('hf_vit', rectangle, {}),
        ('hf_deit', rectangle, {'depth': 1, 'distilled': True}),
        ('hf_dinov2', None, {'depth': 1, **scaled}),
        ('hf_registers', None, {**scaled, 'num_registers': 4}),
    ):
        if grid is None:  # DINOv2
            fields |= {'patch_size': 2, 'num_classes': None, 'mlp_dim': 24}
        model = vit(**fields, **epsilons(theirs[name]))
        ignored = ('embeddings.mask_token',) if grid is None else ()
        cases[name] = make_case(
            HUGGING_FACE, model, theirs[name], grid, ignored=ignored
        )
    return cases | make_variations(cases)


def make_variations(cases):
    """The same models, as other files have them."""
    split = {}
    for name, x in cases['deit'].arrays.items():
        if '.qkv.' in name:
            for letter, part in zip('qkv', np.split(x, 3)):
                split[name.replace('.qkv.', f'.{letter}.')] = part
        else:
            split[name] = x

    # DINOv2's own files: the class token has a position, and pre-training a token.
    registers = cases['registers'].arrays
    tokens, positions = registers['cls_token'], registers['pos_embed']
    rng = np.random.default_rng(0)
    first = np.float32(rng.normal(size=tokens.shape))
    own = {k: x for k, x in registers.items() if k != 'reg_token'} | {
        'register_tokens': registers['reg_token'],
        'cls_token': tokens - first,
        'pos_embed': np.concatenate([first, positions], axis=1),
        'mask_token': first[0],
    }
    # DINO's teacher, as it was trained: with the head of its loss.
    loss_head = [
        f'head.mlp.{i}.{leaf}' for i in (0, 2, 4) for leaf in ('weight', 'bias')
    ]
    loss_head += ['head.last_layer.weight_g', 'head.last_layer.weight_v']
    own |= dict.fromkeys(loss_head, np.ones((5, 3), np.float32))

    hf_vit, hf_resnet = cases['hf_vit'].arrays, cases['hf_resnet']
    bare = operator.methodcaller('removeprefix', 'resnet.')
    pooler = {
        f'vit.pooler.dense.{leaf}': np.ones(shape, np.float32)
        for leaf, shape in (('weight', (12, 12)), ('bias', (12,)))
    }
    return {
        'split': cases['deit']._replace(arrays=split),
        'dinov2_own': cases['registers']._replace(
            arrays=own, ignored=('mask_token', *loss_head), initialised=()
        ),
        'parallel': cases['deit']._replace(
            arrays={f'module.{k}': x for k, x in cases['deit'].arrays.items()}
        ),
        'hf_vit_pooler': cases['hf_vit']._replace(
            arrays=hf_vit | pooler, ignored=tuple(pooler)
        ),
        **{
            f'{prefix}hf_{kind}': cases[f'hf_{kind}']._replace(
                arrays={prefix + k: x for k, x in cases[f'hf_{kind}'].arrays.items()},
                ignored=(f'{prefix}embeddings.mask_token',),
            )
            for kind, prefix in (
                ('dinov2', 'dinov2.'),
                ('registers', 'dinov2_with_registers.'),
            )
        },
        'bare_hf_resnet': hf_resnet._replace(
            arrays={bare(k): x for k, x in hf_resnet.arrays.items()},
            ignored=tuple(map(bare, hf_resnet.ignored)),
        ),
    }


CASES = make_cases()


def write(path, arrays):
    save_file({k: np.ascontiguousarray(x) for k, x in arrays.items()}, path)
    return path


def load(path, case, **kwargs):
    """The variables of a case by path, and the report."""
    size = case.image.shape[1:3]
    variables, report = load_variables(path, case.model, size, grid=case.grid, **kwargs)
    return flatten_dict(jax.device_get(variables), sep='/'), report


@pytest.mark.parametrize('name', CASES)
def test_published_model_gives_its_output(name, tmp_path):
    case = CASES[name]
    arrays, report = load(write(tmp_path / 'weights', case.arrays), case)
    assert case.format.name in report.source
    assert sorted(report.ignored) == sorted(case.ignored)
    assert sorted(report.initialised) == sorted(case.initialised)
    assert not report.resized
    assert set(report.loaded) == arrays.keys() - report.initialised
    # Each number of theirs is one of ours.
    count = sum(x.size for k, x in case.arrays.items() if k not in case.ignored)
    assert sum(arrays[path].size for path in report.loaded) == count
    out = jax.jit(case.model.apply)(unflatten_dict(arrays, sep='/'), case.image)
    # To 1e-5 of the largest: float32 sums differ in their order.
    tolerance = 1e-5 * np.abs(case.out).max()
    np.testing.assert_allclose(out, case.out, rtol=0, atol=tolerance)


def is_written(case):
    return case.format in (TIMM, TIMM_BIT, TORCHVISION)


# The names that are written are the first of several.
OTHER_NAMES = ('split', 'parallel', 'dinov2_own')


@pytest.mark.parametrize(
    'name', [k for k in CASES if is_written(CASES[k]) and k not in OTHER_NAMES]
)
def test_names_and_bits_are_written_back(name, tmp_path):
    case = CASES[name]
    arrays, report = load(write(tmp_path / 'weights', case.arrays), case)
    for path in report.initialised:
        del arrays[path]
    weights = {k: x for k, x in case.arrays.items() if k not in case.ignored}
    assert_same(rename(case.format, arrays), weights)


def assert_same(actual, expected):
    """The same names, shapes, dtypes and bits."""
    assert sorted(actual) == sorted(expected)
    for name, x in expected.items():
        assert actual[name].dtype == x.dtype, name
        np.testing.assert_array_equal(actual[name], x, err_msg=name, strict=True)


def test_other_names_of_the_same_numbers_are_the_same(tmp_path):
    deit, _ = load(write(tmp_path / 'deit', CASES['deit'].arrays), CASES['deit'])
    for name in ('split', 'parallel'):
        case = CASES[name]
        assert_same(load(write(tmp_path / name, case.arrays), case)[0], deit)


# Google's files. The keys are those that the published files have.

T, H = 6, 4  # tokens of a grid of 2x3, size of each of 3 heads
D, N, F, V = 12, 3, 18, 7


def google_encoder():
    """Key -> shape, path of ours."""
    keys = {
        'cls': ((1, 1, D), 'class_token/cls'),
        'Transformer/encoder_norm/scale': ((D,), 'head/norm/scale'),
        'Transformer/encoder_norm/bias': ((D,), 'head/norm/bias'),
        'pre_logits/kernel': ((D, 5), 'head/pre_logits/kernel'),
        'pre_logits/bias': ((5,), 'head/pre_logits/bias'),
        'head/kernel': ((5, V), 'head/logits/kernel'),
        'head/bias': ((V,), 'head/logits/bias'),
    }
    for i in range(2):
        theirs, ours = f'Transformer/encoderblock_{i}', f'block0{i}'
        for norm, ours_norm in (('LayerNorm_0', 'norm1'), ('LayerNorm_2', 'norm2')):
            for leaf in ('scale', 'bias'):
                path = f'{ours}/{ours_norm}/{leaf}'
                keys[f'{theirs}/{norm}/{leaf}'] = ((D,), path)
        attention = f'{theirs}/MultiHeadDotProductAttention_1'
        for name in ('query', 'key', 'value'):
            path = f'{ours}/attention/{name}'
            keys[f'{attention}/{name}/kernel'] = ((D, N, H), f'{path}/kernel')
            keys[f'{attention}/{name}/bias'] = ((N, H), f'{path}/bias')
        keys[f'{attention}/out/kernel'] = ((N, H, D), f'{ours}/attention/out/kernel')
        keys[f'{attention}/out/bias'] = ((D,), f'{ours}/attention/out/bias')
        mlp = f'{theirs}/MlpBlock_3'
        keys[f'{mlp}/Dense_0/kernel'] = ((D, F), f'{ours}/mlp/fc1/kernel')
        keys[f'{mlp}/Dense_0/bias'] = ((F,), f'{ours}/mlp/fc1/bias')
        keys[f'{mlp}/Dense_1/kernel'] = ((F, D), f'{ours}/mlp/fc2/kernel')
        keys[f'{mlp}/Dense_1/bias'] = ((D,), f'{ours}/mlp/fc2/bias')
    return keys


def google_vit():
    embedding = {
        'embedding/kernel': ((2, 4, 3, D), 'patches/embed/kernel'),
        'embedding/bias': ((D,), 'patches/embed/bias'),
    }
    return google_encoder() | embedding


def google_hybrid():
    """A root and two stages, of two units and of one."""
    keys = google_encoder() | {
        'embedding/kernel': ((1, 1, 64, D), 'patches/embed/kernel'),
        'embedding/bias': ((D,), 'patches/embed/bias'),
        'conv_root/kernel': ((7, 7, 3, 8), 'stem/stem/kernel'),
        'gn_root/scale': ((1, 1, 1, 8), 'stem/stem_norm/scale'),
        'gn_root/bias': ((1, 1, 1, 8), 'stem/stem_norm/bias'),
    }
    for s, b, before, width in ((1, 1, 8, 8), (1, 2, 32, 8), (2, 1, 32, 16)):
        theirs, ours = f'block{s}/unit{b}', f'stem/stage{s}_block{b}'
        convs = [
            ('conv1', 'gn1', 'conv1', 'norm1', (1, 1, before, width)),
            ('conv2', 'gn2', 'conv2', 'norm2', (3, 3, width, width)),
            ('conv3', 'gn3', 'conv3', 'norm3', (1, 1, width, 4 * width)),
        ]
        if b == 1:
            shape = (1, 1, before, 4 * width)
            convs.append(('conv_proj', 'gn_proj', 'shortcut', 'shortcut_norm', shape))
        for conv, norm, ours_conv, ours_norm, shape in convs:
            keys[f'{theirs}/{conv}/kernel'] = (shape, f'{ours}/{ours_conv}/kernel')
            for leaf in ('scale', 'bias'):
                path = f'{ours}/{ours_norm}/{leaf}'
                keys[f'{theirs}/{norm}/{leaf}'] = ((1, 1, 1, shape[-1]), path)
    return keys


def google_bit():
    conv = 'standardized_conv2d/kernel'
    keys = {
        f'resnet/root_block/{conv}': ((7, 7, 3, 8), 'stem/kernel'),
        'resnet/group_norm/gamma': ((64,), 'norm/scale'),
        'resnet/group_norm/beta': ((64,), 'norm/bias'),
        'resnet/head/conv2d/kernel': ((1, 1, 64, V), 'head/kernel'),
        'resnet/head/conv2d/bias': ((V,), 'head/bias'),
    }
    for s, b, before, width in ((1, 1, 8, 8), (1, 2, 32, 8), (2, 1, 32, 16)):
        theirs, ours = f'resnet/block{s}/unit0{b}', f'stage{s}_block{b}'
        for n, letter, size, inputs, outputs in (
            (1, 'a', 1, before, width),
            (2, 'b', 3, width, width),
            (3, 'c', 1, width, 4 * width),
        ):
            unit, norm = f'{theirs}/{letter}', f'{ours}/norm{n}'
            shape = (size, size, inputs, outputs)
            keys[f'{unit}/{conv}'] = (shape, f'{ours}/conv{n}/kernel')
            keys[f'{unit}/group_norm/gamma'] = ((inputs,), f'{norm}/scale')
            keys[f'{unit}/group_norm/beta'] = ((inputs,), f'{norm}/bias')
        if b == 1:
            shape = (1, 1, before, 4 * width)
            keys[f'{theirs}/a/proj/{conv}'] = (shape, f'{ours}/shortcut/kernel')
    return keys


TRUNK = FrozenDict(stage_sizes=(2, 1), width=8, num_groups=4)
# Published model -> keys, table, the model here, image, and timm's table of it.
GOOGLE: dict[str, tuple[dict, naming.Format, nn.Module, tuple, naming.Format]] = {
    'vit': (google_vit(), GOOGLE_VIT, vit(representation_size=5), (4, 12), TIMM),
    'hybrid': (
        google_hybrid(),
        GOOGLE_VIT,
        vit(8, stem='resnet', stem_kwargs=TRUNK, representation_size=5),
        (16, 24),
        TIMM,
    ),
    'bit': (google_bit(), GOOGLE_BIT, CASES['bit'].model, (13, 22), TIMM_BIT),
}


def make_google(kind):
    """Arrays by Google's keys, and by our paths."""
    keys = GOOGLE[kind][0]
    rng = np.random.default_rng(1)
    arrays = {k: np.float32(rng.normal(size=s)) for k, (s, _) in keys.items()}
    # A map of one pixel is a list of channels here.
    ours = {
        f'params/{path}': arrays[k].reshape(-1)
        if arrays[k].shape[:3] == (1, 1, 1)
        else arrays[k]
        for k, (_, path) in keys.items()
    }
    if kind == 'bit':
        kernel = arrays['resnet/head/conv2d/kernel']
        ours['params/head/kernel'] = kernel[0, 0]
    else:
        positions = np.float32(rng.normal(size=(1, 1 + T, D)))
        arrays['Transformer/posembed_input/pos_embedding'] = positions
        ours[PREFIX] = positions[0, :1]
        ours['params/posemb/grid'] = positions[0, 1:].reshape(2, 3, D)
    return arrays, ours


def load_google(path, kind):
    _, _, model, size, _ = GOOGLE[kind]
    grid = None if kind == 'bit' else (2, 3)
    variables, report = load_variables(path, model, size, grid=grid)
    return flatten_dict(jax.device_get(variables), sep='/'), report


@pytest.mark.parametrize(
    ('kind', 'prefix'), [(k, p) for k in GOOGLE for p in GOOGLE[k][1].prefixes]
)
def test_google_layout_lands_where_it_belongs(kind, prefix, tmp_path):
    format = GOOGLE[kind][1]
    arrays, ours = make_google(kind)
    path = tmp_path / 'published.npz'
    np.savez(path, **{prefix + k: x for k, x in arrays.items()})
    actual, report = load_google(path, kind)
    assert_same(actual, ours)
    assert format.name in report.source
    assert not {**report.resized, **report.initialised, **report.ignored}


@pytest.mark.parametrize('kind', GOOGLE)
def test_google_layout_is_written_back(kind):
    arrays, ours = make_google(kind)
    assert_same(rename(GOOGLE[kind][1], ours), arrays)


@pytest.mark.parametrize('kind', GOOGLE)
def test_google_weights_are_the_same_under_the_names_of_timm(kind, tmp_path):
    ours = make_google(kind)[1]
    arrays = rename(GOOGLE[kind][4], ours)
    actual, report = load_google(write(tmp_path / 'weights', arrays), kind)
    assert GOOGLE[kind][4].name in report.source
    assert_same(actual, ours)


# The tables.


def names_of(format):
    """All names that the tests above read in a format."""
    names = [n for c in CASES.values() if c.format is format for n in c.arrays]
    for kind, (_, google, _, _, timm) in GOOGLE.items():
        arrays, ours = make_google(kind)
        if google is format:
            names += [prefix + k for prefix in format.prefixes for k in arrays]
        if timm is format:
            names += rename(timm, ours)
    return names


def identify(format):
    return next(k for k, value in vars(formats).items() if value is format)


@pytest.mark.parametrize('format', FORMATS, ids=identify)
def test_every_row_is_of_some_model(format):
    names = {name.removeprefix('module.') for name in names_of(format)}
    touched, prefixes = set(), set()
    for prefix in format.prefixes:
        alone = format._replace(prefixes=(prefix,))
        places = find_places(alone, [n for n in names if n.startswith(prefix)])
        touched |= {place.rule for place in places.values()}
        if places:
            prefixes.add(prefix)
    untouched = [rule.theirs for rule in format.rules if rule not in touched]
    assert untouched == []
    assert prefixes == set(format.prefixes)
    for end in format.ignored:
        assert any(name.endswith(end) for name in names), end


@pytest.mark.parametrize('format', FORMATS, ids=identify)
def test_every_row_is_read_and_written_by_its_own_templates(format):
    numbers = {'i': 11, 's': 2, 'b': 10, 'n': 3}
    for rule in format.rules:
        letters = set(re.findall(r'\{(\w)', rule.theirs))
        used = {letter: numbers[letter] for letter in letters}
        name = fill(rule.theirs, used)
        assert parse(rule.theirs, name) == used
        place = find_places(format, [name])[name]
        assert place.rule is rule, 'an earlier row takes its name'
        for template, path in zip(rule.ours, place.paths, strict=True):
            assert parse(template, path) == used


LAYOUTS: dict[str, tuple[tuple[int, ...], Any]] = {
    # Our shape, and which number of ours theirs is, by its index.
    'SAME': ((2, 3), lambda x, i, j: x[i, j]),
    'FLAT': ((2, 3), lambda x, i: x[i // 3, i % 3]),
    'LINEAR': ((5, 2, 3), lambda x, i, j: x[j, i // 3, i % 3]),
    'LINEAR_IN': ((2, 3, 5), lambda x, i, j: x[j // 3, j % 3, i]),
    'CONV': ((2, 3, 5, 7), lambda x, o, i, r, c: x[r, c, i, o]),
    'CONV_HEAD': ((3, 5), lambda x, o, i, r, c: x[i, o]),
    'CONV_HEAD_LAST': ((3, 5), lambda x, r, c, i, o: x[i, o]),
    'MAP': ((5,), lambda x, *index: x[index[-1]]),
}


def test_every_layout_is_tried():
    layouts = {k for k, v in vars(naming).items() if isinstance(v, naming.Layout)}
    assert LAYOUTS.keys() == layouts
    used = {r.layout for f in FORMATS for r in f.rules if not isinstance(r, Positions)}
    assert used == {getattr(naming, name) for name in layouts}


@pytest.mark.parametrize('name', LAYOUTS)
def test_layouts_move_numbers_and_move_them_back(name):
    layout, (shape, of_ours) = getattr(naming, name), LAYOUTS[name]
    ours = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    theirs = layout.write(ours)
    assert theirs.shape == layout.shape(shape)
    for index in np.ndindex(theirs.shape):
        assert theirs[index] == of_ours(ours, *index)
    np.testing.assert_array_equal(layout.read(theirs, shape), ours, strict=True)
