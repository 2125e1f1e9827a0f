import argparse
import gzip
import io
import json
import os
import pathlib
import pickle
import resource
import struct
import sys
import tarfile
import tracemalloc
import warnings
import zipfile

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from vit_jax.errors import UserError
from vit_jax.pretrained.files import open_weights, write_weights

NUMBERS = ['float64', 'float32', 'float16', 'bfloat16', 'int64', 'int32', 'int16']
NUMBERS += ['int8', 'uint64', 'uint32', 'uint16', 'uint8', 'bool']


@pytest.fixture
def torch():
    return pytest.importorskip('torch')


def random_arrays():
    """Every type of number, of ranks 0 to 3, with bits of all kinds."""
    rng = np.random.default_rng(0)
    shapes = [(), (3,), (2, 5), (7, 1, 3), (0, 3)]
    arrays = {}
    for i, name in enumerate(NUMBERS):
        dtype, shape = np.dtype(name), shapes[i % len(shapes)]
        bits = rng.integers(0, 2 if name == 'bool' else 256, (*shape, dtype.itemsize))
        arrays[f'block_{i}/{name}'] = bits.astype(np.uint8).view(dtype).reshape(shape)
    return arrays


def save_npz(path, compress=False, **arrays):
    (np.savez_compressed if compress else np.savez)(path, **arrays)
    return path


def save_zip(path, compression=zipfile.ZIP_STORED, **entries):
    with zipfile.ZipFile(path, 'w', compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def save_safetensors(path, header, data=b'', size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if size is None else size
    path.write_bytes(struct.pack('<Q', size) + text + data)
    return path


def save_index(folder, shards, weight_map=None):
    """A sharded file: {shard: arrays}."""
    for name, arrays in shards.items():
        safetensors.numpy.save_file(arrays, folder / name, {f'of {name}': 'x'})
    if weight_map is None:
        weight_map = {key: name for name, arrays in shards.items() for key in arrays}
    path = folder / 'model.safetensors.index.json'
    path.write_text(
        json.dumps({'metadata': {'total_size': 3}, 'weight_map': weight_map})
    )
    return path


def refuse(path, *parts):
    """That a file cannot be opened, and the one line that says so."""
    with pytest.raises(UserError) as caught:
        open_weights(path)
    return check_line(caught.value, path, *parts)


def refuse_array(path, name, *parts):
    """The same, of a file that can be opened and an array that cannot be read."""
    array = open_weights(path).arrays[name]
    with pytest.raises(UserError) as caught:
        array.read()
    return check_line(caught.value, path, repr(name), *parts)


def check_line(error, path, *parts):
    line = str(error)
    assert '\n' not in line
    assert len(line) < 500
    for part in (str(path), *parts):
        assert part in line, line
    return line


def same_bits(left, right):
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    assert left.tobytes() == right.tobytes()


# Round trips.


@pytest.mark.parametrize('ending', ['.npz', '.safetensors', '.pth', '.pt', '.bin'])
def test_what_is_written_is_read_bit_for_bit(tmp_path, ending, request):
    if ending in ('.pth', '.pt', '.bin'):
        request.getfixturevalue('torch')
    arrays = random_arrays()
    path = tmp_path / f'weights{ending}'
    write_weights(path, arrays, {'format': 'pt', 'note': 'ä\n'})
    # The content says what it is, not the ending.
    other = path.rename(tmp_path / 'weights.dat')
    weights = open_weights(other)
    assert weights.kind == {'.npz': 'npz', '.safetensors': 'safetensors'}.get(
        ending, 'pth'
    )
    assert weights.path == str(other)
    assert weights.notes == []
    kept = {'format': 'pt', 'note': 'ä\n'} if ending == '.safetensors' else {}
    assert weights.metadata == kept
    assert set(weights.arrays) == set(arrays)
    for name, array in arrays.items():
        lazy = weights.arrays[name]
        assert (lazy.shape, lazy.dtype) == (array.shape, array.dtype)
        same_bits(lazy.read(), array)


def test_others_read_what_is_written(tmp_path):
    arrays = {name: a for name, a in random_arrays().items() if 'bfloat' not in name}
    write_weights(tmp_path / 'a.npz', arrays, {})
    write_weights(tmp_path / 'a.safetensors', arrays, {})
    with np.load(tmp_path / 'a.npz', allow_pickle=False) as npz:
        tensors = safetensors.numpy.load_file(tmp_path / 'a.safetensors')
        assert set(npz) == set(tensors) == set(arrays)
        for name, array in arrays.items():
            same_bits(npz[name], array)
            same_bits(tensors[name], array)


def test_torch_reads_what_is_written(tmp_path, torch):
    arrays = random_arrays()
    write_weights(tmp_path / 'a.pth', arrays, {})
    held = torch.load(tmp_path / 'a.pth', weights_only=True)
    assert list(held) == list(arrays)
    for name, array in arrays.items():
        assert str(held[name].dtype) == f'torch.{array.dtype}'
        assert held[name].untyped_storage().tolist() == list(array.tobytes())


@pytest.mark.parametrize('ending', ['.npz', '.safetensors', '.pth'])
def test_arrays_of_any_layout_are_written(tmp_path, ending, request):
    if ending == '.pth':
        request.getfixturevalue('torch')
    base = np.arange(30, dtype=np.float32).reshape(5, 6)
    arrays = {
        'file': base.T,
        'strided': base[::2, 1:4],
        'expanded': np.broadcast_to(base[0], (3, 6)),
        'swapped': base.astype('>f4'),
        'jax': jnp.asarray(base),
    }
    path = tmp_path / f'a{ending}'
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # PyTorch does, of memory it may not write to
        write_weights(path, arrays, {})
    for name, lazy in open_weights(path).arrays.items():
        assert lazy.dtype.isnative
        np.testing.assert_array_equal(lazy.read(), np.asarray(arrays[name]))


def test_npz_of_numpy_in_its_variants(tmp_path):
    base = np.arange(30, dtype=np.float32).reshape(5, 6)
    arrays = {'f': base.T, 's': base.astype('>f4'), 'z': np.asfortranarray(base[:0])}
    for compress in (False, True):
        path = save_npz(tmp_path / f'{compress}.npz', compress, **arrays)
        for name, lazy in open_weights(path).arrays.items():
            assert lazy.dtype == np.dtype('=f4')
            assert lazy.read().dtype.isnative
            np.testing.assert_array_equal(lazy.read(), arrays[name])


def test_bfloat16_is_found_where_numpy_lost_its_name(tmp_path):
    array = np.array([1.5, -0.0, np.inf], ml_dtypes.bfloat16)
    path = save_npz(tmp_path / 'a.npz', a=array)  # as Google's files hold it
    (lazy,) = open_weights(path).arrays.values()
    assert lazy.dtype == ml_dtypes.bfloat16
    same_bits(lazy.read(), array)


def test_unaligned_safetensors(tmp_path):
    array = np.arange(3, dtype=np.float32)
    header = {'a': {'dtype': 'F32', 'shape': [3], 'data_offsets': [0, 12]}}
    for pad in range(4):
        text = json.dumps(header).encode() + b' ' * pad
        path = save_safetensors(tmp_path / 'a', text, array.tobytes())
        np.testing.assert_array_equal(open_weights(path).arrays['a'].read(), array)


# Cost.


def peak_of(function):
    tracemalloc.start()
    try:
        return function(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize('ending', ['.npz', '.safetensors'])
def test_opening_costs_nothing_and_reading_one_array_only_it(tmp_path, ending):
    path = tmp_path / f'a{ending}'
    write_weights(path, {f'{i}': np.full(500_000, i, np.float32) for i in range(5)}, {})
    weights, opening = peak_of(lambda: open_weights(path))
    array, reading = peak_of(weights.arrays['3'].read)
    assert opening < 500_000
    assert reading < 2_500_000
    assert array[-1] == 3


@pytest.mark.parametrize('ending', ['.npz', '.safetensors', '.pth'])
def test_what_was_read_stays_when_the_file_changes(tmp_path, ending, request):
    if ending == '.pth':
        request.getfixturevalue('torch')
    path = tmp_path / f'a{ending}'
    arrays = {'a': np.ones(9_999), 'b': np.ones(9_999, ml_dtypes.bfloat16)}
    write_weights(path, arrays, {})
    held = {name: lazy.read() for name, lazy in open_weights(path).arrays.items()}
    size = path.stat().st_size
    with path.open('rb+') as file:  # in place, as `cp` does
        file.write(bytes(size))
    for name, array in held.items():
        same_bits(array, arrays[name])


@pytest.mark.parametrize('ending', ['.npz', '.safetensors'])
def test_a_file_put_in_its_place_is_another_one(tmp_path, ending):
    path = tmp_path / f'a{ending}'
    write_weights(path, {'a': np.ones(9_999)}, {})
    weights = open_weights(path)
    write_weights(path, {'a': np.zeros(9_999)}, {})
    assert weights.arrays['a'].read().all()


# Folders and shards.


def test_folder_of_hugging_face(tmp_path):
    one, two = np.ones((2, 3), np.float32), np.zeros(5, np.float16)
    index = save_index(tmp_path, {'b-2.safetensors': {'a': one}, 'b-1': {'b': two}})
    for path in (tmp_path, index):
        weights = open_weights(path)
        assert weights.path == str(index)
        assert weights.kind == 'safetensors'
        assert weights.notes == ['2 shards of model.safetensors.index.json']
        assert weights.metadata == {'of b-1': 'x', 'of b-2.safetensors': 'x'}
        same_bits(weights.arrays['a'].read(), one)
        same_bits(weights.arrays['b'].read(), two)
    write_weights(tmp_path / 'model.safetensors', {'c': one}, {})
    assert set(open_weights(tmp_path).arrays) == {'c'}


def test_shards_of_torch(tmp_path, torch):
    torch.save({'module.a': torch.ones(2)}, tmp_path / 'p-1.bin')
    torch.save({'model': {'module.b': torch.ones(3)}}, tmp_path / 'p-2.bin')
    weight_map = {'module.a': 'p-1.bin', 'module.b': 'p-2.bin'}
    index = tmp_path / 'pytorch_model.bin.index.json'
    index.write_text(json.dumps({'weight_map': weight_map}))
    weights = open_weights(tmp_path)
    assert weights.kind == 'pth'
    assert set(weights.arrays) == {'a', 'b'}
    assert "took 'model' of model" in weights.notes
    torch.save({'c': torch.ones(2)}, tmp_path / 'pytorch_model.bin')
    assert set(open_weights(tmp_path).arrays) == {'c'}


def test_shards_that_do_not_fit(tmp_path):
    one, two = {'a': np.ones(2)}, {'b': np.ones(3)}
    index = save_index(tmp_path, {'1': one, '2': one | two}, {'a': '1', 'b': '2'})
    refuse(index, "array 'a' is in two shards")
    index = save_index(tmp_path, {'1': one, '2': two}, {'a': '1', 'b': '2', 'c': '2'})
    refuse(index, "array 'c' is not in its shard '2'")
    index = save_index(tmp_path, {'1': one}, {'a': '1', 'b': 'gone'})
    refuse(index, "shard 'gone', which is not there")
    index = save_index(tmp_path, {'1': one}, {'a': '1', 'b': index.name})
    refuse(tmp_path / index.name, 'text, not weights')
    save_safetensors(tmp_path / '3', {}, size=99)
    index = save_index(tmp_path, {'1': one}, {'a': '1', 'b': '3'})
    with pytest.raises(UserError, match='3 is damaged or cut off'):
        open_weights(index)


@pytest.mark.parametrize(
    'shard',
    ['../1', '/etc/passwd', 'a/../1', '..', '.', '', '..\\1', '1\0', 'a\n/1', 7],
)
def test_an_index_stays_in_its_folder(tmp_path, shard):
    folder = tmp_path / 'in'
    folder.mkdir()
    write_weights(tmp_path / '1.npz', {'a': np.ones(2)}, {})
    (tmp_path / '1.npz').rename(tmp_path / '1')
    refuse(save_index(folder, {}, {'a': shard}), repr(str(shard)))


def test_folders_without_weights(tmp_path):
    refuse(tmp_path, 'a folder without weights', 'model.safetensors')
    (tmp_path / 'a.safetensors.index.json').write_text('{}')
    (tmp_path / 'b.safetensors.index.json').write_text('{}')
    refuse(tmp_path, 'a.safetensors.index.json, b.safetensors.index.json; name one')
    (tmp_path / 'checkpoints').mkdir()
    refuse(tmp_path, 'the workdir of a run')


# What is no weight file.


def test_what_is_not_there(tmp_path):
    line = refuse(tmp_path / 'gone.npz')
    assert line == f'no such file or folder: {tmp_path / "gone.npz"}'
    (tmp_path / 'link').symlink_to(tmp_path / 'gone')
    refuse(tmp_path / 'link', 'no such file')
    os.mkfifo(tmp_path / 'pipe')
    refuse(tmp_path / 'pipe', 'no regular file')
    refuse(pathlib.Path('/dev/zero'), 'no regular file')


def tar_bytes():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode='w') as archive:
        archive.addfile(tarfile.TarInfo('weights.npz'))
    return file.getvalue()


@pytest.mark.parametrize(
    ('content', 'part'),
    [
        (b'', 'is empty'),
        (b'\n', 'is text'),
        (b'name,value\n1,2\n', 'is text'),
        (b'[1, 2]', 'is text'),
        (b'\x00\x01\x02' * 9, 'of no known kind'),
        (b'\xff\xd8\xff\xe0', 'of no known kind'),
        (b'  <!DOCTYPE HTML><title>404</title>', 'a web page'),
        (b'\xef\xbb\xbf<html>', 'a web page'),
        (b'<?xml version="1.0"?><Error>', 'a web page'),
        (
            b'version https://git-lfs.github.com/spec/v1\noid sha256:4d\n',
            'git lfs pull',
        ),
        (npy(np.ones(3)), 'a single array'),
        (gzip.compress(b'x' * 99, mtime=0), 'a gzip archive'),
        (tar_bytes(), 'a tar archive'),
        (pickle.dumps({'a': 1}), 'a Python pickle'),
        (b'{"a": 1}', "JSON without 'weight_map'"),
        (b'{"weight_map": ["a"]}', "JSON without 'weight_map'"),
        (b'{"weight_map": {}}', "JSON without 'weight_map'"),
        (b'{"weight_map": ', 'is damaged or cut off'),
        (b'{"a":' * 100_000, 'is damaged or cut off'),
        (b'{"\xff": 1}', 'is damaged or cut off'),
    ],
)
def test_other_files_are_named(tmp_path, content, part):
    path = tmp_path / 'weights.npz'
    path.write_bytes(content)
    refuse(path, part)


# Hostile npz.


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_objects_in_npz_are_not_executed(tmp_path):
    made = tmp_path / 'made'
    path = save_npz(tmp_path / 'a.npz', a=np.array([Payload(made)], object))
    refuse(path, "'a'", 'pickled objects')
    fields = np.zeros(2, [('x', 'O'), ('y', 'f4')])
    refuse(save_npz(tmp_path / 'b.npz', b=fields), "'b'", 'pickled objects')
    assert not made.exists()
    with np.load(path, allow_pickle=True) as npz:
        assert npz['a'].size  # the payload is a real one
    assert made.exists()


@pytest.mark.parametrize(
    ('array', 'name'),
    [
        (np.array(['a']), 'str32'),
        (np.zeros(2, 'M8[s]'), 'datetime64[s]'),
        (np.zeros(2, [('a', 'i1')]), 'void8'),
        (np.zeros(2, complex), 'complex128'),
    ],
)
def test_other_than_numbers_matters_only_where_it_is_read(tmp_path, array, name):
    path = save_npz(tmp_path / 'a.npz', a=array, b=np.ones(2))
    np.testing.assert_array_equal(open_weights(path).arrays['b'].read(), 1)
    assert open_weights(path).arrays['a'].dtype.kind == 'V'
    assert open_weights(path).arrays['a'].type_name == name
    refuse_array(path, 'a', 'plain numbers')


def test_structures_of_two_bytes_are_no_bfloat16(tmp_path):
    array = np.zeros(3, [('x', 'i1'), ('y', 'i1')])
    refuse_array(save_npz(tmp_path / 'a.npz', a=array), 'a', 'plain numbers')


def npy_header(shape, descr='<f4', version=1, order=False):
    text = f"{{'descr': {descr!r}, 'fortran_order': {order}, 'shape': {shape}}}\n"
    size = struct.pack('<H' if version == 1 else '<I', len(text))
    return b'\x93NUMPY' + bytes([version, 0]) + size + text.encode()


@pytest.mark.parametrize(
    'shape',
    [(10**15,), (2, 4), (2, 2), (-2, -3), (10**400, 10**400), '(0,' * 9, "('a',)"],
    ids=str,
)
def test_headers_that_promise_something_else(tmp_path, shape):
    entry = npy_header(shape) + bytes(24)
    refuse(save_zip(tmp_path / 'a.npz', **{'a.npy': entry}), "'a'", 'damaged')


def test_headers_of_all_versions(tmp_path):
    for version in (1, 2, 3):
        entry = npy_header((2, 3), version=version) + bytes(24)
        path = save_zip(tmp_path / 'a.npz', **{'a.npy': entry})
        assert open_weights(path).arrays['a'].read().shape == (2, 3)


def test_an_endless_header_is_not_read(tmp_path):
    entry = b'\x93NUMPY\x02\x00' + struct.pack('<I', 2**31) + b' ' * 30_000_000
    path = save_zip(tmp_path / 'a.npz', zipfile.ZIP_DEFLATED, **{'a.npy': entry})
    _, peak = peak_of(lambda: refuse(path, "'a'", 'damaged'))
    assert peak < 1_000_000


def test_a_bomb_costs_no_more_than_its_header_promises(tmp_path):
    entry = npy_header((5_000,)) + bytes(30_000_000)
    path = save_zip(tmp_path / 'a.npz', zipfile.ZIP_DEFLATED, **{'a.npy': entry})
    refuse(path, "'a'", 'damaged')
    # The same with a directory that tells the size of the header's promise.
    data = bytearray(path.read_bytes())
    at = data.rindex(b'PK\x01\x02') + 24
    data[at : at + 4] = struct.pack('<I', len(npy_header((5_000,))) + 20_000)
    path.write_bytes(data)
    _, peak = peak_of(lambda: refuse_array(path, 'a', 'damaged'))
    assert peak < 1_000_000


def test_a_promise_of_much_costs_nothing_before_it_is_read(tmp_path):
    entry = npy_header((6_000_000,)) + bytes(24_000_000)
    path = save_zip(tmp_path / 'a.npz', zipfile.ZIP_DEFLATED, **{'a.npy': entry})
    weights, peak = peak_of(lambda: open_weights(path))
    assert weights.arrays['a'].shape == (6_000_000,)
    assert peak < 1_000_000


def test_damaged_npz(tmp_path):
    path = save_npz(tmp_path / 'a.npz', a=np.full(9_999, 7.0), b=np.ones(3))
    data = path.read_bytes()
    for kept in (5, 1_000, len(data) - 30):
        path.write_bytes(data[:kept])
        refuse(path, 'damaged or cut off')
    path.write_bytes(data[:20] + data[40:])  # its directory begins at -20
    refuse(path, 'damaged or cut off')
    path.write_bytes(data.replace(np.full(9, 7.0).tobytes(), bytes(72), 1))
    np.testing.assert_array_equal(open_weights(path).arrays['b'].read(), 1)
    refuse_array(path, 'a', 'damaged or cut off', 'CRC')
    path = save_npz(tmp_path / 'c.npz', True, a=np.random.default_rng(0).random(9_999))
    data = bytearray(path.read_bytes())
    data[40_000:40_100] = bytes(100)
    path.write_bytes(data)
    refuse_array(path, 'a', 'damaged or cut off')


def test_zip_archives_that_are_no_npz(tmp_path):
    refuse(save_zip(tmp_path / '1'), 'holds no arrays')
    refuse(save_zip(tmp_path / '2', **{'a\n.txt': b'x'}), r"'a\n.txt'", 'zip archive')
    with zipfile.ZipFile(tmp_path / '3', 'w') as archive:
        archive.writestr('a.npy', npy(np.ones(2)))
        with pytest.warns(UserWarning, match='Duplicate'):
            archive.writestr('a.npy', npy(np.zeros(2)))
    refuse(tmp_path / '3', "two arrays 'a'")
    data = save_zip(tmp_path / '4', **{'a.npy': npy(np.ones(2))}).read_bytes()
    for at, flag in (
        (data.index(b'PK\x03\x04') + 6, 1),
        (data.rindex(b'PK\x01\x02') + 8, 1),
    ):
        data = data[:at] + bytes([data[at] | flag]) + data[at + 1 :]
    (tmp_path / '4').write_bytes(data)
    refuse(tmp_path / '4', "'a'", 'encrypted')


# Hostile safetensors.


ONE = {'a': {'dtype': 'F32', 'shape': [2, 3], 'data_offsets': [0, 24]}}


def test_damaged_safetensors(tmp_path):
    path = save_safetensors(tmp_path / 'a', ONE, bytes(24))
    data = path.read_bytes()
    assert open_weights(path).arrays['a'].read().shape == (2, 3)
    for changed in (data[:20], data[:-1], data + b'x', b'\xff' + data[1:]):
        path.write_bytes(changed)
        refuse(path, 'damaged or cut off')


@pytest.mark.parametrize(
    'about',
    [
        {'data_offsets': [0, 25]},
        {'data_offsets': [-4, 20]},
        {'data_offsets': [24, 0]},
        {'data_offsets': [0]},
        {'shape': [2, 10**15]},
        {'shape': [-2, -3]},
        {'shape': [2**63, 2]},
        {'shape': None},
        {'dtype': 'O'},
    ],
    ids=str,
)
def test_safetensors_headers_that_lie(tmp_path, about):
    path = save_safetensors(tmp_path / 'a', {'a': ONE['a'] | about}, bytes(24))
    refuse(path, 'damaged or cut off')


def test_safetensors_headers_that_are_none(tmp_path):
    for text in (b'{', b'{"a":' * 9_999, b'{"a\xff":1}', b'{"__metadata__":{"a":1}}'):
        refuse(save_safetensors(tmp_path / 'a', text), 'damaged or cut off')
    refuse(save_safetensors(tmp_path / 'a', b'{}'), 'holds no arrays')
    refuse(save_safetensors(tmp_path / 'a', b'{}', size=2**40), 'of no known kind')


def test_safetensors_of_other_types_matter_only_where_they_are_read(tmp_path):
    header = {'b\n': {'dtype': 'F8_E4M3', 'shape': [3], 'data_offsets': [24, 27]}}
    path = save_safetensors(tmp_path / 'a', ONE | header, bytes(27))
    weights = open_weights(path)
    assert not weights.arrays['a'].read().any()
    assert weights.arrays['b\n'].shape == (3,)
    assert weights.arrays['b\n'].dtype.kind == 'V'
    assert weights.arrays['b\n'].type_name == 'F8_E4M3'
    assert weights.arrays['a'].type_name == 'float32'
    refuse_array(path, 'b\n', 'F8_E4M3')


# PyTorch.


FORMATS = pytest.mark.parametrize('zipped', [True, False])


def save_torch(torch, path, held, zipped=True):
    torch.save(held, path, _use_new_zipfile_serialization=zipped)
    return path


def test_without_torch_pth_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', None)
    path = save_zip(tmp_path / 'a.npz', **{'archive/data.pkl': b''})
    refuse(path, "pip install 'vit_jax[torch]'", 'safetensors')
    path.write_bytes(b'\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.')
    refuse(path, "pip install 'vit_jax[torch]'")
    with pytest.raises(UserError, match='needs PyTorch: pip install'):
        write_weights(tmp_path / 'b.pth', {'a': np.ones(2)}, {})
    assert not (tmp_path / 'b.pth').exists()


def test_an_unsafe_torch_is_not_used(tmp_path, torch, monkeypatch):
    path = save_torch(torch, tmp_path / 'a.pth', {'a': torch.ones(2)})
    version = type(torch.__version__)
    monkeypatch.setattr(torch, '__version__', version('2.9.1+cpu'))
    refuse(path, 'needs PyTorch 2.10', '2.9.1')
    monkeypatch.setattr(torch, '__version__', version('2.10.0'))
    assert open_weights(path).arrays['a'].shape == (2,)


@FORMATS
def test_tensors_of_every_kind(tmp_path, torch, zipped):
    base = torch.arange(30, dtype=torch.float32).reshape(5, 6)
    tensors = {
        'transposed': base.T,
        'strided': base[::2, 1:4],
        'expanded': base[:1].expand(7, 6),
        'same memory': base,
        'scalar': torch.tensor(3.5),
        'none': torch.zeros(0, 3),
        'learned': torch.nn.Parameter(base[0]),
        'negative': torch.complex(base, base).conj().imag,
    }
    halves = {f'half {name}': x.detach().bfloat16() for name, x in tensors.items()}
    halves['half expanded'] = base[:1].bfloat16().expand(7, 6)
    path = save_torch(torch, tmp_path / 'a.pth', tensors | halves, zipped)
    arrays = open_weights(path).arrays
    assert set(arrays) == {*tensors, *halves}
    for name, tensor in (tensors | halves).items():
        lazy, array = arrays[name], arrays[name].read()
        assert lazy.shape == array.shape == tuple(tensor.shape)
        assert lazy.dtype == array.dtype == ('bfloat16' if 'half' in name else 'f4')
        values = np.reshape(tensor.tolist(), array.shape)
        np.testing.assert_array_equal(array.astype(float), values)


@FORMATS
@pytest.mark.parametrize(
    ('wrap', 'notes'),
    [
        (lambda d: d, []),
        (lambda d: {'model': d}, ["took 'model' of model"]),
        (
            lambda d: {'model': {'x': 1}, 'model_ema': d, 'optimizer': {}, 'epoch': 3},
            ["took 'model_ema' of model, model_ema, optimizer, epoch"],
        ),
        (
            lambda d: {'model': {'x': 1}, 'state_dict_ema': d, 'model_ema': None},
            ["took 'state_dict_ema' of model, state_dict_ema, model_ema"],
        ),
        (
            lambda d: {'student': {'x': 1}, 'teacher': d, 'model': {}},
            ["took 'teacher' of student, teacher, model"],
        ),
        (
            lambda d: {'state_dict': {'model': d, 'n\n1': 2}},
            ["took 'state_dict' of state_dict", "took 'model' of model, n 1"],
        ),
        (
            lambda d: {'module': d, 'optimizer': {}},
            ["took 'module' of module, optimizer"],
        ),
        (
            lambda d: {'state_dict': {f'model._orig_mod.{k}': v for k, v in d.items()}},
            [
                "took 'state_dict' of state_dict",
                "took 'model.' off every name",
                "took '_orig_mod.' off every name",
            ],
        ),
        (
            lambda d: {f'module.backbone.{k}': v for k, v in d.items()},
            ["took 'module.' off every name", "took 'backbone.' off every name"],
        ),
        (
            lambda d: {'model': d, 'args': argparse.Namespace(lr=0.1, output='x')},
            ["took 'model' of model, args"],
        ),
        (
            lambda d: {'model': d | {'step': 3, 7: d['patch.weight']}},
            ["took 'model' of model", 'skipped what is no tensor: step, 7'],
        ),
        (
            lambda d: {'model': {f'module.{k}': v for k, v in d.items()}},
            ["took 'model' of model", "took 'module.' off every name"],
        ),
    ],
)
def test_the_state_dict_is_found(tmp_path, torch, zipped, wrap, notes):
    tensors = {'patch.weight': torch.ones(2, 3), 'module.b': torch.zeros(5)}
    weights = open_weights(save_torch(torch, tmp_path / 'a', wrap(tensors), zipped))
    assert weights.notes == notes
    assert set(weights.arrays) == set(tensors)
    assert weights.arrays['patch.weight'].shape == (2, 3)


@pytest.mark.parametrize(
    ('names', 'inner', 'rest'),
    [
        ('backbone.a backbone.b head.c', 'a b head.c', 'head.c'),
        ('backbone.a head.b', None, None),  # not most
        ('backbone.a backbone.b a', None, None),  # two would be one
        ('model.a model.b module.c', None, None),  # not all
    ],
)
def test_prefixes_of_some_names(tmp_path, names, inner, rest):
    arrays = {name: np.full(2, i) for i, name in enumerate(names.split())}
    write_weights(tmp_path / 'a.npz', arrays, {})
    assert list(open_weights(tmp_path / 'a.npz').arrays) == list(arrays)
    write_weights(tmp_path / 'a.safetensors', arrays, {})
    weights = open_weights(tmp_path / 'a.safetensors')
    assert weights.notes == [f"took 'backbone.' off every name but {rest}"] * bool(rest)
    for name, old in zip((inner or names).split(), arrays, strict=True):
        same_bits(weights.arrays[name].read(), arrays[old])


def test_the_teacher_of_dino(tmp_path, torch):
    teacher = {f'backbone.blocks.{i}': torch.ones(2) for i in range(9)}
    held = {'student': {}, 'teacher': teacher | {'head.mlp': torch.ones(3)}}
    weights = open_weights(save_torch(torch, tmp_path / 'a', held))
    assert set(weights.arrays) == {*(f'blocks.{i}' for i in range(9)), 'head.mlp'}
    assert weights.notes[1:] == ["took 'backbone.' off every name but head.mlp"]


@FORMATS
def test_numbers_of_numpy_beside_the_weights(tmp_path, torch, zipped):
    held = {
        'model': {'a': torch.ones(2), 'b': np.float32(3)},
        'best': [np.float64(0.5), np.int64(3), np.bool_(True), np.str_('x')],
        'state': np.arange(3),
        np.int64(7): np.dtype('f4'),
    }
    path = save_torch(torch, tmp_path / 'a.pth', held, zipped)
    weights = open_weights(path)
    assert set(weights.arrays) == {'a'}
    assert weights.notes[1:] == ['skipped what is no tensor: b']
    if not zipped:  # which has no place for lengths and sums; as NumPy 1 writes it
        data = path.read_bytes()
        path.write_bytes(data.replace(b'numpy._core.', b'numpy.core.'))
        assert b'numpy.core.multiarray\nscalar' in path.read_bytes()
        assert set(open_weights(path).arrays) == {'a'}


class Made:
    """Pickled as a function of NumPy that is called with these arguments."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_numpy_is_not_asked_to_make_its_objects(tmp_path, torch):
    # Its own functions make pointers of bytes, where a dtype of the file says so.
    scalar = np.float64(1).__reduce__()[0]
    fields = Made(np.dtype, [('x', 'O')])
    held = {'a': torch.ones(2), 'b': Made(scalar, fields, bytes(8))}
    path = save_torch(torch, tmp_path / 'a.pth', held)
    assert open_weights(path).notes == ['skipped what is no tensor: b']
    with pytest.raises(RuntimeError, match='Unpickling NPY_LIST_PICKLE'):
        torch.load(path, weights_only=False)  # the real function is called
    held['b'] = Made(np.load, str(tmp_path / 'x'))
    refuse(save_torch(torch, path, held), 'pickled objects (numpy.load)')


@FORMATS
def test_pickled_code_is_not_executed(tmp_path, torch, zipped):
    made = tmp_path / 'made'
    held = {'a': torch.ones(2), 'b': Payload(made)}
    path = save_torch(torch, tmp_path / 'a.pth', held, zipped)
    line = refuse(path, 'pickled objects', 'posix.mkdir', 'nothing was executed')
    assert 'weights_only' not in line  # PyTorch's advice how to run it
    assert not made.exists()
    torch.load(path, weights_only=False)
    assert made.exists()  # the payload is a real one
    held = {'model': held['a'], 'args': argparse.Namespace(b=Payload(tmp_path / 'c'))}
    refuse(save_torch(torch, path, held, zipped), 'posix.mkdir')
    assert not (tmp_path / 'c').exists()


@FORMATS
@pytest.mark.parametrize(
    ('make', 'part'),
    [
        (lambda t: t.nn.Linear(2, 3), 'torch.nn.modules.linear.Linear'),
        (lambda t: t.ones(3), 'holds a Tensor'),
        (lambda t: [t.ones(3)], 'holds a list'),
        (lambda t: {}, 'holds no tensors, but nothing'),
        (lambda t: {'net': {'a': t.ones(2)}}, 'holds no tensors, but net'),
        (lambda t: {'a': t.eye(3).to_sparse()}, "'a'"),
        (lambda t: {'a': t.zeros(3, device='meta')}, "'a'"),
    ],
)
def test_pth_of_other_things(tmp_path, torch, zipped, make, part):
    refuse(save_torch(torch, tmp_path / 'a.pth', make(torch), zipped), part)


def test_nested_tensors_are_refused(tmp_path, torch):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # a prototype
        held = {'a': torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}
    refuse(save_torch(torch, tmp_path / 'a.pth', held), "'a'", 'nested')


@FORMATS
def test_tensors_of_other_types_matter_only_where_they_are_read(
    tmp_path, torch, zipped
):
    held = {'a': torch.zeros(3, dtype=torch.complex64), 'b': torch.ones(2)}
    path = save_torch(torch, tmp_path / 'a.pth', held, zipped)
    np.testing.assert_array_equal(open_weights(path).arrays['b'].read(), 1)
    refuse_array(path, 'a', 'complex64')
    assert open_weights(path).arrays['a'].type_name == 'complex64'


@FORMATS
def test_damaged_pth(tmp_path, torch, zipped):
    path = save_torch(torch, tmp_path / 'a.pth', {'a': torch.ones(9_999)}, zipped)
    data = path.read_bytes()
    for kept in (60, 500, 20_000, len(data) - 30):
        path.write_bytes(data[:kept])
        refuse(path)


def test_compressed_pth_is_refused(tmp_path, torch):
    path = save_torch(torch, tmp_path / 'a.pth', {'a': torch.zeros(9_999)})
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    path = save_zip(tmp_path / 'b.pth', zipfile.ZIP_DEFLATED, **entries)
    refuse(path, 'compressed, as no file of PyTorch is')


def test_a_tensor_larger_than_its_file(tmp_path, torch):
    path = save_torch(torch, tmp_path / 'a.pth', {'a': torch.zeros(1_000)})
    # BININT2 1000 in the pickle, for the storage's and the tensor's size.
    data = path.read_bytes().replace(b'M\xe8\x03', b'M\xff\xff')
    path.write_bytes(data)
    refuse(path)


def test_torchscript_is_refused(tmp_path):
    entries = {'a/data.pkl': b'', 'a/constants.pkl': b'', 'a/code/a.py': b''}
    refuse(save_zip(tmp_path / 'a.pt', **entries), 'TorchScript')


# Writing that fails.


@pytest.mark.parametrize('name', ['a', 'a.h5', 'a.npy', 'a.safetensors.gz'])
def test_an_unknown_ending(tmp_path, name):
    with pytest.raises(UserError, match='let it end in one of'):
        write_weights(tmp_path / name, {'a': np.ones(2)}, {})


@pytest.mark.parametrize('ending', ['.npz', '.safetensors', '.pth'])
def test_what_cannot_be_written_leaves_nothing(tmp_path, ending, request):
    if ending == '.pth':
        request.getfixturevalue('torch')
    small, large = {'a': np.ones(2)}, {'a': np.ones(100_000)}
    path = tmp_path / f'a{ending}'
    write_weights(path, small, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_999, limits[1]))  # a full disk
    try:
        with pytest.raises(UserError) as caught:
            write_weights(path, large, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    check_line(caught.value, path, 'cannot write')
    np.testing.assert_array_equal(open_weights(path).arrays['a'].read(), 1)
    for array in (np.array(['a']), np.array([None]), np.zeros(2, complex)):
        with pytest.raises(UserError) as caught:
            write_weights(path, {'b': array}, {})
        check_line(caught.value, path, "'b'", 'plain numbers')
    assert list(tmp_path.iterdir()) == [path]
    for wrong in (tmp_path / 'gone' / path.name, path / path.name):
        with pytest.raises(UserError) as caught:
            write_weights(wrong, small, {})
        check_line(caught.value, wrong, 'cannot write')
    (tmp_path / f'folder{ending}').mkdir()
    with pytest.raises(UserError, match='is a folder'):
        write_weights(tmp_path / f'folder{ending}', small, {})


@pytest.mark.parametrize('ending', ['.npz', '.safetensors', '.pth'])
def test_files_have_the_rights_of_other_files(tmp_path, ending, request):
    if ending == '.pth':
        request.getfixturevalue('torch')
    path = tmp_path / f'a{ending}'
    write_weights(path, {'a': np.ones(2)}, {})
    (tmp_path / 'other').touch()
    assert path.stat().st_mode == (tmp_path / 'other').stat().st_mode
