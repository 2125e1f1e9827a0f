import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import filelock
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from fake_imagenet import (
    COUNTS,
    NUM_VAL,
    SYNSETS,
    add,
    crc32c,
    frame,
    make_images,
    write_folder,
    write_tars,
    write_tfrecords,
)

from vit_jax.data import prepare
from vit_jax.data.datasets import load_dataset
from vit_jax.data.imagenet import ImageNetLayout, plan_imagenet, spread
from vit_jax.data.prepared import is_prepared
from vit_jax.data.tfrecords import find_source, plan_tfrecords, read_records
from vit_jax.data.transforms import decode_image
from vit_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
LAYOUT = ImageNetLayout(sum(COUNTS), NUM_VAL, tuple(SYNSETS), shard_bytes=3000)
IMAGES = make_images()


@pytest.fixture(scope='module')
def tars(tmp_path_factory):
    return write_tars(tmp_path_factory.mktemp('tars'), IMAGES)


@pytest.fixture(scope='module')
def prepared(tmp_path_factory, tars):
    """A data_dir with ImageNet from the tars."""
    data_dir = tmp_path_factory.mktemp('prepared')
    prepare.write(plan_imagenet(tars, str(data_dir), True, LAYOUT))
    return data_dir


def shards(data_dir, version='5.1.0'):
    folder = data_dir / 'imagenet2012' / version
    return {path.name: path.read_bytes() for path in folder.glob('*.array_record-*')}


def read(name, data_dir):
    """{split: {(label, bytes)}} as training reads it."""
    dataset = load_dataset(name, str(data_dir))
    examples = {}
    for split, count in dataset.splits.items():
        source = dataset.open(split)
        assert len(source) == count
        found = [source[i] for i in range(count)]
        examples[split] = sorted((e['label'], bytes(e['image'])) for e in found)
    return examples


EXPECTED = {
    split: sorted((label, data) for label, _, data in images.values())
    for split, images in IMAGES.items()
}


# --- What comes out -----------------------------------------------------------


def test_tars_give_every_image_byte_for_byte(prepared):
    assert read('imagenet2012', prepared) == EXPECTED


def test_tfds_reads_labels_names_and_pixels(prepared):
    builder = tfds.builder('imagenet2012', data_dir=str(prepared))
    decoders = {'image': tfds.decode.SkipDecoding()}
    source = builder.as_data_source(split='train', decoders=decoders)
    names = builder.info.features['label'].names
    found = {}
    for example in source:
        name = example['file_name'].decode()
        found[name] = (example['label'], name.split('_')[0], example['image'])
        assert names[example['label']] == name.split('_')[0]
    assert found == IMAGES['train']


def test_a_png_and_a_cmyk_jpeg_are_kept_and_decode(prepared):
    images = [data for _, data in read('imagenet2012', prepared)['train']]
    kinds = [data[:4] for data in images]
    assert kinds.count(b'\x89PNG') == 1
    for data in images:
        assert decode_image(data, 3, 'image').shape == (13, 17, 3)


def test_the_order_is_that_of_positions_within_classes(prepared):
    """By hand: (j + 1/2) / n of 5, 7 and 3 images; ties by label."""
    source = load_dataset('imagenet2012', str(prepared)).open('train')
    labels = [source[i]['label'] for i in range(len(source))]
    fractions = sorted(
        ((j + 0.5) / count, label)
        for label, count in zip(SYNSETS.values(), COUNTS)
        for j in range(count)
    )
    assert labels == [label for _, label in fractions]
    assert labels[:6] == [2, 0, 230, 2, 0, 2]


def test_any_slice_has_its_share_of_every_class():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(7), rng.integers(11, 31, 7)))
    order = spread(labels)
    assert sorted(order) == list(range(len(labels)))
    for start, stop in ((0, 0.1), (0.25, 0.5), (0.9, 1)):
        n = len(labels)
        part = labels[order[round(start * n) : round(stop * n)]]
        share = np.bincount(labels) * (stop - start)
        assert np.all(np.abs(np.bincount(part, minlength=7) - share) <= 1.2)
    for label in range(7):  # and the order within a class stays
        assert np.all(np.diff(order[labels[order] == label]) > 0)


def test_folders_give_the_very_files_of_the_tars(tmp_path, prepared):
    names = tfds.builder('imagenet2012', data_dir=str(prepared)).info.features['label']
    for i, val_names in enumerate((None, names.names)):
        folder = write_folder(tmp_path / f'images{i}', IMAGES, val_names)
        plan = plan_imagenet(folder, str(tmp_path / f'{i}'), False, LAYOUT)
        prepare.write(plan, workers=3)
        assert shards(tmp_path / f'{i}') == shards(prepared)
        assert len(shards(prepared)) > 3


@pytest.mark.parametrize('with_features', [False, True])
def test_tfrecords_give_the_same_examples(tmp_path, prepared, with_features):
    builder = tfds.builder('imagenet2012', data_dir=str(prepared))
    features = builder.info.features if with_features else None
    root = write_tfrecords(tmp_path / 'old', IMAGES, features=features)
    source = find_source(root, 'imagenet2012')
    assert source == root / 'imagenet2012/5.0.0'
    prepare.write(plan_tfrecords(source, 'imagenet2012', str(tmp_path / 'new')))
    assert read('imagenet2012:5.0.0', tmp_path / 'new') == EXPECTED
    assert len(shards(tmp_path / 'new', '5.0.0')) == 3


def test_the_newest_version_of_tfrecords_is_taken(tmp_path):
    for version in ('5.9.0', '5.10.0'):
        write_tfrecords(tmp_path, IMAGES, version)
    assert find_source(tmp_path, 'imagenet2012').name == '5.10.0'
    assert find_source(tmp_path, 'imagenet2012:5.9.0').name == '5.9.0'
    with pytest.raises(UserError, match=r'no tfrecords of imagenet2012:5\.1\.0'):
        find_source(tmp_path, 'imagenet2012:5.1.0')


def test_info_is_that_of_the_files(prepared):
    folder = prepared / 'imagenet2012/5.1.0'
    info = json.loads((folder / 'dataset_info.json').read_text())
    for split in info['splits']:
        files = sorted(folder.glob(f'*-{split["name"]}.array_record-*'))
        assert len(files) == len(split['shardLengths'])
        assert int(split['numBytes']) == sum(file.stat().st_size for file in files)
    assert info['fileFormat'] == 'array_record'
    assert sorted(prepared.rglob('.*')) == []  # neither locks nor unfinished folders


def test_without_tensorflow(tmp_path, tars):
    """Not even where it is installed."""
    program = f"""
import importlib.machinery, sys
class Hidden(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, *args):
        if name.split('.')[0] != 'tensorflow':
            return super().find_spec(name, *args)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Hidden
from vit_jax.data import prepare
from vit_jax.data.datasets import load_dataset
from vit_jax.data.imagenet import plan_imagenet, ImageNetLayout
data_dir = {str(tmp_path)!r}
import pathlib
prepare.write(plan_imagenet(pathlib.Path({str(tars)!r}), data_dir, True, {LAYOUT}))
print(len(load_dataset('imagenet2012', data_dir).open('train')))
assert 'tensorflow' not in sys.modules
"""
    result = subprocess.run(
        [sys.executable, '-c', program], capture_output=True, text=True, cwd=ROOT
    )
    assert result.stdout == f'{sum(COUNTS)}\n', result.stderr


# --- Faults -------------------------------------------------------------------

# Many files, so that there is something to interrupt: one for each image.
BIG = 40
BIG_LAYOUT = ImageNetLayout(BIG, NUM_VAL, ('n01440764',), shard_bytes=1)
PROGRAM = """
import pathlib, resource, signal, sys
tars, data_dir, limit = sys.argv[1:]
if int(limit):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
from vit_jax.data import prepare
from vit_jax.data.imagenet import plan_imagenet, ImageNetLayout
from vit_jax.errors import UserError
layout = {layout}
try:
    prepare.write(plan_imagenet(pathlib.Path(tars), data_dir, True, layout))
except UserError as error:
    sys.exit(str(error))
"""


def start(layout, tars, data_dir, limit=0):
    program = PROGRAM.format(layout=layout)
    return subprocess.Popen(
        [sys.executable, '-c', program, tars, data_dir, str(limit)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_it_goes_on_to_the_same_bytes(tmp_path):
    rng = np.random.default_rng(0)
    images = {
        f'n01440764_{i}.JPEG': (0, 'n01440764', b'\xff\xd8\xff' + rng.bytes(300_000))
        for i in range(BIG)
    }
    tars = write_tars(tmp_path / 'tars', {**IMAGES, 'train': images})
    whole = tmp_path / 'whole'
    prepare.write(plan_imagenet(tars, str(whole), True, BIG_LAYOUT))

    data_dir = tmp_path / 'killed'
    unfinished = data_dir / 'imagenet2012/.5.1.0.unfinished'
    written = {}
    for count in (7, 23):
        process = start(BIG_LAYOUT, tars, data_dir)
        while len(list(unfinished.glob('*-of-?????'))) < count:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.0005)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stderr.close()
        for name, times in written.items():  # what was finished was left alone
            assert (unfinished / name).stat().st_mtime_ns == times
        written = {
            path.name: path.stat().st_mtime_ns for path in unfinished.glob('*-of-?????')
        }
        assert count <= len(written) < BIG + NUM_VAL
        with pytest.raises(UserError, match='is not prepared'):
            load_dataset('imagenet2012', str(data_dir)).open('train')
    plan = plan_imagenet(tars, str(data_dir), True, BIG_LAYOUT)
    assert len(plan.missing()) == BIG + NUM_VAL - len(written)
    (unfinished / 'half.tmp').write_bytes(b'x')  # as a killed worker leaves
    prepare.write(plan, workers=2)
    assert shards(data_dir) == shards(whole)
    assert not unfinished.exists()
    infos = [d / 'imagenet2012/5.1.0/dataset_info.json' for d in (data_dir, whole)]
    assert infos[0].read_text() == infos[1].read_text()
    for name, times in written.items():
        path = data_dir / 'imagenet2012/5.1.0' / name
        assert path.stat().st_mtime_ns == times
    assert not list(data_dir.rglob('*.tmp'))


def test_a_full_disk_leaves_nothing_that_looks_whole(tmp_path, tars, prepared):
    """A limit on the size of files stands for the disk."""
    process = start(LAYOUT, tars, tmp_path, limit=10_000)
    _, err = process.communicate()
    assert process.returncode == 1
    assert 'Traceback' not in err
    assert 'file too large; its finished shards stay' in err
    with pytest.raises(UserError, match='is not prepared'):
        load_dataset('imagenet2012', str(tmp_path)).open('train')
    prepare.write(plan_imagenet(tars, str(tmp_path), True, LAYOUT))
    assert read('imagenet2012', tmp_path) == EXPECTED


def test_two_at_once(tmp_path, tars):
    plan = plan_imagenet(tars, str(tmp_path), True, LAYOUT)
    plan.folder.parent.mkdir()
    with (
        filelock.FileLock(plan.folder.parent / '.5.1.0.lock'),
        pytest.raises(UserError, match='another process is writing'),
    ):
        prepare.write(plan)
    prepare.write(plan)


def test_what_another_has_written_meanwhile_is_left(tmp_path, tars, prepared):
    """Both were planned before either was written."""
    first, second = (plan_imagenet(tars, str(tmp_path), True, LAYOUT) for _ in range(2))
    prepare.write(first)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*') if p.is_file()}
    prepare.write(second)
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert shards(tmp_path) == shards(prepared)
    assert [p.name for p in second.folder.parent.iterdir()] == ['5.1.0']


@pytest.mark.parametrize('damage', ['missing', 'empty', 'at_a_block', 'swapped'])
def test_a_folder_that_lacks_a_part(tmp_path, prepared, damage):
    folder = tmp_path / 'imagenet2012/5.1.0'
    shutil.copytree(prepared / 'imagenet2012/5.1.0', folder)
    assert is_prepared(folder, LAYOUT.splits)
    files = sorted(folder.glob('*-train.array_record-*'))
    match damage:
        case 'missing':
            files[1].unlink()
        case 'empty':
            files[1].write_bytes(b'')
        case 'at_a_block':
            os.truncate(files[1], 1 << 16)
        case 'swapped':
            counts = [count_records(file) for file in files]
            other = next(f for f, n in zip(files, counts) if n != counts[1])
            files[1].write_bytes(other.read_bytes())
    with pytest.raises(UserError) as caught:
        is_prepared(folder)
    assert str(caught.value) == (
        f'{folder} lacks files, or they are damaged: {files[1].name}; to prepare it '
        'anew, remove that folder or choose another --data_dir'
    )


def count_records(path):
    reader = array_record_module.ArrayRecordReader(str(path))
    count = reader.num_records()
    reader.close()
    return count


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        ('empty', r'cannot be read: ArrayRecord file should be at least 64KB big; a '),
        ('at_a_block', r'cannot be read: there is no such record; a file in '),
        ('garbled', r'cannot be read: Corrupted Riegeli/records file: .*; a file in '),
    ],
)
def test_reading_a_damaged_file(tmp_path, prepared, damage, message):
    folder = tmp_path / 'imagenet2012/5.1.0'
    shutil.copytree(prepared / 'imagenet2012/5.1.0', folder)
    file = min(folder.glob('*-train.array_record-*'))
    data = file.read_bytes()
    garbled = data[:300] + bytes([data[300] ^ 255]) + data[301:]
    damaged = {'empty': b'', 'at_a_block': data[: 1 << 16], 'garbled': garbled}
    file.write_bytes(damaged[damage])
    source = load_dataset('imagenet2012', str(tmp_path)).open('train')
    with pytest.raises(UserError, match=message) as caught:
        source[0]
    assert str(caught.value).startswith('imagenet2012/train[0] cannot be read: ')
    assert f'a file in {folder} is missing or damaged: copy' in str(caught.value)
    assert '\n' not in str(caught.value)


def test_examples_are_named_by_their_files(tmp_path, prepared):
    """Those of a folder, of ImageNet: a corrupt one is told so."""
    source = load_dataset('imagenet2012', str(prepared)).open('train')
    names = {data: name for name, (_, _, data) in IMAGES['train'].items()}
    for i in range(len(source)):
        example = source[i]
        file_name = names[bytes(example['image'])]
        assert example['name'] == f'imagenet2012/train[{i}] ({file_name})'


def test_other_examples_do_not_mix(tmp_path, tars):
    plan = plan_imagenet(tars, str(tmp_path / 'out'), True, LAYOUT)
    fewer = {**IMAGES, 'train': dict(list(IMAGES['train'].items())[1:])}
    others = write_tars(tmp_path / 'others', fewer)
    other = plan_imagenet(others, str(tmp_path / 'out'), True, allow_partial=True)
    other.unfinished.mkdir(parents=True)
    (other.unfinished / 'prepare.json').write_text(
        json.dumps({'source': 'others', 'digest': other.digest})
    )
    for function in (prepare.estimate, prepare.write):
        with pytest.raises(UserError, match='begun with other examples, from others'):
            function(plan)
    prepare.write(other)


def test_a_damaged_beginning(tmp_path, tars):
    plan = plan_imagenet(tars, str(tmp_path / 'out'), True, LAYOUT)
    plan.unfinished.mkdir(parents=True)
    for text in ('', '[]', '{"source": "x"}'):
        (plan.unfinished / 'prepare.json').write_text(text)
        with pytest.raises(UserError, match=r'prepare.json is damaged; remove /'):
            prepare.estimate(plan)


def test_an_image_that_changes_after_the_plan(tmp_path):
    folder = write_folder(tmp_path / 'images', IMAGES)
    plan = plan_imagenet(folder, str(tmp_path / 'out'), False, LAYOUT)
    victim = folder / 'train/n01484850/n01484850_11.JPEG'
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(UserError, match=r'n01484850_11.JPEG is no JPEG or PNG, or was'):
        prepare.write(plan)
    victim.write_bytes(b'<'.ljust(victim.stat().st_size + 1))  # as long as it was
    with pytest.raises(UserError, match=r'n01484850_11.JPEG is no JPEG or PNG, or was'):
        prepare.write(plan)
    victim.unlink()
    with pytest.raises(UserError, match=r'n01484850_11.JPEG: no such file'):
        prepare.write(plan)


def test_what_does_not_fit_is_refused(tmp_path, tars):
    plan = plan_imagenet(tars, str(tmp_path), True, LAYOUT)
    found = prepare.estimate(plan)
    total = sum(len(data) for images in EXPECTED.values() for _, data in images)
    assert found.read == total
    assert found.free > found.write > total
    assert found.probed > 0
    assert list(tmp_path.iterdir()) == []  # the copy had no name
    prepare.check_space(plan, found)
    full = prepare.Estimate(found.read, 2_500_000, 1_500_000, 1, 1.0)
    with pytest.raises(UserError, match=r'may take 2\.50MB, and 1\.50MB are free'):
        prepare.check_space(plan, full)
    prepare.write(plan)
    written = sum(len(data) for data in shards(tmp_path).values())
    assert written <= found.write


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ('no_train', r'has no ILSVRC2012_img_train.tar; get it from https://image'),
        (
            'cut',
            r'train.tar cannot be read as a tar: .* official .* 147,897,477,120',
        ),
        ('cut_inside', r'val.tar cannot be read as a tar: unexpected end of data'),
        ('cut_inner', r'train.tar: n02105855.tar cannot be read as a tar: unexpected'),
        ('swapped', r"train.tar holds 'ILSVRC2012_val_00.* should hold a tar per"),
        ('no_tar', r'val.tar cannot be read as a tar'),
        ('foreign', r"n01440764.tar holds 'n01484850_1.JPEG'"),
        ('unknown', r"holds 'n00000000.tar'; it should hold a tar per synset"),
        ('fewer', r'14 train images, where ImageNet has 15; to take .*--allow_partial'),
        ('fewer_val', r'10 validation images, where ImageNet has 11'),
        ('a_class', r'1 of 3 synsets have no training image: n02105855'),
        ('twice', r'has n01440764_2.JPEG twice'),
        ('val_name', r"val.tar holds 'cat.JPEG'; validation images are named"),
    ],
)
def test_mistakes_with_tars(tmp_path, change, message):
    images = {split: dict(found) for split, found in IMAGES.items()}
    image = (0, 'n01440764', b'\xff\xd8\xff')
    match change:
        case 'foreign':
            images['train']['n01484850_1.JPEG'] = image
        case 'unknown':
            images['train']['n00000000_1.JPEG'] = (0, 'n00000000', image[2])
        case 'fewer':
            del images['train']['n01440764_2.JPEG']
        case 'fewer_val':
            del images['validation']['ILSVRC2012_val_00000003.JPEG']
        case 'a_class':
            images['train'] = {k: v for k, v in images['train'].items() if v[0] != 230}
        case 'val_name':
            images['validation']['cat.JPEG'] = (0, None, image[2])
    tars = write_tars(tmp_path / 'tars', images)
    train, val = (tars / f'ILSVRC2012_img_{split}.tar' for split in ('train', 'val'))
    match change:
        case 'no_train':
            train.unlink()
        case 'cut':
            os.truncate(train, 5000)
        case 'cut_inside':
            os.truncate(val, 700)
        case 'swapped':
            train.write_bytes(val.read_bytes())
        case 'no_tar':
            val.write_bytes(b'<html>please log in</html>')
        case 'cut_inner':  # in the last image of a tar that others follow
            with tarfile.open(train) as outer:
                inner = {m.name: outer.extractfile(m).read() for m in outer}
            assert next(iter(inner)) == 'n02105855.tar'
            with tarfile.open(fileobj=io.BytesIO(inner['n02105855.tar'])) as tar:
                end = tar.getmembers()[-1].offset_data + 1
            with tarfile.open(train, 'w') as outer:
                for name, data in inner.items():
                    add(outer, name, data[: end if name == 'n02105855.tar' else None])
        case 'twice':
            with tarfile.open(train, 'w') as outer:
                inner = tmp_path / 'inner.tar'
                with tarfile.open(inner, 'w') as tar:
                    for _ in range(2):
                        add(tar, 'n01440764_2.JPEG', image[2])
                outer.add(inner, 'n01440764.tar')
    layout = LAYOUT
    if change == 'twice':
        layout = ImageNetLayout(2, NUM_VAL, ('n01440764',))
    with pytest.raises(UserError, match=message) as caught:
        plan_imagenet(tars, str(tmp_path / 'out'), True, layout)
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'out').exists()


def test_a_part_is_taken_when_that_is_meant(tmp_path):
    images = {**IMAGES, 'train': dict(list(IMAGES['train'].items())[:9])}
    tars = write_tars(tmp_path / 'tars', images)
    (tars / 'ILSVRC2012_img_val.tar').unlink()
    prepare.write(plan_imagenet(tars, str(tmp_path), True, LAYOUT, allow_partial=True))
    found = read('imagenet2012', tmp_path)
    assert found == {'train': sorted((e[0], e[2]) for e in images['train'].values())}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ('empty', r'should hold train/ with a folder of images per synset'),
        ('class', r"/cats is none of ImageNet's 1,000 synsets, such as n01440764"),
        ('text', r'n01440764/notes.txt is no image'),
        ('loose', r'train/cat.JPEG is not in the folder of a synset'),
        ('val', r'n01440764/ILSVRC2012_val_00000002.JPEG is of another synset'),
        ('mixed', r'val holds both files and folders'),
    ],
)
def test_mistakes_with_folders(tmp_path, change, message):
    root = tmp_path / 'images'
    if change == 'empty':
        root.mkdir()
    else:
        write_folder(root, IMAGES)
    val = root / 'val/ILSVRC2012_val_00000002.JPEG'
    match change:
        case 'class':
            (root / 'train/cats').mkdir()
        case 'text':
            (root / 'train/n01440764/notes.txt').write_text('')
        case 'loose':
            (root / 'train/cat.JPEG').write_text('')
        case 'val':
            for file in (root / 'val').iterdir():
                file.rename(tmp_path / file.name)
            (root / 'val/n01440764').mkdir()
            (tmp_path / val.name).rename(root / 'val/n01440764' / val.name)
        case 'mixed':
            (root / 'val/n01440764').mkdir()
    with pytest.raises(UserError, match=message):
        plan_imagenet(root, str(tmp_path / 'out'), False, LAYOUT)


# --- tfrecords ----------------------------------------------------------------


def test_crc_of_the_reference():
    """RFC 3720, appendix B.4, and the check value of CRC-32C."""
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b'123456789') == 0xE3069283


def test_records_are_read(tmp_path):
    records = [b'', b'a', bytes(range(256)) * 3]
    path = tmp_path / 'file'
    path.write_bytes(b''.join(map(frame, records)))
    assert list(read_records(path)) == records


def test_damage_is_found_wherever_it_is(tmp_path):
    """Any byte, any length: the file is named, and where in it."""
    good = frame(b'first') + frame(b'second')
    second = len(frame(b'first'))
    path = tmp_path / 'name-of-the-file'
    for i in range(len(good)):
        at = f'{path} is damaged, in the record that starts at byte '
        at += '0:' if i < second else f'{second}:'
        path.write_bytes(good[:i] + bytes([good[i] ^ 64]) + good[i + 1 :])
        with pytest.raises(UserError) as caught:
            list(read_records(path))
        assert str(caught.value).startswith(at)
        path.write_bytes(good[:i])
        if i in (0, second):
            assert len(list(read_records(path))) == bool(i)
        else:
            with pytest.raises(UserError, match='ends in the middle of a record'):
                list(read_records(path))


def test_tfrecords_that_end_too_early_or_are_missing(tmp_path):
    root = write_tfrecords(tmp_path / 'old', IMAGES)
    source = root / 'imagenet2012/5.0.0'
    file = source / 'imagenet2012-train.tfrecord-00001-of-00002'
    whole = file.read_bytes()
    length = len(next(read_records(file))) + 16
    file.write_bytes(whole[:-length])  # at the end of a record, if not of the last
    file.write_bytes(whole[:length])
    plan = plan_tfrecords(source, 'imagenet2012', str(tmp_path / 'new'))
    with pytest.raises(UserError, match=r'got 1 records instead of 7: its source'):
        prepare.write(plan)
    file.unlink()
    with pytest.raises(UserError, match=r'tfrecord-00001-of-00002 is missing'):
        plan_tfrecords(source, 'imagenet2012', None)
    with pytest.raises(UserError, match='holds imagenet2012, not cifar10'):
        plan_tfrecords(source, 'cifar10', None)
