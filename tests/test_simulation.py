"The structure-based model against plain numpy, other structures, killed processes, shooting."
import json, os, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import mdtraj as md
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import foldbook.simulation as fs
from foldbook.simulation import GoModel

HELIX, TURN, STRAND = (-57, -47), (60, 40), (-120, 130)


def build(path, phi_psi):
    "A chain of alanines with the given backbone dihedrals (degrees)."
    from PeptideBuilder import Geometry, add_residue, initialize_res
    import Bio.PDB
    chain = None
    for phi, psi in phi_psi:
        g = Geometry.AlaGeo()
        g.phi, g.psi_im1 = phi, psi
        chain = initialize_res(g) if chain is None else add_residue(chain, g)
    io = Bio.PDB.PDBIO()
    io.set_structure(chain)
    io.save(str(path))
    return path


@pytest.fixture(scope='session')
def hth(tmp_path_factory): return build(tmp_path_factory.mktemp('pdb')/'hth.pdb', [HELIX]*9 + [TURN]*3 + [HELIX]*9)


@pytest.fixture(scope='session')
def model(hth): return GoModel.from_pdb(hth)


def numpy_energy(m, x):
    "Every term of the energy, written out."
    r, theta, phi = fs.internal_coordinates(x)
    r0, theta0, phi0 = fs.internal_coordinates(m.xyz)
    k1, k3 = m.dihedral_constants
    d = phi - phi0
    e = [m.bond_constant/2*((r - r0)**2).sum(), m.angle_constant/2*((theta - theta0)**2).sum(),
         (k1*(1 - np.cos(d)) + k3*(1 - np.cos(3*d))).sum()]
    i, j = m.contacts.T
    length, l0 = np.linalg.norm(x[i] - x[j], axis=1), m.contact_lengths
    e.append(m.contact_energy*(5*(l0/length)**12 - 6*(l0/length)**10).sum())
    native = set(map(tuple, m.contacts.tolist()))
    e.append(sum(m.contact_energy*(m.core_radius/np.linalg.norm(x[a] - x[b]))**12 for a in range(len(x))
                 for b in range(a+4, len(x)) if (a, b) not in native))
    s = np.where(length < l0, 1, np.exp(-(length - l0)**2/(2*m.switch_width**2)))
    e.append(-m.cooperativity*m.contact_energy*len(l0)*s.mean()**2)
    return np.array(e)


def shaken(m, seed, scale=0.03): return m.xyz + np.random.default_rng(seed).normal(scale=scale, size=m.xyz.shape)


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 10_000), st.floats(0.005, 0.05))
def test_energy_is_what_the_formula_says(model, seed, scale):
    x = shaken(model, seed, scale)
    assert np.allclose(fs.energies(model, x[None])[0], numpy_energy(model, x), rtol=1e-6, atol=1e-6)


def test_forces_are_the_slope(model):
    "OpenMM's force, the cooperative term included, against central differences of the numpy energy."
    x, h = shaken(model, 3), 1e-6
    context = model.context(100.0, 1)
    context.setPositions(x)
    for groups, terms in (({5}, [5]), (set(range(6)), range(6))):
        f = context.getState(getForces=True, groups=groups).getForces(asNumpy=True)._value
        slope = np.zeros_like(x)
        for idx in np.ndindex(x.shape):
            dx = np.zeros_like(x)
            dx[idx] = h
            slope[idx] = (numpy_energy(model, x + dx) - numpy_energy(model, x - dx))[list(terms)].sum()/(2*h)
        assert np.abs(f + slope).max() < 2e-4*max(1, np.abs(f).max())
    assert abs(fs.cooperative_force(model).getNumCollectiveVariables()) == 1
    assert [len(fs.local_forces(model)), len(fs.pair_forces(model))] == [3, 2]


def test_helix_turn_helix_is_recognised(model):
    top = model.native.topology
    assert (top.n_atoms, top.n_residues, top.n_bonds) == (21, 21, 20)
    assert model.native.xyz.shape == (1, 21, 3) and model.system().getNumParticles() == 21
    assert {4} < set(np.diff(model.contacts)[:, 0])
    assert np.allclose(fs.internal_coordinates(model.xyz)[0], 0.38, atol=0.005)


def test_only_one_whole_chain_is_kept(hth, tmp_path):
    "Alternate places, hydrogens, waters, ions called CA, a modified residue, a second model and a second chain."
    atoms = [l for l in hth.read_text().splitlines() if l.startswith('ATOM')]
    atoms = [l.replace('ATOM  ', 'HETATM').replace('ALA', 'NLE') if int(l[22:26]) == 5 else l for l in atoms]
    alt = atoms[1][:16] + 'B' + atoms[1][17:30] + '  99.000' + atoms[1][38:]
    atoms[1] = atoms[1][:16] + 'A' + atoms[1][17:]
    extra = ['ATOM    997  H   ALA A   1       0.000   0.000   0.000  1.00  0.00           H',
             'TER', 'HETATM  998 CA    CA A 101      10.000  10.000  10.000  1.00  0.00          CA',
             'HETATM  999  O   HOH A 102      20.000  10.000  10.000  1.00  0.00           O']
    second = [l[:16] + ' ' + l[17:21] + 'B' + l[22:] for l in atoms[:60]]
    text = ['MODEL        1', *atoms[:2], alt, *atoms[2:], *extra, *second, 'ENDMDL', 'MODEL        2', *atoms,
            'ENDMDL', 'END']
    (tmp_path/'mess.pdb').write_text('\n'.join(text) + '\n')
    clean, mess = GoModel.from_pdb(hth), GoModel.from_pdb(tmp_path/'mess.pdb')
    assert np.allclose(clean.xyz, mess.xyz) and (clean.contacts == mess.contacts).all()
    assert mess.residues[4] == 'NLE' and mess.residues[:4] == ['ALA']*4
    assert len(GoModel.from_pdb(tmp_path/'mess.pdb', chain='B').residues) == 12
    with pytest.raises(ValueError, match='no protein chain .Z.; it has A, B'):
        fs.protein_chain(tmp_path/'mess.pdb', 'Z')


@pytest.mark.parametrize('suffix', ['.cif', '.mmcif', '.CIF'])
def test_mmcif_is_the_same_chain(hth, model, tmp_path, suffix):
    "Two models, a water, a second chain: the model is that of the PDB file."
    from openmm.app import PDBFile, PDBxFile
    atoms = [l for l in hth.read_text().splitlines() if l.startswith('ATOM')]
    water = 'HETATM  999  O   HOH A 102      20.000  10.000  10.000  1.00  0.00           O'
    second = [l[:21] + 'B' + l[22:] for l in atoms[:60]]
    (tmp_path/'two.pdb').write_text('\n'.join([*atoms, 'TER', *second, 'TER', water, 'END']) + '\n')
    pdb = PDBFile(str(tmp_path/'two.pdb'))
    with open(tmp_path/f'two{suffix}', 'w') as f:
        PDBxFile.writeHeader(pdb.topology, f, keepIds=True)
        PDBxFile.writeModel(pdb.topology, pdb.positions, f, modelIndex=1, keepIds=True)
        PDBxFile.writeModel(pdb.topology, pdb.getPositions(asNumpy=True)*2, f, modelIndex=2, keepIds=True)
    for chain in (None, 'B'):
        a, b = (GoModel.from_pdb(tmp_path/f'two{x}', chain=chain) for x in ('.pdb', suffix))
        assert fs._settings(a) | dict(source='') == fs._settings(b) | dict(source='') and b.source == f'two{suffix}'
    assert (GoModel.from_pdb(tmp_path/f'two{suffix}').contacts == model.contacts).all()


@pytest.mark.parametrize('text', ['', 'data_x\n', 'ATOM      1  N   ALA A   1',
                                  'data_x\nloop_\n_atom_site.id\n_atom_site.Cartn_x\n1 2.0 3.0\n'])
def test_an_unreadable_mmcif_says_so(tmp_path, text):
    (tmp_path/'bad.cif').write_text(text)
    with pytest.raises(ValueError, match='bad.cif: not an mmCIF file that can be read'):
        fs.protein_chain(tmp_path/'bad.cif')


def test_unusable_structures_say_why(hth, tmp_path):
    ca = [l for l in hth.read_text().splitlines() if l[12:16].strip() == 'CA']
    (tmp_path/'ca.pdb').write_text('\n'.join(ca) + '\nEND\n')
    with pytest.raises(ValueError, match='heavy atoms'): GoModel.from_pdb(tmp_path/'ca.pdb')
    with pytest.raises(ValueError, match='no native contact'):
        fs.go_model_from_pdb(build(tmp_path/'strand.pdb', [STRAND]*8))
    with pytest.raises(FileNotFoundError, match='absent.pdb'): GoModel.from_pdb(tmp_path/'absent.pdb')
    (tmp_path/'broken.json').write_text('{"name": ')
    with pytest.raises(ValueError, match='broken.json'): GoModel.load(tmp_path/'broken.json')


def test_an_id_is_looked_up_in_the_protein_data_bank(hth, monkeypatch, model):
    asked = []

    def fetch(name, progress):
        asked.append(name)
        return type('Found', (), dict(topology=hth))
    monkeypatch.setattr(fs, 'fetch', fetch)
    assert (GoModel.from_pdb('9XYZ').contacts == model.contacts).all() and asked == ['pdb:9XYZ']


def test_the_integrator_is_the_documented_one(model):
    integrator = model.context(100.0, 1).getIntegrator()
    assert (integrator.getFriction()._value, integrator.getStepSize()._value) == (fs.FRICTION, fs.TIME_STEP) == (0.5,
                                                                                                                 0.004)
    assert fs.go_system(replace(model, cooperativity=0.0)).getNumForces() == 5
    assert fs.go_system(model).getNumForces() == 6


def test_model_survives_its_file(model, tmp_path):
    m = replace(model, name='other', temperature=99.5, cooperativity=0.5, source='somewhere')
    back = GoModel.load(m.save(tmp_path/'m.json'))
    assert fs._settings(back) == fs._settings(m)
    assert fs.energies(back, m.xyz[None]).tobytes() == fs.energies(m, m.xyz[None]).tobytes()


def test_extended_chain_keeps_bonds_and_angles(model):
    a, b = fs.internal_coordinates(fs.extended(model)), fs.internal_coordinates(model.xyz)
    assert np.allclose(a[0], b[0]) and np.allclose(a[1], b[1]) and np.allclose(abs(a[2]), np.pi)
    assert fs.native_fraction(model, fs.extended(model)[None])[0] < 0.3


def test_bonds_are_at_the_temperature(model):
    """Bond variance is kT/k. Bonds forget within 1/friction, here one frame: a sample a frame and bond, half of them
    independent."""
    state = dict(x=model.xyz, v=np.zeros_like(model.xyz))
    frames, end = fs.run_segment(model, state, 400, 500, 137.0, 7)
    xyz, energy = frames['xyz'], frames['energy']
    bonds = np.linalg.norm(np.diff(xyz[50:], axis=1), axis=2) - fs.internal_coordinates(model.xyz)[0]
    assert abs(bonds.var()*model.bond_constant/(fs.BOLTZMANN*137) - 1) < 4*(2/(bonds.size/2))**0.5
    assert np.isfinite(energy).all() and end['x'].shape == model.xyz.shape


JOB = dict(n_frames=120, steps_per_frame=100, seed=4, burn_in=15, segment=10, start='extended', progress=False)


def test_killed_run_ends_with_the_same_bytes(model, tmp_path):
    whole = fs.simulate(model, tmp_path/'whole.xtc', **JOB)
    m = model.save(tmp_path/'m.json')
    code = f"from foldbook.simulation import *; simulate(GoModel.load({str(m)!r}), {str(tmp_path/'killed.xtc')!r}, **{JOB!r})"
    segments, rng = tmp_path/'killed.xtc.segments', np.random.default_rng(0)
    written = lambda: len(list(segments.glob('0*.npz')))
    kills = 0
    for _ in range(3):
        before = written()
        p = subprocess.Popen([sys.executable, '-c', code])
        while p.poll() is None and written() == before: time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        if p.poll() is None:
            p.send_signal(signal.SIGKILL)
            kills += 1
        p.wait()
        assert not (tmp_path/'killed.xtc').exists() or (tmp_path/'killed.xtc').read_bytes() == whole.read_bytes()
    killed = fs.simulate(GoModel.load(m), tmp_path/'killed.xtc', **JOB)
    assert kills >= 1 and killed.read_bytes() == whole.read_bytes()
    t = md.load(str(killed), top=model.native)
    assert len(t) == 120 and np.allclose(np.diff(t.time), 100*fs.TIME_STEP, atol=1e-4)
    assert sorted(p.name for p in tmp_path.iterdir() if 'killed' in p.name) == ['killed.xtc', 'killed.xtc.json']


@pytest.mark.parametrize('function, call', [('_write_arrays', 5), ('_write_text', 2), ('_pieces', 1)])
def test_stopped_at_any_write_it_goes_on(model, tmp_path, monkeypatch, function, call):
    """Stopped at a segment, before the record, in the middle of the last file: nothing half-written has a name that
    counts."""
    whole = fs.simulate(model, tmp_path/'whole.xtc', **JOB)
    real, calls = getattr(fs, function), []

    def fail(*args, **arrays):
        calls.append(1)
        if len(calls) == call: raise KeyboardInterrupt
        return real(*args, **arrays)
    monkeypatch.setattr(fs, function, fail)
    with pytest.raises(KeyboardInterrupt): fs.simulate(model, tmp_path/'b.xtc', **JOB)
    (tmp_path/'b.xtc.segments'/'.1-000000120.npz').write_bytes(b'half a segment')
    monkeypatch.undo()
    assert fs.simulate(model, tmp_path/'b.xtc', **JOB).read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['b.xtc', 'b.xtc.json', 'whole.xtc', 'whole.xtc.json']


@pytest.mark.parametrize('suffix', ['xtc', 'dcd', 'h5'])
def test_formats_and_arrays(model, tmp_path, suffix):
    job = JOB | dict(n_frames=33, segment=8, keep=('energy', 'forces'), atoms=[1, 4, 20])
    out = fs.simulate(model, tmp_path/f'a.{suffix}', **job)
    t = md.load(str(out), **({} if suffix == 'h5' else dict(top=model.native.topology.subset([1, 4, 20]))))
    full = md.load(str(fs.simulate(model, tmp_path/'b.h5', **JOB | dict(n_frames=33, segment=8))))
    np.testing.assert_allclose(t.xyz, full.xyz[:, [1, 4, 20]], atol=6e-4 if suffix == 'xtc' else 1e-6)
    if suffix != 'dcd': np.testing.assert_allclose(t.time, 0.4*np.arange(33), atol=1e-5)
    with np.load(out.with_suffix('.npz')) as z:
        assert z['energy'].shape == (33,) and z['forces'].shape == (33, 21, 3) # of all atoms
        np.testing.assert_allclose(z['energy'], fs.energies(model, full.xyz).sum(1), atol=0.05)
    made = json.loads((tmp_path/f'a.{suffix}.json').read_text())
    assert made['keep'] == ['energy',
                            'forces'] and made['versions']['openmm'] and made['temperature'] == model.temperature
    with pytest.raises(ValueError, match='a.trr: write .xtc, .dcd or .h5'): fs.simulate(model, tmp_path/'a.trr', **job)


@pytest.mark.parametrize('temperature', [0, -3, float('nan')])
def test_temperature_is_above_zero(model, tmp_path, temperature):
    with pytest.raises(ValueError, match='above zero'):
        fs.simulate(model, tmp_path/'cold'/'a.xtc', **JOB | dict(temperature=temperature))
    assert not (tmp_path/'cold').exists()


def test_a_full_disk_is_said_and_costs_nothing(model, tmp_path, monkeypatch):
    "Frames finished before are kept; with room again the run ends with the same bytes."
    whole = fs.simulate(model, tmp_path/'whole.xtc', **JOB)
    real, calls = np.savez, []

    def full(f, **arrays):
        calls.append(1)
        if len(calls) == 4:
            f.write(b'half')
            raise OSError(28, 'No space left on device')
        real(f, **arrays)
    monkeypatch.setattr(np, 'savez', full)
    with pytest.raises(OSError, match='no space left to write 000000040.npz.*run the same command again'):
        fs.simulate(model, tmp_path/'b.xtc', **JOB)
    assert sorted(p.name for p in (tmp_path/'b.xtc.segments').iterdir()) == ['000000010.npz', '000000020.npz',
                                                                             '000000030.npz', 'task']
    monkeypatch.undo()
    assert fs.simulate(model, tmp_path/'b.xtc', **JOB).read_bytes() == whole.read_bytes()
    with pytest.raises(FileNotFoundError), fs.writing(tmp_path/'x') as tmp: open(tmp/'no')
    assert not (tmp_path/'x').exists()


def test_other_settings_do_not_continue_a_run(model, tmp_path):
    fs.simulate(model, tmp_path/'a.xtc', **JOB)
    with pytest.raises(ValueError, match='choose another output'):
        fs.simulate(model, tmp_path/'a.xtc', **JOB | dict(seed=5))
    (tmp_path/'c.xtc.segments').mkdir()
    (tmp_path/'c.xtc.segments'/'task').write_text('other')
    with pytest.raises(ValueError, match='another model, seed or length'): fs.simulate(model, tmp_path/'c.xtc', **JOB)
    with pytest.raises(ValueError, match='native'): fs.simulate(model, tmp_path/'d.xtc', **JOB | dict(start='folded'))
    seeds = {fs.derived_seed(1, j, k) for j in range(8) for k in range(41)}
    assert len(seeds) == 8*41 and min(seeds) > 0 and max(seeds) < 2**31


def test_a_failed_integration_is_not_written(model, tmp_path):
    with pytest.raises(ValueError, match='hot.xtc.*integration failed'):
        fs.simulate(model, tmp_path/'hot.xtc', **JOB | dict(temperature=1e7))
    assert not list(tmp_path.glob('hot*.xtc')) and not list((tmp_path/'hot.xtc.segments').glob('*.npz'))


def test_ensemble_over_processes_is_the_serial_one(model, tmp_path):
    m = replace(model, name='hth')
    job = dict(n_trajectories=2, n_frames=15, steps_per_frame=50, seed=2, burn_in=5, progress=False)
    one = fs.ensemble(m, tmp_path/'one', n_workers=1, **job)
    with fs.workers(n_workers=2) as client:
        two = fs.ensemble(m, tmp_path/'two', client=client, **job)
        shots = fs.shoot(m, m.xyz[None], 2, 3, client=client, steps_per_frame=5, max_frames=3, unfolded=.1, folded=2,
                         progress=False)
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]
    assert one[0].read_bytes() != one[1].read_bytes()
    assert (GoModel.load(tmp_path/'two'/'model.json').contacts == m.contacts).all()
    assert md.load(str(tmp_path/'two'/'native.pdb')).n_residues == 21
    assert (shots == -1).all()
    from foldbook.packing import unpack_trajectory
    packed = fs.ensemble(m, tmp_path/'three', n_workers=1, pack=True, **job)
    assert unpack_trajectory(packed[1], tmp_path/'b.xtc', 50*fs.TIME_STEP).read_bytes() == one[1].read_bytes()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from([0.1, 0.5, 0.9]), max_size=40))
def test_passage_times_count_by_hand(q):
    fold, unfold, last, since = [], [], None, None
    for t, x in enumerate(q):
        s = 0 if x < 0.25 else 1 if x > 0.8 else None
        if s is None or s == last: continue
        if since is not None: (fold if s else unfold).append(t - since)
        if last is not None: since = t
        last = s
    got = fs.passage_times(np.array(q))
    assert got[0].tolist() == fold and got[1].tolist() == unfold


@settings(deadline=None, max_examples=50)
@given(st.floats(125, 149), st.floats(20, 150), st.integers(0, 1000))
def test_folding_temperature_of_exact_data(T_f, H, seed):
    T = np.repeat(np.linspace(122, 152, 7), 2)[np.random.default_rng(seed).permutation(14)]
    got, error = fs.folding_temperature(T, fs.two_states(T, T_f, H))
    assert abs(got - T_f) < 1e-6 and error < 1e-6


def test_folding_temperature_of_counted_data():
    "Fractions of 100 independent looks: the error is that of repeated scans."
    T, rng = np.repeat(np.linspace(122, 152, 7), 2), np.random.default_rng(1)
    fits = np.array([fs.folding_temperature(T, rng.binomial(100, fs.two_states(T, 137.0, 60.0))/100)
                     for _ in range(200)])
    z = (fits[:, 0] - 137)/fits[:, 1]
    assert abs(fits[:, 0].mean() - 137) < 4*fits[:, 0].std()/200**0.5 and 0.8 < z.std() < 1.4


def test_a_scan_that_missed_says_where_to_look():
    T = np.array([120, 130, 140])
    with pytest.raises(ValueError, match='all folded up to T = 140 K: scan higher'):
        fs.folding_temperature(T, [1, .9, .7])
    with pytest.raises(ValueError, match='all unfolded down to T = 120 K: scan lower'):
        fs.folding_temperature(T, [.4, .2, 0])
    with pytest.raises(ValueError, match='too short to fold'): fs.folding_temperature(T, [.2, .5, .9])
    for bad in ([.9, .1], [.9, np.nan, .1], [1.2, .5, .1]):
        with pytest.raises(ValueError, match='a folded fraction'): fs.folding_temperature(T[:len(bad)], bad)
    assert fs.folding_temperature(T, [1, 1, 0]) == (135.0, 5.0)


def test_folding_curve_goes_on_and_grows(model, tmp_path, monkeypatch):
    "A killed scan goes on; the order of temperatures and the number of workers change nothing; more can be added."
    m, job = replace(model, name='hth'), dict(n_frames=30, steps_per_frame=40, burn_in=5, seed=3, progress=False)
    whole = fs.folding_curve(m, tmp_path/'a', [100, 140], n_workers=2, **job)
    real, calls = fs.run_segment, []

    def stop(*args):
        calls.append(1)
        if len(calls) == 3: raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(fs, 'run_segment', stop)
    with pytest.raises(KeyboardInterrupt): fs.folding_curve(m, tmp_path/'b', [140, 100], n_workers=1, **job)
    monkeypatch.undo()
    more = fs.folding_curve(m, tmp_path/'b', [140, 100, 180], n_workers=1, **job)
    assert list(whole.columns) == ['T', 'start', 'folded', 'transitions'] and len(more) == 6
    assert more[more['T'] < 150].sort_values(['T', 'start']).values.tolist() == whole.sort_values(['T',
        'start']).values.tolist()
    starts = [md.load(str(tmp_path/'b'/f'hth-{T}-native.xtc'), top=m.native).xyz for T in (100, 140)]
    assert np.abs(starts[0] - starts[1]).max() > 0.01


def test_transitions_are_counted():
    assert fs.transitions(np.array([.1, .5, .9, .5, .9, .1])) == 2
    assert fs.transitions(np.full(5, .5)) == fs.transitions(np.full(5, .9)) == 0 and fs.transitions(np.array([])) == 0


def chains(forward, backward, seed, length=4000):
    rng = np.random.default_rng(seed)
    return [np.cumsum(rng.choice([0, 1, -1], length, p=[1 - forward - backward, forward, backward])) % 4
            for _ in range(8)]


def test_net_flux_follows_student_and_sees_a_drive():
    """Over many fair rings t has mean square 7/5 and no favourite sign; a driven one shows at once, and more at a
    longer lag."""
    fair = np.array([fs.net_flux_t(chains(.2, .2, k), 4)[0] for k in range(300)])
    assert abs(fair.mean()) < 4*(1.4/300)**0.5 and abs((fair**2).mean() - 1.4) < 4*(7.84/300)**0.5
    assert (abs(fs.net_flux_t(chains(.25, .15, 1), 4)) > 5).all()
    assert len(fs.net_flux_t(chains(.2, .2, 1), 4)) == 4 and len(fs.net_flux_t(chains(.2, .2, 1), 4, lag=3)) == 6
    assert len(fs.net_flux_t(chains(.2, .2, 1), 4, least=10**6)) == 0
    assert fs.net_flux_t([np.array([0, 1]), np.array([1, 1])], 2, least=1).tolist() == [1.0]


def test_free_energy_of_a_known_law():
    rng = np.random.default_rng(0)
    # density 2q: bins 1, 3, 5, 7 sixteenths
    f, df = fs.free_energy([rng.uniform(0, 1, 4000)**0.5 for _ in range(8)], np.linspace(0, 1, 5))
    assert (abs(f - np.log(7/np.array([1, 3, 5, 7]))) < 5*df + 1e-9).all() and (df < 0.05).all()


def test_shooting_resumes_and_repeats(model, tmp_path):
    job = dict(n_shots=3, seed=1, n_workers=1, steps_per_frame=50, max_frames=40, unfolded=0.6, folded=0.9,
               progress=False)
    xyz = fs.run_segment(model, dict(x=model.xyz, v=np.zeros_like(model.xyz)), 5, 40, 137.0, 2)[0]['xyz']
    want = fs.shoot(model, xyz, **job)
    real, calls = fs.shoot_frame, []

    def fail(*a, **k):
        calls.append(1)
        if len(calls) == 4: raise KeyboardInterrupt
        return real(*a, **k)
    fs.shoot_frame = fail
    try:
        with pytest.raises(KeyboardInterrupt): fs.shoot(model, xyz, out=tmp_path/'s.npz', **job)
    finally: fs.shoot_frame = real
    assert np.load(tmp_path/'s.npz')['batches'].sum() == 3
    assert (fs.shoot(model, xyz, out=tmp_path/'s.npz', **job) == want).all()
    assert want.dtype == np.int8 and set(want.ravel()) <= {-1, 0, 1}
    with pytest.raises(ValueError, match='shots of another'): fs.shoot(model, xyz[:4], out=tmp_path/'s.npz', **job)


def test_a_fixed_number_of_shots_is_what_it_was(model, monkeypatch):
    "The shipped shots stay reproducible: frame k is shot with derived_seed(seed, k), once."
    calls = []

    def note(m, x, seed, n, **settings):
        calls.append((seed, n))
        return np.zeros(n, np.int8)
    monkeypatch.setattr(fs, 'shoot_frame', note)
    assert fs.shoot(model, np.zeros((3, 1, 3)), 7, seed=5, n_workers=1, progress=False).shape == (3, 7)
    assert calls == [(fs.derived_seed(5, k), 7) for k in range(3)]


def coin(model, x, seed, n, undecided=0.0, **settings): # a frame is its committor
    rng = np.random.default_rng(seed)
    return np.where(rng.uniform(size=n) < undecided, -1, rng.uniform(size=n) < x[0, 0]).astype(np.int8)


TRUTH = np.linspace(0.02, 0.98, 65)
COINS = dict(n_shots=20, seed=3, target_error=0.05, n_workers=1, progress=False)


def test_shots_go_where_the_error_is_large(model, monkeypatch):
    monkeypatch.setattr(fs, 'shoot_frame', coin)
    got = fs.shoot(model, TRUTH[:, None, None], **COINS)
    p, se = fs.committor_estimate(got)
    count = (got > -2).sum(axis=1)
    assert got.shape == (65, 400) and se.max() <= 0.05 + 1e-12 and count.min() >= 20
    assert (count[abs(TRUTH - .5) < .1] > 80).all() and (count[abs(TRUTH - .5) > .45] < 60).all()
    z = (p - TRUTH)/np.sqrt(TRUTH*(1 - TRUTH)/count)
    assert abs(z.mean()) < 4/65**0.5 and abs(z).max() < 4.5
    for row, n in zip(got, count):
        assert (row[:n] > -2).all() and (row[n:] == -2).all()
        sizes = fs.batch_sizes(row, 20, 0.05)
        assert sizes[0] == 20 and sum(sizes) == n and all(1 <= b <= sum(sizes[:k]) for k, b in enumerate(sizes) if k)
        k = int(np.flatnonzero((got == row).all(1))[0])
        shots = [coin(None, TRUTH[k].reshape(1, 1), fs.shot_seed(3, k, b), size) for b, size in enumerate(sizes)]
        assert (np.concatenate(shots) == row[:n]).all()
    few = fs.shoot(model, TRUTH[:, None, None], **COINS | dict(max_shots=30))
    assert few.shape == (65, 30) and (few[30:35] > -2).all()


def test_adaptive_shots_resume_and_know_no_order(model, tmp_path, monkeypatch):
    "Killed after any number of batches, or with frames finished in another order, the result is the same."
    monkeypatch.setattr(fs, 'shoot_frame', coin)
    xyz = TRUTH[:, None, None]
    want = fs.shoot(model, xyz, **COINS)
    for stop in (1, 30, 66, 70, 120):
        calls = []

        def fail(*a, **k):
            calls.append(1)
            if len(calls) == stop: raise KeyboardInterrupt
            return coin(*a, **k)
        monkeypatch.setattr(fs, 'shoot_frame', fail)
        out = tmp_path/f'{stop}.npz'
        with pytest.raises(KeyboardInterrupt): fs.shoot(model, xyz, out=out, **COINS)
        monkeypatch.setattr(fs, 'shoot_frame', coin)
        assert (fs.shoot(model, xyz, out=out, **COINS) == want).all()
        assert np.load(out)['batches'].tolist() == [len(fs.batch_sizes(o, 20, 0.05)) for o in want]
        with pytest.raises(ValueError, match='shots of another'):
            fs.shoot(model, xyz, out=out, **COINS | dict(target_error=0.04))

    def shuffled(job, left, need, *_):
        rng, left = np.random.default_rng(0), list(left)
        while left:
            k = left[rng.integers(len(left))]
            yield k, coin(*job(k))
            left = [k for k in left if need(k)]
    monkeypatch.setattr(fs, '_shots', shuffled)
    assert (fs.shoot(model, xyz, **COINS) == want).all()


def test_adaptive_shots_over_workers_are_the_serial_ones(model):
    job = dict(n_shots=4, seed=1, target_error=0.15, max_shots=20, steps_per_frame=50, max_frames=40, unfolded=0.6,
               folded=0.9, progress=False)
    xyz = fs.run_segment(model, dict(x=model.xyz, v=np.zeros_like(model.xyz)), 4, 40, 137.0, 2)[0]['xyz']
    one = fs.shoot(model, xyz, n_workers=1, **job)
    assert (fs.shoot(model, xyz, n_workers=2, **job) == one).all() and (one == -2).any()


def test_undecided_shots_get_no_endless_company(model, monkeypatch, capsys):
    "A frame of undecided shots only gets no more; with some undecided the decided ones reach the error."
    monkeypatch.setattr(fs, 'shoot_frame', coin)
    xyz = TRUTH[:, None, None]
    got = fs.shoot(model, xyz, undecided=1.1, **COINS)
    assert ((got == -1).sum(1) == 20).all() and (got[:, 20:]
                                                 == -2).all() and '1300 of 1300 shots' in capsys.readouterr().out
    some = fs.shoot(model, xyz, undecided=0.3, **COINS)
    assert fs.committor_estimate(some)[1].max() <= 0.05 + 1e-12 and f'{(some == -1).sum()} of {(some > -2).sum()} shots' in capsys.readouterr().out
    with pytest.raises(ValueError, match='another first batch'): fs.batch_sizes(np.int8([0]*20 + [1]*380), 20, 0.05)


@pytest.mark.parametrize('settings, words', [(dict(n_shots=0), 'at least one'), (dict(temperature=0), 'above zero'),
    (dict(temperature=-1.0), 'above zero'), (dict(target_error=0), 'between 0 and 0.5'),
                                             (dict(target_error=0.1, n_shots=500), 'at most 400')])
def test_impossible_shots_are_refused(model, settings, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        fs.shoot(model, model.xyz[None], out=tmp_path/'s.npz', n_workers=1, **settings)
    if not {'target_error'} & set(settings):
        with pytest.raises(ValueError, match=words): fs.shoot_frame(model, model.xyz, 1, **settings)
    assert not list(tmp_path.iterdir())


def test_committor_estimate_leaves_undecided_out(capsys, model):
    q, se = fs.committor_estimate(np.array([[1, 1, 0, -1, -2], [-1, -1, -1, -1, -1], [0, 0, 0, 0, -2]], np.int8))
    assert np.allclose(q[[0, 2]], [2/3, 0]) and np.isnan(q[1]) and np.allclose(se[0], np.sqrt(2/27))
    assert se[2] > 0
    fs.shoot(model, model.xyz[None], 2, n_workers=1, max_frames=1, steps_per_frame=1, folded=2, unfolded=-1,
             progress=False)
    assert '2 of 2 shots' in capsys.readouterr().out


def test_chosen_frames_lie_between_the_states():
    q = [np.random.default_rng(k).uniform(size=500) for k in range(3)]
    c = fs.choose_frames(q, [0, 2], 40, seed=3)
    v = np.array([q[k][t] for k, t in c])
    assert set(c[:, 0]) == {0, 2} and v.min() >= 0.25 and v.max() <= 0.8 and len({tuple(x) for x in c}) == 40
    with pytest.raises(ValueError, match='only'): fs.choose_frames([np.full(5, .5)], [0], 6)


def test_shoot_ensemble_chooses_shoots_and_writes(model, tmp_path):
    rng = np.random.default_rng(1)
    xyz = [model.xyz + rng.normal(scale=s, size=(40, *model.xyz.shape)) for s in (0.1, 0.15)]
    got = fs.shoot_ensemble(model, xyz, [1], tmp_path/'shots.npz', n=3, n_shots=2, seed=5, n_workers=1,
                            steps_per_frame=20, max_frames=3, progress=False)
    with np.load(tmp_path/'shots.npz') as z: assert all((z[k] == v).all() for k, v in got.items())
    assert set(got['trajectory']) == {1} and got['outcomes'].shape == (3,
        2) and got['steps_per_frame'] == 20 and 'batches' not in got
    assert [p.name for p in tmp_path.iterdir()] == ['shots.npz']
    more = fs.shoot_ensemble(model, xyz, [1], tmp_path/'more.npz', n=3, n_shots=2, seed=5, target_error=0.2,
                             max_shots=9, n_workers=1, steps_per_frame=20, max_frames=3, progress=False)
    assert (more['batches'].sum(1) == (more['outcomes'] > -2).sum(1)).all() and more['outcomes'].shape == (3,
        9) and more['target_error'] == 0.2
    assert (more['outcomes'][:, :2] == got['outcomes']).all()


@pytest.mark.parametrize('name, residues, contacts, passages', [('villin_go', 35, 75, 800), ('bba_go', 28, 44, 700)])
def test_shipped_model_made_the_shipped_data(name, residues, contacts, passages):
    from foldbook.data import fetch
    m, d = fs.shipped_model(name), fetch(name, progress=False)
    assert (m.name, len(m.residues), len(m.contacts), m.residues.count('NLE')) == (name, residues, contacts,
                                                                                   2*(name == 'villin_go'))
    counts = []
    for p in d.trajectories:
        x = md.load(str(p), top=str(d.topology)).xyz
        assert fs.energies(m, x[::500]).sum(1).max() < 20*residues
        counts.append(len(np.concatenate(fs.passage_times(fs.native_fraction(m, x)))) + 1)
    assert min(counts) > 50 and sum(counts) > passages
    shots = fs.shipped_shots(name)
    assert shots['outcomes'].dtype == np.int8 and len(shots['outcomes']) == len(shots['frame']) == len(shots['trajectory']) and set(shots['trajectory']) <= {6, 7}


def test_an_unknown_model_is_named():
    with pytest.raises(FileNotFoundError, match='nothing'): fs.shipped_model('nothing')


def test_figures_are_drawn():
    import matplotlib
    matplotlib.use('Agg')
    q = [np.linspace(0, 1, 200)]*2
    assert len(fs.plot_q(q, 6.0)) == 2
    assert fs.plot_free_energy(q).get_xlabel() == 'Q'
    ax = fs.plot_contacts(shipped := fs.shipped_model(), shipped.xyz[None])
    assert (ax.get_xlabel(), len(ax.collections[0].get_offsets())) == ('residue',
        75) and (ax.collections[1].get_array() == 1).all()
    import pandas as pd
    T = np.repeat([120., 130, 140, 150], 2)
    ax = fs.plot_folding_curve(pd.DataFrame(dict(T=T, start=['native', 'extended']*4, folded=fs.two_states(T, 136, 60),
                                                 transitions=1)))
    assert ax.get_ylabel() == 'folded fraction' and '136.0' in ax.get_legend().get_texts()[-1].get_text()
    assert fs.plot_shooting(np.array([.3, .6]), np.array([[0, 0], [1, 1]])).get_ylabel() == 'committor by shooting'
