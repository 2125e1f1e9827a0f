"""Transformer and LSTM on Multi30k, English to German.

vit_jax reproduce multi30k/cpu --workdir=/tmp/runs --data_dir=/data/text
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vit_jax.build import Run
from vit_jax.evaluate import evaluate
from vit_jax.experiment import Cell, Expected, Experiment, FinalTest, Line, train_cell
from vit_jax.results import NOT_RUN, mean_sd, status, table, values_of
from vit_jax.typing import Variables

CONFIG = 'configs/multi30k_transformer.py'
CPU = {'cpu/Transformer': 'cpu', 'cpu/LSTM': 'cpu_lstm'}  # variants of the config
FULL = {'Transformer': '', 'LSTM': 'lstm'}
SEEDS = (0, 1, 2)
# Whether that was counted in lower case it does not say.
PUBLISHED = Expected(
    41.02, 'arXiv 2105.14462, table 2, text only', path=('test', 'beam5', 'bleu')
)
SPLIT = 'test_2016_flickr'
BEAMS = (1, 5)
BLEU = ('bleu', 'bleu_lower_case')


def sweep() -> Iterator[Cell]:
    """Every cell."""
    for name, variant in CPU.items():
        yield Cell(name, f'{CONFIG}:{variant}', {})
    for name, variant in FULL.items():
        expected = PUBLISHED if name == 'Transformer' else None
        for seed in SEEDS:
            yield Cell(name, f'{CONFIG}:{variant}', {}, seed, expected)


def measure(run: Run, variables: Variables) -> dict:
    """The metrics of a split, decoded greedily and by a beam of five."""
    result: dict = {'signature': run.score.signature}
    for beam in BEAMS:
        how = dataclasses.replace(run.score.translator.how, beam=beam)
        translator = dataclasses.replace(run.score.translator, how=how)
        score = dataclasses.replace(run.score, translator=translator)
        result[f'beam{beam}'] = evaluate(
            dataclasses.replace(run, score=score), variables
        )
    return result


def render(lines: Sequence[Line]) -> str:
    """BLEU of the test split, of the published protocol, of val on the way."""
    rows, found = [], {}
    for name in (*CPU, *FULL):
        found[name] = [line for line in lines if line['cell'] == name]
        rows.append([name, *_describe(found[name])])
    header = ['cell', 'seeds', 'parameters', 'updates', 'minutes', 'tokens/s']
    header += ['perplexity', 'BLEU greedy', 'lower case', 'BLEU beam 5', 'lower case']
    scores = table(header, rows)

    rows = []
    for how, key in zip(('as it is', 'in lower case'), BLEU):
        values = values_of(lines, 'Transformer', 'test', 'beam5', key)
        rows.append([how, mean_sd(values), status(values, PUBLISHED)])
    published = table(['Transformer, beam 5', 'BLEU', 'status'], rows)

    steps = sorted({int(n) for line in lines for n in line['scores']})
    rows = []
    for name in (name for name in found if found[name]):
        bleu = {int(n): s['bleu'] for n, s in found[name][0]['scores'].items()}
        rows.append([name, *(f'{bleu[n]:.1f}' if n in bleu else '' for n in steps)])
    curve = table(['updates', *(f'{step:,}' for step in steps)], rows)
    return f"""On {SPLIT}:

{scores}
Published: {PUBLISHED.value:g} ({PUBLISHED.source}).

{published}
On val, greedy, on the way, of the first seed:

{curve}"""


def _describe(lines: Sequence[Line]) -> list[str]:
    """The seeds of a cell."""
    if not lines:
        return [NOT_RUN] * 10
    first = lines[0]
    values = partial(values_of, lines, first['cell'], 'test')
    scores = [values('beam1', 'perplexity')]
    scores += [values(f'beam{beam}', key) for beam in BEAMS for key in BLEU]
    return [
        str(len(lines)),
        f'{first["params"]:,}',
        f'{first["steps"]:,}',
        f'{max(line["seconds"] for line in lines) / 60:.0f}',
        f'{first["rates"]["tokens_per_second"]:,.0f}',
        *(mean_sd(score).partition(' (')[0] for score in scores),
    ]


def draw(lines: Sequence[Line]) -> dict[str, Figure]:
    """BLEU of the validation split against the time that its steps took, on a CPU."""
    figure = Figure(figsize=(5, 3.2), dpi=120, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for line in lines:
        if line['cell'] not in CPU:
            continue
        minutes = line['rates']['step_seconds'] / 60
        points = {minutes * int(n): s['bleu'] for n, s in line['scores'].items()}
        label = line['cell'].removeprefix('cpu/')
        axes.plot(list(points), list(points.values()), 'o-', ms=4, label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlabel('minutes of training, 2 CPU cores')
    axes.set_ylabel('BLEU on val, greedy')
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return {'picture.png': figure}


TESTS = {'test': FinalTest(measure, SPLIT)}
EXPERIMENT = Experiment(sweep, render, draw, partial(train_cell, tests=TESTS))
