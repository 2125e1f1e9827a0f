import json

import pytest
from ml_collections import ConfigDict

from vit_jax.config import (
    RESUMABLE,
    ConfigReader,
    check_unread,
    choose_variant,
    default_config,
    flatten,
    from_dict,
    load_config,
    override,
)
from vit_jax.errors import UserError

RECIPE = """
from vit_jax.config import choose_variant, default_config

def get_config(variant=None):
    config = default_config()
    config.seed = 7 if choose_variant(variant, 'small', 'large') == 'small' else 5
    return config
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / 'recipe.py'
        path.write_text(text)
        return str(path)

    return write


# --- Recipes ------------------------------------------------------------------


@pytest.mark.parametrize(('variant', 'seed'), [('', 5), (':small', 7), (':large', 5)])
def test_recipes_run(write, variant, seed):
    config = load_config(write(RECIPE) + variant)
    assert config.seed == seed
    assert config.is_locked


@pytest.mark.parametrize(
    ('text', 'variant', 'message'),
    [
        (RECIPE, ':smal', "^unknown config variant 'smal'; did you mean 'small'"),
        ('def get_config(:\n', '', 'does not run: SyntaxError'),
        ('import nothing_of_the_kind', '', 'ModuleNotFoundError: No module named'),
        ('def get_config():\n  1 / 0', '', 'ZeroDivisionError: division by zero'),
        ('def get_config(): pass', '', r'must start from default_config\(\)'),
        ('def get_config(): pass', ':small', 'does not run: TypeError'),
        (
            'from ml_collections import ConfigDict\n\ndef get_config():\n'
            '  return ConfigDict({"seed": 3})',
            '',
            r'get_config of .*recipe\.py must start from default_config\(\)',
        ),
        ('raise SystemExit(3)', '', 'does not run: SystemExit: 3'),
        ('x = 1', '', "does not run: AttributeError.*'get_config'"),
        (
            RECIPE.replace('config.seed', 'config.sede'),
            '',
            r'recipe\.py does not run: AttributeError: Key "sede" does not exist and '
            'cannot be added since the config is locked. '
            'Did you mean "seed" instead of "sede"\\?$',
        ),
        (RECIPE.replace('config.seed', 'config.model'), '', 'does not run: TypeError'),
    ],
)
def test_recipes_that_do_not_run(write, text, variant, message):
    with pytest.raises(UserError, match=message) as error:
        load_config(write(text) + variant)
    assert '\n' not in str(error.value)


def test_files_that_are_no_recipes(tmp_path):
    with pytest.raises(UserError, match=r'no such config file: .*/none\.py'):
        load_config(f'{tmp_path}/none.py')
    with pytest.raises(UserError, match='no such config file'):
        load_config(str(tmp_path))
    (tmp_path / 'notes.txt').write_text('hello')
    with pytest.raises(UserError, match=r'notes\.txt is not a Python file'):
        load_config(f'{tmp_path}/notes.txt')


def test_recipes_are_locked_whatever_they_do(write):
    config = load_config(
        write(RECIPE.replace('return config', 'return config.unlock()'))
    )
    with pytest.raises(AttributeError):
        config.new = 3


@pytest.mark.parametrize(
    ('arg', 'chosen'), [(None, None), ('', None), ('small', 'small')]
)
def test_choose_variant(arg, chosen):
    assert choose_variant(arg, 'small', 'large') == chosen


# --- Defaults -----------------------------------------------------------------


def test_defaults_are_locked():
    config = default_config()
    for section in (config, config.optim, config.model.kwargs):
        with pytest.raises(AttributeError):
            section.new = 3


def test_default_task():
    assert default_config().task == 'classify'
    assert default_config('my_fork.tasks').task == 'my_fork.tasks'


def test_resumable_keys_exist():
    keys = [key for key, _ in flatten(default_config())]
    for task in ('translate', 'gan'):
        keys += [key for key, _ in flatten(default_config(task))]
    assert set(RESUMABLE) <= set(keys)


def test_flatten():
    config = ConfigDict({'a': {'b': 3, 'c': {'d': (5, 7), 'e': {}}}, 'f': None})
    expected = [('a.b', 3), ('a.c.d', (5, 7)), ('a.c.e', {}), ('f', None)]
    for mapping in (config, config.to_dict()):
        pairs = dict(flatten(mapping))
        assert {k: v or None for k, v in pairs.items()} == {
            k: v or None for k, v in expected
        }


# --- Overrides ----------------------------------------------------------------


def get(config, key):
    return dict(flatten(config))[key]


@pytest.mark.parametrize(
    ('argument', 'value'),
    [
        ('seed=3', 3),
        ('optim.learning_rate=3e-4', 3e-4),
        ('optim.learning_rate=1', 1.0),
        ('dataset.name=folder:/a=b', 'folder:/a=b'),
        ('augment.flip=True', True),
        ('augment.flip=false', False),
        # Optional ones, whose default is None.
        ('num_steps=7', 7),
        ('num_epochs=2.5', 2.5),
        ('num_epochs=3', 3.0),
        ('optim.clip_norm=1', 1.0),
        ('eval.batch_size=48', 48),
        ('dataset.eval_split=val', 'val'),
        ('dataset.image_size=(24,40)', (24, 40)),
        ('num_steps=None', None),
        ('dataset.image_size=None', None),
        # A field of the model that the recipe sets keeps its type.
        ('model.kwargs.depth=5', 5),
        ('model.kwargs.widths=(3,5)', (3, 5)),
        ('model.kwargs.widths=3', (3,)),
        # Others are literals, or else strings.
        ('model.kwargs.num_heads=3', 3),
        ('model.kwargs.drop_path_rate=0.25', 0.25),
        ('model.kwargs.local_init=False', False),
        ('model.kwargs.strides=(1,2)', (1, 2)),
        ('model.kwargs.representation_size=None', None),
        ('model.kwargs.pool=mean', 'mean'),
        ('model.kwargs.attention=my_fork.nets:Attention', 'my_fork.nets:Attention'),
    ],
)
def test_override(argument, value):
    config = default_config()
    config.model.kwargs = {'depth': 2, 'widths': (7, 7)}
    config.num_steps = 5
    config.dataset.image_size = (8, 8)
    before = config.to_dict()
    new = override(config, [f'--config.{argument}'])
    key = argument.partition('=')[0]
    assert get(new, key) == value
    assert type(get(new, key)) is type(value)
    assert config.to_dict() == before
    assert new.is_locked
    others = {k: v for k, v in flatten(new) if k != key}
    assert others == {k: v for k, v in flatten(config) if k != key}


def test_the_last_override_counts_and_all_are_applied():
    config = override(
        default_config(),
        ['--config.seed=3', '--config.optim.name=sgd', '--config.seed=5'],
    )
    assert (config.seed, config.optim.name) == (5, 'sgd')


def test_an_optional_key_can_be_unset_and_set_again():
    config = override(default_config(), ['--config.num_steps=3'])
    config = override(config, ['--config.num_steps=None', '--config.num_epochs=0.5'])
    assert (config.num_steps, config.num_epochs) == (None, 0.5)
    assert override(config, ['--config.num_steps=7']).num_steps == 7


@pytest.mark.parametrize(
    ('argument', 'message'),
    [
        (
            '--config.optim.learning_rat=3',
            "unknown config key 'optim.learning_rat'; did you mean "
            "'optim.learning_rate'",
        ),
        ('--config.learning_rate=3', "did you mean 'optim.learning_rate'"),
        ('--config.optim=3', "unknown config key 'optim'"),
        ('--config.model.kwargs.a.b=3', "unknown config key 'model.kwargs.a.b'"),
        ('--config.model.kwargs.=3', "unknown config key 'model.kwargs.'"),
        ('--config.seed=1.5', "config.seed must be a whole number, not '1.5'"),
        ('--config.seed=None', "config.seed must be a whole number, not 'None'"),
        ('--config.optim.learning_rate=fast', 'rate must be a number, not .fast'),
        ('--config.augment.flip=maybe', 'flip must be True or False, not .maybe'),
        ('--config.num_epochs=many', 'config.num_epochs must be a number, not .many'),
        ('--config.num_steps=2.5', 'config.num_steps must be a whole number, not .2.5'),
        ('--config.model.kwargs.depth=many', 'depth must be a whole number, not .many'),
        ('--config.seed', 'not of the form --config.key=value'),
        ('seed=3', 'not of the form --config.key=value'),
    ],
)
def test_overrides_that_do_not_fit(argument, message):
    config = default_config()
    config.model.kwargs = {'depth': 3}
    with pytest.raises(UserError, match=message) as error:
        override(config, [argument])
    assert '\n' not in str(error.value)


# --- Through JSON and back ----------------------------------------------------


def test_a_config_survives_json():
    config = default_config('my_fork.tasks')
    config.model.kwargs = {
        'widths': (3, 5),
        'attention': {'name': 'my_fork.nets:A', 'sizes': (7, (11, 13))},
        'depth': None,
    }
    config.dataset.image_size = (24, 40)
    config.num_epochs = 2.5
    with config.unlocked():
        config.mine = ConfigDict({'power': 1.5, 'sizes': (3, 5)})
    back = from_dict(json.loads(json.dumps(config.to_dict())))
    assert back.to_dict() == config.to_dict()
    assert back.is_locked
    # The optional keys still take their type and no other.
    assert override(back, ['--config.optim.clip_norm=2']).optim.clip_norm == 2.0
    with pytest.raises(TypeError):
        back.num_steps = 'many'


# --- What a run reads ---------------------------------------------------------


def test_reader_remembers_what_was_read():
    config = default_config()
    config.model.kwargs = {'depth': 3, 'width': 5}
    reader = ConfigReader(config)
    everything = {key for key, _ in flatten(config)}
    assert set(reader.unread()) == everything
    assert reader.seed == 0
    assert reader.optim.name == 'adamw'
    optim = reader.optim
    assert optim.weight_decay == 0.05
    assert reader.model.kwargs == {'depth': 3, 'width': 5}
    read = {
        'seed',
        'optim.name',
        'optim.weight_decay',
        'model.kwargs.depth',
        'model.kwargs.width',
    }
    assert set(reader.unread()) == everything - read


def test_reader_of_a_key_that_does_not_exist():
    with pytest.raises(KeyError):
        _ = ConfigReader(default_config()).sede


@pytest.mark.parametrize(
    ('values', 'unread', 'named', 'fails'),
    [
        ({}, ['augment.pad'], [], False),  # at its default, not named
        ({'augment.pad': 4}, ['augment.pad'], [], False),
        ({'augment.pad': 7}, ['augment.pad'], [], True),
        ({'augment.pad': 7}, ['augment.flip'], [], False),  # it was read
        ({}, ['augment.pad'], ['augment.pad'], True),  # named, though at its default
        ({}, ['augment.pad'], ['augment.flip'], False),
        # The recipe's, whose switch the user has turned off.
        ({'augment.pad': 7}, ['augment.pad'], ['augment.crop'], False),
        ({'augment.pad': 7}, ['augment.pad'], ['augment.crop', 'augment.pad'], True),
        ({'model.kwargs': {'depth': 3}}, ['model.kwargs.depth'], [], True),
        ({'dataset.image_size': (3, 5)}, ['dataset.image_size'], [], True),
    ],
)
def test_keys_that_were_set_but_not_read(values, unread, named, fails):
    config = default_config()
    for key, value in values.items():
        if key == 'model.kwargs':
            config.model.kwargs = value
        else:
            config.update_from_flattened_dict({key: value})
    if fails:
        with pytest.raises(UserError, match=rf'config\.{unread[0]} is set to'):
            check_unread(config, unread, named or None)
    else:
        check_unread(config, unread, named or None)
