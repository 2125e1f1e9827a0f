"""What a research fork brings, named by its dotted path."""

import importlib
from typing import Any

from vit_jax.errors import UserError


def is_path(name: Any) -> bool:
    """Whether a name is a path 'package.module:name' rather than one of ours."""
    return isinstance(name, str) and ':' in name


def import_path(path: str) -> Any:
    """The object that 'package.module:name' names, or the module 'package.module'.

    Raises:
      UserError: when the module or the name in it does not exist.

    >>> import_path('math:pi')
    3.141592653589793
    """
    module_name, _, attribute = path.partition(':')
    try:
        module = importlib.import_module(module_name)
    except (ModuleNotFoundError, ValueError, TypeError) as error:
        raise UserError(f'cannot import {path!r}: {error}') from error
    if not attribute:
        return module
    if not hasattr(module, attribute):
        raise UserError(f'module {module_name!r} has no {attribute!r} (from {path!r})')
    return getattr(module, attribute)
