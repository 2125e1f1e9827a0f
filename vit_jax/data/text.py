"""From a name to sentence pairs: files of lines, generated ones, TFDS, a fork's.

The pairs of a split are lists of lines, read whole. What becomes of them is the
business of `tokenizer` and `buckets`.
"""

import dataclasses
import gzip
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from vit_jax.data import dates, long_range
from vit_jax.data.progress import Progress
from vit_jax.data.tfds_builder import Splits, check_split, find_builder, reading
from vit_jax.errors import UserError, reason, some, unknown
from vit_jax.forks import import_path, is_path

_CHUNK = 4096  # records read at a time

# Sizes of splits, to plan runs on machines that do not hold them; those of the data
# that TFDS builds, https://huggingface.co/datasets/wmt/wmt14.
_PUBLISHED_SPLITS = {
    'wmt14_translate/de-en': {'train': 4_508_785, 'validation': 3_000, 'test': 3_003},
}


class Pairs(NamedTuple):
    """Lines, and their translations at the same places.

    Attributes:
      source: lines without their ends.
      target: as many.
    """

    source: list[str]
    target: list[str]


@dataclasses.dataclass(frozen=True)
class TextDataset:
    """What is known of sentence pairs before they are read.

    Attributes:
      name: as in the config.
      location: where they are read from, for people.
      languages: of source and target.
      splits: pairs of each split, of files counted when asked; empty where nothing is
        known.
      open: split -> Pairs; raises UserError for what is not there, or cannot be read.
      longest: most characters of a line, where that is known.
    """

    name: str
    location: str
    languages: tuple[str, str]
    splits: Mapping[str, int]
    open: Callable[[str], Pairs]
    longest: int | None = None


def load_text(name: str, data_dir: str | None = None) -> TextDataset:
    """Finds sentence pairs by name; reads none of them.

    Args:
      name: one of
        'text:multi30k?src=en&tgt=de', a folder with `train.en` and `train.de`, or
        `train.en.gz`, and so on for other splits, in UTF-8, a sentence a line;
        'dates' or 'dates:num_examples=20000', see `vit_jax.data.dates`;
        'copy:length=64' or 'recall:length=64,pairs=4', see
        `vit_jax.data.long_range`; both have num_examples;
        a TFDS dataset of translations that is prepared, 'wmt14_translate/de-en',
        optionally with the direction, 'wmt14_translate/de-en?src=en&tgt=de';
        the path of a fork's function, 'my_fork.data:make', called with `data_dir`.
      data_dir: where TFDS keeps its datasets; None for its default. The folder of
        paths of 'text:' too, where they are not absolute.

    Raises:
      UserError: for an unknown name, or what lies there is something else. Where there
        is no such folder or it is not prepared, `open` says so: a run can be planned.

    >>> dataset = load_text('dates:num_examples=3')
    >>> dataset.splits['train'], dataset.open('train').target[0]
    (3, '2008-05-04')
    """
    kind, _, rest = name.partition(':')
    if kind == 'text':
        return _files(name, rest, data_dir)
    if kind in GENERATED:
        return _generate(name, GENERATED[kind], rest)
    if '.' in kind and is_path(name):
        return import_path(name)(data_dir)
    return _tfds(name, data_dir)


def _read_query(name: str, query: str) -> dict[str, str]:
    """'src=en&tgt=de' as a dict."""
    options: dict[str, str] = {}
    for part in filter(None, query.split('&')):
        key, _, value = part.partition('=')
        if key not in ('src', 'tgt'):
            raise unknown(f'option of {name!r}:', key, ['src', 'tgt'])
        options[key] = value
    missing = [key for key in ('src', 'tgt') if not options.get(key)]
    if missing:
        raise UserError(
            f'{name!r} does not say {" and ".join(missing)}; name both languages: '
            '?src=en&tgt=de'
        )
    if options['src'] == options['tgt']:
        raise UserError(f'{name!r}: src and tgt must be two languages')
    return options


# --- Files --------------------------------------------------------------------


def _files(name: str, rest: str, data_dir: str | None) -> TextDataset:
    path, _, query = rest.partition('?')
    root = (pathlib.Path(data_dir or '').expanduser() / path).expanduser().absolute()
    options = _read_query(name, query)
    languages = options['src'], options['tgt']
    if not root.is_dir():

        def open_split(split: str) -> Pairs:
            raise UserError(
                f'no such folder: {root} (dataset {name!r} in dataset.data_dir '
                f'{data_dir})'
            )

        return TextDataset(name, str(root), languages, {}, open_split)
    files = tuple(_find_files(root, language) for language in languages)
    splits = _FileSplits(name, languages, files)
    return TextDataset(name, str(root), languages, splits, splits.read)


class _FileSplits(Mapping[str, int]):
    """Pairs of each split, which are counted by reading them."""

    def __init__(
        self,
        name: str,
        languages: tuple[str, str],
        files: tuple[dict[str, pathlib.Path], ...],
    ):
        self._name, self._languages, self._files = name, languages, files
        self._counts: dict[str, int] = {}

    def __getitem__(self, split: str) -> int:
        if split not in self:
            raise KeyError(split)
        if split not in self._counts:
            self.read(split)
        return self._counts[split]

    def __contains__(self, split: object) -> bool:  # without counting
        return any(split in files for files in self._files)

    def __iter__(self) -> Iterator[str]:
        return (split for split in self._files[0] if split in self._files[1])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def read(self, split: str) -> Pairs:
        if split not in self:
            raise unknown(f'split of {self._name}', split, self)
        source, target = (files.get(split) for files in self._files)
        if source is None or target is None:
            there = source or target
            other = self._languages[1 if source else 0]
            raise UserError(
                f'{there} has no translation: beside it there is no {split}.{other} or '
                f'{split}.{other}.gz'
            )
        pairs = Pairs(read_lines(source), read_lines(target))
        if len(pairs.source) != len(pairs.target):
            raise UserError(
                f'{source} has {len(pairs.source):,} lines and {target} '
                f'{len(pairs.target):,}; line i of one must translate line i of the '
                'other'
            )
        if not pairs.source:
            raise UserError(f'split {split!r} of {self._name!r} has no lines')
        self._counts[split] = len(pairs.source)
        return pairs


def _find_files(root: pathlib.Path, language: str) -> dict[str, pathlib.Path]:
    """The file of each split, in the order of their names."""
    files: dict[str, pathlib.Path] = {}
    names = sorted(p.name for p in root.iterdir() if p.name[0] != '.' and p.is_file())
    for file in names:
        split, _, suffix = file.removesuffix('.gz').rpartition('.')
        if suffix != language:
            continue
        if split in files:
            raise UserError(f'{files[split]} is there as {file} too; remove one')
        files[split] = root / file
    if not files:
        raise UserError(
            f'{root} has no file of language {language!r}, such as train.{language} or '
            f'train.{language}.gz; it has: {some(names, 6) or "no files"}'
        )
    return files


def read_lines(path: pathlib.Path) -> list[str]:
    r"""The lines of a text file in UTF-8, of one that ends in '.gz' too.

    A line ends at '\n' or '\r\n' alone: what else Unicode counts as the end of one,
    U+2028 say, stays in it, so that files that correspond line by line do so here.

    Raises:
      UserError: when it cannot be read, is cut or damaged, or is not UTF-8.
    """
    try:
        data = path.read_bytes()
        if path.suffix == '.gz':
            if not data:  # which Python takes for an empty text
                raise EOFError('it has no bytes')
            data = gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f'{path} is cut or damaged: {reason(error)}; copy it there again'
        ) from error
    except OSError as error:
        raise UserError(f'{path} cannot be read: {reason(error)}') from error
    try:
        text = data.decode('utf-8')
    except UnicodeDecodeError as error:
        line = data.count(b'\n', 0, error.start) + 1
        raise UserError(
            f'{path} is not UTF-8: line {line:,} has the byte 0x'
            f'{data[error.start]:02x}; convert it, or take the line out of both files'
        ) from error
    lines = text.removeprefix('\ufeff').split('\n')
    if not lines[-1]:  # behind the last line's end
        lines.pop()
    return [line.removesuffix('\r') for line in lines]


# --- Generated ----------------------------------------------------------------


class Generator(NamedTuple):
    """Makes sentence pairs.

    Attributes:
      make: (split, num_examples, **options) -> (sources, targets).
      languages: of source and target.
      splits: the first one's size is the option num_examples, the others' is fixed.
      eval_examples: that size.
      options: name -> default, whole numbers; 'length' is that of the longest line.
    """

    make: Callable[..., tuple[list[str], list[str]]]
    languages: tuple[str, str]
    splits: tuple[str, ...]
    eval_examples: int
    options: dict[str, int]


_SEQUENCES = (
    ('sequence', 'answer'),
    long_range.SPLITS,
    long_range.EVAL_EXAMPLES,
)
GENERATED = {
    'dates': Generator(
        dates.make_dates, ('en', 'iso'), dates.SPLITS, dates.EVAL_EXAMPLES, {}
    ),
    'copy': Generator(
        long_range.make_copies, *_SEQUENCES, {'length': 64, 'symbols': 10}
    ),
    'recall': Generator(
        long_range.make_recalls, *_SEQUENCES, {'length': 64, 'pairs': 4}
    ),
}


def _generate(name: str, generator: Generator, text: str) -> TextDataset:
    options: dict[str, Any] = {'num_examples': 20_000, **generator.options}
    for option in filter(None, text.split(',')):
        key, _, value = option.partition('=')
        if key not in options:
            raise unknown(f'option of {name.partition(":")[0]}', key, options)
        if not value.isdecimal() or int(value) == 0:
            raise UserError(f'{name!r}: {key} needs a whole number above 0')
        options[key] = int(value)
    train, *others = generator.splits
    splits = dict.fromkeys(others, generator.eval_examples)
    splits = {train: options.pop('num_examples'), **splits}
    # Raises where options do not fit each other.
    example = generator.make(train, 1, **options)

    def open_split(split: str) -> Pairs:
        return Pairs(*generator.make(split, splits.get(split, 0), **options))

    # Of a length that is given all lines are as long.
    longest = max(len(line) for (line,) in example) if 'length' in options else None
    return TextDataset(
        name, 'generated', generator.languages, splits, open_split, longest
    )


# --- TFDS ---------------------------------------------------------------------


def _tfds(name: str, data_dir: str | None) -> TextDataset:
    import tensorflow_datasets as tfds

    bare, _, query = name.partition('?')
    builder = find_builder(bare, data_dir, others=GENERATED)
    features = builder.info.features
    if not isinstance(features, tfds.features.Translation):
        raise UserError(
            f'dataset {bare!r} is not of translations: it needs the features of two '
            f'languages, and has {", ".join(features)}'
        )
    if query:
        options = _read_query(name, query)
        languages = options['src'], options['tgt']
    else:
        source, target = builder.info.supervised_keys or tuple(features)[:2]
        languages = source, target
    for language in languages:
        if language not in features:
            raise unknown(f'language of {bare}', language, features)
    location = str(builder.data_path)
    where = f' --data_dir={data_dir}' if data_dir else ''

    def open_split(split: str) -> Pairs:
        check_split(builder, bare, split, where)
        records = builder.as_data_source(split=split).data_source
        pairs = Pairs([], [])
        with Progress(f'reading {bare}/{split}', len(records), unit='pair') as progress:
            for start in range(0, len(records), _CHUNK):
                places = range(start, min(start + _CHUNK, len(records)))
                with reading(f'{bare}/{split}[{start}:{places.stop}]', location):
                    chunk = records.__getitems__(places)
                    examples = [features.deserialize_example_np(x) for x in chunk]
                    if any(None in example.values() for example in examples):
                        raise RuntimeError('there is no such record')
                for lines, language in zip(pairs, languages):
                    lines += [example[language].decode() for example in examples]
                progress.advance(len(places))
        return pairs

    config, _, _ = builder.info.full_name.rpartition('/')  # without the version
    return TextDataset(
        name=name,
        location=location,
        languages=languages,
        splits=Splits(builder.info.splits) or _PUBLISHED_SPLITS.get(config, {}),
        open=open_split,
    )
