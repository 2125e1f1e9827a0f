"""An experiment's results: gathered from where its cells ran, and written.

In the folder of the results lie `results.jsonl`, a line for each cell that has run, in
the order of the sweep; `table.md`; and pictures. All but the first is computed from it,
again whenever asked for.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import filelock

from vit_jax.experiment import Experiment, Line, find_line, read_lines, read_result

if TYPE_CHECKING:  # `reproduce --list` is quick
    from matplotlib.figure import Figure

RESULTS = 'results.jsonl'


def gather(
    experiment: Experiment, results: pathlib.Path, workdir: pathlib.Path | None = None
) -> list[Line]:
    """The lines of the cells that have run.

    Args:
      experiment: whose cells.
      results: a folder that may hold `results.jsonl`.
      workdir: of the runs. A result that lies there counts before a line of
        `results.jsonl`; where both are one folder, it alone counts.

    Raises:
      UserError: for a file that is no JSON.
    """
    known = [] if results == workdir else read_lines(results / RESULTS)
    lines = []
    for cell in experiment.cells():
        line = workdir and read_result(cell, workdir)
        lines.append(line or find_line(cell, known))
    return [line for line in lines if line]


def of_no_cell(experiment: Experiment, results: pathlib.Path) -> list[Line]:
    """What `results.jsonl` holds besides, as after a change of the sweep."""
    known = read_lines(results / RESULTS)
    found = [find_line(cell, known) for cell in experiment.cells()]
    return [line for line in known if not any(line is other for other in found)]


def write_results(
    experiment: Experiment,
    lines: Sequence[Line],
    folder: pathlib.Path,
    draw: bool = True,
    others: Sequence[Line] = (),
) -> str:
    """Writes `results.jsonl`, `table.md` and the pictures; returns the table.

    Args:
      experiment: of the lines.
      lines: of its cells.
      folder: made if need be.
      draw: whether to draw the pictures, which takes seconds.
      others: lines of no cell, which stand below.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = ''.join(json.dumps(line) + '\n' for line in [*lines, *others])
    _write(folder / RESULTS, text)
    return write_tables(experiment, lines, folder, draw).table


class Tables(NamedTuple):
    """What is computed from the lines of an experiment.

    Attributes:
      lines: of the cells that have run.
      table: `table.md`.
      pictures: by the names of their files.
    """

    lines: Sequence[Line]
    table: str
    pictures: 'Mapping[str, Figure]'


def write_tables(
    experiment: Experiment,
    lines: Sequence[Line],
    folder: pathlib.Path,
    draw: bool = True,
) -> Tables:
    """Writes `table.md` and the pictures, which take seconds, where `draw`."""
    pictures = experiment.draw(lines) if draw else {}
    tables = Tables(lines, experiment.render(lines), pictures)
    _write(folder / 'table.md', tables.table)
    for name, figure in tables.pictures.items():
        figure.savefig(folder / name)
    return tables


def update_tables(experiment: Experiment, results: pathlib.Path) -> Tables:
    """Writes again what follows from `results.jsonl`, which is left as it is."""
    with filelock.FileLock(results / '.lock'):
        return write_tables(experiment, gather(experiment, results), results)


def _write(path: pathlib.Path, content: str) -> None:
    temporary = path.with_name(f'{path.name}.tmp')
    temporary.write_text(content)
    temporary.replace(path)


def update_results(
    experiment: Experiment,
    results: pathlib.Path,
    workdir: pathlib.Path,
    draw: bool = True,
) -> str:
    """Gathers and writes; of several processes that do, the last one has all lines.

    Lines of no cell stay: they may be all that is left of days of work.
    """
    results.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(results / '.lock'):
        lines = gather(experiment, results, workdir)
        others = [] if results == workdir else of_no_cell(experiment, results)
        return write_results(experiment, lines, results, draw, others)
