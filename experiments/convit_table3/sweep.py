"""What of ConViT matters: gates, convolutional start, training (ConViT's table 3).

vit_jax reproduce convit_table3/digits --workdir=/tmp/runs --jobs=2
"""

from collections.abc import Iterator, Sequence
from typing import Any

from vit_jax.experiment import Cell, Expected, Experiment, Line
from vit_jax.results import mean_sd, published_table, table, values_of, verdict

SOURCE = 'arXiv 2103.10697, table 3'
ROWS = {  # top-1 in full, and on a tenth
    'a': ('ConViT', (82.2, 59.7)),
    'b': ('without gates: one half content, one half position', (82.0, 57.4)),
    'c': ('without the convolutional start', (81.4, 56.9)),
    'd': ('without either', (81.6, 54.6)),
    'e': ('without GPSA: DeiT', (79.1, 47.8)),
    'f': ('GPSA frozen at its convolutional start', (78.6, 54.3)),
    'g': ('GPSA frozen at a random start', (73.7, 44.8)),
}
DIFFERENCES = {  # which rows tell it
    'all of it': 'ae',
    'GPSA alone': 'de',
    'gates, with the convolutional start': 'ab',
    'gates, without it': 'cd',
    'convolutional start, with gates': 'ac',
    'convolutional start, without gates': 'bd',
    'training GPSA, convolutional start': 'af',
    'training GPSA, random start': 'cg',
    'frozen at the convolutional start, or DeiT': 'ef',
    'frozen at a random start, or DeiT': 'eg',
}
FRACTIONS = (1.0, 0.1)
SEEDS = (0, 1, 2)
# ConViT-S+ without GPSA.
DEIT = {
    'model.name': 'DeiT-B/16',
    'model.kwargs.width': 576,
    'model.kwargs.mlp_dim': 2304,
    'model.kwargs.num_heads': 9,
}


def sweep() -> Iterator[Cell]:
    """Every cell, the small ones first."""
    for seed in SEEDS:
        for row in ROWS:
            for fraction in FRACTIONS:
                step = 'learned' if row == 'e' else 'convit'
                yield Cell(
                    f'digits/{row}/{fraction:.0%}',
                    f'configs/digits_road.py:{step}',
                    {
                        'dataset.train_fraction': fraction,
                        'num_steps': 2500,  # as many images seen
                        # Whose kernels start as ConViT's do, and ViT's do not.
                        **({'model.name': 'DeiT-Ti/2'} if row == 'e' else {}),
                        **ablate(row, num_local_layers=3),
                    },
                    seed,
                )
    for row, (_, published) in ROWS.items():
        for fraction, top1 in zip(FRACTIONS, published):
            yield Cell(
                f'{row}/{fraction:.0%}',
                'configs/imagenet_convit.py',
                {
                    # An epoch is all of the data, however small the part.
                    'dataset.train_fraction': fraction,
                    'optim.learning_rate': 4e-4,
                    **(DEIT if row == 'e' else {'model.name': 'ConViT-S+/16'}),
                    **ablate(row, num_local_layers=10),
                },
                expected=Expected(top1, SOURCE),
            )


def ablate(row: str, num_local_layers: int) -> dict[str, Any]:
    """What a row takes away from ConViT, as overrides."""
    overrides: dict[str, Any] = {}
    if row in 'bd':  # sigmoid(0) is one half, and stays
        overrides['model.kwargs.gating_init'] = 0.0
        overrides['optim.freeze'] = ('.*/gating',)
    if row in 'cdg':
        overrides['model.kwargs.local_init'] = False
    if row in 'fg':
        last = num_local_layers - 1
        overrides['optim.freeze'] = (f'block0[0-{last}]/attention/',)
    return overrides


def render(lines: Sequence[Line]) -> str:
    """Each row on digits; what it is without that, as the paper counts; published."""
    rows = [
        [row, what, *(mean_sd(_digits(lines, row, f)) for f in FRACTIONS)]
        for row, (what, _) in ROWS.items()
    ]
    parts = [
        table(['', 'digits', *(f'{f:.0%}' for f in FRACTIONS)], rows),
        table(['digits', 'difference', 'paper', 'here'], _differences(lines)),
        published_table(sweep(), lines),
    ]
    return '\n'.join(parts)


def _differences(lines: Sequence[Line]) -> Iterator[list[str]]:
    """Each in the direction of the paper's."""
    for what, pair in DIFFERENCES.items():
        for i, fraction in enumerate(FRACTIONS):
            high, low = sorted(pair, key=lambda row: ROWS[row][1][i], reverse=True)
            published = ROWS[high][1][i] - ROWS[low][1][i]
            here = verdict(*(_digits(lines, row, fraction) for row in (high, low)))
            told = f'{what}: {high} above {low}'
            yield [f'{fraction:.0%}', told, f'{published:+.1f}', here]


def _digits(lines: Sequence[Line], row: str, fraction: float) -> list[float]:
    return values_of(lines, f'digits/{row}/{fraction:.0%}')


EXPERIMENT = Experiment(sweep, render)
