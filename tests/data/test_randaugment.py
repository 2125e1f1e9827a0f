import pathlib
import pickle

import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from PIL import Image

from vit_jax.data import randaugment
from vit_jax.data.randaugment import AMOUNTS, OPERATIONS, Canvas, parse_randaugment
from vit_jax.errors import UserError

DEIT = 'rand-m9-mstd0.5-inc1'
NEAREST = Image.Resampling.NEAREST
FILL = {'rgb': (124, 116, 104), 'grey': (117,)}  # of the golden file
MOVING = {'Rotate', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY'}
INCREASING = {
    'Posterize', 'Solarize', 'Color', 'Contrast', 'Brightness', 'Sharpness'
}  # fmt: skip


def load():
    path = pathlib.Path(__file__).parent.parent / 'golden' / 'augment.npz'
    with np.load(path, allow_pickle=False) as arrays:
        return unflatten_dict(dict(arrays), sep='/')['randaugment']


GOLDEN = load()
IMAGES = {kind: Image.fromarray(pixels) for kind, pixels in GOLDEN['images'].items()}


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


# --- Operations, against timm and torchvision -----------------------------------


def ours(name):
    """timm's 'TranslateXRel' or 'PosterizeIncreasing' -> (our name, increasing)."""
    plain = name.removesuffix('Increasing')
    return plain.removesuffix('Rel'), plain != name


@pytest.mark.parametrize('name', GOLDEN['timm'])
def test_operations_are_those_of_timm(name):
    case, (operation, _) = GOLDEN['timm'][name], ours(name)
    assert (operation in MOVING) == ('rgb_BILINEAR' in case)
    for key, expected in case.items():
        if '_' not in key:
            continue
        kind, filter = key.split('_')
        canvas = Canvas(Image.Resampling[filter], FILL[kind])
        for amount, pixels in zip(case['applied'], expected, strict=True):
            # Stored in single precision: what was 1.81 is no exact factor.
            amount = round(float(amount), 6)
            out = OPERATIONS[operation](IMAGES[kind], amount, canvas)
            np.testing.assert_array_equal(out, pixels, err_msg=f'{key} {amount}')


@pytest.mark.parametrize('name', GOLDEN['timm'])
def test_amounts_are_those_of_timm(name):
    case, (operation, increasing) = GOLDEN['timm'][name], ours(name)
    tables = ['timm_increasing'] if increasing else ['timm']
    if operation not in INCREASING:  # the same in both
        tables = ['timm', 'timm_increasing']
    for table in tables:
        for level, expected in zip(case['levels'], case['amounts'], strict=True):
            level = round(float(level), 6)
            amounts = [AMOUNTS[table][operation](level / 10, sign) for sign in (1, -1)]
            if operation == 'Posterize':  # no bits are left, and no fewer
                expected = np.maximum(expected, 0)
            np.testing.assert_allclose(sorted(amounts), expected, rtol=1e-6, atol=1e-7)


def test_the_operations_of_timm_are_all_there():
    names = [ours(name) for name in GOLDEN['timm']]
    for table, increasing in (('timm', False), ('timm_increasing', True)):
        expected = {
            name for name, inc in names if inc == (increasing and name in INCREASING)
        }
        assert set(AMOUNTS[table]) == expected
        assert len(expected) == 15


@pytest.mark.parametrize('name', GOLDEN['torchvision'])
def test_plain_operations_are_those_of_torchvision(name):
    case = GOLDEN['torchvision'][name]
    for kind in IMAGES:
        canvas = Canvas(NEAREST, (0,) * len(FILL[kind]))
        for magnitude, expected in zip(case['magnitudes'], case[kind], strict=True):
            for sign, pixels in zip((1, -1), expected, strict=True):
                amount = AMOUNTS['plain'][name](magnitude / 30, sign)
                out = OPERATIONS[name](IMAGES[kind], amount, canvas)
                np.testing.assert_array_equal(out, pixels, err_msg=f'{magnitude}')
    assert set(AMOUNTS['plain']) == set(GOLDEN['torchvision'])


def test_no_bits_are_black():
    """Magnitude 10 of timm's increasing Posterize; Pillow refuses it."""
    amount = AMOUNTS['timm_increasing']['Posterize'](1.0, 1)
    out = OPERATIONS['Posterize'](IMAGES['rgb'], amount, Canvas(NEAREST, (0, 0, 0)))
    assert not np.asarray(out).any()


# --- What is drawn --------------------------------------------------------------


class Recorder:
    """Stands in front of every operation, and notes name, amount and canvas."""

    def __init__(self, monkeypatch):
        self.calls = []
        for name in OPERATIONS:
            monkeypatch.setitem(OPERATIONS, name, self.note(name))

    def note(self, name):
        def operation(image, amount, canvas):
            self.calls.append((name, amount, canvas))
            return image

        return operation

    def run(self, spec, count, image=None, **options):
        """The calls while `count` images are augmented."""
        self.calls.clear()
        augment, rng = parse_randaugment(spec, **options), np.random.default_rng(0)
        image = noise(5, 7, 3) if image is None else image
        for _ in range(count):
            augment(rng, image)
        return list(self.calls)


@pytest.fixture
def recorder(monkeypatch):
    return Recorder(monkeypatch)


@pytest.mark.parametrize(
    ('spec', 'num_names', 'per_image'),
    [(DEIT, 15, 1.0), ('rand-n3-p0.8', 15, 2.4), ('plain', 14, 2), ('plain-n1', 14, 1)],
)
def test_every_operation_is_drawn_alike(recorder, spec, num_names, per_image):
    calls = recorder.run(spec, 3000)
    assert abs(len(calls) / 3000 - per_image) < 0.05
    names, counts = np.unique([name for name, *_ in calls], return_counts=True)
    assert len(names) == num_names
    expected = len(calls) / num_names
    assert np.abs(counts - expected).max() < 4 * np.sqrt(expected)


def rotations(calls):
    return np.array([amount for name, amount, _ in calls if name == 'Rotate']) / 3


def test_noise_of_the_magnitude(recorder):
    signed = rotations(recorder.run(DEIT, 20000))
    assert abs((signed > 0).mean() - 0.5) < 0.06
    magnitudes = np.abs(signed)
    assert abs(np.median(magnitudes) - 9) < 0.06
    below = magnitudes[magnitudes < 9]  # above, 10 cuts the noise off
    assert abs(np.sqrt(np.mean((below - 9) ** 2)) - 0.5) < 0.04
    assert magnitudes.max() == 10
    assert 0.01 < (magnitudes == 10).mean() < 0.04  # beyond 2 sigma: 0.023


def test_no_noise_when_none_is_asked_for(recorder):
    assert set(np.abs(rotations(recorder.run('rand-m7', 900))).round(9)) == {7.0}
    assert set(np.abs(rotations(recorder.run('plain-m6', 900))).round(9)) == {2.0}
    assert set(np.abs(rotations(recorder.run('rand-m12', 900)))) == {10.0}
    assert set(np.abs(rotations(recorder.run('rand-m12-mmax20', 900)))) == {12.0}


@pytest.mark.parametrize('spread', ['mstdinf', 'mstd101'])
def test_uniform_magnitudes(recorder, spread):
    magnitudes = np.abs(rotations(recorder.run(f'rand-m8-{spread}', 9000)))
    quarters = np.histogram(magnitudes, 4, (0, 8))[0] / len(magnitudes)
    np.testing.assert_allclose(quarters, 0.25, atol=0.06)
    assert magnitudes.max() < 8


def test_inc_chooses_the_increasing_operations(recorder):
    for spec, bits in {'rand-m9-inc1': 1, 'rand-m9': 3, 'rand-m9-inc0': 3}.items():
        calls = recorder.run(spec, 300)
        assert {amount for name, amount, _ in calls if name == 'Posterize'} == {bits}


def test_canvas_of_each_form(recorder):
    bicubic, bilinear = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR

    def canvases(spec, **options):
        return {canvas for _, _, canvas in recorder.run(spec, 40, **options)}

    rgb = (124, 116, 104)
    assert canvases(DEIT) == {Canvas(bicubic, rgb)}
    assert canvases(DEIT, interpolation='bilinear') == {Canvas(bilinear, rgb)}
    assert canvases(DEIT, mean=(0.5,)) == {Canvas(bicubic, (128,) * 3)}
    assert canvases(DEIT, image=noise(5, 7, 1)) == {Canvas(bicubic, (115,))}
    assert canvases('plain') == {Canvas(NEAREST, (0, 0, 0))}


# --- The whole ------------------------------------------------------------------


@pytest.mark.parametrize('spec', [DEIT, 'rand', 'plain-n3-m30'])
@pytest.mark.parametrize('channels', [1, 3])
def test_images_keep_shape_and_type(spec, channels):
    """Of a mirrored view too, as a flip leaves them."""
    augment, rng = parse_randaugment(spec), np.random.default_rng(0)
    image, changed = noise(11, 13, channels)[:, ::-1], 0
    before = image.copy()
    for _ in range(60):
        out = augment(rng, image)
        assert (out.shape, out.dtype) == ((11, 13, channels), np.uint8)
        changed += (out != image).any()
    assert changed > 30
    np.testing.assert_array_equal(image, before)


def test_a_result_is_a_function_of_the_seed():
    augment, image = parse_randaugment(DEIT), noise(11, 13, 3)
    copy = pickle.loads(pickle.dumps(augment))  # as workers get it
    for seed in range(20):
        first, again = (f(np.random.default_rng(seed), image) for f in (augment, copy))
        np.testing.assert_array_equal(first, again)


def test_colour_leaves_grey_images():
    grey = Image.fromarray(noise(11, 13))
    for amount in (0.1, 0.5, 1.9):
        out = OPERATIONS['Color'](grey, amount, Canvas(NEAREST, (0,)))
        np.testing.assert_array_equal(out, grey)


@pytest.mark.parametrize('channels', [2, 4])
def test_other_channels_are_refused(channels):
    with pytest.raises(UserError, match=f'1 or 3 channels, not 5x7x{channels}'):
        parse_randaugment(DEIT)(np.random.default_rng(0), noise(5, 7, channels))


@pytest.mark.parametrize(
    ('spec', 'message'),
    [
        ('rnd-m9', "augment.randaugment 'rnd'; did you mean 'rand'"),
        ('', "augment.randaugment ''; choose one of: plain, rand"),
        ('rand-m9-x1', "'x1' is none of m, n, p, mstd, mmax, inc with a number, as"),
        ('rand-w0', "'w0' is none of"),
        ('rand-m', "'m' is none of"),
        ('rand-m-9', "'m' is none of"),
        ('rand-minf', "'minf' is none of"),
        ('rand-m9-', "'' is none of"),
        ('rand-m1-m2', "'rand-m1-m2' gives m twice"),
        ('rand-n1.5', 'n is a whole number, not 1.5'),
        ('rand-n0', 'n is above 0'),
        ('rand-mmax0', 'mmax is above 0'),
        ('rand-p1.1', 'p is at most 1'),
        ('rand-inc2', 'inc is at most 1'),
        ('plain-p1', "'p1' is none of m, n with a number, as in 'plain-n2-m9'"),
        ('plain-m31', 'm is at most 30'),
    ],
)
def test_specs_that_cannot_be_read(spec, message):
    with pytest.raises(UserError) as error:
        parse_randaugment(spec)
    assert message in str(error.value)
    assert '\n' not in str(error.value)


def test_an_unknown_interpolation_offers_the_nearest():
    with pytest.raises(UserError, match="'bicubik'; did you mean 'bicubic'"):
        randaugment.parse_randaugment(DEIT, interpolation='bicubik')
    # timm's 'random', of these, is what no recipe here trains with.
    with pytest.raises(UserError, match="'random'; choose one of: bicubic, bilinear"):
        randaugment.parse_randaugment(DEIT, interpolation='random')
