"""Runs beside each other: results, curves, attention, configs, where they ran."""

from collections.abc import Callable, Sequence

from vit_jax.build import Run
from vit_jax.errors import UserError, reason
from vit_jax.report import runs as tables
from vit_jax.report.attention import draw_attention, open_run
from vit_jax.report.curves import colours, draw_curves, find_curves, is_rate
from vit_jax.report.page import Part, Picture, details, draw, join, plain, show, stack
from vit_jax.report.runs import RunFolder
from vit_jax.summary import count_params


def comparison(
    folders: Sequence[RunFolder], num_images: int, say: Callable[[str], None]
) -> Part:
    """All that is told of runs.

    Args:
      folders: of the runs.
      num_images: images of each run of which attention is shown; 0: none.
      say: is told what cannot be shown.
    """
    opened = {folder.label: _open(folder) for folder in folders}
    params = {
        label: count_params(run.state_shape.variables['params'])
        for label, run in opened.items()
        if isinstance(run, Run)
    }
    parts = [
        Part(
            stack(
                '## Results',
                tables.overview(folders, params),
                _titled('### Last evaluation', tables.last_evaluations(folders)),
                _titled('### Rates, median of the log lines', tables.rates(folders)),
            )
        ),
        _curves(folders),
    ]
    if num_images:
        parts.append(Part('## Attention'))
        for folder in folders:
            run = opened[folder.label]
            parts.append(_attention(folder, run, num_images, say))
    parts.append(Part(stack('## Configs', *_configs(folders))))
    parts.append(Part(_titled('## Environment', tables.environment(folders))))
    return join(parts)


def _open(folder: RunFolder) -> Run | str:
    """The run, or why it cannot be opened here."""
    try:
        return open_run(folder)
    except Exception as error:  # also what a fork's code raises
        return _told(error)


def _told(error: Exception) -> str:
    if isinstance(error, UserError | OSError):
        return reason(error)
    return f'{type(error).__name__}: {reason(error)}'


def _curves(folders: Sequence[RunFolder]) -> Part:
    """Every metric of all runs; how good they are before how fast."""
    found = find_curves({folder.label: folder.lines for folder in folders})
    colour = colours(folder.label for folder in folders)
    shown: dict[bool, list[str]] = {False: [], True: []}
    pictures: dict[str, Picture] = {}
    for name, curves in found.items():
        file = f'curves/{name.replace("/", "-")}.png'
        pictures[file] = draw(draw_curves(name, curves, colour))
        runs = ', '.join(dict.fromkeys(curve.run for curve in curves))
        shown[is_rate(name)].append(show(file, f'{name} by step: {runs}'))
    text = stack(
        _titled('## Curves', '\n'.join(shown[False])),
        details('Rates by step', '\n'.join(shown[True])) if shown[True] else '',
    )
    return Part(text, pictures)


def _attention(
    folder: RunFolder, run: Run | str, num_images: int, say: Callable[[str], None]
) -> Part:
    title = Part(f'### {plain(folder.label)}')
    try:
        if isinstance(run, str):
            raise UserError(run)
        return join([title, draw_attention(folder, run, num_images)])
    except Exception as error:  # the rest of the report is no worse for it
        why = _told(error)
        say(f'{folder.label}: no attention shown: {why}')
        return join([title, Part(f'Not shown: {plain(why)}.')])


def _configs(folders: Sequence[RunFolder]) -> list[str]:
    differing = tables.config_differences(folders)
    if len(folders) > 1:
        differing = differing or 'The configs of these runs are the same.'
    return [differing, *map(tables.config_from_default, folders)]


def _titled(title: str, text: str) -> str:
    return stack(title, text) if text else ''
