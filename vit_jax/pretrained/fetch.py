"""Weights by name, 'hf:…', 'augreg:…' or 'https://…' -> a local path, cached.

Files of the web are kept in `$VIT_JAX_CACHE` (~/.cache/vit_jax where it is not set),
those of the Hugging Face Hub in its own cache. A broken download is resumed; nothing
counts as fetched before it is complete and checked.
"""

import contextlib
import hashlib
import os
import pathlib
import posixpath
import re
import urllib.parse
from collections.abc import Iterator

from vit_jax.errors import UserError
from vit_jax.pretrained.download import check_secure, download, log
from vit_jax.pretrained.hub import fetch_hub

# The weights of "How to train your ViT?" (arXiv 2106.10270), where its authors are.
_AUGREG = 'https://storage.googleapis.com/vit_models/augreg/{}.npz'
# How torch.hub names files: the first digits of the sha256. But not '-20220131.pth'.
_HASH_IN_NAME = re.compile(r'-(?!(?:19|20)\d{6}\.)([0-9a-f]{8,64})\.pth$')


def is_address(name: str) -> bool:
    """Whether `name` says where to fetch weights, and is no local path.

    >>> is_address('hf:timm/convit_tiny.fb_in1k'), is_address('weights/vit.npz')
    (True, False)

    Also of addresses that `fetch` refuses, such as 's3://bucket/vit.npz'.
    """
    return re.match(r'(hf|augreg):|[a-z][a-z0-9+.-]+://', name, re.I) is not None


def fetch(name: str, *, offline: bool | None = None) -> pathlib.Path:
    """Fetches weights, unless they are here already.

    Args:
      name: one of
        'https://host/path/file', optionally with '#sha256=HEX' behind it. Else the
        hash in a name like 'resnet50-0676ba61.pth' is checked, as torch.hub does.
        An address stands for its content: what is in the cache is not asked for
        again. Plain http only from this very machine.
        'augreg:NAME', short for Google's storage of "How to train your ViT?".
        'hf:OWNER/REPO[/FILE][@REVISION]', by `huggingface_hub` and its variables
        (HF_ENDPOINT, HF_TOKEN, HF_HUB_CACHE, HF_HUB_OFFLINE). Without FILE: the
        config and the weights, with all their shards.
      offline: take only what is here; None asks the variable VIT_JAX_OFFLINE.

    Returns:
      The path of the file; of the folder for a repository of the Hub without FILE.

    Raises:
      UserError: when it cannot be had, or is not what it should be.
    """
    if offline is None:
        switch = os.environ.get('VIT_JAX_OFFLINE', '')
        offline = switch.lower() not in ('', '0', 'false', 'no', 'off')
    kind, _, rest = name.partition(':')
    if kind.lower() == 'hf':
        return fetch_hub(name, offline)
    if kind.lower() == 'augreg':
        rest = rest.removesuffix('.npz')
        if not re.fullmatch(r'[\w.+-]+', rest):
            raise UserError(f'{name!r} should be augreg:NAME, with the name of a file')
        return _fetch_web(_AUGREG.format(rest), offline)
    if kind.lower() == 'gs' and rest.startswith('//'):
        right = f'https://storage.googleapis.com/{rest[2:]}'
        raise UserError(f'{name!r} is not supported; it should be {right!r}')
    if kind.lower() not in ('http', 'https') and rest.startswith('//'):
        raise UserError(
            f'{name!r} is not supported; it should be an address of https://, hf: or '
            'augreg:, or the path of a file'
        )
    return _fetch_web(name, offline)


def cached_at(path: pathlib.Path) -> pathlib.Path | None:
    """What to delete so that `fetch` asks for `path` again.

    Returns:
      None for what was not fetched.
    """
    from huggingface_hub import constants

    path = pathlib.Path(os.path.abspath(path))
    if pathlib.Path(os.path.abspath(_cache_folder())) in path.parents:
        return path
    hub = pathlib.Path(os.path.abspath(constants.HF_HUB_CACHE))
    if hub in path.parents:  # links to files that are elsewhere in the repository
        return hub / path.relative_to(hub).parts[0]
    return None


@contextlib.contextmanager
def telling_cached(path: pathlib.Path) -> Iterator[None]:
    """Adds to an error about a file of the cache how to have it fetched again."""
    try:
        yield
    except UserError as error:
        kept = cached_at(path)
        if kept is None:
            raise
        raise UserError(
            f'{error} (it is in the cache; to fetch it again, delete {kept})'
        ) from error


def _fetch_web(address: str, offline: bool) -> pathlib.Path:
    url, _, fragment = address.partition('#')
    check_secure(url)
    basename = posixpath.basename(urllib.parse.urlsplit(url).path)
    in_name = _HASH_IN_NAME.search(basename)
    if fragment:
        if not re.fullmatch(r'sha256=[0-9a-f]{64}', fragment, re.I):
            raise UserError(
                f'{address}: what follows # should be sha256= and 64 hexadecimal digits'
            )
        sha256, source = fragment[7:].lower(), 'the address'
    else:
        sha256, source = in_name[1] if in_name else '', 'its name'

    # Different models share a basename: the name in the cache is of the whole address.
    digest = hashlib.sha256(address.encode()).hexdigest()[:16]
    readable = re.sub(r'[^\w.+-]', '_', basename, flags=re.ASCII)[-100:]
    path = _cache_folder() / f'{digest}-{readable or "file"}'
    if path.is_file():
        return path
    if offline:
        raise UserError(
            f'offline, and {url} is not in the cache: put the file at {path}, or '
            'fetch it once with a network and without VIT_JAX_OFFLINE'
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path, url):
            if not path.is_file():  # another process may have been faster
                download(url, path, sha256, source)
    except OSError as error:
        raise UserError(
            f'cannot keep {url} in {path.parent}: {error.strerror or error}; set '
            'VIT_JAX_CACHE to another folder'
        ) from error
    return path


def _cache_folder() -> pathlib.Path:
    caches = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
    folder = os.environ.get('VIT_JAX_CACHE') or os.path.join(caches, 'vit_jax')
    return pathlib.Path(folder).expanduser()


@contextlib.contextmanager
def _lock(path: pathlib.Path, url: str) -> Iterator[None]:
    """Lets one process at a time fetch `path`."""
    import filelock

    lock = filelock.FileLock(f'{path}.lock')
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log(f'waiting for another process that fetches {url}')
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
