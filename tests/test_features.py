"Features against mdtraj, deeptime and float64 formulas; broken files."
import mdtraj as md
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from foldbook import features as ft
from foldbook.bonds import ca_atoms, protein_atoms
from foldbook.structures import find_atoms, load_native, match_atoms, native_contacts

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
    return load_native(folder/'native.pdb')


@pytest.fixture(scope='module')
def shaken(native, folder):
    noise = np.random.default_rng(1).normal(0, 0.05, (150, native.n_atoms, 3))
    t = md.Trajectory((native.xyz + noise).astype(np.float32), native.topology)
    t.save_xtc(str(folder/'shaken.xtc'))
    return md.load(str(folder/'shaken.xtc'), top=native.topology)


def beads(t): return t.atom_slice(ca_atoms(t.topology))


ORACLES = {
    'phi': lambda t, n: (lambda a: np.hstack([np.cos(a), np.sin(a)]))(md.compute_phi(t, periodic=False)[1]),
    'psi': lambda t, n: (lambda a: np.hstack([np.cos(a), np.sin(a)]))(md.compute_psi(t, periodic=False)[1]),
    'omega': lambda t, n: (lambda a: np.hstack([np.cos(a), np.sin(a)]))(md.compute_omega(t, periodic=False)[1]),
    'RMSD': lambda t, n: md.rmsd(beads(t), beads(n))[:, None],
    'Rg': lambda t, n: md.compute_rg(beads(t))[:, None],
    'SASA': lambda t, n: np.array([md.shrake_rupley(x).sum() for x in t])[:, None],
    'secondary_structure': lambda t, n: (lambda s: np.c_[(s == 'H').mean(1), (s == 'E').mean(1)])(md.compute_dssp(t,
        simplified=True)),
    'ca_distances': lambda t, n: md.compute_contacts(t, [(i, j) for i in range(14) for j in range(i+3, 14)],
                                                     scheme='ca', periodic=False)[0],
    'heavy_distances': lambda t, n: md.compute_contacts(t, native_contacts(n), scheme='closest-heavy',
                                                        periodic=False)[0],
    'coordinates': lambda t, n: beads(t).superpose(beads(n)).xyz.reshape(len(t), -1),
    'end_to_end': lambda t, n: md.compute_contacts(t, [(0, 13)], scheme='ca', periodic=False)[0],
    'chi': lambda t, n: (lambda a: np.hstack([np.cos(a),
                                              np.sin(a)]))(np.hstack([f(t, periodic=False)[1]
                                                  for f in (md.compute_chi1, md.compute_chi2, md.compute_chi3,
                                                            md.compute_chi4)])),
}


@pytest.mark.parametrize('name', ORACLES)
def test_against_mdtraj(name, shaken, native):
    few = shaken[:20]
    found, wanted = ft.named(name, native)(few), ORACLES[name](few, native)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_fraction_native_against_float64(shaken, native):
    pairs, x, x0 = native_contacts(native), beads(shaken).xyz.astype(float), beads(native).xyz[0].astype(float)
    d = np.linalg.norm(x[:, pairs[:, 0]] - x[:, pairs[:, 1]], axis=2)
    d0 = np.linalg.norm(x0[pairs[:, 0]] - x0[pairs[:, 1]], axis=1)
    np.testing.assert_allclose(ft.fraction_native(native)(shaken)[:, 0], (d < 1.2*d0).mean(1), atol=1e-6)
    soft = ft.contacts(native)(shaken)
    np.testing.assert_allclose(soft, np.exp(-np.maximum(d - d0, 0)**2/0.02), atol=2e-5)
    np.testing.assert_allclose(ft.soft_fraction_native(native, pairs)(shaken)[:, 0],
                               (1/(1 + np.exp(50*(d - 1.2*d0)))).mean(1), atol=2e-5)


def test_pseudo_angles_against_float64(shaken, native):
    b = np.diff(beads(shaken).xyz.astype(float), axis=1)
    cosine = -(b[:, 1:]*b[:, :-1]).sum(2)/np.linalg.norm(b[:, 1:], axis=2)/np.linalg.norm(b[:, :-1], axis=2)
    np.testing.assert_allclose(ft.pseudo_angles(native)(shaken), np.arccos(cosine), atol=1e-5)
    n = np.cross(b[:, :-1], b[:, 1:])
    c = (n[:, 1:]*n[:, :-1]).sum(2)/np.linalg.norm(n[:, 1:], axis=2)/np.linalg.norm(n[:, :-1], axis=2)
    np.testing.assert_allclose(ft.pseudo_dihedrals(native)(shaken)[:, :11], c, atol=2e-5)


def test_beads_and_atoms_agree(shaken, native):
    pairs = native_contacts(native)
    wanted = ft.default(native, pairs)
    found = ft.default(beads(native), pairs)
    assert found.features.names == wanted.features.names
    np.testing.assert_allclose(found(beads(shaken)), wanted(shaken), atol=1e-6)
    for name in ('SASA', 'secondary_structure', 'heavy_distances', 'phi'):
        with pytest.raises(ValueError, match='C-alpha'): ft.named(name, beads(native))


@given(st.lists(st.sampled_from(sorted(set(ft.FEATURIZERS) - {'SASA'})), min_size=1, max_size=4), st.integers(1, 200))
@settings(deadline=None, max_examples=6)
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
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False,
                      dashboard_address=None) as cluster, Client(cluster) as client:
        ours, _ = ft.stream(files, folder/'native.pdb', ft.default(native), client=client)
    plain, _ = ft.stream(files, folder/'native.pdb', ft.default(native), progress=False)
    np.testing.assert_array_equal(ours, plain)


def broken(t, how):
    t = md.Trajectory(t.xyz.copy(), t.topology)
    if how == 'nan': t.xyz[7, 3] = np.nan
    if how == 'angstrom': t.xyz *= 10
    if how == 'split': t.xyz[9, ca_atoms(t.topology)[5]] += 20
    return t


@pytest.mark.parametrize('how, message', [('nan', 'frame 7, atom ALA1-O.*not a number'),
    ('angstrom', 'divide them by 10'), ('split', 'frame 9.*split across the box')])
def test_bad_coordinates_are_named(how, message, folder, native, shaken):
    path = folder/f'{how}.dcd'
    broken(shaken, how).save_dcd(str(path))
    with pytest.raises(ValueError, match=f'{how}.dcd.*{message}'):
        ft.stream(path, folder/'native.pdb', ft.fraction_native(native), chunk=5 if how == 'split' else 1000,
                  progress=False)


def test_wrong_topology_and_truncated_files(folder, native, shaken):
    beads(shaken).save_xtc(str(folder/'beads.xtc'))
    with pytest.raises(ValueError, match='beads.xtc'):
        ft.stream(folder/'beads.xtc', folder/'native.pdb', ft.fraction_native(native), progress=False)
    whole = (folder/'shaken.xtc').read_bytes()
    (folder/'cut.xtc').write_bytes(whole[:len(whole)*2//3])
    with pytest.raises(ValueError, match='cut.xtc'):
        ft.stream(folder/'cut.xtc', folder/'native.pdb', ft.fraction_native(native), progress=False)
    with pytest.raises(FileNotFoundError, match='none.xtc'):
        ft.stream(folder/'none.xtc', folder/'native.pdb', ft.fraction_native(native), progress=False)
    other = native.atom_slice([a.index for a in native.topology.atoms if a.residue.index < 9])
    with pytest.raises(ValueError, match='not the same protein'):
        ft.stream(folder/'shaken.xtc', folder/'native.pdb', ft.rmsd(other), progress=False)


def test_other_faults(native):
    with pytest.raises(KeyError, match='Q_soft'):
        (ft.fraction_native(native) + ft.soft_fraction_native(native)).features.index('Q_sotf')
    with pytest.raises(ValueError, match='unknown dihedrals'): ft.dihedrals(native, ('alpha',))
    with pytest.raises(ValueError, match='C-alpha'): ca_atoms(native.atom_slice([0, 2, 3]).topology)
    spread = md.Trajectory(native.xyz*100, native.topology)
    with pytest.raises(ValueError, match='no native contact'): native_contacts(spread)
    with pytest.raises(FileNotFoundError, match='nothing.pdb'): load_native('nothing.pdb')


def test_water_and_ions_are_left_out(native):
    top = native.topology.copy()
    chain = top.add_chain()
    top.add_atom('O', md.element.oxygen, top.add_residue('HOH', chain))
    top.add_atom('CA', md.element.calcium, top.add_residue('CA', chain))
    wet = md.Trajectory(np.concatenate([native.xyz, np.zeros((1, 2, 3))], 1), top)
    np.testing.assert_array_equal(protein_atoms(top), np.arange(native.n_atoms))
    np.testing.assert_allclose(ft.rmsd(native)(wet), 0, atol=1e-3)


def test_smooth_fraction_against_the_formula(shaken, native):
    "Every pair of heavy atoms, one by one, in float64."
    heavy = [a for a in native.topology.atoms if a.element.symbol != 'H']
    x, x0, terms = shaken.xyz.astype(float), native.xyz[0].astype(float), []
    for i, a in enumerate(heavy):
        for b in heavy[i+1:]:
            r0 = np.linalg.norm(x0[a.index] - x0[b.index])
            if abs(a.residue.index - b.residue.index) > 3 and r0 < 0.45:
                terms.append(1/(1 + np.exp(50*(np.linalg.norm(x[:, a.index] - x[:, b.index], axis=1) - 1.8*r0))))
    np.testing.assert_allclose(ft.soft_fraction_native(native)(shaken)[:, 0], np.mean(terms, 0), atol=2e-6)


def test_soft_and_hard_heavy_contacts(shaken, native):
    pairs = native_contacts(native)
    d = md.compute_contacts(shaken, pairs, scheme='closest-heavy', periodic=False)[0].astype(float)
    np.testing.assert_array_equal(ft.heavy_contacts(native)(shaken), d < 0.45)
    np.testing.assert_allclose(ft.heavy_contacts(native, width=0.1)(shaken), np.exp(-np.maximum(d - 0.45, 0)**2/0.02),
                               atol=1e-5)
    with pytest.raises(ValueError, match='C-alphas only'): ft.heavy_contacts(beads(native))


def test_q_is_that_of_the_model():
    from foldbook.data import fetch
    from foldbook.go import native_fraction, shipped_model
    villin, model = fetch('villin_go', progress=False), shipped_model('villin_go')
    t = md.load(str(villin.trajectories[0]), top=model.native, stride=5)
    wanted = native_fraction(model, t.xyz)
    for native in (villin.topology, model):
        found = ft.named('Q', native)(t)[:, 0]
        # one contact at the very limit, positions being rounded
        assert abs(found - wanted).max() < 1.5/75 and (abs(found - wanted) > 1e-6).mean() < 0.01


def shuffled(t, seed=0):
    "The same molecule with the atoms of each residue in another order, under the names of another force field."
    rng, top, order = np.random.default_rng(seed), md.Topology(), []
    chain = top.add_chain()
    for r in t.topology.residues:
        new = top.add_residue(r.name, chain, r.resSeq)
        for i in rng.permutation([a.index for a in r.atoms]):
            a = t.topology.atom(int(i))
            top.add_atom({'OXT': 'OT2'}.get(a.name, 'CD' if (r.name, a.name) == ('ILE', 'CD1') else a.name), a.element,
                         new)
            order.append(i)
    return md.Trajectory(t.xyz[:, order], top)


def test_order_and_names_of_atoms_do_not_matter(shaken, native):
    f = ft.named('default + phi + psi + chi + heavy_distances + coordinates + Q_soft', native)
    other = shuffled(shaken)
    np.testing.assert_allclose(f(other), f(shaken), atol=1e-5)
    index = match_atoms(native.topology, other.topology)
    np.testing.assert_array_equal(other.xyz[:, index], shaken.xyz)
    assert f.describe(other.topology) == f.features


def test_only_what_is_needed_must_be_there(shaken, native):
    some = shaken.atom_slice([a.index for a in native.topology.atoms if a.name in ('N', 'CA', 'C', 'O')])
    f = ft.named('default + phi + psi', native)
    np.testing.assert_allclose(f(some), f(shaken), atol=1e-5)
    with pytest.raises(ValueError, match='ALA1-CB'): ft.named('Q + heavy_distances', native).describe(some.topology)
    mutant = shaken[0].atom_slice(np.arange(shaken.n_atoms))
    next(r for r in mutant.topology.residues if r.name == 'TRP').name = 'GLY'
    with pytest.raises(ValueError, match='GLY8 of the trajectory is TRP8'): f(mutant)


@pytest.mark.parametrize('extension', ['xtc', 'trr', 'dcd', 'nc'])
@given(st.floats(0.02, 0.98))
@settings(deadline=None, max_examples=6)
def test_cut_files_are_named(extension, folder, native, shaken, part):
    whole, cut = folder/f'whole.{extension}', folder/f'cut.{extension}'
    if not whole.exists(): shaken.save(str(whole))
    data = whole.read_bytes()
    size = int(part*len(data)) # whole frames only are no damage
    if extension == 'trr': assume(size % (len(data)//150))
    if extension == 'dcd': assume((len(data) - size) % (12*native.n_atoms + 24))
    if extension == 'xtc':
        with md.open(str(whole)) as f: assume(size not in f.offsets)
    cut.write_bytes(data[:size])
    with pytest.raises(ValueError, match=f'cut.{extension}: frame [0-9]+.*(cut short|damaged)') as e:
        ft.stream(cut, folder/'native.pdb', ft.fraction_native(native), chunk=40, progress=False)
    frame = int(str(e.value).split('frame ')[1].split(':')[0].split()[0])
    assert abs(frame - part*len(shaken)) < 3 or extension == 'nc' # netCDF cannot be opened at all


def test_whole_frames_of_a_cut_file_can_be_used(folder, native, shaken):
    data = (folder/'shaken.xtc').read_bytes()
    (folder/'cut2.xtc').write_bytes(data[:len(data)//2])
    f = ft.default(native)
    with pytest.warns(UserWarning, match='cut2.xtc: frame 7[0-9]'):
        (x,), _ = ft.stream(folder/'cut2.xtc', folder/'native.pdb', f, chunk=50, damaged='skip', progress=False)
    np.testing.assert_allclose(x, f(shaken)[:len(x)], atol=1e-5)
    assert 70 < len(x) < 76


def test_damaged_frames_are_counted(folder, native, shaken):
    t = broken(shaken, 'nan')
    t.xyz[20, 3:5], t.xyz[60] = np.inf, np.nan
    t.save_netcdf(str(folder/'three.nc'))
    f = ft.default(native)
    with pytest.warns(UserWarning, match='frame 7, atom'):
        x, described = ft.stream([folder/'three.nc', folder/'shaken.xtc'], folder/'native.pdb', f, damaged='skip',
                                 progress=False)
    assert described.skipped == (3, 0) and ft.Features.from_json(described.to_json()) == described
    np.testing.assert_allclose(x[0], f(shaken)[np.setdiff1d(np.arange(150), (7, 20, 60))], atol=1e-5)
    with pytest.raises(ValueError, match='choose one of raise, skip'):
        ft.stream([folder/'three.nc'], native, f, damaged='ignore')


@given(st.integers(1, 30), st.integers(1, 60))
@settings(deadline=None, max_examples=10)
def test_stride_and_chunk(folder, native, shaken, stride, chunk):
    f, seen = ft.rmsd(native), []
    spy = ft.replace(f, compute=lambda t: seen.append(len(t)) or f.compute(t))
    (x,), _ = ft.stream(folder/'shaken.xtc', native, spy, chunk=chunk, stride=stride, progress=False)
    np.testing.assert_allclose(x, f(shaken)[::stride], atol=1e-5)
    assert max(seen) <= chunk


def test_excerpt_of_a_dcd_is_no_damage(folder, native, shaken):
    shaken.save_dcd(str(folder/'excerpt.dcd'))
    data = bytearray((folder/'excerpt.dcd').read_bytes())
    data[8:12] = (1000).to_bytes(4, 'little')
    (folder/'excerpt.dcd').write_bytes(data)
    with pytest.warns(UserWarning, match='promises 1000 frames, the file has 150'):
        (x,), _ = ft.stream(folder/'excerpt.dcd', native, ft.rmsd(native), progress=False)
    assert len(x) == 150


@pytest.mark.parametrize('factor, message', [(10, 'look like ångströms; divide them by 10'),
    (0.1, 'divided by 10 once too often'), (0, 'divided by 10 once too often')])
@pytest.mark.parametrize('atoms', ['all', 'beads', 'two'])
def test_units(folder, native, shaken, factor, message, atoms):
    top = native.topology
    keep = {'all': np.arange(native.n_atoms), 'beads': ca_atoms(top),
            'two': [a.index for a in top.atoms if a.residue.index < 2]}[atoms]
    t = md.Trajectory(shaken.xyz[:, keep]*factor, top.subset(keep))
    t.save_xtc(str(folder/'units.xtc'))
    f = ft.radius_of_gyration(t)
    with pytest.raises(ValueError, match=f'units.xtc: frame 0, atom [A-Z0-9]+-CA?.*{message}'):
        ft.stream(folder/'units.xtc', t, f, progress=False)


def test_stripped_trajectory_with_the_topology_of_the_wet_one(folder, native, shaken):
    top = native.topology.copy()
    chain = top.add_chain()
    for _ in range(5): top.add_atom('O', md.element.oxygen, top.add_residue('HOH', chain))
    with pytest.warns(UserWarning, match='as many as the protein alone'):
        (x,), _ = ft.stream(folder/'shaken.xtc', top, ft.rmsd(native), progress=False)
    np.testing.assert_allclose(x, ft.rmsd(native)(shaken), atol=1e-5)
    wet = md.Trajectory(np.concatenate([shaken.xyz, np.ones((150, 5, 3))], 1), top)
    wet.save_xtc(str(folder/'wet.xtc'))
    with pytest.raises(ValueError, match='has 125 atoms, the topology 120'):
        ft.fitting_topology(folder/'wet.xtc', native.topology)
    (y,), _ = ft.stream(folder/'wet.xtc', wet, ft.named('default', wet[0]), progress=False)
    assert y.shape[0] == 150


def dimer(t):
    "Two copies side by side."
    top = t.topology.join(t.topology)
    return md.Trajectory(np.concatenate([t.xyz, t.xyz + np.float32([1.6, 0, 0])], 1), top,
                         unitcell_lengths=np.full((len(t), 3), 5.), unitcell_angles=np.full((len(t), 3), 90.))


def test_two_chains_and_the_box(folder, native, shaken):
    two, moving = dimer(native), dimer(shaken)
    two.save_pdb(str(folder/'two.pdb'))
    f = ft.named('default + pseudo_dihedrals + phi', folder/'two.pdb')
    assert {'end_to_end d A:ALA1-A:ARG14', 'end_to_end d B:ALA1-B:ARG14'} <= set(f.features.names)
    assert len(f.features.names) == len(set(f.features.names))
    assert sum(n.startswith('cos theta') for n in f.features.names) == 2*11 # none across the gap
    moving.save_xtc(str(folder/'two.xtc'))
    (x,), _ = ft.stream(folder/'two.xtc', folder/'two.pdb', f, progress=False)
    wrapped = md.Trajectory((moving.xyz + 4.4) % 5., moving.topology, unitcell_lengths=moving.unitcell_lengths,
                            unitcell_angles=moving.unitcell_angles)
    wrapped.save_xtc(str(folder/'wrapped.xtc'))
    with pytest.raises(ValueError, match='wrapped.xtc: frame 0.*split across the box'):
        ft.stream(folder/'wrapped.xtc', folder/'two.pdb', f, progress=False)
    (y,), _ = ft.stream(folder/'wrapped.xtc', folder/'two.pdb', f, periodic=True, progress=False)
    np.testing.assert_allclose(x, y, atol=0.03) # xtc keeps 0.001 nm
    with pytest.raises(ValueError, match='none in this file|has none'):
        ft.stream(folder/'shaken.xtc', native, ft.rmsd(native), periodic=True, progress=False)


def test_coinciding_atoms_do_not_end_the_process(native):
    t = md.Trajectory(native.xyz.copy(), native.topology)
    t.xyz[0, 7] = t.xyz[0, 30]
    with pytest.raises(ValueError, match='same place'): ft.surface_area(native)(t)


def test_more_faults(folder, native, shaken):
    f = ft.rmsd(native)
    (folder/'empty.xtc').write_bytes(b'')
    (folder/'text.dcd').write_text('not a trajectory')
    for name in ('empty.xtc', 'text.dcd'):
        with pytest.raises(ValueError, match=f'{name}: frame 0'): ft.stream(folder/name, native, f, progress=False)
    with pytest.raises(FileNotFoundError, match='none.pdb'): ft.stream(folder/'shaken.xtc', 'none.pdb', f)
    with pytest.raises(ValueError, match='no topology can be read'):
        ft.stream(folder/'shaken.xtc', folder/'shaken.xtc', f)
    with pytest.raises(ValueError, match='must be at least 1'): ft.stream(folder/'shaken.xtc', native, f, stride=0)
    with pytest.raises(ValueError, match='no trajectory file'): ft.stream([], native, f)
    with pytest.raises(ValueError, match='names a residue that is not there'): ft.fraction_native(native, [[0, 14]])
    with pytest.raises(ValueError, match='residue pairs are needed'): ft.ca_distances(native, [0, 5])
    with pytest.raises(ValueError, match='three are needed'):
        ft.rmsd(native.atom_slice(ca_atoms(native.topology)[:2]))
    with pytest.raises(ValueError, match='4 residues'):
        ft.pseudo_dihedrals(native.atom_slice(ca_atoms(native.topology)[:3]))
    with pytest.raises(ValueError, match='not a structure'): load_native(folder/'shaken.xtc')
    with pytest.raises(KeyError, match="no atom 'LEU99-CA'"): find_atoms(native.topology, ('LEU2-CA', 'LEU99-CA'))


def test_a_sum_is_a_featurizer_again(native):
    both = ft.fraction_native(native) + ft.rmsd(native)
    assert isinstance(both, ft.Featurizer) and both.features.names == ('Q', 'RMSD')
    np.testing.assert_allclose(both(native), [[1, 0]], atol=1e-3)
