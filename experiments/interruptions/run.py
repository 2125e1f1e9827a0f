"""A day on a cluster in five minutes: one run, killed at twenty moments.

A small ConViT trains on digits. The process is killed (SIGKILL) or asked to stop
(SIGTERM) while it starts, trains, evaluates and saves, each time is started again by
the same command, and in the end has the parameters and the optimizer of a run that was
left alone, bit for bit.

  python experiments/interruptions/run.py --workdir=/tmp/interruptions

What happened when is seen from outside: in the workdir's files.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import numpy as np

from vit_jax.build import build
from vit_jax.checkpoint import Checkpoints, shapes_on
from vit_jax.config import load_config, override

CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / 'digits_convit.py'
STEPS, EVALUATE_EVERY, SAVE_EVERY = 1200, 30, 20
OVERRIDES = [
    f'--config.num_steps={STEPS}',
    f'--config.eval.every_steps={EVALUATE_EVERY}',
    f'--config.checkpoint.every_steps={SAVE_EVERY}',
    '--config.log.every_steps=10',
    '--config.log.tensorboard=False',
    '--config.batch_size=16',
    '--config.model.kwargs.depth=2',
    '--config.model.kwargs.num_local_layers=1',
    '--config.model.kwargs.width=32',
    '--config.model.kwargs.drop_path_rate=0.1',
    '--config.optim.ema_decay=0.99',
]
SECONDS = 120  # until a phase must have come


def is_starting(workdir: pathlib.Path) -> bool:
    return not saved_steps(workdir)


def is_training(workdir: pathlib.Path) -> bool:
    return bool(saved_steps(workdir))


def is_evaluating(workdir: pathlib.Path) -> bool:
    """The last line of metrics is of training, at a step that is evaluated."""
    file = workdir / 'metrics.jsonl'
    lines = file.read_text().splitlines() if file.exists() else []
    try:
        line = json.loads(lines[-1]) if lines else {}
    except json.JSONDecodeError:  # half written
        return False
    return 'train/loss' in line and line['step'] % EVALUATE_EVERY == 0


def is_saving(workdir: pathlib.Path) -> bool:
    """A checkpoint is there under its temporary name.

    What an earlier process left so is gone before the first step of the next.
    """
    return bool(list((workdir / 'checkpoints').glob('*.orbax-checkpoint-tmp*')))


def saved_steps(workdir: pathlib.Path) -> list[int]:
    names = [path.name for path in (workdir / 'checkpoints').glob('*')]
    return sorted(int(name) for name in names if name.isdecimal())


KILL, TERM = signal.SIGKILL, signal.SIGTERM
# (phase, whether it is on, signal, most seconds to wait after it has come).
MOMENTS: list[tuple[str, Callable[[pathlib.Path], bool], signal.Signals, float]] = [
    *[('before the first save', is_starting, KILL, 8.0)] * 5,
    *[('inside a save', is_saving, KILL, 0.0)] * 4,
    *[('inside a save', is_saving, TERM, 0.0)] * 2,
    *[('during evaluation', is_evaluating, KILL, 0.0)] * 2,
    *[('during evaluation', is_evaluating, TERM, 0.0)] * 1,
    *[('at some moment', is_training, KILL, 6.0)] * 3,
    *[('at some moment', is_training, TERM, 6.0)] * 3,
]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--workdir', required=True, type=pathlib.Path)
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    args = parser.parse_args()
    left_alone, killed = args.workdir / 'left_alone', args.workdir / 'killed'
    for folder in (left_alone, killed):
        shutil.rmtree(folder, ignore_errors=True)
    args.workdir.mkdir(parents=True, exist_ok=True)
    # Most of a start is compiling the same step again.
    cache = {'JAX_COMPILATION_CACHE_DIR': str(args.workdir / 'cache')}
    environment = {**os.environ, **cache}

    start = time.monotonic()
    rng = random.Random(args.seed)
    # The first ones must find no checkpoint; the order of the others is drawn.
    moments = MOMENTS[:5] + rng.sample(MOMENTS[5:], len(MOMENTS) - 5)
    lines = ['| | phase | signal | exit code | saved steps |', '| --- ' * 5 + '|']
    for number, (phase, is_on, which, delay) in enumerate(moments, start=1):
        in_time = False
        while not in_time:  # a kill that came too late is one more, and does not count
            if is_on is is_starting:
                shutil.rmtree(killed, ignore_errors=True)
            code, in_time = interrupt(
                killed, is_on, which, rng.uniform(0, delay), environment
            )
        newest = saved_steps(killed)[-2:]
        expected = 0 if which is TERM else -KILL
        if code != expected:
            print(f'exit code {code}, expected {expected}', file=sys.stderr)
            return 1
        lines.append(f'| {number} | {phase} | {which.name} | {code} | {newest} |')
        print(lines[-1], flush=True)

    for workdir in (killed, left_alone):
        subprocess.run(
            command(workdir), check=True, stderr=subprocess.DEVNULL, env=environment
        )
    differing = compare(left_alone, killed)
    verdict = 'bit-equal' if not differing else f'differ in {", ".join(differing)}'
    lines += ['', f'After step {STEPS}, parameters and optimizer: {verdict}.']
    print('\n'.join(lines[-2:]))
    print(f'{time.monotonic() - start:.0f} s in all')
    (pathlib.Path(__file__).parent / 'table.md').write_text('\n'.join(lines) + '\n')
    return int(bool(differing))


def command(workdir: pathlib.Path) -> list[str]:
    name = [sys.executable, '-m', 'vit_jax.main', 'train', f'--config={CONFIG}']
    return [*name, f'--workdir={workdir}', *OVERRIDES]


def interrupt(
    workdir: pathlib.Path,
    is_on: Callable[[pathlib.Path], bool],
    which: signal.Signals,
    delay: float,
    environment: dict[str, str],
) -> tuple[int, bool]:
    """Starts the run and sends the signal in the phase.

    Returns:
      The exit code, and whether the signal came before the phase was over.
    """
    said = workdir.with_suffix('.stderr')
    with said.open('w') as stderr:
        process = subprocess.Popen(command(workdir), stderr=stderr, env=environment)
    deadline = time.monotonic() + SECONDS
    began = is_on is is_starting
    while not (began and is_on(workdir)):
        began = began or 'first step, compiled' in said.read_text()  # now it trains
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise SystemExit(f'the phase never came; the run said: {said.read_text()}')
        time.sleep(0.0005)
    time.sleep(delay)
    process.send_signal(which)
    code = process.wait()
    # Of a process that was killed, the files tell whether the phase went on till then.
    return code, which is TERM or is_on(workdir)


def compare(left: pathlib.Path, right: pathlib.Path) -> list[str]:
    """Paths of the leaves of the final states that are not bit-equal."""
    run = build(override(load_config(str(CONFIG)), OVERRIDES))
    like = shapes_on(run.parallel.replicated, run.state_shape)
    states = []
    for workdir in (left, right):
        with Checkpoints(workdir, read_only=True) as checkpoints:
            restored = checkpoints.restore_latest(like)
        assert restored is not None
        assert restored.step == STEPS
        states.append(jax.tree_util.tree_leaves_with_path(restored.state))
    return [
        jax.tree_util.keystr(path, simple=True, separator='/')
        for (path, x), (_, y) in zip(*states, strict=True)
        if np.asarray(x).tobytes() != np.asarray(y).tobytes()
    ]


if __name__ == '__main__':
    sys.exit(main())
