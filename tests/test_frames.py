"Reading trajectories: damage anywhere, every format, time, arrays on disk."
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import mdtraj as md
import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st

import foldbook.frames as ff


def trajectory(n_frames, n_beads, seed=0):
    x = np.random.default_rng(seed).normal(size=(n_frames, n_beads, 3)).cumsum(axis=1)*0.3
    return md.Trajectory(x.astype(np.float32), ff.ca_chain(['ALA']*n_beads), time=6.0*np.arange(n_frames))


def test_pieces_do_not_cross_files(tmp_path):
    for k, n in enumerate((7, 3, 12)): trajectory(n, 12, k).save_xtc(str(tmp_path/f'{k}.xtc'))
    got = [(k, len(c)) for k, c in ff.stream_frames(sorted(tmp_path.glob('*.xtc')), ff.ca_chain(['ALA']*12), chunk=5)]
    assert got == [(0, 5), (0, 2), (1, 3), (2, 5), (2, 5), (2, 2)]
    _, c = next(ff.stream_frames(tmp_path/'0.xtc', ff.ca_chain(['ALA']*12), atoms=np.array([2, 5])))
    assert np.allclose(c.xyz, trajectory(7, 12, 0).xyz[:5 + 2, [2, 5]], atol=6e-4)


@pytest.mark.parametrize('suffix', ['xtc', 'dcd'])
def test_truncated_file_is_named(tmp_path, suffix):
    path = tmp_path/f'cut.{suffix}'
    t = trajectory(30, 12)
    t.save(str(path))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f'cut.{suffix}.*cut short'): list(ff.stream_frames(path, t.topology, chunk=8))


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
    assert sum(map(len, ff.read_frames(whole, t.topology, chunk=8))) == 30
    size = int(part*len(data))
    ends = len(data) - frame*np.arange(29, -1, -1)
    if suffix == 'xtc':
        with md.open(str(whole)) as f: ends = np.append(f.offsets[1:], len(data)) # each of another length
    if suffix != 'nc': assume(size not in ends) # whole frames only are no damage
    cut.write_bytes(data[:size])
    x = []
    with pytest.raises(ValueError, match=f'cut.{suffix}: frame [0-9]+.*(cut short|damaged)') as e:
        for piece in ff.read_frames(cut, t.topology, chunk=8): x.append(piece.xyz)
    n = int(str(e.value).split('frame ')[1].split(':')[0].split()[0])
    assert n == sum(map(len, x)) == (0 if suffix == 'nc' else (ends <= size).sum()) # netCDF cannot be opened at all
    if n: np.testing.assert_allclose(np.concatenate(x), t.xyz[:n], atol=6e-4)
    with pytest.raises(ValueError, match=f'cut.{suffix}: frame {n}'): list(ff.stream_frames(cut, t.topology, chunk=8))


def test_cut_inside_the_next_header(tmp_path):
    "Where mdtraj sees a file that ends well."
    t, path = trajectory(5, 12), tmp_path/'header.xtc'
    t.save_xtc(str(path))
    path.write_bytes(path.read_bytes() + path.read_bytes()[:2])
    assert len(md.load(str(path), top=t.topology)) == 5
    with pytest.raises(ff.DamagedFile, match='header.xtc: frame 5: .*2 bytes of an unfinished frame'):
        list(ff.stream_frames(path, t.topology))


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
    got = np.concatenate([c.xyz for _, c in ff.stream_frames(path, t.topology, chunk=7)])
    np.testing.assert_allclose(got, t.xyz, atol=1e-5)
    path.write_bytes(data[:-30])
    with pytest.raises(ff.DamagedFile, match='kind.dcd: frame 19'): list(ff.stream_frames(path, t.topology, chunk=7))


def test_excerpt_of_a_dcd_is_no_damage(tmp_path):
    t, path = trajectory(30, 12), tmp_path/'excerpt.dcd'
    t.save_dcd(str(path))
    data = bytearray(path.read_bytes())
    data[8:12] = (1000).to_bytes(4, 'little')
    path.write_bytes(data)
    with pytest.warns(UserWarning, match='promises 1000 frames, the file has 30'):
        assert sum(len(c) for _, c in ff.stream_frames(path, t.topology)) == 30


@pytest.mark.parametrize('suffix', ['pdb', 'gro', 'h5', 'nc', 'trr', 'xtc', 'dcd'])
def test_every_format_with_a_box(tmp_path, suffix):
    t, path = trajectory(6, 12), tmp_path/f'box.{suffix}'
    t.unitcell_lengths, t.unitcell_angles = np.full((6, 3), 4.), np.full((6, 3), 90.)
    t.save(str(path))
    assert [len(c) for c in ff.read_frames(path, t.topology, chunk=4)] == [4, 2]
    assert ff.atoms_in_file(path, t.topology) == 12
    with pytest.raises(ValueError, match=f'box.{suffix}'):
        list(ff.read_frames(path, ff.ca_chain(['ALA']*11), atoms=np.arange(3)))


def test_topology_and_empty_files(tmp_path):
    t = trajectory(3, 12)
    t[0].save_pdb(str(tmp_path/'top.pdb'))
    for top in (tmp_path/'top.pdb', str(tmp_path/'top.pdb'), t, t.topology): assert ff.load_topology(top).n_atoms == 12
    with pytest.raises(FileNotFoundError, match='none.pdb'): ff.load_topology(tmp_path/'none.pdb')
    (tmp_path/'empty.xtc').write_bytes(b'')
    (tmp_path/'text.dcd').write_text('not a trajectory')
    with pytest.raises(ValueError, match='text.dcd: no topology can be read'): ff.load_topology(tmp_path/'text.dcd')
    for name in ('empty.xtc', 'text.dcd'):
        with pytest.raises(ValueError, match=f'{name}: frame 0'): list(ff.stream_frames(tmp_path/name, t))


def test_bad_numbers_and_wrong_topology_are_named(tmp_path):
    t = trajectory(30, 12)
    t.xyz[17, 4, 1] = np.nan
    t.save(str(tmp_path/'nan.dcd'))
    with pytest.raises(ValueError, match=r'nan.dcd: frame 17, atom ALA4-CA|nan.dcd: frame 17, atom ALA5-CA'):
        list(ff.stream_frames(tmp_path/'nan.dcd', t.topology, chunk=8))
    with pytest.raises(ValueError, match='nan.dcd.*topology of 13 atoms'):
        list(ff.stream_frames(tmp_path/'nan.dcd', ff.ca_chain(['ALA']*13)))
    with pytest.raises(FileNotFoundError, match='none.xtc'):
        list(ff.stream_frames(tmp_path/'none.xtc', ff.ca_chain(['ALA']*13)))


def test_streaming_memory_is_bounded(tmp_path):
    "20,000 frames of 60 atoms are 14 MB in memory; a stream of 500 needs a small part of that."
    t = trajectory(20_000, 60)
    t.save_dcd(str(tmp_path/'long.dcd'))
    top, n = t.topology, 0
    del t
    tracemalloc.start()
    for _, c in ff.stream_frames(tmp_path/'long.dcd', top, chunk=500): n += len(c)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 20_000 and peak < 4e6


@pytest.mark.parametrize('suffix', ['xtc', 'h5', 'pdb'])
@settings(deadline=None, max_examples=10)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 25))
def test_pieces_and_stride_make_no_difference(tmp_path_factory, suffix, chunk, stride, n_frames):
    t, path = trajectory(n_frames, 5), tmp_path_factory.mktemp('pieces')/f'a.{suffix}'
    t.save(str(path))
    pieces = [c for _, c in ff.stream_frames(path, t, chunk, stride=stride)]
    assert max(map(len, pieces)) <= chunk
    whole = md.load(str(path), top=t.topology)[::stride] if suffix == 'xtc' else md.load(str(path))[::stride]
    for got in (md.join(pieces), ff.read_trajectory(path, t if suffix == 'xtc' else None, stride)):
        np.testing.assert_array_equal(got.xyz, whole.xyz)
        np.testing.assert_array_equal(got.time, whole.time)
        assert got.topology == whole.topology


@pytest.mark.parametrize('options, why', [(dict(stride=0), 'at least 1'), (dict(atoms='name XX'), 'selects none')])
def test_bad_choices(tmp_path, options, why):
    trajectory(3, 12).save_hdf5(str(tmp_path/'a.h5'))
    with pytest.raises(ValueError, match=why): ff.read_trajectory(tmp_path/'a.h5', **options)


def test_names_with_brackets_are_files_if_they_exist(tmp_path):
    for name in ('a[1].xtc', 'a1.xtc', 'b2.xtc', 'b10.xtc'): (tmp_path/name).touch()
    names = lambda *p: [f.name for f in ff.find_files([str(tmp_path/q) for q in p])]
    assert names('a[1].xtc') == ['a[1].xtc'] and names('b[12]*.xtc', 'a1.xtc') == ['b2.xtc', 'b10.xtc', 'a1.xtc']
    with pytest.raises(FileNotFoundError, match='c.*no file matches'): names('a1.xtc', 'c*.xtc')


@pytest.mark.parametrize('change, why', [
    (lambda t: np.delete(t, 4), r'file 1: frame 4 comes 12 ps after'),            # a gap
    (lambda t: np.r_[t[:6], t[3:]], r'file 1: time goes back at frame 6, from 30 to 18 ps'),       # an overlap
    (lambda t: t/2, r'file 1: 3 ps between frames, file 0 has 6'),                # another spacing
    (lambda t: np.r_[t[:7], t[-1] + 2*t[1:7]], r'file 1: frame 7 comes .* ps after')]) # two halves, one thinned
def test_uneven_time_is_named(change, why):
    t = 6.*np.arange(12)
    assert ff.even_spacing([t, t + 100, t[:1], t[:0]]) == 6.
    with pytest.raises(ValueError, match=why): ff.even_spacing([t, change(t)], ['file 0', 'file 1'])


@given(st.floats(1e-3, 1e3), st.integers(2, 3000), st.floats(0, 1e4))
def test_rounding_of_times_is_no_gap(step, n, start):
    found = ff.even_spacing([np.float32((start + np.arange(n))*step)])
    assert found == pytest.approx(step, rel=1e-3)


def test_periodic_needs_a_box(tmp_path):
    t = trajectory(4, 12)
    t.save_xtc(str(tmp_path/'a.xtc'))
    with pytest.raises(ValueError, match='a.xtc: --periodic .periodic=True. needs a periodic box'):
        ff.read_ensemble(tmp_path/'a.xtc', t, periodic=True)
    t.unitcell_lengths, t.unitcell_angles = np.full((4, 3), 5.), np.full((4, 3), 90.)
    split = md.Trajectory(np.mod(t.xyz, 5.), t.topology, t.time, t.unitcell_lengths, t.unitcell_angles)
    split.save_hdf5(str(tmp_path/'b.h5'))
    e = ff.read_ensemble(tmp_path/'b.h5', atoms=np.arange(4), periodic=True)
    bonds = lambda x: np.linalg.norm(np.diff(x, axis=1), axis=2)
    assert e.values[0].shape == (4, 4, 3) and e.spacing_ps == 6.
    np.testing.assert_allclose(bonds(e.values[0]), bonds(t.xyz[:, :4]), atol=1e-4)


@settings(deadline=None, max_examples=50)
@given(st.slices(30), st.floats(1e-3, 1e3))
def test_a_part_is_the_part(tmp_path_factory, part, factor):
    "Slicing and converting commute, whatever the slice, also in another process."
    path, x = tmp_path_factory.mktemp('disk')/'a.npy', trajectory(30, 10).xyz
    np.save(path, x)
    lazy = ff.npy_on_disk(path, factor)
    np.testing.assert_allclose(lazy[part], x[part]*factor, rtol=1e-5)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(lazy))[part], lazy[part])
    assert lazy.shape == x.shape and len(lazy) == 30 and lazy[part].dtype == np.float32


def test_many_files_stay_closed(tmp_path):
    "A thousand promises of files that are not held open."
    np.save(tmp_path/'a.npy', trajectory(3, 5).xyz)
    handles = Path('/proc/self/fd')
    before = len(list(handles.iterdir())) if handles.exists() else 0
    lazy = [ff.npy_on_disk(tmp_path/'a.npy') for _ in range(1000)]
    after = len(list(handles.iterdir())) if before else 0
    assert after - before < 20 and len(lazy) == 1000


@settings(deadline=None, max_examples=30)
@given(cut=st.integers(0, 10*30*3*4 + 127))
def test_npy_cut_anywhere_is_refused(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp('npy')/'a.npy'
    np.save(path, trajectory(30, 10).xyz)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match='a.npy: cannot be read'): ff.npy_on_disk(path)


def test_import_is_light():
    code = 'import sys, foldbook.frames; print([m for m in ("mdtraj", "pandas", "h5py", "torch") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == '[]\n'
