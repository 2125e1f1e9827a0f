"""Where an encoder-decoder attends, read from a real forward pass.

Three kinds of attention, of "Attention Is All You Need", arXiv 1706.03762, section
3.2.3: among the tokens of the source, among those of the target, and from these to the
source. The last is what an LSTM with attention has too.
"""

import flax.linen as nn
import flax.struct

from vit_jax.errors import UserError
from vit_jax.layers.blocks import DecoderBlock, EncoderBlock
from vit_jax.models.lstm import LSTMDecoder
from vit_jax.sown import Path, run_and_capture
from vit_jax.typing import Array, Variables


@flax.struct.dataclass
class SequenceLayer:
    """Where one layer attends.

    Attributes:
      weights: `[B, N, T, S]` float32, from queries to keys. A padded query has weights
        too, of no meaning; a padded key of the source has none.
      name: path of the module, as in `LayerMaps`: 'decoder/block00/cross_attention'.
      kind: 'encoder', from source to source; 'decoder', from target to target, whose
        token t sees tokens up to t; or 'cross', from target to source.
    """

    weights: Array
    name: str = flax.struct.field(pytree_node=False)
    kind: str = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class SequenceMaps:
    """Where each layer of an encoder-decoder attends, in one forward pass.

    Attributes:
      logits: what the model returned, `[B, T, V]`.
      layers: in the order of the calls, with distinct names.
    """

    logits: Array
    layers: tuple[SequenceLayer, ...]


def sequence_maps(
    model: nn.Module, variables: Variables, source: Array, target: Array
) -> SequenceMaps:
    """Runs a model as in evaluation, and returns where its layers attend.

    A pure function of variables and tokens: it runs under `jit` with the model static.
    All weights are kept, 4 B N T S bytes a layer.

    Args:
      model: an unbound module that is called as `model(source, target, train=False)`:
        `Transformer`, `LSTM`, or one made of `EncoderBlock` and `DecoderBlock`.
      variables: its variables.
      source: `[B, S]` integers, tokens and padding.
      target: `[B, T]` integers, what the decoder reads: query t is where it says which
        token follows token t.

    Returns:
      The maps; see `SequenceMaps` and `SequenceLayer`.

    Raises:
      UserError: when no module of the model sows attention weights, one of another
        kind does, or they are stacked, as by `nn.scan`; and what the model itself
        raises.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from vit_jax.models.transformer import Transformer
    >>> model = Transformer(11, width=8, depth=1, mlp_dim=16, num_heads=2)
    >>> source, target = jnp.ones((3, 7), int), jnp.ones((3, 5), int)
    >>> variables = jax.jit(model.init)(jax.random.key(0), source, target)
    >>> run = jax.jit(sequence_maps, static_argnums=0)
    >>> for layer in run(model, variables, source, target).layers:
    ...     print(layer.kind, layer.name, layer.weights.shape)
    encoder encoder/block00 (3, 2, 7, 7)
    decoder decoder/block00/self_attention (3, 2, 5, 5)
    cross decoder/block00/cross_attention (3, 2, 5, 7)
    """
    found = run_and_capture(model, variables, source, target)
    layers = []
    for call in found.calls:
        kind = _kind(found.modules, call.path)
        if kind is None or call.weights.ndim != 4:
            raise UserError(
                f'{call.name} sows weights of rank {call.weights.ndim}; maps of '
                'sentences need [B, N, T, S], of one layer of an EncoderBlock or a '
                'DecoderBlock, or of an LSTM'
            )
        layers.append(SequenceLayer(call.weights, call.name, kind))
    return SequenceMaps(found.out, tuple(layers))


def _kind(modules: dict[Path, nn.Module], path: Path) -> str | None:
    """Of the attention module at a path; None of one that is not known."""
    module, block = modules[path], modules.get(path[:-1])
    if isinstance(module, LSTMDecoder):
        return 'cross'
    if isinstance(block, EncoderBlock):
        return 'encoder'
    if isinstance(block, DecoderBlock):
        return 'decoder' if path[-1] == 'self_attention' else 'cross'
    return None
