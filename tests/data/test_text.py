import gzip
import shutil
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds

from vit_jax.data.datasets import pick_eval_split
from vit_jax.data.text import Pairs, TextDataset, load_text, read_lines
from vit_jax.errors import UserError

# --- Files --------------------------------------------------------------------


def make_files(root, files):
    """Writes text or bytes at each name, compressed where it ends in .gz."""
    for name, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        (root / name).write_bytes(gzip.compress(data) if name[-3:] == '.gz' else data)
    return f'text:{root}?src=en&tgt=de'


TRAIN = {'train.en': 'one\ntwo\n\n', 'train.de': 'eins\nzwei\ndrei\n'}


def test_files(tmp_path):
    val = {'val.en.gz': 'a\nb', 'val.de.gz': 'ä\nß'}
    name = make_files(tmp_path, {**TRAIN, **val, '.x.en': '', 'README.md': 'of it'})
    dataset = load_text(name)
    assert dataset.name == name
    assert dataset.location == str(tmp_path)
    assert dataset.languages == ('en', 'de')
    assert dataset.open('train') == Pairs(['one', 'two', ''], ['eins', 'zwei', 'drei'])
    assert dataset.open('val') == Pairs(['a', 'b'], ['ä', 'ß'])
    assert dict(dataset.splits) == {'train': 3, 'val': 2}
    assert len(dataset.splits) == 2
    assert pick_eval_split(dataset) == 'val'
    other = load_text(f'text:{tmp_path}?tgt=en&src=de')
    assert other.languages == ('de', 'en')
    assert other.open('val') == Pairs(['ä', 'ß'], ['a', 'b'])


def test_splits_are_whatever_there_is_and_counted_when_asked(tmp_path):
    name = make_files(tmp_path, {**TRAIN, 'test.v2.en': 'a\n', 'test.v2.de': 'b\n'})
    make_files(tmp_path, {'bad.en': b'\xff', 'bad.de': b'\xff'})
    splits = load_text(name).splits
    assert list(splits) == ['bad', 'test.v2', 'train']
    assert 'bad' in splits  # unread
    assert splits['train'] == 3
    (tmp_path / 'train.en').unlink()
    assert splits['train'] == 3  # remembered
    assert splits['test.v2'] == 1
    assert splits.get('none') is None
    with pytest.raises(UserError, match='not UTF-8'):
        splits['bad']


def test_home_is_expanded(tmp_path, monkeypatch):
    make_files(tmp_path, TRAIN)
    monkeypatch.setenv('HOME', str(tmp_path))
    assert load_text('text:~?src=en&tgt=de').splits['train'] == 3


@pytest.mark.parametrize(
    ('data', 'lines'),
    [
        ('', []),
        ('\n', ['']),
        ('a', ['a']),
        ('a\n', ['a']),
        ('a\n\n', ['a', '']),
        ('a\r\nb\r\n', ['a', 'b']),
        ('a\u2028b\x0bc\x85d\rd\n', ['a\u2028b\x0bc\x85d\rd']),
        ('\ufeffa\n\ufeffb\n', ['a', '\ufeffb']),
        ('\ufeff', []),
        (' ü \n', [' ü ']),
    ],
)
def test_lines_end_at_newlines_alone(data, lines, tmp_path):
    make_files(tmp_path, {'x.en': data, 'x.en.gz': data})
    assert read_lines(tmp_path / 'x.en') == lines
    assert read_lines(tmp_path / 'x.en.gz') == lines


@pytest.mark.parametrize(
    ('query', 'message'),
    [
        ('', r'does not say src and tgt; .* \?src=en&tgt=de'),
        ('?src=en', 'does not say tgt;'),
        ('?tgt=en&src=', 'does not say src;'),
        ('?src=en&target=de', "unknown option of .* 'target'; did you mean 'tgt'"),
        ('?src=en&tgt=en', 'src and tgt must be two languages'),
        (
            '?src=en&tgt=fr',
            r"no file of language 'fr', such as .*: train\.de, train\.en",
        ),
    ],
)
def test_queries_that_do_not_fit(query, message, tmp_path):
    make_files(tmp_path, TRAIN)
    with pytest.raises(UserError, match=message) as caught:
        load_text(f'text:{tmp_path}{query}')
    assert '\n' not in str(caught.value)


def test_a_folder_that_is_not_there_is_missed_when_it_is_read(tmp_path):
    """So runs are planned on machines that do not hold the data."""
    dataset = load_text('text:such?src=en&tgt=de', str(tmp_path))
    assert dict(dataset.splits) == {}
    assert dataset.languages == ('en', 'de')
    with pytest.raises(UserError, match=f'no such folder: {tmp_path}/such '):
        dataset.open('train')


def test_a_path_is_within_the_data_dir_or_absolute(tmp_path):
    folder = tmp_path / 'pairs'
    folder.mkdir()
    make_files(folder, {'train.en': 'a\n', 'train.de': 'b\n'})
    for name, data_dir in (('pairs', str(tmp_path)), (str(folder), '/none')):
        pairs = load_text(f'text:{name}?src=en&tgt=de', data_dir).open('train')
        assert pairs == (['a'], ['b'])


def test_a_name_that_is_misspelt():
    with pytest.raises(UserError, match=r"'datez'; did you mean 'dates'\?"):
        load_text('datez')


def test_empty_folder(tmp_path):
    with pytest.raises(UserError, match=r"no file of language 'en', .*: no files"):
        load_text(f'text:{tmp_path}?src=en&tgt=de')


@pytest.mark.parametrize(
    ('files', 'message'),
    [
        ({'train.de': 'eins\n'}, r'train\.en has 3 lines and .*train\.de 1; line i'),
        ({'train.en': '', 'train.de': ''}, "split 'train' of .* has no lines"),
        ({'train.en': b'a\nb\xfc\n'}, r'train\.en is not UTF-8: line 2 has .* 0xfc;'),
        (
            {'val.en': 'a\n'},
            r'val\.en has no translation: .* no val\.de or val\.de\.gz',
        ),
        (
            {'val.de': 'a\n'},
            r'val\.de has no translation: .* no val\.en or val\.en\.gz',
        ),
    ],
)
def test_files_that_do_not_fit(files, message, tmp_path):
    dataset = load_text(make_files(tmp_path, {**TRAIN, **files}))
    split = next(iter(files)).partition('.')[0]
    for ask in (dataset.open, dataset.splits.__getitem__):
        with pytest.raises(UserError, match=message) as caught:
            ask(split)
        assert '\n' not in str(caught.value)


def test_splits_that_there_are_not(tmp_path):
    dataset = load_text(make_files(tmp_path, TRAIN))
    with pytest.raises(UserError, match="'trian'; did you mean 'train'"):
        dataset.open('trian')


def test_file_that_is_there_twice(tmp_path):
    name = make_files(tmp_path, {**TRAIN, 'train.en.gz': 'a\n'})
    with pytest.raises(UserError, match=r'train\.en is there as train\.en\.gz too'):
        load_text(name)


@pytest.mark.parametrize('damage', [slice(0, 30), slice(0, 0), slice(5, None)])
def test_damaged_gz(damage, tmp_path):
    lines = ''.join(f'line {i}\n' for i in range(99))
    name = make_files(tmp_path, {'train.en.gz': lines, 'train.de': lines})
    path = tmp_path / 'train.en.gz'
    path.write_bytes(path.read_bytes()[damage])
    with pytest.raises(UserError, match=r'train\.en\.gz is cut or damaged: ') as caught:
        load_text(name).open('train')
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('place', [10, 40])  # the kind of a block, and its data
def test_bits_that_flipped_in_gz(place, tmp_path):
    path = tmp_path / 'x.gz'
    data = bytearray(gzip.compress(bytes(range(256)) * 9))
    data[place] ^= 255
    path.write_bytes(data)
    with pytest.raises(UserError, match='is cut or damaged'):
        read_lines(path)


def test_file_that_vanishes(tmp_path):
    with pytest.raises(UserError, match=r'x\.en cannot be read: No such file'):
        read_lines(tmp_path / 'x.en')


# --- Generated ----------------------------------------------------------------


def test_dates():
    dataset = load_text('dates')
    assert dataset.splits == {'train': 20_000, 'validation': 1_000, 'test': 1_000}
    assert dataset.languages == ('en', 'iso')
    assert pick_eval_split(dataset) == 'validation'
    few = load_text('dates:num_examples=30')
    assert few.splits == {'train': 30, 'validation': 1_000, 'test': 1_000}
    for split, count in few.splits.items():
        pairs = few.open(split)
        assert len(pairs.source) == len(pairs.target) == count
    with pytest.raises(UserError, match="'tset'; did you mean 'test'"):
        dataset.open('tset')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ('num_exmples=3', "option of dates 'num_exmples'; did you mean 'num_examples'"),
        ('num_examples=0', 'num_examples needs a whole number above 0'),
        ('num_examples', 'num_examples needs a whole number above 0'),
    ],
)
def test_options_of_dates_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        load_text(f'dates:{options}')


# --- TFDS ---------------------------------------------------------------------


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    """A data_dir with a TFDS dataset of five pairs to train on, two to test."""
    with tfds.core.registered.skip_registration():

        class TinyPairs(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version('1.2.3')

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=tfds.features.Translation(languages=['de', 'en']),
                    supervised_keys=('en', 'de'),
                )

            def _split_generators(self, dl_manager):
                return {k: self._generate_examples(k) for k in ('train', 'test')}

            def _generate_examples(self, split):
                for i in range(5 if split == 'train' else 2):
                    yield i, {'de': f'süß {split} {i}', 'en': f'sweet {split} {i}'}

    data_dir = tmp_path_factory.mktemp('tiny')
    TinyPairs(data_dir=data_dir, file_format='array_record').download_and_prepare()
    return data_dir


def test_tfds_dataset(tiny, capsys):
    dataset = load_text('tiny_pairs', str(tiny))
    assert dataset.location == str(tiny / 'tiny_pairs' / '1.2.3')
    assert dataset.languages == ('en', 'de')
    assert dataset.splits == {'train': 5, 'test': 2}
    pairs = dataset.open('train')
    numbers = [line.removeprefix('sweet train ') for line in pairs.source]
    assert sorted(numbers) == list('01234')
    assert pairs.target == [f'süß train {i}' for i in numbers]
    assert len(dataset.open('train[:3]').source) == dataset.splits['train[:3]'] == 3
    with pytest.raises(UserError, match="'trian'; did you mean 'train'"):
        dataset.open('trian')
    assert capsys.readouterr() == ('', '')


def test_tfds_in_the_other_direction(tiny):
    dataset = load_text('tiny_pairs:1.2.3?src=de&tgt=en', str(tiny))
    assert dataset.languages == ('de', 'en')
    assert dataset.open('test').source[0].startswith('süß test')
    with pytest.raises(
        UserError, match=r"language of tiny_pairs 'fr'; choose .*de, en"
    ):
        load_text('tiny_pairs?src=de&tgt=fr', str(tiny))
    with pytest.raises(UserError, match='does not say tgt'):
        load_text('tiny_pairs?src=de', str(tiny))


def test_records_are_read_in_chunks(tiny, monkeypatch):
    whole = load_text('tiny_pairs', str(tiny)).open('train')
    monkeypatch.setattr('vit_jax.data.text._CHUNK', 2)
    assert load_text('tiny_pairs', str(tiny)).open('train') == whole


def test_tfds_dataset_that_is_not_prepared(tmp_path):
    """How large it is, is known all the same, so that runs can be planned."""
    dataset = load_text('wmt14_translate/de-en?src=en&tgt=de', str(tmp_path))
    assert dataset.languages == ('en', 'de')
    sizes = {'train': 4_508_785, 'validation': 3_000, 'test': 3_003}
    assert dataset.splits == sizes
    with pytest.raises(UserError) as caught:
        dataset.open('train')
    assert str(caught.value).startswith(
        f"dataset 'wmt14_translate/de-en' is not prepared at {dataset.location}; run "
        f'`vit_jax prepare wmt14_translate/de-en --data_dir={tmp_path}`'
    )
    assert dataset.location.startswith(str(tmp_path / 'wmt14_translate' / 'de-en'))
    assert load_text('wmt14_translate/de-en', str(tmp_path)).languages == ('de', 'en')
    assert load_text('wmt14_translate/fr-en', str(tmp_path)).splits == {}


def test_tfds_dataset_that_lacks_a_file(tiny, tmp_path):
    shutil.copytree(tiny / 'tiny_pairs', tmp_path / 'tiny_pairs')
    (file,) = (tmp_path / 'tiny_pairs/1.2.3').glob('*train*')
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r'cannot be read: .*copy the dataset there'):
        load_text('tiny_pairs', str(tmp_path)).open('train')
    file.unlink()
    with pytest.raises(UserError, match=f'{file.name} is missing; copy dataset'):
        load_text('tiny_pairs', str(tmp_path)).open('train')


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('wmt14_tanslate', "unknown dataset .* did you mean 'wmt14_translate'"),
        ('wmt14_translate/xx-en', 'BuilderConfig xx-en not found'),
        ('cifar10', "'cifar10' is not of translations: .* has .*image"),
    ],
)
def test_names_that_do_not_fit(name, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        load_text(name, str(tmp_path))
    assert '\n' not in str(caught.value)


def test_nothing_needs_tensorflow(tiny):
    program = (
        'import sys\n'
        'from vit_jax.data.text import load_text\n'
        'assert "tensorflow_datasets" not in sys.modules\n'
        'load_text("tiny_pairs", sys.argv[1]).open("train")\n'
        'assert "tensorflow" not in sys.modules\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', program, str(tiny)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, ''), done.stderr


# --- Of a fork ----------------------------------------------------------------


def test_dataset_by_dotted_path(tmp_path, monkeypatch):
    (tmp_path / 'fork_of_text').mkdir()
    (tmp_path / 'fork_of_text' / 'data.py').write_text(
        'from vit_jax.data.text import Pairs, TextDataset\n'
        'def make(data_dir):\n'
        '    pairs = Pairs(["a"], ["b"])\n'
        '    return TextDataset("f", data_dir, ("x", "y"), {}, lambda split: pairs)\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    dataset = load_text('fork_of_text.data:make', '/there')
    assert isinstance(dataset, TextDataset)
    assert dataset.location == '/there'
    assert dataset.open('train').target == ['b']
    with pytest.raises(UserError, match="has no 'mkae'"):
        load_text('fork_of_text.data:mkae')
