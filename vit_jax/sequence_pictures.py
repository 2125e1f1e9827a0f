"""Pictures of where an encoder-decoder attends: a sheet per layer, and one of all."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from vit_jax.pictures import draw_token_maps, name_heads
from vit_jax.sequence_maps import SequenceLayer

SHEET = 'cross_attention'  # of all layers, beside the pictures of each

# What attends, the tokens of the rows, and those of the columns. The decoder reads BOS
# and the target; in the row of a token it has read what stands before, and says it.
KINDS = {
    'encoder': ('encoder self-attention', 'source', 'source'),
    'decoder': ('decoder self-attention', 'next target', 'target'),
    'cross': ('cross-attention', 'next target', 'source'),
}


def draw_sequence_layers(
    layers: Sequence[SequenceLayer], tokens: dict[str, list[str]], whose: str
) -> dict[str, Callable[[], Figure]]:
    """What draws each picture, by its name: that of a layer, or `SHEET`.

    Args:
      layers: of one pair of sentences.
      tokens: the pieces of 'source', of 'target' as the decoder reads it, and of 'next
        target', which is what it says.
      whose: the target, in words.
    """

    def sheet(kind: str, panels: list[tuple[str, np.ndarray]], title: str) -> Figure:
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
