"""Which parameters decay, learn slower, or stay as they are: by their paths.

A path is written 'block00/attention/query/kernel'.
"""

import collections
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from vit_jax.errors import UserError, reason, some

Rule = tuple[str, float | None, float | None]

# The top-level modules of our models, by where they stand. Others have a number.
_STEM = {'patches', 'class_token', 'posemb', 'registers', 'stem', 'stem_norm'}
_HEAD = {'head', 'norm'}
_NUMBERED = re.compile(r'(?:stage(\d+)_)?(?:block|conv|norm|fc)(\d+)')


class Group(NamedTuple):
    """How a parameter is trained.

    Attributes:
      learning_rate: factor of the learning rate.
      weight_decay: factor of the weight decay, for a parameter that decays.
      frozen: whether it is not trained at all.
    """

    learning_rate: float = 1.0
    weight_decay: float = 1.0
    frozen: bool = False


def map_paths(function: Callable[[str], Any], tree: Any) -> Any:
    """The tree of what `function` says of each leaf's path.

    >>> map_paths(len, {'head': {'kernel': 0, 'bias': 0}})
    {'head': {'bias': 9, 'kernel': 11}}
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: function(
            jax.tree_util.keystr(path, simple=True, separator='/')
        ),
        tree,
    )


def decays(name: str) -> bool:
    """Whether a parameter decays: kernels, GPSA's position kernel included.

    Biases, norms, gates, tokens and position embeddings do not.
    """
    return name.endswith('kernel')


def decay_mask(params: Any) -> Any:
    """True for the parameters that decay, see `decays`.

    >>> decay_mask({'fc1': {'kernel': 0, 'bias': 0}, 'gating': 0})
    {'fc1': {'bias': False, 'kernel': True}, 'gating': False}
    """
    return map_paths(decays, params)


def group_params(
    params: Any = None,
    *,
    layer_decay: float = 1.0,
    rules: Sequence[Rule] = (),
    freeze: Sequence[str] = (),
) -> Mapping[str, Group]:
    """Path -> how that parameter is trained.

    Args:
      params: the parameters, or their shapes. Without, every path is in the same
        group, and nothing else may be given.
      layer_decay: factor of the learning rate per layer below the head, see
        `number_layers`.
      rules: (pattern, factor of the learning rate, factor of the weight decay). Of
        the regular expressions that are found in a path, the first one counts; None
        leaves a rate as it is, 1.0 too. The decay's factor is for what decays anyway:
        it gives no decay to a bias.
      freeze: regular expressions; a parameter is frozen where one matches the start
        of its path. '(?!head/)' leaves the head alone trained, a linear probe.

    Raises:
      UserError: for a pattern that cannot be read or that changes no parameter, a
        factor that is none, when nothing is left to train; and for `layer_decay` of a
        model whose layers are not known.

    >>> params = {'block00': {'kernel': 0}, 'head': {'kernel': 0, 'bias': 0}}
    >>> groups = group_params(
    ...     params, rules=[('bias', 2.0, None)], freeze=['block00/']
    ... )
    >>> groups['head/bias']
    Group(learning_rate=2.0, weight_decay=1.0, frozen=False)
    >>> groups['block00/kernel'].frozen
    True
    """
    if params is None:
        if layer_decay != 1.0 or rules or freeze:
            raise ValueError('layer_decay, rules and freeze need the shapes of params')
        return collections.defaultdict(Group)
    names = jax.tree.leaves(map_paths(str, params))
    trained = _unfrozen(names, freeze)
    by_rule = _apply_rules(trained, rules)
    by_layer = dict.fromkeys(names, 1.0)
    if layer_decay != 1.0:
        layers = number_layers(names)
        top = max(layers.values())
        by_layer = {name: layer_decay ** (top - layers[name]) for name in names}
    groups = dict.fromkeys(names, Group(frozen=True))
    for name in trained:
        learning_rate, weight_decay = by_rule[name]
        groups[name] = Group(learning_rate * by_layer[name], weight_decay)
    return groups


def number_layers(names: Iterable[str]) -> dict[str, int]:
    """Path -> layer: 0 for the stem, tokens and positions, 1 and on for the blocks.

    The head and the last norm are one layer more than the last block (BEiT, arXiv
    2106.08254; MAE, arXiv 2111.06377). Blocks of a ResNet count through all stages.

    Raises:
      UserError: for a module that is none of our models'.

    >>> layers = number_layers(['patches/kernel', 'block00/gating', 'head/bias'])
    >>> list(layers.values())
    [0, 1, 2]
    """
    names = list(names)
    modules = {name.partition('/')[0] for name in names}
    numbers = {}
    for module in sorted(modules - _STEM - _HEAD):
        match = _NUMBERED.fullmatch(module)
        if match is None:
            raise UserError(
                f'optim.layer_decay does not know the layer of {module!r}: it knows '
                'modules called block00, stage1_block1, conv0, norm0 or fc0, and '
                f'{some(sorted(_STEM | _HEAD), 8)}; set optim.rules instead'
            )
        numbers[module] = tuple(int(number or 0) for number in match.groups())
    order = sorted(set(numbers.values()))
    layers = {module: 1 + order.index(number) for module, number in numbers.items()}
    layers |= dict.fromkeys(_STEM, 0) | dict.fromkeys(_HEAD, len(order) + 1)
    return {name: layers[name.partition('/')[0]] for name in names}


def _unfrozen(names: list[str], freeze: Sequence[str]) -> list[str]:
    """The paths that no pattern of `freeze` matches."""
    if isinstance(freeze, str):
        raise UserError(f'optim.freeze must be patterns, ({freeze!r},)')
    trained = names
    for pattern in freeze:
        regex = _compile(pattern, 'optim.freeze')
        if not any(regex.match(name) for name in names):
            raise UserError(
                f'optim.freeze {pattern!r} matches the start of no parameter, such as '
                f'{some(names)}'
            )
        trained = [name for name in trained if not regex.match(name)]
    if not trained:
        raise UserError(
            f'optim.freeze leaves nothing to train: it matches all {len(names)} '
            'parameters'
        )
    return trained


def _apply_rules(
    names: list[str], rules: Sequence[Rule]
) -> dict[str, tuple[float, float]]:
    """Path -> factors of learning rate and weight decay."""
    if isinstance(rules, str) or not all(
        isinstance(rule, tuple | list) and len(rule) == 3 for rule in rules
    ):
        raise UserError(
            'optim.rules must be triples (pattern, factor of the learning rate, of the '
            f"weight decay), such as (('head/', 10.0, 1.0),), not {rules!r}"
        )
    factors = {}
    left = names
    for pattern, *pair in rules:
        regex = _compile(pattern, 'optim.rules')
        found = [name for name in left if regex.search(name)]
        if not found:
            before = ' that no rule before it is for' if left != names else ''
            raise UserError(
                f'optim.rules {pattern!r} is found in no trained parameter{before}, '
                f'such as {some(left or names)}'
            )
        learning_rate, weight_decay = (_factor(x, pattern) for x in pair)
        factors.update(dict.fromkeys(found, (learning_rate, weight_decay)))
        left = [name for name in left if name not in factors]
    return factors | dict.fromkeys(left, (1.0, 1.0))


def _compile(pattern: str, key: str) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise UserError(f'{key}: a pattern must be text, not {pattern!r}')
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(
            f'{key} {pattern!r} is no regular expression: {reason(error)}'
        ) from error


def _factor(value: float | None, pattern: str) -> float:
    if value is None:
        return 1.0
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf:
        raise UserError(
            f'optim.rules {pattern!r}: a factor must be 0 or more, or None, not '
            f'{value!r}'
        )
    return float(value)
