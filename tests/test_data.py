"The register, downloads from a local server, checksums."
import errno
import hashlib
import http.server
import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import mdtraj as md
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import foldbook.data as fd
from foldbook.data import DataSet, File
from foldbook.frames import stream_frames
from test_frames import trajectory

ROOT = Path(__file__).parents[1]
PAYLOAD = bytes(range(256))*40


def sha(b): return 'sha256:' + hashlib.sha256(b).hexdigest()


@dataclass
class Answer:
    "What the server of these tests says to one path."
    body: bytes
    promised: int|None = None  # Content-Length, if it lies
    etag: str|None = None
    modified: str|None = None
    ranges: bool = True        # whether it knows ranges
    cut: int|None = None       # bytes of this answer after which it hangs up
    part: str|None = None      # Content-Range, if it lies
    stall: float = 0           # seconds of silence after `cut`


class Server:
    "A web server whose answers a test sets: ranges, If-Range, lies, and connections that break."
    def __init__(self):
        self.files, self.hits, self.asked = {}, [], []
        self.http = http.server.ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (Handler,), dict(test=self)))
        self.url = f'http://127.0.0.1:{self.http.server_port}'
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.test.hits.append(self.path)
        self.test.asked.append((self.headers.get('Range'), self.headers.get('If-Range')))
        a = self.test.files.get(self.path)
        if a is None: return self.send_error(404)
        a = Answer(*a) if isinstance(a, tuple) else a
        wanted, version = self.test.asked[-1]
        start = int(wanted[6:-1]) if wanted and a.ranges and version in (None, a.etag, a.modified) else None
        if start is not None and start >= len(a.body): return self.send_error(416)
        self.send_response(200 if start is None else 206)
        rest = a.body[start or 0:]
        for key, value in dict(ETag=a.etag).items() | {('Last-Modified', a.modified)}:
            if value: self.send_header(key, value)
        if start is not None:
            self.send_header('Content-Range', a.part or f'bytes {start}-{len(a.body) - 1}/{len(a.body)}')
        self.send_header('Content-Length', str(a.promised or len(rest)))
        self.end_headers()
        self.wfile.write(rest[:a.cut])
        self.wfile.flush()
        time.sleep(a.stall)

    def log_message(self, *_): pass


@pytest.fixture
def web():
    s = Server()
    yield s
    s.http.shutdown()


@pytest.fixture
def server(web): return web.url, web.files, web.hits


def entry(url, name='frames.npz', checksum=None, **kw):
    return DataSet('toy', 'downloaded', 'a fixture', (File(name, checksum, url=f'{url}/{name}'),), **kw)


def leftovers(cache): return sorted(p.name for p in cache.rglob('*') if p.is_file())


def test_download_once(server, tmp_path):
    url, files, hits = server
    files['/frames.npz'] = PAYLOAD, None
    d = entry(url, checksum=sha(PAYLOAD))
    for _ in range(2): assert (fd.fetch(d, False, tmp_path).directory/'frames.npz').read_bytes() == PAYLOAD
    assert hits == ['/frames.npz']


@pytest.mark.parametrize('body, promised, checksum, error', [
    (PAYLOAD, None, sha(b'other'), ValueError),            # another version on the server
    (PAYLOAD[:5000], len(PAYLOAD), sha(PAYLOAD), OSError),  # connection lost in the middle
    (None, None, None, ConnectionError)])                  # 404
def test_bad_download_leaves_nothing(server, tmp_path, body, promised, checksum, error):
    url, files, _ = server
    if body: files['/frames.npz'] = body, promised
    with pytest.raises((error, ValueError) if promised else error) as e:
        fd.fetch(entry(url, checksum=checksum), False, tmp_path)
    assert f'{url}/frames.npz' in str(e.value) and str(tmp_path/'toy'/'frames.npz') in str(e.value)
    assert leftovers(tmp_path) == []


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, len(PAYLOAD) - 1), min_size=1, max_size=4), st.booleans(), st.booleans())
def test_break_anywhere_goes_on_to_the_same_file(tmp_path_factory, cuts, published, dated):
    "However often and wherever the line breaks: each request asks for the rest, and nothing is sent twice."
    cache, web, n = tmp_path_factory.mktemp('cuts'), Server(), 0
    version = dict(modified='Tue, 01 Jan 2030 00:00:00 GMT') if dated else dict(etag='"v1"')
    d = entry(web.url, checksum=sha(PAYLOAD) if published else None)
    expected = []
    for cut in [*cuts, None]:
        expected.append((f'bytes={n}-', next(iter(version.values()))) if n else (None, None))
        sent = None if cut is None else min(cut, len(PAYLOAD) - n - 1)
        web.files['/frames.npz'] = Answer(PAYLOAD, cut=sent, **version)
        if sent is None: break
        n += sent
        with pytest.raises(ConnectionError, match='calling this again goes on' if n else 'cannot download'):
            fd.fetch(d, False, cache)
        assert (cache/'toy'/'frames.npz.download').read_bytes() == PAYLOAD[:n]
        assert not (cache/'toy'/'frames.npz').exists()
    assert (fd.fetch(d, False, cache).directory/'frames.npz').read_bytes() == PAYLOAD
    assert web.asked == expected
    assert leftovers(cache) == ['frames.npz'] + ['frames.npz.sha256']*(not published)
    web.http.shutdown()


def interrupted(web, tmp_path, **kw):
    "A download that broke after 4000 bytes."
    d = entry(web.url, checksum=kw.pop('checksum', None))
    web.files['/frames.npz'] = Answer(PAYLOAD, cut=4000, **{'etag': '"v1"', **kw})
    with pytest.raises(ConnectionError) as e: fd.fetch(d, False, tmp_path)
    return d, str(e.value)


def test_message_says_how_much_is_kept(web, tmp_path):
    _, message = interrupted(web, tmp_path)
    assert '4,000 bytes are kept: calling this again goes on' in message and f'{web.url}/frames.npz' in message
    assert leftovers(tmp_path) == ['frames.npz.download', 'frames.npz.download.tag']


def test_server_without_ranges_is_asked_again(web, tmp_path):
    d, _ = interrupted(web, tmp_path)
    web.files['/frames.npz'] = Answer(PAYLOAD, etag='"v1"', ranges=False)
    assert (fd.fetch(d, False, tmp_path).directory/'frames.npz').read_bytes() == PAYLOAD
    assert web.asked[1] == ('bytes=4000-', '"v1"')


def test_changed_file_starts_anew(web, tmp_path):
    d, _ = interrupted(web, tmp_path)
    other = PAYLOAD[::-1]
    web.files['/frames.npz'] = Answer(other, etag='"v2"')
    assert (fd.fetch(d, False, tmp_path).directory/'frames.npz').read_bytes() == other
    assert web.asked[1] == ('bytes=4000-', '"v1"')


def test_weak_etag_is_no_proof(web, tmp_path):
    d, _ = interrupted(web, tmp_path, etag='W/"v1"', modified='Tue, 01 Jan 2030 00:00:00 GMT')
    web.files['/frames.npz'].cut = None
    fd.fetch(d, False, tmp_path)
    assert web.asked[1] == ('bytes=4000-', 'Tue, 01 Jan 2030 00:00:00 GMT')


def test_server_without_versions_keeps_nothing(web, tmp_path):
    d, message = interrupted(web, tmp_path, etag=None)
    assert leftovers(tmp_path) == [] and 'kept' not in message
    web.files['/frames.npz'].cut = None
    fd.fetch(d, False, tmp_path)
    assert web.asked == [(None, None)]*2


@pytest.mark.parametrize('size', [len(PAYLOAD), len(PAYLOAD) + 5])
def test_nothing_left_to_send_starts_anew(web, tmp_path, size):
    "The process died between the last byte and the renaming, or the unfinished file is too long."
    d, _ = interrupted(web, tmp_path)
    (tmp_path/'toy'/'frames.npz.download').write_bytes(b'x'*size)
    web.files['/frames.npz'].cut = None
    assert (fd.fetch(d, False, tmp_path).directory/'frames.npz').read_bytes() == PAYLOAD
    assert [a for a, _ in web.asked] == [None, f'bytes={size}-', None]


@pytest.mark.parametrize('part, why', [('bytes 5000-10239/10240', 'only 4000 are here'),
                                       ('nonsense', 'does not say which')])
def test_lying_server_is_caught(web, tmp_path, part, why):
    d, _ = interrupted(web, tmp_path)
    web.files['/frames.npz'] = Answer(PAYLOAD, etag='"v1"', part=part)
    with pytest.raises(ConnectionError, match=why): fd.fetch(d, False, tmp_path)
    assert not (tmp_path/'toy'/'frames.npz').exists()


def test_total_may_be_unknown(web, tmp_path):
    d, _ = interrupted(web, tmp_path)
    web.files['/frames.npz'] = Answer(PAYLOAD, etag='"v1"', part='bytes 4000-10239/*')
    assert (fd.fetch(d, False, tmp_path).directory/'frames.npz').read_bytes() == PAYLOAD


def test_wrong_checksum_after_resuming_leaves_nothing(web, tmp_path):
    d, _ = interrupted(web, tmp_path, checksum=sha(b'other'))
    web.files['/frames.npz'].cut = None
    with pytest.raises(ValueError, match='has not the checksum.*nothing of it is kept'): fd.fetch(d, False, tmp_path)
    assert leftovers(tmp_path) == []


def test_missing_file_says_404(web, tmp_path):
    with pytest.raises(ConnectionError, match='404 Not Found'): fd.fetch(entry(web.url), False, tmp_path)
    assert leftovers(tmp_path) == []


FETCH = ("import sys; from foldbook.data import *; f = File('frames.npz', None, None, sys.argv[1] + '/frames.npz'); "
         "fetch(DataSet('toy', 'downloaded', '', (f,)), False, sys.argv[2])")


def test_killed_download_goes_on(web, tmp_path):
    web.files['/frames.npz'] = Answer(PAYLOAD, etag='"v1"', cut=4000, stall=20)
    p = subprocess.Popen([sys.executable, '-c', FETCH, web.url, str(tmp_path)])
    partial = tmp_path/'toy'/'frames.npz.download'
    for _ in range(600):
        if partial.exists() and partial.stat().st_size: break
        time.sleep(0.1)
    p.send_signal(signal.SIGKILL)
    p.wait()
    kept = partial.stat().st_size
    web.files['/frames.npz'] = Answer(PAYLOAD, etag='"v1"')
    assert (fd.fetch(entry(web.url), False, tmp_path).directory/'frames.npz').read_bytes() == PAYLOAD
    assert web.asked[1] == (f'bytes={kept}-', '"v1"') if kept else web.asked[1][0] is None


@pytest.mark.skipif(os.name == 'nt', reason='no locks')
def test_two_downloads_at_once_take_turns(web, tmp_path):
    web.files['/frames.npz'] = Answer(PAYLOAD, etag='"v1"', stall=1)
    both = [subprocess.Popen([sys.executable, '-c', FETCH, web.url, str(tmp_path)]) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0]
    assert web.hits == ['/frames.npz'] and leftovers(tmp_path) == ['frames.npz', 'frames.npz.sha256']


@pytest.mark.parametrize('code', ['ENOSPC', 'EDQUOT', 'EFBIG'])
@pytest.mark.parametrize('where', ['_append', '_unpack_archive', '_remember'])
def test_full_disk_is_one_sentence(web, tmp_path, monkeypatch, code, where):
    def full(*_): raise OSError(getattr(errno, code), 'full')
    monkeypatch.setattr(fd, where, full)
    name = 'a.zip' if where == '_unpack_archive' else 'frames.npz'
    web.files[f'/{name}'] = Answer(PAYLOAD, etag='"v1"')
    with pytest.raises(OSError, match='no space left in .*toy.*FOLDBOOK_CACHE.*call this again') as e:
        fd.fetch(entry(web.url, name), False, tmp_path)
    assert e.value.errno == getattr(errno, code)


@pytest.mark.skipif(os.name == 'nt', reason='no limits')
def test_real_limit_on_file_size(web, tmp_path):
    web.files['/frames.npz'] = Answer(PAYLOAD, etag='"v1"')
    code = 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); ' + FETCH
    p = subprocess.run([sys.executable, '-B', '-c', code, web.url, str(tmp_path)], capture_output=True, text=True)
    assert p.returncode == 1 and 'no space left in' in p.stderr.splitlines()[-1]
    assert (fd.fetch(entry(web.url), False, tmp_path).directory/'frames.npz').read_bytes() == PAYLOAD
    assert web.asked[-1][0] == 'bytes=4096-'


def test_files_without_checksum_are_remembered(web, tmp_path):
    web.files['/frames.npz'] = Answer(PAYLOAD)
    d = entry(web.url)
    path = fd.fetch(d, False, tmp_path).directory/'frames.npz'
    assert (tmp_path/'toy'/'frames.npz.sha256').read_text() == f'{sha(PAYLOAD)[7:]}  frames.npz\n'
    fd.fetch(d, False, tmp_path)
    path.write_bytes(PAYLOAD[:-1])
    with pytest.raises(ValueError, match='frames.npz was changed or damaged'): fd.fetch(d, False, tmp_path)
    path.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fd.fetch(d, False, tmp_path)
    path.unlink()
    web.files['/frames.npz'] = Answer(b'a new version')
    with pytest.warns(UserWarning, match='another version'): fd.fetch(d, False, tmp_path)
    assert len(web.hits) == 3 and fd.fetch(d, False, tmp_path)


def test_progress_bar_begins_where_it_stopped(web, tmp_path, capsys):
    d, _ = interrupted(web, tmp_path)
    web.files['/frames.npz'].cut = None
    fd.fetch(d, True, tmp_path)
    shown = capsys.readouterr().err
    assert 'frames.npz' in shown and '39%' in shown and '100%' in shown


@pytest.mark.parametrize('licence, noisy', [('CC-BY-NC 4.0', True), ('agreement: no redistribution', True),
    ('non-commercial research', True), ('CC-BY 4.0', False), ('CC0 1.0', False)])
def test_restricting_licence_announces_itself(web, tmp_path, licence, noisy):
    web.files['/frames.npz'] = Answer(PAYLOAD)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('ignore')
        warnings.simplefilter('always', fd.LicenceNotice)
        fd.fetch(entry(web.url, licence=licence), False, tmp_path)
    assert [licence in str(w.message) and '\n' not in str(w.message) and w.filename == __file__
            for w in seen] == [True]*noisy


def test_majewski_is_complete():
    proteins = 'chignolin trpcage bba villin wwdomain ntl9 bbl proteinb homeodomain proteing a3d lambda'.split()
    for p in proteins:
        reference, arrays, model = (fd.info(f'majewski_{p}{s}') for s in ('', '_ca', '_cg'))
        assert [f.name for f in arrays.files] == [f'{p}_ca_{k}.npy'
                                                  for k in ('coords', 'forces', 'deltaforces', 'embeddings')]
        assert {f.url.rsplit('/', 1)[0] for f in arrays.files + model.files + reference.files} <= {
            f'http://pub.htmd.org/protein_thermodynamics_data/{k}'
            for k in ('training_data', 'cg_trajectories', 'reference_trajectories')}
        assert all(f.name.lower().startswith(p) for f in reference.files), 'an archive of another protein'
        assert bool(reference.files) == (p != 'homeodomain')
    assert fd.info('majewski_homeodomain').kind == 'on request'


def test_file_placed_by_hand_needs_no_network(tmp_path):
    d = entry('http://127.0.0.1:9', checksum=sha(PAYLOAD))
    with pytest.raises(ConnectionError): fd.fetch(d, False, tmp_path)
    (tmp_path/'toy'/'frames.npz').write_bytes(PAYLOAD)
    assert fd.fetch(d, False, tmp_path).directory == tmp_path/'toy'
    assert fd.fetch(entry('http://127.0.0.1:9'), False, tmp_path) and (tmp_path/'toy'/'frames.npz.sha256').exists()


@pytest.mark.parametrize('kind', ['zip', 'tar.gz'])
def test_archive_is_unpacked_whole(server, tmp_path, kind):
    url, files, _ = server
    t = trajectory(5, 12)
    t.save_xtc(str(tmp_path/'a.xtc'))
    t[0].save_pdb(str(tmp_path/'top.pdb'))
    buffer = io.BytesIO()
    if kind == 'zip':
        with zipfile.ZipFile(buffer, 'w') as z:
            for n in ('a.xtc', 'top.pdb'): z.write(tmp_path/n, n)
    else:
        with tarfile.open(fileobj=buffer, mode='w:gz') as z:
            for n in ('a.xtc', 'top.pdb'): z.add(tmp_path/n, n)
    name, cache = f'all.{kind}', tmp_path/'cache'
    files[f'/{name}'] = buffer.getvalue(), None
    d = fd.fetch(entry(url, name, trajectory_pattern='*.xtc', topology_pattern='*.pdb'), False, cache)
    assert [p.name for p in d.trajectories] == ['a.xtc'] and d.topology.name == 'top.pdb'
    assert sum(len(c) for _, c in stream_frames(d.trajectories, d.topology)) == 5
    files[f'/{name}'] = buffer.getvalue()[:-60], None
    with pytest.raises(ValueError, match='not a whole archive'): fd.fetch(entry(url, name), False, tmp_path/'other')
    assert leftovers(tmp_path/'other') == [name]


def test_register_is_complete():
    assert {'shipped', 'downloaded', 'generated', 'on request'} == {fd.info(n).kind for n in fd.names()}
    for n in fd.names():
        d = fd.info(n)
        assert d.description and d.licence and d.how_made, n
        if d.kind != 'generated': assert d.citation, n
        for f in d.files:
            assert (f.url is None) == (d.kind == 'shipped'), n
            assert f.checksum is None or re.fullmatch(r'sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}', f.checksum), (n, f.name)
    assert len(fd.table()) == len(fd.names())
    with pytest.raises(ValueError, match='already'): fd.register(fd.info('pdb'))
    with pytest.raises(KeyError, match='one data set'): fd.info('ala2:1')
    with pytest.raises(ValueError, match='pdb:ID'): fd.fetch('pdb', False)
    with pytest.raises(FileNotFoundError, match='fetch'): print(fd.info('villin_go').topology)
    assert [n for n in fd.names() if fd.info(n).restricted] == ['atlas', 'hp35_desres', 'villin_rmsd', 'desres']
    assert set(fd.table().query('restricted').index) == {'atlas', 'hp35_desres', 'villin_rmsd', 'desres'}


def test_on_request_says_how(tmp_path):
    with pytest.warns(fd.LicenceNotice), pytest.raises(FileNotFoundError, match='trajectories@deshawresearch.com'):
        fd.fetch('desres', False, tmp_path)


@pytest.mark.parametrize('name', fd.names('shipped'))
def test_shipped_files_match_their_record(name):
    sources = (ROOT/'data'/'SOURCES.md').read_text()
    d = fd.info(name)
    for f in d.files:
        path = ROOT/'data'/name/f.name
        assert fd.checksum(path) == f.checksum and path.stat().st_size == f.size
        assert f.checksum.split(':')[1] in sources, f.name
    assert {p.name for p in (ROOT/'data'/name).iterdir()} == {f.name for f in d.files}
    assert d.how_made in sources and not {p.name for p in (ROOT/'data').iterdir()
                                          if p.is_dir()} - set(fd.names('shipped'))


def test_every_stored_result_says_what_made_it():
    sources = (ROOT/'data'/'SOURCES.md').read_text()
    assert not [p.name for p in (ROOT/'data').glob('*.json') if f'`{p.name}`' not in sources]


def test_data_stay_small():
    assert sum(p.stat().st_size for p in (ROOT/'data').rglob('*') if p.is_file()) < 40e6


@pytest.mark.parametrize('name, n_frames', [('villin_go', 10_000), ('bba_go', 6000)])
def test_unpacked_files_match_the_simulation(name, n_frames, tmp_path):
    "The xtc files come back with the bytes that the simulation wrote, as SOURCES.md lists them."
    sources = (ROOT/'data'/'SOURCES.md').read_text()
    d = fd.fetch(name, False, tmp_path)
    assert len(d.trajectories) == 8
    for p in d.trajectories: assert fd.checksum(p).split(':')[1] in sources, p.name
    t = md.load(str(d.trajectories[3]), top=str(d.topology))
    assert len(t) == n_frames and np.allclose(np.diff(t.time), d.frame_spacing_ps)


def test_damaged_shipped_file_is_named(tmp_path, monkeypatch):
    folder = tmp_path/'villin_go'
    folder.mkdir()
    for f in fd.info('villin_go').files: (folder/f.name).write_bytes((ROOT/'data'/'villin_go'/f.name).read_bytes())
    monkeypatch.setattr(fd, 'shipped_directory', lambda: tmp_path)
    (folder/'native.pdb').write_text('END\n')
    with pytest.raises(ValueError, match='native.pdb'): fd.fetch('villin_go', False, tmp_path/'cache')
    (folder/'native.pdb').unlink()
    with pytest.raises(FileNotFoundError, match='native.pdb'): fd.fetch('villin_go', False, tmp_path/'cache')


def test_two_processes_fetch_at_once(tmp_path):
    env = os.environ | dict(FOLDBOOK_CACHE=str(tmp_path))
    code = 'import foldbook.data as d; print(len(d.fetch(progress=False).trajectories))'
    both = [subprocess.Popen([sys.executable, '-c', code], env=env, stdout=subprocess.PIPE) for _ in range(2)]
    assert [int(p.communicate()[0]) for p in both] == [8, 8]
    assert not [p for p in tmp_path.rglob('*.tmp')]


def test_cache_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv('FOLDBOOK_CACHE', str(tmp_path))
    assert fd.cache_directory() == tmp_path
    assert fd.shipped_directory() == ROOT/'data'
    assert fd.info('ala2_dihedrals').size == 6_000_544


def test_trajectories_come_in_natural_order(tmp_path):
    for k in (10, 9, 1): (tmp_path/f'run-{k}.xtc').touch()
    d = DataSet('toy', 'generated', '', trajectory_pattern='*.xtc', directory=tmp_path)
    assert [p.stem for p in d.trajectories] == ['run-1', 'run-9', 'run-10']
    with pytest.raises(FileNotFoundError, match="'toy' has no topology file"): print(d.topology)
    with pytest.raises(FileNotFoundError, match='has no file .*pdb'): d.find('*.pdb')


@pytest.mark.parametrize('size, checksum, why', [
    (3, None, '10,240 bytes instead of 3'), (None, sha(b''), 'its checksum is not'), (10_240, sha(PAYLOAD), ''),
    (None, None, '')])
def test_a_file_is_checked_as_far_as_it_is_known(tmp_path, size, checksum, why):
    (path := tmp_path/'x.bin').write_bytes(PAYLOAD)
    if not why: assert fd.check_file(path, File('x.bin', checksum, size)) == path
    else:
        with pytest.raises(ValueError, match=f'x.bin is damaged or another version: .*{why}'):
            fd.check_file(path, File('x.bin', checksum, size))


def test_a_download_of_another_size_is_refused(web, tmp_path):
    web.files['/frames.npz'] = Answer(PAYLOAD)
    d = DataSet('toy', 'downloaded', '', (File('frames.npz', None, 7, f'{web.url}/frames.npz'),))
    with pytest.raises(ValueError, match='frames.npz .*10,240 bytes instead of 7'): fd.fetch(d, False, tmp_path)


def test_import_is_light():
    code = ('import sys, foldbook.data; '
            'print([m for m in ("mdtraj", "pandas", "requests", "pooch", "torch") if m in sys.modules])')
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == '[]\n'
