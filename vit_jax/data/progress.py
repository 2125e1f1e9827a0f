"""How far a long preparation is, and bytes and times for people."""

import sys
import threading
import time

import tqdm

_EVERY_SECONDS = 30


class Progress:
    """A bar with the time left on a terminal, a line now and then elsewhere; on stderr.

    Args:
      what: is done.
      total: of bytes or files.
      start: of them that were done before.
      unit: 'B' for bytes.
    """

    def __init__(self, what: str, total: int, start: int = 0, unit: str = 'B'):
        self._what, self._unit = what, unit
        self._start, self._count, self._total = start, start, total
        self._began = self._told = time.monotonic()
        self._lock = threading.Lock()
        self._bar = tqdm.tqdm(
            desc=what,
            initial=start,
            total=total,
            unit=unit,
            unit_scale=unit == 'B',
            file=sys.stderr,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> 'Progress':
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.close()

    def advance(self, count: int = 1) -> None:
        """Counts on; from any thread."""
        with self._lock:
            self._count += count
            self._bar.update(count)
            now = time.monotonic()
            if self._bar.disable and now - self._told >= _EVERY_SECONDS:
                self._told = now
                print(self._line(now), file=sys.stderr, flush=True)

    def _line(self, now: float) -> str:
        done = max(self._count - self._start, 1)
        left = (now - self._began) * (self._total - self._count) / done
        if self._unit == 'B':
            numbers = f'{size(self._count)} of {size(self._total)}'
        else:
            numbers = f'{self._count:,} of {self._total:,} {self._unit}s'
        return f'{self._what}: {numbers}, {duration(left)} left'


def size(count: float) -> str:
    """A number of bytes for people.

    >>> size(147_897_477_120)
    '148GB'
    """
    return tqdm.tqdm.format_sizeof(count, 'B')


def duration(seconds: float) -> str:
    """A time for people.

    >>> duration(42), duration(600), duration(9000)
    ('42 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f'{seconds:.0f} s'
    if seconds < 90 * 60:
        return f'{seconds / 60:.0f} min'
    return f'{seconds / 3600:.1f} h'
