"""Experiments: the cells of a table, and what runs one.

An experiment is a folder with a `sweep.py` that sets `EXPERIMENT`. A cell is a name, a
config with overrides, and a seed; what is measured of it is a line of JSON. Cells of
the same name are seeds of each other. A name says where the cell belongs:
'ConViT-S/10%' is the paper's, 'digits/ConViT/10%' the same on digits.
"""

import dataclasses
import importlib.util
import json
import pathlib
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

from vit_jax.config import load_config, override
from vit_jax.errors import UserError, reason, unknown

if TYPE_CHECKING:  # `reproduce --list` is quick
    from matplotlib.figure import Figure

    from vit_jax.build import Run
    from vit_jax.typing import Array, Variables

Line = dict[str, Any]  # what is told of a cell, as JSON


class Expected(NamedTuple):
    """A published value.

    Attributes:
      value: such as top-1 accuracy in per cent; of what is measured it is compared
        with 'value', or with 'accuracy' as a share.
      source: where it is told.
      tolerance: how far from it is still the same.
      path: keys of a line, one in the other, to what is compared with it; none is the
        accuracy, in per cent, see `values_of`.
    """

    value: float
    source: str
    tolerance: float = 0.5
    path: tuple[str, ...] = ()


class Cell(NamedTuple):
    """One run.

    Attributes:
      name: of all seeds; its parts are divided by slashes.
      config: such as 'configs/digits_vit.py', with a variant after a colon; None where
        nothing is trained.
      overrides: of the config's keys, dotted; without a config, what is measured.
      seed: overrides `seed`.
      expected: a published value for it.
    """

    name: str
    config: str | None
    overrides: dict[str, Any]
    seed: int = 0
    expected: Expected | None = None

    @property
    def key(self) -> Line:
        """What begins its line; other values are another cell."""
        key = {
            'cell': self.name,
            'config': self.config,
            'overrides': self.overrides,
            'seed': self.seed,
        }
        return json.loads(json.dumps(key))  # which has lists for tuples

    def is_below(self, name: str) -> bool:
        """Whether the cell has that name, or begins with its parts."""
        return f'{self.name}/'.startswith(f'{name}/')


class FinalTest(NamedTuple):
    """What is measured of a trained model, beside the evaluations of its training.

    Attributes:
      measure: (run, variables) -> what a line holds of it, JSON.
      split: overrides `dataset.eval_split`.
    """

    measure: Callable[['Run', 'Variables'], Line]
    split: str = 'test'


def train_cell(
    cell: Cell,
    workdir: pathlib.Path,
    data_dir: str | None,
    tests: Mapping[str, FinalTest] | None = None,
) -> Line:
    """Trains a cell, or goes on with its training.

    Args:
      cell: with a config.
      workdir: of its run.
      data_dir: overrides `dataset.data_dir`; where the data lies is no part of a cell.
      tests: name in the line -> what is measured afterwards.

    Raises:
      UserError: as `build` and `train` do.
    """
    from vit_jax.summary import count_params
    from vit_jax.train import train
    from vit_jax.writer import read_evaluations

    run = build_cell(cell, data_dir=data_dir)
    result = train(run, workdir)
    evaluations = read_evaluations(workdir)
    more: Line = {}
    if run.score:
        more['scores'] = {  # of every evaluation
            str(step): {name: evaluation[name] for name in run.score.names}
            for step, evaluation in evaluations.items()
        }
    for name, test in (tests or {}).items():
        more[name] = _measure(cell, workdir, data_dir, test)
    return {
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
    }


def build_cell(cell: Cell, **dataset: str | None) -> 'Run':
    """The run of a cell.

    Args:
      cell: with a config.
      dataset: more overrides, of keys of the section 'dataset', where not None.

    Raises:
      UserError: as `build` does.
    """
    from vit_jax.build import build

    assert cell.config is not None
    values = {**cell.overrides, 'seed': cell.seed}
    values |= {f'dataset.{k}': v for k, v in dataset.items() if v is not None}
    arguments = [f'--config.{key}={value}' for key, value in values.items()]
    return build(override(load_config(cell.config), arguments), named=list(values))


def each_checkpoint(
    run: 'Run', workdir: pathlib.Path
) -> Iterator[tuple[int, 'Variables']]:
    """The variables of a run's start, and of every checkpoint that its workdir keeps.

    Args:
      run: of the workdir, see `build_cell`.
      workdir: after its training, with `checkpoint.keep` set to keep them.
    """
    from vit_jax.checkpoint import Checkpoints
    from vit_jax.pretrained import load_variables

    yield 0, run.init().variables
    with Checkpoints(workdir, read_only=True) as checkpoints:
        steps = checkpoints.steps()
    for step in steps:
        yield step, load_variables(f'{workdir}@{step}', run.model, run.inputs)[0]


def first_images(run: 'Run', count: int) -> 'Array':
    """The first images of the split to evaluate on, as the model takes them."""
    from vit_jax.tasks.classify import normalize

    with closing(run.eval_data()) as batches:
        images = next(batches)['image']
    if len(images) < count:
        raise UserError(f'a batch has {len(images)} images, {count} are asked for')
    seen = run.metadata['preprocessing']
    return normalize(images[:count], seen['mean'], seen['std'])


def _measure(
    cell: Cell, workdir: pathlib.Path, data_dir: str | None, test: FinalTest
) -> Line:
    """Of the last parameters of a workdir, or of their average if it has one."""
    from vit_jax.pretrained import load_variables

    run = build_cell(cell, data_dir=data_dir, eval_split=test.split)
    if run.vocabulary:
        run.vocabulary.load(workdir)
    sharding = run.parallel.leaf_sharding
    weights = f'{workdir}@last:{run.average}' if run.average else str(workdir)
    variables, _ = load_variables(weights, run.model, run.inputs, sharding=sharding)
    return test.measure(run, variables)


def _read_rates(workdir: pathlib.Path) -> dict[str, float]:
    """How fast training was, the median of the log lines; none times a compilation."""
    from vit_jax.writer import read_metrics

    lines = read_metrics(workdir)
    names = {name: None for line in lines for name in line}
    return {
        name.removeprefix('train/'): statistics.median(
            line[name] for line in lines if name in line
        )
        for name in names
        if name == 'train/step_seconds' or name.endswith('_per_second')
    }


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a `sweep.py` tells.

    Attributes:
      sweep: () -> the cells.
      render: lines -> `table.md`.
      draw: lines -> pictures by the names of their files.
      measure: (cell, workdir, data_dir) -> what is measured, JSON.
      flops: of a cell without a config, operations of what is measured; None where
        nobody counts them.
      name: of its folder, set by `load_experiment`.
      title: the first line of `sweep.py`, set by `load_experiment`.
    """

    sweep: Callable[[], Iterable[Cell]]
    render: Callable[[Sequence[Line]], str]
    draw: Callable[[Sequence[Line]], 'Mapping[str, Figure]'] = lambda lines: {}
    measure: Callable[[Cell, pathlib.Path, str | None], Line] = train_cell
    flops: Callable[[Cell], int | None] = lambda cell: None
    name: str = ''
    title: str = ''

    def cells(self, below: str = '') -> list[Cell]:
        """The cells, or those of a name.

        Raises:
          UserError: when there are none, two share a folder, or `sweep` does not run.
        """
        try:
            cells = list(self.sweep())
        except UserError:
            raise
        except Exception as error:
            told = f'{type(error).__name__}: {reason(error)}'
            raise UserError(f'the sweep of {self.name} does not run: {told}') from error
        _check_names(self.name, cells)
        found = [cell for cell in cells if not below or cell.is_below(below)]
        if not found:
            raise unknown(f'cell of {self.name}', below, {cell.name for cell in cells})
        return found


def _check_names(experiment: str, cells: Iterable[Cell]) -> None:
    """Each cell has a folder of its own, and a name that is that of no other cells."""
    for (name, seed), count in Counter((c.name, c.seed) for c in cells).items():
        if count > 1:
            raise UserError(
                f'{count} cells of {experiment} are called {name!r} and have seed '
                f'{seed}; give each a name or a seed of its own'
            )
    names = {cell.name for cell in cells}
    for name in sorted(names):
        for above in pathlib.PurePosixPath(name).parents:
            if str(above) in names:
                raise UserError(
                    f'cell {name!r} of {experiment} lies below cell {str(above)!r}, '
                    'which cannot be run by its name alone; give that one a longer name'
                )


def load_experiment(folder: pathlib.Path) -> Experiment:
    """The experiment of a folder, whose `sweep.py` may import what lies beside it.

    `from . import x` is such an import, wherever the folder is.

    Raises:
      UserError: for a folder without a `sweep.py`, or one that does not run.
    """
    file, name = folder / 'sweep.py', f'experiment_{folder.name}'
    spec = importlib.util.spec_from_file_location(
        name, file, submodule_search_locations=[str(folder)]
    )
    if not file.is_file() or spec is None or spec.loader is None:
        raise UserError(f'{folder} is no experiment: it has no sweep.py')
    module = importlib.util.module_from_spec(spec)
    for other in [known for known in sys.modules if known.startswith(f'{name}.')]:
        del sys.modules[other]  # beside another folder of that name
    sys.modules[name] = module  # where dataclasses look for their module
    try:
        spec.loader.exec_module(module)
        experiment = module.EXPERIMENT
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        told = f'{type(error).__name__}: {reason(error)}'
        raise UserError(f'{file} does not run: {told}') from error
    title = (module.__doc__ or '').strip().partition('\n')[0]
    return dataclasses.replace(experiment, name=folder.name, title=title)


def run_cell(
    experiment: Experiment, cell: Cell, workdir: pathlib.Path, data_dir: str | None
) -> Line:
    """Measures a cell, or takes what its workdir says it has measured.

    Args:
      experiment: of the cell.
      cell: one of its cells.
      workdir: of all cells; this one's is a folder in it.
      data_dir: where datasets lie.

    Returns:
      The line: the cell's key, what was measured, how long that took since it was
      begun or gone on with, when, and on what.

    Raises:
      UserError: as the experiment's `measure` does.
    """
    if line := read_result(cell, workdir):
        return line
    import jax

    folder = cell_folder(cell, workdir)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.time()
    measured = experiment.measure(cell, folder, data_dir)
    line = {
        **cell.key,
        **measured,
        'seconds': round(time.time() - start, 1),
        'date': time.strftime('%Y-%m-%d'),
        'hardware': f'{jax.devices()[0].device_kind}, {platform.machine()}',
        'jax': jax.__version__,
    }
    temporary = folder / 'result.tmp'
    temporary.write_text(json.dumps(line) + '\n')
    temporary.replace(folder / 'result.json')
    return line


def cell_folder(cell: Cell, workdir: pathlib.Path) -> pathlib.Path:
    """The workdir of a cell."""
    return workdir / cell.name / str(cell.seed)


def read_result(cell: Cell, workdir: pathlib.Path) -> Line | None:
    """What a cell's workdir says it has measured; None: it has not run."""
    file = cell_folder(cell, workdir) / 'result.json'
    lines = read_lines(file)
    return find_line(cell, lines)


def find_line(cell: Cell, lines: Iterable[Line]) -> Line | None:
    """The line of a cell."""
    key = cell.key
    for line in lines:
        if {name: line.get(name) for name in key} == key:
            return line
    return None


def read_lines(file: pathlib.Path) -> list[Line]:
    """The lines of a JSONL file; none where it is not there.

    Raises:
      UserError: for a line that is no JSON object.
    """
    content = file.read_bytes() if file.exists() else b''
    lines = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            found = json.loads(line)
        except ValueError:  # no JSON, or no text
            found = None
        if not isinstance(found, dict):
            raise UserError(
                f'{file}:{number} is no JSON object, as after an interruption; delete '
                'the line, and its cell runs again'
            )
        lines.append(found)
    return lines
