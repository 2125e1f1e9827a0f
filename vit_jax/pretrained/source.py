"""Where weights come from: an address, a file, a folder; and what is known of them."""

import os
import pathlib
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from vit_jax.errors import UserError
from vit_jax.pretrained.damage import reading
from vit_jax.pretrained.fetch import fetch, is_address, telling_cached
from vit_jax.pretrained.files import LazyArray, WeightFile, open_weights
from vit_jax.pretrained.metadata import check_metadata, parse_metadata
from vit_jax.pretrained.published import find_published, from_hugging_face

# In the header of a safetensors file: our names and layouts, not those of PyTorch.
NATIVE = 'vit_jax'


class Source(NamedTuple):
    """Weights that can be read, and what they say of themselves.

    Attributes:
      file: their arrays.
      metadata: as in a checkpoint (model, classes, preprocessing), or None where
        nothing is known.
      native: whether the names are paths of our variables.
      step: of the checkpoint, of the workdir of a run.
    """

    file: WeightFile
    metadata: dict[str, Any] | None
    native: bool
    step: int | None = None


def open_source(path: str | os.PathLike) -> Source:
    """Opens weights; reads no array yet.

    Args:
      path: see `load_variables`.

    Raises:
      UserError: when nothing is there, or it is not what it should be.
    """
    name = os.fspath(path)
    if not name:
        raise UserError('no weights are named: the path is empty')
    published = find_published(name)
    local = fetch(name) if is_address(name) else pathlib.Path(name)
    if (local / 'checkpoints').is_dir():
        return _open_workdir(local, 'latest')
    before, at, wanted = name.rpartition('@')
    workdir = pathlib.Path(before)
    if at and not local.exists() and (workdir / 'checkpoints').is_dir():
        return _open_workdir(workdir, wanted)
    with telling_cached(local):
        file = open_weights(local)
    metadata = published or _read_metadata(local, file)
    if metadata is not None:
        metadata = check_metadata(metadata, file.path)
    return Source(file, metadata, native=file.metadata.get('format') == NATIVE)


def _read_metadata(path: pathlib.Path, file: WeightFile) -> dict[str, Any] | None:
    """What stands beside the arrays, or in their header."""
    if NATIVE in file.metadata:
        return parse_metadata(file.metadata[NATIVE], f'the header of {file.path}')
    folder = path if path.is_dir() else path.parent
    for name, understand in (
        ('metadata.json', lambda content: content),
        ('config.json', from_hugging_face),
    ):
        beside = folder / name
        # Beside a file of another name they may be those of other weights.
        if beside.is_file() and (path.is_dir() or path.stem == 'model'):
            with reading(beside):
                text = beside.read_text(encoding='utf-8')
            return understand(parse_metadata(text, str(beside)))
    return None


def _open_workdir(workdir: pathlib.Path, wanted: str) -> Source:
    """Weights of a run, see `stored.choose`."""
    # Not above: Orbax would be half of the time that `import vit_jax` takes.
    from vit_jax.stored import (
        choose,
        load_metadata,
        restore_variables,
        stored_shapes,
    )

    choice = choose(workdir, wanted)
    step = choice.steps[-1]
    name = f'{workdir} at step {step}'
    if wanted != 'latest':
        name += f' ({wanted})'
    metadata = check_metadata(load_metadata(workdir, step), name)
    shapes = stored_shapes(workdir, choice)
    restored: dict[str, np.ndarray] = {}

    def read(name: str) -> np.ndarray:
        if not restored:  # all at once, when the first is asked for
            variables = restore_variables(workdir, choice, shapes)
            restored.update(jax.device_get(flatten_dict(variables, sep='/')))
        return restored.pop(name)

    arrays = {
        name: LazyArray(x.shape, np.dtype(x.dtype), partial(read, name))
        for name, x in flatten_dict(shapes, sep='/').items()
    }
    file = WeightFile(name, 'workdir', arrays, {}, [])
    return Source(file, metadata, native=True, step=step)
