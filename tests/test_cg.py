"Coarse-grained potentials: the prior against OpenMM, symmetries of the network, wrong input."
import math
from dataclasses import replace

import mdtraj as md
import numpy as np
import openmm as mm
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.functional import normalize, pad

import foldbook.cg as cg
from foldbook.base import BOLTZMANN
from foldbook.cg import ForceData, Potential, Prior, SchNet

TABLE = cg.TABLES['protein-thermodynamics']
NAMES = 'TYR ASP PRO GLU THR GLY TRP ALA LEU ILE'.split()
KT = BOLTZMANN*350


def full_prior(names=NAMES, seed=0, damping=0.):
    "A prior with an entry of its own for every term of a chain."
    rng = np.random.default_rng(seed)
    at = lambda span: [tuple(names[k:k + span]) for k in range(len(names) - span + 1)]
    waves = {k: tuple(zip(rng.uniform(0.5, 2, 3).tolist(), rng.uniform(-3, 3, 3).tolist())) for k in at(4)}
    return Prior({k: (float(rng.uniform(2e4, 4e4)), float(rng.uniform(0.37, 0.39))) for k in at(2)},
                 {n: float(rng.uniform(5e-3, 1e-2)) for n in names},
                 {k: (float(rng.uniform(10, 40)), float(rng.uniform(1.6, 2.4))) for k in at(3)}, waves, damping)


def walk(n, replicas=1, seed=0, dtype=torch.float64):
    "Random chains of bonds of 0.38 nm."
    g = torch.Generator().manual_seed(seed)
    return torch.cumsum(normalize(torch.randn(replicas, n, 3, generator=g, dtype=dtype), dim=-1)*0.38, 1)


def zigzag(n, replicas=1, noise=0.01, seed=0, dtype=torch.float64):
    "Open chains near their bond lengths: no two beads overlap."
    k = torch.arange(n, dtype=dtype)
    x = torch.stack([0.3*k, 0.117*(k % 2)*2, 0.05*torch.sin(k)], -1)
    return x + noise*torch.randn(replicas, n, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def openmm_energy(names, prior, x):
    "The same prior by OpenMM's own forces in double precision: energy of each term and the total force."
    system = mm.System()
    for _ in names: system.addParticle(12.)
    bond = mm.CustomBondForce('k*(r - r0)^2')
    for p in ('k', 'r0'): bond.addPerBondParameter(p)
    angle = mm.CustomAngleForce('k*(theta - t0)^2')
    for p in ('k', 't0'): angle.addPerAngleParameter(p)
    torsion, core = mm.PeriodicTorsionForce(), mm.CustomBondForce('4*e/r^6')
    core.addPerBondParameter('e')
    for i in range(len(names) - 1): bond.addBond(i, i + 1, prior.bonds[tuple(names[i:i + 2])])
    for i in range(len(names) - 2): angle.addAngle(i, i + 1, i + 2, prior.angles[tuple(names[i:i + 3])])
    for i in range(len(names) - 3):
        for n, (k, phase) in enumerate(prior.dihedrals[tuple(names[i:i + 4])], 1):
            torsion.addTorsion(i, i + 1, i + 2, i + 3, n, phase, k)
    for i in range(len(names)):
        for j in range(i + 2, len(names)):
            core.addBond(i, j, [math.sqrt(prior.repulsion[names[i]]*prior.repulsion[names[j]])])
    for g, f in enumerate((bond, angle, torsion, core)):
        f.setForceGroup(g)
        system.addForce(f)
    context = mm.Context(system, mm.VerletIntegrator(0.001), mm.Platform.getPlatformByName('Reference'))
    context.setPositions(x)
    terms = [context.getState(getEnergy=True, groups={g}).getPotentialEnergy()._value for g in range(4)]
    return terms, context.getState(getForces=True).getForces(asNumpy=True)._value


@pytest.mark.parametrize('seed', range(4))
def test_prior_equals_openmm(seed):
    prior, x = full_prior(seed=seed), walk(10, seed=seed)
    s = cg.chain_system(NAMES, prior, TABLE).to(torch.float64)
    terms, force = openmm_energy(NAMES, prior, x[0].numpy())
    ours = cg.prior_terms(x, s)
    np.testing.assert_allclose([float(ours[k]) for k in ('bonds', 'angles', 'dihedrals', 'repulsion')], terms,
                               rtol=2e-6)
    f = cg.energy_and_forces(lambda x: cg.prior_energy(x, s), x)[1][0].numpy()
    assert abs(f - force).max() < 2e-5*abs(force).max()


def test_prior_in_single_precision():
    prior, x = full_prior(), walk(10)
    s = cg.chain_system(NAMES, prior, TABLE)
    _, force = openmm_energy(NAMES, prior, x[0].numpy())
    f = cg.energy_and_forces(lambda x: cg.prior_energy(x, s), x.float())[1][0].numpy()
    assert abs(f - force).max() < 2e-4*abs(force).max()


def test_bonds_are_ordered_and_only_bonded_pairs_are_spared():
    prior = Prior({('ALA', 'CYS'): (1., 0.), ('CYS', 'ALA'): (3., 0.)}, dict(ALA=1e-3, CYS=1e-3))
    x = torch.tensor([[[0., 0, 0], [0.4, 0, 0], [0.8, 0.1, 0], [1.2, 0, 0]]])
    e = {names: float(cg.prior_terms(x[:, :2], cg.chain_system(names, prior, TABLE))['bonds'])
         for names in (('ALA', 'CYS'), ('CYS', 'ALA'))}
    assert e['CYS', 'ALA'] == pytest.approx(3*e['ALA', 'CYS'])
    d = [float((x[0, i] - x[0, j]).norm()) for i, j in ((0, 2), (0, 3), (1, 3))]
    four = cg.prior_terms(x, cg.chain_system(['ALA', 'CYS']*2, prior, TABLE))
    assert float(four['repulsion']) == pytest.approx(sum(4e-3/r**6 for r in d), rel=1e-5)


def test_only_the_dihedral_knows_left_from_right():
    s, x = cg.chain_system(NAMES, full_prior(), TABLE).to(torch.float64), walk(10)
    a, b = cg.prior_terms(x, s), cg.prior_terms(-x, s)
    for k in ('bonds', 'angles', 'repulsion'): assert float(a[k]) == pytest.approx(float(b[k]), rel=1e-12)
    assert abs(float(a['dihedrals'] - b['dihedrals'])) > 0.1
    net = SchNet(22).double()
    assert float((net(s.types, x, s.mask) - net(s.types, -x, s.mask)).detach().abs().max()) < 1e-12


@pytest.mark.parametrize('damping', [0., 0.1])
def test_a_straight_triple_stays_finite(damping):
    x = torch.tensor([[[0., 0, 0], [0.38, 0, 0], [0.76, 0, 0], [1., 0.2, 0.2]]])
    s = cg.chain_system(NAMES[:4], full_prior(damping=damping), TABLE)
    e, f = cg.energy_and_forces(lambda x: cg.prior_energy(x, s), x)
    assert torch.isfinite(e).all() and torch.isfinite(f).all()


def test_damping_changes_little_elsewhere():
    x = walk(10, 50)
    s = [cg.chain_system(NAMES, full_prior(damping=d), TABLE).to(torch.float64) for d in (0., 0.05)]
    *_, re, im = cg.chain_geometry(x, s[0].mask)
    safe = (torch.hypot(re, im) > 0.5).all(1)
    a, b = (cg.prior_terms(x[safe], t)['dihedrals'] for t in s)
    assert safe.sum() > 3 and float(((a - b).abs()/a.abs()).max()) < 0.05


def mixed(network=True, dtype=torch.float64):
    chains = [NAMES[:5], NAMES, NAMES[2:9], NAMES[:2], NAMES[:1]]
    torch.manual_seed(1)
    p = Potential(replace(full_prior(), bonds=full_prior().bonds, dihedrals={'*': ((1., 0.5), (0.4, 2.))},
                          angles={'*': (20., 2.)}), TABLE, SchNet(22, 32) if network else None).to(dtype)
    xs = [walk(len(c), seed=k, dtype=dtype) for k, c in enumerate(chains)]
    return p, chains, xs, torch.cat([pad(x, (0, 0, 0, 10 - x.shape[1])) for x in xs])


def test_chains_of_a_mixed_batch_do_not_feel_one_another():
    p, chains, xs, x = mixed()
    s = p.system(*chains).to(torch.float64)
    e, f = p.forces(x, s)
    for k, c in enumerate(chains):
        e1, f1 = p.forces(xs[k], p.system(c).to(torch.float64))
        assert float(e[k]) == pytest.approx(float(e1), rel=1e-9)
        torch.testing.assert_close(f[k, :len(c)], f1[0], rtol=1e-9, atol=1e-9)
        assert not f[k, len(c):].any()
    order = torch.tensor([3, 0, 4, 2, 1])
    e2, f2 = p.forces(x[order], s[order])
    torch.testing.assert_close(e2, e[order])
    torch.testing.assert_close(f2, f[order])


def test_padding_gives_finite_gradients_of_weights():
    p, chains, _, x = mixed(dtype=torch.float32)
    s = p.system(*chains)
    _, f = cg.energy_and_forces(lambda x: p.network(s.types, x, s.mask), x, create_graph=True)
    f.square().sum().backward()
    assert all(torch.isfinite(w.grad).all() for w in p.network.parameters() if w.grad is not None)


@pytest.mark.parametrize('n, spread', [(12, None), (60, 0.35)]) # 60 beads in a ball: every pair in range
def test_symmetries_of_the_network(n, spread):
    torch.manual_seed(0)
    net, types, mask = SchNet(22, 32).double(), torch.randint(1, 22, (1, n)), torch.ones(1, n, dtype=bool)
    x = walk(n, 2) if spread is None else spread*torch.randn(2, n, 3, dtype=torch.float64)
    e, f = cg.energy_and_forces(lambda x: net(types, x, mask), x)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    e2, f2 = cg.energy_and_forces(lambda x: net(types, x, mask), x @ turn + 3)
    torch.testing.assert_close(e2, e, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(f2, f @ turn, rtol=1e-7, atol=1e-8)
    size = float(f.abs().max())
    assert float(f.sum(1).abs().max()) < 1e-10*max(1, size)*n
    assert float(torch.linalg.cross(x, f).sum(1).abs().max()) < 1e-10*max(1, size)*n
    for k, c in ((3, 0), (n - 1, 2)):
        h = torch.zeros_like(x)
        h[:, k, c] = 1e-6
        slope = (net(types, x - h, mask) - net(types, x + h, mask)).detach()/2e-6
        torch.testing.assert_close(slope, f[:, k, c], rtol=1e-5, atol=1e-6*size)
    swap = torch.randperm(n)
    torch.testing.assert_close(net(types[:, swap], x[:, swap], mask).detach(), e) # beads have no order for the network
    other = types.clone()
    other[0, n//2] = types[0, n//2] % 21 + 1
    assert float((net(other, x, mask).detach() - e).abs().min()) > 1e-8


@given(st.integers(2, 30), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_pairs_are_those_of_a_double_loop(n, seed):
    g = torch.Generator().manual_seed(seed)
    x, mask = torch.randn(2, n, 3, generator=g)*0.6, torch.rand(2, n, generator=g) > 0.2
    i, j = cg.pairs_within(x, mask, 0.3, 1.2)
    want = {(b*n + p, b*n + q) for b in range(2) for p in range(n)
            for q in range(p + 1, n) if mask[b, p] and mask[b, q] and 0.3 < float((x[b, p] - x[b, q]).norm()) < 1.2}
    assert set(zip(i.tolist(), j.tolist())) == want


def test_filters_vanish_at_both_ends():
    _, c = SchNet(1, lower=0.3, upper=1.2).radial(torch.tensor([0.1, 0.3, 0.3001, 0.75, 1.1999, 1.2, 2.]))
    assert c[:2].abs().max() == 0 and c[5:].abs().max() == 0
    assert c[2] < 1e-4 and c[4] < 1e-4 and c[3] == pytest.approx(1)


def test_energy_is_conserved_to_second_order():
    "The wobble of the total energy falls by four when the time step is halved."
    p, s = Potential(full_prior(damping=0.1), TABLE, SchNet(22, 16)).double(), None
    s = p.system(NAMES).to(torch.float64)
    x0 = zigzag(10, 8)
    v0 = (KT/12)**0.5*torch.randn(x0.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wobble = []
    for dt in (0.002, 0.001):
        x, v, total = x0, v0, []
        e, f = p.forces(x, s)
        for _ in range(round(0.2/dt)):
            v = v + dt/24*f
            x = x + dt*v
            e, f = p.forces(x, s)
            v = v + dt/24*f
            total.append(e + 6*v.square().sum((1, 2)))
        wobble.append(torch.stack(total).std(0))
    ratio = float((wobble[0]/wobble[1]).median())
    assert 3.3 < ratio < 4.7


def chain_frames(n=400, seed=0):
    "Frames of a chain near its bond lengths with the forces of a prior."
    prior = full_prior(NAMES[:6])
    x = zigzag(6, n, 0.01, seed, torch.float32)
    d = ForceData(tuple(NAMES[:6]), x.numpy(), np.zeros((n, 6, 3), np.float32))
    return replace(d, forces=cg.prior_forces(d, prior)), prior


@pytest.mark.parametrize('field, value, message', [
    ('xyz', np.nan, r'frame 7, bead 2 \(PRO\) has a position that is not a number'),
    ('xyz', 5., r'frame 7, bead 2 \(PRO\) is .* nm from the bead before it, more than 0.6 nm'),
    ('forces', np.nan, r'frame 7, bead 2 \(PRO\) has a force that is not a number'),
    ('forces', -1e7, r'frame 7, bead 2 \(PRO\) has a force of 1e\+07')])
def test_bad_frames_are_named(field, value, message):
    d, prior = chain_frames()
    a = getattr(d, field).copy()
    a[7, 2, 1] = value
    with pytest.raises(ValueError, match=message): cg.check_frames(replace(d, **{field: a}), prior, largest=1e6)


@pytest.mark.parametrize('unit', [u for u in cg.UNITS if u != 'hartree/bohr'])
def test_a_wrong_unit_is_found(unit):
    d, prior = chain_frames()
    noise = np.random.default_rng(0).normal(0, np.std(d.forces), d.forces.shape)
    good = replace(d, forces=(d.forces + noise).astype(np.float32))
    assert cg.check_frames(good, prior, largest=1e7) is good
    with pytest.raises(ValueError, match=f'seem to be in {unit}'):
        cg.check_frames(replace(d, forces=good.forces/cg.UNITS[unit]), prior, largest=1e7)


def test_wrong_input_is_said():
    d, prior = chain_frames()
    with pytest.raises(ValueError, match='do not fit 6 beads'): cg.check_frames(replace(d, forces=d.forces[:, :5]))
    with pytest.raises(ValueError, match="bead 3 is 'UNK'"): cg.bead_types(['ALA', 'GLY', 'HSD', 'UNK'], TABLE)
    with pytest.raises(ValueError, match='no bond ILE-ALA'): cg.chain_system(['ILE', 'ALA'], prior, TABLE)
    with pytest.raises(ValueError, match='give more frames'): cg.fit_prior([d[:5]], 350.)


def test_tables():
    a, b = (cg.TABLES[k] for k in ('protein-thermodynamics', 'torchmd-cg'))
    assert {k for k in a if a[k] != b[k]} == {'ARG', 'LYS', 'LEU', 'ILE'}
    assert 18 not in a.values() and a['NLE'] == b['NLE'] == 17
    assert len({int(cg.bead_types([n], a)[0]) for n in ('HIS', 'HSD', 'HSE', 'HIE')}) == 1


def test_save_and_load(tmp_path):
    p, chains, xs, _ = mixed(dtype=torch.float32)
    p.temperature, p.history = 350., [dict(epoch=0, loss=1., rate=1e-3)]
    p.save(tmp_path)
    q = Potential.load(tmp_path)
    assert (q.prior, q.table, q.temperature, q.history) == (p.prior, p.table, p.temperature, p.history)
    for a, b in zip(p.forces(xs[1], p.system(NAMES)), q.forces(xs[1], q.system(NAMES))): assert torch.equal(a, b)
    Potential(p.prior, TABLE).save(tmp_path/'prior')
    assert Potential.load(tmp_path/'prior').network is None
    with pytest.raises(FileNotFoundError, match='no potential was saved'): Potential.load(tmp_path/'nothing')
    with pytest.raises(TypeError, match='only a SchNet'): Potential(None, TABLE, torch.nn.Linear(1, 1)).save(tmp_path)


YAML = '''
atomtypes: [CAA, CAC]
bonds:
  (CAA, CAC): {k0: 65.4, req: 3.831}
  (CAC, CAA): {k0: 94.0, req: 3.827}
dihedrals:
  (X, X, X, X):
    terms:
      - {phi_k: 0.202036165, phase: -130.5337, per: 1}
      - {phi_k: 0.32990447, phase: -97.9884, per: 2}
lj:
  CAA: {epsilon: 2296.0, sigma: 1.0}
  CAC: {epsilon: 2300.0, sigma: 1.0}
'''


def test_the_published_layout(tmp_path):
    (path := tmp_path/'prior.yaml').write_text(YAML)
    p = cg.read_prior(path)
    assert p.bonds['ALA', 'CYS'] == pytest.approx((65.4*418.4, 0.3831))
    assert p.bonds['CYS', 'ALA'] == pytest.approx((94.0*418.4, 0.3827))
    x = torch.tensor([[[0., 0, 0], [0.39, 0, 0], [0.5, 0.37, 0]]])
    terms = cg.prior_terms(x, cg.chain_system(['ALA', 'CYS', 'ALA'], p, TABLE)) # by hand, in kcal/mol and angstrom
    r = [3.9, math.hypot(1.1, 3.7), math.hypot(5, 3.7)]
    assert float(terms['bonds']) == pytest.approx(4.184*(65.4*(r[0] - 3.831)**2 + 94*(r[1] - 3.827)**2), rel=1e-4)
    assert float(terms['repulsion']) == pytest.approx(4.184*4*2296/r[2]**6, rel=1e-4)
    cg.write_prior(p, tmp_path/'again.yaml')
    q = cg.read_prior(tmp_path/'again.yaml')
    for a, b in ((p.bonds, q.bonds), (p.dihedrals, q.dihedrals)):
        np.testing.assert_allclose(list(a.values()), list(b.values()))
    assert list(q.repulsion) == ['ALA', 'CYS']
    for bad, message in (('[1]', 'no sections bonds and lj'), (YAML.replace('req: 3.831', 'r: 1'), "'req' is missing"),
                         (YAML.replace('CAC, CAA', 'CAX, CAA'), "'CAX' is missing or unknown")):
        path.write_text(bad)
        with pytest.raises(ValueError, match=message): cg.read_prior(path)
    with pytest.raises(ValueError, match='no angles'): cg.write_prior(replace(p, angles={'*': (1., 2.)}), path)


@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_force_maps_are_unbiased(seed):
    "B C^T = 1 and equal weights within rigid groups, for random maps and constraints, with and without forces."
    rng = np.random.default_rng(seed)
    n, N = 9, 3
    C = np.zeros((N, n))
    for k in range(N): C[k, 3*k:3*k + 2] = rng.dirichlet([1, 1]) # weights on two atoms of each triple
    rigid = [(3*k + 1, 3*k + 2) for k in range(N) if rng.random() < 0.6]
    for forces in (None, rng.normal(size=(50, n, 3))):
        B = cg.force_map(C, rigid, forces)
        np.testing.assert_allclose(B @ C.T, np.eye(N), atol=1e-8)
        for i, j in rigid: np.testing.assert_allclose(B[:, i], B[:, j])


def test_selections():
    top = md.Topology()
    c = top.add_chain()
    for name in ('GLY', 'ALA'):
        r = top.add_residue(name, c)
        n, ca, _ = (top.add_atom(a, md.element.Element.getBySymbol(a[0]), r) for a in ('N', 'CA', 'C'))
        top.add_bond(ca, top.add_atom('HA', md.element.hydrogen, r))
    assert cg.bead_map(top).names == ('GLY', 'ALA')
    m = cg.bead_map(top, 'backbone')
    assert m.names == ('GLY:N', 'GLY:CA', 'GLY:C', 'ALA:N', 'ALA:CA', 'ALA:C')
    np.testing.assert_array_equal(np.flatnonzero(m.forces[1]), [1, 3]) # C-alpha and its hydrogen
    np.testing.assert_array_equal(np.flatnonzero(cg.bead_map(top, 'backbone', rigid_hydrogens=False).forces[1]), [1])
    with pytest.raises(ValueError, match='no atom'): cg.bead_map(top, 'name CB')


def test_pairs_without_data_take_the_pooled_bond():
    "A mutation makes pairs that no frame holds."
    rng = np.random.default_rng(0)
    steps = normalize(torch.randn(3000, 4, 3, generator=torch.Generator().manual_seed(0)), dim=-1).numpy()
    x = np.cumsum(steps*rng.normal(0.382, 0.005, (3000, 4, 1)), 1).astype(np.float32)
    prior, fits = cg.fit_prior([ForceData(('ALA', 'GLY', 'SER', 'ALA'), x, 0*x)], 350., dict(bonds={}))
    assert set(prior.bonds) == {'*', ('ALA', 'GLY'), ('GLY', 'SER'), ('SER', 'ALA')}
    assert {f.term for f in fits} == {'bonds'}
    s = cg.chain_system(['ALA', 'TRP', 'SER', 'ALA'], prior, TABLE)
    assert tuple(s.bonds[0, 0].tolist()) == pytest.approx(prior.bonds['*'], rel=1e-5)
    assert tuple(s.bonds[0, 2].tolist()) == pytest.approx(prior.bonds['SER', 'ALA'], rel=1e-5)
    assert prior.bonds['*'][1] == pytest.approx(0.382, abs=2e-3)
    assert prior.bonds['*'][0] == pytest.approx(KT/(2*0.005**2), rel=0.1)


def test_the_mirror_costs_what_the_paper_says():
    "Published constants, a C-alpha helix and its mirror image: 0.8787 kcal/mol a quadruple."
    waves = cg.PAPER_DIHEDRAL
    s = cg.chain_system(['ALA']*4, Prior({'*': (1., 0.38)}, dihedrals={'*': waves}), TABLE).to(torch.float64)

    def torsion(phi): # four beads with this dihedral, all angles 91 degrees
        x = torch.tensor([[[0.38, 0, -0.0066], [0, 0, 0], [0, 0, 0.38],
                           [0.38*math.cos(phi), 0.38*math.sin(phi), 0.3866]]], dtype=torch.float64)
        return float(cg.prior_terms(x, s)['dihedrals'])/4.184
    hand = lambda phi: sum(k/4.184*(1 + math.cos(n*phi - p)) for n, (k, p) in enumerate(waves, 1))
    for phi in (0.9, -2.4): assert torsion(phi) == pytest.approx(hand(phi), rel=1e-4)
    assert torsion(math.radians(-50)) - torsion(math.radians(50)) == pytest.approx(0.8787, abs=5e-4)
