"Pulling: the trap, the work, the averages, resumption, wrong input."
import matplotlib
import mdtraj as md
import numpy as np
import openmm as mm
import pytest
from hypothesis import given, settings, strategies as st

import foldbook.steered as fs
from foldbook.base import BOLTZMANN
from foldbook.molecules import peptide

matplotlib.use('Agg')


@pytest.fixture(scope='session')
def helix(): return peptide('AAAAA', 'helix', caps=False)


def test_the_spring_is_the_formula(helix):
    "Energy and force of the trap alone, against numpy."
    model = fs.PulledModel(helix, platform='Reference')
    x = helix.positions + np.random.default_rng(0).normal(scale=0.01, size=helix.positions.shape)
    context = model.context(300.0, 1)
    forces = context.getSystem().getForces()
    bond = next(k for k, f in enumerate(forces) if isinstance(f, mm.CustomBondForce))
    a, b = model.ends
    assert [list(helix.topology.atoms())[k].name for k in (a, b)] == ['CA', 'CA']
    assert forces[bond].getBondParameters(0)[:2] == [a, b]
    context.setPositions(x)

    def total(trap):
        context.setParameter('trap', trap)
        return context.getState(getEnergy=True).getPotentialEnergy()._value
    r = np.linalg.norm(x[a] - x[b])
    u = lambda trap: 0.5*2928.8*(r - trap)**2
    assert np.isclose(total(2.0) - total(1.5), u(2.0) - u(1.5), rtol=1e-9)
    assert np.isclose(model.spring_constant, 7*418.4) and np.isclose(model.speed, 0.2*0.1)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.integers(0, 1000))
def test_the_trap_moves_evenly_after_it_stood_still(helix, still, step):
    model = fs.PulledModel(helix, still_steps=still, speed=0.5)
    assert np.isclose(model.trap(step), model.length + 0.5*0.002*max(0, step - still))


@pytest.mark.parametrize('n_steps', [1, 4, 5, 23])
def test_any_number_of_steps_between_frames(helix, n_steps):
    "Work in pieces is the work in one piece, and the trap ends at its place."
    model = fs.PulledModel(helix, platform='Reference', speed=0.3)
    def run(pieces):
        context = mm.Context(model.system, mm.VerletIntegrator(0.001), mm.Platform.getPlatformByName('Reference'))
        context.setPositions(helix.positions)
        out, first = [], 0
        for n in pieces:
            out.append(model.advance(context, n, first))
            first += n
        return out
    one, = run([5*n_steps])
    many = run([5]*n_steps)
    assert np.isclose(one['work'], sum(m['work'] for m in many)) and np.isclose(one['distance'], many[-1]['distance'])
    assert np.isclose(run([n_steps])[0]['trap'], model.trap(n_steps))


def test_the_first_end_is_held_and_the_last_one_follows(helix, tmp_path):
    files = fs.smd(helix, tmp_path, n_replicas=1, target=1.4, still_frames=5, speed=0.2, n_workers=1, progress=False,
                   suffix='.h5')
    t = md.load(str(files[0]))
    ca = t.xyz[:, t.topology.select('name CA')]
    spread = np.sqrt(3*BOLTZMANN*310/2928.8) # of the held end, twice at most
    held, moved = np.linalg.norm(ca[:, 0] - ca[0, 0], axis=1), np.linalg.norm(ca[-1, -1] - ca[0, -1])
    assert held.max() < 6*spread and moved > 0.3
    p = fs.pulls([files[0].with_suffix('.npz')])
    np.testing.assert_allclose(p['distance'][0], np.linalg.norm(ca[:, 0] - ca[:, -1], axis=1), atol=1e-5)
    assert abs(p['trap'][0, -1] - 1.4) < 0.01 and {a.shape for a in p.values()} == {(1, len(t))}


def test_wrong_pulls_are_refused(helix, tmp_path):
    with pytest.raises(ValueError, match='apart already'):
        fs.smd(helix, tmp_path/'a', target=0.2, n_workers=1, progress=False)
    with pytest.raises(ValueError, match='two C-alphas'):
        fs.smd(peptide('A'), tmp_path/'b', n_workers=1, progress=False)
    with pytest.raises(ValueError, match='speed'): fs.smd(helix, tmp_path/'c', speed=0.0, n_workers=1, progress=False)
    assert not list(tmp_path.iterdir())


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 40), st.floats(0.1, 3), st.floats(-50, 50), st.integers(0, 100))
def test_averages_lie_as_they_must(n, spread, mean, seed):
    "Jarzynski's average lies between the least work and the mean, and moves with a constant."
    w = np.random.default_rng(seed).normal(mean, spread, size=(n, 3))
    a, b = fs.jarzynski(w, 300.0), fs.jarzynski(w + 7, 300.0)
    assert (w.min(axis=0) - 1e-9 <= a['exponential']).all() and (a['exponential'] <= a['mean'] + 1e-9).all()
    assert (a['cumulant'] <= a['mean'] + 1e-9).all()
    for k in a: np.testing.assert_allclose(a[k] + 7, b[k], atol=1e-9)
    with pytest.raises(ValueError, match='at least two'): fs.jarzynski(w[:1], 300.0)


def test_gaussian_work_has_a_known_free_energy():
    kT, sigma = BOLTZMANN*300, 2.0
    w = np.random.default_rng(0).normal(10.0, sigma, 200_000)
    want = 10.0 - sigma**2/(2*kT)
    error = sigma/np.sqrt(len(w))*np.exp(sigma**2/kT**2/2)
    a = fs.jarzynski(w, 300.0)
    assert abs(a['cumulant'] - want) < 5*error and abs(a['exponential'] - want) < 5*error


def test_figures_are_drawn():
    p = dict(trap=np.tile(np.arange(50.), (3, 1)), force=np.ones((3, 50)), work=np.ones((3, 50)))
    assert [len(a.lines) for a in fs.plot_pulls(p, 5)] == [3, 3]
    assert len(fs.plot_jarzynski(p['trap'][0], fs.jarzynski(p['work'], 300.0), 300.0).lines) == 3
    assert len(fs.plot_first_law(np.arange(3.), np.arange(3.)).lines) == 2
