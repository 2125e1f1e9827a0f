"""Weights from anywhere, as the variables of a model, with a report of every leaf."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.errors import UserError, some, times
from vit_jax.layers.position import resize_learned
from vit_jax.pretrained.plan import PREFIX, Plan, Step, make_plan
from vit_jax.pretrained.report import Report
from vit_jax.pretrained.source import Source, open_source
from vit_jax.typing import Array, Inputs, PRNGKey, Shape, Variables

# Of every leaf, or from its path and shape, or the default device.
Placement: TypeAlias = (
    jax.sharding.Sharding | Callable[[str, Shape], jax.sharding.Sharding] | None
)


def load_variables(
    path: str | os.PathLike | Source,
    model: nn.Module,
    image_size: int | tuple[int, int] | Inputs,
    *,
    channels: int = 3,
    new_head: bool = False,
    grid: Shape | None = None,
    sharding: Placement = None,
    rng: PRNGKey | None = None,
) -> tuple[Variables, Report]:
    """Loads weights of any format there is, for images of any size.

    Args:
      path: a file (Google's `.npz`, `.safetensors`, `.pth`, whatever its name is); a
        folder (Hugging Face's, that of `vit_jax export`, the workdir of a run, of which
        'WORKDIR@best', '@ema', '@last:5' or '@1500' are other weights than the newest,
        see `stored.choose`); or an address ('hf:timm/convit_tiny.fb_in1k',
        'augreg:...', 'https://...'). Or what `open_source` made of it.
      model: whose variables they become.
      image_size: of the images that the model will see, one side or (height, width);
        or shapes and dtypes of whatever else it takes.
      channels: of these images.
      new_head: leave the file's classifier, and start a new one.
      grid: of the learned positions in the file, where the file does not tell and
        they are not of a square.
      sharding: of every leaf; or what gives it, from a leaf's path and shape; None for
        the default device.
      rng: key of a new head; None for `jax.random.key(0)`.

    Returns:
      The variables, of the model's own dtypes, and what became of every leaf. Learned
      positions are resized (cubic, antialiased) from the file's grid to the model's.

    Raises:
      UserError: for a file that cannot be read, and for leaves that are in one of file
        and model only, or differ in shape; names them.
    """
    inputs = _inputs(image_size, channels)

    def init_tree(rng: PRNGKey) -> Variables:
        zeros = [jnp.zeros(x.shape, x.dtype) for x in inputs]
        return model.init({'params': rng}, *zeros, train=False)

    def init(rng: PRNGKey) -> dict[str, Array]:
        return flatten_dict(init_tree(rng), sep='/')

    rng = jax.random.key(0) if rng is None else rng
    tree = jax.eval_shape(init_tree, rng)
    shapes = flatten_dict(tree, sep='/')
    source = path if isinstance(path, Source) else open_source(path)
    _check_heads(source, model)
    plan = make_plan(source, shapes, new_head=new_head, grid=grid)

    found: dict[str, Array] = {}
    casts: list[str] = []
    not_finite: list[str] = []
    for step in plan.steps:
        if step.array.dtype != shapes[step.parts[0][0]].dtype:
            casts.append(f'{step.array.dtype}')
        for leaf, x in _read(step):
            with np.errstate(over='ignore'):  # it is named below, as not finite
                x = x.astype(shapes[leaf].dtype, copy=False)
            if not np.isfinite(x).all():
                not_finite.append(leaf)
            if leaf in plan.resized:
                x = _resize(x, plan.resized[leaf][1])
            found[leaf] = _put(leaf, x, sharding)
    for leaf, x in _initialise(plan, shapes, init, rng).items():
        found[leaf] = _put(leaf, x, sharding)

    report = Report(
        source=f'{source.file.path} ({plan.format.name})',
        loaded=tuple(k for k in found if k not in {**plan.resized, **plan.initialised}),
        resized={
            leaf: f'{times(old)} -> {times(new)}'
            for leaf, (old, new) in plan.resized.items()
        },
        initialised=plan.initialised,
        ignored=plan.ignored,
        notes=(
            *source.file.notes,
            *plan.notes,
            *_note_values(casts, not_finite),
            *_note_differences(plan, source, model),
        ),
        metadata=source.metadata,
    )
    # Names of `nn.SpectralNorm` have slashes of their own.
    leaves = {key: found['/'.join(key)] for key in flatten_dict(tree)}
    return unflatten_dict(leaves), report


def load_params(
    path: str | os.PathLike,
    model: nn.Module,
    image_size: int | tuple[int, int] | Inputs,
    **kwargs: Any,
) -> tuple[Variables, Report]:
    """`load_variables` for models that have parameters alone.

    Args:
      path, model, image_size, **kwargs: see `load_variables`.

    Returns:
      The collection 'params', and the report.

    Raises:
      UserError: as `load_variables`; and for a model that has other collections, such
        as the statistics of BatchNorm.
    """
    variables, report = load_variables(path, model, image_size, **kwargs)
    if others := sorted(variables.keys() - {'params'}):
        raise UserError(
            f'{type(model).__name__} has {some(others)} beside its parameters; use '
            'load_variables'
        )
    return variables['params'], report


def _inputs(image_size: int | tuple[int, int] | Inputs, channels: int) -> Inputs:
    """What the model takes, of one example."""
    if isinstance(image_size, int | np.integer):
        image_size = (int(image_size), int(image_size))
    if all(isinstance(x, jax.ShapeDtypeStruct) for x in image_size):
        return image_size  # type: ignore[return-value]
    return (jax.ShapeDtypeStruct((1, *image_size, channels), jnp.float32),)  # type: ignore[misc]


def _read(step: Step) -> Iterator[tuple[str, np.ndarray]]:
    """The leaves that an array of the file stands for."""
    x = step.array.read().reshape(step.shape)
    shapes = [shape for _, shape in step.parts]
    parts = [x]  # whole, and perhaps a scalar, which has no length
    if len(shapes) > 1:
        if step.layout is None:
            lengths = [math.prod(shape[:-1]) for shape in shapes]
        else:
            lengths = [step.layout.shape(shape)[0] for shape in shapes]
        parts = np.split(x, np.cumsum(lengths)[:-1])
    for (leaf, shape), part in zip(step.parts, parts):
        read = step.layout.read if step.layout else np.reshape
        yield leaf, read(part, shape)


def _resize(grid: np.ndarray, size: Shape) -> np.ndarray:
    return np.asarray(resize_learned({'grid': jnp.asarray(grid)}, size)['grid'])


def _put(leaf: str, x: np.ndarray, sharding: Placement) -> Array:
    """The array on the devices, each of which gets its own slice alone."""
    if sharding is None:
        return jnp.array(x)  # a copy: the file may be written to
    if callable(sharding):
        sharding = sharding(leaf, x.shape)
    try:
        sharding.shard_shape(x.shape)
    except ValueError as error:
        raise UserError(
            f'{leaf} of shape {times(x.shape)} cannot lie as {sharding}; '
            'give a sharding that divides it'
        ) from error
    return jax.make_array_from_callback(x.shape, sharding, lambda i: np.array(x[i]))


def _initialise(
    plan: Plan,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    init: Callable[[PRNGKey], dict[str, Array]],
    rng: PRNGKey,
) -> dict[str, np.ndarray]:
    """The leaves that no file has."""
    values = {}
    if PREFIX in plan.initialised:
        values[PREFIX] = np.zeros(shapes[PREFIX].shape, shapes[PREFIX].dtype)
    if fresh := plan.initialised.keys() - {PREFIX}:

        def init_fresh(rng: PRNGKey) -> dict[str, Array]:
            return {leaf: x for leaf, x in init(rng).items() if leaf in fresh}

        # Jitted, so that nothing else is computed.
        values |= jax.device_get(jax.jit(init_fresh)(rng))
    return values


def _note_values(casts: list[str], not_finite: list[str]) -> Iterator[str]:
    for dtype in sorted(set(casts)):
        count = casts.count(dtype)
        yield f"{count} array(s) of the file are {dtype}, cast to the model's"
    if not_finite:
        yield f'warning: values that are not finite in {some(not_finite)}'


def _check_heads(source: Source, model: nn.Module) -> None:
    """Raises UserError for other heads, which shapes of PyTorch's files do not show."""
    theirs = (source.metadata or {}).get('model', {}).get('num_heads')
    ours = getattr(model, 'num_heads', None)
    if theirs and ours and theirs != ours:
        raise UserError(
            f'{source.file.path} is of a model with {theirs} heads, this one has '
            f'{ours}: pass num_heads={theirs}'
        )


def _note_differences(plan: Plan, source: Source, model: nn.Module) -> Iterator[str]:
    """What the weights were trained with, where the model differs from it."""
    about = {**plan.format.facts, **(source.metadata or {}).get('model', {})}
    for field in ('activation', 'layer_norm_eps'):
        if hasattr(model, field) and field in about:
            theirs, ours = about[field], getattr(model, field)
            if theirs != ours:
                trained = f'trained with {field}={theirs!r}'
                yield f'warning: {trained}, the model has {ours!r}'
