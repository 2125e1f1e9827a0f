"""One model for sound, video and sequences: only patch size and input rank differ.

Each task is to tell an order, and both classes hold the same patches. So the model
learns it with positions and cannot without: attention alone does not see order.
"""

from functools import partial

import jax
import numpy as np
import optax
import pytest

from vit_jax.models.vit import ViT
from vit_jax.tasks import classify


def spectrogram(frames, num_samples=32):
    """Magnitudes of the spectra of `[B, frames, samples]` -> `[B, frequency, time]`."""
    window = np.hanning(num_samples)
    spectra = np.abs(np.fft.rfft(frames * window, axis=-1))[..., :16]
    return np.swapaxes(spectra, 1, 2) / num_samples * 4


def which_tone_came_first(rng, count):
    """A low and a high tone with silence between: 16 frequencies x 27 times."""
    frames, samples, beat = 27, 32, 3  # tones start and end where patches do
    label = rng.integers(2, size=count)
    sound = np.zeros((count, frames, samples))
    for i in range(count):
        first, second = np.sort(rng.choice(frames // beat, 2, replace=False))
        if second == first + 1:  # no patch may hear both
            second = (second + 1) % (frames // beat)
            first, second = min(first, second), max(first, second)
        pitches = (3, 11) if label[i] == 0 else (11, 3)
        for start, pitch in zip((first, second), pitches):
            time = np.arange(beat * samples).reshape(beat, samples) / samples
            phase = rng.uniform(0, 2 * np.pi)
            tone = np.sin(2 * np.pi * pitch * time + phase)
            sound[i, start * beat : (start + 1) * beat] += tone
    return spectrogram(sound)[..., None], label


def direction_of_motion(rng, count):
    """A dot crosses three cells to the right, left, down or up: 6 x 6 x 10 pixels.

    Both ways it is in the same cells, and rests in each for as long as a tubelet lasts.
    Two paler dots do not move.
    """
    label = rng.integers(4, size=count)
    video = np.zeros((count, 6, 6, 10, 1))
    for i in range(count):
        axis, backwards = divmod(label[i], 2)
        free = 3 - 2 * (axis == 1), 5 - 2 * (axis == 0)
        cells = np.array([rng.integers(free)] * 3)
        cells[:, 1 - axis] += np.arange(3)
        for row, col in rng.integers((3, 5), size=(2, 2)):
            video[i, :, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2] = 0.6
        for t, (row, col) in enumerate(cells[::-1] if backwards else cells):
            dot = slice(2 * row, 2 * row + 2), slice(2 * col, 2 * col + 2)
            video[(i, slice(2 * t, 2 * t + 2), *dot)] = 1.0
    return video, label


def balanced_brackets(rng, count, length=16):
    """Words of as many opening as closing brackets: is each closed in order?"""
    words, labels = [], []
    while len(words) < count:
        word = rng.permutation(np.repeat([1, -1], length // 2))
        label = int(np.cumsum(word).min() >= 0)
        if label == 0 and rng.random() < 0.875:  # one word in nine is balanced
            continue
        words.append(word)
        labels.append(label)
    words = np.array(words)
    return np.stack([words == 1, words == -1], axis=-1), np.array(labels)


TASKS = {
    'sound': (which_tone_came_first, (4, 3), 'sincos2d', 2),
    'video': (direction_of_motion, (2, 2, 2), 'sincos3d', 4),
    'sequence': (balanced_brackets, 1, 'learned', 2),
}


def draw_split(draw, seed, num_train=4096, num_test=256):
    """uint8 signals and labels to learn from, and others that are none of them."""
    signal, label = draw(np.random.default_rng(seed), num_train + num_test)
    signal = np.uint8(255 * np.clip(signal, 0, 1))
    test = {x.tobytes() for x in signal[:num_test]}
    new = np.array([x.tobytes() not in test for x in signal])
    assert new.sum() > num_train / 2
    weight = np.ones(num_test, np.float32)
    held_out = {'image': signal[:num_test], 'label': label[:num_test], 'weight': weight}
    return (signal[new], label[new]), held_out


def train(model, draw, num_steps, seed=0, batch_size=64):
    """Accuracy on held-out signals after `num_steps` of training."""
    (signal, label), held_out = draw_split(draw, seed)
    tx = optax.adam(optax.cosine_decay_schedule(5e-3, num_steps))
    settings = classify.Settings(model.num_classes)
    key = jax.random.key(seed)
    state = classify.init_state(
        model=model,
        tx=tx,
        rng=key,
        inputs=(jax.ShapeDtypeStruct((1, *signal.shape[1:]), np.float32),),
        settings=settings,
    )
    step = jax.jit(
        partial(classify.train_step, model=model, tx=tx, rng=key, settings=settings)
    )
    rng = np.random.default_rng(seed)
    for _ in range(num_steps):
        rows = rng.integers(len(label), size=batch_size)
        weight = np.ones(batch_size, np.float32)
        batch = {'image': signal[rows], 'label': label[rows], 'weight': weight}
        state, _ = step(state, batch)
    evaluate = jax.jit(partial(classify.eval_step, model=model, settings=settings))
    correct, count = evaluate(state.variables, held_out)['accuracy']
    return correct / count


@pytest.mark.parametrize('kind', TASKS)
def test_order_is_learned_with_positions_and_not_without(kind):
    draw, patch_size, posemb, num_classes = TASKS[kind]
    make = partial(
        ViT, num_classes, patch_size, width=24, depth=1, mlp_dim=48, num_heads=3
    )
    accuracy = train(make(posemb=posemb, pool='mean'), draw, num_steps=200)
    assert accuracy > 0.9
    chance = 1 / num_classes
    accuracy = train(make(posemb='none', pool='mean'), draw, num_steps=200)
    spread = np.sqrt(chance * (1 - chance) / 256)
    assert abs(accuracy - chance) < 4 * spread
