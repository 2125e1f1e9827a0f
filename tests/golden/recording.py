"""Runs a PyTorch module, and keeps what went in and what came out.

Numbers are drawn as float32 and computed with in float64, so what is stored is exact
to its last digit or so, on any machine.
"""

import os

import numpy as np
import torch

torch.set_default_dtype(torch.float64)


def draw(rng, *shape, scale=1.0, centre=0.0):
    """Normal numbers that float32 represents exactly."""
    array = np.float32(rng.normal(centre, scale, shape))
    return torch.tensor(np.float64(array), requires_grad=True)


def randomize(module, rng, scale=0.3):
    """Every parameter, biases and gates too, leaves the value it starts from."""
    for name, param in module.named_parameters():
        norm = 'norm' in name and name.endswith('weight')
        new = draw(rng, *param.shape, scale=scale, centre=1.0 if norm else 0.0)
        with torch.no_grad():
            param.copy_(new)
    # What is no parameter would be lost: no module here has buffers.
    assert set(module.state_dict()) == dict(module.named_parameters()).keys()
    return module.eval()


def record(module, inputs, out, loss, **more):
    """Parameters, inputs, output, and the gradients of `loss`, as one flat dict."""
    params = dict(module.named_parameters())
    inputs = {name: torch.as_tensor(x) for name, x in inputs.items()}
    wanted = {f'param_grads/{name}': param for name, param in params.items()}
    wanted |= {f'input_grads/{k}': x for k, x in inputs.items() if x.requires_grad}
    grads = dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values()))))
    return {
        'out': out,
        'loss': loss,
        **{f'params/{name}': param for name, param in params.items()},
        **{f'inputs/{name}': x for name, x in inputs.items()},
        **grads,
        **{name: torch.as_tensor(x) for name, x in more.items()},
    }


def save(name, cases):
    """Writes `{case: {key: tensor}}` beside this file, floats as float32."""
    arrays = {}
    for case, tensors in cases.items():
        for key, x in tensors.items():
            x = x.detach().numpy()
            arrays[f'{case}/{key}'] = np.float32(x) if x.dtype == np.float64 else x
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), name)
    np.savez_compressed(path, **arrays)
    print(f'{path}: {len(arrays)} arrays, {os.path.getsize(path) // 1024} KiB')
