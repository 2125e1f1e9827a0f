"""A small ImageNet in every form that people have it in."""

import io
import json
import struct
import tarfile

import numpy as np
from PIL import Image

SYNSETS = {'n01440764': 0, 'n01484850': 2, 'n02105855': 230}
COUNTS = (5, 7, 3)  # training images of each
NUM_VAL = 11
# The first lines of the official list, by the labels of TFDS.
VAL_LABELS = (65, 970, 230, 809, 516, 57, 334, 415, 674, 332, 109)


def make_images():
    """{split: {name: (label, synset or None, bytes)}}, unlike one another."""
    rng = np.random.default_rng(0)
    train, val = {}, {}
    for (synset, label), count in zip(SYNSETS.items(), COUNTS):
        for i in range(count):
            kind = 'JPEG'
            if synset == 'n02105855' and i == 1:
                kind = 'PNG'  # as n02105855_2933.JPEG is
            mode = 'CMYK' if (synset, i) == ('n01484850', 2) else 'RGB'
            # Names whose order by number is not that by letters.
            name = f'{synset}_{(2933 if kind == "PNG" else 9 * i + 2)}.JPEG'
            train[name] = (label, synset, encode(rng, kind, mode))
    for i, label in enumerate(VAL_LABELS):
        name = f'ILSVRC2012_val_{i + 1:08}.JPEG'
        val[name] = (label, None, encode(rng, 'JPEG', 'RGB'))
    return {'train': train, 'validation': val}


def encode(rng, kind, mode):
    pixels = rng.integers(0, 256, (13, 17, len(mode))).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels, mode).save(file, kind)
    return file.getvalue()


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_tars(root, images):
    """The two tars; members lie in no order."""
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / 'ILSVRC2012_img_train.tar', 'w') as outer:
        for synset in sorted({image[1] for image in images['train'].values()})[::-1]:
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode='w') as inner:
                for name, (_, of, data) in reversed(images['train'].items()):
                    if of == synset:
                        add(inner, name, data)
            add(outer, f'{synset}.tar', file.getvalue())
    with tarfile.open(root / 'ILSVRC2012_img_val.tar', 'w') as tar:
        for name, (_, _, data) in reversed(images['validation'].items()):
            add(tar, name, data)
    return root


def write_folder(root, images, names=None):
    """train/SYNSET/ and val/; val is flat, or by `names` of labels."""
    for name, (_, synset, data) in images['train'].items():
        path = root / 'train' / synset / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for name, (label, _, data) in images['validation'].items():
        path = root / 'val' / (names[label] if names else '') / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def crc32c(data):
    """CRC-32C, bit by bit (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def frame(record):
    """A record of a tfrecord file."""

    def masked(data):
        crc = crc32c(data)
        return struct.pack('<I', (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32)

    length = struct.pack('<Q', len(record))
    return length + masked(length) + record + masked(record)


def field(number, data):
    """A field of bytes in a protocol buffer."""

    def varint(value):
        low, rest = value & 127, value >> 7
        return bytes([low | 128]) + varint(rest) if rest else bytes([low])

    return varint(number << 3 | 2) + varint(len(data)) + data


def serialize(name, label, data):
    """A tf.train.Example, byte by byte."""
    values = {
        'file_name': field(1, field(1, name.encode())),
        'image': field(1, field(1, data)),
        'label': field(3, field(1, bytes([label & 127 | 128, label >> 7]))),
    }
    entries = [
        field(1, field(1, key.encode()) + field(2, value))
        for key, value in values.items()
    ]
    return field(1, b''.join(entries))


def write_tfrecords(root, images, version='5.0.0', features=None):
    """As TFDS has written them: two files of training images, one to validate."""
    folder = root / 'imagenet2012' / version
    folder.mkdir(parents=True)
    splits = []
    for split, count in (('train', 2), ('validation', 1)):
        records = [
            frame(serialize(name, label, data))
            for name, (label, _, data) in images[split].items()
        ]
        lengths = []
        for i in range(count):
            part = records[i::count]
            name = f'imagenet2012-{split}.tfrecord-{i:05}-of-{count:05}'
            (folder / name).write_bytes(b''.join(part))
            lengths.append(str(len(part)))
        splits.append({'name': split, 'shardLengths': lengths, 'numBytes': '1'})
    info = {'name': 'imagenet2012', 'version': version, 'splits': splits}
    if features is not None:
        features.save_config(str(folder))
        info['fileFormat'] = 'tfrecord'
    (folder / 'dataset_info.json').write_text(json.dumps(info))
    return root
