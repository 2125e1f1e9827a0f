"""Who may import whom: the levels of the package, lowest first."""

import ast
import graphlib
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LEVELS = (
    'typing config errors axes sharding forks hardware cluster',
    'layers data losses metrics frechet averaging writer param_groups optim state',
    'models checkpoint stored workdir pretrained modules parallel decode task_data '
    'image_data translation text_data frozen',
    'update tasks feed features generation',
    'build',
    'train evaluate export benchmark sown maps sequence_maps pictures report summary '
    'sequence_pictures experiment results reproduce jobs interrupt recent telemetry '
    'slices topology largest_batch probes processes costs',
    'commands',
    'main',
)
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names.split()}
HEAVY = {'tensorflow', 'torch'}  # imported where they are needed, in functions
OUTSIDE = {'configs', 'experiments', 'tests'}


def find_imports(source, module, names):
    """(module-level imports, all imports) of a source file, as dotted names.

    Args:
      source: Python text.
      module: its dotted name, for relative imports.
      names: the modules of the package, to tell `from a import module` from
        `from a import function`.
    """

    def dotted(node):
        if isinstance(node, ast.Import):
            return {alias.name for alias in node.names}
        base = node.module or ''
        if node.level:
            parts = module.split('.')[: -node.level]
            base = '.'.join([*parts, base] if base else parts)
        found = {f'{base}.{alias.name}' for alias in node.names}
        return {name if name in names else base for name in found}

    tree = ast.parse(source)
    lazy = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lazy.update(ast.walk(node))
    top, every = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            every |= dotted(node)
            if node not in lazy:
                top |= dotted(node)
    return top, every


def read_package(root):
    """The text of each module of `root`/vit_jax by its dotted name."""
    sources = {}
    for path in sorted((root / 'vit_jax').rglob('*.py')):
        parts = path.relative_to(root).with_suffix('').parts
        if parts[-1] == '__init__':
            parts = (*parts[:-1], '__init__')
        sources['.'.join(parts)] = path.read_text()
    return sources


def check_package(sources):
    """What the modules do that they may not: one line each."""
    names = {name.removesuffix('.__init__') for name in sources}
    faults, graph = [], {}
    for module, source in sources.items():
        top, every = find_imports(source, module, names)
        name = module.removesuffix('.__init__')
        graph[name] = {other for other in every if other in names and other != name}
        for other in every:
            if other.split('.')[0] in OUTSIDE:
                faults.append(f'{name} imports {other}, which is outside')
        for other in top:
            if other.split('.')[0] in HEAVY:
                faults.append(f'{name} imports {other} at module level')
        if name == 'vit_jax':  # re-exports from any level
            continue
        level = level_of(name)
        if level is None:
            faults.append(f'{name} has no level: add it to LEVELS in test_levels.py')
            continue
        for other in graph[name]:
            if other == 'vit_jax':
                faults.append(
                    f'{name} imports the top of the package, which imports it'
                )
            elif (level_of(other) or 0) > level:
                faults.append(f'{name} imports {other}, which is of a higher level')
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        faults.append(f'imports in a circle: {" <- ".join(error.args[1])}')
    return sorted(faults)


def level_of(name):
    return LEVEL.get(name.split('.')[1])


def test_package_keeps_its_levels():
    faults = check_package(read_package(ROOT))
    assert not faults, '\n'.join(faults)


def test_configs_import_only_the_config_module():
    allowed = {'vit_jax.config', 'ml_collections', '__future__'}
    for path in sorted((ROOT / 'configs').rglob('*.py')):
        _, every = find_imports(path.read_text(), path.stem, {'vit_jax.config'})
        wrong = {
            name
            for name in every - allowed
            if name.split('.')[0] not in sys.stdlib_module_names
        }
        assert not wrong, f'{path.name} imports {sorted(wrong)}'


@pytest.mark.parametrize(
    ('module', 'source', 'fault'),
    [
        ('layers.a', 'from vit_jax.models import vit', 'models.* higher level'),
        ('layers.a', 'import vit_jax.models.vit', 'models.vit.* higher level'),
        ('layers.a', 'def f():\n    from vit_jax import models', 'models.* higher'),
        ('layers.a', 'from ..models import vit', 'models.vit.* higher level'),
        ('models.vit', 'from vit_jax.layers import a', ''),
        ('tasks.a', 'from vit_jax.typing import Array', ''),
        ('typing', 'from vit_jax import build_model', 'the top of the package'),
        ('new', 'import jax', 'vit_jax.new has no level: add it to LEVELS'),
        ('layers.a', 'from vit_jax.layers import b', 'in a circle'),
        ('layers.a', 'import configs.digits', 'configs.digits, which is outside'),
        ('tasks.a', 'def f():\n    from experiments import x', 'which is outside'),
        ('data.a', 'import tensorflow as tf', 'tensorflow at module level'),
        ('data.a', 'if x:\n    from torch import nn', 'torch at module level'),
        ('data.a', 'def f():\n    import torch', ''),
        ('data.a', 'class A:\n    import torch', 'torch at module level'),
    ],
)
def test_faults_are_found(module, source, fault):
    sources = {
        'vit_jax.__init__': 'from vit_jax.models import build_model',
        'vit_jax.layers.__init__': '',
        'vit_jax.layers.a': '',
        'vit_jax.layers.b': 'from . import a',
        'vit_jax.models.__init__': 'from vit_jax.models.vit import ViT',
        'vit_jax.models.vit': '',
        'vit_jax.typing': '',
    }
    assert check_package(sources) == []
    faults = check_package({**sources, f'vit_jax.{module}': source})
    if not fault:
        assert faults == []
    else:
        assert any(re.search(fault, line) for line in faults), faults
