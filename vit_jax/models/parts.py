"""Parts of a model, chosen by a short name or brought by a fork."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import flax.linen as nn

from vit_jax.errors import UserError, unknown


def make_part(
    kind: str,
    choice: str | Callable[..., nn.Module],
    table: Mapping[str, Callable[..., nn.Module]],
    kwargs: Mapping[str, Any] | None = None,
    *,
    owned: Collection[str] = (),
) -> Callable[..., nn.Module]:
    """What makes the module of that name, some of its fields given.

    Args:
      kind: what the part is, for the errors.
      choice: a name of `table`, or what makes the module.
      table: the names.
      kwargs: fields of the module.
      owned: fields that the model sets, so that `kwargs` may not.

    Raises:
      UserError: for an unknown name or field; offers the nearest.

    >>> make_part('layer', 'dense', {'dense': nn.Dense}, {'features': 3})().features
    3
    """
    make = choice
    if isinstance(choice, str):
        if choice not in table:
            raise unknown(kind, choice, table)
        make = table[choice]
    if not callable(make) or not isinstance(kwargs or {}, Mapping):
        raise UserError(
            f'{kind} is a name ({", ".join(table)}) or a callable, and its fields are '
            f'a mapping; got {choice!r} and {kwargs!r}'
        )
    for field in kwargs or {}:
        if field in owned:
            raise UserError(f'{field} of {kind} {choice!r} is set by the model')
    module = make.func if isinstance(make, partial) else make
    if dataclasses.is_dataclass(module):
        known = {f.name for f in dataclasses.fields(module)} - {'parent', 'name'}
        for field in kwargs or {}:
            if field not in known:
                raise unknown(f'field of {kind} {choice!r}', field, known)
    return partial(make, **(kwargs or {}))
