"""What the attention modules of a model sow in one real forward pass."""

from collections import Counter
from typing import Any, NamedTuple

import flax.linen as nn
from flax.traverse_util import flatten_dict

from vit_jax.errors import UserError
from vit_jax.typing import Array, Variables

Path = tuple[str, ...]


class Call(NamedTuple):
    """One call of an attention module.

    Attributes:
      path: of the module.
      name: its path without a last 'attention', such as 'block00'; that of its second
        call is 'block00#2'.
      weights: what it sowed, mostly `[B, N, T, S]`.
      gates: `[N]`, of GPSA; None of others.
    """

    path: Path
    name: str
    weights: Array
    gates: Array | None


class Pass(NamedTuple):
    """A forward pass.

    Attributes:
      out: what the model returned.
      calls: of attention modules, in the order in which they ended; at least one.
      modules: those that were called, bound, by their path.
      kept: outputs of the modules that were asked for, one a call.
    """

    out: Array
    calls: tuple[Call, ...]
    modules: dict[Path, nn.Module]
    kept: list[Array]


def run_and_capture(
    model: nn.Module,
    variables: Variables,
    *inputs: Array,
    keep: type[nn.Module] | tuple[()] = (),
) -> Pass:
    """Runs a model as in evaluation, and keeps what its attention modules sow.

    Args:
      model: an unbound module that is called as `model(*inputs, train=False)`.
      variables: its variables.
      *inputs: what it takes.
      keep: modules whose outputs are kept too.

    Raises:
      UserError: when no module sows attention weights; and what the model itself
        raises.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from vit_jax.layers.attention import MultiHeadAttention
    >>> class Twice(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x, train):
    ...         attention = MultiHeadAttention(2, name='a')
    ...         return attention(attention(x))
    >>> x = jnp.ones((1, 3, 4))
    >>> variables = Twice().init(jax.random.key(0), x, train=False)
    >>> for call in run_and_capture(Twice(), variables, x).calls:
    ...     print(call.name, call.weights.shape)
    a (1, 2, 3, 3)
    a#2 (1, 2, 3, 3)
    """
    modules: dict[Path, nn.Module] = {}
    order: dict[tuple[Path, int], None] = {}  # (path, call) as they end

    def capture(module: nn.Module, method: str) -> bool:
        modules[module.path] = module
        # By what is sown so far: a transformation may trace a call more than once.
        so_far = module.get_variable('intermediates', 'attention_weights', ())
        order.update({(module.path, call): None for call in range(len(so_far))})
        return isinstance(module, keep)

    out, state = model.apply(
        variables,
        *inputs,
        train=False,
        mutable=['intermediates'],
        capture_intermediates=capture,
    )
    if not order:
        raise UserError(
            f'{type(model).__name__} has no attention to map: none of its modules '
            'sows attention_weights'
        )
    sown: dict[Path, Any] = flatten_dict(dict(state)['intermediates'])
    calls, seen = [], Counter[str]()
    for path, call in order:
        name = '/'.join(path or [type(model).__name__]).removesuffix('/attention')
        seen[name] += 1
        if seen[name] > 1:
            name += f'#{seen[name]}'
        gates = sown.get((*path, 'gates'))
        weights = sown[*path, 'attention_weights'][call]
        calls.append(Call(path, name, weights, gates[call] if gates else None))
    kept = [x for path, xs in sown.items() if path[-1] == '__call__' for x in xs]
    return Pass(out, tuple(calls), modules, kept)
