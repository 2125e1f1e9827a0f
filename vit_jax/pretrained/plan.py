"""Which array of a file becomes which leaf of a model: decided before any is read."""

import collections
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vit_jax.errors import UserError, some, times
from vit_jax.pretrained.files import LazyArray
from vit_jax.pretrained.formats import FORMATS
from vit_jax.pretrained.naming import (
    Format,
    Layout,
    Place,
    Positions,
    Rule,
    find_places,
)
from vit_jax.pretrained.source import Source
from vit_jax.typing import Shape

GRID, PREFIX = 'params/posemb/grid', 'params/posemb/prefix'
REGISTERS = 'params/registers/tokens'

# The classifier, and the layer that some models have before it.
_HEAD = re.compile(r'params/head/((dist_)?logits/|pre_logits/)?(kernel|bias)')


class Step(NamedTuple):
    """One array of a file, and the leaves it becomes.

    Attributes:
      name: in the file.
      array: in the file.
      shape: that the array must have, but for axes of length 1.
      parts: path of each leaf, and its shape before any resizing. The array is their
        concatenation along its first axis, or its rows are theirs, for positions.
      layout: of each part; None for positions.
    """

    name: str
    array: LazyArray
    shape: Shape
    parts: tuple[tuple[str, Shape], ...]
    layout: Layout | None


class Plan(NamedTuple):
    """What loading will do.

    Attributes:
      format: of the names.
      steps: the arrays to read.
      resized: path -> (grid in the file, grid of the model).
      initialised, ignored, notes: see `Report`.
      faults: what does not fit; a plan that is returned has none.
    """

    format: Format
    steps: list[Step]
    resized: dict[str, tuple[Shape, Shape]]
    initialised: dict[str, str]
    ignored: dict[str, str]
    notes: list[str]
    faults: list[str]


def make_plan(
    source: Source,
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    *,
    new_head: bool = False,
    grid: Shape | None = None,
) -> Plan:
    """Finds a place for every array, and an array for every leaf.

    Args:
      source: the weights.
      leaves: path -> shape and dtype of the model's variables.
      new_head: see `load_variables`.
      grid: see `load_variables`.

    Raises:
      UserError: when one is left over, or does not fit.
    """
    format, places = find_format(source)
    plan = Plan(format, [], {}, {}, {}, [], [])
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    heads = list(filter(_HEAD.fullmatch, shapes))
    strange = []
    for name, array in source.file.arrays.items():
        place = places.get(name)
        if place is None:
            end = next((end for end in format.ignored if name.endswith(end)), None)
            if end is None:
                strange.append(name)
            else:
                plan.ignored[name] = format.ignored[end]
        elif all(map(_HEAD.fullmatch, place.paths)) and (new_head or not heads):
            why = 'a new head is asked for' if heads else 'the model has no head'
            plan.ignored[name] = why
        elif not _fits(place, shapes):
            strange.append(name)
        elif isinstance(place.rule, Positions):
            old = grid or _stored_grid(source)
            plan.steps.append(_place_positions(plan, name, array, shapes, old))
        else:
            plan.steps.append(_place_array(plan, name, array, place, shapes))
    if new_head:
        plan.initialised.update(dict.fromkeys(heads, 'a new head'))
    _check(source.file.path, plan, leaves, strange)
    return plan


def find_format(source: Source) -> tuple[Format, dict[str, Place]]:
    """The table that has most of the names, and what it says of each."""
    names = list(source.file.arrays)
    if source.native:
        ours = {name: Place(Rule(name, (name,)), (name,)) for name in names}
        return Format("this project's own names", ()), ours
    found = [(format, find_places(format, names)) for format in FORMATS]
    format, places = max(found, key=lambda pair: len(pair[1]))
    if not places:
        raise UserError(
            f'{source.file.path} has weights of no model that is known here: '
            f'{some(names)}'
        )
    return format, places


def _fits(place: Place, shapes: Mapping[str, Shape]) -> bool:
    """Whether the model has what an array stands for; a prefix is optional."""
    if isinstance(place.rule, Positions):
        return GRID in shapes
    return all(path in shapes for path in place.paths)


def _place_array(
    plan: Plan, name: str, array: LazyArray, place: Place, shapes: Mapping[str, Shape]
) -> Step:
    layout = place.rule.layout  # type: ignore[union-attr]
    parts = [(path, shapes[path]) for path in place.paths]
    if place.paths == (GRID,):  # this project's own, which may be of another grid
        (*old, width), (*new, ours) = array.shape, shapes[GRID]
        if len(old) == len(new) and width == ours and old != new:
            plan.resized[GRID] = (tuple(old), tuple(new))
            parts = [(GRID, array.shape)]
    theirs = [layout.shape(shape) for _, shape in parts]
    rows = (sum(s[0] for s in theirs),) if len(theirs) > 1 else theirs[0][:1]
    return Step(name, array, (*rows, *theirs[0][1:]), tuple(parts), layout)


def _place_positions(
    plan: Plan,
    name: str,
    array: LazyArray,
    shapes: Mapping[str, Shape],
    old: Shape | None,
) -> Step:
    """Positions `[1, P + T, D]`; without P rows where the prefix has no positions."""
    *grid, width = shapes[GRID]
    prefix = shapes.get(PREFIX, (0,))[0]
    count = math.prod(array.shape[:-1])
    if old is None:
        # Published files leave out the prefix only where there are registers.
        sizes = [count - prefix] + [count] * (REGISTERS in shapes)
        old = _square_grid(name, count, sizes, tuple(grid))
        plan.notes.append(
            f'{name}: the file does not tell its grid, {times(old)} is assumed'
        )
    size = math.prod(old)
    if count not in (size, size + prefix):
        plan.faults.append(
            f'{name} has {count} positions, a grid of {times(old)} behind {prefix} '
            f'other token(s) has {size + prefix}'
        )
    parts = [(GRID, (*old, width))]
    if prefix and count == size:
        plan.initialised[PREFIX] = 'zero: the file has positions of the grid alone'
    elif prefix:
        parts.insert(0, (PREFIX, (prefix, width)))
    if old != tuple(grid):
        plan.resized[GRID] = (old, tuple(grid))
    return Step(name, array, (count, width), tuple(parts), None)


def _stored_grid(source: Source) -> Shape | None:
    grid = (source.metadata or {}).get('model', {}).get('grid')
    return tuple(grid) if grid else None


def _square_grid(name: str, count: int, sizes: Sequence[int], grid: Shape) -> Shape:
    """The square that the published files have, where no other grid is as likely."""
    if len(grid) == 1:
        return (sizes[0],)
    if math.prod(grid) not in sizes or len(set(grid)) == 1:
        for size in sizes:
            if size > 0 and math.isqrt(size) ** 2 == size and len(grid) == 2:
                return (math.isqrt(size),) * 2
    raise UserError(
        f'{name} has {count} positions, and the file does not tell their grid, which '
        f'may be {times(grid)} or another; pass grid=(rows, columns), or --grid to '
        '`vit_jax convert`'
    )


def _check(
    path: str,
    plan: Plan,
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    strange: Sequence[str],
) -> None:
    """Raises UserError for what does not fit, naming both sides."""
    faults, heads = plan.faults, []  # and whether it is with the classifier alone
    filled: dict[str, list[str]] = collections.defaultdict(list)
    for step in plan.steps:
        for part, _ in step.parts:
            filled[part].append(step.name)
        if _lengths(step.array.shape) != _lengths(step.shape):
            heads.append(all(_HEAD.fullmatch(part) for part, _ in step.parts))
            faults.append(
                f'{step.name} is {times(step.array.shape) or "a number"} in the file, '
                f'the model needs {times(step.shape)}'
            )
        elif not _like(step.array.dtype, leaves[step.parts[0][0]].dtype):
            faults.append(f'{step.name} is of {step.array.type_name}, not of floats')
    if strange:
        faults.append(f'the file has {some(strange)}, which the model has not')
    missing = [p for p in leaves if p not in filled and p not in plan.initialised]
    if missing:
        heads.append(all(map(_HEAD.fullmatch, missing)))
        faults.append(f'the model has {some(missing)}, which the file has not')
    for part, names in filled.items():
        if len(names) > 1:
            faults.append(f'the file has {some(names)} for one {part}')
    if faults:
        hint = '. For other classes pass new_head=True (config.init.new_head)'
        raise UserError(
            f'{path} ({plan.format.name}) does not fit the model: '
            + '; '.join(faults[:3])
            + hint * (len(heads) == len(faults) and all(heads))
        )


def _lengths(shape: Shape) -> Shape:
    """A shape without axes of length 1, which formats add and leave out."""
    return tuple(n for n in shape if n != 1)


def _like(theirs, ours) -> bool:
    return jnp.issubdtype(theirs, jnp.floating) == jnp.issubdtype(ours, jnp.floating)
