import collections

import numpy as np
import pytest

from vit_jax.data.buckets import Plan, encode_pairs, make_buckets
from vit_jax.data.long_range import (
    KEYS,
    SPLITS,
    SYMBOLS,
    VALUES,
    make_copies,
    make_recalls,
    pair_of,
)
from vit_jax.data.text import load_text
from vit_jax.data.tokenizer import Tokenizer, train_tokenizer
from vit_jax.errors import UserError


def find_pairs(source):
    """Key -> (value, place)."""
    found = [(place, *divmod(ord(c) - 0x2801, 10)) for place, c in enumerate(source)]
    return {
        KEYS[key]: (VALUES[value], place) for place, key, value in found if key >= 0
    }


def test_copies_are_of_all_symbols_at_equal_distances():
    sources, targets = make_copies('train', 2000, length=17, symbols=5)
    for source, target in zip(sources, targets):
        assert source.replace('.', '') == target
        places = [place for place, symbol in enumerate(source) if symbol != '.']
        assert places == [0, 3, 6, 10, 13]
        assert len(source) == 17
    for column in zip(*targets):
        counts = collections.Counter(column)
        assert set(counts) == set(SYMBOLS)
        assert 130 < min(counts.values()) <= max(counts.values()) < 270  # of 200
    (source,), (target,) = make_copies('test', 1, length=7, symbols=7)
    assert source == target


@pytest.mark.parametrize(('length', 'pairs'), [(16, 4), (61, 3), (1, 1), (11, 8)])
def test_recall_asks_for_the_values_of_its_pairs(length, pairs):
    sources, targets = make_recalls('train', 200, length=length, pairs=pairs)
    for source, target in zip(sources, targets):
        assert len(source) == length
        found = find_pairs(source)
        assert len(found) == pairs
        assert {key: value for key, (value, _) in found.items()} == dict(
            zip(target[::2], target[1::2], strict=True)
        )
        assert source.count('.') == length - pairs
        for key, (value, place) in found.items():
            assert pair_of(key, value) == source[place]


def test_every_place_key_and_value_is_asked_for_first_equally_often():
    sources, targets = make_recalls('train', 7000, length=13)
    asked = [
        (target[0], *find_pairs(source)[target[0]])
        for source, target in zip(sources, targets)
    ]
    keys, values, places = (collections.Counter(column) for column in zip(*asked))
    assert set(places) == set(range(13))
    assert set(keys) == set(KEYS)
    assert set(values) == set(VALUES)
    for counts in (keys, values, places):
        mean = 7000 / len(counts)
        bound = 4 * mean**0.5
        assert all(abs(count - mean) < bound for count in counts.values())


@pytest.mark.parametrize('make', [make_copies, make_recalls])
def test_example_is_a_function_of_split_and_index(make):
    many, few = make('train', 50, length=16), make('train', 20, length=16)
    assert few == tuple(lines[:20] for lines in many)
    assert make('train', 0, length=16) == ([], [])


@pytest.mark.parametrize('make', [make_copies, make_recalls])
def test_splits_have_no_source_in_common(make):
    sources = [make(split, 5000, length=16)[0] for split in SPLITS]
    assert len({source for lines in sources for source in lines}) == 15_000


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('copy:length=x', "'copy:length=x': length needs a whole number above 0"),
        ('copy:lenght=8', "option of copy 'lenght'; did you mean 'length'"),
        ('copy:pairs=3', "option of copy 'pairs'"),
        ('copy:length=9', 'length 9 with 10 symbols: there is no room for them'),
        ('recall:length=3', 'length 3 with 4 pairs: .* room for them'),
        ('recall:length=64,pairs=9', 'with 9 pairs: there can be at most 8'),
        ('recall:distance=3', "option of recall 'distance'"),
    ],
)
def test_names_that_do_not_fit(name, message):
    with pytest.raises(UserError, match=message) as caught:
        load_text(name)
    assert '\n' not in str(caught.value)


def test_splits_that_there_are_not():
    with pytest.raises(UserError, match=r"'tset'; did you mean 'test'"):
        load_text('copy:length=16').open('tset')


@pytest.mark.parametrize('name', ['copy:length=16', 'recall:length=16'])
def test_a_symbol_is_a_token(name):
    dataset = load_text(f'{name},num_examples=300')
    assert dataset.splits == {'train': 300, 'validation': 1000, 'test': 1000}
    assert dataset.longest == 16 == load_text('recall:length=9,pairs=8').longest
    pairs = dataset.open('train')
    tokenizer = Tokenizer(train_tokenizer(pairs.source, vocab_size=128, kind='char'))
    encoded = encode_pairs(dataset.open('test'), tokenizer)
    # SentencePiece begins a line with a token of its own.
    np.testing.assert_array_equal(np.diff(encoded.source_offsets), np.full(1000, 17))
    plan = Plan(encoded.lengths, make_buckets((18,), 180, 1), seed=0)
    assert plan.too_long == 0
    assert tokenizer.decode(tokenizer.encode(pairs.source)) == pairs.source
