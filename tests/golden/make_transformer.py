"""Writes transformer.npz: encoder-decoder Transformers of PyTorch.

    pip install torch==2.13.0 numpy==2.4.6
    python tests/golden/make_transformer.py

Each case has its own random parameters and embedded inputs: source and target, of
which one source ends in padding and one has it inside. `nn.Transformer` ends both of
its stacks with a norm; here only the stacks whose norms come first do, as those of
"Attention Is All You Need" have none behind the last block. Masks are PyTorch's: True =
leave out.
"""

import numpy as np
import torch
from recording import draw, randomize, record, save

B, T, S, N, D, F = 2, 5, 7, 3, 12, 17

PADDING = np.zeros((B, S), bool)
PADDING[0, 4:] = PADDING[1, 2] = True


def transformer(seed, norm_first):
    rng = np.random.default_rng(seed)
    fields = {
        'dim_feedforward': F,
        'dropout': 0.0,
        'activation': 'relu',
        'norm_first': norm_first,
        'batch_first': True,
    }
    stacks = {}
    for name, stack, layer, depth in (
        ('encoder', torch.nn.TransformerEncoder, torch.nn.TransformerEncoderLayer, 2),
        ('decoder', torch.nn.TransformerDecoder, torch.nn.TransformerDecoderLayer, 3),
    ):
        norm = torch.nn.LayerNorm(D) if norm_first else None
        # Nested tensors would leave the padding's places out of the encoder's output.
        nested = {'enable_nested_tensor': False} if name == 'encoder' else {}
        stacks[name] = stack(layer(D, N, **fields), depth, norm, **nested)
    model = torch.nn.Transformer(
        D,
        N,
        custom_encoder=stacks['encoder'],
        custom_decoder=stacks['decoder'],
        batch_first=True,
    )
    randomize(model, rng)
    inputs = {'source': draw(rng, B, S, D), 'target': draw(rng, B, T, D)}
    padding = torch.tensor(PADDING)
    out = model(
        inputs['source'],
        inputs['target'],
        tgt_mask=torch.ones(T, T, dtype=torch.bool).triu(diagonal=1),
        src_key_padding_mask=padding,
        memory_key_padding_mask=padding,
    )
    cotangent = draw(rng, *out.shape)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    (eps,) = {norm.eps for norm in norms}
    return record(
        model,
        inputs,
        out,
        torch.sum(out * cotangent),
        cotangent=cotangent,
        eps=eps,
        padding=padding,
    )


if __name__ == '__main__':
    save(
        'transformer.npz',
        {'pre': transformer(0, norm_first=True), 'post': transformer(1, False)},
    )
