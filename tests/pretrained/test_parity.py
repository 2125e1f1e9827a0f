"""Full-size models with random weights: the same logits here and in PyTorch.

    pip install -e '.[test,torch]' torch==2.13.0
    pip install --no-deps timm==1.0.31 torchvision==0.28.0
    pip install safetensors huggingface_hub pyyaml
    pytest tests/pretrained/test_parity.py

Nothing is downloaded. With `-rP` the largest differences are shown.
"""

import re
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from vit_jax.models import build_model
from vit_jax.pretrained import load_variables
from vit_jax.pretrained.convert import to_published
from vit_jax.pretrained.files import write_weights

torch = pytest.importorskip('torch')


def import_torchvision():
    """timm imports it, and it wants operators that no model here calls.

    Built for another PyTorch, as one for the CPU may be, it does not find its own.
    """
    try:
        return pytest.importorskip('torchvision')
    except RuntimeError:
        boxes = 'Tensor dets, Tensor scores, float iou_threshold'
        for name in ('nms', 'qnms'):
            OPERATORS.define(f'{name}({boxes}) -> Tensor')
        for name in [n for n in sys.modules if n.split('.')[0] == 'torchvision']:
            del sys.modules[name]
        return pytest.importorskip('torchvision')


OPERATORS = torch.library.Library('torchvision', 'FRAGMENT')
torchvision = import_torchvision()
timm = pytest.importorskip('timm')

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4  # of logits whose deviation is about 1
# Of a ResNet's residual branches: at random weights their sum grows from block to
# block, and with it what rounding does.
BRANCH = 0.2


class Published(NamedTuple):
    """A model here and there.

    Attributes:
      name: of timm or, after a slash, of torchvision.
      sizes: of the images; all but the first are others than the model's own.
      num_classes: 0 for features.
      options: of the model there.
      fields: of the model here, other than its name says.
      tolerance: of the logits.
    """

    name: str
    sizes: tuple[tuple[int, int], ...] = ((224, 224), (256, 256))
    num_classes: int = 1000
    options: dict[str, Any] = {}
    fields: dict[str, Any] = {}
    tolerance: float = TOLERANCE


# timm's ConViT has one size, and of its DINOv2 any side is a multiple of 14.
LARGE = {'sizes': ((256, 256),), 'options': {'img_size': 256}}
DINOV2 = {
    'sizes': ((224, 224), (252, 280)),
    'num_classes': 0,
    'options': {'img_size': 224, 'dynamic_img_size': True},
}
OWN = {'sizes': ((224, 224),)}
# Weight standardisation divides by a deviation. Google's hybrids, and so ours, add 1e-5
# to it, timm's 1e-8 to its square: up to 1.2e-4 in these logits, the same in float64.
TIMM_TRUNK = FrozenDict(stage_sizes=(2, 2, 2, 2), standardize_eps=0.0)
OTHER_CONSTANT = 3e-4
MODELS = [
    ('DeiT-Ti/16', Published('deit_tiny_patch16_224')),
    ('DeiT-S/16', Published('deit_small_patch16_224')),
    ('DeiT-S/16-distilled', Published('deit_small_distilled_patch16_224')),
    ('ViT-B/16', Published('vit_base_patch16_224')),
    (
        'R26+ViT-S/32',
        Published('vit_small_r26_s32_224', fields={'stem_kwargs': TIMM_TRUNK}),
    ),
    ('R26+ViT-S/32', Published('vit_small_r26_s32_224', tolerance=OTHER_CONSTANT)),
    ('ConViT-Ti/16', Published('convit_tiny', **OWN)),
    ('ConViT-Ti/16', Published('convit_tiny', **LARGE)),
    ('ConViT-S/16', Published('convit_small', **OWN)),
    ('ConViT-S/16', Published('convit_small', **LARGE)),
    ('ConViT-B/16', Published('convit_base', **OWN)),
    ('ConViT-B/16', Published('convit_base', **LARGE)),
    ('ResNet-50', Published('resnet50')),
    ('ResNet-50', Published('/resnet50')),
    ('BiT-R50x1', Published('resnetv2_50x1_bit')),
    ('DINOv2-S/14', Published('vit_small_patch14_dinov2', **DINOV2)),
    ('DINOv2-S/14-registers', Published('vit_small_patch14_reg4_dinov2', **DINOV2)),
]


def make_id(value):
    if isinstance(value, str):
        return value
    default = '-default' * (value.tolerance == OTHER_CONSTANT)
    return f'{value.name}-{value.sizes[0][0]}{default}'


def make_theirs(published):
    """Their model, every number random, and of a size that keeps activations near 1."""
    if published.name.startswith('/'):
        model = torchvision.models.get_model(published.name[1:])
    else:
        classes = {'num_classes': published.num_classes}
        model = timm.create_model(published.name, **classes, **published.options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.normal_(generator=generator)
            if x.ndim in (2, 4):  # a map: by its inputs
                x /= x[0].numel() ** 0.5
            else:
                x *= 0.2
            if x.ndim == 1 and name.endswith(('weight', 'gamma')):
                x += 1
            if name.endswith('bn3.weight'):
                x *= BRANCH
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        if norms:  # the statistics are those of some images
            for norm in norms:
                norm.momentum = 1.0
            model.train()(make_image((128, 128), count=8))
    return model.eval()


def make_image(size, count=2):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def run_theirs(model, image):
    if not getattr(model, 'dynamic_img_size', True) and hasattr(model, 'pos_embed'):
        model.set_input_size(tuple(image.shape[2:]))
    with torch.no_grad():
        return model(image).numpy()


def run_ours(model, variables, image):
    return jax.jit(model.apply)(variables, np.moveaxis(image.numpy(), 1, -1))


def compare(what, published, ours, theirs):
    error, scale = np.abs(ours - theirs).max(), theirs.std()
    print(f'{what}: {error:.1e}, of a deviation of {scale:.2f}')
    assert scale > 0.1, 'the logits show little'
    assert error <= published.tolerance


def make_ours(name, published):
    return build_model(name, published.num_classes or None, **published.fields)


@pytest.mark.parametrize(('name', 'published'), MODELS, ids=make_id)
def test_weights_from_there_give_the_same_logits(name, published, tmp_path):
    theirs, ours = make_theirs(published), make_ours(name, published)
    path = tmp_path / 'weights'
    save_file({k: x.numpy() for k, x in theirs.state_dict().items()}, path)
    for size in published.sizes:
        image = make_image(size)
        variables, _ = load_variables(path, ours, size)
        out = run_ours(ours, variables, image)
        what = f'{name} from {make_id(published)} at {size}'
        compare(what, published, out, run_theirs(theirs, image))


def make_variables(model, image):
    """Every number random, and of a size that keeps activations near 1."""
    shape = (1, *image.shape[2:], 3)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros(shape, np.float32))
    rng = np.random.default_rng(0)
    leaves = {}
    for path, leaf in flatten_dict(shapes, sep='/').items():
        x = rng.normal(size=leaf.shape)
        if path.endswith('kernel'):
            to_heads = re.search('/(query|key|value)/', path)
            x /= np.prod(leaf.shape[:1] if to_heads else leaf.shape[:-1]) ** 0.5
        else:
            x *= 0.2
        if path.endswith(('/scale', '/var')):
            x = abs(1 + x)
        if path.endswith('norm3/scale'):
            x *= BRANCH
        leaves[path] = x.astype(leaf.dtype)
    return unflatten_dict(leaves, sep='/')


@pytest.mark.parametrize(
    ('name', 'published'),
    [row for row in MODELS if row[1].sizes[0] == (224, 224)],
    ids=make_id,
)
def test_weights_from_here_give_the_same_logits(name, published):
    theirs, ours = make_theirs(published), make_ours(name, published)
    image = make_image(published.sizes[0])
    variables = make_variables(ours, image)
    arrays = to_published(variables, '.safetensors').arrays
    tensors = {k: torch.tensor(x) for k, x in arrays.items()}
    theirs.load_state_dict(tensors, strict=True)
    out = run_ours(ours, variables, image)
    what = f'{name} to {make_id(published)}'
    compare(what, published, out, run_theirs(theirs, image))


@pytest.mark.parametrize(
    ('name', 'published'),
    [row for row in MODELS if row[0] in ('DeiT-Ti/16', 'R26+ViT-S/32', 'BiT-R50x1')],
    ids=make_id,
)
def test_names_of_google_are_read_by_timm(name, published, tmp_path):
    theirs, ours = make_theirs(published), make_ours(name, published)
    image = make_image(published.sizes[0])
    variables = make_variables(ours, image)
    path = tmp_path / 'weights.npz'
    write_weights(path, to_published(variables, '.npz').arrays, {})
    with torch.no_grad():
        theirs.load_pretrained(str(path))
    out = run_ours(ours, variables, image)
    what = f'{name} to {make_id(published)} by npz'
    compare(what, published, out, run_theirs(theirs, image))
