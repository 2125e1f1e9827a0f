import dataclasses
import io
import itertools
import re
from contextlib import closing
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from PIL import Image

from vit_jax.data.input_pipeline import train_batches
from vit_jax.data.order import Order
from vit_jax.data.resident import MakeBatch, check_supported, load, scan_steps
from vit_jax.data.transforms import TrainTransform
from vit_jax.errors import UserError

SIZE, BATCH, SEED = 37, 8, 5
SHAPE = (5, 7, 3)


class Images:
    """PNGs of noise; label i, of which number 11 is cut off."""

    corrupt = ()

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        pixels = np.random.default_rng(index).integers(0, 256, (11, 13, 3))
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, 'PNG')
        data = file.getvalue()
        cut = 100 if index in self.corrupt else len(data)
        return {'image': data[:cut], 'label': index, 'name': f'{index}.png'}


class Damaged(Images):
    corrupt = (11,)


PLAIN = TrainTransform(SHAPE[:2], 3, skip_corrupt=True)
AUGMENTED = TrainTransform(
    SHAPE[:2], 3, crop='pad', pad=2, flip=True, skip_corrupt=True
)


@pytest.fixture(scope='module')
def data():
    return load(Damaged(), PLAIN)


def host_batches(count, start=0, source=None, repeats=1, transform=PLAIN):
    batches = train_batches(
        source or Damaged(),
        transform,
        batch_size=BATCH,
        seed=SEED,
        start=start,
        repeats=repeats,
    )
    with closing(batches):
        return list(itertools.islice(batches, count))


def maker(repeats=1, **kwargs):
    return MakeBatch(Order(SIZE, SEED, BATCH, repeats), **kwargs)


def nth(first, i):
    return {key: value[i] for key, value in first.items()}


# --- Loading -------------------------------------------------------------------------


def test_load_decodes_each_example_once(data):
    """As the host's transform does without its random parts."""
    again = load(Damaged(), AUGMENTED)
    assert data['image'].shape == (SIZE, *SHAPE)
    for i in range(SIZE):
        expected = PLAIN(Damaged()[i], None)
        for key in ('image', 'label', 'weight'):
            np.testing.assert_array_equal(data[key][i], expected[key])
            np.testing.assert_array_equal(again[key][i], expected[key])
    assert [data[key].dtype for key in data] == [np.uint8, np.int32, np.float32]
    assert np.flatnonzero(data['weight'] == 0).tolist() == [11]


def test_load_names_a_corrupt_image():
    transform = TrainTransform(SHAPE[:2], 3)
    with pytest.raises(UserError, match=r'11\.png cannot be decoded'):
        load(Damaged(), transform)


def test_load_of_what_does_not_fit():
    """37 x (5 x 7 x 3 + 8) bytes; the images are not even read."""
    needed = SIZE * (5 * 7 * 3 + 8)
    assert load(Images(), PLAIN, memory=needed)['image'].shape[0] == SIZE
    gib = re.escape(f'{100_000 * (224 * 224 * 3 + 8) / 2**30:.2f}')

    class Many(Images):
        def __len__(self):
            return 100_000

    with pytest.raises(UserError, match=rf'{gib} GiB .* device, and 2\.50 GiB'):
        load(Many(), TrainTransform((224, 224), 3), memory=5 * 2**29)
    with pytest.raises(UserError, match=r"dataset\.placement='host'"):
        load(Images(), PLAIN, memory=needed - 1)


@pytest.mark.parametrize(
    ('args', 'key'),
    [(('resized', None), "crop='resized'"), (('pad', 'rand-m9'), 'randaugment')],
)
def test_augmentation_of_the_host_is_refused(args, key):
    check_supported('pad', None)
    with pytest.raises(UserError, match=key):
        check_supported(*args)


# --- Batches -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('transform', 'augment'),
    [
        (PLAIN, {}),
        (AUGMENTED, {'pad': 2, 'flip': True}),
        (dataclasses.replace(AUGMENTED, flip=False), {'pad': 2}),
        (dataclasses.replace(AUGMENTED, crop='none', pad=0), {'flip': True}),
    ],
    ids=['plain', 'both', 'pad', 'flip'],
)
@pytest.mark.parametrize(
    ('start', 'repeats'), [(0, 1), (19, 1), (16, 3), (2**32 - 19, 1)]
)
def test_batches_are_those_of_the_host_bit_for_bit(
    data, start, repeats, transform, augment
):
    """Over several epochs, from the middle, with a corrupt image."""
    expected = host_batches(12, start, repeats=repeats, transform=transform)
    make = maker(repeats, **augment)
    first = make.first(start, 12)
    step = jax.jit(make)
    for i, batch in enumerate(expected):
        found = step(data, nth(first, i))
        assert sorted(found) == sorted(batch)
        for key, values in batch.items():
            assert found[key].dtype == values.dtype
            np.testing.assert_array_equal(found[key], values)


def shifts(image, found, pad):
    """All (down, right, mirrored) that make `found` of `image`, zeros coming in."""
    h, w, _ = image.shape
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    fitting = []
    for top, left in itertools.product(range(2 * pad + 1), repeat=2):
        cut = padded[top : top + h, left : left + w]
        for mirrored in (False, True):
            if (found == (cut[:, ::-1] if mirrored else cut)).all():
                fitting.append((top, left, mirrored))
    return fitting


def test_random_augmentation_is_a_shift_and_a_mirror_per_position(data):
    make = maker(pad=2, flip=True)
    plain = jax.jit(jax.vmap(maker(), in_axes=(None, 0)))
    step = jax.jit(jax.vmap(make, in_axes=(None, 0)))
    first = make.first(0, 24)
    images = np.asarray(step(data, first)['image'])
    originals = np.asarray(plain(data, first)['image'])
    drawn = []
    for image, found in zip(originals.reshape(-1, *SHAPE), images.reshape(-1, *SHAPE)):
        if image.any():
            (shift,) = shifts(image, found, 2)
            drawn.append(shift)
    counts = [np.bincount(column) for column in np.array(drawn, int).T]
    for count, places in zip(counts, (5, 5, 2)):
        assert len(count) == places
        assert count.min() > 0.5 * len(drawn) / places
    # A function of the position: whatever the first row of a batch is.
    other = np.asarray(step(data, make.first(3, 12))['image'])
    rows = images.reshape(-1, *SHAPE)
    np.testing.assert_array_equal(other.reshape(-1, *SHAPE), rows[3 : 3 + 12 * BATCH])


# --- Steps ---------------------------------------------------------------------------


TX = optax.adam(0.01)


def init():
    params = {'kernel': jnp.zeros((5 * 7 * 3, SIZE)), 'bias': jnp.zeros(SIZE)}
    return params, TX.init(params)


def train_step(state, batch):
    """Softmax regression."""
    params, opt_state = state
    images = batch['image'].reshape(len(batch['label']), -1) / 255.0
    total = batch['weight'].sum()

    def loss_fn(params):
        logits = images @ params['kernel'] + params['bias']
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
        return jnp.sum(losses * batch['weight']) / total

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = TX.update(grads, opt_state)
    metrics = {'loss': (loss * total, total)}
    return (optax.apply_updates(params, updates), opt_state), metrics


def on_mesh(count):
    mesh = Mesh(np.array(jax.devices()[:count]), ('data',), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(
        mesh, PartitionSpec('data')
    )


def resident_run(data, make, count, num_steps=12, per_call=4):
    replicated, rows = on_mesh(count)
    steps = jax.jit(scan_steps(train_step, make, rows), out_shardings=replicated)
    data = jax.device_put(data, replicated)
    state, losses = jax.device_put(init(), replicated), []
    for start in range(0, num_steps, per_call):
        first = make.first(start * BATCH, per_call)
        state, metrics = steps(state, {'data': data, 'first': first})
        assert metrics['loss'][0].shape == (per_call,)
        losses.append(metrics['loss'][0] / metrics['loss'][1])
    return state[0], np.concatenate(losses)


def test_training_is_that_of_the_host_pipeline(data):
    state, losses = init(), []
    for batch in host_batches(12):
        state, metrics = jax.jit(train_step)(state, batch)
        losses.append(metrics['loss'][0] / metrics['loss'][1])
    for count in (1, 8):
        params, found = resident_run(data, maker(), count)
        np.testing.assert_allclose(found, losses, rtol=2e-6)
        for key, value in state[0].items():
            np.testing.assert_allclose(params[key], value, rtol=1e-4, atol=1e-6)
    assert losses[-1] < losses[0]


def test_training_does_not_depend_on_devices_or_on_steps_per_call(data):
    """With random augmentation."""
    make = maker(pad=2, flip=True)
    params, losses = resident_run(data, make, 1)
    found, same = resident_run(data, make, 1, per_call=6)
    np.testing.assert_array_equal(same, losses)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    _, others = resident_run(data, make, 8)
    np.testing.assert_allclose(others, losses, rtol=2e-6)


def test_the_data_is_no_part_of_the_program_and_stays_where_it_is(data):
    replicated, rows = on_mesh(8)
    make = maker(pad=1, flip=True)
    shapes = jax.eval_shape(lambda: (init(), {'data': data, 'first': make.first(0, 3)}))
    place = partial(jax.ShapeDtypeStruct, sharding=replicated)
    shapes = jax.tree.map(lambda x: place(x.shape, x.dtype), shapes)
    steps = jax.jit(scan_steps(train_step, make, rows), out_shardings=replicated)
    compiled = steps.lower(*shapes).compile().as_text()
    assert not re.search(r'[us]8\[\d+,5,7,3\]\S* constant', compiled)
    assert re.search(r'u8\[37,5,7,3\]\S* parameter', compiled)
    # Each device takes its own rows out of the images; none are exchanged. (Whether
    # all places are found is asked of all devices, and gradients are summed.)
    assert re.search(r'u8\[1,5,7,3\]', compiled)
    exchanged = re.findall(r'= (\S+) (?:all|collective)-[a-z-]+\(', compiled)
    assert exchanged
    assert not [shape for shape in exchanged if '8[' in shape or shape.count(',') > 2]
