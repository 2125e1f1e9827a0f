"""SIGTERM and SIGINT: a request to save and stop, between two steps."""

import os
import signal
import threading
import types

import jax
from jax.experimental import multihost_utils


class StopSignals:
    """Remembers that the process was asked to stop, while it is entered.

    The first SIGTERM (clusters send it before they take a machine away) or SIGINT
    (Ctrl-C) is remembered; the second one acts at once, as it would without this.
    """

    def __init__(self) -> None:
        self._asked = False
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
        self._asked = True
        self._restore()
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # tells all the processes

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def stop_after(self, step: int) -> bool:
        """Whether training stops after this step; on all processes alike."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked
