import json
import logging
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.averaging import init_average
from vit_jax.checkpoint import Checkpoints, shapes_on
from vit_jax.errors import UserError
from vit_jax.parallel import make_parallel
from vit_jax.state import TrainState
from vit_jax.stored import Choice, choose, restore_variables

REPLICATED = make_parallel('jit').replicated


def make_state(step):
    """Odd numbers, in several dtypes; another state for each step."""
    rng = np.random.default_rng(step)
    params = {
        'block': {'kernel': rng.normal(size=(3, 5)).astype(np.float32)},
        'scale': rng.normal(size=7).astype(jnp.bfloat16),
    }
    params['block']['kernel'][0, :3] = [np.nan, -0.0, 1e-42]
    stats = {'mean': rng.normal(size=11).astype(np.float32), 'count': np.int32(step)}
    state = TrainState(
        step=np.int32(step),
        variables={'params': params, 'batch_stats': stats},
        opt_state=optax.adam(1e-3).init(params),
    )
    return jax.device_put(state, REPLICATED)


LIKE = shapes_on(REPLICATED, make_state(0))


def save(workdir, *steps, keep=None):
    with Checkpoints(workdir, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {'position': 10 * step})


def restore(workdir, like=LIKE):
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.restore_latest(like)


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def damage(workdir, step, item, how):
    """Spoils the files of one item of a checkpoint."""
    folder = workdir / 'checkpoints' / str(step) / item
    if how == 'missing':
        shutil.rmtree(folder)
        return
    files = [path for path in folder.rglob('*') if path.is_file()]
    for path in files:
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if how == 'truncated' else b'')


# --- Whole checkpoints --------------------------------------------------------


def test_what_is_saved_is_restored_bit_by_bit(tmp_path):
    metadata = {
        'position': 30,
        'names': ['a', 'b'],
        'config': {'rate': 1e-3, 'x': None},
    }
    state = make_state(3)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, metadata)
    restored = restore(tmp_path)
    assert (restored.step, restored.metadata) == (3, metadata)
    assert_same_bits(restored.state, state)
    for leaf in jax.tree.leaves(restored.state):
        assert leaf.sharding == REPLICATED


def test_a_restored_state_can_be_trained_on(tmp_path):
    """The optimizer's state has its own types again, not dicts."""
    save(tmp_path, 3)
    state = restore(tmp_path).state
    tx = optax.adam(1e-3)
    updates, _ = tx.update(state.variables['params'], state.opt_state)
    assert jax.tree.structure(updates) == jax.tree.structure(state.variables['params'])


def test_the_state_may_change_while_it_is_saved(tmp_path):
    """What is saved is the state at the time of the call, though it is donated."""
    state = make_state(3)
    expected = jax.tree.map(np.asarray, state)
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, {})
        step(state)
    assert_same_bits(restore(tmp_path).state, expected)


def test_the_newest_is_restored_and_only_so_many_are_kept(tmp_path):
    save(tmp_path, 2, 3, 10, keep=2)
    kept = sorted(path.name for path in (tmp_path / 'checkpoints').iterdir())
    assert kept == ['10', '3']
    restored = restore(tmp_path)
    assert (restored.step, restored.metadata['position']) == (10, 100)
    assert_same_bits(restored.state, make_state(10))


def test_all_are_kept_by_default(tmp_path):
    save(tmp_path, 2, 3, 5)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 5
    assert len(list((tmp_path / 'checkpoints').iterdir())) == 3


def test_there_are_none_at_first(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.restore_latest(LIKE) is None


def test_a_save_that_was_cut_off_does_not_count(tmp_path):
    """Orbax gives a checkpoint its name when all of it is written."""
    save(tmp_path, 3)
    folder = tmp_path / 'checkpoints'
    shutil.copytree(folder / '3', folder / '5.orbax-checkpoint-tmp-1')
    assert restore(tmp_path).step == 3


# --- Damaged ones -------------------------------------------------------------


@pytest.mark.parametrize('item', ['variables', 'optimizer', 'metadata'])
@pytest.mark.parametrize('how', ['truncated', 'empty', 'missing'])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, item, how, caplog):
    save(tmp_path, 3, 5, 7)
    damage(tmp_path, 7, item, how)
    with (
        caplog.at_level(logging.WARNING, logger='vit_jax'),
        Checkpoints(tmp_path) as checkpoints,
    ):
        restored = checkpoints.restore_latest(LIKE)
        assert checkpoints.latest_step() == 5
        # The run computes step 7 again, and can save it.
        checkpoints.save(7, make_state(7), {})
    assert restored.step == 5
    assert_same_bits(restored.state, make_state(5))
    messages = [r.getMessage() for r in caplog.records if 'vit_jax' in r.name]
    assert messages[0].startswith('checkpoint 7 cannot be read (')
    kept = tmp_path / 'checkpoints' / 'unreadable-7'
    assert messages[1:] == [f'going on from checkpoint 5; kept {kept}']
    assert kept.is_dir()
    assert_same_bits(restore(tmp_path).state, make_state(7))


def test_data_that_was_changed_is_noticed(tmp_path):
    """Every file of the arrays is covered by a checksum."""
    save(tmp_path, 3, 5)
    folder = tmp_path / 'checkpoints' / '5' / 'variables'
    largest = max(folder.rglob('d/*'), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    assert restore(tmp_path).step == 3


def test_when_all_are_damaged_nothing_is_deleted(tmp_path, caplog):
    save(tmp_path, 3, 5)
    for step in (3, 5):
        damage(tmp_path, step, 'variables', 'truncated')
    with pytest.raises(UserError, match=r'none of the checkpoints \[5, 3\] in .* read'):
        restore(tmp_path)
    assert [
        r.getMessage().split(' (')[0]
        for r in caplog.records
        if r.name == 'vit_jax.checkpoint'
    ][:2] == ['checkpoint 5 cannot be read', 'checkpoint 3 cannot be read']
    names = {path.name for path in (tmp_path / 'checkpoints').iterdir()}
    assert names == {'3', '5'}


def test_shapes_on():
    shapes = shapes_on(REPLICATED, {'a': np.zeros((3, 5), np.int32)})
    expected = jax.ShapeDtypeStruct((3, 5), np.int32, sharding=REPLICATED)
    assert shapes == {'a': expected}


# --- Best, averaged, not written ----------------------------------------------


@pytest.mark.parametrize(
    ('metric', 'best'),
    [
        ('accuracy', 10),
        ('loss', 20),
        ('ema_accuracy', 30),
        ('perplexity', 20),
        ('frechet', 20),
    ],
)
def test_the_best_is_kept_beside_the_newest(tmp_path, metric, best):
    scores = {  # accuracy, loss and as perplexity, ema_accuracy
        10: (0.9, 0.5, 0.1),
        20: (0.2, 0.3, 0.2),
        30: (0.3, 0.4, 0.6),
        40: (0.4, 0.9, 0.5),
        50: (0.5, 0.7, 0.4),
    }
    names = ('accuracy', 'loss', 'ema_accuracy')
    config = {'checkpoint': {'keep_best': metric}, 'optim': {'ema_decay': 0.9}}
    config['checkpoint']['every_steps'] = 10
    for step, values in scores.items():  # each of them after an interruption
        with Checkpoints(tmp_path, 1, 10, keep_best=metric) as checkpoints:
            evaluation = dict(zip(names, values))
            evaluation |= dict.fromkeys(('perplexity', 'frechet'), values[1])
            if step == 20:  # after a stop, the evaluation comes after the checkpoint
                checkpoints.save(step, make_state(step), {'config': config})
                checkpoints.note(step, evaluation)
            else:
                checkpoints.save(step, make_state(step), {'config': config}, evaluation)
            with (tmp_path / 'metrics.jsonl').open('a') as file:
                line = {f'eval/{name}': value for name, value in evaluation.items()}
                file.write(json.dumps({'step': step, **line}) + '\n')
            if step == 30:  # as after a signal, between two evaluations
                checkpoints.save(35, make_state(35), {'config': config})
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == sorted({best, 50})
    item = 'average' if metric == 'ema_accuracy' else 'variables'
    assert choose(tmp_path, 'best') == Choice((best,), item)
    assert choose(tmp_path, 'ema') == Choice((50,), 'average')


def test_stops_push_out_no_checkpoint(tmp_path):
    """What is kept in the end is what a run that was not stopped keeps."""
    for step in (10, 20, 24, 27, 30, 38, 40, 43):  # every 10; others after signals
        with Checkpoints(tmp_path, keep=3, every_steps=10) as checkpoints:
            checkpoints.save(step, make_state(step), {})
            checkpoints.wait()
            kept = checkpoints.steps()
        if step == 27:
            assert kept == [10, 20, 27]
    assert kept == [30, 40, 43]
    with Checkpoints(tmp_path, keep=3, every_steps=10) as checkpoints:
        checkpoints.save(50, make_state(50), {})
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [30, 40, 50]


def test_an_average_that_a_run_did_not_have_begins_with_its_parameters(
    tmp_path, caplog
):
    state = make_state(5)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state, {})
    found = restore(tmp_path, LIKE.replace(average=LIKE.variables)).state
    assert_same_bits(found.replace(average=None), state)
    assert_same_bits(found.average, init_average(state.variables))
    assert 'checkpoint 5 has no average: it begins here' in caplog.text


def test_a_damaged_checkpoint_without_its_average_takes_none_from_others(tmp_path):
    state = make_state(5).replace(average=make_state(7).variables)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state, {})
        checkpoints.save(6, state, {})
    for item in ('average', 'variables'):
        shutil.rmtree(tmp_path / 'checkpoints' / '6' / item)
    found = restore(tmp_path, LIKE.replace(average=LIKE.variables))
    assert found.step == 5
    assert_same_bits(found.state, state)


def test_the_average_is_a_checkpoint_s_own(tmp_path):
    average = make_state(7).variables
    state = make_state(5).replace(average=average)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state, {})
    like = LIKE.replace(average=LIKE.variables)
    assert_same_bits(restore(tmp_path, like).state, state)
    assert restore(tmp_path).state.average is None
    found = restore_variables(tmp_path, Choice((5,), 'average'), LIKE.variables)
    assert_same_bits(found, average)


def test_a_checkpoint_that_cannot_be_written(tmp_path):
    """No file may grow past some bytes, as on a full disk."""
    save(tmp_path, 3)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, unlimited[1]))
    try:
        with pytest.raises(UserError, match=r'cannot be written to .* is kept'):
            save(tmp_path, 5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    restored = restore(tmp_path)
    assert restored.step == 3
    assert_same_bits(restored.state, make_state(3))
    save(tmp_path, 5)  # there is room again
    assert restore(tmp_path).step == 5
