"""'ConViT-S+/16' -> a row of a table."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
from flax.core import FrozenDict

from vit_jax.errors import UserError, unknown
from vit_jax.models.cnn import CNN
from vit_jax.models.convit import ConViT
from vit_jax.models.gan import SAGAN
from vit_jax.models.lstm import LSTM
from vit_jax.models.mlp import MLP
from vit_jax.models.resnet import RESNETS, ResNet
from vit_jax.models.transformer import Transformer
from vit_jax.models.vit import ViT


class Size(NamedTuple):
    width: int
    depth: int
    num_heads: int


class Family(NamedTuple):
    model: Callable[..., nn.Module]
    sizes: dict[str, Size]
    patches: tuple[str, ...]  # the published variants; any other patch works too
    fields: dict[str, Any] = {}
    options: dict[str, dict[str, Any]] = {}  # what a name may end in -> its fields


# The published code truncates at +-2, a hundred deviations: a plain normal. Flax's
# `truncated_normal` cuts at two deviations, which leaves a deviation of 0.0176.
_NORMAL = nn.initializers.normal(0.02)

FAMILIES = {
    # arXiv 2010.11929, table 1; Ti and S from arXiv 2106.10270, table 2.
    'ViT': Family(
        ViT,
        {
            'Ti': Size(192, 12, 3),
            'S': Size(384, 12, 6),
            'B': Size(768, 12, 12),
            'L': Size(1024, 24, 16),
            'H': Size(1280, 32, 16),
        },
        ('Ti/16', 'S/32', 'S/16', 'B/32', 'B/16', 'L/32', 'L/16', 'H/14'),
    ),
    # arXiv 2012.12877, table 1; distilled: section 4.
    'DeiT': Family(
        ViT,
        {'Ti': Size(192, 12, 3), 'S': Size(384, 12, 6), 'B': Size(768, 12, 12)},
        ('Ti/16', 'S/16', 'B/16'),
        {'kernel_init': _NORMAL, 'head_init': _NORMAL, 'token_init': _NORMAL},
        {'-distilled': {'distilled': True}},
    ),
    # arXiv 2103.10697, table 1: 48 features a head, 64 in the + models.
    'ConViT': Family(
        ConViT,
        {
            'Ti': Size(192, 12, 4),
            'Ti+': Size(256, 12, 4),
            'S': Size(432, 12, 9),
            'S+': Size(576, 12, 9),
            'B': Size(768, 12, 16),
            'B+': Size(1024, 12, 16),
        },
        ('Ti/16', 'Ti+/16', 'S/16', 'S+/16', 'B/16', 'B+/16'),
    ),
    # arXiv 2304.07193, appendix B; registers: arXiv 2309.16588, section 3.
    'DINOv2': Family(
        ViT,
        {'S': Size(384, 12, 6), 'B': Size(768, 12, 12), 'L': Size(1024, 24, 16)},
        ('S/14', 'B/14', 'L/14'),
        {'kernel_init': _NORMAL, 'layer_scale': 1e-5},
        {'-registers': {'num_registers': 4}},
    ),
}

# Models without variants.
SINGLE = {'CNN': CNN, 'MLP': MLP}

# Models that make images, and tell them from real ones: they know no classes.
GENERATIVE = {'SAGAN': SAGAN}

# Models of sequences: called on the tokens of a source and a target, not on images.
# Name -> (module, fields).
SEQUENCE: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    # For small corpora: arXiv 2105.14462.
    'Transformer-tiny': (
        Transformer,
        {
            'width': 128,
            'depth': 4,
            'mlp_dim': 256,
            'num_heads': 4,
            'dropout_rate': 0.3,
        },
    ),
    # arXiv 1706.03762, table 3.
    'Transformer-base': (
        Transformer,
        {
            'width': 512,
            'depth': 6,
            'mlp_dim': 2048,
            'num_heads': 8,
            'dropout_rate': 0.1,
        },
    ),
    'Transformer-big': (
        Transformer,
        {
            'width': 1024,
            'depth': 6,
            'mlp_dim': 4096,
            'num_heads': 16,
            'dropout_rate': 0.3,
        },
    ),
    # What came before: with a vocabulary of 10,000, of the size of Transformer-tiny.
    'LSTM-tiny': (LSTM, {'width': 160, 'depth': 2, 'dropout_rate': 0.3}),
}

# (size of the ViT, stages of the trunk, pixels that a token stands for). The number in
# the name is the last one, but for R+ViT-Ti/16: its root alone has a stride of 4, and
# its public weights have patches of 8 on top. arXiv 2106.10270, table 2; R50 from
# arXiv 2010.11929, section 4.1: for 16 pixels its last two stages are one.
HYBRIDS = {
    'R+ViT-Ti/16': ('Ti', (), 32),
    'R26+ViT-S/32': ('S', (2, 2, 2, 2), 32),
    'R26+ViT-B/32': ('B', (2, 2, 2, 2), 32),
    'R50+ViT-B/32': ('B', (3, 4, 6, 3), 32),
    'R50+ViT-B/16': ('B', (3, 4, 9), 16),
    'R50+ViT-L/32': ('L', (3, 4, 6, 3), 32),
    'R50+ViT-L/16': ('L', (3, 4, 9), 16),
}


def list_variants() -> list[str]:
    """The names of the published variants, and of models without variants."""
    names = [
        f'{name}-{variant}{option}'
        for name, family in FAMILIES.items()
        for option in ('', *family.options)
        for variant in family.patches
    ]
    return [*names, *HYBRIDS, *RESNETS, *SINGLE, *GENERATIVE, *SEQUENCE]


def is_sequence_model(name: str) -> bool:
    """Whether the model of that name takes the tokens of a source and a target.

    >>> is_sequence_model('Transformer-base'), is_sequence_model('ViT-B/16')
    (True, False)
    """
    return name in SEQUENCE


def is_generative_model(name: str) -> bool:
    """Whether the model of that name makes images.

    >>> is_generative_model('SAGAN'), is_generative_model('CNN')
    (True, False)
    """
    return name in GENERATIVE


def decode_variant(name: str) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
    """The module class behind a name, and the fields that the name stands for.

    Args:
      name: such as 'ViT-B/16' or 'DeiT-B/16-distilled'; any whole patch size is fine.

    Raises:
      UserError: for a name that is none; offers the nearest.

    >>> decode_variant('ConViT-S+/8')[1]['patch_size']
    8
    """
    if name in SINGLE:
        return SINGLE[name], {}
    if name in GENERATIVE:
        return GENERATIVE[name], {}
    if name in SEQUENCE:
        model, fields = SEQUENCE[name]
        return model, dict(fields)
    if name in RESNETS:
        return ResNet, dict(RESNETS[name])
    if name in HYBRIDS:
        size, stage_sizes, patch_size = HYBRIDS[name]
        trunk: FrozenDict[str, Any] = FrozenDict(
            stage_sizes=stage_sizes
        )  # modules are hashed under jit
        stem = {'stem': 'resnet', 'stem_kwargs': trunk}
        return ViT, _vit_fields('ViT', size, patch_size) | stem
    match = re.fullmatch(r'(\w+)-([\w+]+)/(\d+)(-\w+)?', name)
    if not match or match[1] not in FAMILIES:
        raise unknown('model', name, list_variants())
    family = FAMILIES[match[1]]
    if match[4] and match[4] not in family.options:
        raise unknown('model', name, list_variants())
    if match[2] not in family.sizes:
        raise unknown(f'size of {match[1]}', match[2], family.sizes)
    if int(match[3]) == 0:
        raise UserError(f'model {name!r} has patches of size 0')
    fields = _vit_fields(match[1], match[2], int(match[3]))
    if match[4]:
        fields |= family.options[match[4]]
    return family.model, fields


def _vit_fields(family_name: str, size_name: str, patch_size: int) -> dict[str, Any]:
    family = FAMILIES[family_name]
    size = family.sizes[size_name]
    return {
        'patch_size': patch_size,
        **size._asdict(),
        'mlp_dim': 4 * size.width,
        **family.fields,
    }
