"Running potentials: exact distributions, order in the time step, named faults, resumed runs, a second engine."
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import mdtraj as md
import numpy as np
import openmm as mm
import pytest
import torch

import foldbook.cg as cg
import foldbook.cgsim as cgsim
from foldbook.base import BOLTZMANN, read_tensors
from foldbook.cgsim import Langevin, Noise, Run, RunOptions, run_beads
from foldbook.frames import ca_chain
from test_cg import NAMES, TABLE, full_prior, zigzag

KT = BOLTZMANN*350
GLY = ('GLY', 'GLY')
QUIET = dict(progress=False)


def chain(n=10, damping=0.1, network=None, seed=0): # a potential, names, a start
    p = cg.Potential(full_prior(NAMES, seed, damping), TABLE, network, 350.)
    return p, tuple(NAMES[:n]), zigzag(n, dtype=torch.float32)[0]


def small_network(scale=20., seed=0):
    torch.manual_seed(seed)
    net = cg.SchNet(24, 16)
    net.scale.fill_(scale)
    return net


class Spring(torch.nn.Module):
    def __init__(self, k):
        super().__init__()
        self.k = k
    def forward(self, types, x, mask): return self.k*((x[:, 0] - x[:, 1]).norm(dim=-1) - 0.38)**2


# --- the integrator ----------------------------------------------------------------------------------------------
def test_langevin_reproduces_the_exact_dimer():
    "The whole distribution, not only its moments as in the chapter."
    inner, time_step = 4, 0.004
    k = 900.
    p = cg.Potential(cg.Prior({'*': (0.7*k, 0.38)}), dict(GLY=1), Spring(0.3*k))
    r = np.linspace(0.1, 0.7, 4000)
    w = r**2*np.exp(-k*(r - 0.38)**2/KT)
    w /= w.sum()
    s = Langevin(p, [GLY]*800, torch.tensor([[0., 0, 0], [0.38, 0, 0]]).repeat(800, 1, 1),
                 RunOptions(time_step=time_step, inner=inner, friction=8.))
    n = 4*round(0.2/time_step/4)
    s.advance(3*n)
    found = []
    for _ in range(12):
        s.advance(n)
        found.append((s.x[:, 0] - s.x[:, 1]).norm(dim=-1))
    found = torch.cat(found).numpy()
    cumulative = np.interp(np.sort(found), r, w.cumsum())
    distance = abs(cumulative - (np.arange(len(found)) + 0.5)/len(found)).max() # Kolmogorov-Smirnov
    assert distance < 0.025
    assert abs(12*float(s.v.square().mean())/KT - 1) < 0.06


def test_energy_drift_is_of_second_order_in_the_time_step():
    p, names, x = chain(network=small_network())
    warm = Langevin(p, [names]*4, x.repeat(4, 1, 1), RunOptions(double=True))
    warm.relax(20)
    warm.advance(400)
    spread = []
    for dt in (0.0005, 0.001, 0.002):
        s = Langevin(p, [names]*4, warm.x, RunOptions(double=True, friction=0., time_step=dt))
        s.v, total = warm.v, []
        for _ in range(round(0.1/dt)):
            s.advance(1)
            total.append(s.energy() + 6*s.v.square().sum((1, 2)))
        spread.append(float(torch.stack(total).std(0).mean()))
    order = np.polyfit(np.log([0.0005, 0.001, 0.002]), np.log(spread), 1)[0]
    assert 1.8 < order < 2.2


def test_noise_belongs_to_the_replica_and_the_step():
    a, b = Noise(1, [5, 9, 5], torch.float32), Noise(1, [5, 9], torch.float32)
    for step in (0, 63, 64, 1000): assert torch.equal(a(step)[:2], b(step))
    assert not torch.equal(a(3)[0], a(3)[2]) and not torch.equal(a(3), a(4))
    assert not torch.equal(a(0), Noise(2, [5, 9, 5], torch.float32)(0))
    assert a(3)[0, 5:].abs().max() == 0
    x = torch.stack([a(k)[1, 0] for k in range(4000)])
    assert abs(float(x.mean())) < 0.05 and abs(float(x.std()) - 1) < 0.03
    assert abs(float((x[1:]*x[:-1]).mean())) < 0.05


def test_batch_is_single_and_mixed_proteins_are_independent():
    p, names, x = chain(network=small_network())
    o = RunOptions(n_steps=60, every=20, double=True, time_step=0.002)
    sizes = (10, 4, 7)
    mixed = run_beads(p, [names[:n] for n in sizes], [x[:n] for n in sizes], o, **QUIET)
    for k, n in enumerate(sizes):
        others = [names[:n]]*(k + 1)
        alone = run_beads(p, others, [x[:n]]*(k + 1), o, **QUIET)
        np.testing.assert_allclose(mixed.xyz[k], alone.xyz[k], atol=1e-6)
    shorter = run_beads(p, [names[:4]], [x[:4]], o, **QUIET)
    np.testing.assert_allclose(shorter.xyz[0], run_beads(p, [names[:4], names], [x[:4], x], o, **QUIET).xyz[0],
                               atol=1e-6)


def test_seed_decides():
    p, names, x = chain(6)
    o = RunOptions(n_steps=40, every=20)
    a, b, c = (run_beads(p, names, x[None], replace(o, seed=s), **QUIET).xyz[0] for s in (0, 0, 1))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_straight_triple_stays_finite():
    p, names, _ = chain(damping=0.1)
    line = torch.tensor([[0.38*k, 0, 0] for k in range(10)])
    run = run_beads(p, names, line[None], RunOptions(n_steps=200, relax=0), **QUIET)
    assert np.isfinite(run.xyz[0]).all() and len(run.xyz[0]) == 2 and not run.blown


def test_damped_start_parts_overlapping_beads():
    p, names, x = chain()
    x[7] = x[2] + 0.02
    run = Langevin(p, [names], x[None], RunOptions())
    before = float(run.energy())
    run.relax(200)
    assert float(run.energy()) < before/10
    assert float((run.x[0, 7] - run.x[0, 2]).norm()) > 0.2


# --- what goes wrong is named ------------------------------------------------------------------------------------
class Bomb(torch.nn.Module):
    "Throws one bead of the short chain away; its force is nothing for the others."
    def __init__(self, force):
        super().__init__()
        self.force = force
    def forward(self, types, x, mask):
        short = (mask.expand(x.shape[:2]).sum(1) == 5).nonzero()[:, 0]
        return torch.zeros(len(x), dtype=x.dtype).index_add(0, short, -self.force*x[short, 3, 0])


@pytest.mark.parametrize('force, word', [(3e4, 'bond of'), (math.nan, 'not a number')])
def test_blow_up_names_replica_frame_and_bead_and_spares_the_others(force, word, tmp_path):
    p, names, x = chain(network=Bomb(force))
    o = RunOptions(n_steps=240, every=20, relax=0, double=True, time_step=0.002)
    for directory in (None, tmp_path/'run'):
        with pytest.warns(UserWarning, match=r'replica 1, frame \d+, bead [1-4]: .*' + word):
            run = run_beads(p, [names, names[:5], names], [x, x[:5], x], o, directory, **QUIET)
        assert [b.replica for b in run.blown] == [1]
        lengths = [run.frames(k).n_frames for k in range(3)]
        assert lengths == [12, run.blown[0].frame, 12]
    free = run_beads(cg.Potential(p.prior, TABLE), [names, names[:5], names], [x, x[:5], x], o, **QUIET)
    np.testing.assert_allclose(run.frames(2).xyz, free.xyz[2], atol=2e-3) # xtc keeps 0.001 nm
    assert Run.load(tmp_path/'run').blown == run.blown


def test_all_replicas_lost_is_an_end_not_a_loop():
    p, names, x = chain(5, network=Bomb(1e6))
    with pytest.warns(UserWarning):
        run = run_beads(p, names, [x, x], RunOptions(n_steps=400, every=20, relax=0), **QUIET)
    assert len(run.blown) == 2 and all(len(q) == b.frame for q, b in zip(run.xyz, run.blown))


@pytest.mark.parametrize('change, words', [(dict(time_step=0), 'time_step=0'),
                                           (dict(every=30, n_steps=100), 'no multiple'), (dict(inner=3), 'inner=3'),
                                           (dict(exchange=1), 'tuple of temperatures'),
                                           (dict(temperature=-1.), 'negative'), (dict(n_steps=0), 'n_steps=0')])
def test_impossible_options_are_refused(change, words):
    with pytest.raises(ValueError, match=words): RunOptions(**change)


def test_wrong_starts_are_named():
    p, names, x = chain()
    with pytest.raises(ValueError, match='2 chains but 1 starts'): run_beads(p, [names, names], [x], **QUIET)
    with pytest.raises(ValueError, match='start 0 has shape'): run_beads(p, names[:4], [x], **QUIET)
    x[3, 0] = math.nan
    with pytest.raises(ValueError, match='start 0, bead 3'): run_beads(p, names, [x], **QUIET)
    with pytest.raises(ValueError, match='HOH'): run_beads(p, ['HOH'], [x[:1]], **QUIET)
    with pytest.raises(ValueError, match='ladders of 2'):
        run_beads(p, names, [zigzag(10)[0]]*3, RunOptions(temperature=(300., 400.), exchange=1), **QUIET)


# --- files, kills, longer runs -----------------------------------------------------------------------------------
def files(directory): return {f.name: f.read_bytes() for f in sorted(directory.glob('*.xtc'))}


def test_files_hold_the_run(tmp_path):
    p, names, x = chain()
    o = RunOptions(n_steps=200, every=20, segment=3)
    memory, disk = (run_beads(p, [names, names[:6]], [x, x[:6]], o, d, **QUIET) for d in (None, tmp_path))
    for k in range(2):
        t = md.load(str(tmp_path/f'replica-{k:03d}.xtc'), top=ca_chain(disk.names[k]))
        np.testing.assert_allclose(t.xyz, memory.xyz[k], atol=6e-4)
        np.testing.assert_allclose(t.time, 0.02*np.arange(1, 11), atol=1e-5)
    assert Run.load(tmp_path).options == o and Run.load(tmp_path).names == disk.names
    assert {f.name for f in tmp_path.iterdir()} == {'replica-000.xtc', 'replica-001.xtc', 'run.json',
                                                    'task.json', 'checkpoint.safetensors'}


@pytest.mark.parametrize('device_options', [dict(temperature=(350., 420.), exchange=2), dict(inner=2)],
                         ids=['exchange', 'two time steps'])
def test_resumed_run_is_the_uninterrupted_one(tmp_path, device_options):
    p, names, x = chain(network=small_network())
    o = RunOptions(n_steps=240, every=20, segment=4, **device_options)
    run_beads(p, names, [x, x], o, tmp_path/'whole', **QUIET)
    run_beads(p, names, [x, x], replace(o, n_steps=160), tmp_path/'parts', **QUIET)
    with open(tmp_path/'parts'/'replica-000.xtc', 'ab') as f: f.write(b'half a frame')
    again = run_beads(p, names, [x, x], o, tmp_path/'parts', **QUIET)
    assert files(tmp_path/'whole') == files(tmp_path/'parts')
    assert again.exchanges == Run.load(tmp_path/'whole').exchanges
    stamp = (tmp_path/'parts'/'run.json').stat().st_mtime_ns
    run_beads(p, names, [x, x], o, tmp_path/'parts', **QUIET) # nothing is left to do
    assert (tmp_path/'parts'/'run.json').stat().st_mtime_ns == stamp


KILLED = '''
import sys
sys.path.insert(0, {tests!r})
from test_cgsim import *
p, names, x = chain()
run_beads(p, names, [x, x], RunOptions(n_steps=int(sys.argv[2]), every=20, segment=4), sys.argv[1], progress=False)
'''


def test_killed_run_goes_on(tmp_path):
    script = tmp_path/'go.py'
    script.write_text(KILLED.format(tests=os.path.dirname(__file__)))
    go = lambda out, n: subprocess.Popen([sys.executable, str(script), str(tmp_path/out), str(n)])
    first = go('killed', 20_000)
    while not (tmp_path/'killed'/'checkpoint.safetensors').exists():
        assert first.poll() is None, 'the run ended before it was killed'
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = int(read_tensors(tmp_path/'killed'/'checkpoint.safetensors')[0]['counts'][0])
    assert 0 < done < 20_000
    target = done + 200
    p, names, x = chain()
    o = RunOptions(n_steps=20*(target//20), every=20, segment=4)
    run_beads(p, names, [x, x], o, tmp_path/'killed', **QUIET)
    run_beads(p, names, [x, x], o, tmp_path/'whole', **QUIET)
    assert files(tmp_path/'whole') == files(tmp_path/'killed')


def test_another_run_is_not_continued(tmp_path):
    p, names, x = chain()
    o = RunOptions(n_steps=40, every=20)
    run_beads(p, names, [x], o, tmp_path, **QUIET)
    other = cg.Potential(full_prior(seed=1), TABLE)
    tries = [('start', p, x + 0.1, o), ('potential', other, x, o), ('seed', p, x, replace(o, seed=1))]
    for what, q, start, options in tries:
        with pytest.raises(ValueError, match=f'holds another run \\({what} differ'):
            run_beads(q, names, [start], options, tmp_path, **QUIET)


@pytest.mark.parametrize('damage, name', [(lambda f: f.write_bytes(f.read_bytes()[:-40]), 'replica-001.xtc'),
                                          (lambda f: f.unlink(), 'replica-000.xtc'),
                                          (lambda f: f.unlink(), 'checkpoint.safetensors'),
                                          (lambda f: f.unlink(), 'task.json')], ids=['cut', 'lost', 'state', 'task'])
def test_a_file_that_was_cut_or_lost_is_named(tmp_path, damage, name):
    p, names, x = chain()
    o = RunOptions(n_steps=80, every=20, segment=2)
    run_beads(p, names, [x, x], o, tmp_path, **QUIET)
    damage(tmp_path/name)
    before = files(tmp_path)
    for n_steps in (80, 120): # finished, or to be made longer
        with pytest.raises(ValueError, match=f'{name}.*remove .* and run anew'):
            run_beads(p, names, [x, x], replace(o, n_steps=n_steps), tmp_path, **QUIET)
    assert files(tmp_path) == before # nothing was written over
    if name != 'task.json':
        with pytest.raises((ValueError, FileNotFoundError), match=name): Run.load(tmp_path)


# --- exchange ----------------------------------------------------------------------------------------------------
def test_exchange_keeps_each_temperature():
    p = cg.Potential(cg.Prior({'*': (900., 0.38)}), dict(GLY=1))
    T = (300., 400., 520.)
    run = run_beads(p, GLY, [np.array([[0, 0, 0], [0.38, 0, 0]])]*300,
        RunOptions(temperature=T, exchange=1, n_steps=1200, every=25, time_step=0.008, friction=5.), **QUIET)
    assert 0.3 < run.exchanges[0]/run.exchanges[1] < 1
    for k, t in enumerate(T):
        sd = np.concatenate([np.linalg.norm(x[20:, 0] - x[20:, 1], axis=-1) for x in run.xyz[k::3]]).std()
        assert abs(sd/(BOLTZMANN*t/1800)**0.5 - 1) < 0.04


# --- OpenMM ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('damping', [0., 0.1])
def test_openmm_agrees_in_energy_and_forces(damping):
    p, names, _ = chain(damping=damping, network=small_network())
    s = p.system(names)
    context = mm.Context(cgsim.openmm_system(p, names), mm.VerletIntegrator(0.001),
                         mm.Platform.getPlatformByName('Reference'))
    for x in zigzag(10, 4, noise=0.02, dtype=torch.float32):
        context.setPositions(x.double().numpy())
        state = context.getState(getEnergy=True, getForces=True)
        e, f = p.forces(x[None], s)
        theirs = state.getForces(asNumpy=True)._value
        assert abs(float(e) - float(s.constant) - state.getPotentialEnergy()._value) < 2e-4*abs(float(e)) + 1e-2
        np.testing.assert_allclose(f[0].numpy(), theirs, atol=2e-4*abs(theirs).max() + 0.01)


@pytest.mark.slow # a Python call for each of thousands of steps
def test_openmm_agrees_in_distribution():
    p, names, x = chain(4, network=small_network())
    o = RunOptions(time_step=0.005, friction=20., n_steps=600, every=20)
    ours = run_beads(p, names, x.repeat(60, 1, 1), o, **QUIET)
    theirs = cgsim.openmm_run(p, names, x.numpy(), replace(o, n_steps=4000), **QUIET)
    ends = lambda x: np.linalg.norm(x[:, 0] - x[:, 3], axis=-1)
    a = np.array([ends(x[10:]).mean() for x in ours.xyz])
    b = np.array([ends(q).mean() for q in np.array_split(theirs[25:], 11)])
    assert abs(a.mean() - b.mean()) < 4*math.hypot(a.std()/60**0.5, b.std()/11**0.5) < 0.15


def test_openmm_failure_is_said():
    p, names, x = chain()
    with pytest.raises(ValueError, match='shorter time step'):
        cgsim.openmm_run(p, names, x.numpy(), RunOptions(time_step=0.2, n_steps=2000, every=100), **QUIET)


# --- mutants ---------------------------------------------------------------------------------------
def test_mutation_changes_names_types_and_forces():
    p, names, x = chain(network=small_network())
    changed = cgsim.mutated(names, 'Y1A', 'G6S')
    assert changed[0] == 'ALA' and changed[5] == 'SER' and changed[1:5] == names[1:5]
    p = replace_prior(p)
    a, b = (p.forces(x[None], p.system(n))[1] for n in (names, changed))
    assert not torch.allclose(a, b)
    for bad in ('Y1', 'W1A', 'Y99A', 'Y1Z'):
        with pytest.raises(ValueError, match=bad): cgsim.mutated(names, bad)


def replace_prior(p): return cg.Potential(cg.Prior({'*': (3e4, 0.38)}, {'*': 0.01}), TABLE, p.network)
