import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit_jax.errors import UserError
from vit_jax.models import build_model
from vit_jax.optim import OPTIMIZERS, make_optimizer, make_schedule
from vit_jax.param_groups import decay_mask

RATE = 0.7

# --- Schedules ----------------------------------------------------------------


def cosine(step, num_steps, warmup_steps):
    if step < warmup_steps:
        return RATE * step / warmup_steps
    done = (step - warmup_steps) / (num_steps - warmup_steps)
    return RATE * (1 + math.cos(math.pi * min(done, 1))) / 2


def linear(step, num_steps, warmup_steps):
    if step < warmup_steps:
        return RATE * step / warmup_steps
    return RATE * max(num_steps - step, 0) / (num_steps - warmup_steps)


def constant(step, num_steps, warmup_steps):
    return RATE * min(step / warmup_steps if warmup_steps else 1, 1)


def rsqrt(step, num_steps, warmup_steps):
    if step < warmup_steps:
        return RATE * step / warmup_steps
    return RATE * math.sqrt(warmup_steps) / math.sqrt(step)


@pytest.mark.parametrize(
    ('reference', 'warmup_steps'),
    [
        *itertools.product([cosine, linear, constant], [0, 1, 5, 16]),
        *itertools.product([rsqrt], [1, 5, 16]),
    ],
)
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


@pytest.mark.parametrize('name', ['cosine', 'linear'])
def test_schedules_may_end_above_zero(name):
    """Half-way down is half-way between the peak and the end."""
    schedule = make_schedule(name, RATE, 14, 4, end_learning_rate=0.1)
    values = [float(schedule(step)) for step in (2, 4, 9, 14, 23)]
    np.testing.assert_allclose(values, [0.35, 0.7, 0.4, 0.1, 0.1], atol=1e-7)
    with pytest.raises(UserError, match=r'end_learning_rate 0.8 is above .* 0.7'):
        make_schedule(name, RATE, 14, 4, end_learning_rate=0.8)


@pytest.mark.parametrize(
    ('name', 'points'),
    [
        # Up to 3 in 9 steps; 3 * sqrt(9 / 36) at 36; from there 5 steps down.
        ('rsqrt', {0: 0, 3: 1, 9: 3, 16: 2.25, 36: 1.5, 38: 0.9, 40: 0.3, 41: 0}),
        ('constant', {0: 0, 3: 1, 9: 3, 16: 3, 36: 3, 38: 1.8, 40: 0.6, 41: 0}),
    ],
)
def test_a_cool_down_is_a_line_from_where_the_curve_is_to_zero(name, points):
    schedule = make_schedule(name, 3.0, 41, warmup_steps=9, cooldown_steps=5)
    values = [float(schedule(step)) for step in [*points, 57]]
    np.testing.assert_allclose(values, [*points.values(), 0], atol=1e-6)


def test_a_cool_down_may_follow_the_warm_up_at_once():
    schedule = make_schedule('constant', 2.0, 7, warmup_steps=2, cooldown_steps=5)
    values = [float(schedule(step)) for step in range(8)]
    np.testing.assert_allclose(values, [0, 1, 2, 1.6, 1.2, 0.8, 0.4, 0], atol=1e-6)


@pytest.mark.parametrize('name', ['cosine', 'linear', 'rsqrt', 'constant'])
def test_a_run_may_be_all_warm_up(name):
    schedule = make_schedule(name, RATE, 7, 7)
    values = [float(schedule(step)) for step in range(7)]
    np.testing.assert_allclose(values, RATE * np.arange(7) / 7, rtol=1e-6)


@pytest.mark.parametrize('warmup_steps', [-1, 8])
def test_warm_ups_that_do_not_fit(warmup_steps):
    with pytest.raises(UserError, match='must be within num_steps 7'):
        make_schedule('cosine', RATE, 7, warmup_steps)


@pytest.mark.parametrize('cooldown_steps', [-1, 6])
def test_cool_downs_that_do_not_fit(cooldown_steps):
    with pytest.raises(UserError, match='must be within the 5 steps after'):
        make_schedule('constant', RATE, 7, 2, cooldown_steps)


def test_schedules_that_make_no_sense():
    for name in ('cosine', 'linear'):
        with pytest.raises(UserError, match=f'{name!r} has an end'):
            make_schedule(name, RATE, 7, 2, cooldown_steps=1)
    with pytest.raises(UserError, match=r"'rsqrt' is measured in optim\.warmup_steps"):
        make_schedule('rsqrt', RATE, 7)


def test_unknown_names():
    with pytest.raises(UserError, match=r"optim\.schedule 'cosin'; .* 'cosine'"):
        make_schedule('cosin', RATE, 7)
    with pytest.raises(UserError, match=r"optim\.name 'adam'; .* 'adamw'"):
        make_optimizer('adam', optax.constant_schedule(RATE))


# --- Steps ----------------------------------------------------------------------

# Of the second and third, the moments of 'adafactor' are factored.
SHAPES = {
    'fc/kernel': (3, 5),
    'conv/kernel': (37, 2, 41),
    'head/kernel': (43, 37),
    'fc/bias': (5,),
    'gating': (2, 3),
}


def random_tree(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def clip(grads, clip_norm):
    norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
    scale = min(1.0, clip_norm / norm) if clip_norm else 1.0
    return {k: scale * g for k, g in grads.items()}


def adam_steps(gradients, b1, b2, eps):
    """m / (sqrt(v) + eps) of every step, both without their bias (1412.6980)."""
    m = dict.fromkeys(SHAPES, 0.0)
    v = dict.fromkeys(SHAPES, 0.0)
    for t, grads in enumerate(gradients, start=1):
        for k, g in grads.items():
            m[k] = b1 * m[k] + (1 - b1) * g
            v[k] = b2 * v[k] + (1 - b2) * g**2
        yield {
            k: m[k] / (1 - b1**t) / (np.sqrt(v[k] / (1 - b2**t)) + eps) for k in SHAPES
        }


def adamw(params, gradients, rates, decay, b1, b2):
    """arXiv 1711.05101, algorithm 2, without the schedule multiplier of its own."""
    for steps, rate in zip(adam_steps(gradients, b1, b2, 1e-8), rates):
        for k, step in steps.items():
            if 'kernel' in k:
                step = step + decay * params[k]
            params = {**params, k: params[k] - rate * step}
    return params


def lamb(params, gradients, rates, decay, b1, b2):
    """arXiv 1904.00962, algorithm 2; what does not decay is not adapted."""
    for steps, rate in zip(adam_steps(gradients, b1, b2, 1e-6), rates):
        for k, step in steps.items():
            if 'kernel' in k:
                step = step + decay * params[k]
                step = step * math.sqrt((params[k] ** 2).sum() / (step**2).sum())
            params = {**params, k: params[k] - rate * step}
    return params


def sgd(params, gradients, rates, decay, b1, b2):
    """Nesterov momentum as in PyTorch."""
    momentum = dict.fromkeys(params, 0.0)
    for grads, rate in zip(gradients, rates):
        for k, g in grads.items():
            if 'kernel' in k:
                g = g + decay * params[k]
            momentum[k] = b1 * momentum[k] + g
            step = g + b1 * momentum[k]
            params = {**params, k: params[k] - rate * step}
    return params


def factored(squares):
    """Rank-one estimate of a matrix from its rows and columns (1804.04235, sec. 3)."""
    rows, columns = squares.sum(1), squares.sum(0)
    return np.outer(rows, columns) / squares.sum()


def adafactor(params, gradients, rates, decay, b1, b2):
    """arXiv 1804.04235, algorithm 4, as arXiv 2106.04560 changes it.

    The estimate is formed from the mean of whole squares, of which rows and columns
    are linear.
    """
    v = dict.fromkeys(params, 0.0)
    m = dict.fromkeys(params, 0.0)
    for t, (grads, rate) in enumerate(zip(gradients, rates), start=1):
        beta = min(1 - t**-0.8, b2)
        for k, g in grads.items():
            v[k] = beta * v[k] + (1 - beta) * g**2
            estimate = v[k]
            if k == 'head/kernel':
                estimate = factored(v[k])
            elif k == 'conv/kernel':
                estimate = np.stack([factored(v[k][:, i]) for i in range(2)], axis=1)
            m[k] = b1 * m[k] + (1 - b1) * g / np.sqrt(estimate)
            step = m[k] + decay * params[k] if 'kernel' in k else m[k]
            params = {**params, k: params[k] - rate * step}
    return params


RULES = {rule.__name__: rule for rule in (adamw, sgd, lamb, adafactor)}


@pytest.mark.parametrize('name', OPTIMIZERS)
@pytest.mark.parametrize(
    ('decay', 'clip_norm', 'b1', 'b2'),
    [
        (0.0, None, 0.9, 0.999),
        (0.3, 20.0, 0.9, 0.999),
        (0.3, 1e6, 0.7, 0.6),
        (0.3, None, 0.0, 0.97),
    ],
)
def test_steps_equal_the_formulas(name, decay, clip_norm, b1, b2):
    """Four steps of a schedule; the gradients are clipped before all else."""
    gradients = [random_tree(seed) for seed in (1, 2, 3, 4)]
    schedule = make_schedule('cosine', 0.1, 6, warmup_steps=2)
    rates = [cosine(step, 6, 2) * 0.1 / RATE for step in range(4)]
    start = random_tree(0)
    clipped = [clip(grads, clip_norm) for grads in gradients]
    expected = RULES[name](start, clipped, rates, decay, b1, b2)

    tx = make_optimizer(name, schedule, decay, clip_norm, b1=b1, b2=b2)
    params, _ = take_steps(tx, start, gradients)
    # The first moment of 'adafactor' has eight bits.
    atol = 2e-3 if name == 'adafactor' and b1 else 5e-6
    for k in start:
        np.testing.assert_allclose(params[k], expected[k], rtol=1e-5, atol=atol)
        assert np.abs(params[k] - start[k]).max() > 0.01


def take_steps(tx, params, gradients):
    """(parameters, state) after an update with each of the gradients."""
    params = jax.tree.map(jnp.float32, params)
    state = tx.init(params)
    update = tx.update
    for grads in gradients:
        updates, state = update(jax.tree.map(jnp.float32, grads), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_the_whole_gradient_is_clipped():
    """Norm 13 of (3, 4, 12) to 6.5: every part is halved."""
    tx = make_optimizer('sgd', optax.constant_schedule(1.0), clip_norm=6.5)
    params = {'a': jnp.zeros(2), 'b': jnp.zeros(1)}
    grads = {'a': jnp.array([3.0, 4.0]), 'b': jnp.array([12.0])}
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates['a'], [-1.9 * 1.5, -1.9 * 2.0], rtol=1e-6)
    np.testing.assert_allclose(updates['b'], [-1.9 * 6.0], rtol=1e-6)


# --- Groups -----------------------------------------------------------------------


def random_params(model, seed):
    """Normal numbers in the form of the model's parameters."""
    rng = np.random.default_rng(seed)
    image = jnp.zeros((1, 4, 6, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)['params']
    return jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), shapes)


def one_step(params, **kwargs):
    """Plain SGD at rate 1 with gradients of 1: what is left is factors."""
    schedule = optax.constant_schedule(1.0)
    tx = make_optimizer('sgd', schedule, b1=0.0, params=params, **kwargs)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    return {
        jax.tree_util.keystr(path, simple=True, separator='/'): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
    }


def test_layers_learn_slower_the_deeper_they_lie():
    """Depth 2: 1 for the head, then 0.5, 0.25, and 0.125 for what comes before."""
    fields = {'width': 8, 'depth': 2, 'mlp_dim': 12, 'num_heads': 4}
    model = build_model('ViT-Ti/2', 7, distilled=True, num_registers=3, **fields)
    params = random_params(model, seed=0)
    expected = {'block00': 0.25, 'block01': 0.5, 'head': 1.0}
    updates = one_step(params, layer_decay=0.5)
    modules = {name.split('/')[0] for name in updates}
    assert modules == {*expected, 'patches', 'posemb', 'class_token', 'registers'}
    for name, update in updates.items():
        factor = expected.get(name.split('/')[0], 0.125)
        assert np.all(update == -factor), name


def test_a_layer_and_its_rule_both_count():
    """Of kernels of 3, whose gradient of 1 gets a decay of 0.25 * 3, times factors."""
    params = {
        'block00': {'kernel': jnp.full((2, 3), 3.0), 'bias': jnp.full(3, 3.0)},
        'head': {'kernel': jnp.full((3, 5), 3.0), 'bias': jnp.full(5, 3.0)},
    }
    rules = (('block00/kernel', 10.0, 0.0), ('head/', None, 2.0))
    updates = one_step(params, weight_decay=0.25, layer_decay=0.5, rules=rules)
    np.testing.assert_allclose(updates['block00/kernel'], -10 * 0.5)
    np.testing.assert_allclose(updates['block00/bias'], -0.5)
    np.testing.assert_allclose(updates['head/kernel'], -(1 + 2 * 0.75))
    np.testing.assert_allclose(updates['head/bias'], -1.0)


def test_decoupled_decay_follows_the_learning_rate_of_its_layer():
    """AdamW's first step is 1 whatever the gradient; the decay adds 0.1 * 3."""
    params = {
        'block00': {'kernel': jnp.full((2, 3), 3.0)},
        'head': {'bias': jnp.ones(5)},
    }
    tx = make_optimizer(
        'adamw', optax.constant_schedule(1.0), 0.1, layer_decay=0.5, params=params
    )
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates['block00']['kernel'], -0.5 * 1.3, rtol=1e-5)
    np.testing.assert_allclose(updates['head']['bias'], -1.0, rtol=1e-5)


# --- Frozen parameters --------------------------------------------------------------


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_a_linear_probe_leaves_all_but_the_head_as_it_is(name):
    """Bit for bit, without state, whatever the gradients are."""
    fields = {'width': 8, 'depth': 2, 'mlp_dim': 12, 'num_heads': 4}
    model = build_model('ConViT-Ti/2', 7, num_local_layers=1, **fields)
    params = random_params(model, seed=0)
    schedule = optax.constant_schedule(0.1)
    tx = make_optimizer(name, schedule, 0.3, 1.0, freeze=('(?!head/)',), params=params)

    grads = random_params(model, seed=1)
    grads['posemb'] = {'grid': jnp.full_like(grads['posemb']['grid'], jnp.nan)}
    after, state = take_steps(tx, params, [grads] * 2)
    for module in params:
        moved = [
            np.any(x != y)
            for x, y in zip(*map(jax.tree.leaves, (params[module], after[module])))
        ]
        assert all(moved) if module == 'head' else not any(moved), module

    head = make_optimizer(name, schedule, 0.3, 1.0).init({'head': params['head']})
    assert jax.tree.map(jnp.shape, jax.tree.leaves(state)) == jax.tree.map(
        jnp.shape, jax.tree.leaves(head)
    )


def test_what_is_frozen_does_not_count_in_the_norm():
    """Norm 5 of (3, 4) to 2.5, the frozen 12 aside."""
    params = {'a': jnp.zeros(2), 'b': jnp.zeros(1)}
    tx = make_optimizer(
        'sgd',
        optax.constant_schedule(1.0),
        clip_norm=2.5,
        b1=0.0,
        freeze=['b'],
        params=params,
    )
    grads = {'a': jnp.array([3.0, 4.0]), 'b': jnp.array([12.0])}
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates['a'], [-1.5, -2.0], rtol=1e-6)
    assert updates['b'] == 0.0


# --- State ------------------------------------------------------------------------

PARAMS = {
    'block00': {'kernel': jnp.ones((40, 56)), 'bias': jnp.ones(56)},
    'head': {'kernel': jnp.ones((56, 8)), 'bias': jnp.ones(8)},
}
MOMENTS = {
    'adamw': {'mu', 'nu'},
    'lamb': {'mu', 'nu'},
    'sgd': {'trace'},
    'adafactor': {'v_row', 'v_col', 'v', 'ema'},
}


@pytest.mark.parametrize('clip_norm', [None, 1.0])
def test_the_state_of_adamw_is_that_of_optax(clip_norm):
    """With and without clipping, which a run may begin late."""
    schedule = optax.constant_schedule(0.1)
    plain = optax.adamw(schedule, weight_decay=0.3, mask=decay_mask)
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    plain = optax.chain(clip, plain)
    ours = make_optimizer('adamw', schedule, 0.3, clip_norm, params=PARAMS)
    assert jax.tree.structure(ours.init(PARAMS)) == jax.tree.structure(
        plain.init(PARAMS)
    )


@pytest.mark.parametrize('name', OPTIMIZERS)
@pytest.mark.parametrize('freeze', [(), ('head/bias',)])
def test_paths_of_the_state_end_in_those_of_the_parameters(name, freeze):
    tx = make_optimizer(
        name, optax.constant_schedule(0.1), 0.3, 1.0, freeze=freeze, params=PARAMS
    )
    found = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tx.init(PARAMS)):
        name_of_leaf = jax.tree_util.keystr(path, simple=True, separator='/')
        if name_of_leaf.endswith('count'):
            continue
        moment, module, kind = name_of_leaf.split('/')[-3:]
        param = PARAMS[module][kind]
        # Rows and columns of the one kernel that is larger than 32 both ways.
        short = {'v_row': (40,), 'v_col': (56,), 'v': (1,)}
        if name == 'adafactor' and module == 'block00' and kind == 'kernel':
            expected = short.get(moment, param.shape)
        else:
            expected = (1,) if moment in {'v_row', 'v_col'} else param.shape
        assert leaf.shape == expected, path
        assert leaf.dtype == (jnp.bfloat16 if moment == 'ema' else jnp.float32)
        found.add((moment, f'{module}/{kind}'))
    names = {'block00/kernel', 'block00/bias', 'head/kernel', 'head/bias'}
    assert found == set(itertools.product(MOMENTS[name], names - set(freeze)))


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_a_sharded_step_is_the_step(name):
    """`jit` of parameters in eight parts, and `pmap` of shares of the gradient."""
    rng = np.random.default_rng(0)
    params, grads = (
        jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), PARAMS)
        for _ in range(2)
    )
    tx = make_optimizer(
        name,
        optax.constant_schedule(0.1),
        0.3,
        1.0,
        layer_decay=0.5,
        rules=(('bias', 2.0, None),),
        freeze=('head/bias',),
        params=params,
    )

    def step(params, grads):
        updates, state = tx.update(grads, tx.init(params), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    expected = jax.tree.leaves(jax.jit(step)(params, grads))
    devices = np.array(jax.devices())
    assert devices.size == 8

    mesh = Mesh(devices, 'x')
    split = jax.device_put(
        (params, grads),
        jax.tree.map(
            lambda x: NamedSharding(mesh, PartitionSpec('x')), (params, grads)
        ),
    )

    def step_of_means(params, share):
        shares = jax.tree.map(lambda x: share * x, grads)
        return step(params, jax.lax.pmean(shares, 'x'))

    shares = jnp.arange(1.0, 17, 2) / 8  # their mean is 1
    each = jax.pmap(step_of_means, 'x', in_axes=(None, 0))(params, shares)
    results = [jax.jit(step)(*split), jax.tree.map(lambda x: x[3], each)]
    for result in results:
        for x, y in zip(jax.tree.leaves(result), expected, strict=True):
            tolerance = 1e-2 if y.dtype == jnp.bfloat16 else 1e-5
            np.testing.assert_allclose(
                np.float32(x), np.float32(y), rtol=tolerance, atol=1e-6
            )
