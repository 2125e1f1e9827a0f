"""What of the parameters a block sees, and where their gradients go."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import vit_jax.sharding
from vit_jax.layers.attention import MultiHeadAttention
from vit_jax.layers.blocks import DecoderBlock, EncoderBlock
from vit_jax.parallel import Parallel
from vit_jax.sharding import gather_params, param_spec

MESH = {'data': 2, 'fsdp': 4, 'tensor': 2}


@pytest.mark.parametrize(
    ('path', 'shape', 'spec'),
    [
        ('block00/attention/query/kernel', (64, 6, 64), P('fsdp', 'tensor', None)),
        ('0/mu/block00/attention/query/kernel', (64, 6, 64), P('fsdp', 'tensor', None)),
        ('attention/query/kernel', (64, 9, 64), P('fsdp', None, None)),  # odd heads
        ('mlp/fc2/kernel', (256, 63), P('tensor', None)),  # no length is left
        ('patches/embed/kernel', (16, 16, 3, 64), P(None, None, None, 'fsdp')),
        ('0/v_col/block00/attention/query/kernel', (512, 6), P('fsdp', None)),
        ('block00/norm1/scale', (1664,), P()),
    ],
)
def test_where_a_parameter_lies(path, shape, spec):
    assert param_spec(path, shape, MESH) == spec


def make_block(block=EncoderBlock, cache_length=None, **kwargs):
    attention = partial(
        MultiHeadAttention, num_heads=4, cache_length=cache_length, **kwargs
    )
    return block(attention, mlp_dim=24, remat='full', **kwargs)


@pytest.fixture
def parallel(monkeypatch):
    monkeypatch.setattr(vit_jax.sharding, 'MIN_SIZE', 2)  # so that all is sharded
    return Parallel('jit', tuple(jax.devices()), fsdp=4, tensor=2)


@pytest.mark.parametrize(
    ('block', 'attentions'), [(EncoderBlock, 1), (DecoderBlock, 2)]
)
def test_what_is_computed_again_gathers_its_parameters_again(
    parallel, block, attentions
):
    """In the backward pass of a block: kernels are whole, and so are their gradients.

    Compiled for CPUs, where XLA gathers anyhow, the program is the same without; for
    TPUs it is not.
    """
    block, args = make_block(block), attentions * [jnp.zeros((8, 5, 16))]
    variables = block.init(jax.random.key(0), *args)
    grad = jax.grad(lambda variables, args: jnp.sum(block.apply(variables, *args)))
    with jax.sharding.use_abstract_mesh(parallel.mesh.abstract_mesh):
        (again,) = [
            eqn.params['jaxpr']
            for eqn in jax.make_jaxpr(grad)(variables, args).eqns
            if eqn.primitive.name == 'remat2'
        ]
    found = [
        (eqn.outvars[0].aval.shape, eqn.params['sharding'].spec)
        for eqn in again.eqns
        if eqn.primitive.name == 'sharding_constraint'
    ]
    for shape, part, whole, count in (
        ((16, 24), P('fsdp', 'tensor'), P(None, 'tensor'), 1),
        ((24, 16), P('tensor', 'fsdp'), P('tensor', None), 1),
        ((4, 4, 16), P('tensor', None, 'fsdp'), P('tensor', None, None), attentions),
        (
            (16, 4, 4),
            P('fsdp', 'tensor', None),
            P(None, 'tensor', None),
            3 * attentions,
        ),
    ):
        there, back = [part, whole], [whole, part]
        specs = [spec for found_shape, spec in found if found_shape == shape]
        assert specs == count * there + count * back


def test_gradients_of_parts_are_those_of_the_whole(parallel):
    block = make_block()
    x = jax.random.normal(jax.random.key(0), (8, 5, 16))
    variables = block.init(jax.random.key(1), x)

    def grad(variables, x):
        loss = lambda variables: jnp.sum(jnp.sin(block.apply(variables, x)))  # noqa: E731
        return jax.grad(loss)(variables), jnp.zeros(())

    expected, _ = grad(variables, x)
    placed = jax.device_put(variables, parallel.state_sharding(variables))
    rows = parallel.put({'x': np.asarray(x)})['x']
    found, _ = parallel.train_step(grad, variables)(placed, rows)
    kernel = found['params']['mlp']['fc1']['kernel']
    assert kernel.addressable_shards[0].data.shape == (16 // 4, 24 // 2)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected
    )


def test_a_decoder_block_decodes_with_parts_of_its_parameters(parallel):
    block = make_block(DecoderBlock, cache_length=5)
    x, encoded = (jax.random.normal(jax.random.key(i), (8, 5, 16)) for i in range(2))
    variables = block.init(jax.random.key(2), x, encoded)
    expected = block.apply(variables, x, encoded)
    placed = jax.device_put(variables, parallel.state_sharding(variables))

    @jax.jit
    def step(variables, x):
        return block.apply(variables, x, encoded, decode=True, mutable=['cache'])

    with jax.sharding.set_mesh(parallel.mesh):
        start, cache = step(placed, x[:, :3])
        rest, _ = step({**placed, **cache}, x[:, 3:])
    found = np.concatenate([start, rest], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_kernels_are_sent_in_the_dtype_of_the_computation(parallel):
    """Not so what a fork's attention may have, which `RULES` does not know."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self):
            body = gather_params(lambda self: self.variables, self, jnp.bfloat16)
            return body(self)

    kernel, table, bias = jnp.zeros((16, 24)), jnp.zeros((16, 8)), jnp.zeros(1)
    params = {
        'mlp': {'fc1': {'kernel': kernel}},
        'attention': {'table': table, 'b': bias},
    }
    with jax.sharding.use_abstract_mesh(parallel.mesh.abstract_mesh):
        seen = jax.eval_shape(Block().apply, {'params': params})['params']
    assert seen['mlp']['fc1']['kernel'].dtype == jnp.bfloat16
    assert (
        seen['attention']['table'].dtype == seen['attention']['b'].dtype == jnp.float32
    )


def test_without_a_mesh_nothing_is_done():
    def body(module):
        return module

    assert gather_params(body, nn.Dense(3), jnp.float32) is body
