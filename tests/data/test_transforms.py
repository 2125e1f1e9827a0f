import io
import math
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import transforms
from vit_jax.data.order import Order
from vit_jax.data.transforms import (
    EvalTransform,
    TrainTransform,
    center_crop,
    decode_image,
    mirror,
    pad_crop,
    random_resized_crop,
    resize_box,
)
from vit_jax.errors import UserError


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def encode(image, kind='PNG', **kwargs):
    file = io.BytesIO()
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(file, kind, **kwargs)
    return file.getvalue()


# --- Decoding -----------------------------------------------------------------


@pytest.mark.parametrize('kind', ['PNG', 'WEBP'])
def test_decodes_what_was_encoded(kind):
    image = noise(5, 7, 3)
    options = {'lossless': True} if kind == 'WEBP' else {}
    decoded = decode_image(encode(image, kind, **options), 3, 'a')
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, image)


def test_decodes_jpeg():
    """Lossy, so a smooth image, and nearly."""
    ramp = np.linspace(0, 255, 17 * 19 * 3).reshape(17, 19, 3).astype(np.uint8)
    decoded = decode_image(encode(ramp, 'JPEG', quality=95), 3, 'a')
    assert decoded.shape == ramp.shape
    assert np.abs(decoded.astype(int) - ramp).max() <= 8


def test_decodes_grey():
    image = noise(5, 7)
    decoded = decode_image(encode(image), 1, 'a', convert=False)
    np.testing.assert_array_equal(decoded, image[:, :, None])


def test_arrays_are_taken_as_they_are():
    image = noise(5, 7, 2)
    assert decode_image(image, 1, 'a') is image


def test_grey_to_colour_repeats_the_channel():
    image = noise(5, 7)
    expected = np.stack([image] * 3, axis=-1)
    np.testing.assert_array_equal(decode_image(encode(image), 3, 'a'), expected)


def test_colour_to_grey_is_luma():
    """ITU-R 601: 0.299 red + 0.587 green + 0.114 blue."""
    image = noise(5, 7, 3)
    expected = image.astype(float) @ [0.299, 0.587, 0.114]
    decoded = decode_image(encode(image), 1, 'a')
    assert decoded.shape == (5, 7, 1)
    np.testing.assert_allclose(decoded[:, :, 0], expected, atol=0.51)


@pytest.mark.parametrize('channels', [1, 3])
def test_sixteen_bits_keep_the_high_byte(channels):
    """65535 is white; Pillow's own conversion makes all above 255 white."""
    values = np.array([[0, 255, 256, 32768], [40000, 65279, 65280, 65535]])
    decoded = decode_image(encode(values.astype(np.uint16)), channels, 'a')
    expected = [[0, 0, 1, 128], [156, 254, 255, 255]]
    assert decoded.shape == (2, 4, channels)
    for channel in range(channels):
        np.testing.assert_array_equal(decoded[:, :, channel], expected)


def in_mode(mode):
    return Image.fromarray(noise(5, 7, 3)).convert(mode)


GREY = ['1', 'L', 'LA', 'I;16']
COLOUR = ['RGB', 'RGBA', 'P']


@pytest.mark.parametrize('mode', GREY + COLOUR)
def test_channels_are_converted_only_when_asked(mode):
    data = encode(noise(5, 7).astype(np.uint16) if mode == 'I;16' else in_mode(mode))
    right, wrong = (1, 3) if mode in GREY else (3, 1)
    for channels in (1, 3):
        assert decode_image(data, channels, 'a').shape == (5, 7, channels)
    assert decode_image(data, right, 'a', convert=False).shape == (5, 7, right)
    with pytest.raises(UserError) as error:
        decode_image(data, wrong, 'cat.png', convert=False)
    assert str(error.value) == (
        f'cat.png has {right} channel(s), the model takes {wrong}; convert the image '
        f'to {"L" if wrong == 1 else "RGB"}, or pass --convert_channels'
    )


def bomb():
    """A PNG of a few bytes that says it has 20000 x 20000 pixels."""

    def chunk(kind, data):
        crc = struct.pack('>I', zlib.crc32(kind + data))
        return struct.pack('>I', len(data)) + kind + data + crc

    header = struct.pack('>IIBBBBB', 20000, 20000, 8, 0, 0, 0, 0)
    return (
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', header)
        + chunk(b'IDAT', zlib.compress(b''))
        + chunk(b'IEND', b'')
    )


def misfit():
    """A PNG whose data is said to be shorter than it is."""
    data = bytearray(encode(noise(5, 7, 3)))
    data[data.index(b'IDAT') - 1] = 7
    return bytes(data)


BROKEN = {
    'gif': (encode(noise(31, 37), 'GIF'), 'cannot identify image file'),
    'bmp': (encode(noise(31, 37, 3), 'BMP'), 'cannot identify image file'),
    'misfit': (misfit(), 'broken PNG file'),
    'text': (b'hello', 'cannot identify image file'),
    'empty': (b'', 'cannot identify image file'),
    'truncated png': (encode(noise(31, 37, 3))[:1000], 'truncated'),
    'truncated jpeg': (encode(noise(31, 37, 3), 'JPEG')[:1000], 'truncated'),
    'truncated webp': (encode(noise(31, 37, 3), 'WEBP')[:300], 'decod'),
    'bomb': (bomb(), 'exceeds limit'),
}


@pytest.mark.parametrize('name', BROKEN)
def test_broken_files_are_named(name):
    data, reason = BROKEN[name]
    with pytest.raises(UserError, match=f'cat.jpg cannot be decoded: .*{reason}') as e:
        decode_image(data, 3, 'cat.jpg')
    assert '0x' not in str(e.value)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'WEBP'])
def test_damaged_files_never_raise_anything_else(kind):
    data = encode(noise(11, 13, 3), kind)
    rng = np.random.default_rng(0)
    failed = 0
    for _ in range(300):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 3):
            damaged[place] = rng.integers(0, 256)
        try:
            decode_image(bytes(damaged[: rng.integers(1, len(data))]), 3, 'a')
        except UserError:
            failed += 1
    assert failed > 30


# --- Resizing and the central crop --------------------------------------------


def cubic(x):
    """Keys' kernel with a = -1/2."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def weights(length, start, stretch, size):
    """`[size, length]`: the kernel around the centre of each new pixel.

    It widens as the image shrinks (antialiasing), and is cut at the borders.
    """
    scale = max(stretch / size, 1.0)
    matrix = np.zeros((size, length))
    for i in range(size):
        centre = start + (i + 0.5) * stretch / size
        for j in range(length):
            matrix[i, j] = cubic((j + 0.5 - centre) / scale)
    return matrix / matrix.sum(axis=1, keepdims=True)


def resize_reference(image, box, size):
    top, left, height, width = box
    rows = weights(image.shape[0], top, height, size[0])
    cols = weights(image.shape[1], left, width, size[1])
    return np.einsum('ih,jw,hwc->ijc', rows, cols, image.astype(float))


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize(
    ('box', 'size'),
    [
        ((0, 0, 23, 29), (11, 13)),  # smaller
        ((0, 0, 23, 29), (41, 31)),  # larger
        ((3, 5, 17, 19), (7, 37)),  # one way each
        ((2.25, 4.5, 11.5, 13.75), (7, 5)),  # fractional
    ],
)
def test_resize_equals_the_sums(box, size, channels):
    image = 64 + noise(23, 29, channels) // 2  # nothing is clipped on the way
    out = resize_box(image, box, size)
    assert out.shape == (*size, channels)
    assert out.dtype == np.uint8
    np.testing.assert_allclose(out, resize_reference(image, box, size), atol=1.01)


def test_box_of_the_result_s_size_is_cut_out_exactly():
    image = noise(23, 29, 3)
    out = resize_box(image, (3, 5, 7, 11), (7, 11))
    np.testing.assert_array_equal(out, image[3:10, 5:16])


def test_box_between_pixels_is_interpolated():
    image = noise(23, 29, 3)
    for top, left in [(3.5, 5), (3, 5.5)]:
        out = resize_box(image, (top, left, 7, 11), (7, 11))
        assert out.shape == (7, 11, 3)
        assert (out != image[3:10, 5:16]).any()


@pytest.mark.parametrize('shape', [(8, 8, 1), (5, 7, 3), (7, 5, 3)])
def test_center_crop_to_the_same_size_changes_nothing(shape):
    image = noise(*shape)
    np.testing.assert_array_equal(center_crop(image, shape[:2]), image)


@pytest.mark.parametrize(
    ('size', 'fraction', 'rows', 'cols'),
    [
        ((7, 5), 1.0, (0, 7), (1, 6)),  # the whole height of a 7x7 image
        ((3, 3), 3 / 7, (2, 5), (2, 5)),
        ((5, 3), 5 / 7, (1, 6), (2, 5)),
        ((3, 7), 1.0, (2, 5), (0, 7)),
    ],
)
def test_center_crop_without_resizing(size, fraction, rows, cols):
    image = noise(7, 7, 3)
    out = center_crop(image, size, fraction)
    np.testing.assert_array_equal(out, image[slice(*rows), slice(*cols)])


@pytest.mark.parametrize(
    ('shape', 'size', 'fraction', 'box'),
    [
        # The largest part of the shape of `size` that fits, times the fraction.
        ((20, 30, 3), (4, 4), 1.0, (0, 5, 20, 20)),
        ((20, 30, 3), (4, 4), 0.5, (5, 10, 10, 10)),
        ((30, 20, 3), (3, 1), 1.0, (0, 5, 30, 10)),
        ((30, 20, 1), (2, 7), 1.0, (85 / 7, 0, 40 / 7, 20)),
    ],
)
def test_center_crop_box(shape, size, fraction, box, monkeypatch):
    boxes = []
    monkeypatch.setattr(transforms, 'resize_box', lambda *args: boxes.append(args))
    image = noise(*shape)
    center_crop(image, size, fraction, 'bilinear')
    ((image_there, box_there, size_there, interpolation),) = boxes
    assert interpolation == 'bilinear'
    assert image_there is image
    assert box_there == pytest.approx(box)
    assert size_there == size


@pytest.mark.parametrize('name', ['bicubic', 'bilinear'])
def test_interpolation_is_that_of_pillow(name):
    image = noise(15, 30, 3)
    how = Image.Resampling[name.upper()]
    expected = np.asarray(Image.fromarray(image).resize((14, 7), how))
    for transform in (EvalTransform, TrainTransform):
        made = transform(size=(7, 14), channels=3, interpolation=name)
        example = {'image': image, 'label': 0, 'name': 'x', 'weight': 1.0}
        args = () if transform is EvalTransform else (np.random.default_rng(0),)
        np.testing.assert_array_equal(made(example, *args)['image'], expected)


def test_center_crop_is_resize_then_crop():
    """fraction 0.8 to 64 is "resize the short side to 80, crop 64"."""
    image = np.asarray(Image.fromarray(noise(15, 30, 3)).resize((600, 300)))
    whole = Image.fromarray(image).resize((160, 80), Image.Resampling.BICUBIC)
    expected = np.asarray(whole, int)[8:72, 48:112]
    out = center_crop(image, (64, 64), 0.8)
    np.testing.assert_allclose(out[4:-4, 4:-4], expected[4:-4, 4:-4], atol=1)


# --- Random operations --------------------------------------------------------


def test_mirror_exchanges_left_and_right():
    image = noise(5, 7, 3)
    np.testing.assert_array_equal(mirror(image), image[:, ::-1])


def test_pad_crop_shifts_and_lets_zeros_in():
    image, pad = noise(5, 7, 3), 2
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            shifted = np.zeros_like(image)
            for row in range(5):
                for col in range(7):
                    there = row + top - pad, col + left - pad
                    if 0 <= there[0] < 5 and 0 <= there[1] < 7:
                        shifted[row, col] = image[there]
            np.testing.assert_array_equal(pad_crop(image, top, left, pad), shifted)


@pytest.fixture
def boxes(monkeypatch):
    """The boxes that are cut out, in place of the images."""
    found = []

    def record(image, box, size, interpolation):
        found.append(box)
        return size

    monkeypatch.setattr(transforms, 'resize_box', record)
    return found


@pytest.mark.parametrize('shape', [(997, 991, 3), (401, 797, 3)])
@pytest.mark.parametrize('min_scale', [0.08, 0.5])
def test_resized_crop_boxes(boxes, shape, min_scale):
    """Areas uniform, aspect ratios log-uniform, all within the image."""
    rng = np.random.default_rng(0)
    image = np.zeros(shape, np.uint8)
    for _ in range(8000):
        assert random_resized_crop(rng, image, (3, 3), min_scale) == (3, 3)
    top, left, height, width = np.asarray(boxes).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= shape[0]).all()
    assert (left + width <= shape[1]).all()
    share = height * width / (shape[0] * shape[1])
    ratio = np.log(width / height)
    assert share.min() >= min_scale - 0.01
    assert share.max() <= 1.0
    assert np.abs(ratio).max() <= math.log(4 / 3) + 0.02
    if shape[0] == 997:  # boxes of up to 3/4 of the area always fit
        fit = share < 0.74
        assert abs((share[fit] < (min_scale + 0.74) / 2).mean() - 0.5) < 0.04
        assert np.quantile(share[fit], 0.02) < min_scale + 0.03
        limit = math.log(4 / 3)
        counts = np.histogram(ratio[fit], 4, (-limit, limit))[0]
        assert counts.max() < 1.3 * counts.min()
        place = top[fit] / (shape[0] - height[fit])
        assert abs(place.mean() - 0.5) < 0.03
        assert place.min() < 0.02
        assert place.max() > 0.98


def test_resized_crop_reaches_the_last_row_and_column(boxes):
    rng = np.random.default_rng(0)
    for _ in range(200):
        random_resized_crop(rng, np.zeros((5, 5, 3), np.uint8), (2, 2), 0.4)
    assert max(top + height for top, _, height, _ in boxes if height < 5) == 5
    assert max(left + width for _, left, _, width in boxes if width < 5) == 5


def test_resized_crop_is_central_where_no_box_fits(boxes):
    """Ten boxes of the whole area never fit an image of 3x300."""
    image = np.zeros((3, 300, 3), np.uint8)
    random_resized_crop(np.random.default_rng(0), image, (4, 4), 1.0)
    assert boxes == [(0, 148.5, 3, 3)]


def test_resized_crop_resizes_the_box():
    """A box of a smooth ramp is a ramp between the values at its sides."""
    ramp = np.tile(np.arange(0, 240, 2, dtype=np.uint8)[None, :, None], (60, 1, 3))
    rng = np.random.default_rng(1)
    spans = set()
    for _ in range(20):
        out = random_resized_crop(rng, ramp, (7, 11), 0.3).astype(int)
        assert out.shape == (7, 11, 3)
        assert (out == out[:1]).all()
        steps = np.diff(out[0, :, 0])
        assert np.ptp(steps[1:-1]) <= 2
        assert steps.min() > 0
        spans.add((out[0, 0, 0], out[0, -1, 0]))
    assert len(spans) > 15


def test_the_resized_crop_is_a_function_of_the_generator():
    image = noise(11, 13, 3)

    def run(seed):
        rng = np.random.default_rng(seed)
        crops = [random_resized_crop(rng, image, (5, 3)) for _ in range(9)]
        return np.concatenate([crop.ravel() for crop in crops])

    np.testing.assert_array_equal(run(3), run(3))
    assert (run(3) != run(4)).any()


# --- From a source's example to a batch's -------------------------------------


def example(image, **kwargs):
    return {'image': image, 'label': 3, 'name': 'cat.png', **kwargs}


# The words of some positions.
DRAWS = list(Order(1, 0).words_at(np.arange(9)))


def shift(image, draw, pad):
    """Shifted as the words of its position say, by rolling."""
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    rows, columns = (int(word) % (2 * pad + 1) for word in draw[:2])
    rolled = np.roll(padded, (-rows, -columns), axis=(0, 1))
    return rolled[: image.shape[0], : image.shape[1]]


def flip(image, draw):
    return np.flip(image, axis=1) if draw[2] >= 2**31 else image


def test_train_transform_without_augmentation_is_the_central_crop():
    image = noise(17, 23, 3)
    out = TrainTransform((5, 7), 3)(example(encode(image)), np.random.default_rng(0))
    assert sorted(out) == ['image', 'label', 'weight']
    np.testing.assert_array_equal(out['image'], center_crop(image, (5, 7)))
    assert (out['label'], out['label'].dtype) == (3, np.int32)
    assert (out['weight'], out['weight'].dtype) == (1.0, np.float32)


@pytest.mark.parametrize(
    ('fields', 'operations'),
    [
        ({}, lambda rng, draw, x: center_crop(x, (5, 7))),
        (
            {'crop': 'pad', 'pad': 2},
            lambda rng, draw, x: shift(center_crop(x, (5, 7)), draw, 2),
        ),
        (
            {'crop': 'resized', 'min_scale': 0.3},
            lambda rng, draw, x: random_resized_crop(rng, x, (5, 7), 0.3),
        ),
        ({'flip': True}, lambda rng, draw, x: flip(center_crop(x, (5, 7)), draw)),
        (
            {'crop': 'pad', 'pad': 2, 'flip': True},
            lambda rng, draw, x: flip(shift(center_crop(x, (5, 7)), draw, 2), draw),
        ),
        (
            {'crop': 'resized', 'min_scale': 0.3, 'flip': True},
            lambda rng, draw, x: flip(random_resized_crop(rng, x, (5, 7), 0.3), draw),
        ),
    ],
)
def test_train_transform_applies_its_operations(fields, operations):
    image = noise(11, 13, 3)
    transform = TrainTransform((5, 7), 3, **fields)
    assert len({draw[2] >> 31 for draw in DRAWS}) == 2
    for seed, draw in enumerate(DRAWS):
        rng = np.random.default_rng(seed)
        out = transform(example(encode(image), draw=draw), rng)
        expected = operations(np.random.default_rng(seed), draw, image)
        np.testing.assert_array_equal(out['image'], expected)
        assert out['image'].flags.c_contiguous


def test_train_transform_of_an_unknown_crop():
    with pytest.raises(UserError, match=r"augment.crop 'resize'; .* 'resized'"):
        TrainTransform((5, 7), 3, crop='resize')


@pytest.mark.parametrize('weight', [0.0, 1.0])
def test_eval_transform(weight):
    image = noise(17, 23)
    out = EvalTransform((5, 7), 1, 0.8)(example(encode(image), weight=weight))
    expected = center_crop(image[:, :, None], (5, 7), 0.8)
    np.testing.assert_array_equal(out['image'], expected)
    assert (out['label'], out['label'].dtype) == (3, np.int32)
    assert (out['weight'], out['weight'].dtype) == (weight, np.float32)


def test_errors_name_the_image():
    with pytest.raises(UserError, match=r'cat\.png cannot be decoded'):
        EvalTransform((5, 7), 1)(example(b'', weight=1.0))
    with pytest.raises(UserError, match=r'cat\.png cannot be decoded'):
        TrainTransform((5, 7), 1)(example(b''), None)


def train(transform, example, seed=0):
    return transform({**example, 'draw': DRAWS[0]}, np.random.default_rng(seed))


@pytest.mark.parametrize('weight', [0.0, 1.0])
def test_corrupt_images_become_rows_without_weight(weight, caplog):
    """Zeros, label 0; told once per file."""
    train_transform = TrainTransform((5, 7), 1, crop='pad', pad=1, skip_corrupt=True)
    transforms = (
        lambda x: train(train_transform, x),
        EvalTransform((5, 7), 1, skip_corrupt=True),
    )
    for transform in transforms:
        caplog.clear()
        for _ in range(3):
            out = transform(example(b'', weight=weight))
            assert not out['image'].any()
            assert (out['image'].shape, out['image'].dtype) == ((5, 7, 1), np.uint8)
            assert (out['label'], out['label'].dtype) == (0, np.int32)
            assert (out['weight'], out['weight'].dtype) == (0.0, np.float32)
        (record,) = caplog.records
        assert record.levelname == 'WARNING'
        assert record.getMessage().startswith('cat.png cannot be decoded: ')
        assert record.getMessage().endswith('; its row has weight 0')
        sound = transform(example(encode(noise(17, 23)), weight=weight))
        assert sound['label'] == 3


def test_twenty_corrupt_images_are_told(caplog):
    transform = EvalTransform((5, 7), 1, skip_corrupt=True)
    for i in range(25):
        transform({**example(b'', weight=1.0), 'name': f'{i}.png'})
    assert [r.getMessage().split()[0] for r in caplog.records] == [
        f'{i}.png' for i in range(20)
    ]
    assert caplog.records[-1].getMessage().endswith('more of them will not be told')


def test_skipping_is_for_corrupt_images_only():
    transform = EvalTransform((5, 7), 3, skip_corrupt=True)
    with pytest.raises(UserError, match='5x7x1, expected 5x7x3'):
        transform(example(noise(5, 7, 1), weight=1.0))


def test_randaugment_comes_last():
    def brighten(rng, image):
        return image + rng.integers(1, 9, dtype=np.uint8)

    image = noise(11, 13, 3)
    transform = TrainTransform((5, 7), 3, flip=True, randaugment=brighten)
    out = train(transform, example(encode(image)), seed=4)
    rng = np.random.default_rng(4)
    expected = brighten(rng, flip(center_crop(image, (5, 7)), DRAWS[0]))
    np.testing.assert_array_equal(out['image'], expected)


def test_images_of_other_channels():
    transform = EvalTransform((5, 7), 3)
    with pytest.raises(UserError, match='5x7x1, expected 5x7x3'):
        transform(example(noise(5, 7, 1), weight=1.0))


@pytest.mark.parametrize('size', [28, 224])
def test_center_crop_fits_images_of_every_side(size):
    for side in range(1, 1025):
        image = np.zeros((side, side + 1, 1), np.uint8)
        assert center_crop(image, (size, size)).shape == (size, size, 1)
