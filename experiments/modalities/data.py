"""Text, audio and video, forwards or backwards: both hold the same patches.

Examples come in twins, 2 i and 2 i + 1: a signal, and the same with its patches in
reverse order in time. So a model that does not know where a patch lies answers both
alike, and is right for one of them. Images of two classes that hold the same patches
are those of experiments/parts.

Examples are uint8 arrays of as many axes as the signal has.
"""

import dataclasses
import itertools
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vit_jax.data.datasets import Dataset, load_dataset
from vit_jax.data.transforms import decode_image

SPLITS = ('train', 'test')


def reverse_patches(signal: np.ndarray, axis: int, patch: int) -> np.ndarray:
    """The patches along an axis in reverse order, each as it was.

    >>> reverse_patches(np.arange(6), axis=0, patch=2)
    array([4, 5, 2, 3, 0, 1])
    """
    places = np.arange(signal.shape[axis]).reshape(-1, patch)
    return np.take(signal, places[::-1].ravel(), axis)


@dataclasses.dataclass(frozen=True)
class Twins:
    """Example 2 i is signal i, forwards; example 2 i + 1 its twin.

    Attributes:
      signals: uint8 `[n, *size, channels]`.
      axis: time, of `size`.
      patch: length of a patch in time.
      name: of the split.
    """

    signals: np.ndarray
    axis: int
    patch: int
    name: str

    def __len__(self) -> int:
        return 2 * len(self.signals)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair, label = divmod(index, 2)
        signal = self.signals[pair]
        if label:
            signal = reverse_patches(signal, self.axis, self.patch)
        return {'image': signal, 'label': label, 'name': f'{self.name}[{index}]'}


def make_dataset(
    name: str,
    location: str,
    class_names: tuple[str, str],
    counts: Mapping[str, int],
    shape: tuple[int, ...],
    axis: int,
    patch: int,
    read: Callable[[str], np.ndarray],
) -> Dataset:
    """The twins of the `counts[split]` signals that `read(split)` returns.

    Args:
      name, location, class_names: see `Dataset`.
      counts: signals of each split.
      shape: of a signal, `[*size, channels]`.
      axis, patch: see `Twins`.
      read: split -> signals.
    """
    return Dataset(
        name=name,
        location=location,
        splits={split: 2 * counts[split] for split in SPLITS},
        class_names=class_names,
        image_shape=shape,
        open=lambda split: Twins(read(split), axis, patch, f'{name}/{split}'),
    )


# --- Text: the licence of this project ------------------------------------------------

LICENSE = pathlib.Path(__file__).parents[2] / 'LICENSE'  # real English, and here
LETTERS = ' abcdefghijklmnopqrstuvwxyz'
LENGTH = 24  # characters of an example, each a patch


def read_text() -> str:
    """The terms of the licence: words in small letters, one space between.

    Neither its heading nor what is below them, where a copy may differ.
    """
    text = ' '.join(re.findall('[a-z]+', LICENSE.read_text().lower()))
    begin, end = map(text.index, ('terms and conditions', 'end of terms'))
    return text[begin:end].strip()


def cut_text(text: str, length: int = LENGTH) -> dict[str, list[str]]:
    """Pieces of so many characters, from the beginning and to the end of each word.

    Of both, so that where a space is tells nothing of the direction. Those of the first
    four fifths are to train on. Of the rest, phrases that a licence repeats word for
    word are left out.

    >>> cut_text('to be or not to be to me', length=4)['test']
    ['to m', 'o me']
    """
    words = list(re.finditer('[a-z]+', text))
    starts = sorted({place for w in words for place in (w.start(), w.end() - length)})
    cut = 4 * len(text) // 5
    train, test = (
        [text[i : i + length] for i in starts if begin <= i <= end - length]
        for begin, end in ((0, cut), (cut, len(text)))
    )
    seen = {*train, *(piece[::-1] for piece in train)}
    return {'train': train, 'test': [piece for piece in test if piece not in seen]}


def one_hot(pieces: list[str]) -> np.ndarray:
    """Characters as uint8 `[n, length, 27]`, 0 or 255."""
    codes = np.array([[LETTERS.index(letter) for letter in piece] for piece in pieces])
    return np.uint8(255) * np.eye(len(LETTERS), dtype=np.uint8)[codes]


def make_text(data_dir: str | None) -> Dataset:
    """English or its reverse, letter by letter."""
    pieces = cut_text(read_text())
    return make_dataset(
        'text',
        str(LICENSE),
        ('forwards', 'backwards'),
        {split: len(pieces[split]) for split in SPLITS},
        (LENGTH, len(LETTERS)),
        axis=0,
        patch=1,
        read=lambda split: one_hot(pieces[split]),
    )


# --- Audio: two tones -----------------------------------------------------------------

BEATS, FRAMES, SAMPLES = 9, 3, 32  # beats of so many frames of so many samples
FREQUENCIES = 16
LOW, HIGH = range(2, 7), range(9, 14)  # periods a frame
REPEATS = {'train': 4, 'test': 1}  # of each pair of tones, with other noise


def pair_tones() -> dict[str, np.ndarray]:
    """Two beats in order and two pitches, low and high: `[n, 4]`, by split.

    Of all that there are, four fifths are to train on.
    """
    beats = itertools.combinations(range(BEATS), 2)
    pairs = [(*when, *what) for when in beats for what in itertools.product(LOW, HIGH)]
    pairs = np.random.default_rng(0).permutation(pairs)
    return dict(zip(SPLITS, np.split(pairs, [4 * len(pairs) // 5])))


def play(rng: np.random.Generator, pairs: np.ndarray) -> np.ndarray:
    """Spectrograms of a low tone and a higher one later, each for a beat, in noise.

    Args:
      rng: of noise, phases and loudness.
      pairs: see `pair_tones`.

    Returns:
      uint8 `[n, frequencies, times, 1]`, times being `BEATS * FRAMES`.
    """
    count = len(pairs)
    sound = rng.normal(0, 0.1, (count, BEATS, FRAMES * SAMPLES))
    time = np.arange(FRAMES * SAMPLES) / SAMPLES
    phases = rng.uniform(0, 2 * np.pi, (count, 2, 1))
    loudness = rng.uniform(0.5, 1.0, (count, 2, 1))
    tones = loudness * np.sin(2 * np.pi * pairs[:, 2:, None] * time + phases)
    sound[np.arange(count)[:, None], pairs[:, :2]] += tones
    magnitudes = spectrogram(sound.reshape(count, BEATS * FRAMES, SAMPLES))
    return np.uint8(255 * np.clip(magnitudes, 0, 1))[..., None]


def spectrogram(frames: np.ndarray) -> np.ndarray:
    """Magnitudes of the spectra of `[n, times, samples]`; that of a sine is 1.

    Returns:
      `[n, frequencies, times]`.
    """
    num_samples = frames.shape[-1]
    window = np.hanning(num_samples)
    spectra = np.abs(np.fft.rfft(frames * window, axis=-1))[..., :FREQUENCIES]
    return 2 * np.swapaxes(spectra, 1, 2) / window.sum()


def make_audio(data_dir: str | None) -> Dataset:
    """A low tone before a high one, or after it."""
    pairs = pair_tones()

    def read(split: str) -> np.ndarray:
        rng = np.random.default_rng([1, SPLITS.index(split)])
        return play(rng, np.repeat(pairs[split], REPEATS[split], axis=0))

    return make_dataset(
        'audio',
        'generated',
        ('rising', 'falling'),
        {split: REPEATS[split] * len(pairs[split]) for split in SPLITS},
        (FREQUENCIES, BEATS * FRAMES, 1),
        axis=1,
        patch=FRAMES,
        read=read,
    )


# --- Video: a moving digit ------------------------------------------------------------

STEPS, REST = 4, 2  # places of a digit, for so many frames each
SIDE = 12  # pixels of a frame


def move(digit: np.ndarray, row: int, col: int) -> np.ndarray:
    """A digit that goes to the right, a pixel at a time.

    Args:
      digit: `[8, 8, 1]`.
      row, col: where it begins; its corner is at (row, col + 3) at the end.

    Returns:
      `[frames, 12, 12, 1]`, of the digit's dtype.
    """
    height, width, channels = digit.shape
    video = np.zeros((STEPS * REST, SIDE, SIDE, channels), digit.dtype)
    for frame in range(STEPS * REST):
        left = col + frame // REST
        video[frame, row : row + height, left : left + width] = digit
    return video


def make_video(data_dir: str | None) -> Dataset:
    """A digit that moves to the right, or to the left."""
    digits = load_dataset('digits', data_dir)
    height, width, _ = digits.image_shape
    rows, cols = SIDE - height + 1, SIDE - width - STEPS + 2  # where it may begin

    def read(split: str) -> np.ndarray:
        rng = np.random.default_rng([2, SPLITS.index(split)])
        source = digits.open(split)
        videos = []
        for i in range(len(source)):
            digit = source[i]
            pixels = decode_image(digit['image'], 1, digit['name'])
            row, col = rng.integers((rows, cols))
            videos.append(move(pixels, int(row), int(col)))
        return np.stack(videos)

    return make_dataset(
        'video',
        digits.location,
        ('right', 'left'),
        digits.splits,
        (STEPS * REST, SIDE, SIDE, 1),
        axis=0,
        patch=REST,
        read=read,
    )
