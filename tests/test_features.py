"Features against mdtraj, deeptime and float64 formulas; broken files."
import mdtraj as md
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldbook import features as ft

SEQUENCE = 'ALKEIFKWLKEAGR'


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('peptide')


@pytest.fixture(scope='module')
def native(folder):
    import Bio.PDB
    import PeptideBuilder
    s = PeptideBuilder.make_structure(SEQUENCE, [-57]*len(SEQUENCE), [-47]*(len(SEQUENCE) - 1))
    PeptideBuilder.add_terminal_OXT(s)
    out = Bio.PDB.PDBIO()
    out.set_structure(s)
    out.save(str(folder/'native.pdb'))
    return ft.load_native(folder/'native.pdb')


@pytest.fixture(scope='module')
def shaken(native, folder):
    noise = np.random.default_rng(1).normal(0, 0.05, (150, native.n_atoms, 3))
    t = md.Trajectory((native.xyz + noise).astype(np.float32), native.topology)
    t.save_xtc(str(folder/'shaken.xtc'))
    return md.load(str(folder/'shaken.xtc'), top=native.topology)


def beads(t): return t.atom_slice(ft.ca_atoms(t.topology))


ORACLES = {
    'phi': lambda t, n: (lambda a: np.hstack([np.cos(a), np.sin(a)]))(md.compute_phi(t, periodic=False)[1]),
    'psi': lambda t, n: (lambda a: np.hstack([np.cos(a), np.sin(a)]))(md.compute_psi(t, periodic=False)[1]),
    'omega': lambda t, n: (lambda a: np.hstack([np.cos(a), np.sin(a)]))(md.compute_omega(t, periodic=False)[1]),
    'RMSD': lambda t, n: md.rmsd(beads(t), beads(n))[:, None],
    'Rg': lambda t, n: md.compute_rg(beads(t))[:, None],
    'SASA': lambda t, n: np.array([md.shrake_rupley(x).sum() for x in t])[:, None],
    'secondary_structure': lambda t, n: (lambda s: np.c_[(s == 'H').mean(1), (s == 'E').mean(1)])(md.compute_dssp(t, simplified=True)),
    'ca_distances': lambda t, n: md.compute_contacts(t, [(i, j) for i in range(14) for j in range(i+3, 14)], scheme='ca', periodic=False)[0],
    'heavy_distances': lambda t, n: md.compute_contacts(t, ft.native_contacts(n), scheme='closest-heavy', periodic=False)[0],
    'coordinates': lambda t, n: beads(t).superpose(beads(n)).xyz.reshape(len(t), -1),
    'end_to_end': lambda t, n: md.compute_contacts(t, [(0, 13)], scheme='ca', periodic=False)[0],
    'chi': lambda t, n: (lambda a: np.hstack([np.cos(a), np.sin(a)]))(np.hstack([f(t, periodic=False)[1] for f in (md.compute_chi1, md.compute_chi2, md.compute_chi3, md.compute_chi4)])),
}


@pytest.mark.parametrize('name', ORACLES)
def test_against_mdtraj(name, shaken, native):
    found, wanted = ft.named(name, native)(shaken), ORACLES[name](shaken, native)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_fraction_native_against_float64(shaken, native):
    pairs, x, x0 = ft.native_contacts(native), beads(shaken).xyz.astype(float), beads(native).xyz[0].astype(float)
    d = np.linalg.norm(x[:, pairs[:, 0]] - x[:, pairs[:, 1]], axis=2)
    d0 = np.linalg.norm(x0[pairs[:, 0]] - x0[pairs[:, 1]], axis=1)
    np.testing.assert_allclose(ft.fraction_native(native)(shaken)[:, 0], (d < 1.2*d0).mean(1), atol=1e-6)
    soft = ft.contacts(native)(shaken)
    np.testing.assert_allclose(soft, np.exp(-np.maximum(d - d0, 0)**2/0.02), atol=2e-5)
    np.testing.assert_allclose(ft.soft_fraction_native(native, pairs)(shaken)[:, 0], (1/(1 + np.exp(50*(d - 1.2*d0)))).mean(1), atol=2e-5)


def test_pseudo_angles_against_float64(shaken, native):
    b = np.diff(beads(shaken).xyz.astype(float), axis=1)
    cosine = -(b[:, 1:]*b[:, :-1]).sum(2)/np.linalg.norm(b[:, 1:], axis=2)/np.linalg.norm(b[:, :-1], axis=2)
    np.testing.assert_allclose(ft.pseudo_angles(native)(shaken), np.arccos(cosine), atol=1e-5)
    n = np.cross(b[:, :-1], b[:, 1:])
    c = (n[:, 1:]*n[:, :-1]).sum(2)/np.linalg.norm(n[:, 1:], axis=2)/np.linalg.norm(n[:, :-1], axis=2)
    np.testing.assert_allclose(ft.pseudo_dihedrals(native)(shaken)[:, :11], c, atol=2e-5)


def test_tica_of_deeptime_takes_our_arrays(shaken, native):
    from deeptime.decomposition import TICA
    x = (ft.ca_distances(native) + ft.rmsd(native))(shaken)
    y = TICA(lagtime=1, dim=1).fit_fetch(x.astype(float)).transform(x.astype(float))
    ours = md.compute_contacts(shaken, [(i, j) for i in range(14) for j in range(i+3, 14)], scheme='ca', periodic=False)[0]
    ours = np.c_[ours, md.rmsd(beads(shaken), beads(native))].astype(float)
    reference = TICA(lagtime=1, dim=1).fit_fetch(ours).transform(ours)
    np.testing.assert_allclose(np.abs(np.corrcoef(y[:, 0], reference[:, 0])[0, 1]), 1, atol=1e-6)


def test_beads_and_atoms_agree(shaken, native):
    pairs = ft.native_contacts(native)
    wanted = ft.default(native, pairs)
    found = ft.default(beads(native), pairs)
    assert found.features.names == wanted.features.names
    np.testing.assert_allclose(found(beads(shaken)), wanted(shaken), atol=1e-6)
    for name in ('SASA', 'secondary_structure', 'heavy_distances', 'phi'):
        with pytest.raises(ValueError, match='C-alpha'): ft.named(name, beads(native))


@given(st.lists(st.sampled_from(sorted(ft.FEATURIZERS)), min_size=1, max_size=4), st.integers(1, 200))
@settings(deadline=None, max_examples=15)
def test_sums_and_chunks(folder, native, shaken, names, chunk):
    whole = ft.named(' + '.join(names), native)
    (x,), described = ft.stream(folder/'shaken.xtc', folder/'native.pdb', whole, chunk=chunk, progress=False)
    assert len(described) == x.shape[1] == len(described.units) == len(described.atoms) and x.dtype == np.float32
    for n in names:
        one = ft.named(n, native)
        np.testing.assert_allclose(x[:, described.select(one.features.names)], one(shaken), atol=1e-5)
    assert len(set(described.names)) == len(described)
    assert ft.Features.from_json(described.to_json()) == described


def test_client_and_several_files(folder, native, shaken):
    from distributed import Client, LocalCluster
    files = [folder/'shaken.xtc']*2
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster, Client(cluster) as client:
        ours, _ = ft.stream(files, folder/'native.pdb', ft.default(native), client=client)
    plain, _ = ft.stream(files, folder/'native.pdb', ft.default(native), progress=False)
    np.testing.assert_array_equal(ours, plain)


def broken(t, how):
    t = md.Trajectory(t.xyz.copy(), t.topology)
    if how == 'nan': t.xyz[7, 3] = np.nan
    if how == 'angstrom': t.xyz *= 10
    if how == 'split': t.xyz[9, ft.ca_atoms(t.topology)[5]] += 20
    return t


@pytest.mark.parametrize('how, message', [('nan', 'frame 7, atom ALA1-O.*not a number'), ('angstrom', 'divide them by 10'), ('split', 'frame 9.*split across the box')])
def test_bad_coordinates_are_named(how, message, folder, native, shaken):
    path = folder/f'{how}.dcd'
    broken(shaken, how).save_dcd(str(path))
    with pytest.raises(ValueError, match=f'{how}.dcd.*{message}'):
        ft.stream(path, folder/'native.pdb', ft.fraction_native(native), chunk=5 if how == 'split' else 1000, progress=False)


def test_wrong_topology_and_truncated_files(folder, native, shaken):
    beads(shaken).save_xtc(str(folder/'beads.xtc'))
    with pytest.raises(ValueError, match='beads.xtc'): ft.stream(folder/'beads.xtc', folder/'native.pdb', ft.fraction_native(native), progress=False)
    whole = (folder/'shaken.xtc').read_bytes()
    (folder/'cut.xtc').write_bytes(whole[:len(whole)*2//3])
    with pytest.raises(ValueError, match='cut.xtc'): ft.stream(folder/'cut.xtc', folder/'native.pdb', ft.fraction_native(native), progress=False)
    with pytest.raises(FileNotFoundError, match='none.xtc'): ft.stream(folder/'none.xtc', folder/'native.pdb', ft.fraction_native(native), progress=False)
    other = native.atom_slice([a.index for a in native.topology.atoms if a.residue.index < 9])
    with pytest.raises(ValueError, match='not the same protein'): ft.stream(folder/'shaken.xtc', folder/'native.pdb', ft.rmsd(other), progress=False)


def test_other_faults(native):
    with pytest.raises(KeyError, match='Q_soft'): (ft.fraction_native(native) + ft.soft_fraction_native(native)).features.index('Q_sotf')
    with pytest.raises(ValueError, match='unknown dihedrals'): ft.dihedrals(native, ('alpha',))
    with pytest.raises(ValueError, match='C-alpha'): ft.ca_atoms(native.atom_slice([0, 2, 3]).topology)
    spread = md.Trajectory(native.xyz*100, native.topology)
    with pytest.raises(ValueError, match='no native contact'): ft.native_contacts(spread)
    with pytest.raises(FileNotFoundError, match='nothing.pdb'): ft.load_native('nothing.pdb')


def test_water_and_ions_are_left_out(native):
    top = native.topology.copy()
    chain = top.add_chain()
    top.add_atom('O', md.element.oxygen, top.add_residue('HOH', chain))
    top.add_atom('CA', md.element.calcium, top.add_residue('CA', chain))
    wet = md.Trajectory(np.concatenate([native.xyz, np.zeros((1, 2, 3))], 1), top)
    np.testing.assert_array_equal(ft.protein_atoms(top), np.arange(native.n_atoms))
    np.testing.assert_allclose(ft.rmsd(native)(wet), 0, atol=1e-3)
