"""Transformer and LSTM on Multi30k, English to German, for an hour on two CPU cores.

    python experiments/multi30k/sweep.py --workdir=/tmp/multi30k --data_dir=/data/text

Runs every cell that `results.jsonl` does not hold yet, then writes `table.md` and
`picture.png`.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Iterator

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vit_jax.build import Run
from vit_jax.evaluate import evaluate
from vit_jax.sweep import Cell, FinalTest, main
from vit_jax.typing import Variables

HERE = pathlib.Path(__file__).parent
MODELS = {
    'configs/multi30k_transformer.py:cpu': 'Transformer-tiny',
    'configs/multi30k_transformer.py:cpu_lstm': 'LSTM-tiny',
}
SPLIT = 'test_2016_flickr'
BEAMS = (1, 5)


def sweep() -> Iterator[Cell]:
    """Every cell."""
    for config in MODELS:
        yield Cell(config, {}, 0)


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


def render(lines: list[dict]) -> str:
    """The table: BLEU of the test split, and of the validation split on the way."""
    rows = [
        '| model | parameters | updates | minutes | tokens/s | perplexity '
        '| BLEU greedy | BLEU beam 5 |',
        '| --- ' * 8 + '|',
    ]
    found = {line['config']: line for line in lines}
    for config, model in MODELS.items():
        line = found.get(config)
        if line is None:
            rows.append(f'| {model} {"| not run " * 7}|')
            continue
        scores = [line['test'][f'beam{beam}'] for beam in BEAMS]
        bleu = [f'{s["bleu"]:.1f} ({s["bleu_lower_case"]:.1f})' for s in scores]
        rows.append(
            f'| {model} | {line["params"]:,} | {line["steps"]:,} | '
            f'{line["seconds"] / 60:.0f} | {line["rates"]["tokens_per_second"]:,.0f} | '
            f'{scores[0]["perplexity"]:.2f} | {bleu[0]} | {bleu[1]} |'
        )
    rows += [
        '',
        f'On {SPLIT}; in brackets in lower case. On val, greedy, on the way:',
        '',
    ]
    steps = sorted({int(step) for line in lines for step in line['scores']})
    rows += [
        f'| updates | {" | ".join(f"{step:,}" for step in steps)} |',
        '| --- ' * (1 + len(steps)) + '|',
    ]
    for config, model in MODELS.items():
        scores = found[config]['scores'] if config in found else {}
        cells = [
            f'{scores[str(step)]["bleu"]:.1f}' if str(step) in scores else 'not run'
            for step in steps
        ]
        rows.append(f'| {model} | {" | ".join(cells)} |')
    return '\n'.join(rows) + '\n'


def draw(lines: list[dict]) -> Figure:
    """BLEU of the validation split against the time that its steps took."""
    figure = Figure(figsize=(5, 3.2), dpi=120, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for line in lines:
        minutes = line['rates']['step_seconds'] / 60
        points = {minutes * int(n): s['bleu'] for n, s in line['scores'].items()}
        name = MODELS.get(line['config'], line['config'])
        axes.plot(list(points), list(points.values()), 'o-', ms=4, label=name)
    axes.set_ylim(bottom=0)
    axes.set_xlabel('minutes of training, 2 CPU cores')
    axes.set_ylabel('BLEU on val, greedy')
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return figure


if __name__ == '__main__':
    test = FinalTest(SPLIT, measure)
    sys.exit(main(__doc__, HERE, sweep(), render, test=test, draw=draw))
