"""Processes on this host that work together: started, watched, ended together.

When one dies, jaxlib aborts the others in C++, but only after the heartbeat's time-out
and with much noise; whoever started them knows at once, and says it in a line.
"""

import contextlib
import importlib.util
import os
import pkgutil
import re
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from vit_jax import cluster
from vit_jax.errors import UserError

# How long a line is held back: when a process dies, what the others then say of it
# reaches us before the news of its death.
HOLD_SECONDS = 0.5
# How long the others get, to fail by the same mistake; and to end, when told to.
SAME_SECONDS, STOP_SECONDS = 10.0, 3.0
# What jaxlib prints of a CPU's collectives, and of SIGTERM. Gloo writes its sentence in
# pieces, from several threads: a line may hold some of them, in any order.
NOISE = re.compile(
    rb'^(\[Gloo\] Rank|is connected to|peer ranks\.'
    rb'|Expected number of connected peer ranks is|[\s\d:])*$'
    rb'|preemption_notifier\.cc'
)
LAST_WORDS = re.compile(rb'vit_jax: (error: |stopped )')


def run_local(
    command: Sequence[str],
    num_processes: int,
    devices_per_process: int | None = None,
    verbose: bool = False,
) -> int:
    """Runs a command in processes on this host, and watches them.

    SIGTERM, SIGINT and SIGHUP (the terminal is closed) are passed on as SIGTERM; the
    second one kills.

    Args:
      command: words of the command line, without `vit_jax`.
      num_processes: how many.
      devices_per_process: see `environments`.
      verbose: whether to print what the others say once one has died.

    Returns:
      0 when all ended with 0, else the exit code of the first that did not, as
      shells count: 128 + n where signal n killed it.
    """
    address = f'127.0.0.1:{cluster.free_port()}'
    environs = environments(
        os.environ, num_processes, devices_per_process, address, count_gpus(os.environ)
    )
    processes = [
        subprocess.Popen(
            [sys.executable, '-m', 'vit_jax.main', *command],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=None if i == 0 else subprocess.DEVNULL,  # results are printed once
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches us alone
        )
        for i, environ in enumerate(environs)
    ]
    watch = Watch(processes, command[0], verbose)
    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup sets it
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, watch.take_signal) for number in numbers}
    try:
        return watch.run()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        watch.kill()


def environments(
    environ: Mapping[str, str],
    num_processes: int,
    devices_per_process: int | None,
    address: str,
    gpus: Sequence[str] = (),
) -> list[dict[str, str]]:
    """The environment of each process.

    Args:
      environ: this process's.
      num_processes: how many.
      devices_per_process: GPUs, or virtual devices on a CPU; None for an even share of
        the GPUs, or for as many as XLA_FLAGS say.
      address: 'HOST:PORT' of process 0.
      gpus: names of those there are, as CUDA_VISIBLE_DEVICES takes them.

    Raises:
      UserError: when there are too few GPUs.
    """
    result = []
    count = devices_per_process or len(gpus) // num_processes
    if gpus and (count == 0 or count * num_processes > len(gpus)):
        raise UserError(
            f'{num_processes} processes need {max(count, 1) * num_processes} GPUs, '
            f'there are {len(gpus)}; JAX_PLATFORMS=cpu uses none'
        )
    for i in range(num_processes):
        own = {**environ, **cluster.environment(address, num_processes, i)}
        own.pop('JAX_LOCAL_DEVICE_IDS', None)
        if gpus:
            own['CUDA_VISIBLE_DEVICES'] = ','.join(gpus[i * count : (i + 1) * count])
        elif devices_per_process:
            flag = '--xla_force_host_platform_device_count'
            flags = re.sub(rf'{flag}=\d+', '', environ.get('XLA_FLAGS', '')).split()
            own['XLA_FLAGS'] = ' '.join([*flags, f'{flag}={devices_per_process}'])
        result.append(own)
    return result


def count_gpus(environ: Mapping[str, str]) -> list[str]:
    """Names of the GPUs that JAX would see here."""
    platforms = environ.get('JAX_PLATFORMS') or 'cuda'
    if not {'cuda', 'gpu'} & set(platforms.split(',')):
        return []
    if not _has_cuda_plugin():
        return []
    visible = cluster.visible_gpus(environ)
    if visible is not None:
        return visible
    if not shutil.which('nvidia-smi'):
        return []
    listed = subprocess.run(['nvidia-smi', '-L'], capture_output=True, text=True)
    return [str(i) for i in range(len(re.findall(r'^GPU ', listed.stdout, re.M)))]


def _has_cuda_plugin() -> bool:
    """Whether JAX can use NVIDIA's GPUs; without importing it."""
    plugins = importlib.util.find_spec('jax_plugins')
    paths = plugins and plugins.submodule_search_locations
    return any('cuda' in module.name for module in pkgutil.iter_modules(paths or []))


class Watch:
    """Passes on what processes say, until all have ended or one has died.

    Args:
      processes: with stderr piped.
      command: what they run, for messages.
      verbose: see `run_local`.
    """

    def __init__(
        self, processes: Sequence[subprocess.Popen], command: str, verbose: bool
    ):
        self._processes = processes
        self._command = command
        self._verbose = verbose
        self._signals: list[int] = []
        self._selector = selectors.DefaultSelector()
        self._partial = [b''] * len(processes)
        self._held: list[tuple[float, int, bytes]] = []  # time, process, line
        self._said: set[bytes] = set()  # by process 0
        for i, process in enumerate(processes):
            assert process.stderr is not None
            os.set_blocking(process.stderr.fileno(), False)
            self._selector.register(process.stderr, selectors.EVENT_READ, i)

    def take_signal(self, number: int, frame: Any) -> None:
        """A handler of signals that end a process."""
        # A terminal that is closed says so twice: by its shell, and by the kernel.
        if number != signal.SIGHUP or not self._signals:
            self._signals.append(number)

    def run(self) -> int:
        """Watches; returns the exit code of `run_local`."""
        told = False
        while True:
            self._read(0.05)
            codes = [process.poll() for process in self._processes]
            if any(codes):
                return self._end(codes)
            if all(code == 0 for code in codes):
                self._read(0)
                self._print(self._held)
                return 0
            self._print_older(HOLD_SECONDS)
            if len(self._signals) > 1:
                self.kill()
                return 128 + self._signals[-1]
            if self._signals and not told:
                told = True
                _say('the processes save and end; the next signal kills them')
                self._send(signal.SIGTERM)

    def kill(self) -> None:
        """Ends all processes, and those that they started."""
        self._send(signal.SIGKILL)
        for process in self._processes:
            process.wait()

    def _end(self, codes: Sequence[int | None]) -> int:
        """Tells why, when a process has failed, and ends the others."""
        first = first_failed(codes, [self._last(i) for i in range(len(codes))])
        code = codes[first]
        assert code is not None
        if code > 0:  # a mistake of the user's is found by all, if not at once
            codes = self._wait(SAME_SECONDS)
        self._read(0)
        # jaxlib aborts those that were still about to say it.
        alike = all(other in (code, -signal.SIGABRT) for other in codes)
        said = codes[0] == code and self._last(first) == self._last(0)
        if code > 0 and alike and said:
            self._print([item for item in self._held if item[1] == 0 or self._verbose])
            return code
        held, self._held = self._held, []
        self._print([item for item in held if item[1] == first or self._verbose])
        if not self._signals:
            _say(
                f'process {first} of {len(codes)} {how_it_ended(code)}; the others are '
                'stopped'
            )
        self._send(signal.SIGTERM)
        self._wait(STOP_SECONDS)
        self.kill()
        self._read(0)
        if self._verbose:
            self._print(self._held)
        if not self._signals:
            _say(
                'the same command goes on from the last checkpoint'
                if self._command == 'train'
                else 'the same command starts it again'
            )
        return code if code > 0 else 128 - code

    def _last(self, index: int) -> bytes:
        """The last line that a process said, of those not printed yet."""
        return next((line for _, i, line in reversed(self._held) if i == index), b'')

    def _wait(self, seconds: float) -> list[int | None]:
        """Until all have ended, or the time is over, or a signal comes."""
        end, signals = time.monotonic() + seconds, len(self._signals)
        while time.monotonic() < end and len(self._signals) == signals:
            self._read(0.05)
            if all(process.poll() is not None for process in self._processes):
                break
        return [process.poll() for process in self._processes]

    def _send(self, number: int) -> None:
        for process in self._processes:
            # A group outlives its leader: workers that decode, of one that was killed.
            try:
                if number == signal.SIGKILL:
                    os.killpg(process.pid, number)
                elif process.poll() is None:
                    process.send_signal(number)
            except ProcessLookupError:
                pass

    def _read(self, timeout: float) -> None:
        """Takes what the processes have said, whole lines of it."""
        if not self._selector.get_map():  # all have closed it
            time.sleep(timeout)
        for key, _ in self._selector.select(timeout):
            i, now = key.data, time.monotonic()
            data = os.read(key.fd, 1 << 16)
            if not data:
                self._selector.unregister(key.fileobj)
            *lines, rest = (self._partial[i] + data).split(b'\n')
            self._partial[i] = rest
            if rest and not data:
                lines, self._partial[i] = [rest], b''
            self._held += [(now, i, line) for line in lines]

    def _print_older(self, seconds: float) -> None:
        before = time.monotonic() - seconds
        # Last words are held back until all have said them, or ended.
        old = [
            item
            for item in self._held
            if item[0] < before and not LAST_WORDS.match(item[2])
        ]
        self._held = [item for item in self._held if item not in old]
        self._print(old)

    def _print(self, items: Sequence[tuple[float, int, bytes]]) -> None:
        """Lines of process 0 as they are, of others with its number and if new."""
        self._said.update(line for _, i, line in [*items, *self._held] if i == 0)
        for _, i, line in items:
            if NOISE.search(line) and not self._verbose:
                continue
            if i > 0:
                if line in self._said:
                    continue
                line = f'[{i}] '.encode() + line
            _write(line)


def first_failed(codes: Sequence[int | None], last: Sequence[bytes]) -> int:
    """Whose failure the others' follow from, where several are seen at once.

    Args:
      codes: of each process, as `Popen.poll` tells them.
      last: what each said last.

    >>> first_failed([-6, 1, 0], [b'', b'', b''])
    1
    """

    def order(i: int) -> int:
        code = codes[i]
        if not code:
            return 4
        if code == -signal.SIGABRT:  # as jaxlib ends those that another has left
            return 3
        return 0 if code < 0 else 1 if LAST_WORDS.match(last[i]) else 2

    return min(range(len(codes)), key=order)


def how_it_ended(code: int) -> str:
    """What an exit code of `Popen.poll` says.

    >>> how_it_ended(-15)
    'died by SIGTERM'
    """
    if code > 0:
        return f'ended with exit code {code}'
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f'signal {-code}'
    hint = ' (out of memory?)' if name == 'SIGKILL' else ''
    return f'died by {name}{hint}'


def _say(text: str) -> None:
    _write(f'vit_jax launch: {text}'.encode())


def _write(line: bytes) -> None:
    with contextlib.suppress(OSError):  # the terminal is closed, the processes go on
        sys.stderr.buffer.write(line + b'\n')
        sys.stderr.buffer.flush()
