"""Who does not mind a shift, and who a shuffle: CNN, ViT and ConViT.

vit_jax reproduce equivariance --workdir=/tmp/runs --jobs=2
"""

import pathlib
from collections.abc import Iterator, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
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
from vit_jax.results import mean_sd, table, values_of
from vit_jax.typing import Array, Variables

MODELS = {
    'CNN': 'configs/digits_road.py:cnn',
    'ConViT': 'configs/digits_road.py:convit',
    'ViT': 'configs/digits_road.py:learned',
    'ViT without positions': 'configs/digits_road.py:no_positions',
}
SEEDS = (0, 1, 2)
IMAGES = 64
GRID = 4  # cells a side of the last features, of 2 x 2 pixels each
CELL = 2
SENTENCE = ['Deepak', 'is', 'the', 'son', 'of', 'Pradeep']
WHAT = {
    'shift': 'features under a shift by a cell',
    'agree': 'classes that stay under that shift, %',
    'shuffle': 'features under a shuffle of the cells',
}


def sweep() -> Iterator[Cell]:
    """Every cell."""
    for seed in SEEDS:
        for name, config in MODELS.items():
            yield Cell(f'digits/{name}', config, {}, seed)
        for posemb in ('none', 'sincos1d', 'learned'):
            yield Cell(f'sentence/{posemb}', None, {'posemb': posemb}, seed)


def measure(cell: Cell, workdir: pathlib.Path, data_dir: str | None) -> Line:
    """Before training, and after."""
    if cell.config is None:
        return {'change': reverse_sentence(cell.overrides['posemb'], cell.seed)}
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
      'shift': |F(shifted x) - shifted F(x)|, over the cells that both have, in units of
        the spread of F over cells and images; 'agree': images, in per cent, whose
        class stays; 'shuffle': as 'shift'.
    """
    images = first_images(run, IMAGES)
    features_of = jax.jit(lambda x: last_features(run.model, variables, x))
    classes_of = jax.jit(lambda x: run.model.apply(variables, x).argmax(-1))
    features = features_of(images)

    # What comes in from the left is background.
    moved = jnp.roll(images, CELL, axis=2).at[:, :, :CELL].set(images.min())
    shift = distance(features_of(moved)[:, :, 1:], features[:, :, :-1])
    agree = jnp.mean(classes_of(moved) == classes_of(images))

    order = np.random.default_rng(seed).permutation(GRID**2)
    shuffle = distance(
        features_of(shuffle_cells(images, order, CELL)),
        shuffle_cells(features, order, 1),
    )
    return {'shift': shift, 'agree': 100 * float(agree), 'shuffle': shuffle}


def last_features(model: nn.Module, variables: Variables, images: Array) -> Array:
    """The features of each cell before they are pooled: `[B, 4, 4, D]`."""
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
        features = features[:, -(GRID**2) :]
        return features.reshape(len(features), GRID, GRID, -1)
    return nn.relu(features)


def shuffle_cells(x: Array, order: np.ndarray, side: int) -> Array:
    """Puts cell `order[i]` of `[B, 4 * side, 4 * side, C]` in place i."""
    batch, *_, channels = x.shape
    cells = x.reshape(batch, GRID, side, GRID, side, channels)
    cells = cells.transpose(0, 1, 3, 2, 4, 5).reshape(batch, GRID**2, -1)[:, order]
    cells = cells.reshape(batch, GRID, GRID, side, side, channels)
    return cells.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape)


def distance(x: Array, y: Array) -> float:
    """Root mean square of x - y over that of y around its mean."""
    spread = jnp.mean((y - y.mean(axis=(0, 1, 2))) ** 2)
    return float(jnp.sqrt(jnp.mean((x - y) ** 2) / spread))


def reverse_sentence(posemb: str, seed: int) -> float:
    """How much the features of a sentence change when its words are reversed.

    Args:
      posemb: of the encoder.
      seed: of its parameters, and of the words' vectors.

    Returns:
      |f(reversed) - f(sentence)| / |f(sentence)|, of pooled features.
    """
    words = sorted({*SENTENCE})
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(len(words), 8)).astype(np.float32)
    x = jnp.asarray([[vectors[words.index(word)] for word in SENTENCE]])
    encoder = ViT(
        None, 1, width=32, depth=2, mlp_dim=64, num_heads=4, posemb=posemb, pool='mean'
    )
    variables = encoder.init(jax.random.key(seed), x)
    forth, back = (encoder.apply(variables, y) for y in (x, x[:, ::-1]))
    return float(jnp.linalg.norm(back - forth) / jnp.linalg.norm(forth))


def render(lines: Sequence[Line]) -> str:
    """What changes, before training and after; and the sentence."""
    rows = []
    for name in MODELS:
        cells = []
        for key in WHAT:
            for when in ('before', 'after'):
                values = values_of(lines, f'digits/{name}', when, key)
                cells.append(mean_sd(values, '.0f' if key == 'agree' else '.2f'))
        rows.append([name, *cells])
    header = ['model']
    for what in WHAT.values():
        header += [f'{what}: before', 'after']
    sentence = [
        [posemb, mean_sd(values_of(lines, f'sentence/{posemb}', 'change'), '.1e')]
        for posemb in ('none', 'sincos1d', 'learned')
    ]
    told = table(['positions', f'"{" ".join(SENTENCE)}" and its reverse'], sentence)
    return f'{table(header, rows)}\n{told}'


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
        axes.set_xticks(range(len(MODELS)), MODELS, size=7, rotation=20)
        axes.set_title(f'change of features by a {key}', size=9)
        axes.set_ylim(bottom=0)
        axes.spines[['top', 'right']].set_visible(False)
    figure.axes[0].legend(fontsize=7, frameon=False)
    return {'equivariance.png': figure}


EXPERIMENT = Experiment(sweep, render, draw, measure)
