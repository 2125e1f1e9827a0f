"""Files that others wrote: what is wrong with one, always told in one line."""

import contextlib
import errno
from collections.abc import Iterable, Iterator
from typing import Any

from vit_jax.errors import UserError, reason, some


@contextlib.contextmanager
def reading(what: object) -> Iterator[None]:
    """Turns whatever goes wrong into a `UserError` about `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the readers raise whatever damage leads them to
        # A damaged zip archive sends its reader to before the start of the file.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise UserError(f'cannot read {what}: {reason(error)}') from error
        raise UserError(
            f'{what} is damaged or cut off ({reason(error)}); download or copy it again'
        ) from error


def listed(names: Iterable[Any]) -> str:
    r"""The first of the names in a file, whatever they are.

    >>> listed(['a\nb', *range(9)])
    'a b, 0, 1, 2, 3, 4, 5, 6 and 2 more'
    """
    return some([' '.join(str(name).split())[:80] for name in names], 8)
