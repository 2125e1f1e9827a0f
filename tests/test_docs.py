"""What the README shows is run; what it names exists."""

import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re

import flax.linen as nn

import vit_jax.layers
import vit_jax.models
from vit_jax.main import COMMANDS

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()


def test_the_python_of_the_readme_runs():
    failed, attempted = doctest.testfile(str(ROOT / 'README.md'), module_relative=False)
    assert attempted > 0
    assert failed == 0


def test_every_module_has_an_example():
    for package in (vit_jax.layers, vit_jax.models):
        for info in pkgutil.iter_modules(package.__path__):
            source = importlib.import_module(f'{package.__name__}.{info.name}')
            for name, thing in vars(source).items():
                ours = getattr(thing, '__module__', None) == source.__name__
                if ours and inspect.isclass(thing) and issubclass(thing, nn.Module):
                    text = f'{thing.__doc__} {thing.__call__.__doc__}'
                    assert '>>> ' in text, f'{source.__name__}.{name} has no example'


def test_every_command_of_the_readme_exists():
    named = set(re.findall(r'vit_jax (\w+) ', README))
    assert set(COMMANDS) <= named
    assert named <= set(COMMANDS)


def test_every_config_of_the_readme_exists_and_every_config_is_named():
    kinds = r'vit|convit|cnn|resnet|sagan|deit|transformer\w*'
    named = set(re.findall(r'configs/(\w+)\.py', README)) | set(
        re.findall(rf'`(\w+_(?:{kinds})|long_range)`', README)
    )
    named.discard('vision_transformer')  # Google's repository
    assert named == {path.stem for path in (ROOT / 'configs').glob('*.py')}


def test_ci_runs_the_commands_of_the_readme():
    ci = (ROOT / '.ci' / 'run').read_text()
    train, test = re.findall(r'^(pip install -e .*&&.*)$', README, re.MULTILINE)
    assert train.partition(' --workdir')[0].replace('install', 'install -q') in ci
    for part in test.split(' && '):
        assert part.replace('pip install', 'pip install -q') in ci


def test_results_are_those_of_the_tables():
    linked = re.findall(r'\[([^]]+)\]\((experiments/\w+/table\.md)\)', README)
    assert len(linked) > 10
    for number, table in linked:
        pattern = rf'(?<![\d.,]){re.escape(number)}(?![\d,]|\.\d)'
        assert re.search(pattern, (ROOT / table).read_text()), f'{table}: {number}'
    tables = [path.read_text() for path in ROOT.glob('experiments/*/table.md')]
    means = re.findall(r'\d+\.\d ± \d+\.\d', README)
    assert len(means) > 20
    assert [x for x in means if not any(f' {x} (' in table for table in tables)] == []


def test_links_lead_somewhere():
    pages = [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')]
    for page in pages:
        for target in re.findall(r'\]\(([^)#:]+)\)', page.read_text()):
            assert (page.parent / target).exists(), f'{page.name}: {target}'
