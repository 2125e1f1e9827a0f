"""What each way of counting positions can do: the argument for sines and cosines.

vit_jax reproduce positional_encodings --workdir=/tmp/runs --jobs=2
"""

import pathlib
from collections.abc import Iterator, Sequence

from vit_jax.experiment import Cell, Experiment, Line, train_cell
from vit_jax.results import (
    NOT_RUN,
    by_seed,
    mean_sd,
    table,
    values_of,
    verdict,
    verdict_of_pairs,
)

from . import computed, unseen
from .pictures import draw

SEEDS = (0, 1, 2)
HERE = 'experiments.positional_encodings.positions'
NONE = 'none'

# Of ViT on digits: name -> title, fields of the model.
POSITIONS = {
    NONE: ('none', {'posemb': 'none'}),
    'learned1d': ('learned, of each patch: ViT', {'posemb': 'learned'}),
    'learned2d': (
        'learned, of each row and each column',
        {'posemb': f'{HERE}:LearnedAxes'},
    ),
    'relative': (
        'relative, in the attention',
        {'posemb': 'none', 'attention': f'{HERE}:RelativeAttention'},
    ),
    'sincos1d': ('sine and cosine pairs, of the patch', {'posemb': 'sincos1d'}),
    'sincos2d': ('sine and cosine pairs, of row and column', {'posemb': 'sincos2d'}),
    'sine': ('one sine a feature', {'posemb': 'sine'}),
    'binary': ('binary digits', {'posemb': 'binary'}),
    'normalized': ('index / length', {'posemb': 'normalized'}),
    'integer': ('integer', {'posemb': 'integer'}),
}
# ViT's own ablation, arXiv 2010.11929, table 8: of ViT-B/16 on ImageNet, 5-shot, in per
# cent. Its pre-trained models are not public.
PUBLISHED = {NONE: 61.382, 'learned1d': 64.206, 'learned2d': 64.001, 'relative': 64.032}


def sweep() -> Iterator[Cell]:
    """Every cell."""
    yield from computed.cells()
    yield from unseen.cells()
    for seed in SEEDS:
        for name, (_, fields) in POSITIONS.items():
            overrides = {f'model.kwargs.{key}': value for key, value in fields.items()}
            yield Cell(f'digits/{name}', 'configs/digits_vit.py', overrides, seed)


def measure(cell: Cell, workdir: pathlib.Path, data_dir: str | None) -> Line:
    """What is computed, trained in a loop of its own, or trained by its config."""
    if cell.config:
        return train_cell(cell, workdir, data_dir)
    return (unseen if cell.is_below('unseen') else computed).measure(cell)


def render(lines: Sequence[Line]) -> str:
    """Properties; gradients and unseen lengths; ViT on digits with each."""
    tables = computed.render(lines), unseen.render(lines), render_digits(lines)
    return '\n'.join(tables)


def render_digits(lines: Sequence[Line]) -> str:
    """Accuracy with each positions; none below the others, and these alike."""

    def accuracies(name: str) -> list[float]:
        return values_of(lines, f'digits/{name}')

    rows = []
    for name, (title, _) in POSITIONS.items():
        above = '' if name == NONE else verdict(accuracies(name), accuracies(NONE))
        published = f'{PUBLISHED[name]:.1f}: {NOT_RUN}' if name in PUBLISHED else ''
        rows.append([title, mean_sd(accuracies(name)), above, published])
    header = ['positions of ViT on digits', 'accuracy', 'above none']
    header += ['ViT-B/16 on ImageNet, 5-shot (arXiv 2010.11929, table 8)']
    none, *others = (by_seed(lines, f'digits/{name}') for name in PUBLISHED)
    margins = []
    for seed in none:
        if all(seed in found for found in others):
            of_seed = [found[seed] for found in others]
            gain, spread = min(of_seed) - none[seed], max(of_seed) - min(of_seed)
            margins.append(gain - spread)
    claim = 'learned or relative: they differ by less than the least of them from none'
    claims = [[claim, verdict_of_pairs(margins)]]
    return f'{table(header, rows)}\n{table(["claim", "verdict"], claims)}'


EXPERIMENT = Experiment(sweep, render, draw, measure)
