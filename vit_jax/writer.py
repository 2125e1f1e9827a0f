"""Where metrics go: `metrics.jsonl`, TensorBoard, Weights & Biases, the terminal.

Of several processes, the first one writes and speaks for all.
"""

import contextlib
import json
import os
import pathlib
import statistics
import sys
import uuid
from collections.abc import Sequence
from typing import Any

import jax
import tqdm

from vit_jax.errors import UserError, reason


class MetricWriter:
    """Appends to `metrics.jsonl`, one JSON object a line, and to trackers.

    What a previous run of the workdir wrote past `start_step`, it is going to
    compute again: those lines are dropped. Of several processes, the first writes.

    Args:
      workdir: the run's folder.
      start_step: the step that this run starts from.
      tensorboard: whether to write event files too.
      wandb: the project of Weights & Biases to report to as well, or None.

    Raises:
      UserError: when `wandb` is asked for and not installed, or does not start.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        start_step: int,
        tensorboard: bool,
        wandb: str | None = None,
    ):
        self._file = self._events = self._tracker = None
        if jax.process_index() != 0:
            return
        path = workdir / 'metrics.jsonl'
        _keep_until(path, start_step)
        self._tracker = _start_wandb(wandb, workdir) if wandb else None
        self._file = path.open('a')
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(workdir), purge_step=start_step + 1)

    def __enter__(self) -> 'MetricWriter':
        return self

    def __exit__(self, *exc_info: object) -> None:
        for target in (self._file, self._events):
            if target:
                target.close()
        if self._tracker:
            self._tracker.finish()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Writes the metrics of a step, through to the disk."""
        if self._file:
            self._file.write(json.dumps({'step': step, **metrics}) + '\n')
            self._file.flush()
        if self._events:
            for name, value in metrics.items():
                self._events.add_scalar(name, value, step)
            self._events.flush()
        if self._tracker:
            self._tracker.log(metrics, step=step)


def read_metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
    """The lines of a run's `metrics.jsonl`; a line cut off by a crash is left out."""
    return read_whole_lines(workdir / 'metrics.jsonl')


def read_whole_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file up to one that was cut off; none if it is not there."""
    lines: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            found = json.loads(line)
        except ValueError:  # no JSON, or no text
            break
        if not isinstance(found, dict):
            break
        lines.append(found)
    return lines


def read_evaluations(workdir: pathlib.Path) -> dict[int, dict[str, float]]:
    """Step -> metrics of its evaluation, from a run's `metrics.jsonl`."""
    return {
        int(line['step']): {
            name.removeprefix('eval/'): value
            for name, value in line.items()
            if name != 'step'
        }
        for line in read_metrics(workdir)
        if 'eval/loss' in line
    }


def _start_wandb(project: str, workdir: pathlib.Path) -> Any:
    """A run of Weights & Biases that goes on where the workdir's was."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            'config.log.wandb needs wandb, which is not installed: pip install wandb'
        ) from error
    config = json.loads((workdir / 'config.json').read_text())
    # Of this run, not of its path, at which another run may have been before.
    file = workdir / 'wandb_id'
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:12])
    try:
        return wandb.init(
            project=project,
            name=workdir.name,
            id=file.read_text().strip(),
            resume='allow',
            dir=workdir,
            config=config,
        )
    except wandb.errors.Error as error:
        raise UserError(f'Weights & Biases does not start: {reason(error)}') from error


def _keep_until(path: pathlib.Path, step: int) -> None:
    kept = [line for line in read_metrics(path.parent) if line['step'] <= step]
    temporary = path.with_suffix('.tmp')
    temporary.write_text(''.join(json.dumps(line) + '\n' for line in kept))
    os.replace(temporary, path)


class Progress:
    """A bar with the time left on a terminal, lines elsewhere; always on stderr.

    Of several processes, the first shows it.

    Args:
      start_step: steps made before.
      num_steps: steps in all.
    """

    def __init__(self, start_step: int, num_steps: int):
        stream = sys.stderr
        self._num_steps = num_steps
        self._speaks = jax.process_index() == 0
        self._said: set[str] = set()
        self._bar = tqdm.tqdm(
            initial=start_step,
            total=num_steps,
            unit='step',
            file=stream,
            disable=not (stream.isatty() and self._speaks),
        )

    def __enter__(self) -> 'Progress':
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.close()

    def advance(self, steps: int = 1) -> None:
        self._bar.update(steps)

    def train(
        self, step: int, metrics: dict[str, float], rates: dict[str, float]
    ) -> None:
        """Shows the latest training metrics."""
        if self._bar.disable:
            text = format_metrics(metrics | rates)
            self.say(f'step {step}/{self._num_steps}  {text}')
        else:
            self._bar.set_postfix_str(format_metrics(metrics))

    def say(self, message: str) -> None:
        """Prints a line above the bar."""
        if not self._bar.disable:
            self._bar.write(message, file=sys.stderr)
        elif self._speaks:
            # Whoever listened may be gone; the run is not over for that.
            with contextlib.suppress(BrokenPipeError):
                print(message, file=sys.stderr, flush=True)

    def say_once(self, kind: str, message: str | None) -> None:
        """Prints the first message of a kind; None is none."""
        if message and kind not in self._said:
            self._said.add(kind)
            self.say(message)


def format_spread(results: Sequence[dict[str, float]]) -> str:
    """Mean and standard deviation of each metric over runs, in one line.

    >>> format_spread([{'loss': 0.5, 'accuracy': x} for x in (0.97, 0.98, 0.99)])
    'loss 0.5 ± 0  accuracy 98.00% ± 1.00%'
    """
    texts = []
    for name in results[0]:
        values = [float(result[name]) for result in results]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        mean = format_metrics({name: statistics.mean(values)})
        texts.append(f'{mean} ± {format_metrics({name: spread}).split()[-1]}')
    return '  '.join(texts)


def format_metrics(metrics: dict[str, float]) -> str:
    """Metrics in one line, accuracies in per cent, counts in full.

    >>> format_metrics({'loss': 0.123456, 'accuracy': 0.98765, 'examples': 50_000})
    'loss 0.1235  accuracy 98.77%  examples 50,000'
    """

    def text(name: str, value: float) -> str:
        if isinstance(value, int):
            return f'{value:,}'
        return f'{100 * value:.2f}%' if 'accuracy' in name else f'{value:.4g}'

    return '  '.join(f'{name} {text(name, value)}' for name, value in metrics.items())
