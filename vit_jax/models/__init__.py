"""Models by name."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from vit_jax.errors import UserError, unknown
from vit_jax.models.variants import decode_variant, list_variants


def list_models() -> list[str]:
    """The names `build_model` knows; other patch sizes work too ('ViT-B/8')."""
    return list_variants()


def build_model(name: str, num_classes: int | None, **overrides: Any) -> nn.Module:
    """Makes the model of that name.

    Args:
      name: such as 'ConViT-S/16' (see `list_models`), or the path of a callable of
        a fork, 'my_fork.models:MyNet', called with `num_classes` and `overrides`.
      num_classes: size of the logits; None for a model that returns features.
      **overrides: fields of the module. A string 'package.module:name' stands for
        the object of that name, so a config can name a fork's layer.

    Returns:
      An unbound Flax module, for `init` and `apply` on `[B, h, w, channels]`.

    Raises:
      UserError: for an unknown name or field; offers the nearest.

    >>> build_model('ViT-Ti/16', num_classes=10, depth=3).depth
    3
    """
    fields: dict[str, Any] = {}
    if ':' in name:
        model = import_path(name)
    else:
        model, fields = decode_variant(name)
    if dataclasses.is_dataclass(model):
        known = {f.name for f in dataclasses.fields(model)} - {'parent', 'name'}
        for field in overrides:
            if field not in known:
                raise unknown(f'field of {name}', field, known)
    overrides = {field: _resolve(value) for field, value in overrides.items()}
    return model(num_classes=num_classes, **{**fields, **overrides})


def import_path(path: str) -> Any:
    """The object that 'package.module:name' names.

    Raises:
      UserError: when the module or the name in it does not exist.
    """
    module_name, _, attribute = path.partition(':')
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f'cannot import {path!r}: {error}') from error
    if not hasattr(module, attribute):
        raise UserError(f'module {module_name!r} has no {attribute!r} (from {path!r})')
    return getattr(module, attribute)


def _resolve(value: Any) -> Any:
    if isinstance(value, str) and ':' in value:
        return import_path(value)
    if isinstance(value, Mapping):
        return {key: _resolve(v) for key, v in value.items()}
    return value
