"""Errors a user can cause, told in one line."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: the message says what was wrong and what would be right.

    The command line prints it as one line and exits with a non-zero code. From
    Python it is a `ValueError`.
    """


def unknown(kind: str, name: str, options: Iterable[str]) -> UserError:
    """The error for a `name` that is none of `options`: offers the nearest one."""
    options = sorted(options)
    folded = {option.lower(): option for option in options}
    near = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    if near:
        nearest = folded[near[0]]
        return UserError(f'unknown {kind} {name!r}; did you mean {nearest!r}?')
    return UserError(f'unknown {kind} {name!r}; choose one of: {", ".join(options)}')


def times(lengths: Iterable[int]) -> str:
    """Lengths of axes as people write them.

    >>> times((4, 9))
    '4x9'
    """
    return 'x'.join(map(str, lengths))


def some(names: Iterable[str], count: int = 3) -> str:
    """The first few of many names, for an error of one line.

    >>> some(['a', 'b', 'c', 'd'])
    'a, b, c and 1 more'
    """
    names = list(names)
    more = f' and {len(names) - count} more' if len(names) > count else ''
    return ', '.join(names[:count]) + more


def reason(error: BaseException) -> str:
    r"""What an error says, whatever a file made it say.

    >>> reason(ValueError('two\nlines'))
    'two lines'
    """
    text = getattr(error, 'strerror', None) or str(error) or type(error).__name__
    return ' '.join(text.split())[:200]


def root_reason(error: BaseException) -> str:
    """What lies at the bottom of an error, in one line."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return reason(error)


class Stopped(Exception):
    """Training was asked to stop, and has saved where it was.

    Attributes:
      step: the last one that was made.
      waiting: whether it waited for data, whose threads may hang.
    """

    def __init__(self, step: int, waiting: bool = False, finished: bool = False):
        after = f'stopped after step {step}, saved; the same command goes on'
        super().__init__(f'finished at step {step}, and stopped' if finished else after)
        self.step = step
        self.waiting = waiting
