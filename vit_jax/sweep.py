"""Runs the cells of an experiment, and remembers those that have run.

A cell is a config, overrides and a seed. Each result is a line of a JSONL file beside
the experiment: what ran, what came out, when, on what. A cell whose line is there does
not run again, so a sweep goes on where it stopped; who changes a config deletes its
lines.
"""

import argparse
import json
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from vit_jax.build import Run, build
from vit_jax.config import load_config, override
from vit_jax.errors import Stopped, UserError
from vit_jax.evaluate import evaluate
from vit_jax.pretrained import load_variables
from vit_jax.summary import count_params
from vit_jax.train import train
from vit_jax.typing import Variables
from vit_jax.writer import read_evaluations, read_metrics

if TYPE_CHECKING:  # matplotlib is needed by pictures alone
    from matplotlib.figure import Figure


class Cell(NamedTuple):
    """One run.

    Attributes:
      config: such as 'configs/digits_vit.py', with a variant after a colon.
      overrides: of the config's keys, dotted.
      seed: overrides `seed`.
    """

    config: str
    overrides: dict[str, Any]
    seed: int

    @property
    def name(self) -> str:
        """A name for its workdir."""
        values = [f'{key}={value}' for key, value in self.overrides.items()]
        parts = [pathlib.Path(self.config).name.replace('.py', ''), *values]
        return '-'.join([*parts, str(self.seed)]).replace(':', '-').replace('/', '-')


class FinalTest(NamedTuple):
    """What is measured of a trained model, beside the evaluations of its training.

    Attributes:
      split: overrides `dataset.eval_split`.
      measure: (run, variables) -> what `test` of a line holds, JSON.
    """

    split: str = 'test'
    measure: Callable[[Run, Variables], dict[str, Any]] = evaluate


def run_sweep(
    cells: Iterable[Cell],
    results: pathlib.Path,
    workdir: pathlib.Path,
    data_dir: str | None = None,
    test: FinalTest | None = None,
) -> list[dict[str, Any]]:
    """Runs the cells that `results` does not hold, and adds a line for each.

    Args:
      cells: what to run.
      results: a JSONL file; made if it is not there.
      workdir: each cell's workdir is a folder in it.
      data_dir: overrides `dataset.data_dir`; where the data lies is no part of a cell.
      test: what is measured after the training of a cell, or None.

    Returns:
      The lines of `results`, all of them.

    Raises:
      UserError: as `build` and `train` do.
    """
    lines = _read(results)
    done = [Cell(line['config'], line['overrides'], line['seed']) for line in lines]
    for cell in cells:
        # As it will be read: JSON has lists for tuples.
        cell = cell._replace(overrides=json.loads(json.dumps(cell.overrides)))
        if cell not in done:
            lines.append(_run(cell, workdir / cell.name, data_dir, test))
            with results.open('a') as file:
                file.write(json.dumps(lines[-1]) + '\n')
    return lines


def main(
    description: str | None,
    folder: pathlib.Path,
    cells: Iterable[Cell],
    render: Callable[[list[dict[str, Any]]], str],
    argv: Sequence[str] | None = None,
    test: FinalTest | None = None,
    draw: Callable[[list[dict[str, Any]]], 'Figure'] | None = None,
) -> int:
    """The command line of an experiment: runs its cells, then writes `table.md`.

    Args:
      description: what `--help` says.
      folder: of the experiment, for `results.jsonl`, `table.md` and `picture.png`.
      cells: what to run.
      render: the table of the results.
      argv: arguments; None for those of the process.
      test: see `run_sweep`.
      draw: the picture of the results, or None.

    Returns:
      The exit code: 1 after an error of the user, which is told in one line; 0 when a
      signal asked to stop.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--workdir', required=True, type=pathlib.Path)
    parser.add_argument(
        '--data_dir', help='where datasets lie, config.dataset.data_dir'
    )
    args = parser.parse_args(argv)
    results = folder / 'results.jsonl'
    try:
        lines = run_sweep(cells, results, args.workdir, args.data_dir, test)
    except UserError as error:
        print(f'{parser.prog}: error: {error}', file=sys.stderr)
        return 1
    except Stopped as stopped:  # as asked: no error
        print(f'{parser.prog}: {stopped}', file=sys.stderr)
        return 0
    table = render(lines)
    (folder / 'table.md').write_text(table)
    if draw:
        draw(lines).savefig(folder / 'picture.png')
    print(table)
    return 0


def _read(results: pathlib.Path) -> list[dict[str, Any]]:
    text = results.read_text() if results.exists() else ''
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(
                f'{results}:{number} is no JSON, as after an interruption; delete the '
                'line, and its cell runs again'
            ) from error
    return lines


def _build(cell: Cell, **more: str | None) -> Run:
    values = {**cell.overrides, 'seed': cell.seed}
    values |= {f'dataset.{k}': value for k, value in more.items() if value is not None}
    arguments = [f'--config.{key}={value}' for key, value in values.items()]
    return build(override(load_config(cell.config), arguments), named=list(values))


def _run(
    cell: Cell, workdir: pathlib.Path, data_dir: str | None, test: FinalTest | None
) -> dict[str, Any]:
    start = time.time()
    run = _build(cell, data_dir=data_dir)
    result = train(run, workdir)
    evaluations = read_evaluations(workdir)
    more: dict[str, Any] = {}
    if run.score:
        more['scores'] = {  # of every evaluation
            str(step): {name: evaluation[name] for name in run.score.names}
            for step, evaluation in evaluations.items()
        }
    if test:
        more['test'] = _measure(cell, workdir, data_dir, test)
    return {
        **cell._asdict(),
        'accuracy': result['accuracy'],
        'accuracies': {  # of every evaluation
            str(step): evaluation['accuracy']
            for step, evaluation in evaluations.items()
        },
        'examples': result['examples'],
        **more,
        'rates': _read_rates(workdir),
        'params': count_params(run.state_shape.variables['params']),
        'steps': run.num_steps,
        'seconds': round(time.time() - start, 1),
        'date': time.strftime('%Y-%m-%d'),
        'hardware': f'{jax.devices()[0].device_kind}, {platform.machine()}',
        'jax': jax.__version__,
    }


def _measure(
    cell: Cell, workdir: pathlib.Path, data_dir: str | None, test: FinalTest
) -> dict[str, Any]:
    """Of the parameters that the workdir has last."""
    run = _build(cell, data_dir=data_dir, eval_split=test.split)
    if run.vocabulary:
        run.vocabulary.load(workdir)
    sharding = run.parallel.leaf_sharding
    variables, _ = load_variables(
        str(workdir), run.model, run.inputs, sharding=sharding
    )
    return test.measure(run, variables)


def _read_rates(workdir: pathlib.Path) -> dict[str, float]:
    """How fast training was, the median of the log lines; none times a compilation."""
    lines = read_metrics(workdir)
    names = {name: None for line in lines for name in line}
    return {
        name.removeprefix('train/'): statistics.median(
            line[name] for line in lines if name in line
        )
        for name in names
        if name == 'train/step_seconds' or name.endswith('_per_second')
    }


def percent(lines: list[dict[str, Any]], config: str, **overrides: Any) -> str:
    """The accuracy of a cell over its seeds, for a table.

    Args:
      lines: from `run_sweep`.
      config, overrides: of the cell; a key's dots are written as two underscores.

    >>> lines = [{'config': 'a', 'overrides': {'b.c': 1}, 'accuracy': x}
    ...          for x in (0.5, 0.6)]
    >>> percent(lines, 'a', b__c=1)
    '55.0 ± 7.1 (2 seeds)'
    >>> percent(lines, 'other')
    'not run'
    """
    wanted = {key.replace('__', '.'): value for key, value in overrides.items()}
    wanted = json.loads(json.dumps(wanted))
    values = [
        100 * line['accuracy']
        for line in lines
        if line['config'] == config and line['overrides'] == wanted
    ]
    if len(values) > 1:
        mean, spread = statistics.mean(values), statistics.stdev(values)
        return f'{mean:.1f} ± {spread:.1f} ({len(values)} seeds)'
    return f'{values[0]:.1f} (1 seed)' if values else 'not run'
