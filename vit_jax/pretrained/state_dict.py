"""State dicts of PyTorch, read without running what a file wants to run."""

import argparse
import pathlib
import pickle
import re
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from vit_jax.errors import UserError
from vit_jax.pretrained.damage import listed, reading

# Before 2.6 and again before 2.10, files could make the unpickler of tensors run code
# (CVE-2025-32434, CVE-2026-24747).
_SAFE = '2.10'
# Where training scripts keep the state dict among other things, the best first.
_PLACES = ('model_ema', 'state_dict_ema', 'model', 'state_dict', 'module', 'teacher')
# Before every name: of DataParallel, torch.compile and Lightning.
_WRAPPERS = ('module.', '_orig_mod.', 'model.')
_BACKBONE = 'backbone.'  # before most: of what was trained with a head of its own


class NumPyObject:
    """Stands for a number or array of NumPy beside the weights.

    Its values are not needed, and NumPy's own functions to make it trust the file.
    """

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


# By the names of NumPy 1 and 2.
_NUMPY = ['numpy.dtype', 'numpy.ndarray']
_NUMPY += [
    f'numpy.{core}.multiarray.{name}'
    for core in ('core', '_core')
    for name in ('scalar', '_reconstruct')
]


def read_state_dict(
    path: pathlib.Path, zipped: bool
) -> tuple[dict[str, Any], list[str]]:
    """The tensors of a file, through PyTorch's unpickler of nothing but tensors.

    Args:
      path: the file.
      zipped: whether it is a zip archive, which is mapped into memory, and not of a
        PyTorch before 1.6.

    Returns:
      Tensors by name, and what was chosen, one line each.

    Raises:
      UserError: without a safe PyTorch, or when the file is damaged or holds other
        things than plain tensors.
    """
    torch = _import_torch(f'reading {path}')
    if torch.__version__ < _SAFE:  # compares versions, not text
        raise UserError(
            f'reading {path} safely needs PyTorch {_SAFE}, and this is '
            f"{torch.__version__}: pip install -U 'vit_jax[torch]'"
        )
    # Published checkpoints hold the command line and metrics beside the weights.
    safe = torch.serialization.safe_globals(
        [argparse.Namespace, *((NumPyObject, name) for name in _NUMPY)]
    )
    with reading(path), safe:
        try:
            held = torch.load(path, map_location='cpu', weights_only=True, mmap=zipped)
        except pickle.UnpicklingError as error:
            # Its own message says how to run the code.
            found = re.search(r'GLOBAL (\S{1,80})', str(error))
            what = f'pickled objects ({found[1]})' if found else 'more than tensors'
            raise UserError(
                f'{path} holds {what}; nothing was executed; save a state_dict() of '
                'tensors instead'
            ) from error
    notes = []
    for _ in range(2):  # {'state_dict': {'model': ...}}
        place = next((place for place in _PLACES if _has(held, place)), None)
        if place is not None:
            notes.append(f'took {place!r} of {listed(held)}')
            held = held[place]
    if not isinstance(held, dict):
        raise UserError(
            f'{path} holds a {type(held).__name__}; weights are a state_dict()'
        )
    tensors, skipped = {}, []
    for name, value in held.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            skipped.append(name)
            continue
        on_cpu = value.device.type == 'cpu'
        if value.layout != torch.strided or value.is_nested or not on_cpu:
            raise UserError(
                f'array {name!r} of {path} is a sparse, nested or empty tensor; '
                'weights are plain ones'
            )
        tensors[name] = value.detach()
    if not tensors:
        raise UserError(
            f'{path} holds no tensors, but {listed(held) or "nothing"}; weights are a '
            f'state_dict(), bare or under {", ".join(_PLACES)}'
        )
    if skipped:
        notes.append(f'skipped what is no tensor: {listed(skipped)}')
    return tensors, notes


def unwrap_names(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Names in a state dict without those of what the model was wrapped in.

    Args:
      names: of its tensors.

    Returns:
      Each name and the model's own, and what was taken off, one line each. Names
      that lack a prefix which most have stay as they are.

    >>> unwrap_names(['module.norm.bias', 'module.norm.weight'])[0]
    {'module.norm.bias': 'norm.bias', 'module.norm.weight': 'norm.weight'}
    """
    inner, notes = {name: name for name in names}, []

    def having(prefix: str) -> set[str]:
        return {name for name, own in inner.items() if own.startswith(prefix)}

    while found := [x for x in _WRAPPERS if inner and len(having(x)) == len(inner)]:
        inner = {name: own.removeprefix(found[0]) for name, own in inner.items()}
        notes.append(f'took {found[0]!r} off every name')
    inside = having(_BACKBONE)
    shorter = inner | {name: inner[name].removeprefix(_BACKBONE) for name in inside}
    if 2 * len(inside) > len(inner) and len({*shorter.values()}) == len(inner):
        rest = [own for name, own in inner.items() if name not in inside]
        left = f'name but {listed(rest)}' if rest else 'name'
        notes.append(f'took {_BACKBONE!r} off every {left}')
        inner = shorter
    return inner, notes


def _has(held: Any, place: str) -> bool:
    inside = held.get(place) if isinstance(held, dict) else None
    return isinstance(inside, dict) and len(inside) > 0


def to_numpy(tensor: Any) -> np.ndarray:
    """The values of a tensor, apart from the file that it may be mapped from."""
    import torch

    tensor = tensor.resolve_neg()
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy().copy()
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()


def to_tensor(array: np.ndarray) -> Any:
    """The tensor of an array, with its memory where PyTorch may write to it."""
    import torch

    array = np.require(array, requirements='W')
    if array.dtype != ml_dtypes.bfloat16:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def write_state_dict(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as a bare state dict.

    Raises:
      UserError: without PyTorch.
    """
    torch = _import_torch('writing a state dict')
    tensors = {name: to_tensor(array) for name, array in arrays.items()}
    with path.open('wb') as file:  # given a path, it would write its name too
        torch.save(tensors, file)


def _import_torch(what: str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{what} needs PyTorch: pip install 'vit_jax[torch]'; or convert to "
            'safetensors, which needs none'
        ) from error
    return torch
