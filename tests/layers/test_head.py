import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest

from vit_jax.errors import UserError
from vit_jax.layers.head import Head

B, T, D, V = 2, 5, 6, 7
SIZES = {'num_heads': 3, 'mlp_dim': 11}


def run(num_classes=V, pool='mean', **kwargs):
    """(logits, reference parameters, tokens) with random parameters."""
    (x,) = reference.random_arrays(0, (B, T, D))
    module = Head(num_classes, pool, **SIZES, **kwargs)
    params = reference.random_params(module, x)
    out = reference.apply(module, params, x)
    return out, reference.float64(params), x


def attention_pool(params, x):
    probe = np.repeat(params['probe'], B, axis=0)
    y = reference.multi_head_attention(params['attention'], probe, x)
    y = y + reference.mlp(params['mlp'], reference.layer_norm(params['norm'], y))
    return y[:, 0]


@pytest.mark.parametrize(
    ('pool', 'num_classes', 'representation_size'),
    [
        ('cls', V, None),
        ('cls', None, 13),
        ('mean', V, 13),
        ('mean', None, None),
        ('map', V, 13),
    ],
)
def test_head_is_norm_then_pool_then_classifier(pool, num_classes, representation_size):
    out, params, x = run(num_classes, pool, representation_size=representation_size)
    x = reference.layer_norm(params['norm'], x)
    if pool == 'map':
        x = attention_pool(params['pool'], x)
    else:
        x = x[:, 0] if pool == 'cls' else x.mean(axis=1)
    if representation_size:
        assert params['pre_logits']['kernel'].shape == (D, representation_size)
        x = np.tanh(reference.linear(params['pre_logits'], x))
    if num_classes:
        x = reference.linear(params['logits'], x)
    reference.assert_close(out, x)


@pytest.mark.parametrize(
    ('num_classes', 'representation_size'), [(V, None), (V, 13), (None, None)]
)
def test_distilled_head_is_the_mean_of_two(num_classes, representation_size):
    out, params, x = run(
        num_classes, 'cls', representation_size=representation_size, distilled=True
    )
    x = reference.layer_norm(params['norm'], x)
    cls, dist = x[:, 0], x[:, 1]
    if representation_size:
        cls, dist = (
            np.tanh(reference.linear(params['pre_logits'], x)) for x in (cls, dist)
        )
    if num_classes:
        cls = reference.linear(params['logits'], cls)
        dist = reference.linear(params['dist_logits'], dist)
    reference.assert_close(out, (cls + dist) / 2)


@pytest.mark.parametrize('pool', ['mean', 'map'])
def test_distillation_needs_its_token(pool):
    message = f"^distilled=True reads .* it needs pool='cls', not '{pool}'"
    with pytest.raises(UserError, match=message):
        run(pool=pool, distilled=True)


def test_layer_norm_eps_is_used():
    out, params, x = run(layer_norm_eps=0.5)
    x = reference.layer_norm(params['norm'], x, 0.5).mean(axis=1)
    reference.assert_close(out, reference.linear(params['logits'], x))


def test_classifier_starts_at_zero_unless_told():
    x = jnp.ones((B, T, D))
    params = reference.init(Head(V, 'cls', **SIZES), x)
    np.testing.assert_array_equal(params['logits']['kernel'], np.zeros((D, V)))
    head = Head(V, 'cls', **SIZES, head_init=jax.nn.initializers.ones)
    params = reference.init(head, x)
    np.testing.assert_array_equal(params['logits']['kernel'], np.ones((D, V)))
    params = reference.init(head.clone(distilled=True), x)
    np.testing.assert_array_equal(params['dist_logits']['kernel'], np.ones((D, V)))


@pytest.mark.parametrize('distilled', [False, True])
@pytest.mark.parametrize('num_classes', [V, None])
def test_output_is_float32_under_bfloat16(num_classes, distilled):
    out, *_ = run(num_classes, 'cls', distilled=distilled, dtype=jnp.bfloat16)
    assert out.dtype == jnp.float32


def test_classifier_computes_in_float32():
    # With a kernel of 1 + 1/512, which bfloat16 rounds to 1.
    head = Head(1, 'cls', **SIZES, dtype=jnp.bfloat16)
    x = jnp.ones((1, 1, D))
    params = jax.tree.map(jnp.zeros_like, reference.random_params(head, x))
    params['norm']['bias'] = jnp.ones(D)
    params['logits']['kernel'] = jnp.full((D, 1), 1 + 1 / 512)
    out = reference.apply(head, params, x)
    reference.assert_close(out, [[D * (1 + 1 / 512)]], 1e-6)


def test_unknown_pool_offers_the_nearest():
    with pytest.raises(UserError, match="unknown pool 'men'; did you mean 'mean'"):
        run(pool='men')
