"""Transformer and LSTM, with attention and without, where what counts is far away.

vit_jax reproduce long_range --workdir=/tmp/runs --jobs=2
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vit_jax.build import Run
from vit_jax.data.long_range import pair_of
from vit_jax.experiment import Cell, Experiment, FinalTest, Line, find_line, train_cell
from vit_jax.results import NOT_RUN, table
from vit_jax.tasks.translate import shift_right
from vit_jax.typing import Batch, Variables

CONFIG = 'configs/long_range.py'
MODELS = {
    'transformer': 'Transformer',
    'lstm': 'LSTM with attention',
    'lstm_plain': 'LSTM',
}
TASKS = ('copy', 'recall')
LENGTHS = (16, 64, 256, 512)
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
STEPS = 1500
ROWS = 8  # examples of a batch, of any length
SEED = 0


def sweep() -> Iterator[Cell]:
    """Every cell, the short ones first."""
    for length in LENGTHS:
        for task in TASKS:
            for model in MODELS:
                for learning_rate in LEARNING_RATES:
                    yield make_cell(task, length, model, learning_rate)


def make_cell(task: str, length: int, model: str, learning_rate: float) -> Cell:
    """One run, which sees no example twice."""
    overrides = {
        'dataset.name': f'{task}:length={length},num_examples={STEPS * ROWS}',
        'optim.learning_rate': learning_rate,
        'num_steps': STEPS,
        'text.tokens_per_batch': ROWS * (length + 2),
        'text.score': 'none',  # `measure` is what counts, and needs no decoding
        'eval.every_steps': STEPS,
        'checkpoint.every_steps': STEPS,
    }
    name = f'{task}/{length}/{model}/{learning_rate:g}'
    return Cell(name, f'{CONFIG}:{model}', overrides, SEED)


def measure(run: Run, variables: Variables) -> dict:
    """The share of answers that are the likeliest symbol, given the right ones before.

    An answer is a symbol of a copy, or a value of a recall. Neither what begins and
    ends a line is counted, nor the keys of a recall, whose order nothing tells:
    `accuracy` of an evaluation counts all of these.

    Args:
      run: of a split.
      variables: the model's.

    Returns:
      'answers', the share; of recall also 'by_distance', the share of answers by the
      distance of the pair from the end of the source, up to each power of two.
    """

    @jax.jit
    def hits_of(batch: Batch):
        target = batch['target']
        logits = run.model.apply(variables, batch['source'], shift_right(target))
        return jnp.argmax(logits, -1) == target

    pairs = run.dataset.open(run.metadata['eval_split'])
    is_recall = run.dataset.name.startswith('recall')
    symbols = len(pairs.target[0])
    # A token begins the line; then the symbols, of recall a key and its value in turn.
    answers = np.arange(1, symbols + 1)
    if is_recall:
        answers = answers[1::2]
    hits = np.zeros((len(pairs.source), len(answers)))
    with closing(run.eval_data()) as batches:
        for batch in batches:
            kept = batch['index'] >= 0
            found = jax.device_get(hits_of(batch))[:, answers]
            hits[batch['index'][kept]] = found[kept]
    result: dict = {'answers': float(hits.mean())}
    if is_recall:
        distances = [
            [
                len(source) - source.index(pair_of(key, value))
                for key, value in zip(target[::2], target[1::2])
            ]
            for source, target in zip(*pairs)
        ]
        octaves = 2 ** np.ceil(np.log2(distances)).astype(int)
        result['by_distance'] = {
            str(octave): float(hits[octaves == octave].mean())
            for octave in np.unique(octaves)
        }
    return result


def choose(lines: Sequence[Line], task: str, length: int, model: str) -> Line | None:
    """The line of the best learning rate by validation, when all of them have run."""
    cells = [make_cell(task, length, model, rate) for rate in LEARNING_RATES]
    found = [line for cell in cells if (line := find_line(cell, lines))]
    if len(found) < len(cells):
        return None
    return max(found, key=lambda line: line['validation']['answers'])


def render(lines: Sequence[Line]) -> str:
    """Accuracy by length, recall by distance, speed."""
    return f"""Answers right, in per cent of the test split (learning rate):

{_accuracies(lines)}
Recall at length {LENGTHS[-1]}, in per cent, by the distance of the pair, up to:

{_distances(lines)}
Training, in tokens of the target per second, of copy:

{_speeds(lines)}"""


def _accuracies(lines: Sequence[Line]) -> str:
    rows = []
    for task in TASKS:
        for model, title in MODELS.items():
            best = [choose(lines, task, length, model) for length in LENGTHS]
            params = next((f'{line["params"]:,}' for line in best if line), NOT_RUN)
            cells = [
                f'{100 * line["test"]["answers"]:.1f} '
                f'({line["overrides"]["optim.learning_rate"]:g})'
                if line
                else NOT_RUN
                for line in best
            ]
            rows.append([task, title, params, *cells])
    return table(['task', 'model', 'parameters', *map(str, LENGTHS)], rows)


def _distances(lines: Sequence[Line]) -> str:
    octaves = [str(2**i) for i in range(10)]
    rows = []
    for model, title in MODELS.items():
        line = choose(lines, 'recall', LENGTHS[-1], model)
        shares = line['test']['by_distance'] if line else {}
        cells = [
            f'{100 * shares[octave]:.1f}' if octave in shares else NOT_RUN
            for octave in octaves
        ]
        rows.append([title, *cells])
    return table(['model', *octaves], rows)


def _speeds(lines: Sequence[Line]) -> str:
    rows = []
    for model, title in MODELS.items():
        best = [choose(lines, 'copy', length, model) for length in LENGTHS]
        cells = [
            f'{line["rates"]["tokens_per_second"]:,.0f}' if line else NOT_RUN
            for line in best
        ]
        rows.append([title, *cells])
    return table(['model', *map(str, LENGTHS)], rows)


def draw(lines: Sequence[Line]) -> dict[str, Figure]:
    """Accuracy by length of each task, and of recall by distance at the last length."""
    best = {
        (task, model): {n: choose(lines, task, n, model) for n in LENGTHS}
        for task in TASKS
        for model in MODELS
    }

    def by_length(task: str, model: str) -> dict[int, float]:
        found = best[task, model].items()
        return {n: line['test']['answers'] for n, line in found if line}

    def by_distance(model: str) -> dict[int, float]:
        line = best['recall', model][LENGTHS[-1]]
        shares = line['test']['by_distance'] if line else {}
        return {int(octave): share for octave, share in shares.items()}

    panels = (
        ('copy', 'length of the source', partial(by_length, 'copy')),
        ('recall', 'length of the source', partial(by_length, 'recall')),
        (f'recall at length {LENGTHS[-1]}', 'symbols from pair to end', by_distance),
    )
    figure = Figure(figsize=(10, 3.2), dpi=120, layout='constrained')
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(panels), sharey=True)
    for axes, (title, label, points_of) in zip(all_axes, panels):
        for model, name in MODELS.items():
            points = points_of(model)
            shares = [100 * share for share in points.values()]
            axes.plot(list(points), shares, 'o-', ms=4, label=name)
        axes.set_xscale('log', base=2)
        axes.set_ylim(0, 105)
        axes.set_title(title, size=10)
        axes.set_xlabel(label)
        axes.spines[['top', 'right']].set_visible(False)
    all_axes[0].set_ylabel('right, %')
    all_axes[0].legend(fontsize=8, frameon=False)
    return {'picture.png': figure}


# Chosen by one, told by the other.
TESTS = {split: FinalTest(measure, split) for split in ('validation', 'test')}
EXPERIMENT = Experiment(sweep, render, draw, partial(train_cell, tests=TESTS))
