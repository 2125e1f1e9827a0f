"""The Flax module that a config names, or weights do."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from vit_jax.errors import UserError, unknown
from vit_jax.layers.blocks import REMAT
from vit_jax.models import build_model
from vit_jax.pretrained.metadata import check_runs_no_code

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


def make_model(
    name: str,
    num_classes: int | None,
    dtype: str,
    kwargs: dict[str, Any],
    remat: str = 'none',
) -> nn.Module:
    """The model of a config's values.

    Raises:
      UserError: for an unknown name, dtype or field, or a model that cannot compute
        its blocks again.
    """
    if dtype not in DTYPES:
        raise unknown('dtype', dtype, DTYPES)
    for key in ('name', 'num_classes', 'dtype', 'remat'):
        if key in kwargs:
            raise UserError(f'model.kwargs.{key} is not for the config to set')
    model = build_model(name, num_classes, dtype=DTYPES[dtype], **kwargs)
    if remat == 'none':
        return model
    if not hasattr(model, 'remat'):
        raise UserError(
            f'parallel.remat={remat!r} is for models with a field remat, such as ViT '
            f'and ConViT; {name} has none'
        )
    if remat not in REMAT:
        raise unknown('parallel.remat', remat, REMAT)
    return model.clone(remat=remat)


def make_stored_model(about: Mapping[str, Any], path: str | os.PathLike) -> nn.Module:
    """The model that weights say they are of.

    Args:
      about: the section 'model' of their metadata.
      path: of the weights.

    Raises:
      UserError: for a model that cannot be made; and for one that is code of a fork,
        unless `path` is the workdir of a run.
    """
    if not (pathlib.Path(path) / 'checkpoints').is_dir():
        check_runs_no_code(about, os.fspath(path))
    return make_model(
        about['name'], about['num_classes'], about['dtype'], dict(about['kwargs'])
    )
