"""Writes augment.npz: pixels that timm and torchvision augmented.

    pip install torch==2.13.0 numpy==2.4.6 pillow==13.0.0
    pip install --no-deps timm==1.0.31 torchvision==0.28.0
    pip install safetensors==0.8.0 huggingface_hub pyyaml
    python tests/golden/make_augment.py

The libraries draw their random numbers from `random` and `numpy.random`. Those
functions are listened to, so what was drawn is stored beside what came out. Nothing of
the libraries' source is used here.
"""

import contextlib
import random

import numpy as np
import torch
from PIL import Image
from recording import draw, save

# timm imports torchvision, which expects two operators that a build of PyTorch for
# the CPU may lack; nothing here calls them.
_operators = torch.library.Library('torchvision', 'DEF')
for _name in ('nms', 'qnms'):
    _operators.define(
        f'{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor'
    )

from timm.data import auto_augment  # noqa: E402
from timm.data.mixup import Mixup, cutmix_bbox_and_lam  # noqa: E402
from timm.data.random_erasing import RandomErasing  # noqa: E402
from torchvision.transforms import InterpolationMode, autoaugment  # noqa: E402

B, V = 2, 7
FILL = {'rgb': (124, 116, 104), 'grey': 117}


@contextlib.contextmanager
def listen(module, *names):
    """Yields {name: list of what the module's function of that name returned}."""
    heard = {name: [] for name in names}
    originals = {name: getattr(module, name) for name in names}

    def wrap(name):
        def function(*args, **kwargs):
            value = originals[name](*args, **kwargs)
            heard[name].append(value)
            return value

        return function

    for name in names:
        setattr(module, name, wrap(name))
    yield heard
    for name in names:
        setattr(module, name, originals[name])


def stack(arrays):
    return torch.as_tensor(np.stack([np.asarray(array) for array in arrays]))


# --- RandAugment ----------------------------------------------------------------


def make_images():
    """Noise in the corners, smooth elsewhere: no channel reaches 0 or 255."""
    rng = np.random.default_rng(0)
    rows, columns = np.linspace(40, 180, 13)[:, None], np.linspace(0, 60, 17)
    pixels = np.stack([rows + columns, 220 - rows + columns, 90 + rows - columns], -1)
    pixels = np.where(rng.random((13, 17, 1)) < 0.4, rng.normal(128, 40, (3,)), pixels)
    pixels = np.clip(pixels + rng.normal(0, 9, pixels.shape), 7, 249).astype(np.uint8)
    return {'rgb': Image.fromarray(pixels), 'grey': Image.fromarray(pixels[:, :, 0])}


def timm_operation(name, images, levels=(0.0, 0.6, 3.3, 7.0, 9.0, 10.0, 13.0)):
    """Amounts at `levels`, smallest and largest of both signs, and some pixels."""
    to_amount = auto_augment.LEVEL_TO_ARG[name]
    amounts = [
        sorted({to_amount(level, {})[0] for _ in range(50)}) if to_amount else [0.0]
        for level in levels
    ]
    amounts = np.float64([(each[0], each[-1]) for each in amounts])
    applied = np.unique(amounts[2:5])  # none that Pillow 13 refuses
    function = auto_augment.NAME_TO_OP[name]
    out = {'levels': np.float64(levels), 'amounts': amounts, 'applied': applied}
    for kind, image in images.items():
        for resample in ('BICUBIC', 'BILINEAR'):
            options = {'resample': Image.Resampling[resample], 'fillcolor': FILL[kind]}
            results = []
            for amount in applied:
                amount = int(amount) if amount == int(amount) else amount
                args = (amount,) if to_amount else ()
                results.append(function(image, *args, **options))
            out[f'{kind}_{resample}'] = stack(results)
        if torch.equal(out[f'{kind}_BICUBIC'], out[f'{kind}_BILINEAR']):
            del out[f'{kind}_BILINEAR']  # nothing moved
    return {key: torch.as_tensor(value) for key, value in out.items()}


def torchvision_operation(name, images, magnitudes=(0, 1, 9, 17, 30)):
    """The pixels at each magnitude, with either sign."""
    out = {'magnitudes': torch.as_tensor(magnitudes)}
    for kind, image in images.items():
        results = []
        for magnitude in magnitudes:
            space = autoaugment.RandAugment()._augmentation_space(31, image.size[::-1])
            amounts, signed = space[name]
            amount = float(amounts[magnitude]) if amounts.ndim else 0.0
            results += [
                autoaugment._apply_op(
                    image, name, sign * amount, InterpolationMode.NEAREST, None
                )
                for sign in ((1, -1) if signed else (1, 1))
            ]
        out[kind] = stack(results).reshape(len(magnitudes), 2, *np.shape(image))
    return out


def randaugment():
    random.seed(0)
    images = make_images()
    cases = {'images': {kind: stack([image])[0] for kind, image in images.items()}}
    names = auto_augment._RAND_TRANSFORMS + auto_augment._RAND_INCREASING_TRANSFORMS
    for name in dict.fromkeys(names):
        cases[f'timm/{name}'] = timm_operation(name, images)
    for name in autoaugment.RandAugment()._augmentation_space(31, (13, 17)):
        cases[f'torchvision/{name}'] = torchvision_operation(name, images)
    return cases


# --- Random erasing -------------------------------------------------------------


def erasing(size, seeds):
    """What was drawn, for each seed until a rectangle fitted, and what came out."""
    eraser = RandomErasing(probability=1.0, mode='pixel', device='cpu')
    image = draw(np.random.default_rng(0), 3, *size).detach()
    cases = {'image': image}
    for seed in seeds:
        random.seed(seed)
        torch.manual_seed(seed)
        with listen(random, 'uniform', 'randint') as heard:
            out = eraser(image.clone())
        cases[f'{seed}/area'] = torch.tensor(heard['uniform'][0::2])
        cases[f'{seed}/log_aspect'] = torch.tensor(heard['uniform'][1::2])
        cases[f'{seed}/place'] = torch.tensor(heard['randint'])  # top, left
        cases[f'{seed}/out'] = out
    return cases


# --- Mixup and cutmix -----------------------------------------------------------


def boxes(size):
    """Boxes and corrected shares for shares between 0 and 1."""
    np.random.seed(0)
    drawn, centres, edges, corrected = [], [], [], []
    for lam in (0.0, 0.03, 0.2, 0.41, 0.5, 0.77, 0.9, 0.99, 1.0) * 3:
        with listen(np.random, 'randint') as heard:
            box, new = cutmix_bbox_and_lam((B, 3, *size), lam)
        drawn.append(lam)
        centres.append(heard['randint'])
        edges.append(box)
        corrected.append(new)
    return {
        'size': torch.tensor(size),
        'lam': torch.tensor(drawn),
        'centre': stack(centres),
        'edges': stack(edges),
        'corrected': torch.tensor(corrected),
    }


def mixed(mode, kind):
    """Two images, each other's partner, and their smoothed targets."""
    rng = np.random.default_rng(1)
    images = draw(rng, B, 3, 11, 13).detach()
    label = torch.tensor([2, 5])
    alphas = {'mixup_alpha': 0.0, 'cutmix_alpha': 0.0, f'{kind}_alpha': 0.8}
    mix = Mixup(**alphas, mode=mode, label_smoothing=0.1, num_classes=V)
    np.random.seed(3)
    with listen(np.random, 'beta', 'randint') as heard:
        out, targets = mix(images.clone(), label)
    case = {'images': images, 'label': label, 'out': out, 'targets': targets}
    case['lam'] = torch.as_tensor(np.ravel(heard['beta']))
    if kind == 'cutmix':
        case['centre'] = torch.as_tensor(np.reshape(heard['randint'], (-1, 2)))
    return case


if __name__ == '__main__':
    save(
        'augment.npz',
        {
            **{f'randaugment/{key}': case for key, case in randaugment().items()},
            'erasing/tall': erasing((19, 11), range(11)),
            'erasing/flat': erasing((2, 37), range(3)),
            'boxes': boxes((23, 31)),
            **{
                f'{kind}/{mode}': mixed(mode, kind)
                for kind in ('mixup', 'cutmix')
                for mode in ('batch', 'pair', 'elem')
            },
        },
    )
