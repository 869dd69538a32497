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
    e = [m.bond_constant/2*((r - r0)**2).sum(), m.angle_constant/2*((theta - theta0)**2).sum(), (k1*(1 - np.cos(d)) + k3*(1 - np.cos(3*d))).sum()]
    i, j = m.contacts.T
    length, l0 = np.linalg.norm(x[i] - x[j], axis=1), m.contact_lengths
    e.append(m.contact_energy*(5*(l0/length)**12 - 6*(l0/length)**10).sum())
    native = set(map(tuple, m.contacts.tolist()))
    e.append(sum(m.contact_energy*(m.core_radius/np.linalg.norm(x[a] - x[b]))**12 for a in range(len(x)) for b in range(a+4, len(x)) if (a, b) not in native))
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
    text = ['MODEL        1', *atoms[:2], alt, *atoms[2:], *extra, *second, 'ENDMDL', 'MODEL        2', *atoms, 'ENDMDL', 'END']
    (tmp_path/'mess.pdb').write_text('\n'.join(text) + '\n')
    clean, mess = GoModel.from_pdb(hth), GoModel.from_pdb(tmp_path/'mess.pdb')
    assert np.allclose(clean.xyz, mess.xyz) and (clean.contacts == mess.contacts).all()
    assert mess.residues[4] == 'NLE' and mess.residues[:4] == ['ALA']*4
    assert len(GoModel.from_pdb(tmp_path/'mess.pdb', chain='B').residues) == 12
    with pytest.raises(ValueError, match='no protein chain .Z.; it has A, B'): fs.protein_chain(tmp_path/'mess.pdb', 'Z')


def test_unusable_structures_say_why(hth, tmp_path):
    ca = [l for l in hth.read_text().splitlines() if l[12:16].strip() == 'CA']
    (tmp_path/'ca.pdb').write_text('\n'.join(ca) + '\nEND\n')
    with pytest.raises(ValueError, match='heavy atoms'): GoModel.from_pdb(tmp_path/'ca.pdb')
    with pytest.raises(ValueError, match='no native contact'): fs.go_model_from_pdb(build(tmp_path/'strand.pdb', [STRAND]*8))
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
    assert (integrator.getFriction()._value, integrator.getStepSize()._value) == (fs.FRICTION, fs.TIME_STEP) == (0.5, 0.004)
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
    "Bond variance is kT/k. Bonds forget within 1/friction, here one frame: a sample a frame and bond, half of them independent."
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
    "Stopped at a segment, before the record, in the middle of the last file: nothing half-written has a name that counts."
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
    assert made['keep'] == ['energy', 'forces'] and made['versions']['openmm'] and made['temperature'] == model.temperature
    with pytest.raises(ValueError, match='a.trr: write .xtc, .dcd or .h5'): fs.simulate(model, tmp_path/'a.trr', **job)


@pytest.mark.parametrize('temperature', [0, -3, float('nan')])
def test_temperature_is_above_zero(model, tmp_path, temperature):
    with pytest.raises(ValueError, match='above zero'): fs.simulate(model, tmp_path/'cold'/'a.xtc', **JOB | dict(temperature=temperature))
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
    with pytest.raises(OSError, match='no space left to write 000000040.npz.*run the same command again'): fs.simulate(model, tmp_path/'b.xtc', **JOB)
    assert sorted(p.name for p in (tmp_path/'b.xtc.segments').iterdir()) == ['000000010.npz', '000000020.npz', '000000030.npz', 'task']
    monkeypatch.undo()
    assert fs.simulate(model, tmp_path/'b.xtc', **JOB).read_bytes() == whole.read_bytes()
    with pytest.raises(FileNotFoundError), fs.writing(tmp_path/'x') as tmp: open(tmp/'no')
    assert not (tmp_path/'x').exists()


def test_other_settings_do_not_continue_a_run(model, tmp_path):
    fs.simulate(model, tmp_path/'a.xtc', **JOB)
    with pytest.raises(ValueError, match='choose another output'): fs.simulate(model, tmp_path/'a.xtc', **JOB | dict(seed=5))
    (tmp_path/'c.xtc.segments').mkdir()
    (tmp_path/'c.xtc.segments'/'task').write_text('other')
    with pytest.raises(ValueError, match='another model, seed or length'): fs.simulate(model, tmp_path/'c.xtc', **JOB)
    with pytest.raises(ValueError, match='native'): fs.simulate(model, tmp_path/'d.xtc', **JOB | dict(start='folded'))
    seeds = {fs.derived_seed(1, j, k) for j in range(8) for k in range(41)}
    assert len(seeds) == 8*41 and min(seeds) > 0 and max(seeds) < 2**31


def test_a_failed_integration_is_not_written(model, tmp_path):
    with pytest.raises(ValueError, match='hot.xtc.*integration failed'): fs.simulate(model, tmp_path/'hot.xtc', **JOB | dict(temperature=1e7))
    assert not list(tmp_path.glob('hot*.xtc')) and not list((tmp_path/'hot.xtc.segments').glob('*.npz'))


def test_ensemble_over_processes_is_the_serial_one(model, tmp_path):
    m = replace(model, name='hth')
    job = dict(n_trajectories=2, n_frames=15, steps_per_frame=50, seed=2, burn_in=5, progress=False)
    one = fs.ensemble(m, tmp_path/'one', n_workers=1, **job)
    with fs.workers(n_workers=2) as client:
        two = fs.ensemble(m, tmp_path/'two', client=client, **job)
        shots = fs.shoot(m, m.xyz[None], 2, 3, client=client, steps_per_frame=5, max_frames=3, unfolded=.1, folded=2, progress=False)
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]
    assert one[0].read_bytes() != one[1].read_bytes()
    assert (GoModel.load(tmp_path/'two'/'model.json').contacts == m.contacts).all()
    assert md.load(str(tmp_path/'two'/'native.pdb')).n_residues == 21
    assert (shots == -1).all()
    from foldbook.data import unpack_trajectory
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


def test_free_energy_of_a_known_law():
    rng = np.random.default_rng(0)
    f, df = fs.free_energy([rng.uniform(0, 1, 4000)**0.5 for _ in range(8)], np.linspace(0, 1, 5))  # density 2q: bins 1, 3, 5, 7 sixteenths
    assert (abs(f - np.log(7/np.array([1, 3, 5, 7]))) < 5*df + 1e-9).all() and (df < 0.05).all()


def test_shooting_resumes_and_repeats(model, tmp_path):
    job = dict(n_shots=3, seed=1, n_workers=1, steps_per_frame=50, max_frames=40, unfolded=0.6, folded=0.9, progress=False)
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
    assert np.load(tmp_path/'s.npz')['done'].sum() == 3
    assert (fs.shoot(model, xyz, out=tmp_path/'s.npz', **job) == want).all()
    assert want.dtype == np.int8 and set(want.ravel()) <= {-1, 0, 1}
    with pytest.raises(ValueError, match='shots of another'): fs.shoot(model, xyz[:4], out=tmp_path/'s.npz', **job)


def test_committor_estimate_leaves_undecided_out(capsys, model):
    q, se = fs.committor_estimate(np.array([[1, 1, 0, -1], [-1, -1, -1, -1], [0, 0, 0, 0]], np.int8))
    assert np.allclose(q[[0, 2]], [2/3, 0]) and np.isnan(q[1]) and np.allclose(se[0], np.sqrt(2/27))
    assert se[2] > 0
    fs.shoot(model, model.xyz[None], 2, n_workers=1, max_frames=1, steps_per_frame=1, folded=2, unfolded=-1, progress=False)
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
    got = fs.shoot_ensemble(model, xyz, [1], tmp_path/'shots.npz', n=3, n_shots=2, seed=5, n_workers=1, steps_per_frame=20, max_frames=3, progress=False)
    with np.load(tmp_path/'shots.npz') as z: assert all((z[k] == v).all() for k, v in got.items())
    assert set(got['trajectory']) == {1} and got['outcomes'].shape == (3, 2) and got['steps_per_frame'] == 20
    assert [p.name for p in tmp_path.iterdir()] == ['shots.npz']


@pytest.mark.parametrize('name, residues, contacts, passages', [('villin_go', 35, 75, 800), ('bba_go', 28, 44, 700)])
def test_shipped_model_made_the_shipped_data(name, residues, contacts, passages):
    from foldbook.data import fetch
    m, d = fs.shipped_model(name), fetch(name, progress=False)
    assert (m.name, len(m.residues), len(m.contacts), m.residues.count('NLE')) == (name, residues, contacts, 2*(name == 'villin_go'))
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
    assert fs.plot_shooting(np.array([.3, .6]), np.array([[0, 0], [1, 1]])).get_ylabel() == 'committor by shooting'
