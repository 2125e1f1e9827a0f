"""Downloads against a real server on this machine: whole, once, or not at all."""

import base64
import contextlib
import gzip
import hashlib
import http.server
import io
import json
import re
import shutil
import socket
import sys
import threading
import types
from unittest import mock

import pytest

from vit_jax.errors import UserError
from vit_jax.pretrained import download
from vit_jax.pretrained import fetch as fetching
from vit_jax.pretrained.fetch import cached_at, fetch, is_address, telling_cached

BODY = bytes(range(1, 251)) * 3  # 750 bytes, no two chunks alike
OTHER = BODY[::-1]


class Server(http.server.ThreadingHTTPServer):
    """Answers each path by a function of the request, and remembers what was asked."""

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.routes = {}
        self.asked = []
        self.address = f'http://127.0.0.1:{self.server_port}'
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # clients hang up in these tests

    def ranges(self):
        return [headers.get('Range') for _, _, headers in self.asked]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def do_GET(self):
        path = self.path.partition('?')[0]
        self.server.asked.append((self.command, path, dict(self.headers)))
        for prefix, answer in self.server.routes.items():
            if path.startswith(prefix):
                return answer(self)
        return reply(self, status=404)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


def reply(request, body=b'', status=200, cut=None, headers=None):
    """One answer; hangs up after `cut` bytes of the body."""
    request.send_response(status)
    for key, value in {'Content-Length': len(body), **(headers or {})}.items():
        if value is not None:  # None takes a header away
            request.send_header(key, str(value))
    request.end_headers()
    if request.command == 'GET':
        request.wfile.write(body[:cut])
    if cut is not None or (headers or {}).get('Content-Length', 0) is None:
        request.close_connection = True


def file(body, *cuts, tag='"1"', ranges=True, **headers):
    """A file whose first answers are cut off, after so many bytes each."""
    cuts = list(cuts)

    def answer(request):
        cut = cuts.pop(0) if cuts else None
        sent = {'ETag': tag, **{k.replace('_', '-'): v for k, v in headers.items()}}
        asked = re.fullmatch(r'bytes=(\d+)-', request.headers.get('Range', ''))
        same = request.headers.get('If-Range') in (tag, sent.get('Last-Modified'))
        if ranges and asked and same:
            start = int(asked[1])
            if start >= len(body):
                return reply(request, status=416)
            sent['Content-Range'] = f'bytes {start}-{len(body) - 1}/{len(body)}'
            return reply(request, body[start:], 206, cut, sent)
        return reply(request, body, 200, cut, sent)

    return answer


def statuses(*codes, then):
    codes = list(codes)
    return lambda request: (
        reply(request, status=codes.pop(0)) if codes else then(request)
    )


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(download, '_CHUNK', 16)
    monkeypatch.setattr(download, 'PAUSE', 0.01)
    monkeypatch.setattr(download, 'TIMEOUT', (5.0, 0.3))
    monkeypatch.setenv('VIT_JAX_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('NO_PROXY', '127.0.0.1,localhost')
    monkeypatch.delenv('VIT_JAX_OFFLINE', raising=False)
    return tmp_path / 'cache'


@pytest.fixture
def once():
    """A context in which nothing is tried twice."""
    return mock.patch.object(download, 'TRIES', 1)


def fails(name, *parts, **kwargs):
    """Expects one line of error with these parts."""
    with pytest.raises(UserError) as error:
        fetch(name, **kwargs)
    message = str(error.value)
    assert '\n' not in message
    for part in parts:
        assert str(part) in message, message
    return message


def closed_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def sha256(body):
    return hashlib.sha256(body).hexdigest()


def md5_header(body):
    digest = base64.b64encode(hashlib.md5(body).digest()).decode()
    return f'crc32c=AAAAAA==, md5={digest}'


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('hf:timm/vit', True),
        ('augreg:Ti_16', True),
        ('https://host/a.npz', True),
        ('HTTP://host/a.npz', True),
        ('AUGREG:Ti_16', True),
        ('gs://bucket/a.npz', True),
        ('s3://bucket/a.npz', True),
        ('FTP://host/a.npz', True),
        ('hf/timm', False),
        ('/tmp/https://a', False),
        ('C:/weights.npz', False),
        ('C://weights.npz', False),
        ('https:/a', False),
    ],
)
def test_what_is_an_address(name, expected):
    assert is_address(name) is expected


# The web.


def test_a_file_is_fetched_once(server, cache):
    server.routes['/a/w.npz'] = file(BODY)
    path = fetch(f'{server.address}/a/w.npz')
    assert path.read_bytes() == BODY
    assert path.parent == cache
    assert path.name.endswith('-w.npz')
    assert fetch(f'{server.address}/a/w.npz') == path
    ((_, _, headers),) = server.asked
    assert headers['Accept-Encoding'] == 'identity'  # else lengths and hashes differ
    assert {p.name for p in cache.iterdir()} <= {path.name, f'{path.name}.lock'}


def test_addresses_of_one_basename_do_not_mix(server):
    server.routes |= {'/a/w.npz': file(BODY), '/b/w.npz': file(OTHER)}
    one, two = (fetch(f'{server.address}/{folder}/w.npz') for folder in 'ab')
    query = fetch(f'{server.address}/b/w.npz?version=2')
    assert (one.read_bytes(), two.read_bytes()) == (BODY, OTHER)
    assert len({one, two, query}) == 3


@pytest.mark.parametrize('last', ['w.npz', '%2e%2e%2fw.npz', '', 'ü' * 300])
def test_the_name_in_the_cache_is_a_plain_one(server, cache, last):
    server.routes['/'] = file(BODY)
    path = fetch(f'{server.address}/x/{last}')
    assert path.parent == cache
    assert re.fullmatch(r'[0-9a-f]{16}-[\w.+-]{1,100}', path.name, re.ASCII)


def test_a_broken_download_goes_on_where_it_stopped(server):
    server.routes['/w'] = file(BODY, 320, 160)
    assert fetch(f'{server.address}/w').read_bytes() == BODY
    assert server.ranges() == [None, 'bytes=320-', 'bytes=480-']
    assert [headers.get('If-Range') for *_, headers in server.asked[1:]] == ['"1"'] * 2


def test_the_next_run_goes_on_too(server, cache, once):
    server.routes['/w'] = file(BODY, 320)
    with once:
        fails(f'{server.address}/w', f'{server.address}/w', 'try again')
    fails(f'{server.address}/w', 'not in the cache', offline=True)
    assert fetch(f'{server.address}/w').read_bytes() == BODY
    assert server.ranges() == [None, 'bytes=320-']
    assert len([p for p in cache.iterdir() if p.suffix != '.lock']) == 1


def test_every_bit_of_progress_earns_new_tries(server):
    server.routes['/w'] = file(BODY, *[64] * 10)
    assert fetch(f'{server.address}/w').read_bytes() == BODY
    assert len(server.asked) == 11 > download.TRIES


def test_a_server_that_knows_no_ranges_starts_anew(server):
    server.routes['/w'] = file(BODY, 320, ranges=False)
    assert fetch(f'{server.address}/w').read_bytes() == BODY
    assert server.ranges() == [None, 'bytes=320-']


def test_it_gives_up_when_nothing_grows(server, cache):
    server.routes['/w'] = file(BODY, *[320] * 20, ranges=False)
    fails(f'{server.address}/w', f'tried {download.TRIES} times')
    assert len(server.asked) == download.TRIES
    assert not [p for p in cache.iterdir() if p.name.endswith('-w')]


def test_a_file_that_changed_meanwhile_starts_anew(server, once):
    server.routes['/w'] = file(BODY, 320)
    with once:
        fails(f'{server.address}/w')
    server.routes['/w'] = file(OTHER, 160, tag='"2"')
    assert fetch(f'{server.address}/w').read_bytes() == OTHER
    assert server.ranges() == [None, 'bytes=320-', 'bytes=160-']
    assert server.asked[-1][2]['If-Range'] == '"2"'


def test_without_a_strong_tag_the_date_tells_versions(server):
    date = 'Sun, 01 Nov 2020 00:00:00 GMT'
    server.routes['/w'] = file(BODY, 320, tag='W/"1"', Last_Modified=date)
    assert fetch(f'{server.address}/w').read_bytes() == BODY
    assert server.ranges() == [None, 'bytes=320-']
    assert server.asked[-1][2]['If-Range'] == date


@pytest.mark.parametrize('tag', ['W/"1"', None])
def test_what_has_no_version_is_not_resumed(server, tag):
    server.routes['/w'] = file(BODY, 320, tag=tag)
    assert fetch(f'{server.address}/w').read_bytes() == BODY
    assert server.ranges() == [None, None]


def test_a_damaged_version_is_not_sent(server, cache, once):
    server.routes['/w'] = file(BODY, 320)
    with once:
        fails(f'{server.address}/w')
    (version,) = cache.glob('*.version')
    version.write_bytes(b'\0\xff\n')
    assert fetch(f'{server.address}/w').read_bytes() == BODY
    assert server.ranges() == [None, None]


@pytest.mark.parametrize('length', [100, 320])
def test_a_part_as_long_as_the_file_starts_anew(server, once, length):
    """The tag is the same against the rules, or the last run died before renaming."""
    server.routes['/w'] = file(BODY, 320)
    with once:
        fails(f'{server.address}/w')
    server.routes['/w'] = file(OTHER[:length])
    assert fetch(f'{server.address}/w').read_bytes() == OTHER[:length]
    assert server.ranges() == [None, 'bytes=320-', None]


@pytest.mark.parametrize('start', [240, 400])
def test_another_part_than_asked_is_not_taken(server, start):
    def wrong(request):
        extent = {'Content-Range': f'bytes {start}-749/750', 'ETag': '"1"'}
        return reply(request, BODY[start:], 206, headers=extent)

    answers = [file(BODY, 320), wrong, file(BODY)]
    server.routes['/w'] = lambda request: answers.pop(0)(request)
    assert fetch(f'{server.address}/w').read_bytes() == BODY
    assert server.ranges() == [None, 'bytes=320-', None]


def test_parts_may_be_smaller_than_asked(server):
    def some(request):
        start = int(re.search(r'\d+', request.headers['Range'])[0])
        end = min(start + 200, len(BODY))
        extent = {'Content-Range': f'bytes {start}-{end - 1}/{len(BODY)}'}
        return reply(request, BODY[start:end], 206, headers=extent)

    server.routes['/w'] = lambda request: (
        some(request) if len(server.asked) > 1 else file(BODY, 320)(request)
    )
    assert fetch(f'{server.address}/w').read_bytes() == BODY
    assert server.ranges() == [None, 'bytes=320-', 'bytes=520-', 'bytes=720-']


def test_a_server_that_does_not_answer_is_asked_again(server):
    go_on = threading.Event()
    server.routes['/w'] = lambda request: (
        go_on.wait(5) if len(server.asked) == 1 else file(BODY)(request)
    )
    assert fetch(f'{server.address}/w').read_bytes() == BODY
    go_on.set()
    assert len(server.asked) == 2


def test_a_stalled_server_is_asked_again(server):
    go_on = threading.Event()

    def answer(request):
        if len(server.asked) > 1:
            return file(BODY)(request)
        request.send_response(200)
        request.send_header('Content-Length', str(len(BODY)))
        request.send_header('ETag', '"1"')
        request.end_headers()
        request.wfile.write(BODY[:320])
        return go_on.wait(5)

    server.routes['/w'] = answer
    assert fetch(f'{server.address}/w').read_bytes() == BODY
    go_on.set()
    assert server.ranges() == [None, 'bytes=320-']


def test_a_slow_server_is_waited_for(server):
    def answer(request):
        request.send_response(200)
        request.send_header('Content-Length', str(len(BODY)))
        request.end_headers()
        for start in range(0, len(BODY), 150):  # 0.5 s in all, 0.1 s at a time
            threading.Event().wait(0.1)
            request.wfile.write(BODY[start : start + 150])

    server.routes['/w'] = answer
    assert fetch(f'{server.address}/w').read_bytes() == BODY
    assert len(server.asked) == 1


@pytest.mark.parametrize('cut', [None, 320])
def test_chunks_mark_their_end(server, cut):
    def answer(request):
        headers = {'Content-Length': None, 'Transfer-Encoding': 'chunked'}
        chunks = b''.join(b'a\r\n%b\r\n' % BODY[i : i + 10] for i in range(0, 750, 10))
        first = len(server.asked) == 1
        reply(
            request, chunks + b'0\r\n\r\n', cut=cut if first else None, headers=headers
        )

    server.routes['/w'] = answer
    assert fetch(f'{server.address}/w').read_bytes() == BODY
    assert len(server.asked) == (1 if cut is None else 2)


def test_an_answer_without_an_end_is_refused(server, cache):
    server.routes['/w'] = file(BODY, Content_Length=None)
    fails(f'{server.address}/w', f'{server.address}/w', '200 without the length')
    assert not [p for p in cache.iterdir() if p.suffix != '.lock']


@pytest.mark.parametrize('encoding', ['gzip', 'GZIP', 'deflate', 'identity, gzip'])
def test_a_packed_file_is_refused(server, cache, encoding):
    packed = gzip.compress(bytes(100_000))
    server.routes['/w'] = file(packed, Content_Encoding=encoding)
    fails(f'{server.address}/w', f'{server.address}/w', repr(encoding), 'by hand')
    assert len(server.asked) == 1
    assert not [p for p in cache.iterdir() if p.suffix != '.lock']


def test_a_file_that_says_it_is_not_packed(server):
    server.routes['/w'] = file(BODY, Content_Encoding='identity')
    assert fetch(f'{server.address}/w').read_bytes() == BODY


def in_chunks(body, **headers):
    headers = {k.replace('_', '-'): v for k, v in headers.items()}
    headers |= {'Transfer-Encoding': 'chunked'}
    chunks = b''.join(
        b'%x\r\n%b\r\n' % (len(part), part)
        for part in (body[i : i + 10] for i in range(0, len(body), 10))
    )
    return lambda request: reply(request, chunks + b'0\r\n\r\n', headers=headers)


@pytest.mark.parametrize('answer', [file(b''), in_chunks(b'', Content_Length=None)])
def test_an_empty_file_is_refused(server, cache, answer):
    server.routes['/w'] = answer
    fails(f'{server.address}/w', f'{server.address}/w is empty')
    assert not [p for p in cache.iterdir() if p.suffix != '.lock']
    server.routes['/w'] = file(BODY)
    assert fetch(f'{server.address}/w').read_bytes() == BODY


def test_no_more_than_announced_is_written(server, cache):
    # Chunks go before the length, which then is no limit to what comes.
    server.routes['/w'] = in_chunks(BODY, Content_Length=100)
    fails(f'{server.address}/w', 'sent more than all', f'tried {download.TRIES} times')
    assert not [p for p in cache.iterdir() if p.suffix != '.lock']


def test_a_part_that_is_too_long_starts_anew(server):
    def longer(request):
        headers = {'Content-Range': 'bytes 320-749/750', 'ETag': '"1"'}
        return reply(request, BODY, 206, headers=headers)

    answers = [file(BODY, 320), longer, file(BODY)]
    server.routes['/w'] = lambda request: answers.pop(0)(request)
    assert fetch(f'{server.address}/w').read_bytes() == BODY
    assert server.ranges() == [None, 'bytes=320-', None]


def packed_in_transfer(request):
    headers = {'Content-Length': None, 'Transfer-Encoding': 'gzip, chunked'}
    return reply(request, b'0\r\n\r\n', headers=headers)


def test_a_transfer_that_is_packed_is_refused(server):
    server.routes['/w'] = packed_in_transfer
    fails(f'{server.address}/w', 'answers 200 without the length')


@pytest.mark.parametrize(
    'code', ['#sha256=HEX', '#sha256=hex', 'name', 'short name', 'server']
)
@pytest.mark.parametrize('right', [True, False])
def test_hashes_are_checked(server, cache, code, right):
    held = BODY if right else OTHER
    digest = sha256(BODY)
    name = {'name': f'w-{digest}.pth', 'short name': f'w-{digest[:8]}.pth'}
    name = name.get(code, 'w.pth')
    headers = {'x_goog_hash': md5_header(BODY)} if code == 'server' else {}
    server.routes['/'] = file(held, 320, **headers)  # checked over both parts
    address = f'{server.address}/{name}'
    if code.startswith('#'):
        address += code.replace('HEX', digest.upper()).replace('hex', digest)
    if right:
        assert fetch(address).read_bytes() == BODY
    else:
        kind = 'md5' if code == 'server' else 'sha256'
        expected = hashlib.new(kind, BODY).hexdigest()
        found = hashlib.new(kind, OTHER).hexdigest()
        expected = expected[:8] if code == 'short name' else expected
        fails(address, f'{kind} {found}', f'should have {expected} by', 'removed')
        assert not [p for p in cache.iterdir() if p.suffix in ('.pth', '.part')]
        server.routes['/'] = file(BODY, **headers)
        assert fetch(address).read_bytes() == BODY


def test_a_hash_in_the_address_goes_before_one_in_the_name(server):
    server.routes['/'] = file(BODY)
    address = f'{server.address}/w-01234567.pth'
    fails(address, 'should have 01234567 by its name')
    assert fetch(f'{address}#sha256={sha256(BODY)}').read_bytes() == BODY


@pytest.mark.parametrize('name', ['w-20220131.pth', 'w-0123456.pth', 'w-01234567.npz'])
def test_what_looks_like_a_hash_and_is_none(server, name):
    server.routes['/'] = file(BODY)
    assert fetch(f'{server.address}/{name}').read_bytes() == BODY


def test_redirects_are_followed(server):
    def redirect(request):
        return reply(request, status=302, headers={'Location': '/there/x'})

    server.routes |= {'/w': redirect, '/there': file(BODY, 320)}
    assert fetch(f'{server.address}/w').read_bytes() == BODY
    assert server.ranges() == [None, None, 'bytes=320-', 'bytes=320-']


def test_redirects_that_are_not_secure_are_refused(server, cache):
    def redirect(request):
        return reply(request, status=301, headers={'Location': 'http://example.com/'})

    server.routes['/w'] = redirect
    fails(f'{server.address}/w', f'{server.address}/w leads to http://example.com/')
    server.routes['/w'] = lambda request: reply(
        request, status=301, headers={'Location': '/w'}
    )
    fails(f'{server.address}/w', '30 redirects')


@pytest.mark.parametrize(
    ('source', 'target', 'message'),
    [
        ('https://host/a', 'http://host/b', 'https://host/a leads to http://host/b'),
        ('https://host/a', 'http://localhost/b', 'leads to http://localhost/b'),
        ('https://host/a', 'file:///etc/passwd', 'is not the address of a file'),
        ('https://host/a', 'https://other/b', ''),
        ('http://localhost/a', 'https://other/b', ''),
        ('https://host/a', '/b', ''),
    ],
)
def test_a_secure_address_leads_to_none_that_is_not(source, target, message):
    response = types.SimpleNamespace(
        is_redirect=True, url=source, headers={'Location': target}
    )
    if not message:
        download._check_redirect(response)
        return
    with pytest.raises(UserError, match=message):
        download._check_redirect(response)


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('http://example.com/w', 'http://example.com/w is not secure.* https'),
        ('http://localhost.example.com/w', 'is not secure'),
        ('https:///w', 'not the address of a file'),
        ('https://[::1/w', 'not the address of a file'),
        ('ftp://host/w', "'ftp://host/w' is not supported.*https://"),
        ('s3://bucket/w', "'s3://bucket/w' is not supported.*https://"),
        (
            'GS://a/b/w#x',
            r"'GS://a/b/w#x' is not supported.* 'https://storage.googleapis.com/a/b/w#x'",
        ),
        ('gs://a\nb', 'not supported'),
        ('gs:/a', 'not the address of a file'),
        ('https://host:port/w', 'cannot fetch https://host:port/w: .*port'),
        ('https://host/w#sha256=012', 'what follows # should be sha256= and 64'),
        ('https://host/w#md5=0', 'follows # should be sha256='),
        ('augreg:', "'augreg:' should be augreg:NAME"),
        ('augreg:../x', 'should be augreg:NAME'),
    ],
)
def test_addresses_that_are_refused(name, message):
    assert re.search(message, fails(name))


@pytest.mark.parametrize(
    ('status', 'message'),
    [(404, '404 Not Found'), (403, '403 Forbidden'), (204, 'answers 204 without')],
)
def test_a_refusal_is_final(server, status, message):
    server.routes['/w'] = lambda request: reply(request, status=status)
    fails(f'{server.address}/w', f'{server.address}/w', message)
    assert len(server.asked) == 1


def test_a_server_in_trouble_is_asked_again(server):
    server.routes['/w'] = statuses(500, 503, 429, then=file(BODY))
    assert fetch(f'{server.address}/w').read_bytes() == BODY
    server.asked.clear()
    server.routes['/x'] = lambda request: reply(request, status=502)
    fails(f'{server.address}/x', '502 Bad Gateway', 'tried 4 times')
    assert len(server.asked) == 4


def test_a_web_page_is_no_file(server):
    server.routes['/w'] = file(BODY, Content_Type='text/html; charset=utf-8')
    fails(f'{server.address}/w', 'is a web page')


def test_offline_takes_what_is_there(server, cache, monkeypatch):
    server.routes['/'] = file(BODY)
    path = fetch(f'{server.address}/here')
    monkeypatch.setenv('VIT_JAX_OFFLINE', '1')
    assert fetch(f'{server.address}/here') == path
    message = fails(f'{server.address}/not', 'offline', f'{server.address}/not')
    there = re.search(r'put the file at (\S+),', message)[1]
    with open(there, 'wb') as copy:
        copy.write(OTHER)
    assert fetch(f'{server.address}/not').read_bytes() == OTHER
    assert len(server.asked) == 1
    assert fetch(f'{server.address}/other', offline=False).read_bytes() == BODY


@pytest.mark.parametrize('value', ['', '0', 'false', 'No'])
def test_the_offline_switch_off(server, monkeypatch, value):
    monkeypatch.setenv('VIT_JAX_OFFLINE', value)
    server.routes['/'] = file(BODY)
    assert fetch(f'{server.address}/w').read_bytes() == BODY
    fails(f'{server.address}/x', 'offline', offline=True)


def test_two_at_once_fetch_once(server, cache, capsys):
    asked, go_on = threading.Event(), threading.Event()

    def answer(request):
        asked.set()
        go_on.wait(5)
        file(BODY)(request)

    server.routes['/w'] = answer
    paths = []
    both = [
        threading.Thread(target=lambda: paths.append(fetch(f'{server.address}/w')))
        for _ in range(2)
    ]
    with mock.patch.object(download, 'TIMEOUT', (5.0, 5.0)):
        both[0].start()
        assert asked.wait(5)
        both[1].start()
        while 'waiting for another' not in capsys.readouterr().err:
            both[1].join(0.01)
            assert both[1].is_alive()
        go_on.set()
        for thread in both:
            thread.join(5)
    assert len(server.asked) == 1
    assert len(paths) == 2
    assert len(set(paths)) == 1
    assert paths[0].read_bytes() == BODY


def test_no_network(cache):
    address = f'http://localhost:{closed_port()}/w'
    fails(address, address, 'Connection refused', cache, 'VIT_JAX_OFFLINE=1')


def test_a_name_that_no_server_has(monkeypatch):
    def unknown(*args, **kwargs):
        raise socket.gaierror(-2, 'Name or service not known')

    monkeypatch.setattr(socket, 'getaddrinfo', unknown)
    fails('https://host.invalid/w', 'https://host.invalid/w (Name or service not known')


def test_a_cache_that_cannot_be_written(server, cache):
    cache.write_text('a file')
    server.routes['/w'] = file(BODY)
    fails(f'{server.address}/w', f'cannot keep {server.address}/w in {cache}')


def test_a_full_disk(server, monkeypatch):
    def full(descriptor):
        raise OSError(28, 'No space left on device')

    server.routes['/w'] = file(BODY)
    with monkeypatch.context() as patch:
        patch.setattr(download.os, 'fsync', full)
        fails(f'{server.address}/w', 'No space left on device', 'VIT_JAX_CACHE')
        fails(f'{server.address}/w', 'not in the cache', offline=True)
    assert fetch(f'{server.address}/w').read_bytes() == BODY


@pytest.fixture
def disk(monkeypatch):
    """Sets how many bytes are free, one value for each time it is asked."""

    def free(*counts):
        counts = list(counts)
        monkeypatch.setattr(
            shutil,
            'disk_usage',
            lambda _: types.SimpleNamespace(
                free=counts.pop(0) if len(counts) > 1 else counts[0]
            ),
        )

    return free


def test_a_file_that_does_not_fit_is_not_begun(server, cache, disk):
    disk(len(BODY) - 1)
    server.routes['/w'] = file(BODY)
    fails(f'{server.address}/w', '(750B) does not fit', cache, '749B', 'VIT_JAX_CACHE')
    assert not [p for p in cache.iterdir() if p.suffix != '.lock']
    disk(len(BODY))
    assert fetch(f'{server.address}/w').read_bytes() == BODY


@pytest.mark.parametrize('tag', ['"1"', '"2"'])  # resumed, or in place of the part
def test_what_is_missing_has_to_fit(server, cache, disk, once, tag):
    server.routes['/w'] = file(BODY, 320)
    with once:
        fails(f'{server.address}/w')
    server.routes['/w'] = file(BODY, tag=tag)
    disk(len(BODY) - 321)
    fails(f'{server.address}/w', 'does not fit')
    disk(len(BODY) - 320)
    assert fetch(f'{server.address}/w').read_bytes() == BODY


def test_a_file_without_an_end_leaves_room(server, cache, disk, monkeypatch):
    monkeypatch.setattr(download, '_RESERVE', 100)
    server.routes['/w'] = in_chunks(BODY, Content_Length=None)
    disk(*range(130, 0, -10))
    fails(f'{server.address}/w', '(of unknown size) does not fit', '90.0B are free')
    assert len(server.asked) == 1
    assert not [p for p in cache.iterdir() if p.suffix != '.lock']
    disk(100)
    assert fetch(f'{server.address}/w').read_bytes() == BODY


def test_an_error_about_a_fetched_file_says_what_to_delete(server, cache, tmp_path):
    server.routes['/w'] = file(BODY)
    path = fetch(f'{server.address}/w')
    with pytest.raises(UserError) as error, telling_cached(path):
        raise UserError('w is damaged')
    assert str(error.value) == (
        f'w is damaged (it is in the cache; to fetch it again, delete {path})'
    )
    with pytest.raises(UserError, match=r'^w is damaged$'), telling_cached(tmp_path):
        raise UserError('w is damaged')
    cached_at(path).unlink()
    fetch(f'{server.address}/w')
    assert len(server.asked) == 2
    assert cached_at(cache) is None


def test_a_cache_may_be_a_relative_path(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('VIT_JAX_CACHE', 'here')
    server.routes['/w'] = file(BODY)
    path = fetch(f'{server.address}/w')
    assert cached_at(path) == tmp_path / path
    assert cached_at(path.absolute()) == tmp_path / path


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    assert fetching._cache_folder() == tmp_path / 'cache'
    monkeypatch.setenv('VIT_JAX_CACHE', '~/weights')
    assert fetching._cache_folder() == tmp_path / 'home/weights'
    monkeypatch.delenv('VIT_JAX_CACHE')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
    assert fetching._cache_folder() == tmp_path / 'xdg/vit_jax'
    monkeypatch.delenv('XDG_CACHE_HOME')
    assert fetching._cache_folder() == tmp_path / 'home/.cache/vit_jax'


def test_augreg_is_short_for_an_address(server, monkeypatch):
    assert fetching._AUGREG.startswith('https://storage.googleapis.com/vit_models/')
    server.routes['/augreg/R_Ti_16-i1k--lr_0.03.npz'] = file(BODY)
    monkeypatch.setattr(fetching, '_AUGREG', server.address + '/augreg/{}.npz')
    path = fetch('augreg:R_Ti_16-i1k--lr_0.03')
    assert path.read_bytes() == BODY
    assert fetch('augreg:R_Ti_16-i1k--lr_0.03.npz') == path
    assert fetch('AUGREG:R_Ti_16-i1k--lr_0.03') == path
    fails('augreg:other', '404 Not Found')


def test_lines_on_stderr_nothing_on_stdout(server, capsys):
    server.routes['/w'] = file(BODY, 320)
    fetch(f'{server.address}/w')
    out, err = capsys.readouterr()
    assert out == ''
    first, second, third = err.splitlines()
    assert first.startswith(f'downloading {server.address}/w (750B) to ')
    assert second.endswith('trying again')
    assert third == f'resuming {server.address}/w (750B) after 320B'
    fetch(f'{server.address}/w')
    assert capsys.readouterr() == ('', '')


def test_a_bar_on_a_terminal(server, capsys, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, 'stderr', terminal)
    server.routes['/w'] = file(BODY, 320)
    fetch(f'{server.address}/w.npz')
    assert re.search(r'w\.npz: 100%.* 750/750', terminal.getvalue())
    assert terminal.getvalue().count('320/750') == 2  # where it broke, and went on
    assert 'downloading' not in terminal.getvalue()
    assert capsys.readouterr().out == ''


# The Hugging Face Hub.

CONFIG = b'{"architecture": "vit"}'
INDEX = json.dumps({'weight_map': {'a': 's-1', 'b': 's-2', 'c': 's-1'}}).encode()


class Hub:
    """Repositories as the Hub serves them: {repository: {revision: files}}."""

    def __init__(self, server):
        self.repos = {}
        self.refused = {}  # repository -> X-Error-Code
        self.server = server
        server.routes['/'] = self.answer

    def answer(self, request):
        match = re.fullmatch(r'/(\w+/\w+)/resolve/([^/]+)/(.+)', request.path)
        repo, revision, file = match.groups()
        revisions = self.repos.get(repo, {})
        commits = {commit_of(files): files for files in revisions.values()}
        files = commits.get(revision, revisions.get(revision))
        code = self.refused.get(repo)
        if repo not in self.repos:
            code = 'RepoNotFound'
        elif files is None:
            code = 'RevisionNotFound'
        headers = {'X-Repo-Commit': commit_of(files or {}), 'Connection': 'close'}
        if not code and file not in files:
            code = 'EntryNotFound'
        if code:
            status = 403 if code == 'GatedRepo' else 404
            return reply(
                request, status=status, headers={**headers, 'X-Error-Code': code}
            )
        headers['ETag'] = f'"{sha256(files[file])}"'
        return reply(request, files[file], headers=headers)


def commit_of(files):
    return hashlib.sha1(repr(files).encode()).hexdigest()


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(constants, 'ENDPOINT', server.address)
    template = server.address + '/{repo_id}/resolve/{revision}/{filename}'
    for place in (constants, file_download):  # the latter in its first versions
        monkeypatch.setattr(
            place, 'HUGGINGFACE_CO_URL_TEMPLATE', template, raising=False
        )
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.setattr('time.sleep', lambda seconds: None)  # between its own tries
    return Hub(server)


def held(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ('there', 'taken'),
    [
        ('config.json model.safetensors pytorch_model.bin README', 2),
        ('config.json model.safetensors.index.json s-1 s-2 s-3 pytorch_model.bin', 4),
        ('config.json pytorch_model.bin README', 2),
        ('pytorch_model.bin.index.json s-1 s-2', 3),
        ('model.safetensors', 1),
    ],
)
def test_a_repository_gives_its_best_weights(hub, there, taken):
    names = there.split()
    files = {name: INDEX if 'index' in name else name.encode() for name in names}
    hub.repos['org/vit'] = {'main': files}
    folder = fetch('hf:org/vit')
    assert held(folder) == {name: files[name] for name in names[:taken]}
    assert fetch('hf:org/vit', offline=True) == folder


def test_a_file_of_a_repository(hub):
    hub.repos['org/vit'] = {'main': {'a/w.npz': BODY}, 'v1': {'a/w.npz': OTHER}}
    path = fetch('hf:org/vit/a/w.npz')
    assert path.parts[-2:] == ('a', 'w.npz')
    assert path.read_bytes() == BODY
    assert fetch('hf:org/vit/a/w.npz@v1').read_bytes() == OTHER
    assert {path[-7:] for _, path, _ in hub.server.asked} == {'a/w.npz'}
    commit = commit_of({'a/w.npz': OTHER})
    assert fetch(f'HF:org/vit/a/w.npz@{commit}').read_bytes() == OTHER


@pytest.mark.parametrize('name', ['hf:org/vit', 'hf:org/vit/model.safetensors'])
def test_what_to_delete_of_a_repository(hub, tmp_path, name):
    hub.repos['org/vit'] = {'main': {'model.safetensors': BODY}}
    hub.repos['org/other'] = {'main': {'model.safetensors': OTHER}}
    other = fetch('hf:org/other')
    kept = cached_at(fetch(name))
    assert kept == tmp_path / 'hub/models--org--vit'
    shutil.rmtree(kept)
    fails(name, 'offline', offline=True)
    assert held(other) == {'model.safetensors': OTHER}


def test_an_index_brings_what_it_names(hub):
    files = {'a/x.index.json': INDEX, 'a/s-1': BODY, 'a/s-2': OTHER}
    hub.repos['org/vit'] = {'main': files}
    path = fetch('hf:org/vit/a/x.index.json')
    assert held(path.parent) == {'x.index.json': INDEX, 's-1': BODY, 's-2': OTHER}
    del files['a/s-2']
    fails('hf:org/vit/a/x.index.json', 'has no a/s-2')


@pytest.mark.parametrize('index', [b'{', b'[]', b'{}', b'{"weight_map": [1]}'])
def test_an_index_that_is_none(hub, index):
    hub.repos['org/vit'] = {'main': {'model.safetensors.index.json': index}}
    fails('hf:org/vit', 'model.safetensors.index.json is no index of weights')


def test_an_index_does_not_reach_out(hub, tmp_path):
    index = b'{"weight_map": {"a": "../../../../../x"}}'
    hub.repos['org/vit'] = {'main': {'model.safetensors.index.json': index}}
    fails('hf:org/vit', '../../x')
    assert not list(tmp_path.rglob('x'))


def test_a_branch_may_move_on_meanwhile(hub):
    old = {'config.json': b'old', 'model.safetensors': BODY}
    new = {'config.json': b'new', 'model.safetensors': OTHER}
    hub.repos['org/vit'] = {'main': old, 'before': old}
    answer = hub.answer

    def moves(request):
        answer(request)
        if request.command == 'GET':
            hub.repos['org/vit']['main'] = new

    hub.server.routes['/'] = moves
    assert held(fetch('hf:org/vit')) == old
    assert held(fetch('hf:org/vit')) == new
    assert held(fetch('hf:org/vit', offline=True)) == new


def test_a_broken_download_from_the_hub_is_made_whole(hub):
    hub.repos['org/vit'] = {'main': {'w.npz': BODY}}
    whole, cut = hub.answer, file(BODY, 320)
    hub.server.routes['/'] = lambda request: (
        whole(request) if request.command == 'HEAD' else cut(request)
    )
    with contextlib.suppress(UserError):  # its first versions do not try again
        assert fetch('hf:org/vit/w.npz').read_bytes() == BODY
    assert fetch('hf:org/vit/w.npz').read_bytes() == BODY


@pytest.mark.parametrize(
    ('name', 'parts'),
    [
        ('hf:org/other', ['hf:org/other: http', 'no such repository', 'HF_TOKEN']),
        ('hf:org/gated', ['hf:org/gated is gated', '/org/gated, and log in']),
        ('hf:org/vit@v9', ["hf:org/vit has no revision 'v9'"]),
        (
            'hf:org/vit',
            ['hf:org/vit has no model.safetensors or ', 'pytorch_model.bin'],
        ),
        ('hf:org/vit/w.npz', ['hf:org/vit has no w.npz']),
        ('hf:org', ["'hf:org' is not of the form hf:OWNER/REPO[/FILE][@REVISION]"]),
        ('hf:org/vit@a@b', ['is not of the form']),
        ('hf:org/vit--', ['cannot fetch model.safetensors of hf:org/vit--: ']),
    ],
)
def test_what_the_hub_does_not_give(hub, name, parts):
    hub.repos |= {'org/vit': {'main': {}}, 'org/gated': {'main': {}}}
    hub.refused['org/gated'] = 'GatedRepo'
    fails(name, *parts)


def test_the_hub_offline(hub, tmp_path):
    hub.repos['org/vit'] = {'main': {'model.safetensors': BODY}}
    switch = 'without VIT_JAX_OFFLINE'
    fails('hf:org/vit', 'offline, and', tmp_path / 'hub', switch, offline=True)
    assert not hub.server.asked


def test_the_switch_of_the_hub_itself(hub, monkeypatch):
    from huggingface_hub import constants

    hub.repos['org/vit'] = {'main': {'model.safetensors': BODY}}
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    fails('hf:org/vit', 'offline mode is enabled')
    assert not hub.server.asked


def test_the_hub_without_a_network(hub, tmp_path, capsys, caplog):
    hub.repos['org/vit'] = {'main': {'pytorch_model.bin': BODY}}
    folder = fetch('hf:org/vit')
    hub.server.shutdown()
    hub.server.server_close()
    capsys.readouterr()
    fails('hf:org/x', 'no way to http://127', 'refused', tmp_path / 'hub')
    assert capsys.readouterr().err.count('looking for') == 1  # which takes a while
    assert caplog.records == []  # the hub keeps its retries to itself
    assert fetch('hf:org/vit') == folder
