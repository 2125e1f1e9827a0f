"""Writes attention.npz: attention and decoder layers of PyTorch.

    pip install torch==2.13.0 numpy==2.4.6
    python tests/golden/make_attention.py

Each case has its own random parameters and inputs, the layer's output, and the
gradients of sum(out * cotangent) for every parameter and input. Masks are PyTorch's:
True = leave out.
"""

import numpy as np
import torch
from recording import draw, randomize, record, save

B, T, S, N, D, E, F = 2, 5, 7, 3, 15, 13, 17

# The places to leave out: the end of one source, and one token inside the other.
PADDING = np.zeros((B, S), bool)
PADDING[0, 4:] = PADDING[1, 2] = True


def causal(length):
    return torch.ones(length, length, dtype=torch.bool).triu(diagonal=1)


def attention(seed, source=None, bias=False, **masks):
    """`source`: features of the keys and values; None for self-attention."""
    rng = np.random.default_rng(seed)
    layer = torch.nn.MultiheadAttention(
        D, N, kdim=source, vdim=source, batch_first=True
    )
    randomize(layer, rng)
    inputs = {'x': draw(rng, B, T, D)}
    if source is not None:
        inputs['x_kv'] = draw(rng, B, S, source)
    terms = dict(masks)
    if bias:
        inputs['bias'] = draw(rng, B, N, T, S)
        terms['attn_mask'] = inputs['bias'].reshape(B * N, T, S)
    x_kv = inputs.get('x_kv', inputs['x'])
    out, weights = layer(inputs['x'], x_kv, x_kv, average_attn_weights=False, **terms)
    cotangent = draw(rng, *out.shape)
    loss = torch.sum(out * cotangent)
    return record(
        layer, inputs, out, loss, weights=weights, cotangent=cotangent, **masks
    )


def decoder(seed, norm_first, activation):
    rng = np.random.default_rng(seed)
    layer = torch.nn.TransformerDecoderLayer(
        D,
        N,
        dim_feedforward=F,
        dropout=0.0,
        activation=activation,
        norm_first=norm_first,
        batch_first=True,
    )
    randomize(layer, rng)
    inputs = {'x': draw(rng, B, T, D), 'encoded': draw(rng, B, S, D)}
    masks = {'memory_key_padding_mask': torch.tensor(PADDING)}
    out = layer(*inputs.values(), tgt_mask=causal(T), **masks)
    cotangent = draw(rng, *out.shape)
    (eps,) = {layer.norm1.eps, layer.norm2.eps, layer.norm3.eps}
    return record(
        layer,
        inputs,
        out,
        torch.sum(out * cotangent),
        cotangent=cotangent,
        eps=eps,
        **masks,
    )


if __name__ == '__main__':
    save(
        'attention.npz',
        {
            'self': attention(0),
            'cross': attention(1, source=E),
            'padding': attention(2, source=E, key_padding_mask=torch.tensor(PADDING)),
            'causal': attention(3, attn_mask=causal(T)),
            'bias': attention(4, source=E, bias=True),
            'decoder_pre_relu': decoder(5, norm_first=True, activation='relu'),
            'decoder_pre_gelu': decoder(6, norm_first=True, activation='gelu'),
            'decoder_post_relu': decoder(7, norm_first=False, activation='relu'),
            'decoder_post_gelu': decoder(8, norm_first=False, activation='gelu'),
        },
    )
