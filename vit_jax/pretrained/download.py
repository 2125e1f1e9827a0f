"""One file of the web, resumed where a connection broke, checked before it counts."""

import base64
import hashlib
import os
import pathlib
import re
import shutil
import sys
import time
import urllib.parse
from typing import Any

import tqdm

from vit_jax.errors import UserError, root_reason

TIMEOUT = (10.0, 30.0)  # seconds: to connect, and without a byte
TRIES = 4  # in a row without progress
PAUSE = 1.0  # seconds before the second try; doubled before each further one

_CHUNK = 1 << 18  # bytes; as many are lost when a connection breaks
_RESERVE = 1 << 28  # bytes of the disk that a file of unknown size leaves free


def download(url: str, path: pathlib.Path, sha256: str = '', source: str = '') -> None:
    """Downloads `url` to `path`, by way of `path`.part, which outlives an interruption.

    Args:
      sha256: the digits that the file should have, from none to all.
      source: who says so.

    Raises:
      UserError: when the file cannot be had, or is not what it should be.
      OSError: when it cannot be kept.
    """
    part = path.with_name(f'{path.name}.part')
    md5 = _complete(url, part)
    _check_hash(url, part, 'sha256', sha256, source)
    _check_hash(url, part, 'md5', md5, 'its server')
    os.replace(part, path)
    _version_file(part).unlink(missing_ok=True)


def check_secure(url: str, before: str = '') -> None:
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
        check_secure(target, before=response.url)


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


def _complete(url: str, part: pathlib.Path) -> str:
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
            why = root_reason(error)
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
        log(f'{url}: {why}; trying again')
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
            log(f'resuming {url} ({_bytes(total)}) after {_bytes(start)}')
        else:
            log(f'downloading {url} ({_bytes(total)}) to {part.parent}')
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


def log(message: str) -> None:
    """Where there is no bar; never on stdout, which belongs to results."""
    if not sys.stderr.isatty():
        print(message, file=sys.stderr, flush=True)
