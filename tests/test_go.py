"The structure-based model against plain numpy, what it makes, its events and its folding temperature."
from dataclasses import replace

import mdtraj as md
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import foldbook.engine as engine
import foldbook.go as fs
from foldbook.base import BOLTZMANN
from foldbook.engine import run_segment
from foldbook.go import GoModel
from foldbook.molecules import build_chain


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


def test_helix_turn_helix_is_recognised(model):
    top = model.native.topology
    assert (top.n_atoms, top.n_residues, top.n_bonds) == (21, 21, 20)
    assert model.native.xyz.shape == (1, 21, 3) and model.system().getNumParticles() == 21
    assert {4} < set(np.diff(model.contacts)[:, 0])
    assert np.allclose(fs.internal_coordinates(model.xyz)[0], 0.38, atol=0.005)


def test_unusable_structures_say_why(hth, tmp_path):
    ca = [l for l in hth.read_text().splitlines() if l[12:16].strip() == 'CA']
    (tmp_path/'ca.pdb').write_text('\n'.join(ca) + '\nEND\n')
    with pytest.raises(ValueError, match='heavy atoms'): GoModel.from_pdb(tmp_path/'ca.pdb')
    with pytest.raises(ValueError, match='no native contact'):
        build_chain('A'*8, 'extended').save_pdb(str(tmp_path/'strand.pdb'))
        GoModel.from_pdb(tmp_path/'strand.pdb')
    with pytest.raises(FileNotFoundError, match='absent.pdb'): GoModel.from_pdb(tmp_path/'absent.pdb')
    (tmp_path/'broken.json').write_text('{"name": ')
    with pytest.raises(ValueError, match='broken.json'): GoModel.load(tmp_path/'broken.json')


def test_the_integrator_is_the_documented_one(model):
    integrator = model.context(100.0, 1).getIntegrator()
    assert integrator.getFriction()._value == fs.FRICTION == 0.5
    assert integrator.getStepSize()._value == fs.TIME_STEP == 0.004
    assert replace(model, cooperativity=0.0).system().getNumForces() == 5
    assert model.system().getNumForces() == 6


def test_model_survives_its_file(model, tmp_path):
    m = replace(model, name='other', temperature=99.5, cooperativity=0.5, source='somewhere')
    back = GoModel.load(m.save(tmp_path/'m.json'))
    assert back.settings() == m.settings()
    assert fs.energies(back, m.xyz[None]).tobytes() == fs.energies(m, m.xyz[None]).tobytes()


def test_extended_chain_keeps_bonds_and_angles(model):
    a, b = fs.internal_coordinates(model.start('extended')), fs.internal_coordinates(model.xyz)
    assert np.allclose(a[0], b[0]) and np.allclose(a[1], b[1]) and np.allclose(abs(a[2]), np.pi)
    assert fs.native_fraction(model, model.start('extended')[None])[0] < 0.3


def test_bonds_are_at_the_temperature(model):
    """Bond variance is kT/k. Bonds forget within 1/friction, here one frame: a sample a frame and bond, half of them
    independent."""
    state = dict(x=model.xyz, v=np.zeros_like(model.xyz))
    frames, end = run_segment(model, state, 250, 500, 137.0, 7)
    xyz, energy = frames['xyz'], frames['energy']
    bonds = np.linalg.norm(np.diff(xyz[50:], axis=1), axis=2) - fs.internal_coordinates(model.xyz)[0]
    assert abs(bonds.var()*model.bond_constant/(BOLTZMANN*137) - 1) < 4*(2/(bonds.size/2))**0.5
    assert np.isfinite(energy).all() and end['x'].shape == model.xyz.shape


def test_ensemble_over_processes_is_the_serial_one(model, tmp_path, monkeypatch):
    "The same files, and the bar of all trajectories ends at all frames."
    from foldbook.packing import unpack_trajectory
    seen, real = [], engine.FrameBar.reach

    def note(bar, n):
        seen.append(n)
        real(bar, n)
    monkeypatch.setattr(engine.FrameBar, 'reach', note)
    m = replace(model, name='hth')
    job = dict(n_trajectories=2, n_frames=15, steps_per_frame=50, seed=2, burn_in=5, progress=False)
    one, two = (fs.ensemble(m, tmp_path/str(n), n_workers=n, **job) for n in (1, 2))
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]
    assert one[0].read_bytes() != one[1].read_bytes() and seen[-1] == 40 and seen == sorted(seen)
    assert (GoModel.load(tmp_path/'2'/'model.json').contacts == m.contacts).all()
    assert md.load(str(tmp_path/'2'/'native.pdb')).n_residues == 21
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
                     for _ in range(100)])
    z = (fits[:, 0] - 137)/fits[:, 1]
    assert abs(fits[:, 0].mean() - 137) < 4*fits[:, 0].std()/100**0.5 and 0.8 < z.std() < 1.4


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
    "A killed scan goes on; the order of temperatures changes nothing; more can be added."
    m, job = replace(model, name='hth'), dict(n_frames=30, steps_per_frame=40, burn_in=5, seed=3, progress=False)
    whole = fs.folding_curve(m, tmp_path/'a', [100, 140], n_workers=1, **job)
    real, calls = engine.run_segment, []

    def stop(*args):
        calls.append(1)
        if len(calls) == 3: raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(engine, 'run_segment', stop)
    with pytest.raises(KeyboardInterrupt): fs.folding_curve(m, tmp_path/'b', [140, 100], n_workers=1, **job)
    monkeypatch.undo()
    more = fs.folding_curve(m, tmp_path/'b', [140, 100, 180], n_workers=1, **job)
    assert list(whole.columns) == ['T', 'start', 'folded', 'transitions'] and len(more) == 6
    assert more[more['T'] < 150].sort_values(['T', 'start']).values.tolist() == whole.sort_values(
        ['T', 'start']).values.tolist()
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


@pytest.mark.parametrize('name, residues, contacts, passages', [('villin_go', 35, 75, 800), ('bba_go', 28, 44, 700)])
def test_shipped_model_made_the_shipped_data(name, residues, contacts, passages):
    from foldbook.data import fetch
    m, d = fs.shipped_model(name), fetch(name, progress=False)
    assert (m.name, len(m.residues), len(m.contacts), m.residues.count('NLE')) == (
        name, residues, contacts, 2*(name == 'villin_go'))
    counts = []
    for p in d.trajectories:
        x = md.load(str(p), top=str(d.topology)).xyz
        assert fs.energies(m, x[::500]).sum(1).max() < 20*residues
        counts.append(len(np.concatenate(fs.passage_times(fs.native_fraction(m, x)))) + 1)
    assert min(counts) > 50 and sum(counts) > passages


def test_an_unknown_model_is_named():
    with pytest.raises(FileNotFoundError, match='nothing'): fs.shipped_model('nothing')


def test_figures_are_drawn():
    import matplotlib
    matplotlib.use('Agg')
    q = [np.linspace(0, 1, 200)]*2
    assert len(fs.plot_q(q, 6.0)) == 2
    assert fs.plot_free_energy(q).get_xlabel() == 'Q'
    ax = fs.plot_contacts(shipped := fs.shipped_model(), shipped.xyz[None])
    assert (ax.get_xlabel(), len(ax.collections[0].get_offsets())) == ('residue', 75)
    assert (ax.collections[1].get_array() == 1).all()
    import pandas as pd
    T = np.repeat([120., 130, 140, 150], 2)
    ax = fs.plot_folding_curve(pd.DataFrame(dict(T=T, start=['native', 'extended']*4, folded=fs.two_states(T, 136, 60),
                                                 transitions=1)))
    assert ax.get_ylabel() == 'folded fraction' and '136.0' in ax.get_legend().get_texts()[-1].get_text()
