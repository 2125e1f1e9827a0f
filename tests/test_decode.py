"""Greedy and beam search, against all sequences and against loops over lists."""

import itertools
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit_jax.axes import ROW_AXES
from vit_jax.decode import beam_search, greedy
from vit_jax.errors import UserError

PAD, EOS = 0, 1
B, V, L = 3, 5, 4


class Toy:
    """Logits of the next token that depend on the example and on its whole prefix.

    The cache holds the prefix, as a hash and in full, and what is the example's own.
    """

    def __init__(self, seed=0, batch=B, vocabulary=V, eos=0.0, scale=2.0):
        rng = np.random.default_rng(seed)
        self.table = np.float32(scale * rng.normal(size=(97, vocabulary)))
        self.table[:, EOS] += eos
        self.example = np.arange(batch, dtype=np.int32) * 29 + seed

    def cache(self):
        rows = {'hash': jnp.zeros_like(self.example), 'index': jnp.int32(0)}
        prefix = jnp.zeros((len(self.example), 11), jnp.int32)
        source = {'key': jnp.asarray(self.example)[:, None, None]}
        return {'own': (rows, prefix), 'source': source}

    def start(self):
        return jnp.asarray(self.table[self.example % 97])

    def step(self, tokens, cache):
        rows, prefix = cache['own']
        hashed = rows['hash'] * 7 + tokens + 3
        prefix = prefix.at[:, rows['index']].set(tokens)
        # Told apart from the hash: both must follow their hypothesis.
        place = (hashed + prefix.sum(axis=1) + cache['source']['key'][:, 0, 0]) % 97
        own = {'hash': hashed, 'index': rows['index'] + 1}, prefix
        return jnp.asarray(self.table)[place], {**cache, 'own': own}

    def log_probs(self, b, prefix):
        """In plain Python: of the next token of example `b`."""
        hashed = 0
        for token in prefix:
            hashed = hashed * 7 + token + 3
        logits = np.float64(self.table[(hashed + sum(prefix) + self.example[b]) % 97])
        return logits - np.log(np.exp(logits).sum())


def score(log_prob, length, penalty):
    return log_prob / ((5 + length) / 6) ** penalty


def every_sequence(toy, b, max_length, penalty, blocked=(PAD,)):
    """All that end within `max_length`: (score, tokens), best first."""
    found = []
    tokens = [v for v in range(toy.table.shape[1]) if v not in (EOS, *blocked)]
    for length in range(max_length):
        for prefix in itertools.product(tokens, repeat=length):
            sequence = [*prefix, EOS]
            parts = [toy.log_probs(b, sequence[:i])[v] for i, v in enumerate(sequence)]
            found.append((score(sum(parts), len(sequence), penalty), sequence))
    return sorted(found, reverse=True)


def search(toy, b, beam, max_length, penalty, blocked=(PAD,)):
    """Beam search with lists, which never stops early: (score, tokens), best first."""
    alive, ended = [(0.0, [])], []
    for _ in range(max_length):
        longer = []
        for log_prob, prefix in alive:
            for v, more in enumerate(toy.log_probs(b, prefix)):
                if v not in blocked:
                    longer.append((log_prob + more, [*prefix, v]))
        longer = sorted(longer, key=lambda pair: -pair[0])[:beam]
        alive = [pair for pair in longer if pair[1][-1] != EOS]
        for log_prob, sequence in longer:
            if sequence[-1] == EOS:
                ended.append((score(log_prob, len(sequence), penalty), sequence))
    if not ended:
        ended = [(score(p, max_length, penalty), tokens) for p, tokens in alive]
    return sorted(ended, key=lambda pair: -pair[0])[:beam]


@partial(jax.jit, static_argnums=0, static_argnames=('max_length', 'forbidden'))
def run_greedy(toy, max_length=L, **kwargs):
    return greedy(
        toy.start(), toy.cache(), toy.step, max_length=max_length, eos=EOS, **kwargs
    )


def run_beam(toy, beam, max_length=L, length_penalty=0.6, **kwargs):
    kwargs = {'eos': EOS, 'fixed': lambda path: path == 'source/key', **kwargs}
    found = jax.jit(
        lambda logits, cache: beam_search(
            logits,
            cache,
            toy.step,
            beam=beam,
            max_length=max_length,
            length_penalty=length_penalty,
            **kwargs,
        )
    )(toy.start(), toy.cache())
    return jax.tree.map(np.asarray, found)


def assert_found(found, expected, max_length=L):
    """`found` of `beam_search` is `expected`, for each example (score, tokens)."""
    tokens, scores = found
    assert tokens.dtype == np.int32
    assert scores.dtype == np.float32
    for b, pairs in enumerate(expected):
        beam = tokens.shape[1]
        for k in range(beam):
            want, sequence = pairs[k] if k < len(pairs) else (-np.inf, [])
            filled = sequence + [PAD] * (max_length - len(sequence))
            np.testing.assert_array_equal(tokens[b, k], filled, err_msg=f'{b} {k}')
            np.testing.assert_allclose(scores[b, k], want, rtol=1e-5, atol=1e-6)


def test_greedy_takes_the_likeliest_token():
    toy = Toy(batch=7, eos=0.5)
    expected = []
    for b in range(7):
        sequence = []
        while len(sequence) < L and EOS not in sequence:
            log_probs = toy.log_probs(b, sequence)
            log_probs[PAD] = -np.inf
            sequence.append(int(np.argmax(log_probs)))
        expected.append(sequence + [PAD] * (L - len(sequence)))
    assert len({sequence.count(PAD) for sequence in expected}) > 1
    tokens = run_greedy(toy)
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, expected)


@pytest.mark.parametrize('penalty', [0.0, 0.6, 3.0])
def test_a_beam_of_one_is_greedy(penalty):
    for seed in range(3):
        toy = Toy(seed, batch=7, eos=0.3)
        tokens, scores = run_beam(toy, 1, 5, penalty)
        np.testing.assert_array_equal(tokens[:, 0], run_greedy(toy, max_length=5))
        assert np.isfinite(scores).all()


@pytest.mark.parametrize('penalty', [0.0, 0.6, 1.0, 2.5])
@pytest.mark.parametrize(('vocabulary', 'max_length'), [(4, 5), (5, 4)])
def test_a_wide_beam_finds_the_best_of_all_sequences(vocabulary, max_length, penalty):
    toy = Toy(vocabulary=vocabulary)
    # As many as the last step has candidates: those of each prefix without EOS.
    beam = (vocabulary - 2) ** (max_length - 1) * (vocabulary - 1)
    expected = [every_sequence(toy, b, max_length, penalty)[:beam] for b in range(B)]
    found = run_beam(toy, beam, max_length, penalty)
    assert_found(found, expected, max_length)


def test_the_penalty_matters():
    best = [run_beam(Toy(), 27, length_penalty=p)[0][:, 0] for p in (0.0, 2.5)]
    assert (best[0] != best[1]).any()


@pytest.mark.parametrize('beam', [2, 3, 7])
@pytest.mark.parametrize('penalty', [0.0, 0.6, 2.0])
def test_narrow_beams_equal_a_search_with_lists(beam, penalty):
    toy = Toy(batch=13, vocabulary=11, eos=0.5)
    expected = [search(toy, b, beam, 7, penalty) for b in range(13)]
    assert_found(run_beam(toy, beam, 7, penalty), expected, 7)


def test_it_stops_when_nothing_can_do_better():
    """And not before: the search with lists, above, never stops early."""
    steps = []

    def count(toy, beam):
        def step(tokens, cache):
            jax.debug.callback(lambda: steps.append(1))
            return Toy.step(toy, tokens, cache)

        toy.step, steps[:] = step, []
        found = run_beam(toy, beam, 7)
        jax.effects_barrier()
        del toy.step
        assert_found(found, [search(toy, b, beam, 7, 0.6) for b in range(B)], 7)
        return len(steps)

    assert count(Toy(eos=30.0), 1) == 0  # after the first token, of no step
    assert count(Toy(eos=5.0), 2) < 6
    assert count(Toy(eos=-30.0), 2) == 6  # as many as tokens, but for the first


def test_what_only_a_longer_sequence_can_win_is_waited_for():
    follows = np.zeros((8, 8))  # probabilities of what follows each token
    follows[2, [EOS, 3]] = 0.9, 0.1
    for token in range(3, 7):
        follows[token, token + 1] = 1.0
    follows[7, EOS] = 1.0
    start = np.zeros((1, 8))
    start[0, [EOS, 2]] = 0.5
    start, follows = jnp.log(jnp.asarray(start)), jnp.log(jnp.asarray(follows))

    def step(tokens, cache):
        return follows[tokens], cache

    options = {'beam': 2, 'max_length': 7, 'eos': EOS, 'length_penalty': 3.0}
    tokens, scores = beam_search(start, {}, step, **options)
    # After two tokens both places are taken, and log(0.05) / (7 / 6)^3 is far below
    # log(0.5), the worst; over 2^3 it is above the best, log(0.45) / (7 / 6)^3.
    assert tokens[0].tolist() == [[2, 3, 4, 5, 6, 7, EOS], [2, EOS, *[PAD] * 5]]
    expected = [[math.log(0.05) / 8, math.log(0.45) / (7 / 6) ** 3]]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_rows_that_never_end_are_the_likeliest_without_an_end():
    toy = Toy()
    toy.table[:, EOS] = -np.inf
    expected = [search(toy, b, 3, L, 0.6) for b in range(B)]
    assert all(EOS not in tokens for pairs in expected for _, tokens in pairs)
    assert_found(run_beam(toy, 3), expected)


def test_a_row_does_not_depend_on_the_others():
    """Some end at once and some never: neither waits, nor changes, for the other."""
    toy = Toy(batch=2)
    toy.example = np.array([0, 11], np.int32)
    toy.table[:, EOS] = -np.inf  # the second row never ends
    toy.table[0] = [0.0, 0.0, *[-30.0] * (V - 2)]  # the first ends at once
    tokens, scores = run_beam(toy, 2)
    assert_found((tokens, scores), [search(toy, b, 2, L, 0.6) for b in range(2)])
    assert tokens[0, 0].tolist() == [EOS, PAD, PAD, PAD]
    assert PAD not in tokens[1]


def test_beams_larger_than_the_vocabulary():
    toy = Toy(vocabulary=3)
    found = run_beam(toy, 13, 2)
    # Two sequences end within two tokens, and there are no others: EOS, and 2 EOS.
    assert_found(found, [every_sequence(toy, b, 2, 0.6) for b in range(B)], 2)
    assert (found[1][:, 2:] == -np.inf).all()
    toy.table[:, EOS] = -np.inf  # and if none ends, one of full length
    tokens, scores = run_beam(toy, 13, 2)
    np.testing.assert_array_equal(tokens[0], [[2, 2]] + [[PAD, PAD]] * 12)
    np.testing.assert_array_equal(scores[0] > -np.inf, [True] + [False] * 12)


def test_at_equal_scores_the_lower_id_wins():
    toy = Toy()
    toy.table[:] = 0.0
    toy.table[:, EOS] = -1.0
    tokens, scores = run_beam(toy, 2)
    np.testing.assert_array_equal(tokens[:, 0], [[2, 2, 2, 2]] * B)
    np.testing.assert_array_equal(tokens[:, 1], [[2, 2, 2, 3]] * B)
    np.testing.assert_array_equal(scores[:, 0], scores[:, 1])


def test_forbidden_tokens_are_never_chosen():
    toy = Toy(vocabulary=7)
    toy.table[:, [PAD, 3, 5]] += 9.0
    blocked = (PAD, 3, 5)
    expected = [search(toy, b, 3, L, 0.6, blocked) for b in range(B)]
    assert_found(run_beam(toy, 3, forbidden=(3, 5)), expected)
    assert not np.isin(run_greedy(toy, forbidden=(3, 5)), (3, 5)).any()
    assert np.isin(run_greedy(toy), (3, 5)).all()


def test_fixed_arrays_stay_and_the_others_follow_their_hypotheses():
    seen = []

    def fixed(path):
        seen.append(path)
        return path == 'source/key'

    toy = Toy(vocabulary=11)
    expected = [search(toy, b, 3, L, 0.6) for b in range(B)]
    assert_found(run_beam(toy, 3, fixed=fixed), expected)
    assert set(seen) == {'own/0/hash', 'own/1', 'source/key'}  # no scalars
    assert_found(run_beam(toy, 3, fixed=None), expected)
    # What is said to be fixed and is not shows.
    with pytest.raises(AssertionError):
        assert_found(run_beam(toy, 3, fixed=lambda path: True), expected)


def test_scores_are_float32_for_logits_of_bfloat16():
    toy = Toy(vocabulary=11)
    toy.table = np.float32(jnp.bfloat16(toy.table))
    expected = [search(toy, b, 3, L, 0.6) for b in range(B)]

    def half(tokens, cache):
        logits, cache = Toy.step(toy, tokens, cache)
        return logits.astype(jnp.bfloat16), cache

    toy.step, start = half, toy.start().astype(jnp.bfloat16)
    toy.start = lambda: start
    assert_found(run_beam(toy, 3), expected)


@pytest.mark.parametrize('search', ['greedy', 'beam'])
def test_rows_on_a_mesh_give_what_one_device_gives(search):
    toy = Toy(batch=16, vocabulary=11, eos=0.5)
    options = {'max_length': 7, 'eos': EOS}
    decode = partial(beam_search, beam=3) if search == 'beam' else greedy
    run = jax.jit(lambda logits, cache: decode(logits, cache, toy.step, **options))
    expected = run(toy.start(), toy.cache())

    devices = np.asarray(jax.devices()).reshape(2, 4, 1)
    mesh = Mesh(devices, (*ROW_AXES, 'tensor'), axis_types=(AxisType.Auto,) * 3)
    rows, whole = PartitionSpec(ROW_AXES), PartitionSpec()

    def place(x):
        return jax.device_put(x, NamedSharding(mesh, rows if x.ndim else whole))

    with jax.set_mesh(mesh):
        args = place(toy.start()), jax.tree.map(place, toy.cache())
        found, program = run(*args), run.lower(*args).compile().as_text()
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    # No rows are sent, only whether all are done.
    assert set(re.findall(r'all-\w+(?=\()', program)) == {'all-reduce'}


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'beam': 0}, 'beam must be above 0, not 0'),
        ({'max_length': 0}, 'max_length must be above 0, not 0'),
        ({'length_penalty': -0.5}, 'length_penalty must be from 0 to 10, not -0.5'),
        ({'length_penalty': math.nan}, 'length_penalty must be from 0 to 10, not nan'),
        ({'length_penalty': 1e308}, 'length_penalty must be from 0 to 10, not 1e+308'),
        ({'beam': 2**29}, 'too many candidates, 5 each; it can be at most 429496729'),
        ({'eos': 5}, 'token 5 is outside the vocabulary of 5'),
        ({'pad': -1}, 'token -1 is outside the vocabulary of 5'),
        ({'forbidden': (7,)}, 'token 7 is outside the vocabulary of 5'),
        ({'eos': PAD}, 'eos 0 may not be pad or forbidden'),
        ({'forbidden': (EOS,)}, 'eos 1 may not be pad or forbidden'),
    ],
)
def test_bad_arguments_are_told(fields, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run_beam(Toy(), **{'beam': 2, **fields})
