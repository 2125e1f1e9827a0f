"""What the README shows is run; what it names exists."""

import doctest
import pathlib
import re

from vit_jax.main import COMMANDS

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()


def test_the_python_of_the_readme_runs():
    failed, attempted = doctest.testfile(str(ROOT / 'README.md'), module_relative=False)
    assert attempted > 0
    assert failed == 0


def test_every_command_of_the_readme_exists():
    named = set(re.findall(r'vit_jax (\w+) ', README))
    assert set(COMMANDS) <= named
    assert named <= set(COMMANDS)


def test_every_config_of_the_readme_exists_and_every_config_is_named():
    named = set(re.findall(r'configs/(\w+)\.py', README)) | set(
        re.findall(r'`(\w+_(?:vit|convit|cnn|deit))`', README)
    )
    assert named == {path.stem for path in (ROOT / 'configs').glob('*.py')}


def test_ci_runs_the_commands_of_the_readme():
    ci = (ROOT / '.ci' / 'run').read_text()
    train, test = re.findall(r'^(pip install -e .*&&.*)$', README, re.MULTILINE)
    assert train.partition(' --workdir')[0].replace('install', 'install -q') in ci
    for part in test.split(' && '):
        assert part.replace('pip install', 'pip install -q') in ci


def test_links_lead_somewhere():
    pages = [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')]
    for page in pages:
        for target in re.findall(r'\]\(([^)#:]+)\)', page.read_text()):
            assert (page.parent / target).exists(), f'{page.name}: {target}'
