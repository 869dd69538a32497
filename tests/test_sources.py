"""Every format of the register, made small, served by a local server, loaded: whole, cut, with a wrong checksum,
missing, and after a broken line."""
import bz2
import io
import tarfile
import zipfile
from dataclasses import replace

import h5py
import mdtraj as md
import numpy as np
import pytest

import foldbook.data as fd
import foldbook.sources as fs
from foldbook.frames import DamagedFile, ca_chain
from test_data import Answer, Server, leftovers, sha

RNG = np.random.default_rng(1)
X, F = RNG.normal(size=(2, 30, 10, 3)).astype(np.float32)  # nm, kJ/mol/nm
ANGLES, GAPS = RNG.uniform(-3, 3, (40, 66)), RNG.uniform(0.3, 1., (40, 2))
CLN = 'TYR TYR ASP PRO GLU THR GLY THR TRP TYR'.split()
TYPES = np.array([4, 4, 5, 8, 6, 13, 2, 13, 7, 4])

pytestmark = pytest.mark.filterwarnings('ignore::foldbook.data.LicenceNotice')


def npy(a):
    np.save(b := io.BytesIO(), a)
    return b.getvalue()
def npz(*a, **k):
    np.savez(b := io.BytesIO(), *a, **k)
    return b.getvalue()
def text(a):
    np.savetxt(b := io.StringIO(), a)
    return b.getvalue().encode()


def tar(files): # name -> bytes
    with tarfile.open(fileobj=(b := io.BytesIO()), mode='w:gz') as z:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            z.addfile(entry, io.BytesIO(data))
    return b.getvalue()


def zipped(files):
    with zipfile.ZipFile(b := io.BytesIO(), 'w') as z:
        for name, data in files.items(): z.writestr(name, data)
    return b.getvalue()


def saved(t, suffix, tmp): # a trajectory as bytes
    t.save(str(path := tmp/f'made.{suffix}'))
    return path.read_bytes()


def chain(n=10, frames=30): return md.Trajectory(X[:frames, :n], ca_chain(CLN[:n]), time=np.arange(frames))


def mdcath(tmp, runs=((348, 3),), **change):
    "A file of mdCATH's layout: texts of variable length, one with water, groups in no order."
    nodes = dict(coords=X[:, :5]*10, forces=F[:, :5]/41.84, box=4*np.eye(3)) | change
    with h5py.File(path := tmp/'made.h5', 'w', libver='latest') as h:
        pdb = saved(chain(5, 1), 'pdb', tmp).decode()
        h['1abcA00/pdb'], h['1abcA00/pdbProteinAtoms'] = pdb*3, pdb
        for t, r in runs:
            h.update({f'1abcA00/{t}/{r}/{k}': v + (t + r)*(k == 'coords' and len(runs) > 1)
                      for k, v in nodes.items() if v is not None})
    return path.read_bytes()


def good(name, tmp): # file name -> bytes, as the set's files are called
    ca = {f'chignolin_ca_{k}.npy': npy(v) for k, v in dict(coords=X*10, forces=F/41.84, deltaforces=F/83.68,
                                                           embeddings=TYPES).items()}
    pdb, dcd, xtc = (saved(chain(frames=n), s, tmp) for n, s in ((1, 'pdb'), (30, 'dcd'), (30, 'xtc')))
    part = lambda kind, a: tar({f'{kind}s_nowater/chig_{"coor" if kind == "coord" else kind}_{n}.npy': npy(a[m:m + 9])
                                for n, m in (('b', 9), ('a', 0))})
    return {
        'majewski_chignolin_ca': ca,
        'torchmd_chignolin': {'torchMD_tutorial_data.tar.gz': tar({k: ca[k] for k in list(ca)[:2]})},
        'majewski_chignolin_cg': {'chignolin_cgtraj_protspecific.tar.gz': tar({'runs/a.xtc': xtc}),
                                  'chignolin_cgtraj_multiprotein.tar.gz': tar({'b.xtc': xtc}), 'chignolin_ca.pdb': pdb},
        'majewski_chignolin': {'chignolin_trajectories.tar.gz': tar({'filtered/x.xtc': xtc,
                                                                     'filtered/filtered.pdb': pdb})},
        'majewski_structures': {'experimental_structures.tar.gz': tar({'chignolin.pdb': pdb, 'other.pdb': pdb})},
        'chignolin_forces': {'chignolin_generators.tar.gz': tar({'chignolin_50ns_0/structure.pdb': pdb}),
                             'chignolin_coords_nowater.tar.gz': part('coord', X*10),
                             'chignolin_forces_nowater.tar.gz': part('force', F/41.84)},
        'ala2_forces': {'alanine-dipeptide-1Mx1ps-with-force.npz': npz(coordinates=X*10, forces=F/41.84),
                        'al2.pdb': pdb},
        'ala2_dihedrals': {'alanine-dipeptide-3x250ns-backbone-dihedrals.npz': npz(ANGLES[:, :2], ANGLES[:7, :2],
                                                                                   ANGLES[:9, :2])},
        'doublewell_hmm': {'hmm-doublewell-2d-100k.npz': npz(trajectory=ANGLES[:, :2], transition_matrix=np.eye(2))},
        'mdcath:1abcA00': {'mdcath_dataset_1abcA00.h5': mdcath(tmp)},
        'hp35_desres': {'hp35.dihs.shifted.bz2': bz2.compress(text(ANGLES)),
                        'hp35.mindists2.bz2': bz2.compress(text(GAPS)), 'hp35.mindists2.ndx': b'# pairs\n3 7\n9 32\n'},
        'villin_rmsd': {'2f4k.CArmsd': text(np.c_[np.arange(40), 10*GAPS[:, 0]])},
        'ala2_msmbuilder': {'ala2_msmbuilder.zip': zipped({'t-0.dcd': dcd, 't-1.dcd': dcd, 'ala2.pdb': pdb})},
        'atlas:1abc_A': {'1abc_A_protein.zip': zipped({'1abc_A_R1.xtc': xtc, '1abc_A_R2.xtc': xtc, '1abc_A.pdb': pdb})},
        'pdb:2F4K': {'2F4K.pdb': pdb}}[name]


def close(a, b): np.testing.assert_allclose(np.asarray(a), b, atol=2e-6)


def check_ca(got, delta=True):
    assert (len(got), got.temperature_kelvin, [r.name for r in got.topology.residues]) == (30, 350., CLN)
    close(got.xyz, X), close(got.forces, F), close(got.bead_types, TYPES)
    assert (got.deltaforces is None) != delta
    if delta: close(2*got.deltaforces[3:5], F[3:5])
    close(got.trajectory(4, 9, 2).xyz, X[4:9:2])


def check_trajectories(n, spacing, atol=2e-6):
    def check(got):
        assert [len(t) for t in got] == [30]*n
        for t in got: np.testing.assert_allclose(t.xyz, X, atol=atol), close(t.time, np.arange(30)*spacing)
    return check


def check_frames(*parts):
    def check(got):
        assert len(got) == len(parts)
        for t, part in zip(got, parts):
            close(t.xyz, X[part]), close(t.forces, F[part]), close(t.trajectory(1, 3).xyz, X[part][1:3])
    return check


def check_mdcath(got):
    (r,) = got
    assert (r.temperature_kelvin, r.replica, r.spacing_ps, r.topology.n_atoms) == (348., 3, 1000., 5)
    close(r.xyz, X[:, :5]), close(r.forces[::9], F[::9, :5]), close(r.trajectory(2, 4).time, [2000., 3000.])
    close(r.trajectory().unitcell_lengths, np.full((30, 3), 4.))


def check_hp35(got):
    d, c = got['dihedrals'], got['distances']
    assert d.spacing_ps == c.spacing_ps == 200.
    close(d.values[0], ANGLES.astype(np.float32)), close(c.values[0], GAPS.astype(np.float32))
    assert d.names[:3] == ('phi2', 'psi2', 'phi3') and d.names[-1] == 'psi34' and set(d.units) == {'rad'}
    assert c.names == ('d_3_7', 'd_9_32') and c.units == ('nm', 'nm')


def check_rmsd(got): close(got.values[0], GAPS[:, :1].astype(np.float32)), close(got.spacing_ps, 200.)


def check_dihedrals(got):
    assert [v.shape for v in got.values] == [(40, 2), (7, 2), (9, 2)]
    assert got.names == ('phi', 'psi') and got.units == ('rad', 'rad')
    close(got.values[2], ANGLES[:9, :2])


def check_wells(got): assert got.units == ('', '') and len(got) == 1 and got.values[0].shape == (40, 2)


def check_structures(*names):
    def check(got):
        assert tuple(sorted(got)) == names
        for t in got.values(): np.testing.assert_allclose(t.xyz, X[:1], atol=6e-5)
    return check


CHECKS = {'majewski_chignolin_ca': check_ca, 'torchmd_chignolin': lambda got: check_ca(got, False),
    'majewski_chignolin_cg': check_trajectories(2, 1., 6e-4), 'majewski_chignolin': check_trajectories(1, 1., 6e-4),
          'majewski_structures': check_structures('chignolin', 'other'),
          'chignolin_forces': check_frames(slice(0, 9), slice(9, 18)), 'ala2_forces': check_frames(slice(None)),
          'ala2_dihedrals': check_dihedrals,
          'doublewell_hmm': check_wells, 'mdcath:1abcA00': check_mdcath, 'hp35_desres': check_hp35,
          'villin_rmsd': check_rmsd, 'ala2_msmbuilder': check_trajectories(2, 1.),
          'atlas:1abc_A': check_trajectories(2, 10., 6e-4),
          'pdb:2F4K': check_structures('2F4K')}


@pytest.fixture
def web():
    s = Server()
    yield s
    s.http.shutdown()


def served(web, name, tmp, files=None, **change):
    "The register's entry with its files on the server of the test, and without their published checksums."
    d = fd.info(name)
    for n, body in (files or good(name, tmp)).items(): web.files[f'/{n}'] = Answer(body, etag='"v1"')
    return replace(d, files=tuple(replace(f, **{'checksum': None, 'size': None, 'url': f'{web.url}/{f.name}'} | change)
                                  for f in d.files))


@pytest.fixture
def load(web, tmp_path):
    "Load a set from the server; files may be replaced."
    def run(name, files=None, change=None, **options):
        return fs.load(served(web, name, tmp_path, good(name, tmp_path) | (files or {}), **change or {}), False,
                       tmp_path/'cache', **options)
    return run


@pytest.mark.parametrize('name', CHECKS)
def test_good(load, name): CHECKS[name](load(name))


def test_every_format_is_among_them():
    assert {fd.info(n).format for n in CHECKS} == set(fs.READERS) == {fd.info(n).format for n in fd.names()}


@pytest.mark.parametrize('name', CHECKS)
def test_missing_on_the_server(web, tmp_path, name):
    d = served(web, name, tmp_path)
    last = d.files[-1].name
    del web.files[f'/{last}']
    with pytest.raises(ConnectionError, match=f'{last}.*404 Not Found'): fs.load(d, False, tmp_path/'cache')
    assert not [n for n in leftovers(tmp_path/'cache') if n.startswith(last)]


@pytest.mark.parametrize('name', CHECKS)
def test_wrong_checksum(load, tmp_path, name):
    with pytest.raises(ValueError, match='has not the checksum'): load(name, change=dict(checksum=sha(b'other')))
    assert leftovers(tmp_path/'cache') == []


@pytest.mark.parametrize('name', CHECKS)
def test_broken_line_goes_on(web, tmp_path, name):
    d = served(web, name, tmp_path)
    files = web.files
    for f in d.files: # each file breaks once
        files[f'/{f.name}'].cut = len(files[f'/{f.name}'].body)//2
        with pytest.raises(ConnectionError, match='calling this again goes on'): fs.load(d, False, tmp_path/'cache')
        files[f'/{f.name}'].cut = None
    CHECKS[name](fs.load(d, False, tmp_path/'cache'))
    ranges = [a for a, _ in web.asked if a]
    assert ranges == [f'bytes={len(files[f"/{f.name}"].body)//2}-' for f in d.files]
    for f in d.files: assert fd.checksum(tmp_path/'cache'/d.name/f.name) == sha(files[f'/{f.name}'].body)


TORN = [(n, f) for n, files in {'majewski_chignolin_ca': ['chignolin_ca_coords.npy', 'chignolin_ca_forces.npy',
    'chignolin_ca_deltaforces.npy', 'chignolin_ca_embeddings.npy'],
    'torchmd_chignolin': ['torchMD_tutorial_data.tar.gz'], 'majewski_chignolin': ['chignolin_trajectories.tar.gz'],
    'chignolin_forces': ['chignolin_forces_nowater.tar.gz'],
    'ala2_forces': ['alanine-dipeptide-1Mx1ps-with-force.npz'],
    'ala2_dihedrals': ['alanine-dipeptide-3x250ns-backbone-dihedrals.npz'],
    'doublewell_hmm': ['hmm-doublewell-2d-100k.npz'],
    'mdcath:1abcA00': ['mdcath_dataset_1abcA00.h5'], 'hp35_desres': ['hp35.dihs.shifted.bz2', 'hp35.mindists2.bz2'],
    'ala2_msmbuilder': ['ala2_msmbuilder.zip']}.items() for f in files]


@pytest.mark.parametrize('name, file', TORN)
@pytest.mark.parametrize('part', [0., 0.1, 0.6, 0.97])
def test_cut_file_is_named(load, tmp_path, name, file, part):
    "The server itself has only the beginning of a file."
    body = good(name, tmp_path)[file]
    with pytest.raises(ValueError, match=file): load(name, {file: body[:int(part*len(body))]})


@pytest.mark.parametrize('name, files, why', [
    ('majewski_chignolin_ca', {'chignolin_ca_forces.npy': npy(F[:29])}, r'forces.npy: has shape \(29, 10, 3\), but '
     r'the positions have \(30, 10, 3\)'),
    ('majewski_chignolin_ca', {'chignolin_ca_coords.npy': npy(X[:, :, :2])}, r'coords.npy: has shape .*\(frames, '
     r'atoms, 3\)'),
    ('majewski_chignolin_ca', {'chignolin_ca_coords.npy': npy(X[0])}, 'coords.npy: has shape'),
    ('majewski_chignolin_ca', {'chignolin_ca_coords.npy': npy(np.array(['a', 'b']))}, 'coords.npy.*not an array of '
     'numbers'),
    ('majewski_chignolin_ca', {'chignolin_ca_coords.npy': npy(np.array([{}]))}, 'coords.npy: cannot be read'),
    ('majewski_chignolin_ca', {'chignolin_ca_coords.npy': npz(X)}, 'coords.npy.*not an array of numbers'),
    ('majewski_chignolin_ca', {'chignolin_ca_embeddings.npy': npy(TYPES[:-1])}, 'embeddings.npy: has bead types.*10 '
     'beads'),
    ('majewski_chignolin_ca', {'chignolin_ca_embeddings.npy': npy(np.where(TYPES == 7, 18, TYPES))},
     r'embeddings.npy: \[18\] are no bead types'),
    ('ala2_forces', {'alanine-dipeptide-1Mx1ps-with-force.npz': npz(coordinates=X)}, 'with-force.npz: cannot be '
     'read:.*forces'),
    ('ala2_forces', {'alanine-dipeptide-1Mx1ps-with-force.npz': npz(coordinates=X, forces=F[:3])}, 'with-force.npz: '
     'has shape'),
    ('ala2_forces', {'alanine-dipeptide-1Mx1ps-with-force.npz': npz(coordinates=X[:, :9], forces=F[:, :9])},
     'al2.pdb: names 10 atoms, but the positions have 9'),
    ('ala2_forces', {'al2.pdb': b'no structure'}, 'al2.pdb: no topology can be read'),
    ('ala2_dihedrals', {'alanine-dipeptide-3x250ns-backbone-dihedrals.npz': npz(other=X)}, 'dihedrals.npz: cannot be '
     'read:.*trajectory'),
    ('ala2_dihedrals', {'alanine-dipeptide-3x250ns-backbone-dihedrals.npz': npz(ANGLES[:, :2], ANGLES[:, 0])},
     r'dihedrals.npz: arr_1 \(40,\)'),
    ('chignolin_forces', {'chignolin_forces_nowater.tar.gz': tar({'forces_nowater/chig_force_a.npy': npy(F[:9])})},
     None),
    ('hp35_desres', {'hp35.dihs.shifted.bz2': bz2.compress(text(ANGLES[:, :65]))}, 'dihs.shifted.bz2: has 65 columns, '
     'but 66'),
    ('hp35_desres', {'hp35.dihs.shifted.bz2': bz2.compress(text(ANGLES).rsplit(b' ', 1)[0])}, 'dihs.shifted.bz2: row '
     '40 of 40 has not 66 numbers'),
    ('hp35_desres', {'hp35.mindists2.bz2': bz2.compress(text(GAPS[:39]))},
     '40 frames of dihedrals, but 39 of distances'),
    ('hp35_desres', {'hp35.mindists2.bz2': bz2.compress(b'0.3 zero\n')}, 'mindists2.bz2: cannot be read'),
    ('hp35_desres', {'hp35.dihs.shifted.bz2': b'version https://git-lfs.github.com/spec/v1\n'}, 'dihs.shifted.bz2: '
     'cannot be read'),
    ('villin_rmsd', {'2f4k.CArmsd': b''}, '2f4k.CArmsd: has no lines'),
    ('villin_rmsd', {'2f4k.CArmsd': b'1 2.5\n\n3 2.6\n'}, '2f4k.CArmsd: cannot be read'),
    ('villin_rmsd', {'2f4k.CArmsd': b'1 nan\n'}, '2f4k.CArmsd: has no lines, or'),
    ('villin_rmsd', {'2f4k.CArmsd': b'404: Not Found\n'}, '2f4k.CArmsd: cannot be read'),
    ('pdb:2F4K', {'2F4K.pdb': b'<html>'}, '2F4K.pdb: no topology can be read'),
    ('ala2_msmbuilder', {'ala2_msmbuilder.zip': zipped({'README': b''})}, None)])
def test_bad_content_is_named(load, name, files, why):
    with pytest.raises(ValueError if why else FileNotFoundError, match=why or f'data set {name!r}'): load(name, files)


@pytest.mark.parametrize('change, why', [(dict(coords=None), 'coords'), (dict(forces=None), 'forces'),
                                         (dict(box=None), 'box'), (dict(forces=F[:3, :5]), r'has shape \(3, 5, 3\)'),
                                         (dict(coords=X[:, :4]), 'names 5 atoms, but the positions have 4')])
def test_bad_mdcath_is_named(load, tmp_path, change, why):
    with pytest.raises(ValueError, match=f'mdcath_dataset_1abcA00.h5: .*{why}'):
        load('mdcath:1abcA00', {'mdcath_dataset_1abcA00.h5': mdcath(tmp_path, **change)})


def test_mdcath_without_runs_is_named(load, tmp_path):
    with pytest.raises(ValueError, match='no group of a domain'):
        load('mdcath:1abcA00', {'mdcath_dataset_1abcA00.h5': mdcath(tmp_path, coords=None, forces=None, box=None)})


def test_mdcath_runs_come_in_order_and_by_choice(load, tmp_path):
    content = {'mdcath_dataset_1abcA00.h5': mdcath(tmp_path, ((450, 1), (320, 1), (450, 0), (320, 0)))}
    got = load('mdcath:1abcA00', content)
    assert [(r.temperature_kelvin, r.replica, len(r)) for r in got] == [(320., 0, 30), (320., 1, 30), (450., 0, 30),
                                                                        (450., 1, 30)]
    for r in got: np.testing.assert_allclose(r.xyz[3:5], X[3:5, :5] + (r.temperature_kelvin + r.replica)/10, rtol=1e-5)
    some = load('mdcath:1abcA00', content, temperatures=[450], replicas=[1])
    assert [(r.temperature_kelvin, r.replica) for r in some] == [(450., 1)]


def test_text_of_another_molecule_is_not_taken(load, tmp_path):
    with pytest.raises(ValueError, match='names 4 atoms, but the positions have 5'):
        load('mdcath:1abcA00', {'mdcath_dataset_1abcA00.h5': mdcath(tmp_path).replace(b'ATOM      5  ',
                                                                                      b'TER       5  ')})


def test_stride_and_atoms(load):
    whole = load('ala2_msmbuilder')
    thin = load('ala2_msmbuilder', stride=7, atoms='resid 2 5')
    for a, b in zip(whole, thin):
        close(b.xyz, a.xyz[::7, [2, 5]]), close(b.time, a.time[::7])


def test_damaged_trajectory_is_named(load, tmp_path):
    files = {'t-0.dcd': saved(chain(), 'dcd', tmp_path)[:-40], 'ala2.pdb': saved(chain(frames=1), 'pdb', tmp_path)}
    with pytest.raises(DamagedFile, match='t-0.dcd: frame 29'):
        load('ala2_msmbuilder', {'ala2_msmbuilder.zip': zipped(files)})


def test_water_is_left_out_of_the_topology(load, tmp_path):
    pdb = saved(chain(frames=1), 'pdb', tmp_path).decode()
    water = 'HETATM   11  O   HOH B  11       1.000   1.000   1.000  1.00  0.00           O  \n'
    check_frames(slice(None))(load('ala2_forces', {'al2.pdb': pdb.replace('TER', water + 'TER', 1).encode()}))


def test_text_is_read_once(load, tmp_path):
    load('hp35_desres')
    kept = tmp_path/'cache'/'hp35_desres'/'hp35.dihs.shifted.bz2.npy'
    written = kept.stat().st_mtime_ns
    got = load('hp35_desres')
    check_hp35(got)
    assert kept.stat().st_mtime_ns == written and isinstance(got['dihedrals'].values[0], np.memmap)


def test_series_without_a_last_newline_warns(load):
    with pytest.warns(UserWarning, match='the last line does not end'):
        load('villin_rmsd', {'2f4k.CArmsd': b'1 2.5\n2 2.'})


def test_restricted_set_warns(load):
    with pytest.warns(fd.LicenceNotice, match='hp35_desres.*no redistribution'): load('hp35_desres')


def test_unknown_names_and_options(load):
    with pytest.raises(KeyError, match='no data set'): fs.load('majewski_insulin')
    with pytest.raises(KeyError, match='no reader for the format'):
        fs.load(replace(fd.info('ala2'), format='punch cards'))


def test_options_are_checked_before_anything_is_fetched(web, tmp_path):
    for name, options in (('villin_rmsd', dict(stride=2)), ('mdcath:1abcA00', dict(temperature=[450]))):
        why = f'has no option {next(iter(options))}; it has (none|temperatures, replicas)'
        with pytest.raises(TypeError, match=why):
            fs.load(served(web, name, tmp_path), False, tmp_path/'cache', **options)
    assert not web.hits


def test_a_choice_that_is_not_there_is_named(load):
    for options in (dict(temperatures=[300]), dict(replicas=[0, 3])):
        with pytest.raises(ValueError, match='1abcA00.h5: has none of (temperatures=.300.|replicas=.0.); there are'):
            load('mdcath:1abcA00', **options)


def test_shipped_set_loads():
    got = fs.load('villin_go', False, stride=1000)
    assert [len(t) for t in got] == [10]*8 and got[0].n_atoms == 35
    np.testing.assert_allclose(np.diff(got[0].time), 6000.)
