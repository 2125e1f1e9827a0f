"""Whether the classes of weights are those of the data."""

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from vit_jax.errors import UserError, some
from vit_jax.pretrained.metadata import default_class_names


def check_classes(
    weights: str, metadata: Mapping[str, Any], here: Sequence[str]
) -> None:
    """Raises UserError when the weights' classes are not those of the data.

    ImageNet's are known by their WordNet id, with or without names behind it.

    Args:
      weights: where they are from.
      metadata: of them; where it has no names, all is well.
      here: names of the data's classes.
    """
    there = metadata.get('class_names')
    if there is None:
        return
    if list(map(_wordnet_id, there)) == list(map(_wordnet_id, here)):
        return
    # Numbers, where nobody knew names (but those of a run are its data's); words there
    # and ids here, in transformers' ImageNet, whose order is that of the ids.
    numbers = default_class_names(len(there))
    nameless = list(there) == numbers and 'config' not in metadata
    in_words = not any(map(_is_id, there)) and all(map(_is_id, here))
    if (nameless or in_words) and len(there) == len(here):
        print(
            f'warning: the classes of {weights} ({some(there)}) are taken for those of '
            f'the data ({some(here)}), in this order',
            file=sys.stderr,
        )
        return
    raise UserError(
        f'{weights} knows {len(there)} classes ({some(there)}), the data has '
        f'{len(here)} ({some(here)})'
    )


def _wordnet_id(name: str) -> str:
    match = re.match(r'n\d{8}\b', name)
    return match[0] if match else name


def _is_id(name: str) -> bool:
    return re.fullmatch(r'n\d{8}', _wordnet_id(name)) is not None
