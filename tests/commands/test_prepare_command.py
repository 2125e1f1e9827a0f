import importlib.util
import re
import shlex

import pytest
import tensorflow_datasets as tfds
from command_lines import CONFIGS
from fake_imagenet import make_images, write_folder, write_tars, write_tfrecords
from ml_collections import ConfigDict

from vit_jax.config import default_config

pytest_plugins = ['command_fixtures']

IMAGES = make_images()
IMAGENET = f'--config={CONFIGS}/imagenet_convit.py'


@pytest.fixture
def tars(tmp_path):
    return write_tars(tmp_path / 'tars', IMAGES)


def test_from_the_tars_to_a_batch(run, tars, tmp_path, snapshot):
    argv = ['prepare', 'imagenet2012', f'--data_dir={tmp_path / "out"}']
    argv += [f'--tars={tars}', '--allow_partial']
    code, planned, err = run(*argv, '--dry_run')
    assert (code, err) == (0, '')
    assert not (tmp_path / 'out').exists()
    folder = tmp_path / 'out/imagenet2012/5.1.0'
    lines = planned.splitlines()
    assert lines[0] == f'imagenet2012: 15 train, 11 validation examples from {tars}'
    assert lines[1].startswith('  reads ')
    assert lines[1].endswith(f' to {folder} (2 shards)')
    assert lines[2].startswith('  free there: ')
    assert lines[3].startswith('  takes about 0 s for one worker, at the ')
    assert len(lines) == 4

    code, out, err = run(*argv)
    assert (code, err) == (0, '')
    told = out.splitlines()
    assert told[:2] == lines[:2]
    assert told[4:] == [
        f'{folder} holds 15 train, 11 validation examples',
        'next: vit_jax check_data --config=... --config.dataset.name=imagenet2012 '
        f'--config.dataset.data_dir={tmp_path / "out"}',
    ]
    before = snapshot(tmp_path / 'out')
    assert run(*argv) == (0, '\n'.join(told[4:]) + '\n', '')
    assert snapshot(tmp_path / 'out') == before

    # As the last line says, with smaller images.
    key = '--config.dataset'
    where = f'{key}.data_dir={tmp_path / "out"}'
    size = [
        f'{key}.image_size=(32,32)',
        '--config.batch_size=8',
        '--config.optim.warmup_steps=0',
    ]
    code, out, err = run('check_data', IMAGENET, where, *size)
    assert (code, err) == (0, '')
    assert '  split train: 15 examples' in out
    assert '  1000 classes: n01440764, ' in out
    assert '  image  uint8    [8, 32, 32, 3]' in out


def test_a_part_is_not_taken_for_the_whole(run, fails, tars, tmp_path):
    out = tmp_path / 'out'
    argv = ['prepare', 'imagenet2012', f'--data_dir={out}']
    assert run(*argv, f'--tars={tars}', '--allow_partial').code == 0
    folder = out / 'imagenet2012/5.1.0'
    for where in (tars, '/no/such'):
        assert fails(*argv, f'--tars={where}') == (
            f'{folder} holds 15 train, 11 validation examples instead of 1,281,167 '
            'train, 50,000 validation; to prepare it anew, remove that folder or '
            'choose another --data_dir'
        )
    shard = min(folder.glob('*.array_record-*'))
    shard.unlink()
    error = fails(*argv, f'--tars={tars}', '--allow_partial')
    assert error.startswith(
        f'{folder} lacks files, or they are damaged: {shard.name}; to prepare it anew'
    )


def test_tfrecords_with_more_than_what_is_there(run, fails, tmp_path):
    fewer = {**IMAGES, 'train': dict(list(IMAGES['train'].items())[:9])}
    argv = ['prepare', 'imagenet2012', f'--data_dir={tmp_path / "new"}']
    part = write_tfrecords(tmp_path / 'part', fewer)
    assert run(*argv, f'--tfrecords={part}').code == 0
    whole = write_tfrecords(tmp_path / 'whole', IMAGES)
    error = fails(*argv, f'--tfrecords={whole}')
    assert 'holds 9 train, 11 validation examples instead of 15 train, 11' in error


def test_from_a_folder(run, tmp_path):
    folder = write_folder(tmp_path / 'images', IMAGES)
    data_dir = f'--data_dir={tmp_path / "out"}'
    argv = [data_dir, f'--folder={folder}', '--allow_partial', '--workers=2']
    code, out, _ = run('prepare', 'imagenet2012', *argv)
    assert code == 0
    assert 'holds 15 train, 11 validation examples' in out


def test_from_tfrecords_of_an_older_version(run, fails, tmp_path):
    old = write_tfrecords(tmp_path / 'old', IMAGES)
    argv = ['prepare', 'imagenet2012', f'--tfrecords={old}']
    code, out, _ = run(*argv, f'--data_dir={tmp_path / "new"}')
    assert code == 0
    assert f'{tmp_path / "new"}/imagenet2012/5.0.0 holds 15 train, 11 val' in out
    # TFDS looks for its newest version only, so the name tells which.
    assert '--config.dataset.name=imagenet2012:5.0.0 ' in out
    name = '--config.dataset.name=imagenet2012:5.0.0'
    where = f'--config.dataset.data_dir={tmp_path / "new"}'
    size = [
        '--config.dataset.image_size=(16,16)',
        '--config.batch_size=8',
        '--config.optim.warmup_steps=0',
    ]
    assert run('check_data', IMAGENET, name, where, *size).code == 0
    error = fails(*argv, f'--data_dir={old}')
    assert 'is stored as tfrecord; to convert it, choose another --data_dir' in error


def test_a_damaged_tfrecord_is_named(run, fails, tmp_path):
    old = write_tfrecords(tmp_path / 'old', IMAGES)
    file = old / 'imagenet2012/5.0.0/imagenet2012-train.tfrecord-00001-of-00002'
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    argv = [f'--tfrecords={old}', f'--data_dir={tmp_path / "new"}']
    error = fails('prepare', 'imagenet2012', *argv, late=True)
    assert error.startswith(f'{file} is damaged, in the record that starts at byte ')
    assert not (tmp_path / 'new/imagenet2012/5.0.0').exists()


def test_digits(run, tmp_path):
    argv = ['prepare', 'digits', f'--data_dir={tmp_path}']
    code, out, err = run(*argv, '--dry_run')
    assert (code, err) == (0, '')
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):
        code, out, _ = run(*argv)
        assert code == 0
        assert f'{tmp_path}/digits/1.0.0 holds 1,438 train, 359 test examples' in out


@pytest.mark.skipif(
    importlib.util.find_spec('tensorflow') is not None, reason='TensorFlow is there'
)
@pytest.mark.parametrize('name', ['cifar10', 'wmt14_translate/de-en'])
def test_tensorflow_is_asked_for_where_tfds_needs_it(name, fails, tmp_path):
    error = fails('prepare', name, f'--data_dir={tmp_path}', late=True)
    assert error == (
        f'TFDS needs TensorFlow to prepare {name}, this once: install the extra, pip '
        "install 'vit_jax[prepare]'"
    )


@pytest.mark.parametrize(
    ('argv', 'error'),
    [
        (['imagenet2012'], 'must be downloaded by hand; say where from: --tars=DIR'),
        (['imagenet2012', '--tars=/no/such'], '--tars=/no/such is no folder'),
        (['imagenet2012', '--folder=/no/such'], 'should hold train/ with a folder'),
        (['imagenet2012', '--tfrecords=/no/such'], '--tfrecords=/no/such is no folder'),
        (['cifar10', '--tars=/x'], '--tars is for imagenet2012; other folders are'),
        (['cifar1O'], "unknown dataset 'cifar1O'; did you mean 'cifar10'?"),
        (['folder:/x'], 'folder:/x is read as it is; there is nothing to prepare'),
        (['my_fork.data:make'], 'is read as it is; there is nothing to prepare'),
        (['digits', '--allow_partial'], '--allow_partial goes with --tars or --folder'),
        (['cifar10', '--data_dir=gs://x'], 'must be a local folder; copy what is'),
        (['imagenet2012', '--tar=/x'], "does not take '--tar=/x'; did you mean --tars"),
        (['digits', '--config.seed=1'], "does not take '--config.seed=1'"),
    ],
)
def test_mistakes(fails, tmp_path, argv, error):
    if not any('--data_dir' in word for word in argv):
        argv = [*argv, f'--data_dir={tmp_path}']
    assert error in fails('prepare', *argv)
    assert list(tmp_path.iterdir()) == []


def test_one_tar_is_missing(fails, tars, tmp_path):
    (tars / 'ILSVRC2012_img_val.tar').unlink()
    argv = [f'--tars={tars}', f'--data_dir={tmp_path / "out"}']
    error = fails('prepare', 'imagenet2012', *argv)
    assert error == (
        f'{tars} has no ILSVRC2012_img_val.tar; get it from '
        'https://image-net.org/download-images (a login is needed)'
    )


def test_a_complete_set_is_wanted(fails, tars, tmp_path):
    argv = [f'--tars={tars}', f'--data_dir={tmp_path / "out"}']
    error = fails('prepare', 'imagenet2012', *argv)
    assert error.startswith('997 of 1,000 synsets have no training image: n014')
    assert error.endswith('to take what there is, pass --allow_partial')


def test_a_folder_with_other_files(fails, tars, tmp_path):
    there = tmp_path / 'out/imagenet2012/5.1.0'
    there.mkdir(parents=True)
    (there / 'mine.txt').write_text('mine')
    argv = [f'--tars={tars}', f'--data_dir={tmp_path / "out"}', '--allow_partial']
    error = fails('prepare', 'imagenet2012', *argv)
    assert error.startswith(f'{there} holds files, but no dataset_info.json')
    (there / 'dataset_info.json').write_text('{')
    error = fails('prepare', 'imagenet2012', *argv)
    assert error.startswith(f'{there / "dataset_info.json"} cannot be read: ')
    assert (there / 'mine.txt').read_text() == 'mine'


def test_a_folder_that_cannot_be_written(fails, tars):
    argv = [f'--tars={tars}', '--data_dir=/proc/no', '--allow_partial']
    error = fails('prepare', 'imagenet2012', *argv)
    assert error.startswith('/proc')


def test_what_is_prepared_is_the_version_of_tfds(tars, run, tmp_path):
    builder = tfds.builder('imagenet2012', data_dir=str(tmp_path / 'out'))
    argv = [f'--tars={tars}', f'--data_dir={tmp_path / "out"}', '--allow_partial']
    assert run('prepare', 'imagenet2012', *argv).code == 0
    builder = tfds.builder('imagenet2012', data_dir=str(tmp_path / 'out'))
    assert builder.is_prepared()
    assert builder.info.file_format is tfds.core.FileFormat.ARRAY_RECORD


def test_what_the_page_on_data_shows_exists(run):
    """Commands, their options, configs and keys."""
    page = (CONFIGS.parent / 'docs/data.md').read_text()
    blocks = re.findall(r'^```bash\n(.*?)^```', page, re.MULTILINE | re.DOTALL)
    lines = ''.join(blocks).replace('\\\n', ' ').splitlines()
    keys = set(flat_keys(default_config()))
    assert len(lines) > 8
    for line in lines:
        program, command, *words = shlex.split(line)
        assert program == 'vit_jax'
        usage = run(command, '--help').out
        for word in words:
            option = word.partition('=')[0]
            if option == '--config':
                assert (CONFIGS.parent / word.removeprefix('--config=')).exists()
            elif option.startswith('--config.'):
                assert option.removeprefix('--config.') in keys
            elif option.startswith('--'):
                assert re.search(rf'{option}\b', usage), line
    inline = set(re.findall(r'--config\.([\w.]+)=', page))
    assert inline <= keys


def flat_keys(config, prefix=''):
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, ConfigDict):
            yield from flat_keys(value, f'{prefix}{key}.')
