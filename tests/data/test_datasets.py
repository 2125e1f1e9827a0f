import io
import itertools
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import sklearn.datasets
import tensorflow_datasets as tfds
from PIL import Image

from vit_jax.data.datasets import (
    Dataset,
    load_dataset,
    pick_eval_split,
    subsample,
)
from vit_jax.errors import UserError


def encode(pixels, kind='PNG'):
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file, kind)
    return file.getvalue()


def decode(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def make_folder(root, files):
    """Writes an image at each of the paths, all of one colour: the path's number."""
    for i, name in enumerate(files):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = {'.webp': 'WEBP', '.png': 'PNG'}.get(path.suffix.lower(), 'JPEG')
        path.write_bytes(encode(np.full((5, 7, 3), i), kind))
    return f'folder:{root}'


def examples(source):
    return [source[i] for i in range(len(source))]


# --- digits and TFDS ----------------------------------------------------------


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    return load_dataset('digits', str(tmp_path_factory.mktemp('tfds')))


def test_digits_says_what_it_is(tmp_path):
    digits = load_dataset('digits', str(tmp_path))
    assert digits.name == 'digits'
    assert digits.location == str(tmp_path / 'digits' / '1.0.0')
    assert digits.splits == {'train': 1438, 'test': 359}
    assert digits.class_names == tuple('0123456789')
    assert digits.image_shape == (8, 8, 1)
    assert pick_eval_split(digits) == 'test'


def test_digits_are_scikit_learns(digits):
    """Every fifth is held out; pixels 0..16 become 0..255, rounded."""
    bunch = sklearn.datasets.load_digits()
    expected = {'train': [], 'test': []}
    for i, (image, label) in enumerate(zip(bunch.images, bunch.target)):
        pixels = [[round(x * 255 / 16) for x in row] for row in image.tolist()]
        expected['test' if i % 5 == 4 else 'train'].append((label, pixels))
    for split, pairs in expected.items():
        read = [(e['label'], decode(e['image'])) for e in examples(digits.open(split))]
        assert sorted((label, pixels.tolist()) for label, pixels in read) == sorted(
            pairs
        )


def test_digits_need_no_tensorflow(tmp_path):
    program = (
        'import sys\n'
        'from vit_jax.data.datasets import load_dataset\n'
        'dataset = load_dataset("digits", sys.argv[1])\n'
        'dataset.open("train")[0]\n'
        'assert "tensorflow" not in sys.modules\n'
        'assert "torch" not in sys.modules\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', program, str(tmp_path)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, ''), done.stderr
    assert (tmp_path / 'digits').is_dir()


def test_digits_that_cannot_be_prepared(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match=r'cannot prepare digits in .*file'):
        load_dataset('digits', str(tmp_path / 'file'))


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    """A data_dir with a TFDS dataset of seven images to train on, five to validate."""
    with tfds.core.registered.skip_registration():

        class TinySet(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version('1.2.3')

            def _info(self):
                features = tfds.features.FeaturesDict(
                    {
                        'image': tfds.features.Image(
                            shape=(None, None, 3), encoding_format='png'
                        ),
                        'label': tfds.features.ClassLabel(names=['ant', 'bee', 'cow']),
                    }
                )
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, dl_manager):
                counts = {'train': 7, 'validation': 5}
                return {k: self._generate_examples(n) for k, n in counts.items()}

            def _generate_examples(self, count):
                for i in range(count):
                    image = io.BytesIO(encode(np.full((3, 5, 3), i)))
                    yield i, {'image': image, 'label': i % 3}

    data_dir = tmp_path_factory.mktemp('tiny')
    TinySet(data_dir=data_dir, file_format='array_record').download_and_prepare()
    return data_dir


def test_any_tfds_dataset(tiny):
    dataset = load_dataset('tiny_set', str(tiny))
    assert dataset.location == str(tiny / 'tiny_set' / '1.2.3')
    assert dataset.splits == {'train': 7, 'validation': 5}
    assert dataset.class_names == ('ant', 'bee', 'cow')
    assert dataset.image_shape == (None, None, 3)
    source = dataset.open('train')
    values = []
    for i, example in enumerate(examples(source)):
        assert example['name'] == f'tiny_set/train[{i}]'
        pixels = decode(example['image'])
        values.append(pixels[0, 0, 0])
        assert example['label'] == values[-1] % 3
        np.testing.assert_array_equal(pixels, np.full((3, 5, 3), values[-1]))
    assert sorted(values) == list(range(7))
    assert examples(pickle.loads(pickle.dumps(source))) == examples(source)


def test_tfds_slices_of_splits(tiny):
    dataset = load_dataset('tiny_set', str(tiny))
    whole = [e['image'] for e in examples(dataset.open('train'))]
    part = [e['image'] for e in examples(dataset.open('train[2:5]'))]
    assert part == whole[2:5]
    with pytest.raises(UserError, match=r"unknown split .*'trian'.*mean 'train'"):
        dataset.open('trian')
    with pytest.raises(UserError, match=r"^split 'train\[:0\]' of 'tiny_set' has no"):
        dataset.open('train[:0]')


def test_sizes_of_slices(tiny):
    """Known before they are opened, for schedules; and only those that there are."""
    splits = load_dataset('tiny_set', str(tiny)).splits
    sizes = {'train[2:5]': 3, 'train[:50%]': 4, 'train[-2:]+validation': 7}
    for split, size in sizes.items():  # 50% of 7 is 3.5, rounded up
        assert split in splits
        assert splits[split] == splits.get(split) == size
        assert len(load_dataset('tiny_set', str(tiny)).open(split)) == size
    assert list(splits) == ['train', 'validation']
    for split in ('trian', 'trian[:5]', 'train[', 'train[:200%]'):
        assert split not in splits
        assert splits.get(split) is None


def test_a_tfds_dataset_that_lacks_a_file(tiny, tmp_path):
    shutil.copytree(tiny / 'tiny_set', tmp_path / 'tiny_set')
    (file,) = (tmp_path / 'tiny_set/1.2.3').glob('*train*')
    file.unlink()
    dataset = load_dataset('tiny_set', str(tmp_path))
    with pytest.raises(UserError) as caught:
        dataset.open('train[:3]')
    assert str(caught.value) == (
        f"{file} is missing; copy dataset 'tiny_set' there again, or remove its folder "
        'and prepare it anew'
    )
    assert len(dataset.open('validation')) == 5


def test_home_is_expanded(tiny, monkeypatch):
    monkeypatch.setenv('HOME', str(tiny))
    assert load_dataset('tiny_set', '~').splits['train'] == 7


def test_tfds_dataset_in_another_format(tiny, tmp_path):
    info = tiny / 'tiny_set' / '1.2.3'
    copy = tmp_path / 'tiny_set' / '1.2.3'
    copy.mkdir(parents=True)
    for file in info.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    text = (copy / 'dataset_info.json').read_text()
    (copy / 'dataset_info.json').write_text(text.replace('array_record', 'tfrecord'))
    dataset = load_dataset('tiny_set', str(tmp_path))
    with pytest.raises(UserError) as error:
        dataset.open('train')
    assert str(error.value) == (
        f"dataset 'tiny_set' at {copy} is stored as tfrecord; it must be array_record: "
        f'`vit_jax prepare tiny_set --tfrecords={copy} --data_dir=DIR` writes it so'
    )


def test_tfds_dataset_that_is_not_prepared(tmp_path):
    """What is known of it is told all the same, so that runs can be planned."""
    dataset = load_dataset('cifar10', str(tmp_path))
    assert dataset.splits == {'train': 50_000, 'test': 10_000}
    assert dataset.image_shape == (32, 32, 3)
    assert len(dataset.class_names) == 10
    with pytest.raises(UserError) as error:
        dataset.open('train')
    assert str(error.value) == (
        f"dataset 'cifar10' is not prepared at {dataset.location}; run `vit_jax "
        f'prepare cifar10 --data_dir={tmp_path}`, or point dataset.data_dir to the '
        'folder that holds it'
    )
    assert dataset.location.startswith(str(tmp_path / 'cifar10'))


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('cifra10', "unknown dataset 'cifra10'; did you mean 'cifar10'"),
        ('digts', "did you mean 'digits'"),
        ('CIFAR10', "did you mean 'cifar10'"),
        ('cifar-10', "did you mean 'cifar10'"),
        ('cifar10:9.9.9', 'cannot be loaded at version 9.9.9'),
        ('mnist/other', 'BuilderConfig other not found'),
        ('imdb_reviews', 'not for image classification: .* has text, label'),
    ],
)
def test_tfds_names_that_do_not_fit(name, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        load_dataset(name, str(tmp_path))
    assert '\n' not in str(error.value)


# --- Folders ------------------------------------------------------------------


def test_folder(tmp_path):
    files = [
        'train/cat/a.jpg',
        'train/cat/b.JPEG',
        'train/dog/c.png',
        'train/dog/d.WebP',
        'train/dog/e.jpeg',
        'val/dog/f.JPG',
        'val/cat/g.PNG',
    ]
    name = make_folder(tmp_path, files)
    dataset = load_dataset(name)
    assert dataset.name == name
    assert dataset.location == str(tmp_path)
    assert dataset.splits == {'train': 5, 'val': 2}
    assert dataset.class_names == ('cat', 'dog')
    assert dataset.image_shape == (None, None, 3)
    read = {}
    for split in dataset.splits:
        for example in examples(dataset.open(split)):
            colour = round(decode(example['image']).mean())
            path = os.path.relpath(example['name'], tmp_path)
            assert path == files[colour]
            read[path] = example['label']
    assert read == {file: int('dog' in file) for file in files}


def test_labels_are_those_of_train_where_a_class_is_missing(tmp_path):
    """A class without images to validate does not shift the labels after it."""
    name = make_folder(
        tmp_path, ['train/a/1.png', 'train/b/1.png', 'train/c/1.png', 'val/c/1.png']
    )
    labels = [e['label'] for e in examples(load_dataset(name).open('val'))]
    assert labels == [2]


def test_hidden_files_are_left_out(tmp_path):
    name = make_folder(tmp_path, ['train/a/1.png', 'train/a/2.png', 'val/a/3.png'])
    for hidden in ['.DS_Store', 'train/.DS_Store', 'train/a/._1.png', 'val/.x']:
        (tmp_path / hidden).write_text('x')
    for hidden in ['.git', 'train/.cache', 'val/a/.thumbs']:
        (tmp_path / hidden).mkdir()
    dataset = load_dataset(name)
    assert dataset.splits == {'train': 2, 'val': 1}
    assert dataset.class_names == ('a',)


def test_other_things_beside_the_splits_are_fine(tmp_path):
    name = make_folder(tmp_path, ['train/a/1.png', 'annotations/a/1.png'])
    (tmp_path / 'README.md').write_text('about the images')
    assert load_dataset(name).splits == {'train': 1}


@pytest.mark.parametrize('split', ['validation', 'val', 'test'])
def test_splits_of_folders_to_evaluate(tmp_path, split):
    dataset = load_dataset(make_folder(tmp_path, ['train/a/1.png', f'{split}/a/1.png']))
    assert pick_eval_split(dataset) == split
    assert len(dataset.open(split)) == 1


@pytest.mark.parametrize(
    ('extra', 'message'),
    [
        ('val/wolf/1.png', r'val/wolf is a class that the train split does not have'),
        ('train/cat/notes.txt', r'train/cat/notes\.txt is not an image .*\.webp'),
        ('val/cat/1.tiff', r'val/cat/1\.tiff is not an image'),
        ('train/cat/more/1.png', r'train/cat/more is not an image'),
        ('train/cat/more.png/1.png', r'train/cat/more\.png is not an image'),
        ('train/stray.png', r'train/stray\.png is not in the folder of a class'),
        ('train/empty/', r'train/empty is a class without images'),
    ],
)
def test_folders_that_are_not_laid_out_so(tmp_path, extra, message):
    name = make_folder(tmp_path, ['train/cat/1.png', 'val/cat/1.png'])
    load_dataset(name)
    path = tmp_path / extra
    path.parent.mkdir(parents=True, exist_ok=True)
    if extra.endswith('/'):
        path.mkdir()
    else:
        path.write_bytes(b'x')
    with pytest.raises(UserError, match=message):
        load_dataset(name)


def test_empty_class_to_validate_is_fine(tmp_path):
    name = make_folder(tmp_path, ['train/a/1.png', 'train/b/1.png', 'val/a/1.png'])
    (tmp_path / 'val' / 'b').mkdir()
    assert load_dataset(name).splits == {'train': 2, 'val': 1}


def test_folders_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r'no such folder: .*/none'):
        load_dataset(f'folder:{tmp_path}/none')
    with pytest.raises(UserError, match='has no folder train/'):
        load_dataset(f'folder:{tmp_path}')
    (tmp_path / 'train').mkdir()
    with pytest.raises(UserError, match='train has no folders'):
        load_dataset(f'folder:{tmp_path}')
    dataset = load_dataset(make_folder(tmp_path, ['train/a/1.png']))
    with pytest.raises(UserError, match=r"unknown split .* 'val'"):
        dataset.open('val')


# --- Synthetic ----------------------------------------------------------------


def test_synthetic_is_a_function_of_split_and_index():
    name = 'synthetic:num_classes=3,size=5,channels=1,num_examples=7'
    dataset = load_dataset(name)
    assert dataset.splits == {'train': 7, 'test': 7}
    assert dataset.class_names == ('class_0', 'class_1', 'class_2')
    assert dataset.image_shape == (5, 5, 1)
    train, test = (examples(dataset.open(split)) for split in ('train', 'test'))
    again = examples(load_dataset(name).open('train'))
    images = set()
    for i in range(7):
        np.testing.assert_array_equal(train[i]['image'], again[i]['image'])
        for example in (train[i], test[i]):
            assert example['label'] == i % 3
            assert example['image'].shape == (5, 5, 1)
            assert example['image'].dtype == np.uint8
            images.add(example['image'].tobytes())
    assert len(images) == 14  # all different


def test_synthetic_defaults():
    dataset = load_dataset('synthetic')
    assert dataset.splits == {'train': 512, 'test': 512}
    assert dataset.image_shape == (32, 32, 3)
    assert len(dataset.class_names) == 10


def test_synthetic_classes_can_be_told_apart():
    """Images of a class are nearer to each other than to those of other classes."""
    source = load_dataset('synthetic:num_classes=3,num_examples=12').open('train')
    images = [np.float64(e['image']) for e in examples(source)]
    distance = [[np.abs(a - b).mean() for b in images] for a in images]
    for i, row in enumerate(distance):
        same = [row[j] for j in range(12) if j % 3 == i % 3 and j != i]
        others = [row[j] for j in range(12) if j % 3 != i % 3]
        assert max(same) < min(others)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ('num_clases=3', "'num_clases'; did you mean 'num_classes'"),
        ('size', 'size needs a whole number above 0'),
        ('size=0', 'size needs a whole number above 0'),
        ('size=-3', 'size needs a whole number above 0'),
        ('channels=x', 'channels needs a whole number above 0'),
    ],
)
def test_synthetic_options_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        load_dataset(f'synthetic:{options}')


def test_synthetic_has_two_splits():
    with pytest.raises(UserError, match=r"'tets'; did you mean 'test'"):
        load_dataset('synthetic').open('tets')


# --- Datasets of a fork -------------------------------------------------------


def test_dataset_by_dotted_path(tmp_path, monkeypatch):
    (tmp_path / 'fork_of_data').mkdir()
    (tmp_path / 'fork_of_data' / 'data.py').write_text(
        'def make(data_dir):\n    return f"made from {data_dir}"\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_dataset('fork_of_data.data:make', '/there') == 'made from /there'
    with pytest.raises(UserError, match=r"'fork_of_data\.data' has no 'mkae'"):
        load_dataset('fork_of_data.data:mkae')
    with pytest.raises(UserError, match=r"cannot import 'frok_of_data\.data:make'"):
        load_dataset('frok_of_data.data:make')


# --- Choices ------------------------------------------------------------------


@pytest.mark.parametrize(
    ('splits', 'picked'),
    [
        (['train', 'test', 'val', 'validation'], 'validation'),
        (['train', 'test', 'val'], 'val'),
        (['test', 'train'], 'test'),
    ],
)
def test_pick_eval_split(splits, picked):
    dataset = Dataset('x', '', dict.fromkeys(splits, 3), ('a',), (2, 3, 1), None)
    assert pick_eval_split(dataset) == picked


def test_no_splits_to_pick_from(tmp_path):
    """Nothing is known of the splits of a dataset that is not prepared."""
    dataset = load_dataset('mnist', str(tmp_path))
    assert dataset.splits == {}
    with pytest.raises(UserError, match="'mnist' is not prepared at"):
        pick_eval_split(dataset)


def test_no_eval_split_to_pick():
    dataset = Dataset('x', '', {'train': 3, 'extra': 5}, ('a',), (2, 3, 1), None)
    with pytest.raises(UserError, match=r'set dataset\.eval_split to one of: train, e'):
        pick_eval_split(dataset)


class Labels:
    """A source whose example i has label `labels[i]`."""

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {'image': index, 'label': self.labels[index], 'name': ''}


# 29, 11 and 2 examples of classes 0, 1 and 2.
SOURCE = Labels([0] * 13 + [1] * 11 + [2] * 2 + [0] * 16)


@pytest.mark.parametrize(
    ('fraction', 'counts'),
    [(0.5, [14, 6, 1]), (0.3, [9, 3, 1]), (0.1, [3, 1, 1]), (0.01, [1, 1, 1])],
)
def test_subsample_keeps_the_same_share_of_every_class(fraction, counts):
    """And at least one example; 29 / 2 and 11 / 2 round to even."""
    subset = subsample(SOURCE, fraction, seed=0)
    kept = examples(subset)
    assert len(subset) == sum(counts)
    assert np.bincount([e['label'] for e in kept]).tolist() == counts
    indices = [e['image'] for e in kept]
    assert indices == sorted(set(indices))


def test_subsets_are_nested_and_depend_on_the_seed():
    def indices(fraction, seed):
        return {e['image'] for e in examples(subsample(SOURCE, fraction, seed))}

    fractions = [0.03, 0.1, 0.3, 0.7, 0.9]
    for smaller, larger in itertools.pairwise(fractions):
        assert indices(smaller, 7) < indices(larger, 7)
    assert indices(0.3, 7) == indices(0.3, 7)
    assert indices(0.3, 7) != indices(0.3, 8)


class Told(Labels):
    """Knows its labels without reading examples."""

    def read_labels(self, advance):
        advance(len(self))
        return np.asarray(self.labels)

    def __getitem__(self, index):
        raise AssertionError('an example was read')


def test_labels_that_a_source_knows_are_not_read_from_examples():
    subset = subsample(Told(SOURCE.labels), 0.3, seed=0)
    np.testing.assert_array_equal(subset.indices, subsample(SOURCE, 0.3, 0).indices)


@pytest.mark.parametrize('split', ['train', 'train[2:5]'])
def test_labels_of_a_tfds_split(tiny, split):
    source = load_dataset('tiny_set', str(tiny)).open(split)
    counts = []
    labels = source.read_labels(counts.append)
    assert labels.tolist() == [e['label'] for e in examples(source)]
    assert sum(counts) == len(source)


def test_labels_of_a_damaged_file(tiny, tmp_path):
    shutil.copytree(tiny / 'tiny_set', tmp_path / 'tiny_set')
    source = load_dataset('tiny_set', str(tmp_path)).open('train')
    (file,) = (tmp_path / 'tiny_set/1.2.3').glob('*train*')
    content = bytearray(file.read_bytes())
    content[100 : len(content) // 2] = bytes(len(content) // 2 - 100)
    file.write_bytes(content)
    with pytest.raises(UserError, match=r'^tiny_set/train\[0:7\] cannot be read: .*'):
        source.read_labels(lambda count: None)


def test_labels_of_a_folder_and_of_synthetic_data(tmp_path):
    make_folder(tmp_path, ['train/a/1.png', 'train/b/1.png', 'train/b/2.png'])
    for name in (f'folder:{tmp_path}', 'synthetic:num_classes=3,num_examples=7'):
        source = load_dataset(name).open('train')
        expected = [e['label'] for e in examples(source)]
        assert source.read_labels(lambda count: None).tolist() == expected


def test_whole_is_the_source_itself():
    assert subsample(SOURCE, 1.0, seed=0) is SOURCE


@pytest.mark.parametrize('fraction', [0.0, -0.5, 1.01, float('nan')])
def test_fractions_out_of_range(fraction):
    with pytest.raises(UserError, match=r'train_fraction must be in \(0, 1\]'):
        subsample(SOURCE, fraction, seed=0)


@pytest.mark.slow
def test_processes_that_prepare_the_digits_at_the_same_time(tmp_path):
    code = (
        'from vit_jax.data.datasets import load_dataset\n'
        f'print(len(load_dataset("digits", {str(tmp_path)!r}).open("train")))'
    )
    command = [sys.executable, '-c', code]
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert out == '1438\n', err
