"""Gradients in micro-batches, and what an update does to a state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.losses import cross_entropy, smooth_labels
from vit_jax.metrics import classification_metrics
from vit_jax.models import build_model
from vit_jax.state import TrainState
from vit_jax.update import Updates, accumulate, apply_gradients

ROWS, CLASSES = 24, 7


def make_batch():
    rng = np.random.default_rng(0)
    return {
        'image': jnp.asarray(rng.normal(size=(ROWS, 4, 6, 3)), jnp.float32),
        'label': jnp.asarray(rng.integers(CLASSES, size=ROWS)),
        'weight': jnp.asarray(rng.integers(2, size=ROWS), jnp.float32),
    }


def make_loss(model, total):
    def loss_fn(params, others, batch, rng):
        variables = {'params': params, **others}
        logits, others = model.apply(
            variables,
            batch['image'],
            train=True,
            rngs={'dropout': rng},
            mutable=list(others),
        )
        losses = cross_entropy(logits, smooth_labels(batch['label'], CLASSES, 0.1))
        metrics = classification_metrics(
            logits, batch['label'], batch['weight'], losses
        )
        return metrics['loss'][0] / total, (metrics, others)

    return loss_fn


def gradients(model, **kwargs):
    batch = make_batch()
    variables = model.init(jax.random.key(0), batch['image'])
    # A head of zeros would leave all other gradients zero.
    variables = jax.tree.map(
        lambda x: x + 0.01 * jnp.arange(x.size).reshape(x.shape) % 1, variables
    )
    loss_fn = make_loss(model, batch['weight'].sum())
    run = jax.jit(
        lambda variables: accumulate(
            loss_fn, variables, batch, jax.random.key(1), Updates(**kwargs)
        )
    )
    return variables, run(variables)


@pytest.fixture(scope='module')
def vit():
    fields = {'width': 8, 'depth': 1, 'mlp_dim': 12, 'num_heads': 2}
    return build_model('ViT-Ti/2', CLASSES, **fields)


@pytest.mark.parametrize('accum_steps', [4, 24])
def test_micro_batches_have_the_gradient_of_the_batch(vit, accum_steps):
    _, (whole, _, expected) = gradients(vit)
    _, (grads, _, metrics) = gradients(vit, accum_steps=accum_steps)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(whole))
    assert largest > 0.1
    for path, x in jax.tree_util.tree_leaves_with_path(whole):
        y = dict(jax.tree_util.tree_leaves_with_path(grads))[path]
        np.testing.assert_allclose(y, x, rtol=0, atol=1e-6 * largest, err_msg=path)
    for name, pair in expected.items():
        np.testing.assert_allclose(metrics[name], pair, rtol=1e-6)


def test_a_micro_batch_takes_every_so_manieth_row():
    """Which rows see each other is what BatchNorm's statistics tell."""
    batch = make_batch()

    def loss_fn(params, others, batch, rng):
        first = batch['image'][:, 0, 0, 0]
        mean = 0.5 * others['mean'] + 0.5 * first.mean()
        return (params * first).sum(), ({'count': (first.size, 1.0)}, {'mean': mean})

    variables = {'params': jnp.float32(2.0), 'mean': jnp.float32(0.0)}
    key = jax.random.key(0)
    grads, others, metrics = accumulate(loss_fn, variables, batch, key, Updates(3))
    column = np.asarray(batch['image'])[:, 0, 0, 0].astype(np.float64)
    mean = 0.0
    for i in range(3):
        mean = 0.5 * mean + 0.5 * column[i::3].mean()
    np.testing.assert_allclose(others['mean'], mean, rtol=1e-5)
    np.testing.assert_allclose(grads, column.sum(), rtol=1e-5)
    assert metrics['count'] == (24, 3.0)


def test_each_micro_batch_has_random_numbers_of_its_own():
    def loss_fn(params, others, batch, rng):
        draw = jax.random.normal(rng)
        return params * draw, ({'draw': (draw, 1.0), 'square': (draw**2, 1.0)}, others)

    variables = {'params': jnp.float32(1.0)}
    key = jax.random.key(0)
    _, _, metrics = accumulate(loss_fn, variables, make_batch(), key, Updates(4))
    mean, square = metrics['draw'][0] / 4, metrics['square'][0] / 4
    assert square - mean**2 > 0.01


def test_what_is_frozen_has_no_gradient_and_costs_none(vit):
    variables, (grads, _, _) = gradients(vit, freeze=('(?!head/)',))
    _, (whole, _, _) = gradients(vit)
    frozen = {k: v for k, v in grads.items() if k != 'head'}
    assert all(not np.any(x) for x in jax.tree.leaves(frozen))
    np.testing.assert_allclose(
        grads['head']['logits']['kernel'], whole['head']['logits']['kernel'], rtol=1e-5
    )

    def flops(**kwargs):
        batch = make_batch()
        loss_fn = make_loss(vit, 1.0)
        step = jax.jit(
            lambda v: accumulate(
                loss_fn, v, batch, jax.random.key(1), Updates(**kwargs)
            )
        )
        return step.lower(variables).compile().cost_analysis()['flops']

    assert flops(freeze=('(?!head/)',)) < 0.6 * flops()


# --- The update ---------------------------------------------------------------


def make_state(ema):
    params = {'kernel': jnp.array([1.0, 2.0, 3.0])}
    variables = {'params': params, 'stats': jnp.array([5.0])}
    return TrainState(
        step=jnp.int32(6),
        variables=variables,
        opt_state=optax.sgd(0.5).init(params),
        average=variables if ema else None,
    )


METRICS = {'loss': (jnp.float32(8.0), jnp.float32(4.0))}


def test_an_update_and_its_average():
    grads = {'kernel': jnp.array([3.0, 0.0, 4.0])}
    state, metrics = apply_gradients(
        make_state(ema=True),
        grads,
        {'stats': jnp.array([7.0])},
        METRICS,
        tx=optax.sgd(0.5),
        updates=Updates(ema_decay=0.75),
    )
    assert state.step == 7
    assert state.variables['params']['kernel'].tolist() == [-0.5, 2.0, 1.0]
    assert state.variables['stats'].tolist() == [7.0]
    assert state.average['params']['kernel'].tolist() == [0.625, 2.0, 2.5]
    assert state.average['stats'].tolist() == [5.5]
    assert metrics.pop('nonfinite_leaf')[1] == 1.0
    assert metrics == {'loss': (8.0, 4.0), 'grad_norm': (5.0, 1.0)}


@pytest.mark.parametrize('skip', [False, True])
@pytest.mark.parametrize('bad', [np.nan, np.inf])
@pytest.mark.parametrize('where', ['gradient', 'loss'])
def test_a_step_that_is_not_finite_changes_nothing(bad, where, skip):
    before = make_state(ema=True)
    grads = {'kernel': jnp.array([3.0, bad if where == 'gradient' else 0.0, 4.0])}
    loss = jnp.float32(bad if where == 'loss' else 8.0)
    state, metrics = apply_gradients(
        before,
        grads,
        {'stats': jnp.array([bad])},
        {'loss': (loss, jnp.float32(4.0))},
        tx=optax.sgd(0.5),
        updates=Updates(ema_decay=0.75, skip_nonfinite=skip),
    )
    assert state.step == 7
    for x, y in zip(*map(jax.tree.leaves, (state, before)), strict=True):
        if x is not state.step:
            assert x.tolist() == y.tolist()
    if skip:
        assert metrics['skipped'] == (1.0, 1.0)
        assert metrics['loss'] == metrics['grad_norm'] == (0.0, 0.0)
    else:  # whoever reads the metrics stops the run
        assert not np.isfinite([metrics['loss'][0], metrics['grad_norm'][0]]).all()


def test_the_first_leaf_that_is_not_finite_is_numbered():
    params = {'a': jnp.ones(2), 'b': jnp.ones(3), 'c': jnp.ones(5)}
    tx = optax.sgd(0.5)
    state = TrainState(jnp.int32(0), {'params': params}, tx.init(params))
    grads = {**params, 'b': jnp.array([1.0, jnp.inf, 1.0]), 'c': jnp.full(5, jnp.nan)}
    _, metrics = apply_gradients(state, grads, {}, METRICS, tx=tx, updates=Updates())
    assert metrics['nonfinite_leaf'] == (1.0, 1.0)


def test_a_finite_step_is_not_skipped():
    grads = {'kernel': jnp.array([3.0, 0.0, 4.0])}
    others = {'stats': jnp.array([7.0])}
    states = [
        apply_gradients(
            make_state(ema=False),
            grads,
            others,
            METRICS,
            tx=optax.sgd(0.5),
            updates=Updates(skip_nonfinite=skip),
        )
        for skip in (False, True)
    ]
    (plain, _), (state, metrics) = states
    for x, y in zip(*map(jax.tree.leaves, (state, plain)), strict=True):
        assert x.tolist() == y.tolist()
    assert metrics['skipped'] == (0.0, 1.0)
