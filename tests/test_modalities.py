"""One model for sound, video and sequences: only patch size and input rank differ.

Each task is to tell an order, and both classes hold the same patches. So the model
learns it with positions and cannot without: attention alone does not see order.
"""

import importlib
from functools import partial

import jax
import numpy as np
import optax
import pytest

from vit_jax.models.vit import ViT
from vit_jax.tasks import classify

data = importlib.import_module('experiments.modalities.data')


def read(dataset):
    """Signals and labels of each split: to learn from, and held out."""
    sources = (dataset.open(split) for split in ('train', 'test'))
    examples = [[source[i] for i in range(len(source))] for source in sources]
    return [
        tuple(np.stack([each[key] for each in split]) for key in ('image', 'label'))
        for split in examples
    ]


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
    signal = np.uint8(255) * np.stack([words == 1, words == -1], axis=-1)
    return signal, np.array(labels)


def draw_brackets(tmp_path, num_train=4096, num_test=256):
    signal, label = balanced_brackets(np.random.default_rng(0), num_train + num_test)
    test = {x.tobytes() for x in signal[:num_test]}
    new = np.array([x.tobytes() not in test for x in signal])
    assert new.sum() > num_train / 2
    return (signal[new], label[new]), (signal[:num_test], label[:num_test])


TASKS = {
    'sound': (lambda tmp_path: read(data.make_audio(None)), (4, 3), 'sincos2d'),
    'video': (lambda p: read(data.make_video(str(p))), (2, 4, 4), 'sincos3d'),
    'sequence': (draw_brackets, 1, 'learned'),
}


def as_batch(signal, label):
    return {'image': signal, 'label': label, 'weight': np.ones(len(label), np.float32)}


def train(model, learned, held_out, num_steps, batch_size=64):
    """Accuracy on held-out signals after `num_steps` of training."""
    signal, label = learned
    tx = optax.adam(optax.cosine_decay_schedule(5e-3, num_steps))
    settings = classify.Settings(model.num_classes)
    key = jax.random.key(0)
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
    rng = np.random.default_rng(0)
    for _ in range(num_steps):
        rows = rng.integers(len(label), size=batch_size)
        state, _ = step(state, as_batch(signal[rows], label[rows]))
    evaluate = jax.jit(partial(classify.eval_step, model=model, settings=settings))
    correct, count = evaluate(state.variables, as_batch(*held_out))['accuracy']
    return correct / count


@pytest.mark.parametrize('kind', TASKS)
def test_order_is_learned_with_positions_and_not_without(kind, tmp_path):
    draw, patch_size, posemb = TASKS[kind]
    learned, held_out = draw(tmp_path)
    make = partial(ViT, 2, patch_size, width=24, depth=1, mlp_dim=48, num_heads=3)
    accuracy = train(make(posemb=posemb, pool='mean'), learned, held_out, num_steps=200)
    assert accuracy > 0.9
    accuracy = train(make(posemb='none', pool='mean'), learned, held_out, num_steps=200)
    spread = 0.5 / np.sqrt(len(held_out[1]))
    assert abs(accuracy - 0.5) < 4 * spread
