import pathlib
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy import stats

from vit_jax.axes import BATCH_AXIS
from vit_jax.data import augment
from vit_jax.data.augment import BatchAugment, Box
from vit_jax.errors import UserError

GOLDEN = pathlib.Path(__file__).parent.parent / 'golden' / 'augment.npz'


@pytest.fixture(scope='module')
def golden():
    """What timm drew and what came out, see golden/make_augment.py."""
    with np.load(GOLDEN, allow_pickle=False) as arrays:
        return unflatten_dict(dict(arrays), sep='/')


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Compiled in a quarter of the time, where speed does not matter.
quick_jit = partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


@partial(quick_jit, static_argnums=0)
def run(function, rng, images, targets, weight):
    """A `BatchAugment`, compiled once for all that are equal."""
    return function(rng, images, targets, weight)


def test_box_mask_holds_the_pixels_of_the_box():
    box = Box(*np.array([[1, 0], [3, 2], [2, 0], [4, 5]]))
    expected = np.zeros((2, 5, 7), bool)
    expected[0, 1:3, 3:7] = True  # the second has no rows
    np.testing.assert_array_equal(augment.box_mask(box, 5, 7), expected)


# --- Crop and flip --------------------------------------------------------------


def test_pad_crop_shows_every_window_of_the_padded_image():
    pad, (h, w, channels) = 1, (3, 5, 2)
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (9, h, w, channels)).astype(np.uint8)
    top, left = np.divmod(np.arange(9, dtype=np.uint32), np.uint32(3))
    out = jax.jit(augment.pad_crop, static_argnums=3)(images, top, left, pad)
    assert out.dtype == np.uint8
    for image, crop, i, j in zip(images, out, top, left):
        padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
        np.testing.assert_array_equal(crop, padded[i : i + h, j : j + w])


def test_mirror_exchanges_left_and_right_where_it_is_told():
    images = noise(3, 5, 7, 2)
    out = augment.mirror(images, np.array([True, False, True]))
    np.testing.assert_array_equal(out[1], images[1])
    np.testing.assert_array_equal(out[::2], images[::2, :, ::-1])


# --- Random erasing -------------------------------------------------------------


@pytest.mark.parametrize('case', ['tall', 'flat'])
def test_erasing_is_that_of_timm(golden, case):
    """Given its draws, and the noise that it put into the rectangle."""
    erasing_size = jax.jit(augment.erasing_size, static_argnums=2)
    erase = jax.jit(augment.erase)
    cases = dict(golden['erasing'][case])
    image = cases.pop('image').transpose(1, 2, 0)
    attempts = []
    for drawn in cases.values():
        count, fitted = len(drawn['area']), len(drawn['place']) > 0
        attempts.append(count if fitted else 0)
        # What comes after the one that fitted is not looked at, though it would fit.
        area, log_aspect = np.full(12, 0.06), np.full(12, -1.1)
        area[:count], log_aspect[:count] = drawn['area'], drawn['log_aspect']
        if not fitted:
            area[count:], log_aspect[count:] = area[0], log_aspect[0]
        size = erasing_size(area, log_aspect, image.shape[:2])
        expected = drawn['out'].transpose(1, 2, 0)
        top, left = drawn['place'] if fitted else (0, 0)
        box = Box(*(np.array([n], np.int32) for n in (top, left, *size)))
        inside = (expected != image).all(axis=-1)
        pixels = np.where(inside[..., None], expected, np.nan)
        out = erase(image[None], box, pixels[None])
        np.testing.assert_array_equal(out[0], expected)
    assert max(attempts) > 1  # some rectangles did not fit
    if case == 'flat':
        assert min(attempts) == 0  # and some images had none that did


def test_random_erasing_draws_what_it_says():
    h, w, probability, count = 41, 53, 0.7, 400
    images = np.full((count, h, w, 2), 9.0, np.float32)  # noise never reaches 9
    erased = quick_jit(augment.random_erasing, static_argnums=2)
    out = np.asarray(erased(keys(count), images, probability))
    mask = (out != 9.0).all(axis=-1)
    assert ((out != 9.0).any(axis=-1) == mask).all()  # all channels of a pixel
    heights = mask.any(axis=2).sum(axis=1)
    widths = mask.any(axis=1).sum(axis=1)
    np.testing.assert_array_equal(heights * widths, mask.sum(axis=(1, 2)))  # boxes
    hit = heights > 0
    assert abs(hit.mean() - probability) < 3 * np.sqrt(0.7 * 0.3 / count)
    share, ratio = (heights * widths / (h * w))[hit], heights[hit] / widths[hit]
    assert 0.015 < share.min() < 0.03  # rounded to whole pixels
    assert 0.30 < share.max() < 0.35
    assert abs(share.mean() - (0.02 + 1 / 3) / 2) < 0.02
    assert 0.25 < ratio.min() < 0.4
    assert 2.5 < ratio.max() < 1 / 0.25
    assert abs(np.log(ratio).mean()) < 0.12
    first_row, first_column = mask.any(2).argmax(1)[hit], mask.any(1).argmax(1)[hit]
    assert first_row.min() == first_column.min() == 0
    assert (first_row + heights[hit]).max() == h
    assert (first_column + widths[hit]).max() == w
    pixels = out[mask]
    assert stats.kstest(pixels.ravel()[::29], 'norm').pvalue > 0.01
    assert abs(np.corrcoef(pixels.T)[0, 1]) < 0.02  # each channel has its own


# --- Mixup and cutmix -----------------------------------------------------------


@pytest.mark.parametrize('alpha', [0.4, 0.8, 1.0, 3.0])
def test_symmetric_beta_is_a_beta(alpha):
    shares = np.random.default_rng(0).random((9973, 3), np.float32)
    draws = jax.vmap(lambda u: augment.symmetric_beta(u, alpha))(shares)
    assert stats.kstest(np.asarray(draws), stats.beta(alpha, alpha).cdf).pvalue > 0.01


@pytest.mark.parametrize('alpha', [0.01, 1e-30, 1e6])
def test_symmetric_beta_stays_a_share(alpha):
    shares = np.random.default_rng(0).random((9973, 3), np.float32)
    ends = 0.0, 0.25, 0.5, 0.75, 1 - 2**-24
    shares[:125] = np.stack(np.meshgrid(ends, ends, ends), axis=-1).reshape(125, 3)
    draws = jax.vmap(lambda u: augment.symmetric_beta(u, alpha))(shares)
    assert bool(jnp.all((draws >= 0.0) & (draws <= 1.0)))
    assert abs(float(draws.mean()) - 0.5) < 0.02


def test_cutmix_boxes_are_those_of_timm(golden):
    cases = golden['boxes']
    size = tuple(map(int, cases['size']))
    cutmix_box = jax.jit(augment.cutmix_box, static_argnums=2)
    for lam, centre, edges, corrected in zip(
        cases['lam'], cases['centre'], cases['edges'], cases['corrected']
    ):
        top, left, height, width = cutmix_box(lam, centre, size)
        np.testing.assert_array_equal(
            (top, top + height, left, left + width), edges, err_msg=str(lam)
        )
        np.testing.assert_allclose(
            1 - height * width / np.prod(size), corrected, rtol=1e-6
        )


@pytest.mark.parametrize('mode', augment.MIX_MODES)
@pytest.mark.parametrize('kind', ['mixup', 'cutmix'])
def test_mixing_is_that_of_timm(golden, kind, mode):
    case = golden[kind][mode]
    images = case['images'].transpose(0, 2, 3, 1)
    targets = optax.smooth_labels(np.eye(7, dtype=np.float32)[case['label']], 0.1)
    lam = jnp.asarray(case['lam'])
    assert len(lam) == (2 if mode == 'elem' else 1)
    if kind == 'mixup':
        out, mixed = augment.mixup(images, targets, lam)
    else:
        size = images.shape[1:3]
        boxes = [augment.cutmix_box(*each, size) for each in zip(lam, case['centre'])]
        out, mixed = augment.cutmix(images, targets, Box(*map(jnp.stack, zip(*boxes))))
    np.testing.assert_allclose(out, case['out'].transpose(0, 2, 3, 1), atol=1e-6)
    np.testing.assert_allclose(mixed, case['targets'], atol=1e-6)


def mix_shares(num_rows, seed=0, **options):
    """`keep` `[B, h, w]` and `lam` `[B]` that a `BatchAugment` chose."""
    even = np.arange(num_rows) % 2 == 0
    images = np.zeros((num_rows, 7, 11, 2), np.float32)
    images[even] = 1.0
    targets = np.stack([even, ~even], axis=1).astype(np.float32)
    out, mixed = run(
        BatchAugment(**options),
        jax.random.key(seed),
        images,
        targets,
        np.ones(num_rows),
    )
    assert bool((out[..., 0] == out[..., 1]).all())
    np.testing.assert_allclose(mixed.sum(axis=1), 1.0, rtol=1e-6)
    keep = np.where(even[:, None, None], out[..., 0], 1 - out[..., 0])
    return keep, np.where(even, mixed[:, 0], mixed[:, 1])


def is_blend(keep):
    return (np.ptp(keep, axis=(1, 2)) < 1e-6) & (keep[:, 0, 0] < 1)


def test_mode_says_which_rows_share_a_draw():
    for mode, group in {'batch': 26, 'pair': 2, 'elem': 1}.items():
        _, lam = mix_shares(26, mixup=0.8, mix_mode=mode)
        groups = lam.reshape(-1, group)
        np.testing.assert_allclose(groups, groups[:, :1].repeat(group, 1), rtol=1e-5)
        assert len(np.unique(np.round(groups[:, 0], 4))) == len(groups)


@pytest.mark.parametrize('mode', ['pair', 'elem'])
def test_kinds_and_their_shares(mode):
    keep, lam = mix_shares(
        2000, mixup=0.8, cutmix=1.0, mix_mode=mode, mix_prob=0.6, switch_prob=0.25
    )
    rows = slice(None, None, 2 if mode == 'pair' else 1)  # independent ones
    blended = is_blend(keep)
    count = len(lam[rows])
    expected = 0.6 * 0.75
    error = 3 * np.sqrt(expected * (1 - expected) / count)
    assert abs(blended[rows].mean() - expected) < error
    np.testing.assert_allclose(lam[blended], keep[blended, 0, 0], atol=1e-6)
    draws = lam[rows][blended[rows]]
    assert stats.kstest(draws, stats.beta(0.8, 0.8).cdf).pvalue > 0.01
    others = keep[~blended]  # boxes, and rows as they were
    assert set(np.unique(others)) == {0.0, 1.0}
    np.testing.assert_allclose(lam[~blended], others.mean(axis=(1, 2)), atol=1e-6)
    assert abs((lam[rows] < 1).mean() - 0.6) < 0.1  # small boxes have no pixel


@pytest.mark.parametrize('kind', ['mixup', 'cutmix'])
def test_one_kind_alone_is_never_switched(kind):
    keep, _ = mix_shares(200, mix_mode='elem', switch_prob=0.5, **{kind: 1.0})
    assert is_blend(keep).all() == (kind == 'mixup')
    assert is_blend(keep).any() == (kind == 'mixup')


def test_a_batch_is_mixed_with_mix_prob():
    mixed = [
        mix_shares(2, seed, mixup=1.0, mix_prob=0.5)[1][0] < 1 for seed in range(40)
    ]
    assert 10 < sum(mixed) < 30


@pytest.mark.parametrize('mode', augment.MIX_MODES)
def test_rows_of_weight_0_lend_nothing(mode):
    images, targets = noise(10, 5, 7, 2), np.eye(10, dtype=np.float32)
    weight = np.ones(10, np.float32)
    weight[[3, 6, 8, 9]] = 0.0
    mix = BatchAugment(mixup=0.8, mix_mode=mode)
    out, mixed = run(mix, jax.random.key(0), images, targets, weight)
    alone = np.array([2, 3, 6, 7, 8, 9])
    np.testing.assert_array_equal(out[alone], images[alone])
    np.testing.assert_array_equal(mixed[alone], targets[alone])
    partners = {(int(i), int(j)) for i, j in zip(*np.nonzero(mixed)) if i != j}
    assert partners == {(0, 1), (1, 0), (4, 5), (5, 4)}


def test_erased_images_are_mixed():
    """Not mixed ones erased: then only one of a pair would show a rectangle."""
    images, targets = np.full((6, 17, 19, 3), 9.0, np.float32), np.eye(6)
    function = BatchAugment(erasing=1.0, mixup=1.0)
    out, _ = run(function, jax.random.key(0), images, targets, np.ones(6))
    erased = np.asarray(out != 9.0).any(axis=-1).reshape(3, 2, 17, 19)
    np.testing.assert_array_equal(erased[:, 0], erased[:, 1])
    assert erased.any(axis=(1, 2, 3)).all()


# --- Devices --------------------------------------------------------------------


@pytest.mark.parametrize('mode', augment.MIX_MODES)
def test_any_number_of_devices_augments_alike(mode):
    rows = 32
    weight = np.ones(rows, np.float32)
    weight[5] = 0.0
    targets = np.eye(rows, 37, dtype=np.float32)
    batch = noise(rows, 11, 13, 3), targets, weight
    rng = jax.random.key(3)
    erasing = 0.25 if mode == 'batch' else 0.0
    function = BatchAugment(erasing, mixup=0.8, cutmix=1.0, mix_mode=mode)
    expected = jax.jit(function)(rng, *batch)
    assert (expected[0] != batch[0]).any(axis=(1, 2, 3)).sum() > rows / 3

    mesh = Mesh(jax.devices(), (BATCH_AXIS,))
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXIS))
    placed = jax.device_put(batch, sharding)
    compiled = jax.jit(function).lower(rng, *placed).compile()
    moves = r'all-gather|all-reduce|collective-permute|all-to-all'
    assert not re.search(moves, compiled.as_text())
    split = [x.reshape(8, -1, *x.shape[1:]) for x in batch]
    per_device = jax.pmap(function, axis_name=BATCH_AXIS, in_axes=(None, 0, 0, 0))
    for out in (compiled(rng, *placed), per_device(rng, *split)):
        for ours, one in zip(out, expected):
            np.testing.assert_array_equal(np.reshape(ours, one.shape), one)


def test_steps_differ():
    args = noise(4, 5, 7, 1), np.eye(4, dtype=np.float32), np.ones(4)
    function = BatchAugment(mixup=1.0)
    first, _ = run(function, jax.random.key(0), *args)
    later, _ = run(function, jax.random.key(1), *args)
    assert (first != later).any()


# --- Off, and refused -----------------------------------------------------------


@pytest.mark.parametrize(
    'off', [{}, {'mixup': 0.8, 'cutmix': 1.0, 'mix_prob': 0.0, 'mix_mode': 'pair'}]
)
def test_off_adds_nothing_to_the_step(off):
    images, targets = jnp.ones((3, 5, 7, 1)), jnp.eye(3)  # an odd number is fine
    jaxpr = jax.make_jaxpr(BatchAugment(**off))(
        jax.random.key(0), images, targets, jnp.ones(3)
    )
    assert not jaxpr.eqns
    assert jaxpr.jaxpr.outvars == jaxpr.jaxpr.invars[1:3]


def test_an_odd_number_of_rows_is_refused():
    args = noise(3, 5, 7, 1), np.eye(3, dtype=np.float32), np.ones(3)
    with pytest.raises(UserError, match='even number of rows, 2 or 4, not 3'):
        BatchAugment(cutmix=1.0)(jax.random.key(0), *args)
    mixes_nothing = BatchAugment(erasing=0.5)
    assert jax.eval_shape(mixes_nothing, jax.random.key(0), *args)[0].shape[0] == 3


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'mix_mode': 'pairs'}, "augment.mix_mode 'pairs'; did you mean 'pair'"),
        ({'erasing': 1.5}, r'augment.erasing is a probability in \[0, 1\], not 1.5'),
        ({'mix_prob': -0.1}, 'augment.mix_prob is a probability'),
        ({'switch_prob': float('nan')}, 'augment.mix_switch_prob .* not nan'),
        ({'mixup': -1.0}, 'augment.mixup is the alpha .* not -1.0'),
        ({'cutmix': float('inf')}, 'augment.cutmix is the alpha .* not inf'),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        BatchAugment(**options)
