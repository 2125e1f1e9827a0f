"""Faults of whoever makes the batches: a hang is told, a dead process is an error."""

import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from vit_jax.errors import UserError

log = logging.getLogger(__name__)

LOADER = 'resident-load'  # threads that decode what goes to the device

# How grain names the threads that read, and the processes.
_THREAD_PREFIXES = ('grain-prefetch', LOADER)
_PROCESS_PREFIX = 'grain-process-prefetch'


class Watch(Iterator):
    """An iterator that says so when the next item takes long, and goes on waiting.

    One thread looks after it, and sleeps. Where the item comes from processes, one of
    them that dies ends the iteration.

    Args:
      iterator: what to watch; its `close`, if any, is called by ours.
      seconds: without an item, after which one line is logged, and again each time
        that they have passed.
      describe: () -> text, where the work stands, for that line.

    Raises:
      UserError: from `next`, when a process that reads has died.
    """

    def __init__(
        self,
        iterator: Iterator,
        seconds: float,
        describe: Callable[[], str] | None = None,
    ):
        self._iterator = iterator
        self._seconds = seconds
        self._describe = describe or where_readers_are
        self._since: float | None = None  # when the wait began that goes on
        self._closed = threading.Event()
        # A daemon: whoever forgets to close it can still leave.
        self._thread = threading.Thread(target=self._look, name='watch', daemon=True)
        self._thread.start()

    def __next__(self) -> Any:
        self._since = time.monotonic()
        try:
            return next(self._iterator)
        except RuntimeError as error:
            code = re.search(r'process was terminated .* exit code (-?\d+)', str(error))
            if code is None:
                raise
            raise _died(int(code[1])) from error
        finally:
            self._since = None

    def close(self) -> None:
        """Stops the watching, and the iterator."""
        self._closed.set()
        self._thread.join()
        getattr(self._iterator, 'close', lambda: None)()
        self._iterator = iter(())  # grain's complain when they outlive their modules

    def _look(self) -> None:
        watched, reports, pause = None, 0, self._seconds
        while not self._closed.wait(pause):
            since, pause = self._since, self._seconds
            if since != watched:
                watched, reports = since, 0
            if since is None:
                continue
            now, due = time.monotonic(), since + (reports + 1) * self._seconds
            if now >= due:
                log.warning(
                    'no batch for %.0f s, still waiting; %s',
                    now - since,
                    self._describe(),
                )
                reports += 1
                due += self._seconds
            pause = max(due - now, 0.0)


def where_readers_are() -> str:
    """Where the threads and processes that read data are, in one line."""
    frames = sys._current_frames()  # the only way to see another thread's stack
    places = [
        f'{thread.name} in {_place(frames[thread.ident])}'
        for thread in threading.enumerate()
        if thread.name.startswith(_THREAD_PREFIXES)
        and thread.ident in frames
        and frames[thread.ident].f_code.co_name != '_worker'  # a pool's: idle
    ]
    processes = [
        str(process.pid)
        for process in multiprocessing.active_children()
        if process.name.startswith(_PROCESS_PREFIX)
    ]
    if processes:
        return f'the processes that read are alive: {", ".join(processes)}'
    return f'readers: {"; ".join(places) or "none is at work"}'


def _place(frame: FrameType) -> str:
    """The innermost calls: 'datasets.py:230 __getitem__ > pathlib.py:1044 open'."""
    calls = traceback.extract_stack(frame)[-3:]
    return ' > '.join(
        f'{os.path.basename(call.filename)}:{call.lineno} {call.name}' for call in calls
    )


def _died(code: int) -> UserError:
    if code == -signal.SIGKILL:
        return UserError(
            'a process that reads data was killed (signal 9): most likely the machine '
            'ran out of memory; use fewer dataset.num_workers or a smaller batch_size'
        )
    how = f'by signal {-code}' if code < 0 else f'with exit code {code}'
    return UserError(
        f'a process that reads data ended {how}; what it said last stands above. With '
        'dataset.num_workers=0 the data is read in this process'
    )
