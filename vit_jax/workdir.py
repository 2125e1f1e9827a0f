"""The folder of a run: what it is, and that it is not another one's."""

import importlib.metadata
import json
import os
import pathlib
import sys
import time
from typing import Any

import jax

from vit_jax.config import RESUMABLE, flatten
from vit_jax.errors import UserError

_PACKAGES = ('vit_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain')


def open_workdir(path: pathlib.Path, config: dict[str, Any]) -> None:
    """Makes the folder, or checks that it holds a run of the same config.

    Writes `config.json` (resolved) and appends to `launches.jsonl` (time, command,
    versions, devices).

    Args:
      path: the workdir.
      config: the resolved config.

    Raises:
      UserError: when the folder cannot be written or holds another run.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        config = json.loads(json.dumps(config))
        held = _read_config(path)
        if any((path / 'checkpoints').glob('*')):  # something to protect
            if held is None:
                raise UserError(
                    f'{path} holds results but no config.json; choose another --workdir'
                )
            _check_same(path, held, config)
        if jax.process_index() == 0:
            temporary = path / 'config.tmp'
            temporary.write_text(json.dumps(config, indent=2) + '\n')
            os.replace(temporary, path / 'config.json')
            with (path / 'launches.jsonl').open('a') as file:
                file.write(json.dumps(_environment()) + '\n')
    except OSError as error:
        raise UserError(f'cannot write to workdir {path}: {error.strerror}') from error


def _read_config(path: pathlib.Path) -> dict[str, Any] | None:
    file = path / 'config.json'
    if not file.exists():
        return None
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f'{file} is damaged: {error}') from error
    if not isinstance(config, dict):
        raise UserError(f'{file} is damaged: it holds no config')
    return config


def _check_same(path: pathlib.Path, held: dict, config: dict) -> None:
    there, here = dict(flatten(held)), dict(flatten(config))
    for key in sorted(there | here):
        if key not in RESUMABLE and there.get(key) != here.get(key):
            raise UserError(
                f'{path} holds another run: config.{key} is {there.get(key)!r} there '
                f'and {here.get(key)!r} here; choose another --workdir'
            )


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
