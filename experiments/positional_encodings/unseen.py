"""Integers and index / length in training, and at lengths that it has not seen.

The task: at each place of a sequence, name the symbol that stood two places before.
Nothing but its position tells a symbol from its equals, and one head that looks two
places back does it at any length. Of sines and cosines that is a linear map of the
query, the same everywhere ("Attention Is All You Need", arXiv 1706.03762, section 3.5).
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax.experiment import Cell, Line
from vit_jax.layers.attention import MultiHeadAttention, padding_mask
from vit_jax.layers.blocks import EncoderBlock
from vit_jax.layers.norm import layer_norm
from vit_jax.losses import label_cross_entropy
from vit_jax.models.transformer import Stack
from vit_jax.results import mean_sd, table, values_of, verdict
from vit_jax.typing import Array

from .computed import ENCODINGS, encode

SYMBOLS, BACK = 8, 2
TRAINED = (8, 32)  # shortest and longest sequence of training
LENGTHS = tuple(range(8, 65, 4))  # that are tested
SEQUENCES = 128  # of each of them
WIDTH, DEPTH, HEADS = 64, 2, 4
BATCH, STEPS, WARMUP = 32, 1500, 50
WATCHED = 100  # first steps, whose gradients are told
LEARNING_RATE = 3e-3
SEEDS = (0, 1, 2)

# Of the first, codes reach the attention as they are; of the second, through a norm.
NORMS = {'after': 'norms after the sums', 'before': 'norms before the branches'}


def cells() -> Iterator[Cell]:
    """Every training."""
    for seed in SEEDS:
        for norm in NORMS:
            for encoding in ENCODINGS:
                overrides = {'encoding': encoding, 'norm': norm}
                yield Cell(cell_name(encoding, norm), None, overrides, seed)


def cell_name(encoding: str, norm: str) -> str:
    return f'unseen/{encoding}/{norm}'


class Reader(nn.Module):
    """An encoder with a guess at each place.

    Attributes:
      norm_first: see `EncoderBlock`.
    """

    norm_first: bool

    @nn.compact
    def __call__(self, symbols: Array, codes: Array, keep: Array) -> Array:
        """Args: symbols `[B, T]`, codes of their positions `[B, T, D]`, which of them
        are no padding `[B, T]`. Returns logits `[B, T, V]`.
        """
        x = nn.Embed(SYMBOLS, WIDTH)(symbols) + codes
        block = partial(
            EncoderBlock,
            partial(MultiHeadAttention, num_heads=HEADS),
            2 * WIDTH,
            norm_first=self.norm_first,
        )
        norm = layer_norm if self.norm_first else None
        x = Stack(block, DEPTH, norm)(x, mask=padding_mask(keep))
        return nn.Dense(SYMBOLS)(x)


def code_table(encoding: str, longest: int) -> np.ndarray:
    """The codes of sequences of 0 to `longest` symbols, `[longest + 1, longest, D]`."""
    codes = np.zeros((longest + 1, longest, WIDTH), np.float32)
    for length in range(1, longest + 1):
        codes[length, :length] = encode(encoding, length, WIDTH)
    return codes


def draw_batch(
    rng: np.random.Generator, lengths: np.ndarray, codes: np.ndarray
) -> dict[str, np.ndarray]:
    """Random sequences.

    Args:
      rng: of the symbols.
      lengths: `[B]`, of each sequence.
      codes: see `code_table`; T is its longest length.

    Returns:
      The arguments of `Reader`; target `[B, T]`; weight `[B, T]`, 0 of padding and
      where there is nothing two places before.
    """
    places = np.arange(codes.shape[1])
    symbols = rng.integers(SYMBOLS, size=(len(lengths), len(places)), dtype=np.int32)
    keep = places < lengths[:, None]
    return {
        'symbols': symbols,
        'codes': codes[lengths],
        'keep': keep,
        'target': np.roll(symbols, BACK, axis=1),
        'weight': np.float32(keep & (places >= BACK)),
    }


def score(params: Any, batch: dict, model: Reader) -> tuple[Array, Array]:
    """The mean loss over what has a weight, and which guesses are right, `[B, T]`."""
    inputs = (batch[name] for name in ('symbols', 'codes', 'keep'))
    logits = model.apply({'params': params}, *inputs)
    losses = label_cross_entropy(logits, batch['target'])
    hits = jnp.argmax(logits, axis=-1) == batch['target']
    return jnp.average(losses, weights=batch['weight']), hits


def measure(cell: Cell) -> Line:
    """Trains, and watches the first steps; then tests at all lengths.

    In a loop of its own: that of the configs trains models of images, or of pairs of
    sentences, and an index / length of a sequence that shares a batch with others of
    other lengths is no `posemb` of theirs.
    """
    model = Reader(norm_first=cell.overrides['norm'] == 'before')
    codes = code_table(cell.overrides['encoding'], max(LENGTHS))
    params, losses, norms = train(model, codes, cell.seed)
    watched = norms[:WATCHED]
    return {
        'grad_norm': {'mean': float(watched.mean()), 'max': float(watched.max())},
        'loss_after': float(losses[:WATCHED][-10:].mean()),
        'last_loss': float(losses[-10:].mean()),
        **test(model, params, codes, cell.seed),
        'grad_norms': [round(float(norm), 4) for norm in watched],
    }


def train(
    model: Reader, codes: np.ndarray, seed: int
) -> tuple[Any, np.ndarray, np.ndarray]:
    """The trained parameters; loss and norm of the gradient of each step, `[STEPS]`."""
    rng = np.random.default_rng([seed, 0])
    shortest, longest = TRAINED
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, WARMUP, STEPS)
    tx = optax.adamw(schedule)

    @jax.jit
    def step(params, opt_state, batch):
        grad_fn = jax.value_and_grad(score, has_aux=True)
        (loss, _), grads = grad_fn(params, batch, model)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, opt_state, loss, optax.tree.norm(grads)

    zeros = np.zeros((1, longest), np.int32)
    inputs = zeros, codes[:1, :longest], zeros == 0
    params = jax.jit(model.init)(jax.random.key(seed), *inputs)['params']
    opt_state = tx.init(params)
    told = []
    for _ in range(STEPS):
        lengths = rng.integers(shortest, longest + 1, size=BATCH)
        batch = draw_batch(rng, lengths, codes[: longest + 1, :longest])
        params, opt_state, *numbers = step(params, opt_state, batch)
        told.append(numbers)
    losses, norms = np.array(told).T
    return params, losses, norms


def test(model: Reader, params: Any, codes: np.ndarray, seed: int) -> Line:
    """The share of right guesses, in per cent.

    Returns:
      'right': means over the lengths of training, 'seen', and over the longer ones of
      the places that these lengths have, 'near', and of the places beyond, 'far';
      'right_by_length', of all places; 'right_by_place', of the longest sequences.
    """
    rng = np.random.default_rng([seed, 1])
    shares_of = jax.jit(lambda batch: score(params, batch, model)[1].mean(axis=0))
    right = {}  # length -> by place, from the first one that is asked for
    for length in LENGTHS:
        batch = draw_batch(rng, np.full(SEQUENCES, length), codes)
        right[length] = 100 * np.asarray(shares_of(batch))[BACK:length]
    longest = TRAINED[1]
    known = longest - BACK
    parts = {
        'seen': [by_place for n, by_place in right.items() if n <= longest],
        'near': [by_place[:known] for n, by_place in right.items() if n > longest],
        'far': [by_place[known:] for n, by_place in right.items() if n > longest],
    }
    return {
        'right': {
            name: float(np.mean([by_place.mean() for by_place in of_lengths]))
            for name, of_lengths in parts.items()
        },
        'right_by_length': {
            str(length): float(by_place.mean()) for length, by_place in right.items()
        },
        'right_by_place': [round(float(x), 2) for x in right[max(LENGTHS)]],
    }


# What the article says: of the first more than of the second. Encoding, and keys of its
# line, of both. Known places are those that the lengths of training have.
CLAIMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    'largest gradient: integers above sine and cosine pairs': (
        ('integer', 'grad_norm', 'max'),
        ('sincos', 'grad_norm', 'max'),
    ),
    'mean gradient: integers above sine and cosine pairs': (
        ('integer', 'grad_norm', 'mean'),
        ('sincos', 'grad_norm', 'mean'),
    ),
    'loss after: integers above sine and cosine pairs': (
        ('integer', 'loss_after'),
        ('sincos', 'loss_after'),
    ),
    'right at seen lengths: sine and cosine pairs above integers': (
        ('sincos', 'right', 'seen'),
        ('integer', 'right', 'seen'),
    ),
    'index / length: right at seen lengths above known places of longer ones': (
        ('normalized', 'right', 'seen'),
        ('normalized', 'right', 'near'),
    ),
    'known places of longer ones: sine and cosine pairs above index / length': (
        ('sincos', 'right', 'near'),
        ('normalized', 'right', 'near'),
    ),
}


def render(lines: Sequence[Line]) -> str:
    """Gradients, loss and accuracies of each; what the article says of them."""

    def read(norm: str, encoding: str, *path: str) -> list[float]:
        return values_of(lines, cell_name(encoding, norm), *path)

    rows = []
    for norm, where in NORMS.items():
        for encoding, (title, _, _) in ENCODINGS.items():
            of_row = partial(read, norm, encoding)
            gradients = [of_row('grad_norm', key) for key in ('mean', 'max')]
            cells = [mean_sd(x, '.2f') for x in (*gradients, of_row('loss_after'))]
            cells += [mean_sd(of_row('right', key)) for key in ('seen', 'near', 'far')]
            rows.append([where, title, *cells])
    claims = [
        [
            claim,
            *(verdict(read(norm, *one), read(norm, *other), '.2f') for norm in NORMS),
        ]
        for claim, (one, other) in CLAIMS.items()
    ]
    (shortest, longest), last, chance = TRAINED, max(LENGTHS), 100 / SYMBOLS
    header = ['norms', 'encoding', 'mean gradient', 'largest', 'loss after them']
    header += [
        f'right at lengths {shortest} to {longest}, %',
        f'at longer ones: places up to {longest}',
        'places beyond',
    ]
    return f"""{table(header, rows)}
Told is the norm of the gradient in the first {WATCHED} steps, and the mean loss of the
last ten of them. Longer sequences have up to {last} symbols; chance is {chance:g}%.

{table(['claim', *NORMS.values()], claims)}"""
