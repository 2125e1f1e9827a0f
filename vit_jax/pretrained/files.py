"""Weight files, known by their content: `.npz`, safetensors, `.pth`; in and out.

`open_weights` reads names, shapes and dtypes; an array is read when it is asked for,
so that a file which lies about its size costs nothing. No code of a file is run:
`.npz` without pickle, `.pth` by PyTorch's unpickler of plain tensors only.
"""

import contextlib
import io
import json
import math
import mmap
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from vit_jax.errors import UserError, reason, times
from vit_jax.pretrained.damage import reading
from vit_jax.pretrained.state_dict import (
    read_state_dict,
    to_numpy,
    unwrap_names,
    write_state_dict,
)

# The numbers that weights are made of, as safetensors and as NumPy call them.
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_DTYPES = {'BF16': _BFLOAT16, 'BOOL': np.dtype('bool')}
_DTYPES |= {f'F{8 * n}': np.dtype(f'f{n}') for n in (2, 4, 8)}
_DTYPES |= {
    f'{x}{8 * n}': np.dtype(f'{x.lower()}{n}') for x in 'IU' for n in (1, 2, 4, 8)
}
_NAMES = {dtype.name: dtype for dtype in _DTYPES.values()}

# Where a folder in the layout of Hugging Face keeps its weights, the best first.
_IN_FOLDERS = (
    'model.safetensors',
    '*.safetensors.index.json',
    'pytorch_model.bin',
    'pytorch_model.bin.index.json',
)
_NPY_HEADER = 16_384  # bytes; NumPy itself takes no header of more than 10,000
_SAFETENSORS_HEADER = 100_000_000  # bytes, the limit of the format
_LEGACY_TORCH = b'\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.'  # a pickled number

# First bytes (in lower case) of what is taken for weights by mistake.
_OTHERS = (
    (b'\x93numpy', 'a single array', 'name the arrays and use np.savez'),
    (b'\x80', 'a Python pickle, which can run code', 'save arrays, not objects'),
    (b'\x1f\x8b', 'a gzip archive', 'unpack it first'),
    (b'bzh', 'a bzip2 archive', 'unpack it first'),
    (b'\xfd7zxz', 'an xz archive', 'unpack it first'),
    (b'\x28\xb5\x2f\xfd', 'a zstd archive', 'unpack it first'),
    (b'7z\xbc\xaf', 'a 7z archive', 'unpack it first'),
    (b'\x89hdf', 'an HDF5 file', 'convert it to safetensors'),
    (b'version https://git-lfs', 'a git-lfs pointer', "run 'git lfs pull'"),
    (b'<', 'a web page, perhaps a saved error', 'download the file itself'),
)


class LazyArray(NamedTuple):
    """An array that is still in its file.

    Attributes:
      shape: its shape.
      dtype: of the file, in this machine's byte order; void for one that `read`
        refuses.
      read: gives the array, apart from the file. Raises a `UserError` when the data
        are damaged or no plain numbers.
      refused: the type of one that `read` refuses, in the words of its file.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    refused: str = ''

    @property
    def type_name(self) -> str:
        """The type of the numbers, for messages."""
        return self.refused or self.dtype.name


class WeightFile(NamedTuple):
    """What a file holds.

    Attributes:
      path: of the file, for messages.
      kind: 'npz', 'safetensors' or 'pth'.
      arrays: by the names of the file.
      metadata: of a safetensors file, else empty.
      notes: what was chosen, one line each.
    """

    path: str
    kind: str
    arrays: dict[str, LazyArray]
    metadata: dict[str, str]
    notes: list[str]


def open_weights(path: pathlib.Path) -> WeightFile:
    """Finds out what a file is and what it holds, and reads no array yet.

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), 'weights.npz')
    >>> write_weights(path, {'kernel': np.ones((2, 3), np.float32)}, {})
    >>> weights = open_weights(path)
    >>> weights.kind, weights.arrays['kernel'].shape
    ('npz', (2, 3))

    Args:
      path: a file, the JSON index of a sharded one, or a folder with either in the
        layout of Hugging Face.

    Raises:
      UserError: for what is not there, damaged, dangerous or no weights.
    """
    path = _find_file(path)
    head = _read_head(path)
    if head.lstrip().startswith(b'{') and not _is_safetensors(head):
        weights = _open_index(path)
    else:
        weights = _open_file(path, head)
    if not weights.arrays:
        raise UserError(f'{path} holds no arrays')
    if weights.kind == 'npz':
        return weights
    names, notes = unwrap_names(weights.arrays)
    arrays = {names[name]: array for name, array in weights.arrays.items()}
    return weights._replace(arrays=arrays, notes=weights.notes + notes)


def _find_file(path: pathlib.Path) -> pathlib.Path:
    with reading(path):
        if path.is_file():
            return path
        if not path.exists():
            raise UserError(f'no such file or folder: {path}')
        if not path.is_dir():
            raise UserError(f'{path} is no regular file')
        if (path / 'checkpoints').is_dir():
            raise UserError(
                f'{path} is the workdir of a run, not a weight file; its checkpoints '
                'are read by load_variables'
            )
        for pattern in _IN_FOLDERS:
            found = sorted(file.name for file in path.glob(pattern))
            if len(found) > 1:
                raise UserError(f'{path} holds {", ".join(found)}; name one of them')
            if found:
                return path / found[0]
    raise UserError(
        f'{path} is a folder without weights; looked for {", ".join(_IN_FOLDERS)}'
    )


def _read_head(path: pathlib.Path) -> bytes:
    with reading(path), path.open('rb') as file:
        return file.read(512)


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b'{' and _header_size(head) <= _SAFETENSORS_HEADER


def _header_size(head: bytes) -> int:
    return int.from_bytes(head[:8], 'little')


def _open_file(path: pathlib.Path, head: bytes) -> WeightFile:
    """One file that is no index."""
    if _is_safetensors(head):
        return _open_safetensors(path)
    if head.startswith((b'PK\x03\x04', b'PK\x05\x06')):
        return _open_zip(path)
    if head.startswith(_LEGACY_TORCH):
        return _open_torch(path, zipped=False)
    if not head:
        raise UserError(f'{path} is empty; download or copy it again')
    start = head.lstrip(b'\xef\xbb\xbf \t\r\n').lower()
    for magic, what, right in _OTHERS:
        if start.startswith(magic):
            raise UserError(f'{path} is {what}, not weights; {right}')
    if head[257:262] == b'ustar':
        raise UserError(f'{path} is a tar archive, not weights; unpack it first')
    binary = re.search(rb'[^\t\n\r -~]', head)
    raise UserError(
        f'{path} is {"of no known kind" if binary else "text, not weights"}; '
        'weights are .npz, .safetensors or .pth files'
    )


# Sharded files.


def _open_index(path: pathlib.Path) -> WeightFile:
    with reading(path):
        index = json.loads(path.read_bytes())
        shard_of = index.get('weight_map')
    if not isinstance(shard_of, dict) or not shard_of:
        raise UserError(f"{path} is JSON without 'weight_map', so no index of weights")
    shards: list[WeightFile] = []
    for shard in sorted(set(map(str, shard_of.values()))):
        # An index from elsewhere must not reach files outside its folder.
        if shard in ('', '.', '..') or re.search(r'[/\\\0]', shard):
            raise UserError(
                f'{path} names the shard {shard!r}; it must be a file beside the index'
            )
        if not (path.parent / shard).is_file():
            raise UserError(f'{path} names the shard {shard!r}, which is not there')
        shards.append(_open_file(path.parent / shard, _read_head(path.parent / shard)))
    notes = [f'{len(shards)} shards of {path.name}']
    merged = WeightFile(str(path), shards[0].kind, {}, {}, notes)
    for held in shards:
        for name in held.arrays:
            if name in merged.arrays:
                raise UserError(f'{path}: array {name!r} is in two shards')
        merged.arrays.update(held.arrays)
        merged.metadata.update(held.metadata)
        merged.notes.extend(held.notes)
    for name, shard in shard_of.items():
        if name not in merged.arrays:
            raise UserError(f'{path}: array {name!r} is not in its shard {shard!r}')
    return merged


# safetensors.


def _open_safetensors(path: pathlib.Path) -> WeightFile:
    import safetensors

    with reading(path):
        with safetensors.safe_open(path, 'np') as checked:  # header against the file
            metadata = dict(checked.metadata() or {})
        with path.open('rb') as file:
            start = 8 + _header_size(file.read(8))
            header = json.loads(file.read(start - 8))
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        arrays = {}
        for name, about in header.items():
            if name == '__metadata__':
                continue
            shape, what = tuple(about['shape']), f'array {name!r} of {path}'
            dtype = _DTYPES.get(about['dtype'])
            if dtype is None:
                arrays[name] = _refused(shape, what, about['dtype'])
                continue
            offset = start + about['data_offsets'][0]
            arrays[name] = LazyArray(
                shape, dtype, partial(_copy, data, offset, shape, dtype)
            )
    return WeightFile(str(path), 'safetensors', arrays, metadata, [])


def _view(data: Any, start: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array over bytes; their start need not be a multiple of the item's size."""
    return np.ndarray(shape, dtype, data, start)


def _copy(
    data: mmap.mmap, start: int, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """An array of a mapped file, with memory of its own.

    JAX may keep what it is given, and a file can be written to while a model runs.
    """
    array = np.array(_view(data, start, shape, dtype))
    data.madvise(mmap.MADV_DONTNEED)  # else the pages count as ours until the end
    return array


def _refused(shape: tuple[int, ...], what: str, dtype: str) -> LazyArray:
    """An array that this package does not read, which matters only if it must."""

    def read() -> np.ndarray:
        raise UserError(f'{what} is of type {dtype}; weights are plain numbers')

    return LazyArray(shape, np.dtype('V'), read, dtype)


# Zip archives: .npz, and .pth since PyTorch 1.6.


def _open_zip(path: pathlib.Path) -> WeightFile:
    with reading(path):
        archive = zipfile.ZipFile(path)
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if any(name.endswith('/constants.pkl') for name in names):
        raise UserError(
            f'{path} is a TorchScript program, not weights; save its state_dict()'
        )
    if any(name.endswith('/data.pkl') for name in names):
        # PyTorch compresses nothing, and what is mapped into memory cannot be.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise UserError(f'{path} is compressed, as no file of PyTorch is')
        return _open_torch(path, zipped=True)
    arrays: dict[str, LazyArray] = {}
    for entry in entries:
        if not entry.filename.endswith('.npy'):
            raise UserError(
                f'{path} is a zip archive with {entry.filename!r} in it; an .npz '
                'holds .npy arrays only'
            )
        name = entry.filename.removesuffix('.npy')
        if name in arrays:
            raise UserError(f'{path} holds two arrays {name!r}')
        arrays[name] = _open_npy(archive, entry, f'array {name!r} of {path}')
    return WeightFile(str(path), 'npz', arrays, {}, [])


def _open_npy(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, what: str) -> LazyArray:
    with reading(what), archive.open(entry) as file:
        head = io.BytesIO(file.read(_NPY_HEADER))
        version = np.lib.format.read_magic(head)
        if version == (1, 0):
            header = np.lib.format.read_array_header_1_0(head)
        else:
            header = np.lib.format.read_array_header_2_0(head)
    shape, fortran_order, stored = header
    if stored.hasobject:
        raise UserError(f'{what} holds pickled objects, which are never opened')
    size = math.prod(shape) * stored.itemsize
    if min(shape, default=0) < 0 or head.tell() + size != entry.file_size:
        raise UserError(
            f'{what} should be {times(shape)[:80]} {stored.name}, and holds '
            f'{entry.file_size} bytes: the file is damaged'
        )
    # NumPy has no name for bfloat16 and writes two bytes of no type.
    dtype = _BFLOAT16 if stored == np.dtype('V2') else stored.newbyteorder('=')
    if dtype.name not in _NAMES:
        return _refused(shape, what, stored.name)

    def read() -> np.ndarray:
        with reading(what), archive.open(entry) as file:
            data = file.read(entry.file_size)  # and no more, whatever is in there
            if fortran_order:
                array = _view(data, head.tell(), shape[::-1], stored).T
            else:
                array = _view(data, head.tell(), shape, stored)
        if dtype == _BFLOAT16:
            return array.view(dtype)
        return array.astype(dtype, copy=False)

    return LazyArray(shape, dtype, read)


def _open_torch(path: pathlib.Path, zipped: bool) -> WeightFile:
    tensors, notes = read_state_dict(path, zipped)
    arrays = {}
    for name, tensor in tensors.items():
        shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix('torch.')
        arrays[name] = (
            LazyArray(shape, _NAMES[dtype], partial(to_numpy, tensor))
            if dtype in _NAMES
            else _refused(shape, f'array {name!r} of {path}', dtype)
        )
    return WeightFile(str(path), 'pth', arrays, {}, notes)


# Writing.


def write_weights(
    path: pathlib.Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes arrays bit for bit, all of them or nothing.

    Args:
      path: its ending says the format: `.npz`, `.safetensors`, or `.pth`, `.pt`,
        `.bin` for a state dict of PyTorch.
      arrays: by name, of any shape.
      metadata: kept where the format has a place for it: by safetensors.

    Raises:
      UserError: for another ending, other than plain numbers, or a path that cannot
        be written.
    """
    if path.suffix not in _WRITERS:
        raise UserError(
            f'{path} does not say its format; let it end in one of '
            f'{", ".join(_WRITERS)}'
        )
    if path.is_dir():
        raise UserError(f'{path} is a folder; name a file')
    plain = {}
    for name, array in arrays.items():
        array = np.asarray(array, order='C')
        if array.dtype.name not in _NAMES:
            raise UserError(
                f'cannot write {path}: array {name!r} is of type {array.dtype.name}; '
                'weights are plain numbers'
            )
        plain[name] = array.astype(array.dtype.newbyteorder('='), copy=False)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        _WRITERS[path.suffix](temporary, plain, metadata)
        temporary.chmod(mode)  # safetensors lets only the owner read
        os.replace(temporary, path)
    except UserError:
        raise
    except Exception as error:  # the writers raise whatever they raise
        hint = '' if isinstance(error, OSError) else '; is the disk full?'
        raise UserError(f'cannot write {path}: {reason(error)}{hint}') from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _write_npz(
    path: pathlib.Path, arrays: dict[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    # Not np.savez: it cannot write an array of the name 'file'.
    with zipfile.ZipFile(path, 'w') as archive:
        for name, array in arrays.items():
            stored = array.view('V2') if array.dtype == _BFLOAT16 else array
            with archive.open(f'{name}.npy', 'w', force_zip64=True) as file:
                np.lib.format.write_array(file, stored, allow_pickle=False)


def _write_safetensors(
    path: pathlib.Path, arrays: dict[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    from safetensors.numpy import save_file

    save_file(arrays, path, metadata=dict(metadata) or None)


def _write_torch(
    path: pathlib.Path, arrays: dict[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    write_state_dict(path, arrays)


_WRITERS = {
    '.npz': _write_npz,
    '.safetensors': _write_safetensors,
    '.pth': _write_torch,
    '.pt': _write_torch,
    '.bin': _write_torch,
}
