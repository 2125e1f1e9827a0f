"""Where the model of a run attends, on examples that it is evaluated on.

As `vit_jax attend` draws it: images by `attention_maps`, sentences by `sequence_maps`.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing

import jax
import numpy as np

from vit_jax.build import Run, build
from vit_jax.config import from_dict
from vit_jax.data.tokenizer import BOS, PAD
from vit_jax.errors import UserError
from vit_jax.maps import AttentionMaps, LayerMaps, View, attention_maps, view
from vit_jax.pictures import draw_non_locality, draw_sheet
from vit_jax.pretrained import load_variables
from vit_jax.pretrained.source import open_source
from vit_jax.report.page import Part, details, draw, join, plain, show
from vit_jax.report.runs import RunFolder
from vit_jax.results import table
from vit_jax.sequence_maps import sequence_maps
from vit_jax.sequence_pictures import SHEET, draw_sequence_layers
from vit_jax.stored import latest_step
from vit_jax.tasks.classify import normalize
from vit_jax.typing import Array, Batch, Variables

_MOST_LAYERS = 4  # of an image
_CANDIDATES = 32  # images of the evaluation split, to choose from
# How a run is spread over devices, which are others here, and how it reads its data.
_HERE = {
    'parallel.mode': 'jit',
    'parallel.data': None,
    'parallel.fsdp': 1,
    'parallel.tensor': 1,
    'accum_steps': 1,
    'dataset.placement': 'host',
    'dataset.num_workers': 0,
}


def open_run(folder: RunFolder) -> Run:
    """A run as its workdir has it, to be looked at here.

    Raises:
      UserError: as `build`, for data or models that are not here.
    """
    config = from_dict(folder.config)
    devices = jax.device_count()
    rows = -(-_CANDIDATES // devices) * devices
    config.update_from_flattened_dict({**_HERE, 'eval.batch_size': rows})
    return build(config, named=())


def draw_attention(folder: RunFolder, run: Run, num_images: int) -> Part:
    """Maps, gates and non-locality of the newest checkpoint.

    Args:
      folder: of the run; nothing is written there.
      run: from `open_run`.
      num_images: how many are looked at; of sentences, one pair is.

    Raises:
      UserError: where there is no checkpoint, no data, or no attention.
    """
    if run.vocabulary:
        run.vocabulary.load(folder.path)
    latest_step(folder.path)  # raises where there is none yet
    source = open_source(folder.path)
    sharding = run.parallel.leaf_sharding
    variables, _ = load_variables(source, run.model, run.inputs, sharding=sharding)
    with closing(run.eval_data()) as batches:
        batch = next(batches)
    place = f'attention/{folder.label}'
    if run.vocabulary:
        shown = _of_sentences(place, run, variables, batch)
    else:
        shown = _of_images(place, run, variables, batch, num_images)
    data = f'the split {plain(run.metadata["eval_split"])} of {plain(run.dataset.name)}'
    return join([Part(f'At step {source.step:,}, on {data}.'), shown])


def _of_images(
    place: str, run: Run, variables: Variables, batch: Batch, num_images: int
) -> Part:
    if 'preprocessing' not in run.metadata:
        raise UserError(
            f'{type(run.model).__name__} is given something other than images'
        )
    about, names = run.metadata['preprocessing'], run.metadata['class_names']
    mean, std = tuple(about['mean']), tuple(about['std'])

    @jax.jit
    def look(variables, images):
        return attention_maps(run.model, variables, normalize(images, mean, std))

    parts, distances = [], []
    for number, i in enumerate(_choose(batch, num_images)):
        # One image at a time: the maps of a large model fill the memory.
        maps = jax.device_get(look(variables, batch['image'][i][None]))
        predicted = names[int(np.argmax(maps.logits))]
        title = f'image {i}: label {names[batch["label"][i]]}, predicted {predicted}'
        views = _views(run, maps)
        sheets = _sheets(f'{place}/image{i}', title, batch['image'][i], views)
        if number:  # one is enough at first sight
            sheets = sheets._replace(text=details(title.capitalize(), sheets.text))
        parts.append(sheets)
        distances.append([layer.non_locality[0] for layer in maps.layers])
    return join([_of_layers(place, maps.layers, distances), *parts])


def _choose(batch: Batch, count: int) -> list[int]:
    """Rows of a batch: the first ones, of different labels as far as there are."""
    (rows,) = np.nonzero(batch['weight'])
    _, firsts = np.unique(batch['label'][rows], return_index=True)
    order = [*np.sort(firsts), *np.setdiff1d(np.arange(len(rows)), firsts)]
    return sorted(int(rows[i]) for i in order[:count])


def _views(run: Run, maps: AttentionMaps) -> dict[str, View]:
    """What is shown of an image: some layers, and what lies over all of them."""
    class_token = getattr(run.model, 'pool', 'cls') == 'cls'
    names = [layer.name for layer in maps.layers]
    if len(names) > _MOST_LAYERS:  # the first, the last, and some between
        chosen = np.linspace(0, len(names) - 1, _MOST_LAYERS).round().astype(int)
        names = [names[i] for i in chosen]
    names += [name for name in ('rollout', 'pool') if name in maps.by_name]
    return {name: view(maps.by_name[name], None, class_token) for name in names}


def _sheets(
    place: str, title: str, pixels: np.ndarray, views: Mapping[str, View]
) -> Part:
    """The pictures of one image."""
    pictures, shown = {}, []
    for name, seen in views.items():
        text = f'{name}: where {seen.query} attends'
        heat = np.asarray(seen.maps)
        sheet = draw_sheet(pixels, heat, f'{text}\n{title}', seen.cell, seen.grid)
        file = f'{place}/{name.replace("/", "-")}.png'
        pictures[file] = draw(sheet)
        shown.append(show(file, f'{text}; {title}'))
    return Part('\n'.join(shown), pictures)


def _of_layers(
    place: str, layers: Sequence[LayerMaps], distances: Sequence[list[np.ndarray]]
) -> Part:
    """What is told of layers, not of images: non-locality, and gates."""
    names, grids = [layer.name for layer in layers], [layer.grid for layer in layers]
    means = [np.mean(each, axis=0) for each in zip(*distances)]
    parts = []
    if means:
        file = f'{place}/non_locality.png'
        picture = draw(draw_non_locality(names, means, grids))
        parts.append(Part(show(file, 'non-locality of each layer'), {file: picture}))
    gates = {layer.name: layer.gates for layer in layers if layer.gates is not None}
    if gates:
        text = 'Gates of the GPSA layers: the share of position in each head.\n\n'
        parts.append(Part(text + gates_table(gates)))
    return join(parts)


def gates_table(gates: Mapping[str, Array | np.ndarray]) -> str:
    """A row per layer: the mean of its heads' gates, and each of them.

    >>> print(gates_table({'block00': np.array([0.25, 0.75])}), end='')
    | layer | mean | head 0 | head 1 |
    | --- | --- | --- | --- |
    | block00 | 0.500 | 0.250 | 0.750 |
    """
    heads = max(map(len, gates.values()))
    rows = []
    for name, values in gates.items():
        numbers = [f'{x:.3f}' for x in (np.mean(values), *values)]
        rows.append([plain(name), *numbers, *[''] * (heads - len(values))])
    return table(['layer', 'mean', *(f'head {n}' for n in range(heads))], rows)


def _of_sentences(place: str, run: Run, variables: Variables, batch: Batch) -> Part:
    """From the tokens of a translation, as the data has it, to those of its source."""
    assert run.vocabulary is not None
    source, target = (batch[side][0] for side in ('source', 'target'))
    source, target = source[source != PAD], target[target != PAD]
    read = np.concatenate([[BOS], target[:-1]])
    look = jax.jit(sequence_maps, static_argnums=0)
    maps = jax.device_get(look(run.model, variables, source[None], read[None]))
    pieces = run.vocabulary.tokenizer.pieces
    tokens = {
        'source': pieces(source),
        'target': pieces(read),
        'next target': pieces(target),
    }
    figures = draw_sequence_layers(maps.layers, tokens, 'target as the data has it')
    name = SHEET if SHEET in figures else next(iter(figures))
    file = f'{place}/{name.replace("/", "-")}.png'
    alt = f'{name.replace("_", "-")} of a pair of sentences'
    return Part(show(file, alt), {file: draw(figures[name]())})
