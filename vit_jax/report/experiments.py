"""An experiment's table and pictures, written again, beside what its README says."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from vit_jax.errors import UserError
from vit_jax.experiment import Experiment, Line, load_experiment
from vit_jax.report.page import (
    NONE,
    Part,
    code,
    details,
    draw,
    embed,
    plain,
    show,
    stack,
)
from vit_jax.report.runs import format_value, label_paths
from vit_jax.reproduce import RESULTS, Tables, of_no_cell, update_tables
from vit_jax.results import table


def experiment_parts(
    folders: Sequence[pathlib.Path], base: pathlib.Path
) -> dict[str, Part]:
    """What is told of experiments, by what tells them from each other.

    Their tables and pictures are written again in the folders.

    Args:
      folders: of experiments, or of their results.
      base: the folder of experiments.

    Raises:
      UserError: for a folder of no experiment, and results that are damaged.
    """
    return {
        label: _part(label, folder, _home(folder, base))
        for label, folder in label_paths(folders).items()
    }


def _home(folder: pathlib.Path, base: pathlib.Path) -> pathlib.Path:
    """The folder with the `sweep.py` whose results a folder holds: itself, or that of
    its name.
    """
    if (folder / 'sweep.py').is_file():
        return folder
    home = base / folder.resolve().name
    if not (home / 'sweep.py').is_file():
        raise UserError(
            f'{folder} holds {RESULTS} but no sweep.py, and {home} is no experiment; '
            'name the folder of experiments by --experiments'
        )
    return home


def _part(label: str, folder: pathlib.Path, home: pathlib.Path) -> Part:
    experiment = load_experiment(home)
    readme = home / 'README.md'
    text = readme.read_text(errors='replace') if readme.is_file() else ''
    if (folder / RESULTS).is_file():
        lines, rendered, figures = update_tables(experiment, folder)
    else:  # nothing has run, and nothing is written
        lines, rendered, figures = Tables([], experiment.render([]), {})
    files = {
        name: f'experiments/{label}/{pathlib.Path(name).stem}.png' for name in figures
    }
    # What the README shows itself stands there.
    others = [name for name in figures if f']({name})' not in text]
    ran = f'{len(lines)} of {len(experiment.cells())} cells have run'
    facts = '; '.join([ran, *_where(lines)])
    blocks = [
        f'## {plain(label)}',
        plain(experiment.title),
        rendered,
        '\n'.join(show(files[name], f'{label}: {name}') for name in others),
        f'{facts}. By {code(f"vit_jax reproduce {experiment.name}")}.',
        _left_out(experiment, folder),
        details('Every cell that has run', _cells_table(lines)) if lines else '',
        embed(text, files, level=2),
    ]
    pictures = {files[name]: draw(figure) for name, figure in figures.items()}
    return Part(stack(*blocks), pictures)


def _left_out(experiment: Experiment, folder: pathlib.Path) -> str:
    count = len(of_no_cell(experiment, folder))
    text = (
        f'Lines of {RESULTS} that are of no cell of its sweep, and left out: {count}.'
    )
    return text if count else ''


def _where(lines: Sequence[Line]) -> list[str]:
    """When and on what the cells ran."""

    def told(name: str) -> list[str]:
        return sorted({str(line[name]) for line in lines if name in line})

    dates, facts = told('date'), [plain(hardware) for hardware in told('hardware')]
    if dates:
        facts.insert(0, dates[0] if len(dates) == 1 else f'{dates[0]} to {dates[-1]}')
    return facts + [f'jax {plain(version)}' for version in told('jax')]


def _cells_table(lines: Sequence[Line]) -> str:
    """A row for each line: what is one value of it."""
    hidden = ('config', 'overrides', 'cell', 'seed')
    names = {
        name: None
        for line in lines
        for name, value in line.items()
        if isinstance(value, int | float | str) and name not in hidden
    }
    changes = any(line['overrides'] for line in lines)
    header = ['cell', 'seed', *names, *(['overrides'] if changes else [])]
    rows = []
    for line in lines:
        row = [plain(line['cell']), plain(line['seed'])]
        row += [_cell(name, line.get(name)) for name in names]
        row += [code(json.dumps(line['overrides']))] if changes else []
        rows.append(row)
    return table([plain(name) for name in header], rows)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return NONE
    if isinstance(value, int | float) and not isinstance(value, bool):
        return format_value(name, value)
    return plain(value)
