"""vit_jax attend --source: where a model of sentences attends, as pictures."""

import argparse
import pathlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from vit_jax.commands import options, trained_text
from vit_jax.commands.layer_files import choose, file_name, save
from vit_jax.errors import UserError

if TYPE_CHECKING:  # --help is quick
    from matplotlib.figure import Figure

    from vit_jax.sequence_maps import SequenceLayer

SHEET = 'cross_attention'  # of all layers, beside the pictures of each

# What attends, the tokens of the rows, and those of the columns. The decoder reads BOS
# and the target; in the row of a token it has read what stands before, and says it.
KINDS = {
    'encoder': ('encoder self-attention', 'source', 'source'),
    'decoder': ('decoder self-attention', 'next target', 'target'),
    'cross': ('cross-attention', 'next target', 'source'),
}


def draw(args: argparse.Namespace) -> None:
    """Writes the pictures of a sentence and its translation.

    Raises:
      UserError: for weights that are not of a model of sentences, sentences that do
        not fit it, layers that it does not have, and what cannot be written.
    """
    options.quiet()
    found = trained_text.load(args.weights)
    source = _encode(found, 'source', args.source)
    given = args.target is not None
    target = _encode(found, 'target', args.target) if given else _say(found, source)

    import jax

    from vit_jax.data.tokenizer import BOS
    from vit_jax.sequence_maps import sequence_maps

    read = np.concatenate([[BOS], target[:-1]])
    run = jax.jit(sequence_maps, static_argnums=0)
    maps = run(found.model, found.variables, source[None], read[None])
    tokens = {
        'source': found.tokenizer.pieces(source),
        'target': found.tokenizer.pieces(read),
        'next target': found.tokenizer.pieces(target),
    }
    whose = 'target as given' if given else 'translation by the model'
    figures = _figures(jax.device_get(maps.layers), tokens, whose)
    for name in choose(figures, args.layers):
        save(pathlib.Path(args.out) / f'{file_name(name)}.png', figures[name]())


def _encode(found: trained_text.TrainedText, name: str, text: str) -> np.ndarray:
    """The tokens of a sentence and EOS, int32 `[length]`."""
    from vit_jax.data.tokenizer import EOS

    (ids,) = found.tokenizer.encode([text])
    if not ids.size:
        raise UserError(f'--{name} has no tokens; give it a sentence')
    if ids.size >= found.longest:
        raise UserError(
            f'--{name} has {ids.size} tokens; the longest sentences that the model '
            f'was trained on have {found.longest - 1}: shorten it'
        )
    return np.append(ids, np.int32(EOS))


def _say(found: trained_text.TrainedText, source: np.ndarray) -> np.ndarray:
    """What the model makes of a source, up to its EOS."""
    from vit_jax.data.tokenizer import EOS

    translator = found.make_translator(beam=1, length_penalty=0.0)
    ids = [source[:-1]]
    (said,) = translator.decode_sources(found.variables, ids, found.buckets)
    (ends,) = np.nonzero(said == EOS)
    return said[: ends[0] + 1] if ends.size else said


def _figures(
    layers: 'tuple[SequenceLayer, ...]', tokens: dict[str, list[str]], whose: str
) -> dict[str, Callable[[], 'Figure']]:
    """What draws each picture, by its name."""
    from vit_jax.pictures import draw_token_maps, name_heads

    def sheet(kind: str, panels: list[tuple[str, np.ndarray]], title: str) -> 'Figure':
        _, rows, columns = KINDS[kind]
        if kind != 'encoder':
            title = f'{title}\n{whose}'
        labels = f'{rows} token', f'attends to {columns} token'
        return draw_token_maps(panels, tokens[rows], tokens[columns], title, labels)

    figures: dict[str, Callable[[], Figure]] = {}
    of_layers = []
    for layer in layers:
        weights = np.asarray(layer.weights[0])
        if layer.kind == 'decoder':
            later = np.triu(np.ones(weights.shape[1:], bool), 1)
            weights = np.where(later, np.nan, weights)
        panels, title = name_heads(weights), f'{layer.name}: {KINDS[layer.kind][0]}'
        figures[layer.name] = partial(sheet, layer.kind, panels, title)
        if layer.kind == 'cross':
            name = layer.name.removesuffix('/cross_attention')
            of_layers.append((f'{name}, ', weights.mean(axis=0)))
    if of_layers:
        title = 'cross-attention of each layer, mean of its heads'
        figures[SHEET] = partial(sheet, 'cross', of_layers, title)
    return figures
