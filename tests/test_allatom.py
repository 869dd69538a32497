"Molecules in implicit solvent: force fields, solvents, platforms, killed processes, wrong input."
import json
from dataclasses import replace

import mdtraj as md
import numpy as np
import openmm as mm
import openmm.app as app
import pytest
from hypothesis import given, settings, strategies as st

import foldbook.allatom as fa
from foldbook.allatom import AtomicModel
from foldbook.molecules import load_molecule, peptide

FAST = dict(force_field='ff14SB', solvent='obc2', temperature=300.0)


@pytest.fixture(scope='session')
def dipeptide(): return fa.minimised(AtomicModel(replace(peptide('A'), name='ala2'), **FAST))


@pytest.fixture(scope='session')
def everything(): return peptide('ACDEFGHIKLMNPQRSTVWY', caps=False)


def energy(model, x):
    context = model.context(300.0, 1)
    context.setPositions(np.asarray(x, float))
    return context.getState(getEnergy=True).getPotentialEnergy()._value


@pytest.mark.parametrize('force_field', [pytest.param(f, marks=pytest.mark.slow if f in ('charmm36', 'ff15ipq') else ())
                                         for f in fa.FORCE_FIELDS])
def test_every_force_field_knows_every_residue(everything, force_field):
    system = fa.molecular_system(everything.topology, force_field, 'gbn2')
    assert system.getNumParticles() == len(everything.positions) and system.getNumConstraints() > 100
    assert not any(isinstance(f, mm.CMMotionRemover) for f in system.getForces())


@pytest.mark.parametrize('solvent', fa.SOLVENTS)
def test_every_solvent_has_its_force(dipeptide, solvent):
    system = fa.molecular_system(dipeptide.topology, 'ff14SB', solvent)
    kinds = {type(f).__name__ for f in system.getForces()}
    assert ('GBSAOBCForce' in kinds, 'CustomGBForce' in kinds) == (solvent == 'obc2', solvent not in ('obc2', 'vacuum'))
    if solvent == 'vacuum':
        assert energy(AtomicModel(dipeptide, 'ff14SB', solvent),
                      dipeptide.positions) > energy(AtomicModel(dipeptide, **FAST), dipeptide.positions)


def test_plain_openmm_gives_the_same_energy(everything):
    "The peer: a system made by OpenMM's own two lines."
    system = app.ForceField('amber/protein.ff14SBonlysc.xml', 'implicit/gbn2.xml').createSystem(everything.topology,
        nonbondedMethod=app.NoCutoff)
    context = mm.Context(system, mm.VerletIntegrator(0.001), mm.Platform.getPlatformByName('Reference'))
    context.setPositions(everything.positions)
    want = context.getState(getEnergy=True).getPotentialEnergy()._value
    assert np.isclose(energy(AtomicModel(everything, time_step=0.001, platform='Reference'), everything.positions),
                      want, rtol=1e-9)


@settings(deadline=None, max_examples=4)
@given(st.integers(0, 1000), st.sampled_from([None, 0.9, 1.6]))
def test_compiled_and_written_obc2_agree(everything, seed, cutoff):
    x = everything.positions + np.random.default_rng(seed).normal(scale=0.003, size=everything.positions.shape)
    a, b = (energy(AtomicModel(everything, 'ff14SB', s, cutoff=cutoff, platform='Reference'), x)
            for s in ('obc2', 'obc2-custom'))
    assert np.isclose(a, b, atol=0.01)


@pytest.mark.parametrize('time_step, constraints, mass', [(0.001, 0, 1.008), (0.002, 12, 1.008), (0.004, 12, 3.0)])
def test_time_step_decides_on_constraints_and_masses(dipeptide, time_step, constraints, mass):
    system = AtomicModel(dipeptide, **FAST, time_step=time_step).system
    hydrogen = next(a.index for a in dipeptide.topology.atoms() if a.element.symbol == 'H')
    total = sum(system.getParticleMass(k)._value for k in range(22))
    assert system.getNumConstraints() == constraints
    assert np.isclose(system.getParticleMass(hydrogen)._value, mass, atol=1e-3) and np.isclose(total, 144.17, atol=0.05)


@pytest.mark.parametrize('wrong, message', [
    (dict(force_field='ff20'), "force_field='ff20' is not known; choose one of ff14SBonlysc"),
    (dict(solvent='water'), "solvent='water' is not known"), (dict(temperature=0.0), 'temperature'),
    (dict(temperature=-1.0), 'temperature'), (dict(time_step=0.0), 'time step'),
    (dict(platform='Abacus'), 'does not work here')])
def test_wrong_settings_leave_nothing(dipeptide, tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        fa.equilibrium(dipeptide, tmp_path/'out', n_workers=1, progress=False, **FAST | wrong)
    assert not (tmp_path/'out').exists()


def test_unknown_atoms_and_residues_are_named(dipeptide, tmp_path):
    with pytest.raises(ValueError, match="atoms='beta' is not known; choose one of all, heavy, CA"):
        fa.equilibrium(dipeptide, tmp_path, atoms='beta', n_workers=1, progress=False, **FAST)
    less = app.Modeller(dipeptide.topology, dipeptide.positions)
    less.delete([next(a for a in dipeptide.topology.atoms() if a.name == 'CB')])
    with pytest.raises(ValueError, match='residue 1 .ALA.*foldbook.molecules.prepare'):
        fa.molecular_system(less.topology, 'ff14SB')


def test_atoms_in_one_another_are_named(dipeptide):
    helix = peptide('A'*10, 'helix', caps=False)
    x = np.array(helix.positions)
    x[60:70] = x[10:20]
    with pytest.raises(ValueError, match=r'atoms ALA\d+-\S+ and ALA\d+-\S+ are 0.000 nm apart'):
        fa.minimised(AtomicModel(replace(helix, positions=x), **FAST))
    x = np.array(dipeptide.positions)
    x[8] = np.nan
    with pytest.raises(ValueError, match='is not a number'):
        fa.minimised(AtomicModel(replace(dipeptide, positions=x), **FAST))


def test_platform_is_the_fastest_for_the_size(monkeypatch):
    monkeypatch.setattr(fa, 'platforms', lambda: ('Reference', 'CPU'))
    pick = lambda n, s='obc2': fa.choose_platform(n, s).platform
    assert [pick(22), pick(22, 'gbn2'), pick(22, 'vacuum'), pick(166)] == ['Reference', 'CPU', 'Reference', 'CPU']
    monkeypatch.setattr(fa, 'platforms', lambda: ('Reference', 'CPU', 'CUDA'))
    assert [pick(22), pick(166)] == ['Reference', 'CUDA'] and 'GPU' in fa.choose_platform(166).why
    assert fa.choose_platform(166).properties['DeterministicForces'] == 'true' and fa.choose_platform(166,
        platform='CPU').properties == {'Threads': '1'}


RUN = dict(n_frames=24, steps_per_frame=10, seed=3, burn_in=6, keep=('energy', 'forces'), progress=False)


def test_trajectories_have_streams_of_their_own_and_a_record(dipeptide, tmp_path):
    made = fa.equilibrium(dipeptide, tmp_path, n_trajectories=2, n_workers=1, suffix='.h5', **RUN, **FAST)
    x, y = (md.load(str(p)).xyz for p in made)
    assert len(x) == len(y) == 24 and not (x == y).all()
    record = json.loads((tmp_path/'ala2-1.h5.json').read_text())
    want = dict(trajectory=1, platform='Reference', time_step=0.004, friction=1.0, **FAST)
    assert {k: record[k] for k in want} == want
    assert {'foldbook', 'openmm', 'mdtraj', 'numpy', 'python', 'machine'} <= set(record['versions'])


@pytest.mark.parametrize('atoms, n', [('all', 22), ('heavy', 10), ('CA', 1)])
def test_atoms_written_have_a_structure_beside_them(dipeptide, tmp_path, atoms, n):
    out, = fa.equilibrium(dipeptide, tmp_path, atoms=atoms, n_workers=1, **RUN, **FAST)
    top = tmp_path/('native.pdb' if atoms == 'all' else 'atoms.pdb')
    t = md.load(str(out), top=str(top))
    assert t.xyz.shape == (24, n, 3) and np.load(out.with_suffix('.npz'))['forces'].shape == (24, 22, 3)
    assert load_molecule(tmp_path/'native.pdb').topology.getNumAtoms() == 22


def test_other_settings_do_not_share_a_directory(dipeptide, tmp_path):
    fa.equilibrium(dipeptide, tmp_path, n_workers=1, **RUN, **FAST)
    with pytest.raises(ValueError, match='other settings'):
        fa.equilibrium(dipeptide, tmp_path, n_workers=1, **RUN, **FAST | dict(solvent='vacuum'))
    with pytest.raises(ValueError, match='another model, seed or length'):
        fa.equilibrium(dipeptide, tmp_path, n_workers=1, **RUN | dict(seed=4), **FAST)


def test_a_step_too_long_is_refused(dipeptide, tmp_path):
    with pytest.raises(ValueError, match='lower the time step'):
        fa.equilibrium(dipeptide, tmp_path/'out', n_workers=1, **RUN, **FAST | dict(time_step=0.02))
    assert not (tmp_path/'out').exists()


def test_a_run_that_explodes_says_so(dipeptide, tmp_path):
    "Positions thrown apart: OpenMM finds numbers that are none, and the error names file, frame and remedy."
    model = AtomicModel(dipeptide, **FAST)
    x = np.array(dipeptide.positions)
    x[3] = x[12] + 1e-7
    with pytest.raises(ValueError, match='(?i)boom.xtc.*integration failed: lower the time step'):
        fa.simulate_all(model, [dict(out=tmp_path/'boom.xtc', start=x, n_frames=5, steps_per_frame=20, burn_in=0)],
                        n_workers=1, progress=False)
    assert not (tmp_path/'boom.xtc').exists()


def test_speed_is_measured_and_drawn(dipeptide, tmp_path):
    import matplotlib
    matplotlib.use('Agg')
    table = fa.benchmark([dipeptide], ('obc2', 'vacuum'), 0.05, progress=False)
    assert (table.steps_per_second > 0).all() and table.groupby('solvent').chosen.sum().tolist() == [1, 1]
    fa.save_benchmark(table, tmp_path/'speed.json')
    stored = json.loads((tmp_path/'speed.json').read_text())
    assert len(stored['rows']) == len(table) and {'processor', 'openmm', 'gpu'} <= set(stored)
    assert fa.plot_speed(table).get_xlabel() == 'atoms'
    assert fa.plot_energy({'a': np.arange(3.)}, 0.1).get_xlabel() == 'time (ps)'
    assert fa.plot_ramachandran(np.zeros(5), np.ones(5)).get_ylabel() == 'psi (degrees)'
    assert len(fa.plot_frames(peptide('AAAA').trajectory).lines) == 1
