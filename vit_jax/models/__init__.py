"""Models by name."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from flax.core import FrozenDict

from vit_jax.data.tokenizer import PAD
from vit_jax.errors import UserError, unknown
from vit_jax.forks import import_path, is_path
from vit_jax.models.variants import (
    GENERATIVE,
    SEQUENCE,
    decode_variant,
    list_variants,
)


def list_models() -> list[str]:
    """The names `build_model` knows; other patch sizes work too ('ViT-B/8').

    Some are of models of sequences, see `variants.is_sequence_model`, or of models
    that make images, see `variants.is_generative_model`.
    """
    return list_variants()


def build_model(name: str, num_classes: int | None, **overrides: Any) -> nn.Module:
    """Makes the model of that name.

    Args:
      name: such as 'ConViT-S/16' (see `list_models`), or the path of a callable of
        a fork, 'my_fork.models:MyNet', called with `num_classes` and `overrides`.
      num_classes: size of the logits, of a model of sequences the vocabulary's; None
        for a model of images that returns features.
      **overrides: fields of the module. A string 'package.module:name' stands for
        the object of that name, so a config can name a fork's layer.

    Returns:
      An unbound Flax module, for `init` and `apply` on `[B, h, w, channels]`; one of
      sequences, on source `[B, S]` and target `[B, T]`.

    Raises:
      UserError: for an unknown name or field; offers the nearest.

    >>> build_model('ViT-Ti/16', num_classes=10, depth=3).depth
    3
    """
    fields: dict[str, Any] = {}
    if is_path(name):
        model = import_path(name)
    else:
        model, fields = decode_variant(name)
    overrides = {field: _resolve(value) for field, value in overrides.items()}
    if dataclasses.is_dataclass(model):
        _check_fields(name, model, overrides)
    if not _is_count(1, num_classes) and num_classes is not None:
        raise UserError(f'num_classes is a number above 0 or None, not {num_classes!r}')
    fields = {'num_classes': num_classes, **fields, **overrides}
    try:
        inspect.signature(model).bind(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(
            f'{name!r} cannot be made from {", ".join(fields)}: {error}'
        ) from error
    made = model(**fields)
    if not isinstance(made, nn.Module):
        raise UserError(f'{name!r} makes a {type(made).__name__}, not a Flax module')
    return made


def check_takes_images(model: nn.Module) -> None:
    """Raises UserError for a model of sequences, such as a Transformer."""
    if type(model) in {made for made, _ in SEQUENCE.values()}:
        raise UserError(
            f'a {type(model).__name__} takes sequences of tokens, not images; choose a '
            'model of images, such as ViT-S/16'
        )


def check_classifies(model: nn.Module) -> None:
    """Raises UserError for a model of sequences, or one that makes images."""
    check_takes_images(model)
    if type(model) in GENERATIVE.values():
        raise UserError(
            f'a {type(model).__name__} makes images and knows no classes; set '
            "config.task='gan', or choose another model, such as ViT-S/16"
        )


def generates(model: nn.Module) -> bool:
    """Whether the model is called as `SAGAN` is, to make images."""
    return hasattr(model, 'generate') and hasattr(model, 'latent_dim')


def check_generates(model: nn.Module) -> None:
    """Raises UserError for a model that is not called as `SAGAN` is."""
    if not generates(model):
        raise UserError(
            f'a {type(model).__name__} does not generate images; choose a model such '
            'as SAGAN'
        )


def check_translates(model: nn.Module) -> None:
    """Raises UserError for a model that is not called as `Transformer` is."""
    if not (hasattr(model, 'encode') and hasattr(model, 'decode')):
        raise UserError(
            f'a {type(model).__name__} cannot encode and decode, so it does not '
            'translate; choose a model such as Transformer-base'
        )
    if not hasattr(model, 'cache_length'):
        raise UserError(
            f'a {type(model).__name__} needs a field cache_length, the most tokens '
            'that cached decoding may see'
        )
    if getattr(model, 'pad_id', PAD) != PAD:
        raise UserError(f'padding is token {PAD} of our data, not {model.pad_id}')


def _check_fields(name: str, model: Any, overrides: dict[str, Any]) -> None:
    """Raises UserError for a field that does not exist, or a value unlike it."""
    known = {f.name: f for f in dataclasses.fields(model)}
    del known['parent'], known['name']
    for field, value in overrides.items():
        if field not in known:
            raise unknown(f'field of {name}', field, known)
        if not _suits(known[field], value):
            default = known[field].default
            like = default if default != () else (1, 3)
            raise UserError(f'{field} of {name} is like {like!r}; {value!r} is not')


def _suits(field: dataclasses.Field, value: Any) -> bool:
    """Whether a value is like the default: type, and counts above 0."""
    default = field.default
    if isinstance(value, bool) or isinstance(default, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if field.type == int | None and default is None:
        return value is None or (isinstance(value, int) and value > 0)
    if field.type == float | None and default is None:
        return value is None or isinstance(value, float | int)
    if isinstance(default, int):
        if field.name == 'patch_size' and isinstance(value, tuple):
            return _is_count(1, *value)
        from_zero = ('num_local_layers', 'num_registers', 'pad_id')
        lowest = int(field.name not in from_zero)
        return _is_count(lowest, value)
    if isinstance(default, float):
        return isinstance(value, float | int)
    if isinstance(default, tuple):
        lowest = int(field.name != 'attention_after')  # counted from 0
        return isinstance(value, tuple) and _is_count(lowest, *value)
    if isinstance(default, str):
        named = callable(value) and 'Callable' in str(field.type)
        return named or isinstance(value, type(default))
    return not callable(default) or callable(value)


def _is_count(lowest: int, *values: Any) -> bool:
    """Whether all are whole numbers, from `lowest` on."""
    return all(isinstance(n, int) and n >= lowest for n in values)


def _resolve(value: Any) -> Any:
    if is_path(value):
        return import_path(value)
    if isinstance(value, Mapping):
        # A module is hashed where `jit` takes it as static.
        return FrozenDict({key: _resolve(v) for key, v in value.items()})
    if isinstance(value, list | tuple):  # JSON has lists, fields of modules tuples
        return tuple(map(_resolve, value))
    return value
