"""Commands side by side, each on its own share of this machine's devices."""

import os
import pathlib
import queue
import signal
import subprocess
import threading
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from typing import NamedTuple

from vit_jax.errors import UserError


class Job(NamedTuple):
    """A command, and the file that what it says is added to."""

    command: Sequence[str]
    log: pathlib.Path


class Share(NamedTuple):
    """What a job may use.

    Attributes:
      cpus: cores.
      environ: variables to be set, such as CUDA_VISIBLE_DEVICES.
    """

    cpus: frozenset[int]
    environ: Mapping[str, str]


def available_cpus() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def shares(num_jobs: int, cpus: Sequence[int], gpus: Sequence[str] = ()) -> list[Share]:
    """Cores, and GPUs where there are some, dealt out evenly.

    Raises:
      UserError: when there is less than one for each job.

    >>> shares(2, range(5))[1].cpus
    frozenset({1, 3})
    >>> shares(2, range(4), ['0', '1', '2'])[0].environ
    {'CUDA_VISIBLE_DEVICES': '0,2'}
    """
    count, what = (len(gpus), 'GPUs') if gpus else (len(cpus), 'CPU cores')
    if num_jobs > count:
        raise UserError(f'{num_jobs} jobs have not one each of {count} {what}')
    dealt = []
    for i in range(num_jobs):
        environ = {'CUDA_VISIBLE_DEVICES': ','.join(gpus[i::num_jobs])} if gpus else {}
        # More jobs than cores share all of them.
        own = cpus[i::num_jobs] if num_jobs <= len(cpus) else cpus
        dealt.append(Share(frozenset(own), environ))
    return dealt


def run_jobs(
    jobs: Sequence[Job], dealt: Sequence[Share]
) -> Generator[tuple[int, int], None, None]:
    """Runs as many jobs at a time as there are shares.

    A signal to end, or the caller's not going on, ends those that run by SIGTERM, and
    waits for them; KeyboardInterrupt while it waits kills them.

    Yields:
      The number of a job, and its exit code, as they end.
    """
    free: queue.SimpleQueue[Share] = queue.SimpleQueue()
    for share in dealt:
        free.put(share)
    running: set[subprocess.Popen] = set()
    ending = False
    lock = threading.Lock()  # of the two: no process starts when others were told

    def start(job: Job, share: Share) -> subprocess.Popen | None:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open('a') as log, lock:
            if ending:
                return None
            process = subprocess.Popen(
                job.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **share.environ},
                # Ctrl-C reaches us alone: a second signal would end them unsaved.
                start_new_session=True,
            )
            running.add(process)
        return process

    def run(job: Job) -> int:
        share = free.get()
        try:
            if hasattr(os, 'sched_setaffinity'):  # not everywhere
                # Of this thread alone, and of the process that it starts.
                os.sched_setaffinity(0, share.cpus)
            process = start(job, share)
            if process is None:
                return -signal.SIGTERM
            code = process.wait()
            with lock:
                running.remove(process)
            return code
        finally:
            free.put(share)

    with ThreadPoolExecutor(len(dealt)) as pool:
        futures = {pool.submit(run, job): i for i, job in enumerate(jobs)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            for future in futures:
                future.cancel()
            with lock:
                ending = True
                for process in running:
                    process.terminate()
            try:
                wait(futures)
            except KeyboardInterrupt:
                with lock:
                    for process in running:
                        process.kill()
                raise
