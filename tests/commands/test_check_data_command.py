import subprocess
import sys

import pytest
from command_lines import COLOUR, DIGITS

pytest_plugins = ['command_fixtures']


def test_digits(run, data_dir, digits):
    code, out, err = run('check_data', *DIGITS, f'--config.dataset.data_dir={data_dir}')
    assert (code, err) == (0, '')
    lines = out.splitlines()
    assert lines[:4] == [
        f'digits: {data_dir}/digits/1.0.0',
        '  split train: 1,438 examples',
        '  split test: 359 examples',
        '  10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9',
    ]
    for title in ('first training batch:', 'first evaluation batch:'):
        start = lines.index(title)
        image, label, weight, frequent = lines[start + 1 : start + 5]
        assert image.startswith('  image  uint8    [64, 8, 8, 1]  from 0 to 255, mean ')
        assert label.startswith('  label  int32    [64]  from 0 to 9, mean ')
        assert weight == '  weight float32  [64]  from 1 to 1, mean 1'
        assert frequent.startswith('  most frequent: ')
        counts = [int(part.split('(')[1].rstrip(')')) for part in frequent.split(', ')]
        assert counts == sorted(counts, reverse=True)
        assert len(counts) == 5


def test_a_folder(run, make_folder):
    folder = make_folder()
    code, out, err = run(
        'check_data',
        *COLOUR,
        f'--config.dataset.name=folder:{folder}',
        '--config.dataset.image_size=(8,12)',
        '--config.eval.batch_size=24',
    )
    assert (code, err) == (0, '')
    assert f'folder:{folder}: {folder}' in out
    assert '  split test: 16 examples' in out
    assert '  2 classes: cat, dog' in out
    assert '  image  uint8    [16, 8, 12, 3]' in out
    # The evaluation batch is filled up by a third.
    assert '  weight float32  [24]  from 0 to 1, mean 0.6667' in out


def test_rows_of_weight_zero_are_not_counted(run, make_folder):
    """Of 16 images to evaluate, half are cats; the batch is filled up to 24 rows."""
    folder = make_folder()
    (cat, *_) = sorted((folder / 'train' / 'cat').iterdir())
    cat.write_bytes(b'')
    _, out, _ = run(
        'check_data',
        *COLOUR,
        f'--config.dataset.name=folder:{folder}',
        '--config.dataset.image_size=(8,12)',
        '--config.dataset.skip_corrupt=True',
        '--config.eval.batch_size=24',
    )
    train, test = (x for x in out.splitlines() if 'most frequent' in x)
    assert train == '  most frequent: dog (8), cat (7)'
    assert test == '  most frequent: cat (8), dog (8)'


def test_nothing_is_written(run, make_folder, tmp_path, monkeypatch):
    folder = make_folder()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob('*'))
    name = f'--config.dataset.name=folder:{folder}'
    size = '--config.dataset.image_size=(8,8)'
    assert run('check_data', *COLOUR, name, size).code == 0
    assert sorted(tmp_path.rglob('*')) == before


def test_many_classes_are_not_all_listed(run):
    name = '--config.dataset.name=synthetic:num_classes=11,size=10,num_examples=16'
    _, out, _ = run('check_data', *COLOUR, name)
    names = ', '.join(f'class_{i}' for i in range(10))
    assert f'  11 classes: {names}, ...\n' in out


@pytest.mark.parametrize('words', [['batch_size=16'], ['batch_size', '16']])
def test_keys_are_set_with_and_without_an_equals_sign(run, words):
    _, out, _ = run('check_data', *COLOUR, f'--config.{words[0]}', *words[1:])
    assert '  image  uint8    [16, 10, 10, 3]' in out


def test_worker_processes_of_a_program(make_folder):
    """They start its modules anew, and inherit the flags of absl."""
    folder = make_folder()
    argv = [
        *COLOUR,
        f'--config.dataset.name=folder:{folder}',
        '--config.dataset.image_size=(8,12)',
        '--config.dataset.num_workers=2',
    ]
    command = [sys.executable, '-m', 'vit_jax.main', 'check_data', *argv]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('  image  uint8    [16, 8, 12, 3]') == 2
