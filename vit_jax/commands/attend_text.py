"""vit_jax attend --source: where a model of sentences attends, as pictures."""

import argparse
import pathlib

import numpy as np

from vit_jax.commands import options, trained_text
from vit_jax.commands.layer_files import choose, file_name, save
from vit_jax.errors import UserError


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
    from vit_jax.sequence_pictures import draw_sequence_layers

    read = np.concatenate([[BOS], target[:-1]])
    run = jax.jit(sequence_maps, static_argnums=0)
    maps = run(found.model, found.variables, source[None], read[None])
    tokens = {
        'source': found.tokenizer.pieces(source),
        'target': found.tokenizer.pieces(read),
        'next target': found.tokenizer.pieces(target),
    }
    whose = 'target as given' if given else 'translation by the model'
    figures = draw_sequence_layers(jax.device_get(maps.layers), tokens, whose)
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
