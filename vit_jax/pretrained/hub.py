"""Weights of the Hugging Face Hub, in its own cache."""

import contextlib
import json
import pathlib
import posixpath
import re

from vit_jax.errors import UserError, root_reason
from vit_jax.pretrained.download import log

_HUB_NAME = re.compile(r'hf:([\w.-]+/[\w.-]+)(?:/([^@]+))?(?:@([^@\s]+))?', re.I)
# The weights of a repository, the best first; an index names the files beside it.
_HUB_WEIGHTS = (
    'model.safetensors',
    'model.safetensors.index.json',
    'pytorch_model.bin',
    'pytorch_model.bin.index.json',
)


class _NotThere(UserError):
    """The repository lacks the file."""


class _NotHere(UserError):
    """The cache lacks the file, and the Hub cannot be asked."""


def fetch_hub(name: str, offline: bool) -> pathlib.Path:
    """'hf:OWNER/REPO[/FILE][@REVISION]' -> the file, or the folder of a repository.

    Raises:
      UserError: when it cannot be had.
    """
    match = _HUB_NAME.fullmatch(name)
    if not match:
        raise UserError(f'{name!r} is not of the form hf:OWNER/REPO[/FILE][@REVISION]')
    repo, named, revision = match.groups()
    files = (named,) if named else _HUB_WEIGHTS
    not_here = None
    for file in files:
        try:
            weights = _get(repo, file, revision, offline)
            break
        except _NotThere:
            continue
        except _NotHere as error:  # but the cache may hold another one
            not_here, offline = not_here or error, True
    else:
        raise not_here or _NotThere(f'hf:{repo} has no {" or ".join(files)}')

    # The rest is of the same commit, though the branch may move on meanwhile.
    commit = weights.parents[file.count('/')].name
    if not named:
        with contextlib.suppress(_NotThere, _NotHere):  # some have none
            _get(repo, 'config.json', commit, offline)
    if file.endswith('.index.json'):
        for shard in _read_shards(weights):
            _get(repo, posixpath.join(posixpath.dirname(file), shard), commit, offline)
    return weights if named else weights.parent


def _get(repo: str, file: str, revision: str | None, offline: bool) -> pathlib.Path:
    """One file, from the cache of `huggingface_hub` or through it."""
    import huggingface_hub as hub
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # what goes wrong is told in our own line
    where = f'hf:{repo}' + (f'@{revision}' if revision else '')
    login = "log in with 'hf auth login' or HF_TOKEN"
    try:
        cached = hub.try_to_load_from_cache(repo, file, revision=revision)
        if not offline and not isinstance(cached, str):
            log(f'looking for {file} of {where} at {constants.ENDPOINT}')
        return pathlib.Path(
            hub.hf_hub_download(repo, file, revision=revision, local_files_only=offline)
        )
    except errors.GatedRepoError as error:
        raise UserError(
            f'{where} is gated: ask for access at {constants.ENDPOINT}/{repo}, and '
            f'{login}'
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f'{where}: {constants.ENDPOINT} has no such repository, or it is private; '
            f'then {login}'
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f'hf:{repo} has no revision {revision!r}') from error
    except errors.LocalEntryNotFoundError as error:
        why, right = f'no way to {constants.ENDPOINT} ({root_reason(error)})', ''
        if offline:
            why, right = 'offline', ' and without VIT_JAX_OFFLINE'
        raise _NotHere(
            f'{why}, and {file} of {where} is not in {constants.HF_HUB_CACHE}: fetch '
            f'it once with a network{right}'
        ) from error
    except errors.EntryNotFoundError as error:
        raise _NotThere(f'{where} has no {file}') from error
    except Exception as error:  # also of its HTTP library, which is not always the same
        raise UserError(
            f'cannot fetch {file} of {where}: {root_reason(error)}'
        ) from error


def _read_shards(index: pathlib.Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_bytes())['weight_map'].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f'{index} is no index of weights: {root_reason(error)}'
        ) from error
