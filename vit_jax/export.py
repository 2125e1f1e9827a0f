"""A trained model as a folder that runs without its code: weights and a program.

The folder holds the weights (`model.safetensors`), what is known of them
(`metadata.json`), and `program.bin`, which `jax.export` made: uint8 images of any
number -> logits, for CPU, GPU and TPU. It needs neither the config nor the class of the
model. For how long later versions of JAX read it, JAX says:
https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees
"""

import contextlib
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax import export as jax_export

from vit_jax.errors import UserError, times
from vit_jax.modules import make_stored_model
from vit_jax.pretrained import Report, load_variables
from vit_jax.pretrained.convert import (
    PROGRAM,
    check_free,
    to_arrays,
    with_grid,
    write_folder,
)
from vit_jax.pretrained.damage import reading
from vit_jax.pretrained.metadata import is_complete
from vit_jax.pretrained.source import open_source
from vit_jax.tasks.classify import normalize
from vit_jax.typing import Array, Variables

PLATFORMS = ('cpu', 'cuda', 'tpu')

Program = Callable[[Variables, Array], Array]

# What a program calls outside of itself. The check of the batch's size is not that.
_OUTSIDE = re.compile(r'custom_call(?! @shape_assertion\()\W*([\w.]*)')


class Exported(NamedTuple):
    """An exported model, as it is run.

    Attributes:
      program: (variables, uint8 images `[B, h, w, c]`) -> logits `[B, V]` float32.
      variables: its first argument.
      metadata: as of a checkpoint, and 'program'.
    """

    program: Program
    variables: Variables
    metadata: dict[str, Any]


def export(
    path: str | os.PathLike,
    dst: str | os.PathLike,
    metadata: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Report:
    """Writes an exported folder.

    Args:
      path: a workdir, or other weights whose model and preprocessing are known.
      dst: the folder to make; all of it appears or nothing.
      metadata: what is known of the weights, where they do not tell themselves.
      force: whether to replace such a folder.

    Returns:
      What loading did to each leaf.

    Raises:
      UserError: for weights of which too little is known, and a `dst` that is taken
        or cannot be written.
    """
    dst = pathlib.Path(dst)
    check_free(dst, force)
    metadata = metadata or open_source(path).metadata or {}
    if 'text' in metadata:
        raise UserError(
            f'{os.fspath(path)} is of a model of sentences, which is not exported; '
            '`vit_jax translate` runs it'
        )
    if not is_complete(metadata, 'model', 'preprocessing'):
        raise UserError(
            f'{os.fspath(path)} does not say of which model it is and how images are '
            'prepared for it'
        )
    model, variables, report = load_model(path, metadata)
    program = make_program(model, variables, metadata['preprocessing'])
    height, width, channels = program.in_avals[-1].shape[1:]
    about = {
        'platforms': list(program.platforms),
        'jax': jax.__version__,
        'calling_convention': program.calling_convention_version,
        'input': 'variables as nested dicts (the names of model.safetensors are their '
        f'paths); images uint8 [b, {height}, {width}, {channels}], any b',
        'output': f'float32 [b, {program.out_avals[0].shape[-1]}]: logits, or features '
        'of a model without a classifier',
    }
    metadata = {**with_grid(metadata, variables), 'program': about}
    serialized = bytes(program.serialize())
    write_folder(dst, to_arrays(variables), metadata, serialized, force=force)
    return report


def load_model(
    path: str | os.PathLike, metadata: Mapping[str, Any]
) -> tuple[nn.Module, Variables, Report]:
    """The model that metadata tell of, with its weights.

    Args:
      path: of the weights, see `load_variables`.
      metadata: as of a checkpoint.

    Raises:
      UserError: when the weights are not of that model.
    """
    about, preprocessing = metadata['model'], metadata['preprocessing']
    model = make_stored_model(about, path)
    variables, report = load_variables(
        path,
        model,
        tuple(preprocessing['image_size']),
        channels=preprocessing['channels'],
        grid=tuple(about['grid']) if 'grid' in about else None,
    )
    return model, variables, report


def make_program(
    model: nn.Module, variables: Variables, preprocessing: Mapping[str, Any]
) -> jax_export.Exported:
    """(variables, uint8 images `[b, h, w, c]`) -> float32, for any b and `PLATFORMS`.

    Args:
      model: the Flax module.
      variables: its variables, or their shapes.
      preprocessing: image_size, channels, mean and std, as of a checkpoint.

    Raises:
      UserError: for a model that calls code outside of the program.
    """
    mean, std = tuple(preprocessing['mean']), tuple(preprocessing['std'])
    if getattr(model, 'attention_impl', None) == 'cudnn':  # no other platform has it
        model = model.clone(attention_impl='auto')

    @jax.jit
    def classify(variables: Variables, images: Array) -> Array:
        images = normalize(images, mean, std)
        logits: Array = model.apply(variables, images, train=False)  # type: ignore
        return logits.astype(jnp.float32)

    (batch,) = jax_export.symbolic_shape('b')
    shape = (batch, *preprocessing['image_size'], preprocessing['channels'])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    with _anonymous():
        program = jax_export.export(classify, platforms=PLATFORMS)(
            shapes, jax.ShapeDtypeStruct(shape, jnp.uint8)
        )
    if calls := _outside_calls(program):
        raise UserError(
            f'the model calls {", ".join(calls)}, which is not part of the program and '
            'may be missing elsewhere; it cannot be exported'
        )
    return program


@contextlib.contextmanager
def _anonymous() -> Iterator[None]:
    """Keeps paths of this machine's source files out of a program."""
    name = 'jax_traceback_in_locations_limit'
    limit = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, limit)


def is_exported(path: str | os.PathLike) -> bool:
    """Whether a folder holds a program."""
    return (pathlib.Path(path) / PROGRAM).is_file()


def load_program(folder: str | os.PathLike) -> Program:
    """The program of an exported folder.

    Args:
      folder: the folder.

    Returns:
      (variables, uint8 images `[B, h, w, c]`) -> `[B, V]` float32, jitted.

    Raises:
      UserError: when it is damaged, of a JAX too new or too old, or calls code that
        is not its own.
    """
    return jax.jit(_read_program(pathlib.Path(folder) / PROGRAM).call)


def load_exported(folder: str | os.PathLike) -> Exported:
    """Program, variables and metadata of an exported folder.

    Raises:
      UserError: when one is damaged, or they are not of each other.
    """
    folder = pathlib.Path(folder)
    source = open_source(folder)
    variables = unflatten_dict(
        {name: jnp.array(x.read()) for name, x in source.file.arrays.items()}, sep='/'
    )
    program = _read_program(folder / PROGRAM)
    (expected, _), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
    if _signature(expected) != _signature(variables):
        raise UserError(
            f'{folder / PROGRAM} is not the program of {source.file.path}; export again'
        )
    metadata = source.metadata
    if metadata is None or not is_complete(metadata, 'model', 'preprocessing'):
        raise UserError(f'{folder} has no metadata.json, or half of it; export again')
    about = metadata['preprocessing']
    if (*about['image_size'], about['channels']) != program.in_avals[-1].shape[1:]:
        raise UserError(
            f'{folder / PROGRAM} is not of the image size that metadata.json tells; '
            'export again'
        )
    return Exported(jax.jit(program.call), variables, metadata)


def _read_program(path: pathlib.Path) -> jax_export.Exported:
    with reading(path):
        program = jax_export.deserialize(bytearray(path.read_bytes()))
        calls = _outside_calls(program)
    if calls:
        raise UserError(
            f'{path} calls {", ".join(calls)}, which is not part of it; only what '
            '`vit_jax export` wrote is run'
        )
    return program


def _outside_calls(program: jax_export.Exported) -> list[str]:
    """What a program asks the machine's own code to do: a file may not choose that."""
    return sorted(set(_OUTSIDE.findall(program.mlir_module())))


def _signature(variables: Variables) -> Any:
    return jax.tree.structure(variables), [
        (times(x.shape), str(x.dtype)) for x in jax.tree.leaves(variables)
    ]
