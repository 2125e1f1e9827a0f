"""One encoder for images, text, audio and video: what order is worth to each.

vit_jax reproduce modalities --workdir=/tmp/runs --jobs=2
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vit_jax.experiment import Cell, Experiment, Line
from vit_jax.results import mean_sd, table, values_of, verdict

SEEDS = (0, 1, 2)
CHANCE = 50.0  # of two classes, as many of each


class Modality(NamedTuple):
    """What an encoder is given, and into what patches it cuts that."""

    question: str
    dataset: str
    size: str
    patch_size: int | tuple[int, ...]
    recipe: Mapping[str, Any] = {}


LONGER = {'num_steps': 3000}  # after 1,000 it still rises
MODALITIES = {
    'image': Modality(
        'parts of a digit, right or scrambled?',
        'experiments.parts.data:make_halves',
        '16 x 16 pixels',
        (2, 2),
        LONGER,
    ),
    'text': Modality(
        'English, forwards or backwards?',
        'experiments.modalities.data:make_text',
        '24 letters',
        1,
        LONGER,
    ),
    'audio': Modality(
        'two tones, rising or falling?',
        'experiments.modalities.data:make_audio',
        '16 frequencies x 27 times',
        (4, 3),
    ),
    'video': Modality(
        'a digit, to the right or to the left?',
        'experiments.modalities.data:make_video',
        '8 frames of 12 x 12 pixels',
        (2, 4, 4),
    ),
}
POSITIONS = {'positions': 'learned', 'none': 'no_positions'}  # steps of digits_road

# The same for all.
ENCODER = {'width': 32, 'depth': 2, 'mlp_dim': 64, 'num_heads': 4, 'pool': 'mean'}
RECIPE = {'optim.learning_rate': 3e-3}


def sweep() -> Iterator[Cell]:
    """Every cell."""
    for seed in SEEDS:
        for name, modality in MODALITIES.items():
            fields = {**ENCODER, 'patch_size': modality.patch_size}
            overrides: dict[str, Any] = {
                'task': 'experiments.modalities.task',
                'dataset.name': modality.dataset,
                **{f'model.kwargs.{key}': value for key, value in fields.items()},
                **RECIPE,
                **modality.recipe,
            }
            for positions, step in POSITIONS.items():
                config = f'configs/digits_road.py:{step}'
                yield Cell(f'{name}/{positions}', config, overrides, seed)


def render(lines: Sequence[Line]) -> str:
    """Accuracy with and without positions of each modality."""
    rows = []
    for name, modality in MODALITIES.items():
        found = [values_of(lines, f'{name}/{positions}') for positions in POSITIONS]
        patch = modality.patch_size
        cut = ' x '.join(map(str, patch)) if isinstance(patch, tuple) else str(patch)
        rows.append(
            [
                name,
                modality.question,
                f'{modality.size}, in patches of {cut}',
                *map(mean_sd, found),
                verdict(*found),
            ]
        )
    header = ['', 'question', 'input', 'accuracy with positions', 'without']
    accuracies = table([*header, 'with is above without'], rows)
    return f'{accuracies}\nChance is {CHANCE:.0f}%.\n'


def draw(lines: Sequence[Line]) -> dict[str, Figure]:
    """Accuracy of each seed, and means, with and without positions."""
    figure = Figure(figsize=(4.5, 3), dpi=120, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.axhline(CHANCE, color='0.8', lw=1, label='chance')
    styles = {'positions': ('C0', 'with positions'), 'none': ('C1', 'without')}
    for positions, (color, label) in styles.items():
        found = {
            place: values
            for place, name in enumerate(MODALITIES)
            if (values := values_of(lines, f'{name}/{positions}'))
        }
        for place, values in found.items():
            axes.plot([place] * len(values), values, '.', color=color, alpha=0.5, ms=5)
        means = [statistics.mean(values) for values in found.values()]
        axes.plot(list(found), means, '_', color=color, ms=18, mew=2, label=label)
    axes.set_xticks(range(len(MODALITIES)), MODALITIES)
    axes.set_xlim(-0.5, len(MODALITIES) - 0.5)
    axes.set_ylim(40, 102)
    axes.set_ylabel('held-out accuracy, %')
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return {'modalities.png': figure}


EXPERIMENT = Experiment(sweep, render, draw)
