"""Weights by name, 'hf:…', 'augreg:…' or 'https://…' -> a local path, cached.

Files of the web are kept in `$VIT_JAX_CACHE` (~/.cache/vit_jax where it is not set),
those of the Hugging Face Hub in its own cache. A broken download is resumed; nothing
counts as fetched before it is complete and checked.
"""

import base64
import contextlib
import hashlib
import json
import os
import pathlib
import posixpath
import re
import shutil
import sys
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

import tqdm

from vit_jax.errors import UserError, reason

TIMEOUT = (10.0, 30.0)  # seconds: to connect, and without a byte
TRIES = 4  # in a row without progress
PAUSE = 1.0  # seconds before the second try; doubled before each further one

# The weights of "How to train your ViT?" (arXiv 2106.10270), where its authors are.
_AUGREG = 'https://storage.googleapis.com/vit_models/augreg/{}.npz'
# How torch.hub names files: the first digits of the sha256. But not '-20220131.pth'.
_HASH_IN_NAME = re.compile(r'-(?!(?:19|20)\d{6}\.)([0-9a-f]{8,64})\.pth$')
_CHUNK = 1 << 18  # bytes; as many are lost when a connection breaks
_RESERVE = 1 << 28  # bytes of the disk that a file of unknown size leaves free

_HUB_NAME = re.compile(r'hf:([\w.-]+/[\w.-]+)(?:/([^@]+))?(?:@([^@\s]+))?', re.I)
# The weights of a repository, the best first; an index names the files beside it.
_HUB_WEIGHTS = (
    'model.safetensors',
    'model.safetensors.index.json',
    'pytorch_model.bin',
    'pytorch_model.bin.index.json',
)


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
        return _fetch_hub(name, offline)
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


# The web.


def _fetch_web(address: str, offline: bool) -> pathlib.Path:
    url, _, fragment = address.partition('#')
    _check_secure(url)
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
                part = path.with_name(f'{path.name}.part')
                md5 = _download(url, part)
                _check_hash(url, part, 'sha256', sha256, source)
                _check_hash(url, part, 'md5', md5, 'its server')
                os.replace(part, path)
                _version_file(part).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f'cannot keep {url} in {path.parent}: {error.strerror or error}; set '
            'VIT_JAX_CACHE to another folder'
        ) from error
    return path


def _check_secure(url: str, before: str = '') -> None:
    """Refuses addresses whose answers others could change on the way."""
    try:
        parts = urllib.parse.urlsplit(url)
        local = parts.hostname in ('localhost', '127.0.0.1', '::1')
    except ValueError:
        raise UserError(f'{url!r} is not the address of a file') from None
    if parts.scheme not in ('http', 'https') or not parts.hostname:
        raise UserError(f'{url!r} is not the address of a file')
    if parts.scheme == 'http' and (before.startswith('https:') or not local):
        found = f'{before} leads to {url}, which' if before else url
        raise UserError(f'{found} is not secure; it should be https')


def _check_redirect(response: Any, **_: Any) -> None:
    if response.is_redirect:
        target = urllib.parse.urljoin(response.url, response.headers['Location'])
        _check_secure(target, before=response.url)


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
        _log(f'waiting for another process that fetches {url}')
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _check_hash(
    url: str, part: pathlib.Path, kind: str, expected: str, source: str
) -> None:
    """Compares the digits that are expected, from none to all."""
    if not expected:
        return
    with part.open('rb') as file:
        found = hashlib.file_digest(file, kind).hexdigest()
    if not found.startswith(expected):
        _remove(part)
        raise UserError(
            f'{url} has the {kind} {found}, and should have {expected} by {source}; '
            'the file is damaged or another one, and was removed'
        )


def _download(url: str, part: pathlib.Path) -> str:
    """Completes `part`, in as many requests as it takes.

    Returns:
      The md5 that the server tells; '' where it tells none.
    """
    import requests

    broken = (
        requests.ConnectionError,
        requests.Timeout,
        requests.exceptions.ChunkedEncodingError,
    )
    most = failures = 0
    while True:
        try:
            return _receive(url, part)
        except requests.RequestException as error:
            why = _reason(error)
            if not isinstance(error, broken):
                raise UserError(f'cannot fetch {url}: {why}') from error
            size = _size(part)
            failures = 1 if size > most else failures + 1
            most = max(most, size)
            if failures == TRIES:
                raise UserError(
                    f'cannot fetch {url} ({why}; tried {TRIES} times): try again '
                    f'later, or, where there is no network, put the file at '
                    f'{part.with_suffix("")}; VIT_JAX_OFFLINE=1 takes only such files'
                ) from error
        _log(f'{url}: {why}; trying again')
        time.sleep(PAUSE * 2 ** (failures - 1))


def _receive(url: str, part: pathlib.Path) -> str:
    """One request, for what `part` lacks.

    Raises:
      requests.RequestException: with `part` as far as it came.
    """
    import requests

    version = _read_version(part)
    have = _size(part) if version else 0
    headers = {'Accept-Encoding': 'identity'}  # the bytes and the length of the file
    if have:
        headers |= {'Range': f'bytes={have}-', 'If-Range': version}
    with requests.get(
        url,
        headers=headers,
        stream=True,
        timeout=TIMEOUT,
        hooks={'response': _check_redirect},
    ) as response:
        status = f'{response.status_code} {response.reason}'
        if response.status_code in (408, 429) or response.status_code >= 500:
            raise requests.ConnectionError(f'its server answers {status}')
        if have and response.status_code == 416:
            _remove(part)
            raise requests.ConnectionError('it has no such part any more')
        if not response.ok:
            raise UserError(f'cannot fetch {url}: its server answers {status}')
        start, total = _extent(url, response)
        if start not in (0, have):
            _remove(part)
            raise requests.ConnectionError('its server sent another part than asked')
        _check_space(url, part, None if total is None else total - _size(part))
        if start:
            _log(f'resuming {url} ({_bytes(total)}) after {_bytes(start)}')
        else:
            _log(f'downloading {url} ({_bytes(total)}) to {part.parent}')
            part.write_bytes(b'')  # first: what is empty is of no other version
            _version_file(part).write_text(_version(response.headers))
        with (
            part.open('ab') as file,
            tqdm.tqdm(
                desc=part.stem.partition('-')[2],
                initial=start,
                total=total,
                unit='B',
                unit_scale=True,
                file=sys.stderr,
                disable=not sys.stderr.isatty(),
            ) as bar,
        ):
            for chunk in response.iter_content(_CHUNK):
                if total is None:
                    _check_space(url, part, None)
                elif file.tell() + len(chunk) > total:
                    _remove(part)
                    raise requests.ConnectionError('its server sent more than all')
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())  # its final name must not outlive its content
        if total is not None and _size(part) != total:
            raise requests.ConnectionError('the connection was closed early')
        if not _size(part):
            _remove(part)
            raise UserError(f'{url} is empty; it should be the address of the file')
        # Google's storage: 'crc32c=n03x6A==, md5=Ojk9c3dhfxgoKVVHYwFbHQ=='.
        md5 = re.search(r'md5=([\w+/]{22}==)', response.headers.get('x-goog-hash', ''))
        return base64.b64decode(md5[1]).hex() if md5 else ''


def _extent(url: str, response: Any) -> tuple[int, int | None]:
    """Where the bytes of an answer start in the file, and how many the file has.

    The number is None where the answer itself marks its end.
    """
    headers = response.headers
    if headers.get('Content-Type', '').startswith('text/html'):
        raise UserError(f'{url} is a web page; it should be the address of the file')
    encoding = headers.get('Content-Encoding', '')
    if encoding.lower() not in ('', 'identity'):
        raise UserError(
            f'{url}: its server answers with the file packed ({encoding[:80]!r}), of '
            'which neither the size nor the hash is that of the file; download it by '
            'hand'
        )
    if response.status_code == 206:
        extent = re.match(r'bytes (\d+)-\d+/(\d+)$', headers.get('Content-Range', ''))
        if extent:
            return int(extent[1]), int(extent[2])
    elif response.status_code == 200:
        length = headers.get('Content-Length', '')
        if length.isdecimal():
            return 0, int(length)
        if headers.get('Transfer-Encoding', '').lower() == 'chunked':
            return 0, None
    raise UserError(
        f'{url}: its server answers {response.status_code} without the length of the '
        'file, so that a part could pass for the whole; download it by hand'
    )


def _check_space(url: str, part: pathlib.Path, needed: int | None) -> None:
    """Refuses to fill the disk, before it is full."""
    free = shutil.disk_usage(part.parent).free
    if free >= (_RESERVE if needed is None else needed):
        return
    if needed is None:  # there may be no end to it
        _remove(part)
    raise UserError(
        f'{url} ({_bytes(needed)}) does not fit in {part.parent}, where '
        f'{_bytes(free)} are free; make room, or set VIT_JAX_CACHE to another folder'
    )


def _remove(part: pathlib.Path) -> None:
    part.unlink(missing_ok=True)
    _version_file(part).unlink(missing_ok=True)


def _version_file(part: pathlib.Path) -> pathlib.Path:
    """The file that says of which version of its address `part` is."""
    return part.with_suffix('.version')


def _read_version(part: pathlib.Path) -> str:
    file = _version_file(part)
    version = file.read_text(errors='replace') if file.exists() else ''
    return version if version.isascii() and version.isprintable() else ''


def _version(headers: Any) -> str:
    """What If-Range takes; '' when the server gives nothing to tell versions by."""
    tag = headers.get('ETag', '')
    return tag if tag.startswith('"') else headers.get('Last-Modified', '')


def _size(path: pathlib.Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _bytes(count: int | None) -> str:
    """A number of bytes for people.

    >>> _bytes(346_300_000)
    '346MB'
    """
    if count is None:
        return 'of unknown size'
    return tqdm.tqdm.format_sizeof(count, 'B')


def _log(message: str) -> None:
    """Where there is no bar; never on stdout, which belongs to results."""
    if not sys.stderr.isatty():
        print(message, file=sys.stderr, flush=True)


def _reason(error: BaseException) -> str:
    """What lies at the bottom of an error, in one line."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return reason(error)


# The Hugging Face Hub.


class _NotThere(UserError):
    """The repository lacks the file."""


class _NotHere(UserError):
    """The cache lacks the file, and the Hub cannot be asked."""


def _fetch_hub(name: str, offline: bool) -> pathlib.Path:
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
            _log(f'looking for {file} of {where} at {constants.ENDPOINT}')
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
        why, right = f'no way to {constants.ENDPOINT} ({_reason(error)})', ''
        if offline:
            why, right = 'offline', ' and without VIT_JAX_OFFLINE'
        raise _NotHere(
            f'{why}, and {file} of {where} is not in {constants.HF_HUB_CACHE}: fetch '
            f'it once with a network{right}'
        ) from error
    except errors.EntryNotFoundError as error:
        raise _NotThere(f'{where} has no {file}') from error
    except Exception as error:  # also of its HTTP library, which is not always the same
        raise UserError(f'cannot fetch {file} of {where}: {_reason(error)}') from error


def _read_shards(index: pathlib.Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_bytes())['weight_map'].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f'{index} is no index of weights: {_reason(error)}') from error
