import itertools
import os
import re
from contextlib import closing

import numpy as np
import pytest
from PIL import Image

from vit_jax.data.datasets import load_dataset
from vit_jax.data.input_pipeline import Shard, eval_batches, train_batches
from vit_jax.data.order import Order
from vit_jax.data.resident import load
from vit_jax.data.transforms import EvalTransform, TrainTransform
from vit_jax.errors import UserError

SIZE = 13  # examples of a split


class Numbers:
    """Example i has label i and an image that counts from 10 i."""

    def __init__(self, size=SIZE):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        image = (10 * index + np.arange(6)).reshape(2, 3, 1).astype(np.uint8)
        return {'image': image, 'label': index, 'name': f'number {index}'}


PLAIN = TrainTransform((2, 3), 1)
EVAL = EvalTransform((2, 3), 1)


class Draw:
    """A transform that shows the example and the number that it draws."""

    def __call__(self, example, rng):
        return {'label': np.int32(example['label']), 'drawn': rng.random()}


NUMBERS = Numbers()
DRAW = Draw()


def take(count, source=NUMBERS, transform=DRAW, **kwargs):
    """The first `count` batches of training."""
    kwargs = {'batch_size': 4, 'seed': 5, **kwargs}
    batches = train_batches(source, transform, **kwargs)
    with closing(batches):
        return list(itertools.islice(batches, count))


def column(batches, key='label'):
    return np.concatenate([batch[key] for batch in batches])


def rows(batches):
    return list(zip(column(batches), column(batches, 'drawn')))


# --- Training -----------------------------------------------------------------


def test_each_epoch_is_another_permutation():
    """Batches go on across the borders of epochs."""
    labels = column(take(13)).reshape(4, SIZE)  # 4 x 13 examples
    for epoch in labels:
        assert sorted(epoch) == list(range(SIZE))
        assert epoch.tolist() != list(range(SIZE))
    assert len({tuple(epoch) for epoch in labels}) == 4


def test_augmentation_differs_from_epoch_to_epoch():
    drawn = {}
    for label, number in rows(take(13)):
        drawn.setdefault(label, set()).add(number)
    assert [len(drawn[label]) for label in range(SIZE)] == [4] * SIZE
    assert len(set.union(*drawn.values())) == 4 * SIZE


def test_order_is_a_function_of_the_seed():
    assert rows(take(7)) == rows(take(7))
    other = take(7, seed=6)
    assert column(take(7)).tolist() != column(other).tolist()
    assert not set(column(take(7), 'drawn')) & set(column(other, 'drawn'))


@pytest.mark.parametrize('batch_size', [1, 4, SIZE, 17])
def test_order_does_not_depend_on_the_batch_size(batch_size):
    expected = rows(take(13))[:34]
    count = -(-34 // batch_size)
    assert rows(take(count, batch_size=batch_size))[:34] == expected


@pytest.mark.parametrize('start', [0, 1, 4, 6, SIZE, 31])
def test_starting_later_drops_the_first_examples(start):
    expected = rows(take(17))[start : start + 28]
    assert rows(take(7, start=start)) == expected


@pytest.mark.parametrize('count', [1, 2, 4])
@pytest.mark.parametrize('start', [0, 7])
def test_shards_are_rows_of_the_global_batch(count, start):
    whole = take(5, batch_size=8, start=start)
    parts = [
        take(5, batch_size=8, start=start, shard=Shard(i, count)) for i in range(count)
    ]
    for step, batch in enumerate(whole):
        local = [part[step] for part in parts]
        assert [len(batch['label']) for batch in local] == [8 // count] * count
        assert rows([batch]) == rows(local)


def test_examples_and_generators_are_those_of_their_positions():
    """Far into the run too, from a start inside an epoch, with a shard's rows."""
    start, seed = 10**9 + 7, 11
    found = rows(take(7, start=start, seed=seed, shard=Shard(1, 2)))
    positions = [start + 4 * step + row for step in range(7) for row in (2, 3)]
    expected = Order(SIZE, seed).example_at(np.array(positions))
    assert [label for label, _ in found] == expected.tolist()
    for position, (_, drawn) in zip(positions, found):
        bits = np.random.Philox(seed)
        state = bits.state
        state['state']['counter'] = np.array([0, 0, 0, position], np.uint64)
        bits.state = state
        assert np.random.Generator(bits).random() == drawn


@pytest.mark.parametrize('num_workers', [0, 2])
def test_repeats_show_each_image_of_a_batch_with_other_augmentation(num_workers):
    batches = take(6, batch_size=8, repeats=3, num_workers=num_workers)
    plain = column(take(3, batch_size=6))
    for step, batch in enumerate(batches):
        drawn = plain[3 * step : 3 * step + 3]
        assert batch['label'].tolist() == [drawn[row % 3] for row in range(8)]
    assert len(set(column(batches, 'drawn'))) == 48


def test_repeats_and_shards():
    """The rows of a process are those of the global batch."""
    whole = take(3, batch_size=8, repeats=3, start=16)
    parts = [
        take(3, batch_size=8, repeats=3, start=16, shard=Shard(i, 2)) for i in (0, 1)
    ]
    for step, batch in enumerate(whole):
        assert rows([batch]) == rows([part[step] for part in parts])
    assert rows(whole) == rows(take(5, batch_size=8, repeats=3))[16:]


def test_repeats_that_leave_one_image():
    with pytest.raises(UserError, match='repeats 5 fills the batch of 4'):
        take(1, repeats=5)


class Told:
    """Augments, and tells in which process."""

    augment = TrainTransform((2, 3), 1, crop='pad', pad=1, flip=True)

    def __call__(self, example, rng):
        return {**self.augment(example, rng), 'process': np.int64(os.getpid())}


def test_workers_change_nothing():
    """Here in the middle of an epoch, of one shard of two."""
    kwargs = {'transform': Told(), 'start': 3, 'shard': Shard(1, 2)}
    here, there = (take(5, num_workers=n, **kwargs) for n in (0, 2))
    assert set(column(here, 'process')) == {os.getpid()}
    workers = set(column(there, 'process'))
    assert len(workers) == 2
    assert os.getpid() not in workers
    for key in ('image', 'label', 'weight'):
        np.testing.assert_array_equal(column(here, key), column(there, key))


def test_batches_hold_what_the_transform_made():
    batches = take(2, transform=PLAIN)
    for batch in batches:
        assert sorted(batch) == ['image', 'label', 'weight']
        assert (batch['image'].shape, batch['image'].dtype) == ((4, 2, 3, 1), np.uint8)
        assert (batch['label'].shape, batch['label'].dtype) == ((4,), np.int32)
        assert batch['weight'].tolist() == [1.0] * 4
        for image, label in zip(batch['image'], batch['label']):
            np.testing.assert_array_equal(image, NUMBERS[label]['image'])


def test_augmented_images_are_those_of_a_generator_per_position():
    """The pixels too are a function of (seed, i), wherever the run starts."""
    transform = TrainTransform((2, 3), 1, crop='pad', pad=2, flip=True)
    whole = column(take(10, transform=transform), 'image')
    part = column(take(3, transform=transform, start=18), 'image')
    np.testing.assert_array_equal(part, whole[18:30])
    assert len({image.tobytes() for image in whole}) > SIZE


def test_a_batch_may_be_larger_than_the_split():
    batches = take(2, source=Numbers(3), batch_size=7)
    assert column(batches).shape == (14,)
    assert sorted(column(batches)[:3]) == [0, 1, 2]


def test_splits_without_examples():
    with pytest.raises(UserError, match='training split has no examples'):
        take(1, source=Numbers(0))
    with pytest.raises(UserError, match='evaluation split has no examples'):
        eval_batches(Numbers(0), EVAL, batch_size=4)


# --- Evaluation ---------------------------------------------------------------


def evaluate(**kwargs):
    with closing(eval_batches(NUMBERS, EVAL, **kwargs)) as batches:
        return list(batches)


@pytest.mark.parametrize('batch_size', [2, 4, 8, SIZE + 1, 26, 64])
@pytest.mark.parametrize('count', [1, 2])
def test_every_example_is_evaluated_once(batch_size, count):
    """In order, at weight 1; what fills the last batch has weight 0."""
    parts = [
        evaluate(batch_size=batch_size, shard=Shard(i, count)) for i in range(count)
    ]
    assert {len(part) for part in parts} == {-(-SIZE // batch_size)}
    whole = [batch for step in zip(*parts) for batch in step]
    assert {len(batch['label']) for batch in whole} == {batch_size // count}
    label, weight = column(whole), column(whole, 'weight')
    assert label[:SIZE].tolist() == list(range(SIZE))
    assert weight.tolist() == [1.0] * SIZE + [0.0] * (len(weight) - SIZE)
    assert set(label[SIZE:]) <= {0}  # the first example again
    for image, i in zip(column(whole, 'image')[:SIZE], range(SIZE)):
        np.testing.assert_array_equal(image, NUMBERS[i]['image'])


def test_evaluation_at_a_batch_size_that_divides_has_no_filling():
    (batch,) = evaluate(batch_size=SIZE)
    assert batch['weight'].tolist() == [1.0] * SIZE


def test_evaluation_is_the_same_every_time_and_with_workers():
    expected = evaluate(batch_size=4)
    for again in (evaluate(batch_size=4), evaluate(batch_size=4, num_workers=2)):
        assert len(again) == len(expected)
        for batch, other in zip(expected, again):
            for key in batch:
                np.testing.assert_array_equal(batch[key], other[key])


# --- Faults -------------------------------------------------------------------


@pytest.fixture(scope='module')
def corrupt(tmp_path_factory):
    """A folder of seven images, of which f.png is cut off."""
    folder = tmp_path_factory.mktemp('corrupt') / 'train' / 'class'
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (17, 19, 3)).astype(np.uint8)
    for name in 'abcdefg':
        Image.fromarray(pixels).save(folder / f'{name}.png')
    (folder / 'f.png').write_bytes((folder / 'f.png').read_bytes()[:200])
    return folder


@pytest.mark.parametrize(
    ('training', 'num_workers'), [(True, 0), (False, 0), (True, 2)]
)
def test_corrupt_images_are_named(corrupt, training, num_workers):
    """Through threads and through worker processes the error is the user's."""
    source = load_dataset(f'folder:{corrupt.parent.parent}').open('train')
    kwargs = {'batch_size': 3, 'num_workers': num_workers}
    if training:
        batches = train_batches(source, TrainTransform((5, 3), 3), seed=0, **kwargs)
    else:
        batches = eval_batches(source, EvalTransform((5, 3), 3), **kwargs)
    message = f'^{re.escape(str(corrupt / "f.png"))} cannot be decoded'
    with closing(batches), pytest.raises(UserError, match=message):
        list(itertools.islice(batches, 3))


@pytest.mark.parametrize('num_workers', [0, 2])
def test_corrupt_images_can_be_skipped(corrupt, num_workers):
    """They are rows of weight 0; all others stay where they were."""
    source = load_dataset(f'folder:{corrupt.parent.parent}').open('train')
    transform = TrainTransform((5, 3), 3, skip_corrupt=True)
    kwargs = {'batch_size': 3, 'num_workers': num_workers}
    batches = take(7, source, transform, seed=0, **kwargs)
    drawn = Order(7, 0).example_at(np.arange(21))
    assert (column(batches, 'weight') == 0).tolist() == (drawn == 5).tolist()
    assert (drawn == 5).sum() == 3
    for image, weight in zip(column(batches, 'image'), column(batches, 'weight')):
        assert image.any() == bool(weight)


@pytest.fixture
def removed(tmp_path):
    """A source of six sound images, of which c.png went away after it was listed."""
    (tmp_path / 'train' / 'class').mkdir(parents=True)
    for name in 'abcdef':
        image = Image.fromarray(np.full((5, 3, 3), ord(name), np.uint8))
        image.save(tmp_path / 'train' / 'class' / f'{name}.png')
    source = load_dataset(f'folder:{tmp_path}').open('train')
    (tmp_path / 'train' / 'class' / 'c.png').unlink()
    return source


@pytest.mark.parametrize('num_workers', [0, 2])
def test_images_that_went_away_are_named(removed, num_workers):
    message = rf'^{re.escape(removed.paths[2])} cannot be read: No such file'
    transform = TrainTransform((5, 3), 3)
    with pytest.raises(UserError, match=message):
        take(4, removed, transform, seed=0, batch_size=3, num_workers=num_workers)
    with pytest.raises(UserError, match=message):
        load(removed, transform)


def test_images_that_went_away_can_be_skipped(removed, caplog):
    """In training, in evaluation and when all are loaded at once."""
    transform = TrainTransform((5, 3), 3, skip_corrupt=True)
    batches = take(4, removed, transform, seed=0, batch_size=3)
    gone = Order(6, 0).example_at(np.arange(12)) == 2
    assert column(batches, 'weight').tolist() == np.where(gone, 0, 1).tolist()
    assert (column(batches, 'image').any(axis=(1, 2, 3)) == ~gone).all()
    (record,) = caplog.records
    assert record.getMessage().startswith(f'{removed.paths[2]} cannot be read: No such')
    assert load(removed, transform)['weight'].tolist() == [1, 1, 0, 1, 1, 1]
    transform = EvalTransform((5, 3), 3, skip_corrupt=True)
    with closing(eval_batches(removed, transform, batch_size=4)) as batches:
        assert column(list(batches), 'weight').tolist() == [1, 1, 0, 1, 1, 1, 0, 0]


def test_corrupt_images_are_skipped_in_evaluation(corrupt):
    source = load_dataset(f'folder:{corrupt.parent.parent}').open('train')
    transform = EvalTransform((5, 3), 3, skip_corrupt=True)
    with closing(eval_batches(source, transform, batch_size=3)) as batches:
        assert column(list(batches), 'weight').tolist() == [1, 1, 1, 1, 1, 0, 1, 0, 0]
