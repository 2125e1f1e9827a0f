"""ConViT, DeiT and a ResNet on a part of the data (ConViT's table 2).

vit_jax reproduce convit_table2/digits --workdir=/tmp/runs --jobs=2
"""

import statistics
from collections.abc import Iterator, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vit_jax.experiment import Cell, Expected, Experiment, Line
from vit_jax.results import (
    NOT_RUN,
    by_seed,
    mean_sd,
    published_table,
    table,
    values_of,
    verdict,
    verdict_of_pairs,
)

SOURCE = 'arXiv 2103.10697, table 2'
FRACTIONS = (0.05, 0.1, 0.3, 0.5, 1.0)
PUBLISHED = {  # top-1 by fraction
    'ConViT-S': (47.8, 59.6, 73.7, 78.2, 81.4),
    'DeiT-S': (34.8, 48.0, 66.1, 74.6, 79.9),
}
CONFIGS = {
    'ConViT-S': 'configs/imagenet_convit.py',
    'DeiT-S': 'configs/imagenet_deit.py',
}
CIFAR10 = {
    'ConViT': 'configs/cifar10_convit.py',
    'ViT': 'configs/cifar10_vit.py',
    'ResNet': 'configs/cifar10_resnet.py',
}
DIGITS = {
    'ConViT': 'configs/digits_road.py:convit',
    'ViT': 'configs/digits_road.py:learned',
    'ResNet': 'configs/digits_road.py:resnet',
}
MODELS = tuple(DIGITS)
SMALL = ('digits', 'cifar10')
SEEDS = (0, 1, 2)


def sweep() -> Iterator[Cell]:
    """Every cell, the small ones first."""
    for seed in SEEDS:
        for fraction in FRACTIONS:
            for model, config in DIGITS.items():
                # So many steps whatever the fraction: as many images seen.
                overrides = {'dataset.train_fraction': fraction, 'num_steps': 2500}
                yield Cell(f'digits/{model}/{fraction:.0%}', config, overrides, seed)
    # An epoch is all of the data, however small the part: as many images seen.
    for seed in SEEDS:
        for fraction in FRACTIONS:
            for model, config in CIFAR10.items():
                overrides = {'dataset.train_fraction': fraction}
                yield Cell(f'cifar10/{model}/{fraction:.0%}', config, overrides, seed)
    for model, config in CONFIGS.items():
        for fraction, top1 in zip(FRACTIONS, PUBLISHED[model]):
            name = f'{model}/{fraction:.0%}'
            overrides = {'dataset.train_fraction': fraction}
            yield Cell(name, config, overrides, expected=Expected(top1, SOURCE))


def render(lines: Sequence[Line]) -> str:
    """Accuracy by fraction, both parts of the claim, and the published table."""
    parts = []
    for data in SMALL:
        rows = []
        for fraction in map('{:.0%}'.format, FRACTIONS):
            found = [values_of(lines, f'{data}/{m}/{fraction}') for m in MODELS]
            convit, vit, resnet = found
            verdicts = [verdict(better, vit) for better in (convit, resnet)]
            rows.append([fraction, *map(mean_sd, found), *verdicts])
        header = [f'training data, {data}', *MODELS]
        parts.append(table([*header, 'ConViT above ViT?', 'ResNet above ViT?'], rows))
        header = [
            f'gap as a share of ViT, {data}',
            *map('{:.0%}'.format, FRACTIONS),
            f'larger on {min(FRACTIONS):.0%} than on all?',
        ]
        rows = [[model, *_growth(lines, data, model)] for model in ('ConViT', 'ResNet')]
        parts.append(table(header, rows))
    parts.append(published_table(sweep(), lines))
    return '\n'.join(parts)


def _growth(lines: Sequence[Line], data: str, model: str) -> Iterator[str]:
    """The mean gap to ViT at each fraction; whether it grows as the part shrinks."""
    gaps = {fraction: _gaps(lines, data, model, fraction) for fraction in FRACTIONS}
    for gap in gaps.values():
        yield f'{statistics.mean(gap.values()):+.0f}%' if gap else NOT_RUN
    few, all_ = gaps[min(FRACTIONS)], gaps[max(FRACTIONS)]
    yield verdict_of_pairs([few[seed] - all_[seed] for seed in few if seed in all_])


def _gaps(
    lines: Sequence[Line], data: str, model: str, fraction: float
) -> dict[int, float]:
    """How much better than ViT a model is, in per cent of ViT, by seed.

    A seed has the same part of the data for both.
    """
    better, vit = (
        by_seed(lines, f'{data}/{name}/{fraction:.0%}') for name in (model, 'ViT')
    )
    return {
        seed: 100 * (better[seed] / vit[seed] - 1) for seed in better if seed in vit
    }


def draw(lines: Sequence[Line]) -> dict[str, Figure]:
    """Accuracy by fraction, with the spread over seeds."""
    return {
        f'{data}.png': _draw_fractions(lines, data)
        for data in SMALL
        if any(line['cell'].startswith(f'{data}/') for line in lines)
    }


def _draw_fractions(lines: Sequence[Line], data: str) -> Figure:
    figure = Figure(figsize=(5, 3.2), dpi=120, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, model in enumerate(MODELS):
        for fraction in FRACTIONS:
            values = values_of(lines, f'{data}/{model}/{fraction:.0%}')
            axes.plot([100 * fraction] * len(values), values, 'o', ms=3, color=f'C{i}')
        means = {
            100 * fraction: sum(values) / len(values)
            for fraction in FRACTIONS
            if (values := values_of(lines, f'{data}/{model}/{fraction:.0%}'))
        }
        axes.plot(list(means), list(means.values()), color=f'C{i}', label=model)
    axes.set_xscale('log')
    ticks = [100 * fraction for fraction in FRACTIONS]
    axes.set_xticks(ticks, [f'{tick:.0f}%' for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(f'training data, {data}')
    axes.set_ylabel('test accuracy, %')
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return figure


EXPERIMENT = Experiment(sweep, render, draw)
