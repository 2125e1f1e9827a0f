"""The folder of a run: what it is, and that it is not another one's."""

import contextlib
import importlib.metadata
import json
import logging
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import filelock
import jax

from vit_jax.config import RESUMABLE, default_config, flatten
from vit_jax.errors import UserError

log = logging.getLogger(__name__)

_PACKAGES = ('vit_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain')


@contextlib.contextmanager
def open_workdir(
    path: pathlib.Path, config: dict[str, Any], allow_changes: bool = False
) -> Iterator[None]:
    """Makes the folder, or checks that it holds a run of the same config.

    No other run may use the folder while this one does.

    Args:
      path: the workdir.
      config: the resolved config.
      allow_changes: whether the config may differ from the one that is held; the
        differences are then told.

    Raises:
      UserError: when the folder cannot be written, is in use, or holds another run.
    """
    config = json.loads(json.dumps(config))
    with contextlib.ExitStack() as stack:
        try:
            path.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                stack.enter_context(filelock.FileLock(path / '.lock', timeout=0))
            held = read_config(path)
            if any((path / 'checkpoints').glob('*')):  # something to protect
                if held is None:
                    raise UserError(
                        f'{path} holds results but no config.json; choose another '
                        '--workdir'
                    )
                _check_same(path, held, config, allow_changes)
        except filelock.Timeout as error:
            raise UserError(
                f'another run uses {path}; wait for its end, or choose another '
                '--workdir'
            ) from error
        except OSError as error:
            raise UserError(
                f'cannot write to workdir {path}: {error.strerror}'
            ) from error
        yield


def write_launch(path: pathlib.Path, config: dict[str, Any]) -> None:
    """Writes `config.json` (resolved), and a line of `launches.jsonl`: time, command,
    versions, devices. To be called when it is known that the run can go on.
    """
    if jax.process_index() != 0:
        return
    temporary = path / 'config.tmp'
    temporary.write_text(json.dumps(config, indent=2) + '\n')
    os.replace(temporary, path / 'config.json')
    with (path / 'launches.jsonl').open('a') as file:
        file.write(json.dumps(_environment()) + '\n')


def read_config(path: pathlib.Path) -> dict[str, Any] | None:
    """The config of the run that a folder holds; None where it holds none.

    Raises:
      UserError: when the file is damaged.
    """
    file = path / 'config.json'
    if not file.exists():
        return None
    try:
        config = json.loads(file.read_text())
    except ValueError as error:  # no JSON, or no text
        raise UserError(f'{file} is damaged: {error}') from error
    if not isinstance(config, dict):
        raise UserError(f'{file} is damaged: it holds no config')
    return config


def _check_same(
    path: pathlib.Path, held: dict, config: dict, allow_changes: bool
) -> None:
    # A key that the run was begun without has done nothing there.
    defaults = json.loads(json.dumps(default_config(config['task']).to_dict()))
    # An empty group, such as model.kwargs, is one that others fill.
    known = {key: value for key, value in flatten(defaults) if value != {}}
    there, here = known | dict(flatten(held)), dict(flatten(config))
    differing = [
        f'config.{key} is {there.get(key)!r} there and {here.get(key)!r} here'
        for key in sorted(there | here)
        if key not in RESUMABLE and there.get(key) != here.get(key)
    ]
    if differing and not allow_changes:
        raise UserError(
            f'{path} holds another run: {"; ".join(differing)}. Choose another '
            '--workdir, or go on with the changes by --allow_changes'
        )
    for line in differing:
        log.warning('changed: %s', line)


def _environment() -> dict[str, Any]:
    return {
        'time': time.strftime('%Y-%m-%dT%H:%M:%S%z'),
        'command': sys.argv,
        'python': sys.version.split()[0],
        'versions': {name: _version(name) for name in _PACKAGES},
        'devices': [str(device.device_kind) for device in jax.devices()],
        'processes': jax.process_count(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path
        return None
