"""What the pages of docs/ show is run; what they name exists."""

import ast
import functools
import pathlib
import re

import pytest
from ml_collections import ConfigDict

from vit_jax.build import build
from vit_jax.config import default_config, flatten
from vit_jax.main import COMMANDS, main

ROOT = pathlib.Path(__file__).parent.parent
FORK = ROOT / 'tests' / 'fork'
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
every_page = pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)


def blocks(page, language):
    """The code blocks of a page of docs/."""
    text = (ROOT / 'docs' / page).read_text()
    return re.findall(rf'^```{language}\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)


# --- What pages name --------------------------------------------------------------


@every_page
def test_links_lead_to_headings(page):
    for target, anchor in re.findall(r'\]\(([^):]*)#([^)]+)\)', page.read_text()):
        there = (page.parent / target if target else page).read_text()
        headings = re.findall(r'^#+ (.*)$', there, re.MULTILINE)
        names = [re.sub(r'[^\w\- ]', '', text.lower()) for text in headings]
        assert anchor in [name.replace(' ', '-') for name in names], anchor


@every_page
def test_options_are_those_of_the_command(page, capsys):
    @functools.cache
    def options(*command):
        with pytest.raises(SystemExit):
            main([*command, '--help'])
        return set(re.findall(r'--\w+', capsys.readouterr().out))

    text = page.read_text().replace('\\\n', ' ')
    for command, rest in re.findall(r'vit_jax ([a-z_]+)\b([^`#\n]*)', text):
        if command not in COMMANDS:
            continue
        known = options(command)
        for word in rest.split():
            if command == 'benchmark' and word in ('gpsa', 'train'):
                known = options(command, word)
            elif command == 'launch' and word in COMMANDS:
                known = options(word)
            name = re.match(r'--\w+(?![\w.])', word)
            if name and not name[0].startswith('--slurm_'):
                assert name[0] in known, f'vit_jax {command}{rest}'


@every_page
def test_config_keys_exist(page):
    tasks = ('classify', 'distill', 'translate', 'gan')
    keys = {key for task in tasks for key, _ in flatten(default_config(task))}
    sections = {key.partition('.')[0] for key in keys if '.' in key}
    text = page.read_text()
    named = set(re.findall(r'\bconfig\.([a-z_]+(?:\.[a-z_]+)*)', text))
    named |= {
        key
        for key in re.findall(r'`([a-z]+\.[a-z_]+)[`=]', text)
        if key.partition('.')[0] in sections - {'model'}  # metadata have one too
    }
    named -= {'py', 'json', 'unlocked', 'error', 'error.power'}  # the fork has these
    left_out = re.compile(r'model\.kwargs|.*\.(py|txt)$')  # any model's; files
    named = {key for key in named if not left_out.match(key)}
    assert named <= keys | sections


# --- docs/troubleshooting.md ------------------------------------------------------


@functools.cache
def texts():
    """Every text of the package, a NUL where something is filled in."""
    found = []
    for path in (ROOT / 'vit_jax').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(part, 'value', '\0') for part in node.values]
                found.append(''.join(p if isinstance(p, str) else '\0' for p in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r'%[.\d]*[dfs]', '\0', node.value))
    return found


def is_ours(message):
    """Whether the package says it, with something in the place of each '...'."""
    parts = filter(None, re.split(r'\.\.\.(?!\.)', message))
    pattern = re.compile('.*\0.*'.join(map(re.escape, parts)), re.DOTALL)
    return any(pattern.search(text) for text in texts())


def test_messages_are_told_apart():
    assert is_ours('no batch for ... s, still waiting; ...')
    assert is_ours('config.... is set to ..., but this run does not read it')
    assert not is_ours('no batch for 300 s, still waiting')
    assert not is_ours('no bread for ... s, still waiting; ...')


def test_quoted_messages_are_those_of_the_package():
    quoted = [
        line
        for block in blocks('troubleshooting.md', 'text')
        for line in block.splitlines()
    ]
    assert quoted
    text = (ROOT / 'docs' / 'troubleshooting.md').read_text()
    for table in re.findall(r'^\| it says \|(?:.*\n)+?\n', text, re.MULTILINE):
        for row in table.splitlines()[2:]:
            quoted += re.findall(r'`(.+?)`', row.split(' | ')[0])
    wrong = [message for message in quoted if not is_ours(message)]
    assert not wrong


# --- docs/extending.md ------------------------------------------------------------


def test_what_extends_is_the_forks_own():
    """The fork is trained by its own tests."""
    sources = [path.read_text() for path in FORK.rglob('*.py')]
    shown = [b for b in blocks('extending.md', 'python') if not is_config(b)]
    assert len(shown) > 4
    for block in shown:
        if '): ...' not in block:  # which tells what functions take
            assert any(block in source for source in sources), block


def is_config(block):
    return block.startswith(('config.', 'with config.'))


CONFIGS = [block for block in blocks('extending.md', 'python') if is_config(block)]


@pytest.mark.parametrize('block', CONFIGS)
def test_what_extends_is_built(block, monkeypatch):
    monkeypatch.syspath_prepend(str(FORK))
    config = default_config()
    config.dataset.name = 'my_fork.data:stripes'
    config.model.name = 'ViT-Ti/2'
    config.batch_size = 8
    config.num_steps = 1
    if 'config.error' in block:
        config.task = 'my_fork.tasks'
    exec(block, {'config': config, 'ConfigDict': ConfigDict})
    if config.task == 'my_fork.tasks' and 'error' not in config:
        with config.unlocked():
            config.error = ConfigDict({'power': 2.0})
    run = build(config)
    assert run.batch_size == 8


# --- docs/reproducing.md ----------------------------------------------------------


def test_the_experiment_that_is_shown_runs(tmp_path, monkeypatch, capsys):
    (sweep,) = blocks('reproducing.md', 'python')
    folder = tmp_path / 'experiments' / 'width'
    folder.mkdir(parents=True)
    # Three steps of each cell; what it says is another matter.
    assert sweep.count("'configs/digits_vit.py'") == 1
    sweep = sweep.replace('digits_vit.py', 'digits_vit.py:smoke')
    (folder / 'sweep.py').write_text(sweep)
    monkeypatch.chdir(ROOT)
    words = [f'--experiments={folder.parent}', f'--workdir={tmp_path / "runs"}']
    data = f'--data_dir={tmp_path / "data"}'
    assert main(['reproduce', 'width/digits/32', *words, data, '--seed=0']) == 0
    assert re.fullmatch(
        r'\| width \| accuracy \|\n\| --- \| --- \|\n'
        r'\| 32 \| [\d.]+ \(1 seed\) \|\n\| 64 \| not run \|\n'
        r'\nWider is better: not run\n',
        capsys.readouterr().out,
    )
    assert main(['reproduce', 'width', *words, '--list']) == 0
    assert '| digits/32 | 1 of 3 seeds |' in capsys.readouterr().out
