import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.errors import UserError
from vit_jax.models import build_model
from vit_jax.optim import decay_mask, make_optimizer, make_schedule

RATE = 0.7

# --- Schedules ----------------------------------------------------------------


def cosine(step, num_steps, warmup_steps):
    if step < warmup_steps:
        return RATE * step / warmup_steps
    done = (step - warmup_steps) / (num_steps - warmup_steps)
    return RATE * (1 + math.cos(math.pi * min(done, 1))) / 2


def constant(step, num_steps, warmup_steps):
    return RATE * min(step / warmup_steps if warmup_steps else 1, 1)


@pytest.mark.parametrize('reference', [cosine, constant])
@pytest.mark.parametrize('warmup_steps', [0, 1, 5, 16])
def test_schedules_equal_their_formula(reference, warmup_steps):
    schedule = make_schedule(reference.__name__, RATE, 17, warmup_steps)
    for step in range(20):
        expected = reference(step, 17, warmup_steps)
        assert float(schedule(step)) == pytest.approx(expected, abs=1e-6), step


def test_cosine_at_its_corners():
    """Zero, half-way up, the peak, half-way down, zero, and zero ever after."""
    schedule = make_schedule('cosine', RATE, 14, 4)
    values = [float(schedule(step)) for step in (0, 2, 4, 9, 14, 23)]
    np.testing.assert_allclose(values, [0, 0.35, 0.7, 0.35, 0, 0], atol=1e-7)


@pytest.mark.parametrize('name', ['cosine', 'constant'])
def test_a_run_may_be_all_warm_up(name):
    schedule = make_schedule(name, RATE, 7, 7)
    values = [float(schedule(step)) for step in range(7)]
    np.testing.assert_allclose(values, RATE * np.arange(7) / 7, rtol=1e-6)


@pytest.mark.parametrize('warmup_steps', [-1, 8])
def test_warm_ups_that_do_not_fit(warmup_steps):
    with pytest.raises(UserError, match='must be within num_steps 7'):
        make_schedule('cosine', RATE, 7, warmup_steps)


def test_unknown_names():
    with pytest.raises(UserError, match=r"optim\.schedule 'cosin'; .* 'cosine'"):
        make_schedule('cosin', RATE, 7)
    with pytest.raises(UserError, match=r"optim\.name 'adam'; .* 'adamw'"):
        make_optimizer('adam', optax.constant_schedule(RATE))


# --- Which parameters decay ---------------------------------------------------

DECAYS = {'kernel', 'position_kernel'}


@pytest.mark.parametrize(
    ('name', 'fields', 'others'),
    [
        (
            'ConViT-Ti/2',
            {'num_local_layers': 1, 'qkv_bias': True},
            {'bias', 'scale', 'position_bias', 'gating', 'cls', 'grid'},
        ),
        ('ViT-Ti/2', {}, {'bias', 'scale', 'cls', 'prefix', 'grid'}),
        (
            'ViT-Ti/2',
            {'pool': 'map', 'representation_size': 5},
            {'bias', 'scale', 'probe', 'grid'},
        ),
        (
            'ViT-Ti/2',
            {'distilled': True, 'num_registers': 3, 'layer_scale': 0.1},
            {'bias', 'scale', 'cls', 'dist', 'tokens', 'prefix', 'grid'},
        ),
    ],
)
def test_kernels_decay_and_nothing_else(name, fields, others):
    fields = {'width': 8, 'depth': 2, 'mlp_dim': 12, 'num_heads': 4, **fields}
    model = build_model(name, 7, **fields)
    image = jnp.zeros((1, 4, 6, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), image)['params']
    found = {True: set(), False: set()}
    for path, decays in jax.tree_util.tree_leaves_with_path(decay_mask(params)):
        found[decays].add(path[-1].key)
    assert found[True] == (DECAYS if 'Con' in name else {'kernel'})
    assert found[False] == others


def test_a_decay_mask_has_the_form_of_the_parameters():
    params = {'conv0': {'kernel': 3}, 'norm0': {'scale': 5, 'bias': 7}}
    expected = {'conv0': {'kernel': True}, 'norm0': {'scale': False, 'bias': False}}
    assert decay_mask(params) == expected


# --- Steps --------------------------------------------------------------------


def random_tree(seed):
    rng = np.random.default_rng(seed)
    return {'kernel': rng.normal(size=(3, 5)), 'bias': rng.normal(size=5)}


def clip(grads, clip_norm):
    norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
    scale = min(1.0, clip_norm / norm) if clip_norm else 1.0
    return {k: scale * g for k, g in grads.items()}


def adamw(params, gradients, rates, decay):
    """arXiv 1711.05101, algorithm 2, without the schedule multiplier of its own."""
    m = dict.fromkeys(params, 0.0)
    v = dict.fromkeys(params, 0.0)
    for t, (grads, rate) in enumerate(zip(gradients, rates), start=1):
        for k, g in grads.items():
            m[k] = 0.9 * m[k] + 0.1 * g
            v[k] = 0.999 * v[k] + 0.001 * g**2
            mean, square = m[k] / (1 - 0.9**t), v[k] / (1 - 0.999**t)
            step = mean / (np.sqrt(square) + 1e-8)
            if k == 'kernel':
                step = step + decay * params[k]
            params = {**params, k: params[k] - rate * step}
    return params


def sgd(params, gradients, rates, decay):
    """Nesterov momentum as in PyTorch."""
    momentum = dict.fromkeys(params, 0.0)
    for grads, rate in zip(gradients, rates):
        for k, g in grads.items():
            if k == 'kernel':
                g = g + decay * params[k]
            momentum[k] = 0.9 * momentum[k] + g
            step = g + 0.9 * momentum[k]
            params = {**params, k: params[k] - rate * step}
    return params


@pytest.mark.parametrize('rule', [adamw, sgd])
@pytest.mark.parametrize('decay', [0.0, 0.3])
@pytest.mark.parametrize('clip_norm', [None, 2.0, 1e6])
def test_steps_equal_the_formulas(rule, decay, clip_norm):
    """Three steps of a schedule; the gradients are clipped before all else."""
    gradients = [random_tree(seed) for seed in (1, 2, 3)]
    schedule = make_schedule('cosine', 0.1, 5, warmup_steps=2)
    rates = [cosine(step, 5, 2) * 0.1 / RATE for step in range(3)]
    start = random_tree(0)
    clipped = [clip(grads, clip_norm) for grads in gradients]
    expected = rule(start, clipped, rates, decay)

    tx = make_optimizer(rule.__name__, schedule, decay, clip_norm)
    params = jax.tree.map(jnp.float32, start)
    state = tx.init(params)
    for grads in gradients:
        grads = jax.tree.map(jnp.float32, grads)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    for k in start:
        np.testing.assert_allclose(params[k], expected[k], rtol=1e-5, atol=1e-6)
        assert np.abs(params[k] - start[k]).max() > 0.01


def test_the_whole_gradient_is_clipped():
    """Norm 13 of (3, 4, 12) to 6.5: every part is halved."""
    tx = make_optimizer('sgd', optax.constant_schedule(1.0), clip_norm=6.5)
    params = {'a': jnp.zeros(2), 'b': jnp.zeros(1)}
    grads = {'a': jnp.array([3.0, 4.0]), 'b': jnp.array([12.0])}
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates['a'], [-1.9 * 1.5, -1.9 * 2.0], rtol=1e-6)
    np.testing.assert_allclose(updates['b'], [-1.9 * 6.0], rtol=1e-6)
