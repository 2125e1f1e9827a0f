"""JPEGs to training batches: our host pipeline beside tf.data, per core.

    python experiments/input_pipeline/benchmark.py

Decode, random resized crop to 224, mirror, batch of uint8. The pipelines take turns,
so that other work on the machine hits all of them; a ratio is taken within a round.
Without TensorFlow, ours is measured alone.
"""

import argparse
import multiprocessing
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import numpy as np
from PIL import Image

from vit_jax.data.input_pipeline import train_batches
from vit_jax.data.transforms import TrainTransform

SIZES = ((500, 375), (375, 500), (500, 333), (400, 300), (640, 480))  # like ImageNet's
SIZE = (224, 224)
# In the same round: its throughput is 1 in the columns of ratios.
BASELINE = 'tf.data'


class Jpegs:
    """Files in memory: what is measured is what follows reading."""

    def __init__(self, files: list[bytes]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        return {'image': self.files[index], 'label': index, 'name': f'{index}.jpg'}


def make_photos(folder: pathlib.Path) -> None:
    """scikit-learn's two photographs, at the sizes that ImageNet's images have."""
    from sklearn.datasets import load_sample_images

    for i, pixels in enumerate(load_sample_images().images):
        for width, height in SIZES:
            photo = Image.fromarray(pixels).resize((width, height))
            photo.save(folder / f'{i}_{width}x{height}.jpg', quality=92)


def read_jpegs(folder: pathlib.Path) -> list[bytes]:
    """All JPEG files below a folder."""
    suffixes = ('.jpg', '.jpeg')  # ImageNet's is .JPEG
    paths = [p for p in sorted(folder.rglob('*')) if p.suffix.lower() in suffixes]
    if not paths:
        sys.exit(f'no .jpg or .jpeg below {folder}')
    return [path.read_bytes() for path in paths]


# --- The pipelines: files -> batches of images ------------------------------------


def ours(files: list[bytes], batch_size: int, num_workers: int) -> Iterator[np.ndarray]:
    """`train_batches`."""
    transform = TrainTransform(SIZE, 3, crop='resized', flip=True)
    batches = train_batches(
        Jpegs(files), transform, batch_size=batch_size, seed=0, num_workers=num_workers
    )
    with closing(batches):
        for batch in batches:
            yield batch['image']


def tf_data(files: list[bytes], batch_size: int, fused: bool) -> Iterator[np.ndarray]:
    """The same in tf.data.

    Args:
      files: encoded images.
      batch_size: images of a batch.
      fused: whether to decode the box only, and to resize with neither antialiasing
        nor a cubic filter, as is customary there; else the operations are ours.
    """
    import tensorflow as tf

    def load(data: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(data),
            tf.zeros((1, 0, 4)),
            seed=tf.stack([seed, 0]),
            area_range=(0.08, 1.0),
            max_attempts=10,
            min_object_covered=0.0,
            use_image_if_no_bounding_boxes=True,
        )
        (top, left, _), (height, width, _) = tf.unstack(begin), tf.unstack(size)
        if fused:
            box = tf.stack([top, left, height, width])
            image = tf.image.decode_and_crop_jpeg(data, box, channels=3)
            image = tf.image.resize(image, SIZE, 'bilinear')
        else:
            image = tf.image.decode_jpeg(data, channels=3)
            image = image[top : top + height, left : left + width]
            image = tf.image.resize(image, SIZE, 'bicubic', antialias=True)
        image = tf.image.stateless_random_flip_left_right(image, tf.stack([seed, 1]))
        return tf.cast(tf.clip_by_value(tf.round(image), 0.0, 255.0), tf.uint8)

    dataset = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files), seed=0)
    dataset = tf.data.Dataset.zip((dataset.repeat(), tf.data.Dataset.counter()))
    dataset = dataset.map(load, num_parallel_calls=tf.data.AUTOTUNE)
    return dataset.batch(batch_size).prefetch(tf.data.AUTOTUNE).as_numpy_iterator()


# --- Measuring --------------------------------------------------------------------


def cpu_seconds() -> float:
    """What this process and its children have computed so far."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        fields = pathlib.Path(f'/proc/{child.pid}/stat').read_text().rpartition(')')[2]
        total += sum(map(int, fields.split()[11:13])) / os.sysconf('SC_CLK_TCK')
    return total


def measure(
    make: Callable[[], Iterator[np.ndarray]], count: int
) -> tuple[float, float]:
    """Images per second of wall clock, and per second of one core's work."""
    batches = make()
    for _ in range(3):  # until threads and processes are at work
        next(batches)
    wall, cpu, images = time.perf_counter(), cpu_seconds(), 0
    while images < count:
        batch = next(batches)
        assert batch.shape[1:] == (*SIZE, 3)
        assert batch.dtype == np.uint8
        images += len(batch)
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    getattr(batches, 'close', lambda: None)()
    return images / wall, images / cpu


def table(rounds: list[dict[str, tuple[float, float]]]) -> str:
    """Medians over the rounds, and the ratios to the baseline of the same round."""
    lines = [
        f'| pipeline | images/s | images/s per core | ratio to {BASELINE}, per core |',
        '| --- | --- | --- | --- |',
    ]
    for name in rounds[0]:
        wall, core = (statistics.median(r[name][i] for r in rounds) for i in (0, 1))
        ratio = 'not run'
        if BASELINE in rounds[0]:
            ratios = sorted(r[name][1] / r[BASELINE][1] for r in rounds)
            middle = statistics.median(ratios)
            ratio = f'{middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})'
        lines.append(f'| {name} | {wall:.0f} | {core:.0f} | {ratio} |')
    return '\n'.join(lines)


def main() -> None:
    """Measures, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--folder', type=pathlib.Path, help='of JPEGs')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--images', type=int, default=512, help='of a round')
    parser.add_argument('--batch_size', type=int, default=32)
    parser.add_argument('--num_workers', type=int, default=2)
    args = parser.parse_args()

    if args.folder:
        files = read_jpegs(args.folder)
    else:
        with tempfile.TemporaryDirectory() as folder:
            make_photos(pathlib.Path(folder))
            files = read_jpegs(pathlib.Path(folder))
    size = args.batch_size
    pipelines = {
        'vit_jax, threads': lambda: ours(files, size, 0),
        f'vit_jax, {args.num_workers} processes': lambda: ours(
            files, size, args.num_workers
        ),
    }
    try:
        import tensorflow as tf
    except ImportError:
        print('TensorFlow is not installed here: vit_jax alone is measured', flush=True)
    else:
        print(f'TensorFlow {tf.__version__}')
        pipelines[BASELINE] = lambda: tf_data(files, size, fused=False)
        pipelines['tf.data, box decoded, bilinear without antialiasing'] = lambda: (
            tf_data(files, size, fused=True)
        )
    rounds = []
    for i in range(args.rounds):
        rounds.append({name: measure(p, args.images) for name, p in pipelines.items()})
        print(f'round {i + 1} of {args.rounds}', file=sys.stderr)
    print(f'{len(files)} JPEGs, {os.cpu_count()} cores, median of {len(rounds)} rounds')
    print(table(rounds))


if __name__ == '__main__':
    main()
