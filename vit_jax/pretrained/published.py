"""What is known of published weights: their model, classes and preprocessing.

Everything is said as a checkpoint of this project says it, see `vit_jax.build`. The
names of ImageNet's classes are those of WordNet 3.0 (copyright 2006 by Princeton
University, all rights reserved; https://wordnet.princeton.edu), in the order of their
ids: the first lemma; where two classes share it, more lemmas or the hypernym too.
"""

import collections
import importlib.resources
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vit_jax.data.transforms import INTERPOLATIONS
from vit_jax.errors import unknown
from vit_jax.layers.patch import resolve_patch
from vit_jax.models import build_model
from vit_jax.models.resnet import RESNETS
from vit_jax.models.variants import FAMILIES, Size
from vit_jax.pretrained.metadata import default_class_names
from vit_jax.pretrained.zoo import ZOO

_AUGREG = re.compile(r'https://storage\.googleapis\.com/vit_models/augreg/(.+)')


def find_published(name: str) -> dict[str, Any] | None:
    """What is known of the weights at an address.

    Args:
      name: the whole address, of the Hub with or without file and revision; a file
        elsewhere that is called the same is not known.

    Returns:
      'model', 'class_names' and 'preprocessing', as in the metadata of a checkpoint;
      None for an address that is not in `ZOO`.

    >>> find_published('hf:timm/convit_tiny.fb_in1k')['model']['name']
    'ConViT-Ti/16'
    """
    address = name.partition('#')[0]  # what follows is a hash of the same file
    kind, _, rest = address.partition(':')
    address = f'{kind.lower()}:{rest}'
    # A revision of a repository, or one file of it, is of the same model.
    address = re.sub(r'^(hf:[^/@]+/[^/@]+)[/@].*', r'\1', address)
    address = _AUGREG.sub(r'augreg:\1', address)
    if address.startswith('augreg:'):
        address = address.removesuffix('.npz')
    row = next((row for row in ZOO if address in row.addresses), None)
    if row is None:
        return None
    size = [row.image_size] * 2
    mean, std = row.pixels
    return {
        'model': _describe(row.model, row.kwargs, row.num_classes, size),
        'class_names': _default_names(row.num_classes, row.class_names),
        'preprocessing': {
            'image_size': size,
            'channels': 3,
            'mean': list(mean),
            'std': list(std),
            'crop_fraction': row.crop_fraction,
            'interpolation': row.interpolation,
        },
    }


def class_names(dataset: str) -> tuple[str, ...]:
    """The names of a dataset's classes, by class number.

    Args:
      dataset: 'imagenet': the 1,000 classes of 2012, each behind its WordNet id.

    Raises:
      UserError: for another dataset.

    >>> class_names('imagenet')[207]
    'n02099601 golden retriever'
    """
    if dataset != 'imagenet':
        raise unknown('list of class names', dataset, ['imagenet'])
    folder = importlib.resources.files('vit_jax.pretrained')
    text = (folder / 'imagenet_classes.txt').read_text(encoding='utf-8')
    return tuple(text.splitlines())


def from_hugging_face(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a `config.json` says of the weights beside it.

    It describes the model of timm or transformers, which compute the exact GELU where
    they do not say otherwise, with weights that Google trained too; `find_published`
    knows better, by their address.

    Args:
      config: the JSON object, by whomever.

    Returns:
      As `find_published`, but without 'preprocessing' where the config does not say all
      of it (that of transformers never does); None for a model that is not known here,
      and for a config that is damaged.

    >>> from_hugging_face({'architecture': 'convit_tiny', 'num_classes': 0,
    ...     'pretrained_cfg': {'input_size': [3, 224, 256]}})['model']['grid']
    [14, 16]
    """
    read = _read_timm if 'architecture' in config else _read_transformers
    try:
        return read(config)
    except (KeyError, ValueError):  # something lacks, or is not what it should be
        return None


def model_facts(model: Any, image_size: Sequence[int]) -> dict[str, Any]:
    """What shapes do not tell: GELU, epsilon, heads, grid and prefix tokens.

    Args:
      model: the module; a fact that it does not have is left out.
      image_size: (height, width), or the axes of another signal; multiples of its
        patches.
    """
    fields = ('activation', 'layer_norm_eps', 'num_heads')
    facts = {k: getattr(model, k) for k in fields if hasattr(model, k)}
    if not hasattr(model, 'patch_size'):
        return facts
    patch = resolve_patch(model.patch_size, len(image_size))
    grid = [n // p for n, p in zip(image_size, patch)]
    prefix_tokens = getattr(model, 'num_prefix_tokens', 0)
    return {**facts, 'grid': grid, 'prefix_tokens': prefix_tokens}


def _describe(
    name: str,
    kwargs: Mapping[str, Any],
    num_classes: int | None,
    image_size: Sequence[int],
) -> dict[str, Any]:
    """What a checkpoint says of its model; ValueError for one that cannot be built."""
    facts = model_facts(build_model(name, num_classes, **kwargs), image_size)
    if 0 in facts.get('grid', ()):
        raise ValueError(f'no patches in an image of {image_size}')
    return {
        'name': name,
        'kwargs': dict(kwargs),
        'num_classes': num_classes,
        'dtype': 'float32',
        **facts,
    }


def _default_names(num_classes: int | None, dataset: str | None) -> list[str]:
    if dataset is not None:
        return list(class_names(dataset))
    return default_class_names(num_classes)


# timm.

# Architecture without its image size -> name of ours.
_TIMM = {
    re.sub(r'hf:timm/(.+?)(_\d+)?\..+', r'\1', address): row.model
    for row in ZOO
    for address in row.addresses
    if address.startswith('hf:timm/')
}


def _read_timm(config: Mapping[str, Any]) -> dict[str, Any]:
    about = _get(config, 'pretrained_cfg', dict)
    name = _TIMM[re.sub(r'_\d+$', '', _get(config, 'architecture', str))]
    args = _get(config, 'model_args', dict, {})
    pool = 'avg' if name in RESNETS else 'token'
    if args.keys() - {'img_size'} or _get(config, 'global_pool', str, pool) != pool:
        raise ValueError('a variant of the model')
    channels, *size = map(_whole, _get(about, 'input_size', list))
    if 'img_size' in args:
        size = _pair(args['img_size'])
    if len(size) != 2:
        raise ValueError(f'no image of size {size}')
    num_classes = _get({**about, **config}, 'num_classes', int)
    if num_classes != 0:
        _whole(num_classes)
    labels = about.get('label_names', config.get('label_names'))
    if labels:
        names = _names(labels, num_classes)
    else:
        imagenet = num_classes == 1000 and _get(about, 'tag', str, '').endswith('in1k')
        names = _default_names(num_classes, 'imagenet' if imagenet else None)
    found = {
        'model': _describe(name, {}, num_classes or None, size),
        'class_names': names,
    }
    preprocessing = _timm_preprocessing(about, channels, size)
    return found | ({'preprocessing': preprocessing} if preprocessing else {})


def _timm_preprocessing(
    about: Mapping[str, Any], channels: int, size: Sequence[int]
) -> dict[str, Any] | None:
    """None where the config does not say all of it, or asks for what we cannot."""
    if not {'mean', 'std', 'crop_pct', 'interpolation'} <= about.keys():
        return None
    mean, std = (_pixels(_get(about, key, list), channels) for key in ('mean', 'std'))
    if min(std) <= 0:
        raise ValueError('a deviation that is none')
    crop = _get(about, 'crop_pct', float)
    interpolation = _get(about, 'interpolation', str)
    centred = _get(about, 'crop_mode', str, 'center') == 'center'
    if not centred or not 0 < crop <= 1 or interpolation not in INTERPOLATIONS:
        return None
    return {
        'image_size': list(size),
        'channels': channels,
        'mean': mean,
        'std': std,
        'crop_fraction': crop,
        'interpolation': interpolation,
    }


def _pixels(values: Sequence[Any], channels: int) -> list[float]:
    """A number per channel; or one, as a checkpoint says it, where they are equal."""
    if len(values) not in (1, channels):
        raise ValueError(f'{len(values)} values for {channels} channels')
    numbers = [_number(value) for value in values]
    return numbers[:1] if len(set(numbers)) == 1 else numbers


# transformers.

# Class -> (family of ours, what its names end in, whether there is a classifier).
_TRANSFORMERS = {
    'ViTModel': ('ViT', '', False),
    'ViTForImageClassification': ('ViT', '', True),
    'DeiTForImageClassificationWithTeacher': ('DeiT', '-distilled', True),
    'Dinov2Model': ('DINOv2', '', False),
    'Dinov2WithRegistersModel': ('DINOv2', '-registers', False),
    'ResNetModel': ('ResNet', '', False),
    'ResNetForImageClassification': ('ResNet', '', True),
}
_ACTIVATIONS = {
    'gelu': 'gelu',
    'gelu_new': 'gelu_tanh',
    'gelu_fast': 'gelu_tanh',
    'gelu_pytorch_tanh': 'gelu_tanh',
    'relu': 'relu',
}


def _read_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    architectures = _get(config, 'architectures', list)
    if len(architectures) != 1 or not isinstance(architectures[0], str):
        raise ValueError('not one architecture')
    family, end, classifies = _TRANSFORMERS[architectures[0]]
    names: list[str] = []
    if classifies:  # two are their default, which a config leaves out
        labels = config.get('id2label', ['LABEL_0', 'LABEL_1'])
        names = _names(labels, len(labels) if isinstance(labels, dict | list) else 0)
    if family == 'ResNet':
        about = _describe(_resnet_name(config), {}, len(names) or None, ())
    else:
        name, kwargs = _vit_name(config, family, end)
        size = _pair(config['image_size'])
        about = _describe(name, kwargs, len(names) or None, size)
    return {'model': about, 'class_names': names}


def _vit_name(
    config: Mapping[str, Any], family: str, end: str
) -> tuple[str, dict[str, Any]]:
    """The name of that size; or that of B, and in which fields the model differs."""
    width = _whole(config['hidden_size'])
    if family == 'DINOv2':
        mlp_dim = width * _whole(config.get('mlp_ratio', 4))
        if _get(config, 'use_swiglu_ffn', bool, False):
            raise ValueError('another MLP')
    else:
        mlp_dim = _whole(config['intermediate_size'])
    fields = {
        'width': width,
        'depth': _whole(config['num_hidden_layers'], most=1000),
        'num_heads': _whole(config['num_attention_heads']),
        'mlp_dim': mlp_dim,
        'activation': _ACTIVATIONS[_get(config, 'hidden_act', str, 'gelu')],
        'layer_norm_eps': _get(
            config, 'layer_norm_eps', float, 1e-6 if family == 'DINOv2' else 1e-12
        ),
        'qkv_bias': _get(config, 'qkv_bias', bool, True),
    }
    if end == '-registers':
        fields['num_registers'] = _whole(config.get('num_register_tokens', 4))
    rows, cols = _pair(config['patch_size'])
    if rows != cols or width % fields['num_heads']:
        raise ValueError('no such model')
    size = Size(width, fields['depth'], fields['num_heads'])
    sizes = {size: name for name, size in FAMILIES[family].sizes.items()}
    name = f'{family}-{sizes.get(size, "B")}/{rows}{end}'
    model = build_model(name, None)
    return name, {k: v for k, v in fields.items() if getattr(model, k) != v}


def _resnet_name(config: Mapping[str, Any]) -> str:
    depths = _get(config, 'depths', list)
    bottleneck = _get(config, 'layer_type', str, 'bottleneck') == 'bottleneck'
    expected = {
        'embedding_size': 64,
        'hidden_sizes': [n * (4 if bottleneck else 1) for n in (64, 128, 256, 512)],
        'hidden_act': 'relu',
        'downsample_in_first_stage': False,
        'downsample_in_bottleneck': False,
    }
    if any(config.get(key, value) != value for key, value in expected.items()):
        raise ValueError('a variant of the model')
    for name in RESNETS:
        if name.startswith('ResNet-'):
            model: Any = build_model(name, None)
            if (list(model.stage_sizes), model.bottleneck) == (depths, bottleneck):
                return name
    raise ValueError(f'no ResNet of {depths}')


# Values of a JSON object, of which nothing is sure.

_NEEDED = object()


def _get(
    config: Mapping[str, Any], key: str, kind: type, default: Any = _NEEDED
) -> Any:
    """A value of that type; KeyError where it lacks, ValueError for another type."""
    value = config[key] if default is _NEEDED else config.get(key, default)
    if kind is float:
        return _number(value)
    if type(value) is not kind:  # a bool is no int here
        raise ValueError(f'{key} is no {kind.__name__}')
    return value


def _whole(value: Any, most: int = 1 << 20) -> int:
    """A whole number above 0; one beyond `most` is a mistake, or meant to harm."""
    if type(value) is not int or not 0 < value <= most:
        raise ValueError(f'{value!r} is no size')
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e9:  # nor NaN
        raise ValueError(f'{value!r} is no number')
    return float(value)


def _pair(value: Any) -> list[int]:
    """(height, width) from one number or two."""
    values = value if isinstance(value, list) else [value, value]
    if len(values) != 2:
        raise ValueError(f'{value!r} is no size')
    return [_whole(n) for n in values]


def _names(labels: Any, num_classes: int) -> list[str]:
    """Class names by number; one that stands twice has its number behind it."""
    if isinstance(labels, dict):
        labels = [labels[str(i)] for i in range(len(labels))]
    if not isinstance(labels, list) or len(labels) != num_classes:
        raise ValueError(f'no names of {num_classes} classes')
    if not all(isinstance(label, str | int) for label in labels):
        raise ValueError('a name is no text')
    names = [str(label) for label in labels]
    count = collections.Counter(names)
    return [n if count[n] == 1 else f'{n} ({i})' for i, n in enumerate(names)]
