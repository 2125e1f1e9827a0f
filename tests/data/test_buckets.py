import itertools
import logging
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_jax.data.buckets import (
    Bucket,
    Encoded,
    Plan,
    decoding_buckets,
    encode_pairs,
    evaluation_batches,
    make_buckets,
    training_batches,
)
from vit_jax.data.input_pipeline import Shard
from vit_jax.data.text import Pairs
from vit_jax.data.tokenizer import EOS, PAD, Tokenizer, train_tokenizer
from vit_jax.errors import UserError

WHOLE = Shard()
BUCKETS = (Bucket(4, 12), Bucket(7, 6), Bucket(11, 6), Bucket(13, 6))


def make_encoded(sizes):
    """Pairs of given sizes; each token tells its pair, its side and its place."""
    flat = []
    for side in (0, 1):
        sentences = [
            1000 * (i + 1) + 100 * side + np.arange(size[side])
            for i, size in enumerate(sizes)
        ]
        flat.append(np.concatenate([*sentences, []]).astype(np.int32))
        flat.append(np.cumsum([0, *(size[side] for size in sizes)]))
    return Encoded(*flat)


def expect_row(example, side, size, length):
    """A row written down token by token."""
    tokens = [1000 * (example + 1) + 100 * side + j for j in range(size)]
    tokens = [*tokens[: length - 1], EOS]
    return tokens + [PAD] * (length - len(tokens))


# 61 pairs of 0 to 10 tokens: those of length 11 fit with their EOS; none needs 13.
SIZES = [(i * 7 % 11, i * 5 % 9) for i in range(61)]
ENCODED = make_encoded(SIZES)


def make_plan(seed=3, lengths=ENCODED.lengths, buckets=BUCKETS):
    return Plan(lengths, buckets, seed)


def train(count, start=0, shard=WHOLE, plan=None):
    batches = training_batches(ENCODED, plan or make_plan(), start=start, shard=shard)
    with closing(batches):
        return list(itertools.islice(batches, count))


def evaluate(encoded=ENCODED, buckets=BUCKETS, shard=WHOLE):
    with closing(evaluation_batches(encoded, buckets, shard=shard)) as batches:
        return list(batches)


def assert_same(batches, others):
    assert len(batches) == len(others)
    for one, other in zip(batches, others):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


# --- Encoded pairs ----------------------------------------------------------------


def test_encoded_pairs(monkeypatch):
    lines = ['ab', '', 'abba', 'b']
    pairs = Pairs(lines, ['b', 'a', '', 'bab'])
    tokenizer = Tokenizer(train_tokenizer(lines, 30, 'char'))
    encoded = encode_pairs(pairs, tokenizer)
    assert len(encoded) == 4
    assert (encoded.source.dtype, encoded.source_offsets.dtype) == (np.int32, np.int64)
    for lines, flat, offsets in (
        (pairs.source, encoded.source, encoded.source_offsets),
        (pairs.target, encoded.target, encoded.target_offsets),
    ):
        ids = [flat[a:b] for a, b in itertools.pairwise(offsets)]
        assert tokenizer.decode(ids) == lines
    # SentencePiece begins each line with a space, a token here; then there is EOS.
    assert encoded.lengths.tolist() == [4, 3, 6, 5]
    monkeypatch.setattr('vit_jax.data.buckets._LINES', 3)
    again = encode_pairs(pairs, tokenizer)
    for name in ('source', 'source_offsets', 'target', 'target_offsets'):
        np.testing.assert_array_equal(getattr(again, name), getattr(encoded, name))
    assert len(encode_pairs(Pairs([], []), tokenizer)) == 0


# --- Buckets ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ('lengths', 'tokens', 'multiple', 'rows', 'padding'),
    [
        ((16, 32, 64, 128), 4096, 8, [256, 128, 64, 32], [0, 0, 0, 0]),
        ((5, 7, 11), 100, 3, [21, 15, 9], [1, 1, 0]),  # 20, 14 and 9 fit
        ((13,), 13, 1, [1], [0]),
        ((13,), 26, 2, [2], [0]),
        ((13,), 13, 8, [8], [7]),
    ],
)
def test_examples_fill_the_budget(lengths, tokens, multiple, rows, padding):
    buckets = make_buckets(lengths, tokens, multiple)
    assert buckets == tuple(map(Bucket, lengths, rows, padding))


def test_examples_of_a_batch_do_not_depend_on_the_devices():
    lengths = np.random.default_rng(0).integers(2, 14, 97)
    plans = [Plan(lengths, make_buckets((5, 13), 40, n), seed=3) for n in (1, 3, 8)]
    for index in range(plans[0].batches_per_epoch):
        first, *others = (plan.batch_at(index)[1].tolist() for plan in plans)
        assert others == [first, first]


@pytest.mark.parametrize(('lengths', 'tokens'), [((5, 13), 12), ([13], 11)])
def test_budgets_that_are_too_small(lengths, tokens):
    with pytest.raises(
        UserError, match=r'text\.tokens_per_batch .* no room for 13 tokens'
    ) as told:
        make_buckets(lengths, tokens, 3)
    assert 'config.text.buckets' in str(told.value)
    assert '\n' not in str(told.value)
    assert make_buckets(lengths, 13, 3)[-1] == Bucket(13, 3, 2)


@pytest.mark.parametrize(
    'lengths', [(), (16, 8), (8, 8), (1, 8), (0,), ('a', 'b'), (2.5, 4)]
)
def test_lengths_that_do_not_fit(lengths):
    with pytest.raises(UserError, match=r'config\.text\.buckets must be ascending'):
        make_buckets(lengths, 4096, 1)


@pytest.mark.parametrize(
    ('beam', 'multiple', 'rows', 'padding'),
    [
        (1, 1, [11, 4, 1], [0, 0, 0]),  # 13 of 11 that have room, 3, none
        (3, 1, [3, 2, 1], [0, 0, 0]),
        (1, 8, [16, 8, 8], [5, 4, 7]),
        (50, 2, [2, 2, 2], [1, 1, 1]),  # more hypotheses than there is room for
    ],
)
def test_buckets_to_decode_hold_what_there_is(beam, multiple, rows, padding):
    buckets = make_buckets((5, 7, 11), 55, multiple=8)
    lengths = np.array([5] * 7 + [2] * 6 + [6, 7, 7])
    found = decoding_buckets(buckets, lengths, beam=beam, multiple=multiple)
    assert found == tuple(map(Bucket, (5, 7, 11), rows, padding))
    # What is too long will be cut, and belongs to the last bucket.
    *_, last = decoding_buckets(buckets, np.array([13, 99]), beam=1, multiple=1)
    assert last == Bucket(11, 2)


# --- Plan -------------------------------------------------------------------------


def test_plan_says_what_it_will_be():
    plan = make_plan()
    assert plan.used == BUCKETS[:3]
    assert (plan.too_long, plan.num_examples) == (0, 61)
    fits = [sum(max(size) + 1 in r for size in SIZES) for r in _ranges(BUCKETS[:3])]
    assert plan.batches_per_epoch == sum(
        -(-n // bucket.rows) for n, bucket in zip(fits, BUCKETS)
    )


def _ranges(buckets):
    ends = [0, *(bucket.length for bucket in buckets)]
    return [range(a + 1, b + 1) for a, b in itertools.pairwise(ends)]


def epoch_of(plan, epoch):
    per_epoch = plan.batches_per_epoch
    return [plan.batch_at(i) for i in range(epoch * per_epoch, (epoch + 1) * per_epoch)]


def test_epochs_are_permutations_that_differ():
    plan = make_plan()
    epochs = [epoch_of(plan, epoch) for epoch in (0, 1, 2, 10**6)]
    flat = [np.concatenate([x for _, x in epoch]).tolist() for epoch in epochs]
    for order in flat:
        assert sorted(order) == list(range(61))
    assert len(set(map(tuple, flat))) == 4
    # So do the orders of shapes, and the members of the batches.
    assert len({tuple(b for b, _ in epoch) for epoch in epochs}) == 4
    whole = [{frozenset(x.tolist()) for _, x in epoch} for epoch in epochs]
    assert all(a != b for a, b in itertools.combinations(whole, 2))


def test_plan_is_a_function_of_its_seed():
    one, same, other = (epoch_of(make_plan(seed), 0) for seed in (3, 3, 4))
    for a, b in zip(one, same):
        assert a[0] == b[0]
        np.testing.assert_array_equal(a[1], b[1])
    assert [bucket for bucket, _ in one] != [bucket for bucket, _ in other]
    members = [{frozenset(x.tolist()) for _, x in epoch} for epoch in (one, other)]
    assert members[0] != members[1]
    for seed in (-1, 2**64 - 1, 0):
        assert len(epoch_of(make_plan(seed), 0)) == len(one)


def test_orders_of_buckets_do_not_go_together():
    """Two buckets with as many members are not shuffled alike."""
    lengths = np.repeat([4, 7], 50)
    plan = Plan(lengths, (Bucket(4, 50), Bucket(7, 50)), seed=0)
    (_, one), (_, other) = sorted(epoch_of(plan, 0), key=lambda batch: batch[1].min())
    assert (one % 50).tolist() != (other % 50).tolist()


def test_examples_before():
    plan = make_plan()
    seen = 0
    for index in range(3 * plan.batches_per_epoch):
        assert plan.examples_before(index) == seen
        seen += len(plan.batch_at(index)[1])
    assert plan.examples_before(10**6 * plan.batches_per_epoch) == 61 * 10**6


def test_plan_survives_pickling_and_threads():
    plan = make_plan()
    expected = [plan.batch_at(i)[1].tolist() for i in range(200)]
    again = pickle.loads(pickle.dumps(plan))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: again.batch_at(i)[1].tolist(), range(200)))
    assert found == expected


def test_examples_that_are_too_long_are_left_out():
    plan = make_plan(buckets=BUCKETS[:2])
    short = {i for i, size in enumerate(SIZES) if max(size) + 1 <= 7}
    assert plan.too_long == 61 - len(short) > 0
    assert plan.num_examples == len(short)
    found = np.concatenate([x for _, x in epoch_of(plan, 5)])
    assert sorted(found) == sorted(short)


def test_nothing_to_train_on():
    with pytest.raises(UserError, match=r'all 3 .*buckets, 13 .* has 14'):
        Plan(np.array([20, 14, 15]), BUCKETS, 0)
    with pytest.raises(UserError, match='the training split has no examples'):
        Plan(np.array([], np.int64), BUCKETS, 0)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=80),
    ends=st.sets(st.integers(2, 40), min_size=1, max_size=5),
    tokens=st.integers(0, 200),
    multiple=st.integers(1, 4),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 10**9),
)
def test_every_plan(lengths, ends, tokens, multiple, seed, epoch):
    ends, tokens = sorted(ends), tokens + multiple * max(ends)
    buckets = make_buckets(ends, tokens, multiple)
    for bucket in buckets:
        assert bucket.rows % multiple == 0 < bucket.rows
        assert 0 <= bucket.padding < multiple
        assert bucket.examples * bucket.length <= tokens
        assert (bucket.examples + 1) * bucket.length > tokens
    fitting = [i for i, length in enumerate(lengths) if length <= ends[-1]]
    if not fitting:
        with pytest.raises(UserError, match='are longer than the longest'):
            Plan(np.array(lengths), buckets, seed)
        return
    plan = Plan(np.array(lengths), buckets, seed)
    batches = epoch_of(plan, epoch)
    assert sorted(np.concatenate([x for _, x in batches])) == fitting
    assert {bucket for bucket, _ in batches} == set(plan.used)
    for bucket, examples in batches:
        assert 0 < len(examples) <= bucket.examples
        for i in examples:  # in the shortest that fits
            assert bucket.length == min(end for end in ends if end >= lengths[i])
    partly = [bucket for bucket, examples in batches if len(examples) < bucket.examples]
    assert len(partly) == len(set(partly))  # at most one batch of each


# --- Batches to train on ------------------------------------------------------------


def test_an_epoch_shows_every_example_once():
    plan = make_plan()
    seen = []
    for index, batch in enumerate(train(2 * plan.batches_per_epoch)):
        bucket, examples = plan.batch_at(index)
        assert batch.keys() == {'source', 'target'}
        for side, key in enumerate(('source', 'target')):
            assert batch[key].shape == (bucket.rows, bucket.length)
            assert batch[key].dtype == np.int32
            for row, i in zip(batch[key], examples):
                assert row.tolist() == expect_row(
                    i, side, SIZES[i][side], bucket.length
                )
            assert (batch[key][len(examples) :] == PAD).all()
        seen += examples.tolist()
    assert sorted(seen) == sorted([*range(61), *range(61)])


@pytest.mark.parametrize('start', [1, 4, 13, 100])
def test_starting_later_gives_the_batches_of_an_uninterrupted_run(start):
    assert_same(train(9, start=start), train(start + 9)[start:])


@pytest.mark.parametrize('count', [1, 2, 3])
def test_shards_are_rows_of_the_global_batch(count):
    parts = [train(20, 7, Shard(i, count)) for i in range(count)]
    joined = [
        {key: np.concatenate([part[key] for part in local]) for key in local[0]}
        for local in zip(*parts)
    ]
    assert_same(joined, train(20, 7))


def test_shapes_are_those_of_the_used_buckets():
    plan = make_plan()
    shapes = {batch['source'].shape for batch in train(3 * plan.batches_per_epoch)}
    assert shapes == {(bucket.rows, bucket.length) for bucket in plan.used}
    assert len(shapes) == 3


def test_rows_that_processes_cannot_share():
    for buckets in ((Bucket(11, 6),), (Bucket(7, 8), Bucket(11, 6))):
        plan = make_plan(buckets=buckets)
        with pytest.raises(UserError, match=r'the 6 rows of 11 .* by 4 processes'):
            training_batches(ENCODED, plan, start=0, shard=Shard(0, 4))
        with pytest.raises(UserError, match=r'the 6 rows of 11 .* by 4 processes'):
            evaluation_batches(ENCODED, buckets, shard=Shard(0, 4))


@pytest.mark.parametrize('count', [0, 1])
def test_closing_ends_the_threads(count):
    before = set(threading.enumerate())
    batches = training_batches(ENCODED, make_plan(), start=0, shard=WHOLE)
    list(itertools.islice(batches, count))
    started = set(threading.enumerate()) - before
    assert started
    batches.close()
    for thread in started:  # those that read may be told, and end a moment later
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_buckets_pad_less_than_one_of_the_longest():
    """Of lengths as those of Multi30k: 8 to 60 tokens, half of them below 16."""
    lengths = np.clip(np.random.default_rng(0).lognormal(2.75, 0.35, 5000), 5, 60)
    shares = {}
    for ends in ((16, 32, 64), (64,)):
        plan = Plan(np.ceil(lengths).astype(int), make_buckets(ends, 4096, 8), 0)
        batches = epoch_of(plan, 0)
        places = sum(bucket.rows * bucket.length for bucket, _ in batches)
        shares[len(ends)] = 1 - np.ceil(lengths).sum() / places
    assert shares[3] < 0.35
    assert shares[1] > 0.7


# --- Batches to evaluate on -----------------------------------------------------------


def test_evaluation_shows_every_example_once_in_order(caplog):
    batches = evaluate()
    assert not caplog.records
    order = []
    for batch in batches:
        rows, length = batch['source'].shape
        assert Bucket(length, rows) in BUCKETS
        assert batch['index'].dtype == batch['target'].dtype == np.int32
        for row, i in enumerate(batch['index']):
            for side, key in enumerate(('source', 'target')):
                expected = [PAD] * length
                if i >= 0:
                    expected = expect_row(i, side, SIZES[i][side], length)
                assert batch[key][row].tolist() == expected
        real = batch['index'][batch['index'] >= 0].tolist()
        assert batch['index'][len(real) :].tolist() == [-1] * (rows - len(real))
        order.append((length, real))
    assert sorted(i for _, real in order for i in real) == list(range(61))
    lengths = [length for length, _ in order]
    assert lengths == sorted(lengths)
    for length in set(lengths):
        members = [i for other, real in order if other == length for i in real]
        assert members == sorted(members)


def test_long_examples_are_cut_and_their_number_is_told_once(caplog):
    encoded = make_encoded([(3, 9), (6, 6), (7, 2), (30, 30)])
    with caplog.at_level(logging.WARNING):
        batches = evaluate(encoded, BUCKETS[:2])
    (record,) = caplog.records
    assert record.getMessage().startswith(
        '3 of 4 sentence pairs to evaluate on are longer than 7 tokens'
    )
    (batch,) = batches
    assert batch['index'].tolist() == [0, 1, 2, 3, -1, -1]
    assert batch['source'][2].tolist() == [*range(3000, 3006), EOS]
    assert batch['target'][2].tolist() == [3100, 3101, EOS, *[PAD] * 4]
    assert batch['target'][0].tolist() == [*range(1100, 1106), EOS]
    assert batch['source'][1].tolist() == [*range(2000, 2006), EOS]  # not cut


@pytest.mark.parametrize('count', [2, 3])
def test_shards_to_evaluate_on(count):
    parts = [evaluate(shard=Shard(i, count)) for i in range(count)]
    joined = [
        {key: np.concatenate([part[key] for part in local]) for key in local[0]}
        for local in zip(*parts)
    ]
    assert_same(joined, evaluate())


def test_nothing_to_evaluate_on():
    with pytest.raises(UserError, match='the evaluation split has no examples'):
        evaluate(make_encoded([]))


def test_empty_sentences():
    (batch,) = evaluate(make_encoded([(0, 0)]), BUCKETS[:1])
    assert batch['source'][0].tolist() == [EOS, PAD, PAD, PAD]
