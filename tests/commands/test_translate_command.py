"""`vit_jax translate`, and what the other commands do with a model of sentences."""

import gzip
import io
import json
import os
import shutil
import sys

import pytest

from vit_jax.commands import translate
from vit_jax.main import main

pytest_plugins = ['command_fixtures']

DATES = [
    '--config=configs/dates_transformer.py:smoke',
    '--config.model.kwargs.width=16',
    '--config.model.kwargs.depth=1',
    '--config.text.buckets=(24, 40)',
]


@pytest.fixture(scope='module')
def dates(tmp_path_factory):
    """The workdir of a run that has seen three batches."""
    workdir = tmp_path_factory.mktemp('dates') / 'run'
    assert main(['train', *DATES, f'--workdir={workdir}']) == 0
    return workdir


@pytest.fixture
def stdin(monkeypatch):
    """Gives bytes to the next command."""

    def give(data):
        file = io.TextIOWrapper(io.BytesIO(data))
        monkeypatch.setattr(sys, 'stdin', file)

    return give


def test_lines_in_lines_out(run, dates, tmp_path, stdin, monkeypatch):
    """From a file and from stdin, in chunks of any size."""
    text = '3 May 1998\n\nTuesday, 3rd of March 1998\r\n1.2.2003'
    (tmp_path / 'dates.en').write_text(text)
    code, out, err = run('translate', f'--weights={dates}', tmp_path / 'dates.en')
    assert code == 0
    assert out.count('\n') == 4
    assert out.splitlines()[1] == ''
    assert err.startswith('4 lines in ')
    monkeypatch.setattr(translate, 'CHUNK', 3)
    stdin(text.encode())
    assert run('translate', f'--weights={dates}@latest').out == out


def test_a_beam(run, dates, stdin):
    stdin(b'3 May 1998\n')
    code, out, _ = run(
        'translate', f'--weights={dates}', '--beam=3', '--length_penalty=0', '-'
    )
    assert code == 0
    assert out.count('\n') == 1


def test_a_long_line_is_cut_and_told(run, dates, stdin, monkeypatch, caplog):
    monkeypatch.setattr(translate, 'CHUNK', 2)
    stdin(b'3 May 1998\n4 May\n' + b'3' * 5000 + b'\n5 May\n')
    code, out, _ = run('translate', f'--weights={dates}')
    assert code == 0
    assert out.count('\n') == 4
    (message,) = caplog.messages
    assert message.startswith('line 3 has 5001 tokens; what follows the first 39 is')


def test_lines_before_one_that_is_not_utf8_are_not_lost(run, dates, stdin, monkeypatch):
    monkeypatch.setattr(translate, 'CHUNK', 3)
    stdin(b'3 May 1998\n\n' * 2 + b'\xff\n4 May 1998\n')
    code, out, err = run('translate', f'--weights={dates}')
    assert code == 1
    assert out.count('\n') == 4
    assert 'stdin:5 is not UTF-8' in err


def test_what_is_no_regular_file_is_read_too(run, dates):
    """As `vit_jax translate <(zcat FILE)` has it."""
    reader, writer = os.pipe()
    with os.fdopen(writer, 'wb') as file:
        file.write(b'\n\n')
    with os.fdopen(reader):
        code, out, _ = run('translate', f'--weights={dates}', f'/dev/fd/{reader}')
    assert (code, out) == (0, '\n\n')


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('no', 'no such file: {}'),
        ('folder', '{} is a folder; name a file'),
        ('text.gz', '{0} is compressed; `zcat {0} | vit_jax translate ...`'),
    ],
)
def test_files_that_are_no_lines(fails, tmp_path, name, message):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'text.gz').write_bytes(gzip.compress(b'a\n'))
    path = tmp_path / name
    assert fails('translate', '--weights=/none', path) == message.format(path)


def test_a_closed_stdin_is_told(fails, monkeypatch):
    monkeypatch.setattr(sys, 'stdin', None)
    assert fails('translate', '--weights=/none') == 'stdin is closed; name a FILE'


def test_mistakes(fails, dates, digits, tmp_path, stdin):
    weights = f'--weights={dates}'
    stdin('grün\n'.encode('latin-1'))
    assert fails('translate', weights).startswith('stdin:1 is not UTF-8')
    (tmp_path / 'text').write_text('a\n')
    line = fails('translate', f'--weights={digits}', tmp_path / 'text')
    assert line.startswith(f'{digits} does not say that it is of a model of sentences')
    line = fails('translate', f'--weights={tmp_path / "none"}', tmp_path / 'text')
    assert 'none' in line
    assert fails('translate', weights, '--bean=3').endswith('did you mean --beam?')
    line = fails('translate', weights, '--length_penalty=1')
    assert line == '--length_penalty is of beam search; give --beam too'


@pytest.mark.parametrize('penalty', ['11', '-1', 'nan', 'x'])
def test_a_length_penalty_that_is_none(run, penalty):
    code, _, err = run('translate', '--weights=x', f'--length_penalty={penalty}')
    assert code == 2
    assert f"--length_penalty: a number from 0 to 10, not '{penalty}'" in err


def test_weights_without_their_tokenizer(fails, dates, tmp_path):
    copy = tmp_path / 'copy'
    shutil.copytree(dates, copy)
    (copy / 'tokenizer.model').unlink()
    (tmp_path / 'text').write_text('a\n')
    line = fails('translate', f'--weights={copy}', tmp_path / 'text')
    assert line.startswith(f'{copy}/tokenizer.model cannot be read: No such file')


def test_evaluate(run, dates):
    code, out, _ = run('evaluate', f'--workdir={dates}', '--config.text.score=bleu')
    assert code == 0
    result = json.loads(out)
    assert result['examples'] == 64
    assert {'loss', 'perplexity', 'bleu', 'bleu_lower_case'} <= set(result)
    assert result['signature'].startswith('nrefs:1|case:mixed|')


def test_check_data(run):
    code, out, _ = run('check_data', *DATES)
    assert code == 0
    assert 'split train: 64 examples' in out
    assert out.count('padding; the first pair: ') == 2


def test_what_is_for_images_says_so(fails, dates, make_image, tmp_path):
    image = make_image('a.png', 8, 8)
    line = fails('predict', f'--weights={dates}', image)
    assert line.startswith(f'{dates} is of a model of sentences; `vit_jax translate`')
    assert 'images' in fails('evaluate', f'--workdir={dates}', '--probe=knn')
    assert 'translate' in fails('export', dates, tmp_path / 'out')
    assert 'not converted' in fails('convert', dates, tmp_path / 'out')


def test_benchmark(run, fails):
    code, out, _ = run('benchmark', 'train', *DATES, '--steps=2', '--json')
    assert code == 0
    assert json.loads(out)['batch']['tokens_per_second'] > 0
    line = fails('benchmark', 'train', *DATES, '--data')
    assert line.startswith('batches of text differ in shape')
