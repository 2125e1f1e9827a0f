"""SIGTERM and SIGINT: a request to save and stop, between two steps."""

import contextlib
import itertools
import os
import signal
import threading
import types
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

_polls = itertools.count(1)


class StopSignals:
    """Remembers that the process was asked to stop, while it is entered.

    The first SIGTERM (clusters send it before they take a machine away) or SIGINT
    (Ctrl-C) is remembered; the second one acts at once, as it would without this.
    """

    def __init__(self) -> None:
        self.asked = False
        self._interrupting = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> 'StopSignals':
        # Only the main thread may have handlers; elsewhere nobody sends us signals.
        if threading.current_thread() is threading.main_thread():
            # Of several processes, JAX's own service hears SIGTERM: they must agree
            # on the step to stop at.
            several = jax.process_count() > 1
            for number in (signal.SIGINT, *([] if several else [signal.SIGTERM])):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._restore()

    def _remember(self, number: int, frame: types.FrameType | None) -> None:
        self.asked = True
        self._restore()
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # tells all the processes
        elif self._interrupting:
            raise KeyboardInterrupt

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def stop(self) -> bool:
        """Whether training stops after this step; on all processes alike."""
        if jax.process_count() > 1:
            # They agree on a number of ours that grows by one each time, as a step of
            # several does not.
            return multihost_utils.reached_preemption_sync_point(next(_polls))
        return self.asked

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Where the first signal raises KeyboardInterrupt, of a single process.

        For what may wait for ever, such as data that does not come. Raises at once
        where the signal has come before.
        """
        if self.asked and jax.process_count() == 1:
            raise KeyboardInterrupt
        self._interrupting = True
        try:
            yield
        finally:
            self._interrupting = False
