"""Who does not mind a shift, and who a shuffle: CNN, ViT and ConViT.

vit_jax reproduce equivariance --workdir=/tmp/runs --jobs=2
"""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vit_jax.build import Run
from vit_jax.experiment import (
    Cell,
    Experiment,
    Line,
    build_cell,
    first_images,
    train_cell,
)
from vit_jax.models.vit import ViT
from vit_jax.results import mean_sd, table, values_of, verdict
from vit_jax.typing import Array, Variables

# Name -> a step of the road, fields of the model.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    'CNN': ('cnn', {}),
    'CNN, circular padding': ('cnn', {'padding': 'circular'}),
    'ConViT': ('convit', {}),
    'ViT': ('learned', {}),
    'ViT without positions': ('no_positions', {}),
}
SEEDS = (0, 1, 2)
IMAGES = 64
CELL = 2  # pixels a side of a cell of the last features
SENTENCE = ['Deepak', 'is', 'the', 'son', 'of', 'Pradeep']
POSITIONS = ('none', 'sincos1d', 'learned')
STEPS = 300  # to tell it from its reverse
# Of the first more than of the second, after training.
CLAIMS = (
    ('shift', 'ViT', 'CNN'),
    ('shift', 'CNN', 'CNN, circular padding'),
    ('shift', 'ViT', 'ConViT'),
    ('shuffle', 'ViT', 'ViT without positions'),
    ('shuffle', 'CNN', 'ViT without positions'),
)


def sweep() -> Iterator[Cell]:
    """Every cell."""
    for seed in SEEDS:
        for name, (step, fields) in MODELS.items():
            overrides: dict[str, Any] = {
                'dataset.name': 'experiments.equivariance.data:make',
                **{f'model.kwargs.{key}': value for key, value in fields.items()},
            }
            config = f'configs/digits_road.py:{step}'
            yield Cell(f'digits/{name}', config, overrides, seed)
        for posemb in POSITIONS:
            yield Cell(f'sentence/{posemb}', None, {'posemb': posemb}, seed)


def measure(cell: Cell, workdir: pathlib.Path, data_dir: str | None) -> Line:
    """Before training, and after."""
    if cell.config is None:
        return reverse_sentence(cell.overrides['posemb'], cell.seed)
    line = train_cell(cell, workdir, data_dir)
    run = build_cell(cell, data_dir=data_dir)
    from vit_jax.pretrained import load_variables

    trained, _ = load_variables(str(workdir), run.model, run.inputs)
    found = {'before': run.init().variables, 'after': trained}
    return {**line, **{when: look(run, found[when], cell.seed) for when in found}}


def look(run: Run, variables: Variables, seed: int) -> dict[str, float]:
    """How much a shift and a shuffle change.

    Args:
      run: of the model.
      variables: the model's.
      seed: of the shuffle.

    Returns:
      'shift': |F(shifted x) - shifted F(x)| in units of the spread of F over cells and
        images; 'agree': images, in per cent, whose class stays; 'shuffle': as 'shift'.
    """
    images = first_images(run, IMAGES)
    features_of = jax.jit(lambda x: last_features(run.model, variables, x))
    classes_of = jax.jit(lambda x: run.model.apply(variables, x).argmax(-1))
    features = features_of(images)

    moved = jnp.roll(images, CELL, axis=2)  # the margin comes in on the other side
    shift = distance(features_of(moved), jnp.roll(features, 1, axis=2))
    agree = jnp.mean(classes_of(moved) == classes_of(images))

    order = np.random.default_rng(seed).permutation(features[0, ..., 0].size)
    shuffle = distance(
        features_of(shuffle_cells(images, order, CELL)),
        shuffle_cells(features, order, 1),
    )
    return {'shift': shift, 'agree': 100 * float(agree), 'shuffle': shuffle}


def last_features(model: nn.Module, variables: Variables, images: Array) -> Array:
    """The features of each cell before they are pooled: `[B, rows, columns, D]`."""
    names = 'norm4', 'block03'
    _, state = model.apply(
        variables,
        images,
        capture_intermediates=lambda module, _: module.name in names,
        mutable=['intermediates'],
    )
    (found,) = (
        value for name, value in state['intermediates'].items() if name in names
    )
    (features,) = found['__call__']
    if features.ndim == 3:  # tokens, which a class token may come before
        batch, rows, columns = (
            n // side for n, side in zip(images.shape, (1, CELL, CELL))
        )
        features = features[:, -rows * columns :]
        return features.reshape(batch, rows, columns, -1)
    return nn.relu(features)


def shuffle_cells(x: Array, order: np.ndarray, side: int) -> Array:
    """Puts cell `order[i]` of `[B, side * rows, side * columns, C]` in place i."""
    batch, height, width, channels = x.shape
    rows, columns = height // side, width // side
    cells = x.reshape(batch, rows, side, columns, side, channels)
    cells = cells.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)
    cells = cells[:, order].reshape(batch, rows, columns, side, side, channels)
    return cells.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape)


def distance(x: Array, y: Array) -> float:
    """Root mean square of x - y over that of y around its mean."""
    spread = jnp.mean((y - y.mean(axis=(0, 1, 2))) ** 2)
    return float(jnp.sqrt(jnp.mean((x - y) ** 2) / spread))


def reverse_sentence(posemb: str, seed: int) -> Line:
    """A sentence against the same words in reverse order.

    An encoder is trained to tell the two apart, and has seen nothing else.

    Args:
      posemb: of the encoder.
      seed: of its parameters, and of the words' vectors.

    Returns:
      'before' and 'after' training: |f(reversed) - f(sentence)| / |f(sentence)|, of
      pooled features; 'right': the probability that it gives what it has read, in per
      cent, mean of both.
    """
    words = sorted({*SENTENCE})
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(len(words), 8)).astype(np.float32)
    x = jnp.asarray([vectors[words.index(word)] for word in SENTENCE])
    both, labels = jnp.stack([x, x[::-1]]), jnp.asarray([0, 1])
    encoder = ViT(
        2, 1, width=32, depth=2, mlp_dim=64, num_heads=4, posemb=posemb, pool='mean'
    )

    def change(variables: Variables) -> float:
        forth, back = encoder.clone(num_classes=None).apply(variables, both)
        return float(jnp.linalg.norm(back - forth) / jnp.linalg.norm(forth))

    def loss(variables: Variables) -> Array:
        logits = encoder.apply(variables, both)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    tx = optax.adam(1e-3)

    def step(state: tuple, _: None) -> tuple[tuple, None]:
        variables, moments = state
        updates, moments = tx.update(jax.grad(loss)(variables), moments)
        return (optax.apply_updates(variables, updates), moments), None

    fresh = encoder.init(jax.random.key(seed), both)
    start = fresh, tx.init(fresh)
    (trained, _), _ = jax.jit(lambda x: jax.lax.scan(step, x, length=STEPS))(start)
    right = jax.nn.softmax(encoder.apply(trained, both))[jnp.arange(2), labels]
    return {
        'before': change(fresh),
        'after': change(trained),
        'right': 100 * float(right.mean()),
    }


def render(lines: Sequence[Line]) -> str:
    """What changes, before training and after; what the article says; the sentence."""

    def read(name: str, when: str, key: str) -> list[float]:
        return values_of(lines, f'digits/{name}', when, key)

    rows = []
    for name in MODELS:
        changes = [
            mean_sd(read(name, when, key), '.2g')
            for key in ('shift', 'shuffle')
            for when in ('before', 'after')
        ]
        # Before training a model says the same of all.
        rows.append([name, *changes, mean_sd(read(name, 'after', 'agree'), '.0f')])
    header = ['model', 'features under a shift by a cell: before', 'after']
    header += ['features under a shuffle of the cells: before', 'after']
    header += ['classes that stay under that shift, after, %']
    models = table(header, rows)
    claims = [
        [
            f'{key}: {more} changes more than {less}',
            verdict(read(more, 'after', key), read(less, 'after', key), '.2f'),
        ]
        for key, more, less in CLAIMS
    ]
    sentence = [
        [
            posemb,
            *(
                mean_sd(values_of(lines, f'sentence/{posemb}', key), form)
                for key, form in (('before', '.1e'), ('after', '.1e'), ('right', '.1f'))
            ),
        ]
        for posemb in POSITIONS
    ]
    header = [f'positions; "{" ".join(SENTENCE)}" and its reverse']
    header += [
        'features differ by: before',
        'after',
        'probability of the right one of the two, %',
    ]
    told = table(header, sentence)
    claim = table(['claim, after training', 'verdict'], claims)
    return f'{models}\n{claim}\n{told}'


def draw(lines: Sequence[Line]) -> dict[str, Figure]:
    """Shift beside shuffle, after training: small is equivariant."""
    figure = Figure(figsize=(6, 2.8), dpi=120, layout='constrained')
    FigureCanvasAgg(figure)
    for axes, key in zip(figure.subplots(1, 2), ('shift', 'shuffle')):
        for i, name in enumerate(MODELS):
            for when, marker in (('before', 'o'), ('after', 's')):
                values = values_of(lines, f'digits/{name}', when, key)
                label = f'{when} training' if i == 0 else None
                style = {'color': f'C{i}', 'mfc': 'none' if when == 'before' else None}
                axes.plot([i] * len(values), values, marker, label=label, **style)
        axes.set_xticks(range(len(MODELS)), MODELS, size=7, rotation=20, ha='right')
        axes.set_title(f'change of features by a {key}', size=9)
        axes.set_ylim(bottom=0)
        axes.spines[['top', 'right']].set_visible(False)
    # Where a shift is free of change, markers lie at the bottom of the other panel.
    figure.axes[1].legend(fontsize=7, frameon=False, loc='lower left')
    return {'equivariance.png': figure}


EXPERIMENT = Experiment(sweep, render, draw, measure)
