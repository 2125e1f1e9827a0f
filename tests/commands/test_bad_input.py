"""Bad input: one line that says what was wrong, and nothing is overwritten."""

import shutil

import pytest
from command_lines import COLOUR, CONFIGS, DIGITS

pytest_plugins = ['command_fixtures']

SYNTHETIC = '--config.dataset.name=synthetic:size=8,channels=1,num_examples=64'


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (
            ['--config.optim.learning_rat=3'],
            "unknown config key 'optim.learning_rat'; did you mean "
            "'optim.learning_rate'?",
        ),
        (
            ['--config.optim.learning_rate', 'fast'],
            "config.optim.learning_rate must be a number, not 'fast'",
        ),
        (
            ['--config.checkpoint.keep=None'],
            "config.checkpoint.keep must be a whole number, not 'None'",
        ),
        (
            ['--config.optim.rules=5'],
            'optim.rules must be triples (pattern, factor of the learning rate, of the '
            "weight decay), such as (('head/', 10.0, 1.0),), not (5,)",
        ),
        (
            ['--config.augment.min_scale=0.08'],  # the default
            'config.augment.min_scale is set to 0.08, but this run does not read it; '
            'leave it out, or set what makes use of it',
        ),
        (
            ['--config.model.name=ConVit-Ti/16'],
            "unknown model 'ConVit-Ti/16'; did you mean 'ConViT-Ti/16'?",
        ),
        (
            ['--config.model.kwargs.patch_size=3'],
            'patch 3x3 does not divide the image 8x8; change the image size or the '
            'patch size',
        ),
        (
            ['--config.batch_size=13'],
            '; the nearest that can: 8 or 16',
        ),
        (
            ['--config.dataset.name=folder:/none'],
            "no such folder: /none (from dataset 'folder:/none')",
        ),
        (
            ['--config.dataset.eval_split=tset'],
            'unknown split of synthetic:size=8,channels=1,num_examples=64 '
            "'tset'; did you mean 'test'?",
        ),
        (
            ['--config.num_epochs=2'],
            'set one of config.num_steps and config.num_epochs, not both',
        ),
    ],
)
@pytest.mark.parametrize('command', ['train', 'check_data'])
def test_configs_that_do_not_fit(fails, tmp_path, command, argv, message):
    workdir = [f'--workdir={tmp_path}/run'] if command == 'train' else []
    assert message in fails(command, *DIGITS, SYNTHETIC, *argv, *workdir)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('file', 'message'),
    [
        (f'{CONFIGS}/none.py', f'no such config file: {CONFIGS}/none.py'),
        (
            f'{CONFIGS}/digits_vit.py:smok',
            "unknown config variant 'smok'; did you mean 'smoke'?",
        ),
    ],
)
def test_configs_that_are_not_there(fails, tmp_path, file, message):
    assert fails('train', f'--config={file}', f'--workdir={tmp_path}/run') == message
    assert not (tmp_path / 'run').exists()


# --- Workdirs -----------------------------------------------------------------


def test_the_workdir_of_another_run_is_not_touched(fails, digits, data_dir, snapshot):
    before = snapshot(digits)
    message = fails(
        'train',
        f'--config={CONFIGS}/digits_cnn.py:smoke',
        f'--config.dataset.data_dir={data_dir}',
        f'--workdir={digits}',
    )
    assert message.startswith(
        f'{digits} holds another run: config.model.kwargs.depth is 2 there and None '
        'here; '
    )
    assert message.endswith(
        "config.model.name is 'ConViT-Ti/2' there and 'CNN' here. Choose another "
        '--workdir, or go on with the changes by --allow_changes'
    )
    assert snapshot(digits) == before


@pytest.mark.parametrize('place', ['file', 'file/run'])
def test_workdirs_that_cannot_be_written(fails, tmp_path, place):
    """A file is in the way: also the superuser cannot write there."""
    (tmp_path / 'file').write_text('mine')
    path = tmp_path / place
    message = fails('train', *DIGITS, SYNTHETIC, f'--workdir={path}')
    assert message.startswith(f'cannot write to workdir {path}: ')
    assert (tmp_path / 'file').read_text() == 'mine'


# --- Weights ------------------------------------------------------------------


@pytest.mark.parametrize(
    'argv',
    [
        ['evaluate', '--workdir={}'],
        ['evaluate', *DIGITS, '--weights={}'],
        ['predict', __file__, '--weights={}'],
        ['attend', __file__, '--out=out', '--weights={}'],
    ],
)
def test_weights_that_are_not_there(fails, tmp_path, argv):
    for name, reason in (
        ('none', 'no such file or folder: {}'),
        ('.', '{} is a folder without weights; '),
    ):
        path = tmp_path / name
        if '--workdir={}' in argv:
            reason = '{} is not the workdir of a run: no checkpoints/ in it'
        message = fails(*[word.format(path) for word in argv])
        assert message.startswith(reason.format(path))
    (tmp_path / 'checkpoints').mkdir()
    message = fails(*[word.format(tmp_path) for word in argv])
    assert message == f'{tmp_path} has no finished checkpoint yet'


@pytest.mark.parametrize('item', ['metadata', 'variables'])
def test_weights_that_are_damaged(fails, tmp_path, digits, make_image, item):
    shutil.copytree(digits, tmp_path / 'run')
    for file in (tmp_path / 'run' / 'checkpoints' / '3' / item).rglob('*'):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:100])
    image = make_image('grey.png', 8, 8)
    for argv in (
        ['predict', image, f'--weights={tmp_path}/run'],
        ['attend', image, f'--weights={tmp_path}/run', f'--out={tmp_path}/out'],
        ['evaluate', f'--workdir={tmp_path}/run'],
    ):
        message = fails(*argv)
        assert message.startswith(f'checkpoint 3 in {tmp_path}/run/checkpoints cannot')


@pytest.mark.parametrize(
    'argv',
    [
        [],
        [*DIGITS],
        ['--weights=/there'],
        ['--workdir=/there', '--weights=/there'],
        ['--workdir=/there', *DIGITS],
    ],
)
def test_evaluate_takes_a_workdir_or_config_and_weights(fails, argv):
    message = fails('evaluate', *argv)
    assert message == 'give --workdir=DIR, or both --config=FILE and --weights=PATH'


@pytest.mark.parametrize(
    ('argv', 'what'),
    [
        (
            ['--config.model.kwargs.num_local_layers=0'],
            'the file has params/block00/attention/gating, ',
        ),
        (['--config.model.kwargs.depth=3'], 'the model has params/block02/'),
        (
            ['--config.dataset.name=synthetic:size=8,num_classes=10'],
            'knows 10 classes (0, 1, 2 and 7 more), the data has 10 (class_0, class_1',
        ),
        (
            ['--config.dataset.name=synthetic:size=8,num_classes=11,channels=1'],
            'the data has 11 (class_0, ',
        ),
    ],
)
def test_weights_of_another_model(fails, digits, argv, what):
    message = fails('evaluate', f'--workdir={digits}', *argv)
    assert message.startswith(str(digits))
    assert what in message


# --- Images -------------------------------------------------------------------


def test_images_that_are_not_there(fails, digits, make_image):
    image = make_image('grey.png', 8, 8)
    missing = image.with_name('none.png')
    message = fails('predict', f'--weights={digits}', image, missing)
    assert message == f'no such image: {missing}'
    message = fails('predict', f'--weights={digits}', image.parent)
    assert message == f'no such image: {image.parent}'


def test_images_that_are_corrupt(fails, digits, make_image):
    good, bad = make_image('good.png', 8, 8), make_image('bad.png', 31, 37)
    bad.write_bytes(bad.read_bytes()[:200])
    message = fails('predict', f'--weights={digits}', good, bad)
    assert message == f'{bad} cannot be decoded: image file is truncated'
    bad.write_text('hello')
    message = fails('predict', f'--weights={digits}', bad)
    assert message == f'{bad} cannot be decoded: cannot identify image file'


@pytest.mark.parametrize(
    ('weights', 'shape', 'found', 'needed', 'mode'),
    [('digits', (8, 8, 3), 3, 1, 'L'), ('colour', (10, 10), 1, 3, 'RGB')],
)
def test_images_of_other_channels(
    fails, run, make_image, request, weights, shape, found, needed, mode
):
    image = make_image('image.png', *shape)
    argv = ['predict', f'--weights={request.getfixturevalue(weights)}', image]
    assert fails(*argv) == (
        f'{image} has {found} channel(s), the model takes {needed}; convert the image '
        f'to {mode}, or pass --convert_channels'
    )
    code, out, err = run(*argv, '--convert_channels')
    assert (code, err) == (0, '')
    assert out.startswith(f'{image}  ')


def test_images_to_attend_to(fails, digits, make_image, tmp_path):
    """They are read as `predict` reads them, before anything is written."""
    bad, missing = make_image('bad.png', 31, 37), tmp_path / 'none.png'
    bad.write_bytes(bad.read_bytes()[:200])
    colour = make_image('colour.png', 8, 8, 3)
    argv = ['attend', f'--weights={digits}', f'--out={tmp_path}/out']
    assert fails(*argv, missing) == f'no such image: {missing}'
    message = f'{bad} cannot be decoded: image file is truncated'
    assert fails(*argv, bad) == message
    message = f'{colour} has 3 channel(s), the model takes 1; '
    assert fails(*argv, colour).startswith(message)
    assert not (tmp_path / 'out').exists()


# --- Folders of images --------------------------------------------------------


def test_a_text_file_among_the_images(fails, make_folder, tmp_path):
    folder = make_folder()
    notes = folder / 'train' / 'cat' / 'notes.txt'
    notes.write_text('hello')
    argv = [*COLOUR, f'--config.dataset.name=folder:{folder}']
    message = (
        f'{notes} is not an image (.jpg, .jpeg, .png, .webp); take it out of the '
        'dataset'
    )
    assert fails('check_data', *argv) == message
    assert fails('train', *argv, f'--workdir={tmp_path}/run') == message
    assert not (tmp_path / 'run').exists()


def test_a_corrupt_image_to_train_on(fails, make_folder, tmp_path):
    """Told when it is met: the lines before are those of the run."""
    folder = make_folder()
    for path in (folder / 'train' / 'dog').iterdir():
        path.write_bytes(path.read_bytes()[:200])
    argv = [
        *COLOUR,
        f'--config.dataset.name=folder:{folder}',
        '--config.dataset.image_size=(8,8)',
    ]
    assert 'cannot be decoded: image file is truncated' in fails(
        'check_data', *argv, late=True
    )
    message = fails('train', *argv, f'--workdir={tmp_path}/run', late=True)
    assert message.startswith(f'{folder}/train/dog/')
    assert message.endswith('cannot be decoded: image file is truncated')


def test_a_dataset_that_is_not_prepared(fails, tmp_path):
    argv = [
        *COLOUR,
        '--config.dataset.name=cifar10',
        f'--config.dataset.data_dir={tmp_path}',
    ]
    message = fails('check_data', *argv)  # and no splits, as if they were there
    assert message.startswith(f"dataset 'cifar10' is not prepared at {tmp_path}/cifar")


@pytest.mark.parametrize(
    ('version', 'source'), [('', '--tars=DIR'), (':5.0.0', '--tfrecords=DIR')]
)
def test_imagenet_that_is_not_prepared(fails, tmp_path, version, source):
    """The command that is suggested is one that `prepare` takes."""
    argv = [
        *COLOUR,
        f'--config.dataset.name=imagenet2012{version}',
        f'--config.dataset.data_dir={tmp_path}',
        '--config.dataset.image_size=(8,8)',
    ]
    message = fails('check_data', *argv)
    command = f'vit_jax prepare imagenet2012{version} {source} --data_dir={tmp_path}'
    assert f'; run `{command}`, or point dataset.data_dir' in message
    (tmp_path / 'empty').mkdir()
    words = command.replace('DIR', f'{tmp_path}/empty').split()[1:]
    assert 'say where from' not in fails(*words)


# --- Other commands -----------------------------------------------------------


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--model=ViT-S'], "unknown model 'ViT-S'; did you mean 'ViT-S/32'?"),
        (
            ['--model=ViT-Z/16'],
            "unknown size of ViT 'Z'; choose one of: B, H, L, S, Ti",
        ),
        (
            ['--model=ViT-Ti/17'],
            'patch 17x17 does not divide the image 224x224; change the image size or '
            'the patch size',
        ),
        (
            ['--model=CNN', '--image_size=big'],
            "--image_size is 224 or 224,320 (height,width), not 'big'",
        ),
        (
            ['--model=CNN', '--image_size=8,8,3'],
            "--image_size is 224 or 224,320 (height,width), not '8,8,3'",
        ),
        (
            ['--model=no_fork.nets:A'],
            "cannot import 'no_fork.nets:A': No module named 'no_fork'",
        ),
    ],
)
def test_models_to_summarize_that_do_not_fit(fails, argv, message):
    assert fails('summarize', *argv) == message


@pytest.mark.parametrize('tokens', ['', '6,x', '6,,7', '0', '-6'])
def test_token_counts_to_benchmark_that_do_not_fit(fails, tokens):
    message = fails('benchmark', 'gpsa', f'--tokens={tokens}')
    assert message == f'--tokens is a list such as 196,1024, not {tokens!r}'


@pytest.mark.parametrize('query', ['', '1', '1,', 'x,1', '-1,2', '1,2,3', 'class'])
def test_queries_that_are_none(fails, query):
    message = fails('attend', 'a.png', '--weights=x', '--out=y', f'--query={query}')
    assert message == f"--query is ROW,COLUMN such as 1,2, or 'mean', not {query!r}"


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (
            ['--query=1,4'],
            'the query 1,4 is outside of the 4x4 grid of block00; the last is 3,3',
        ),
        (
            ['--query=4,1', '--layers=block01'],
            'the query 4,1 is outside of the 4x4 grid',
        ),
        (['--layers=block1'], "unknown layer 'block1'; did you mean 'block01'?"),
        (['--layers=block00,,'], "unknown layer ''; choose one of: block00, block01"),
    ],
)
def test_maps_that_are_not_there(fails, digits, make_image, tmp_path, argv, message):
    argv = [make_image('grey.png', 8, 8), f'--out={tmp_path}/out', *argv]
    assert fails('attend', f'--weights={digits}', *argv).startswith(message)
    assert not (tmp_path / 'out').exists()


def test_models_without_attention(fails, colour, make_image, tmp_path):
    image = make_image('colour.png', 10, 10, 3)
    message = fails('attend', f'--weights={colour}', image, f'--out={tmp_path}/out')
    assert message == (
        'CNN has no attention to map: none of its modules sows attention_weights'
    )
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('place', ['file', 'file/maps'])
def test_pictures_that_cannot_be_written(fails, digits, make_image, tmp_path, place):
    (tmp_path / 'file').write_text('mine')
    image, out = make_image('grey.png', 8, 8), tmp_path / place
    message = fails('attend', f'--weights={digits}', image, f'--out={out}')
    assert message == f'cannot write {out}/grey/image.png: Not a directory'
    assert (tmp_path / 'file').read_text() == 'mine'
