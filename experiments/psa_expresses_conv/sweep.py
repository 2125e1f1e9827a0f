"""How near positional self-attention is to the convolution that it imitates.

vit_jax reproduce psa_expresses_conv --workdir=/tmp/runs
"""

import math
import pathlib
import statistics
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from vit_jax.experiment import Cell, Expected, Experiment, Line
from vit_jax.layers.psa import GPSA, PSA, psa_from_conv
from vit_jax.layers.relative import positional_weights, relative_positions
from vit_jax.models import build_model
from vit_jax.results import NOT_RUN, status, table, values_of

ENCODINGS = {'quadratic': 'quadratic features', 'table': 'table of offsets'}
# Where each imitates the convolution; the largest error there is rounding alone.
WHERE = {'quadratic': 'everywhere', 'table': 'inside'}
SOURCES = {
    'quadratic': 'arXiv 1911.03584, theorem 1',
    'table': 'derived of the features',
}
ROUNDING = 1e-4
KERNEL_SIZES = (1, 3, 5, 7)
STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
GRID, IN, OUT = (11, 13), 5, 7
SEEDS = (0, 1, 2, 3, 4)

MODELS = ('ConViT-Ti', 'ConViT-S', 'ConViT-B')
MODEL_GRID = (14, 14)  # patches of 16 pixels of images of 224
MODEL_SEEDS = (0, 1, 2)
WINDOWS = (3, 5, 7)


def sweep() -> Iterator[Cell]:
    """Every cell."""
    for encoding in ENCODINGS:
        for size in KERNEL_SIZES:
            for seed in SEEDS:
                overrides = {'encoding': encoding, 'kernel_size': size}
                path = 'errors', f'{STRENGTHS[-1]:g}', WHERE[encoding], 'max'
                expected = Expected(0.0, SOURCES[encoding], ROUNDING, path)
                name = f'{encoding}/{size}x{size}'
                yield Cell(name, None, overrides, seed, expected)
    for model in MODELS:
        for seed in MODEL_SEEDS:
            yield Cell(f'gpsa/{model}', None, {'model': f'{model}/16'}, seed)


def measure(cell: Cell, workdir: pathlib.Path, data_dir: str | None) -> Line:
    """By locality strength."""
    del workdir, data_dir
    rng = np.random.default_rng(cell.seed)
    with jax.default_matmul_precision('highest'):
        if 'model' in cell.overrides:
            return measure_start(cell.overrides['model'], rng)
        return measure_error(**cell.overrides, rng=rng)


# --- PSA against a convolution -------------------------------------------------


def measure_error(encoding: str, kernel_size: int, rng: np.random.Generator) -> Line:
    """The error of PSA against a random convolution of a random image.

    Args:
      encoding: of the offsets, as for `PSA`.
      kernel_size: K.
      rng: draws image and kernel from the standard normal distribution.

    Returns:
      'errors': strength -> 'everywhere', against the convolution of the image padded
      by its edges, and 'inside', where the kernel does not leave the image -> 'max',
      the largest absolute error, and 'relative', the L2 norm of the error by that of
      the convolution.
    """
    image = rng.standard_normal((*GRID, IN)).astype(np.float32)
    kernel = rng.standard_normal((kernel_size, kernel_size, IN, OUT), np.float32)
    expected = convolve(np.float64(image), np.float64(kernel))
    layer = PSA(
        kernel_size**2,
        GRID,
        head_dim=IN,
        out_dim=OUT,
        encoding=encoding,
        table_dim=kernel_size**2,
    )
    apply, tokens = jax.jit(layer.apply), image.reshape(1, -1, IN)
    margin = kernel_size // 2
    inside = tuple(slice(margin, length - margin) for length in GRID)
    make = {'quadratic': psa_from_conv, 'table': table_from_conv}[encoding]
    errors = {}
    for strength in STRENGTHS:
        params = make(jnp.asarray(kernel), locality_strength=strength)
        out = np.float64(apply({'params': params}, tokens)).reshape(expected.shape)
        errors[f'{strength:g}'] = {
            'everywhere': _compare(out, expected),
            'inside': _compare(out[inside], expected[inside]),
        }
    return {'errors': errors}


def _compare(out: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    error = out - expected
    relative = np.linalg.norm(error) / np.linalg.norm(expected)
    return {'max': float(np.abs(error).max()), 'relative': float(relative)}


def convolve(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """The convolution of stride 1 of an image padded by its edges.

    Args:
      image: `[R, C, D]`.
      kernel: `[K, K, D, outputs]`, K odd.

    Returns:
      `[R, C, outputs]`.
    """
    side = len(kernel)
    margin = (side // 2, side // 2)
    padded = np.pad(image, (margin, margin, (0, 0)), mode='edge')
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), (0, 1))
    return np.einsum('RCDIJ,IJDO->RCO', windows, kernel)


def table_from_conv(kernel: jax.Array, locality_strength: float) -> dict:
    """`psa_from_conv` for a table of offsets: a feature for each head.

    The row of an offset of the kernel is 1 in the feature of its head; all others are
    zeros, so that a head whose offset leaves the image attends to all tokens alike.
    """
    side = len(kernel)
    rows, cols = GRID
    table = np.zeros((2 * rows - 1, 2 * cols - 1, side**2), np.float32)
    for head in range(side**2):  # h1 + K h2 is at row h1, column h2 of the kernel
        h2, h1 = divmod(head, side)
        table[rows - 1 + h1 - side // 2, cols - 1 + h2 - side // 2, head] = 1.0
    return {
        **psa_from_conv(kernel),
        'position_table': jnp.asarray(table),
        'position_kernel': locality_strength * jnp.eye(side**2),
    }


# --- GPSA at its start ---------------------------------------------------------


def measure_start(name: str, rng: np.random.Generator) -> Line:
    """How near the attention of a model's GPSA is to a convolution before training.

    Args:
      name: of a ConViT.
      rng: draws parameters and tokens, from the standard normal distribution, as
        those behind a LayerNorm are.

    Returns:
      'gate', the share of position; 'start': strength -> 'position', of the position
      half alone, and 'attention', of the whole -> what `describe_weights` tells.
    """
    model = build_model(name, None)
    tokens = rng.standard_normal((1, math.prod(MODEL_GRID), model.width), np.float32)
    key = jax.random.key(rng.integers(2**31))
    centres = head_centres(model.num_heads)
    starts = {}
    for strength in STRENGTHS:
        layer = GPSA(
            model.num_heads,
            MODEL_GRID,
            locality_strength=strength,
            kernel_init=model.kernel_init,
        )
        params = layer.init(key, tokens)['params']
        _, state = layer.apply({'params': params}, tokens, mutable='intermediates')
        (weights,) = state['intermediates']['attention_weights']
        (gates,) = state['intermediates']['gates']
        position = positional_weights(
            params['position_kernel'], params['position_bias'], MODEL_GRID
        )
        starts[f'{strength:g}'] = {
            'position': describe_weights(np.asarray(position), centres),
            'attention': describe_weights(np.asarray(weights[0]), centres),
        }
    return {'gate': float(jnp.mean(gates)), 'start': starts}


def head_centres(num_heads: int) -> np.ndarray:
    """The offsets (dx, dy) that heads attend to at the start, `[N, 2]`: section 3."""
    side = math.isqrt(num_heads)
    h2, h1 = np.divmod(np.arange(num_heads), side)
    return np.stack([h2, h1], axis=1) - (side - 1) / 2


def describe_weights(weights: np.ndarray, centres: np.ndarray) -> Line:
    """Attention next to convolutions, of the queries whose neighbours all exist.

    Args:
      weights: `[N, T, T]` on `MODEL_GRID`.
      centres: `[N, 2]`, the offset (dx, dy) that each head is to attend to.

    Returns:
      'own': the share of attention on the tokens that are nearest to the head's
      centre: one, or four where it lies between tokens. 'distance': K -> how far the
      weights are from those of the nearest K x K convolution, relative, in the L2
      norm: the error of the output where tokens are white noise.
    """
    margin = max(WINDOWS) // 2
    offsets = relative_positions(MODEL_GRID)[..., :2].astype(int)  # [T, T, (dx, dy)]
    y, x = np.divmod(np.arange(math.prod(MODEL_GRID)), MODEL_GRID[1])
    rows, cols = MODEL_GRID
    kept = (np.minimum(y, rows - 1 - y) >= margin) & (
        np.minimum(x, cols - 1 - x) >= margin
    )
    weights, offsets = weights[:, kept], offsets[kept]
    away = np.linalg.norm(offsets - centres[:, None, None], axis=-1)  # [N, kept, T]
    own = away <= away.min(axis=-1, keepdims=True) + 1e-6
    shares = np.sum(weights * own, axis=-1)
    distance = {
        str(size): _distance_to_convolution(weights, offsets, size) for size in WINDOWS
    }
    return {'own': float(shares.mean()), 'distance': distance}


def _distance_to_convolution(
    weights: np.ndarray, offsets: np.ndarray, size: int
) -> float:
    """The nearest has, at each offset, the mean over queries."""
    nearest = np.zeros_like(weights)
    for offset in np.ndindex(size, size):
        there = np.all(offsets == np.subtract(offset, size // 2), axis=-1)
        nearest[:, there] = weights[:, there].mean(axis=-1, keepdims=True)
    return float(np.linalg.norm(weights - nearest) / np.linalg.norm(weights))


# --- What is told ---------------------------------------------------------------


def render(lines: Sequence[Line]) -> str:
    """Errors by strength; GPSA at its start."""
    return f"""Relative error (L2) of PSA against the convolution of the image padded by
its edges, by locality strength, mean over {len(SEEDS)} seeds:

{_errors(lines, 'quadratic', 'everywhere', 'relative')}
Largest absolute error, over all seeds:

{_errors(lines, 'quadratic', 'everywhere', 'max')}
Relative error of a table of offsets where the kernel does not leave the image:

{_errors(lines, 'table', 'inside', 'relative')}
and everywhere:

{_errors(lines, 'table', 'everywhere', 'relative')}
GPSA before training, locality strength 1, mean over {len(MODEL_SEEDS)} seeds: the share
of attention on the tokens nearest to a head's centre, and the relative distance (L2) to
the nearest convolution:

{_starts(lines, '1')}
The same at strength 8:

{_starts(lines, '8')}
Whether the error, which is to go to 0 with the strength, is at most {ROUNDING:g} at
{STRENGTHS[-1]:g}:

{_statuses(lines)}"""


def _statuses(lines: Sequence[Line]) -> str:
    rows = {}
    for cell in sweep():
        if cell.expected:
            where = f'{ENCODINGS[cell.overrides["encoding"]]}, '
            where += WHERE[cell.overrides['encoding']]
            values = values_of(lines, cell.name, *cell.expected.path)
            largest = f'{max(values):.1e}' if values else NOT_RUN
            said = status([max(values)] if values else [], cell.expected)
            size = cell.overrides['kernel_size']
            rows[cell.name] = [
                f'{size}x{size}',
                where,
                cell.expected.source,
                largest,
                said,
            ]
    header = ['kernel', 'features', 'source', 'largest error', 'status']
    return table(header, rows.values())


def _errors(lines: Sequence[Line], encoding: str, where: str, error: str) -> str:
    fold = {'relative': statistics.mean, 'max': max}[error]
    rows = []
    for size in KERNEL_SIZES:
        name = f'{encoding}/{size}x{size}'
        row = [
            values_of(lines, name, 'errors', f'{strength:g}', where, error)
            for strength in STRENGTHS
        ]
        rows.append(
            [f'{size}x{size}', *(f'{fold(x):.1e}' if x else NOT_RUN for x in row)]
        )
    return table(['kernel', *(f'{strength:g}' for strength in STRENGTHS)], rows)


def _starts(lines: Sequence[Line], strength: str) -> str:
    def mean(name: str, *path: str) -> str:
        values = values_of(lines, name, *path)
        return f'{statistics.mean(values):.3f}' if values else NOT_RUN

    rows = []
    for model in MODELS:
        heads = build_model(f'{model}/16', None).num_heads
        for half in ('position', 'attention'):
            about = f'gpsa/{model}', 'start', strength, half
            gate = mean(f'gpsa/{model}', 'gate') if half == 'attention' else ''
            distances = [mean(*about, 'distance', str(size)) for size in WINDOWS]
            rows.append(
                [model, str(heads), half, gate, mean(*about, 'own'), *distances]
            )
    header = ['model', 'heads', 'half', 'gate', 'own tokens']
    return table([*header, *(f'to {size}x{size}' for size in WINDOWS)], rows)


def draw(lines: Sequence[Line]) -> dict[str, Figure]:
    """Error of PSA by strength, and how sharp GPSA starts."""
    figure = Figure(figsize=(10, 4), dpi=120, layout='constrained')
    left, right = figure.subplots(1, 2)
    # What lies on each other is seen by markers in each other.
    for i, encoding in enumerate(ENCODINGS):
        for size in KERNEL_SIZES:
            name = f'{encoding}/{size}x{size}'
            errors = _by_strength(lines, name, 'errors', 'inside', 'relative')
            look = {'color': f'C{i}', 'lw': 0.8, 'ms': 1 + 1.5 * size, 'mfc': 'none'}
            label = f'{size}x{size}, {ENCODINGS[encoding]}'
            left.plot(*errors, 'o-', label=label, **look)
    left.axhline(float(np.finfo(np.float32).eps), color='0.6', lw=0.8, zorder=0)
    left.text(STRENGTHS[0], 1.5e-7, 'float32', color='0.4', size=8)
    left.set_yscale('log')
    left.set_ylabel('relative error (L2)')
    left.set_title('PSA against a convolution, inside the image', size=10)

    for i, model in enumerate(MODELS):
        heads = build_model(f'{model}/16', None).num_heads
        for half, style in (('position', 'o-'), ('attention', 's:')):
            shares = _by_strength(lines, f'gpsa/{model}', 'start', half, 'own')
            look = {'color': f'C{i}', 'lw': 1, 'ms': 4 + 2 * i, 'mfc': 'none'}
            label = f'{model}, {heads} heads, {half}'
            right.plot(*shares, style, label=label, **look)
    right.axvline(1.0, color='0.6', lw=0.8, zorder=0)
    right.text(1.06, 0.02, "ConViT's start", color='0.4', size=8)
    right.set_ylim(0, 1.05)
    right.set_ylabel("share of attention on the head's own tokens")
    right.set_title('GPSA before training', size=10)

    for axes in (left, right):
        axes.set_xscale('log', base=2)
        axes.set_xticks(STRENGTHS, [f'{strength:g}' for strength in STRENGTHS])
        axes.set_xlabel('locality strength')
        axes.spines[['top', 'right']].set_visible(False)
        axes.legend(fontsize=7, frameon=False)
    return {'picture.png': figure}


def _by_strength(
    lines: Sequence[Line], name: str, key: str, *path: str
) -> tuple[list[float], list[float]]:
    """(strengths, means over the seeds) of a cell."""
    means = {}
    for strength in STRENGTHS:
        if values := values_of(lines, name, key, f'{strength:g}', *path):
            means[strength] = statistics.mean(values)
    return list(means), list(means.values())


EXPERIMENT = Experiment(sweep, render, draw, measure)
