"""Where metrics go: `metrics.jsonl`, TensorBoard events, the terminal."""

import json
import os
import pathlib
import sys

import tqdm


class MetricWriter:
    """Appends to `metrics.jsonl`, one JSON object a line, and to TensorBoard.

    What a previous run of the workdir wrote past `start_step`, it is going to
    compute again: those lines are dropped.

    Args:
      workdir: the run's folder.
      start_step: the step that this run starts from.
      tensorboard: whether to write event files too.
    """

    def __init__(self, workdir: pathlib.Path, start_step: int, tensorboard: bool):
        path = workdir / 'metrics.jsonl'
        _keep_until(path, start_step)
        self._file = path.open('a')
        self._events = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(workdir), purge_step=start_step + 1)

    def __enter__(self) -> 'MetricWriter':
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()
        if self._events:
            self._events.close()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Writes the metrics of a step, through to the disk."""
        self._file.write(json.dumps({'step': step, **metrics}) + '\n')
        self._file.flush()
        if self._events:
            for name, value in metrics.items():
                self._events.add_scalar(name, value, step)
            self._events.flush()


def read_metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
    """The lines of a run's `metrics.jsonl`; a line cut off by a crash is left out."""
    path = workdir / 'metrics.jsonl'
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def _keep_until(path: pathlib.Path, step: int) -> None:
    kept = [line for line in read_metrics(path.parent) if line['step'] <= step]
    temporary = path.with_suffix('.tmp')
    temporary.write_text(''.join(json.dumps(line) + '\n' for line in kept))
    os.replace(temporary, path)


class Progress:
    """A bar with the time left on a terminal, lines elsewhere; always on stderr.

    Args:
      start_step: steps made before.
      num_steps: steps in all.
    """

    def __init__(self, start_step: int, num_steps: int):
        stream = sys.stderr
        self._num_steps = num_steps
        self._bar = tqdm.tqdm(
            initial=start_step,
            total=num_steps,
            unit='step',
            file=stream,
            disable=not stream.isatty(),
        )

    def __enter__(self) -> 'Progress':
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.close()

    def advance(self) -> None:
        self._bar.update()

    def train(
        self, step: int, metrics: dict[str, float], rates: dict[str, float]
    ) -> None:
        """Shows the latest training metrics."""
        text = format_metrics(metrics)
        if self._bar.disable:
            speed = format_metrics(rates)
            self.say(f'step {step}/{self._num_steps}  {text}  {speed}')
        else:
            self._bar.set_postfix_str(text)

    def say(self, message: str) -> None:
        """Prints a line above the bar."""
        if self._bar.disable:
            print(message, file=sys.stderr, flush=True)
        else:
            self._bar.write(message, file=sys.stderr)


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
