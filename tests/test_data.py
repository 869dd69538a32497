"The register, downloads from a local server, checksums, packing and streaming."
import hashlib, http.server, io, os, re, subprocess, sys, tarfile, threading, tracemalloc, zipfile
from dataclasses import replace
from pathlib import Path

import mdtraj as md
import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st

import foldbook.data as fd
from foldbook.data import DataSet, File

ROOT = Path(__file__).parents[1]
PAYLOAD = bytes(range(256))*40


def sha(b): return 'sha256:' + hashlib.sha256(b).hexdigest()


def topology(n):
    top = md.Topology()
    c = top.add_chain()
    for _ in range(n): top.add_atom('CA', md.element.carbon, top.add_residue('ALA', c))
    return top


def trajectory(n_frames, n_beads, seed=0):
    x = np.random.default_rng(seed).normal(size=(n_frames, n_beads, 3)).cumsum(axis=1)*0.3
    return md.Trajectory(x.astype(np.float32), topology(n_beads), time=6.0*np.arange(n_frames))


@pytest.fixture
def server():
    "A web server whose answers a test sets; it can break off in the middle of a file."
    files, hits = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            hits.append(self.path)
            body, promised = files.get(self.path, (None, 0))
            if body is None: return self.send_error(404)
            self.send_response(200)
            self.send_header('Content-Length', str(promised or len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_): pass

    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{s.server_port}', files, hits
    s.shutdown()


def entry(url, name='frames.npz', checksum=None, **kw): return DataSet('toy', 'downloaded', 'a fixture', (File(name, checksum, url=f'{url}/{name}'),), **kw)


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
    with pytest.raises((error, ValueError) if promised else error) as e: fd.fetch(entry(url, checksum=checksum), False, tmp_path)
    assert f'{url}/frames.npz' in str(e.value) and str(tmp_path/'toy'/'frames.npz') in str(e.value)
    assert leftovers(tmp_path) == []


def test_file_placed_by_hand_needs_no_network(tmp_path):
    d = entry('http://127.0.0.1:9', checksum=sha(PAYLOAD))
    with pytest.raises(ConnectionError): fd.fetch(d, False, tmp_path)
    (tmp_path/'toy'/'frames.npz').write_bytes(PAYLOAD)
    assert fd.fetch(d, False, tmp_path).directory == tmp_path/'toy'


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
    assert sum(len(c) for _, c in fd.stream_frames(d.trajectories, d.topology)) == 5
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
    with pytest.raises(FileNotFoundError, match='fetch'): fd.info('villin_go').topology


def test_on_request_says_how(tmp_path):
    with pytest.raises(FileNotFoundError, match='trajectories@deshawresearch.com'): fd.fetch('desres', False, tmp_path)


@pytest.mark.parametrize('name', fd.names('shipped'))
def test_shipped_files_match_their_record(name):
    sources = (ROOT/'data'/'SOURCES.md').read_text()
    d = fd.info(name)
    for f in d.files:
        path = ROOT/'data'/name/f.name
        assert fd.checksum(path) == f.checksum and path.stat().st_size == f.size
        assert f.checksum.split(':')[1] in sources, f.name
    assert {p.name for p in (ROOT/'data'/name).iterdir()} == {f.name for f in d.files}
    assert d.how_made in sources and not {p.name for p in (ROOT/'data').iterdir() if p.is_dir()} - set(fd.names('shipped'))


def test_every_stored_result_says_what_made_it():
    sources = (ROOT/'data'/'SOURCES.md').read_text()
    assert not [p.name for p in (ROOT/'data').glob('*.json') if f'`{p.name}`' not in sources]


def test_data_stay_small():
    assert sum(p.stat().st_size for p in (ROOT/'data').rglob('*') if p.is_file()) < 18e6


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


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 40), st.integers(10, 50), st.integers(0, 1000))
def test_packing_loses_nothing(tmp_path_factory, n_frames, n_beads, seed):
    d = tmp_path_factory.mktemp('pack')
    t = trajectory(n_frames, n_beads, seed)
    t.save_xtc(str(d/'a.xtc'))
    t[0].save_pdb(str(d/'top.pdb'))
    fd.unpack_trajectory(fd.pack_trajectory(d/'a.xtc', d/'top.pdb', d/'a.npy.xz'), d/'b.xtc', 6.0)
    assert (d/'a.xtc').read_bytes() == (d/'b.xtc').read_bytes()


def test_packing_refuses_far_positions(tmp_path):
    t = trajectory(2, 12)
    t.xyz += 40
    t.save_xtc(str(tmp_path/'a.xtc'))
    t[0].save_pdb(str(tmp_path/'top.pdb'))
    with pytest.raises(ValueError, match='centre'): fd.pack_trajectory(tmp_path/'a.xtc', tmp_path/'top.pdb', tmp_path/'a.npy.xz')


def test_pieces_do_not_cross_files(tmp_path):
    for k, n in enumerate((7, 3, 12)): trajectory(n, 12, k).save_xtc(str(tmp_path/f'{k}.xtc'))
    got = [(k, len(c)) for k, c in fd.stream_frames(sorted(tmp_path.glob('*.xtc')), topology(12), chunk=5)]
    assert got == [(0, 5), (0, 2), (1, 3), (2, 5), (2, 5), (2, 2)]
    _, c = next(fd.stream_frames(tmp_path/'0.xtc', topology(12), atoms=np.array([2, 5])))
    assert np.allclose(c.xyz, trajectory(7, 12, 0).xyz[:5 + 2, [2, 5]], atol=6e-4)


@pytest.mark.parametrize('suffix', ['xtc', 'dcd'])
def test_truncated_file_is_named(tmp_path, suffix):
    path = tmp_path/f'cut.{suffix}'
    t = trajectory(30, 12)
    t.save(str(path))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f'cut.{suffix}.*cut short'): list(fd.stream_frames(path, t.topology, chunk=8))


@pytest.mark.parametrize('suffix', ['xtc', 'trr', 'dcd', 'nc'])
@given(st.floats(0.02, 0.98), st.sampled_from([2, 9, 10, 33]))
@settings(deadline=None, max_examples=12)
def test_cut_anywhere_is_named_after_its_whole_frames(tmp_path_factory, suffix, part, n_beads):
    folder, t = tmp_path_factory.mktemp('cut'), trajectory(30, n_beads)
    whole, cut = folder/f'whole.{suffix}', folder/f'cut.{suffix}'
    t[:29].save(str(whole))
    frame = -whole.stat().st_size
    t.save(str(whole))
    data = whole.read_bytes()
    frame += len(data)
    assert sum(map(len, fd.read_frames(whole, t.topology, chunk=8))) == 30
    size = int(part*len(data))
    ends = len(data) - frame*np.arange(29, -1, -1)
    if suffix == 'xtc':
        with md.open(str(whole)) as f: ends = np.append(f.offsets[1:], len(data)) # each of another length
    if suffix != 'nc': assume(size not in ends) # whole frames only are no damage
    cut.write_bytes(data[:size])
    x = []
    with pytest.raises(ValueError, match=f'cut.{suffix}: frame [0-9]+.*(cut short|damaged)') as e:
        for piece in fd.read_frames(cut, t.topology, chunk=8): x.append(piece.xyz)
    n = int(str(e.value).split('frame ')[1].split(':')[0].split()[0])
    assert n == sum(map(len, x)) == (0 if suffix == 'nc' else (ends <= size).sum()) # netCDF cannot be opened at all
    if n: np.testing.assert_allclose(np.concatenate(x), t.xyz[:n], atol=6e-4)
    with pytest.raises(ValueError, match=f'cut.{suffix}: frame {n}'): list(fd.stream_frames(cut, t.topology, chunk=8))


def test_cut_inside_the_next_header(tmp_path):
    "Where mdtraj sees a file that ends well."
    t, path = trajectory(5, 12), tmp_path/'header.xtc'
    t.save_xtc(str(path))
    path.write_bytes(path.read_bytes() + path.read_bytes()[:2])
    assert len(md.load(str(path), top=t.topology)) == 5
    with pytest.raises(fd.DamagedFile, match='header.xtc: frame 5: .*2 bytes of an unfinished frame'): list(fd.stream_frames(path, t.topology))


def swapped(data):
    "A dcd file without box as a machine of the other byte order writes it; 4-byte words except the text."
    n = 4 + 80*int.from_bytes(data[96:100], 'little')
    turn = lambda b: np.frombuffer(b, '<u4').astype('>u4').tobytes()
    return turn(data[:4]) + data[4:8] + turn(data[8:100]) + data[100:96 + n] + turn(data[96 + n:])


@pytest.mark.parametrize('kind', ['charmm', 'other byte order', 'x-plor'])
def test_kinds_of_dcd(tmp_path, kind):
    t, path = trajectory(20, 12), tmp_path/'kind.dcd'
    t.save_dcd(str(path))
    data = bytearray(path.read_bytes())
    if kind == 'x-plor': data[84:88], data[44:52] = bytes(4), np.float64(0.02).tobytes()
    if kind == 'other byte order': data = swapped(bytes(data))
    path.write_bytes(data)
    got = np.concatenate([c.xyz for _, c in fd.stream_frames(path, t.topology, chunk=7)])
    np.testing.assert_allclose(got, t.xyz, atol=1e-5)
    path.write_bytes(data[:-30])
    with pytest.raises(fd.DamagedFile, match='kind.dcd: frame 19'): list(fd.stream_frames(path, t.topology, chunk=7))


def test_excerpt_of_a_dcd_is_no_damage(tmp_path):
    t, path = trajectory(30, 12), tmp_path/'excerpt.dcd'
    t.save_dcd(str(path))
    data = bytearray(path.read_bytes())
    data[8:12] = (1000).to_bytes(4, 'little')
    path.write_bytes(data)
    with pytest.warns(UserWarning, match='promises 1000 frames, the file has 30'): assert sum(len(c) for _, c in fd.stream_frames(path, t.topology)) == 30


@pytest.mark.parametrize('suffix', ['pdb', 'nc', 'trr', 'xtc', 'dcd'])
def test_every_format_with_a_box(tmp_path, suffix):
    t, path = trajectory(6, 12), tmp_path/f'box.{suffix}'
    t.unitcell_lengths, t.unitcell_angles = np.full((6, 3), 4.), np.full((6, 3), 90.)
    t.save(str(path))
    assert [len(c) for c in fd.read_frames(path, t.topology, chunk=4)] == [4, 2]
    assert fd.atoms_in_file(path, t.topology) == 12
    with pytest.raises(ValueError, match=f'box.{suffix}'): list(fd.read_frames(path, topology(11), atoms=np.arange(3)))


def test_topology_and_empty_files(tmp_path):
    t = trajectory(3, 12)
    t[0].save_pdb(str(tmp_path/'top.pdb'))
    for top in (tmp_path/'top.pdb', str(tmp_path/'top.pdb'), t, t.topology): assert fd.load_topology(top).n_atoms == 12
    with pytest.raises(FileNotFoundError, match='none.pdb'): fd.load_topology(tmp_path/'none.pdb')
    (tmp_path/'empty.xtc').write_bytes(b'')
    (tmp_path/'text.dcd').write_text('not a trajectory')
    with pytest.raises(ValueError, match='text.dcd: no topology can be read'): fd.load_topology(tmp_path/'text.dcd')
    for name in ('empty.xtc', 'text.dcd'):
        with pytest.raises(ValueError, match=f'{name}: frame 0'): list(fd.stream_frames(tmp_path/name, t))


def test_bad_numbers_and_wrong_topology_are_named(tmp_path):
    t = trajectory(30, 12)
    t.xyz[17, 4, 1] = np.nan
    t.save(str(tmp_path/'nan.dcd'))
    with pytest.raises(ValueError, match=r'nan.dcd: frame 17, atom ALA4-CA|nan.dcd: frame 17, atom ALA5-CA'): list(fd.stream_frames(tmp_path/'nan.dcd', t.topology, chunk=8))
    with pytest.raises(ValueError, match='nan.dcd.*topology of 13 atoms'): list(fd.stream_frames(tmp_path/'nan.dcd', topology(13)))
    with pytest.raises(FileNotFoundError, match='none.xtc'): list(fd.stream_frames(tmp_path/'none.xtc', topology(13)))


def test_streaming_memory_is_bounded(tmp_path):
    "20,000 frames of 60 atoms are 14 MB in memory; a stream of 500 needs a small part of that."
    t = trajectory(20_000, 60)
    t.save_dcd(str(tmp_path/'long.dcd'))
    top, n = t.topology, 0
    del t
    tracemalloc.start()
    for _, c in fd.stream_frames(tmp_path/'long.dcd', top, chunk=500): n += len(c)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 20_000 and peak < 4e6


def test_plot_draws_each_trajectory():
    import matplotlib
    matplotlib.use('Agg')
    ax = fd.plot_distributions([np.arange(10.), np.arange(5.)], 'x (nm)')
    assert len(ax.get_legend().get_texts()) == 2 and ax.get_xlabel() == 'x (nm)'


def test_cache_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv('FOLDBOOK_CACHE', str(tmp_path))
    assert fd.cache_directory() == tmp_path
    assert fd.shipped_directory() == ROOT/'data'
    assert replace(fd.info('ala2_dihedrals')).size == 6_000_544
