"""What the workdirs of runs say, as tables: metrics, rates, configs, environments."""

import json
import pathlib
import shlex
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from vit_jax.checkpoint import best
from vit_jax.config import default_config, flatten
from vit_jax.errors import UserError
from vit_jax.report.curves import is_rate, is_share
from vit_jax.report.page import NONE, code, details, listing, plain, stack
from vit_jax.results import table
from vit_jax.workdir import read_config
from vit_jax.writer import read_metrics, read_whole_lines

# Metrics by which the best evaluation is told: the first that a run has.
_SCORES = ('accuracy', 'bleu', 'exact_match', 'loss')


class RunFolder(NamedTuple):
    """A run, as its workdir tells; it may still be training.

    Attributes:
      label: what tells it from the others.
      path: its workdir.
      config: resolved, nested.
      lines: of `metrics.jsonl`.
      launches: of `launches.jsonl`.
    """

    label: str
    path: pathlib.Path
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    launches: list[dict[str, Any]]

    @property
    def evaluations(self) -> dict[int, dict[str, float]]:
        """Step -> metrics of its evaluation, 'loss' and so on."""
        found = {line['step']: _below('eval/', line) for line in self.lines}
        return {step: metrics for step, metrics in found.items() if metrics}


def read_runs(paths: Sequence[pathlib.Path]) -> list[RunFolder]:
    """Reads the workdirs of runs.

    Raises:
      UserError: for a folder that holds none, or whose config is damaged.
    """
    return [_read_run(label, path) for label, path in label_paths(paths).items()]


def _read_run(label: str, path: pathlib.Path) -> RunFolder:
    config = read_config(path)
    if config is None or 'task' not in config:
        raise UserError(f'{path / "config.json"} is not the config of a run')
    lines = [line for line in read_metrics(path) if isinstance(line.get('step'), int)]
    launches = read_whole_lines(path / 'launches.jsonl')
    return RunFolder(label, path, config, lines, launches)


def label_paths(paths: Sequence[pathlib.Path]) -> dict[str, pathlib.Path]:
    """As much of the end of each path as tells it from the others.

    >>> list(label_paths([pathlib.Path('/runs/a/0'), pathlib.Path('/runs/b/0')]))
    ['a/0', 'b/0']
    """
    whole = {path.resolve(): path for path in paths}  # each once
    for count in range(1, max((len(path.parts) for path in whole), default=0) + 1):
        labels = ['/'.join(path.parts[-count:]) for path in whole]
        if len({*labels}) == len(labels):
            break
    return dict(zip(labels, whole.values())) if whole else {}


def overview(runs: Sequence[RunFolder], params: dict[str, int]) -> str:
    """What was trained on what.

    Args:
      runs: the runs.
      params: numbers of parameters by label, where they are known.
    """
    rows = []
    for run in runs:
        values = dict(flatten(run.config))
        last = max((line['step'] for line in run.lines), default=0)
        length = f'{last:,}'
        if steps := values.get('num_steps'):
            length += f' of {steps:,}'
        elif epochs := values.get('num_epochs'):
            length += f', {epochs:g} epochs in all'
        rows.append(
            [
                plain(run.label),
                plain(values.get('model.name')),
                f'{params[run.label]:,}' if run.label in params else NONE,
                plain(values.get('dataset.name')),
                length,
                plain(values.get('seed')),
            ]
        )
    header = ['run', 'model', 'parameters', 'data', 'step', 'seed']
    return table(header, rows)


def last_evaluations(runs: Sequence[RunFolder]) -> str:
    """The last evaluation of each run, and its best one; '' where there is none."""
    rows: dict[str, dict[str, str]] = {}
    for run in runs:
        evaluations = run.evaluations
        if not evaluations:
            continue
        step = max(evaluations)
        last = evaluations[step]
        row = {name: format_value(name, value) for name, value in last.items()}
        score = next((name for name in _SCORES if name in last), None)
        if score and (first := best(list(evaluations), score, evaluations)):
            value = format_value(score, evaluations[first][score])
            row['best'] = f'{score} {value} at step {first:,}'
        rows[run.label] = {'step': f'{step:,}', **row}
    return _side_by_side(rows, last=('examples', 'best'))


def rates(runs: Sequence[RunFolder]) -> str:
    """How fast each run was, the median of its log lines; '' where there are none.

    No log line times a compilation: that is told by itself, the sum of all.
    """
    rows: dict[str, dict[str, str]] = {}
    for run in runs:
        found = [_below('train/', line) for line in run.lines]
        names = dict.fromkeys(name for line in found for name in line)
        row = {
            name: format_value(name, statistics.median(_values(found, name)))
            for name in names
            if is_rate(name)
        }
        if 'compile_seconds' in names:
            total = sum(_values(found, 'compile_seconds'))
            row['compile_seconds'] = format_value('compile_seconds', total)
        if row:
            rows[run.label] = row
    return _side_by_side(rows)


def config_differences(runs: Sequence[RunFolder]) -> str:
    """The keys of the configs that differ between runs; '' where none does."""
    configs = {run.label: _flat(run.config) for run in runs}
    keys = sorted({key for config in configs.values() for key in config})
    differing = [
        key
        for key in keys
        if len({json.dumps(config.get(key)) for config in configs.values()}) > 1
    ]
    if not differing:
        return ''
    header = ['key', *map(plain, configs)]
    rows = [
        [code(key), *(_value(config, key) for config in configs.values())]
        for key in differing
    ]
    if len(runs) > len(differing):  # a sweep: a row for each run
        header, *rows = map(list, zip(header, *rows))
        header[0] = 'run'
    return table(header, rows)


def config_from_default(run: RunFolder) -> str:
    """The keys of a run that are not at their default, folded away."""
    default = _flat(
        json.loads(json.dumps(default_config(run.config['task']).to_dict()))
    )
    config = _flat(run.config)
    rows = [
        [code(key), _value(config, key), _value(default, key)]
        for key in sorted(config)
        if key not in default or config[key] != default[key]
    ]
    summary = f'{run.label}: {len(rows)} keys that are not at their default'
    return details(summary, table(['key', 'value', 'default'], rows))


def environment(runs: Sequence[RunFolder]) -> str:
    """When, how and where each run was started, or gone on with; '' if unknown."""
    rows, commands = [], []
    for run in runs:
        for launch in run.launches:
            devices = Counter(launch.get('devices', ()))
            versions = {'python': launch.get('python'), **launch.get('versions', {})}
            rows.append(
                [
                    plain(run.label),
                    plain(launch.get('time', NONE)),
                    plain(', '.join(f'{n} x {kind}' for kind, n in devices.items())),
                    plain(launch.get('processes', NONE)),
                    plain(', '.join(f'{k} {v}' for k, v in versions.items() if v)),
                ]
            )
        typed = dict.fromkeys(map(_command, run.launches))
        commands += [f'# {run.label}', *typed] if typed else []
    header = ['run', 'started', 'devices', 'processes', 'versions']
    return stack(table(header, rows), listing(commands)) if rows else ''


def _command(launch: dict[str, Any]) -> str:
    """As it was typed, whatever the path of the program."""
    program, *rest = launch.get('command') or ['']
    ours = pathlib.Path(program).name in ('main.py', 'vit_jax')
    return shlex.join(['vit_jax' if ours else program, *rest])


def _side_by_side(rows: dict[str, dict[str, str]], last: Sequence[str] = ()) -> str:
    """Runs below each other, each with the columns that any of them has."""
    if not rows:
        return ''
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    columns.sort(key=lambda name: name in last)  # stable
    header = ['run', *(plain(name.replace('_', ' ')) for name in columns)]
    return table(
        header,
        (
            [plain(label), *(plain(row.get(name, NONE)) for name in columns)]
            for label, row in rows.items()
        ),
    )


def _below(prefix: str, line: dict[str, Any]) -> dict[str, float]:
    return {
        name.removeprefix(prefix): value
        for name, value in line.items()
        if name.startswith(prefix) and isinstance(value, int | float)
    }


def _values(lines: Sequence[dict[str, float]], name: str) -> list[float]:
    return [line[name] for line in lines if name in line]


def format_value(name: str, value: float) -> str:
    """A metric for a table.

    >>> format_value('loss', 0.123456), format_value('images_per_second', 12345.6)
    ('0.1235', '12,346')
    >>> format_value('accuracy', 0.98765), format_value('data_wait', 0.0123)
    ('98.77%', '1.23%')
    """
    if is_share(name):
        return f'{value:.2%}'
    if isinstance(value, int) or abs(value) >= 1000:
        return f'{value:,.0f}'
    return f'{value:.4g}'


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """By dotted keys; a group that is empty is none."""
    return {key: value for key, value in flatten(config) if value != {}}


def _value(config: dict[str, Any], key: str) -> str:
    return code(json.dumps(config[key])) if key in config else NONE
