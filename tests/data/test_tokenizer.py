import pickle
import subprocess
import sys

import numpy as np
import pytest

from vit_jax.data.dates import make_dates
from vit_jax.data.tokenizer import (
    BOS,
    EOS,
    KINDS,
    PAD,
    UNK,
    Tokenizer,
    train_tokenizer,
)
from vit_jax.errors import UserError

# 64 words whose parts recur, with umlauts and an emoji.
WORDS = [a + b for a in ('über', 'unter', 'vor', 'nach') for b in ('gehen', 'laufen')]
WORDS += [f'{a}{b}ß' for a in 'kmntr' for b in ('ä', 'ö', 'ü', 'o', 'au', 'ei')]
LINES = [
    f'{WORDS[i % 38]} {WORDS[i * 7 % 38]} {WORDS[i * 11 % 38]} 😀' for i in range(400)
]


@pytest.fixture(scope='module', params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope='module')
def small(kind):
    """Knows the characters of LINES alone."""
    return Tokenizer(train_tokenizer(LINES, 36, kind))


@pytest.fixture(scope='module')
def large():
    """Spells in bytes what it does not know."""
    source, target = make_dates('train', 4000)
    return Tokenizer(train_tokenizer([*source, *target, *LINES], 1024))


def test_round_trips(small):
    lines = ['', 'übergehen köß', 'vor nach', '😀', '']
    encoded = small.encode(lines)
    assert [ids.dtype for ids in encoded] == [np.int32] * 5
    assert [ids.ndim for ids in encoded] == [1] * 5
    assert encoded[0].size == encoded[4].size == 0
    assert small.decode(encoded) == lines
    for ids in encoded:
        assert not set(ids.tolist()) & {PAD, BOS, EOS, UNK}


def test_many_lines_at_once_are_as_one_by_one(small):
    together = small.encode(LINES * 3)  # several threads
    for line, ids in zip(LINES, together):
        np.testing.assert_array_equal(small.encode([line])[0], ids)
    assert small.decode(together) == LINES * 3
    assert small.encode([]) == small.decode([]) == []


def test_training_is_deterministic(kind):
    assert train_tokenizer(LINES, 36, kind) == train_tokenizer(iter(LINES), 36, kind)
    assert train_tokenizer(LINES, 36, kind) != train_tokenizer(LINES[:200], 36, kind)


def test_first_lines_alone_are_learned_from():
    model = train_tokenizer([*LINES, 'zzzz'], 36, 'char', max_lines=len(LINES))
    assert model == train_tokenizer(LINES, 36, 'char')


def test_vocabulary_is_as_large_as_asked_for():
    for kind in ('unigram', 'bpe'):
        assert Tokenizer(train_tokenizer(LINES, 36, kind)).vocab_size == 36
    characters = set(''.join(LINES)) - {' '} | {'▁'}
    char = Tokenizer(train_tokenizer(LINES, 1000, 'char'))
    assert char.vocab_size == 4 + len(characters)


def test_unknown_characters(small, large):
    """A large vocabulary loses none; a small one shows where they were."""
    line = '猫 übergehen 🦨'
    (ids,) = large.encode([line])
    assert UNK not in ids
    assert large.decode([ids]) == [line]
    (ids,) = small.encode([line])
    assert (ids == UNK).sum() == 2
    assert small.decode([ids])[0].split() == ['⁇', 'übergehen', '⁇']


def test_rare_characters_of_the_training_text_are_known():
    lines = [*LINES, *LINES, 'ñ']  # one in 20,000
    for size in (36, 1000):
        model = Tokenizer(train_tokenizer(lines, size, 'char'))
        assert UNK not in model.encode(['ñ'])[0]


def test_text_is_normalised(large):
    lines = ['  zwei\u2003 Leer\tzeichen ', 'ﬁn ２', 'u\u0308ber', 'a\x01b\u200bc']
    decoded = large.decode(large.encode(lines))
    assert decoded == ['zwei Leer zeichen', 'fin 2', 'über', 'ab c']


def test_decoding_ends_at_eos(small):
    (ids,) = small.encode(['übergehen'])
    row = np.array([BOS, *ids, EOS, *ids, PAD, PAD], np.int32)
    assert small.decode([row]) == ['übergehen']
    assert small.decode([row[1:-2], np.array([PAD, *ids, PAD])]) == ['übergehen'] * 2
    assert small.decode([np.array([EOS]), np.array([PAD, PAD]), []]) == [''] * 3
    assert small.decode(np.stack([row, row])) == ['übergehen'] * 2


def test_pieces_make_up_the_line(small):
    (ids,) = small.encode(['übergehen vorlaufen'])
    pieces = small.pieces(ids)
    assert len(pieces) == len(ids)
    assert ''.join(pieces) == '▁übergehen▁vorlaufen'
    special = np.array([PAD, BOS, EOS, UNK, small.vocab_size, -1])
    names = ['<pad>', '<s>', '</s>', '<unk>', '<unk>', '<unk>']
    assert small.pieces(special) == names


@pytest.mark.parametrize('wrong', [-1, 36, 10**9])
def test_ids_out_of_range(wrong):
    tokenizer = Tokenizer(train_tokenizer(LINES, 36))
    with pytest.raises(UserError, match=rf'token {wrong} is not .* ids are 0 to 35'):
        tokenizer.decode([np.array([5, 7]), np.array([8, wrong])])
    # Behind the end nothing is read.
    assert tokenizer.decode([np.array([EOS, wrong])]) == ['']


def test_pickles(small):
    again = pickle.loads(pickle.dumps(small))
    assert again.model == small.model
    assert again.decode(small.encode(LINES)) == LINES


@pytest.mark.parametrize('size', [0, 1, 100, -50])
def test_damaged_models(size):
    model = train_tokenizer(LINES, 36)[:size]
    message = f'tokenizer of {len(model):,} bytes is damaged'
    with pytest.raises(UserError, match=message):
        Tokenizer(model)


def test_models_with_other_special_tokens():
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, vocab_size=36, minloglevel=2
    )
    with pytest.raises(UserError, match=r'ids \(-1, 1, 2, 0\) .* must be \(0, 1, 2, 3'):
        Tokenizer(model.getvalue())


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        ((LINES, 36, 'word'), "unknown kind of tokenizer 'word'; choose one of: bpe, "),
        ((LINES, 36, 'unigrm'), "did you mean 'unigram'"),
        ((LINES, 4), r'config\.text\.vocab_size must be at least 5, not 4'),
        ((LINES, 10), r'vocab_size 10 is too small .* must be at least 2\d$'),
        ((LINES, 10, 'bpe'), r'vocab_size 10 is too small .* must be at least 2\d$'),
        ((LINES, 10, 'char'), r'vocab_size 10 is too small .* must be at least 2\d$'),
        ((LINES, 1000), r'vocab_size 1000 is more than .* can be at most \d+$'),
        ((LINES, 9000, 'bpe'), r'vocab_size 9000 is more than .* can be at most \d+$'),
        (([], 36), 'there is no text to train a tokenizer on'),
        ((['', ''], 36), 'there is no text to train a tokenizer on'),
        ((['a\ud800'], 36), 'a line is no Unicode text'),
    ],
)
def test_training_that_cannot_be(args, message):
    with pytest.raises(UserError, match=message) as caught:
        train_tokenizer(*args)
    assert '\n' not in str(caught.value)


def test_limits_that_are_told_are_the_limits(kind):
    """Training works at the limit that the error names, and not one beside it."""
    with pytest.raises(UserError, match='too small') as caught:
        train_tokenizer(LINES, 10, kind)
    smallest = int(str(caught.value).split()[-1])
    assert Tokenizer(train_tokenizer(LINES, smallest, kind)).vocab_size == smallest
    with pytest.raises(UserError, match='too small'):
        train_tokenizer(LINES, smallest - 1, kind)
    if kind == 'char':
        return
    with pytest.raises(UserError, match='more than the training text') as caught:
        train_tokenizer(LINES, 1000, kind)
    largest = int(str(caught.value).split()[-1])
    assert Tokenizer(train_tokenizer(LINES, largest, kind)).vocab_size == largest


def test_lines_that_are_no_text(small):
    with pytest.raises(UserError, match='a line is no Unicode text'):
        small.encode(['a', '\ud800'])


def test_sentencepiece_is_quiet_and_asked_for(tmp_path):
    program = (
        'import sys\n'
        'from vit_jax.data.tokenizer import Tokenizer, train_tokenizer\n'
        'from vit_jax.errors import UserError\n'
        'assert "sentencepiece" not in sys.modules\n'
        'Tokenizer(train_tokenizer(["a dog barks"] * 9, 13)).encode(["dog"])\n'
        'for size in (5, 1000):\n'
        '    try: train_tokenizer(["a dog barks"], size)\n'
        '    except UserError: continue\n'
        '    raise SystemExit(3)\n'
        'assert "tensorflow" not in sys.modules\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', program], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


def test_missing_sentencepiece(monkeypatch):
    monkeypatch.setitem(sys.modules, 'sentencepiece', None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[text\]'"):
        train_tokenizer(LINES, 36)
    with pytest.raises(UserError, match=r"pip install -e '\.\[text\]'"):
        Tokenizer(b'')
