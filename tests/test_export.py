"A student outside of Python: the same numbers and slopes through every door, and free energies from biased samples."
import json
import re
import warnings

import mdtraj as md
import numpy as np
import openmm as mm
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.special import expit
from scipy.stats import norm

from foldbook import data, features
from foldbook.frames import stream_frames
from foldbook.go import shipped_model
from foldbook.distill import Student
from foldbook.export import (SMOOTH, Deployed, PairTerms, evaluate_features, openmm_force, pair_terms, plumed_input,
                             position_gradient,
                             python_force, responses, run_biased, slope, umbrella_free_energy, unbiased_weights,
                             weighted_free_energy, write_onnx, write_torchscript)


@pytest.fixture(scope='module')
def villin():
    "A student with random targets: what is exported is checked, not what is learned."
    d, model = data.fetch('villin_go', progress=False), shipped_model('villin_go')
    rule = features.named(SMOOTH, str(d.topology))
    t = next(stream_frames(d.trajectories[:1], model.native.topology, chunk=1500))[1]
    X = [rule(t)]
    rng = np.random.default_rng(0)
    S = [np.where(np.arange(len(t)) % 10 == 0, rng.integers(0, 2, len(t)), -1).astype(np.int8)]
    teacher = [expit(8 * (X[0][:, 0] - X[0][:, 0].mean()) + X[0][:, 1])]
    student = Student('mlp', 'teacher_cross_entropy', hidden=6, keep=2, max_epochs=3, seed=1).fit(X, S, teacher,
                                                                                                  progress=False)
    terms = pair_terms(rule.features, model.native)
    atoms = terms.atoms(model.native.topology)
    xyz = t.xyz[::150].astype(float)
    distances = np.linalg.norm(xyz[:, atoms[:, 0]] - xyz[:, atoms[:, 1]], axis=-1)
    return dict(model=model, native=model.native, rule=rule, X=X, S=S, teacher=teacher, student=student, terms=terms,
                atoms=atoms, xyz=xyz, d=distances,
                deployed=Deployed(student, terms), frames=t[::150])


def test_features_from_distances_are_those_of_the_featurizer(villin):
    np.testing.assert_allclose(evaluate_features(villin['d'], villin['terms']), villin['rule'](villin['frames']),
                               atol=2e-5)
    native = villin['rule'](villin['native'])
    atoms, x = villin['atoms'], villin['native'].xyz[0].astype(float)
    at_home = np.linalg.norm(x[atoms[:, 0]] - x[atoms[:, 1]], axis=1)[None]
    np.testing.assert_allclose(evaluate_features(at_home, villin['terms']), native, atol=2e-5)


@settings(max_examples=50, deadline=None)
@given(st.floats(.3, 3), st.floats(.35, 1.2))
def test_slopes_of_the_responses_at_any_distance(d, native):
    terms, h = PairTerms((('A', 'B'),), np.array([native]), *np.zeros((3, 1, 1))), 1e-6
    c, s, dc, ds = (float(x[0]) for x in responses(np.array([d]), terms))
    up, down = responses(np.array([d + h]), terms), responses(np.array([d - h]), terms)
    assert dc == pytest.approx((up[0] - down[0])[0] / (2 * h),
                               abs=1e-4) and ds == pytest.approx((up[1] - down[1])[0] / (2 * h), abs=1e-5)
    assert 0 <= c <= 1 and 0 <= s <= 1 and dc <= 0 and ds <= 0
    for a, b in zip(responses(torch.tensor([d], dtype=torch.float64), terms, torch), (c, s, dc, ds)):
        assert a.item() == pytest.approx(b, abs=1e-12)


def test_the_deployed_model_is_the_student_and_its_slope_that_of_autograd(villin):
    d = torch.tensor(villin['d'], requires_grad=True)
    r, z = villin['deployed'](d).T
    np.testing.assert_allclose(r.detach(), villin['student'].transform([villin['rule'](villin['frames'])])[0],
                               atol=1e-5)
    by_hand = slope(villin['deployed'].numpy(), villin['d'], villin['terms'])
    np.testing.assert_allclose(by_hand[0], z.detach(), atol=1e-12)
    np.testing.assert_allclose(by_hand[1], torch.autograd.grad(z.sum(), d)[0], atol=1e-12)


def test_gradient_with_respect_to_features_is_that_of_the_network(villin):
    "The chain through the student's own network and its own features, not through the collapsed matrices."
    student, terms, d = villin['student'], villin['terms'], villin['d']
    x = torch.tensor(evaluate_features(d, terms), requires_grad=True)
    network = student.networks[0].double()
    z = network(((x - torch.tensor(student.mean)) @ torch.tensor(student.mix))[:, None])
    by_feature = torch.autograd.grad(z.sum(), x)[0].numpy()
    network.float()
    _, _, dc, ds = responses(d, terms)
    chained = by_feature @ terms.distance.T + dc * (by_feature @ terms.contact.T) + ds * (by_feature @ terms.switch.T)
    np.testing.assert_allclose(slope(villin['deployed'].numpy(), d, terms)[1], chained, atol=1e-6)


def test_gradient_with_respect_to_positions_is_a_finite_difference_and_moves_nothing_as_a_whole(villin):
    x, h = villin['xyz'][3], 1e-6
    _, g = position_gradient(villin['deployed'], x, villin['atoms'])
    moved = lambda sign: np.array([position_gradient(villin['deployed'], x + sign * h * e.reshape(x.shape),
                                                     villin['atoms'])[0] for e in np.eye(x.size)])
    np.testing.assert_allclose(g.ravel(), (moved(1) - moved(-1)) / (2 * h), atol=1e-6)
    np.testing.assert_allclose(g.sum(0), 0, atol=1e-12)
    np.testing.assert_allclose(np.cross(x, g).sum(0), 0, atol=1e-11) # nor turns it


def test_torchscript_behaves_as_plumed_expects(villin, tmp_path):
    path = write_torchscript(villin['deployed'], tmp_path / 'model.ptc')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)
        loaded = torch.jit.load(str(path))
    test = loaded(torch.zeros(1, len(villin['terms'].labels))) # what PLUMED asks first
    assert test.dtype == torch.float32 and test.shape == (1, 2)
    z, g = slope(villin['deployed'].numpy(), villin['d'], villin['terms'])
    for row, zi, gi in zip(villin['d'], z, g):
        a = torch.tensor(row, dtype=torch.float32).view(1, -1).requires_grad_()
        out = loaded(a)
        q = expit(zi)
        assert out[0, 0].item() == pytest.approx(q, abs=1e-5) and out[0, 1].item() == pytest.approx(zi, abs=2e-5)
        for column, expected in ((0, q * (1 - q) * gi), (1, gi)):
            got = torch.autograd.grad(out[:, column:column + 1], a, torch.ones(1, 1), retain_graph=True)[0][0]
            np.testing.assert_allclose(got, expected, atol=1e-5 * max(1, np.abs(expected).max()))
    batch = loaded(torch.tensor(villin['d'], dtype=torch.float32))
    np.testing.assert_allclose(batch[:, 0], expit(z), atol=1e-5)


def test_onnx_gives_values_and_gradients_for_any_number_of_frames(villin, tmp_path):
    ort = pytest.importorskip('onnxruntime')
    session = ort.InferenceSession(str(write_onnx(villin['deployed'], tmp_path / 'model.onnx')),
                                   providers=['CPUExecutionProvider'])
    assert sorted(p.name for p in tmp_path.iterdir()) == ['model.onnx'] # one file, nothing beside it
    z, g = slope(villin['deployed'].numpy(), villin['d'], villin['terms'])
    for n in (1, 2, len(z)):
        q, gradient = session.run(['committor', 'gradient'], {'distances': villin['d'][:n]})
        np.testing.assert_allclose(q, expit(z[:n]), atol=1e-6)
        np.testing.assert_allclose(gradient, (expit(z[:n]) * expit(-z[:n]))[:, None] * g[:n], atol=1e-6)


def alone(force, n, xyz):
    system = mm.System()
    for _ in range(n): system.addParticle(1.)
    system.addForce(force)
    context = mm.Context(system, mm.VerletIntegrator(.001), mm.Platform.getPlatformByName('Reference'))
    for x in xyz:
        context.setPositions(x)
        s = context.getState(getEnergy=True, getForces=True)
        yield s.getPotentialEnergy()._value, s.getForces(asNumpy=True)._value, context


@pytest.mark.parametrize('make', ['expression', 'python'])
def test_openmm_energy_and_forces(villin, make):
    top = villin['native'].topology
    force = openmm_force(villin['deployed'], top, kappa=3.,
                         centre=-.7) if make == 'expression' else python_force(villin['deployed'], top, 3., -.7)
    for x, (energy, f, _context) in zip(villin['xyz'], alone(force, top.n_atoms, villin['xyz'])):
        z, g = position_gradient(villin['deployed'], x, villin['atoms'])
        assert energy == pytest.approx(1.5 * (z + .7)**2, abs=1e-5)
        np.testing.assert_allclose(f, -3 * (z + .7) * g, atol=1e-5)
    _context.setParameter('centre', float(z))
    assert _context.getState(getEnergy=True).getPotentialEnergy()._value == pytest.approx(0, abs=1e-9)


def test_any_energy_of_the_committor_survives_serialisation(villin):
    top = villin['native'].topology
    force = openmm_force(villin['deployed'], top, 'height*r*(1 - r)', height=2.)
    again = mm.XmlSerializer.deserialize(mm.XmlSerializer.serialize(force))
    for x, (energy, f, _) in zip(villin['xyz'][:3], alone(again, top.n_atoms, villin['xyz'][:3])):
        z, g = position_gradient(villin['deployed'], x, villin['atoms'])
        q = expit(z)
        assert energy == pytest.approx(2 * q * (1 - q), abs=1e-7)
        np.testing.assert_allclose(f, -2 * (1 - 2 * q) * q * (1 - q) * g, atol=1e-6)


def test_far_apart_is_not_an_overflow(villin, tmp_path):
    "exp(x) is infinite in single precision beyond 88; a chain pulled out straight must still have a slope."
    top, model = villin['native'].topology, villin['deployed']
    x = np.zeros((top.n_atoms, 3))
    x[:, 0] = .38 * np.arange(top.n_atoms)
    atoms = villin['atoms']
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)
        loaded = torch.jit.load(str(write_torchscript(model, tmp_path / 'model.ptc')))
    for stretch in (1, 3, 100):
        d = np.linalg.norm(stretch * (x[atoms[:, 0]] - x[atoms[:, 1]]), axis=1)
        a = torch.tensor(d, dtype=torch.float32).view(1, -1).requires_grad_()
        got = torch.autograd.grad(loaded(a)[0, 1], a)[0][0]
        z, g = position_gradient(model, stretch * x, atoms)
        assert np.isfinite(got.numpy()).all() and np.isfinite(g).all() and np.isfinite(z)
        np.testing.assert_allclose(got, slope(model.numpy(), d[None], villin['terms'])[1][0], atol=1e-4)
        (energy, f, _), = alone(openmm_force(model, top, 'z'), top.n_atoms, [stretch * x])
        np.testing.assert_allclose(f, -g, atol=1e-6)
        assert energy == pytest.approx(z)


def test_plumed_input_defines_what_it_uses_and_counts_from_one(villin):
    terms, top = villin['terms'], villin['native'].topology
    for bias in ('RESTRAINT', 'METAD', ''):
        lines = [re.sub(r'\s*#.*', '', l) for l in plumed_input(terms, top, 'a.ptc', bias=bias, at=2.2,
                                                                kappa=7).splitlines()]
        defined, pairs = set(), []
        for line in filter(None, lines):
            label, _, rest = line.rpartition(': ')
            for arg in re.findall(r'ARG=(\S+)', rest):
                for a in arg.split(','): assert a.split('.')[0] in defined, f'{a} is used before it is defined'
            if label:
                assert label not in defined
                defined.add(label)
            pairs += [tuple(map(int, m)) for m in re.findall(r'DISTANCE ATOMS=(\d+),(\d+)', rest)]
        np.testing.assert_array_equal(np.array(pairs) - 1, villin['atoms']) # in the order of the model's input
        model, = [l for l in lines if 'PYTORCH_MODEL' in l]
        assert re.search(r'ARG=(\S+)', model)[1].split(',') == [f'd{k + 1}'
                                                                for k in range(len(pairs))] and 'FILE=a.ptc' in model
        assert ('bias' in defined) == bool(bias) and any(l.startswith('PRINT') for l in lines)
    assert 'AT=2.2 KAPPA=7' in plumed_input(terms, top, at=2.2, kappa=7)
    with pytest.raises(ValueError, match="bias='WALL'"): plumed_input(terms, top, bias='WALL')


def test_atoms_are_found_by_name_in_another_topology(villin):
    "With two atoms in front of the chain the numbers shift, and the labels still hold."
    top, shifted = villin['native'].topology, md.Topology()
    c = shifted.add_chain()
    r = shifted.add_residue('HOH', c, resSeq=900)
    for name in ('O', 'H1'): shifted.add_atom(name, md.element.oxygen, r)
    protein = shifted.add_chain()
    for residue in top.residues:
        shifted.add_atom('CA', md.element.carbon, shifted.add_residue(residue.name, protein, resSeq=residue.resSeq))
    np.testing.assert_array_equal(villin['terms'].atoms(shifted), villin['atoms'] + 2)


def test_what_cannot_be_exported_is_refused_with_a_cure(villin):
    fit = lambda *a, **k: Student(*a, max_epochs=1, hidden=4, **k).fit(villin['X'], villin['S'], villin['teacher'],
                                                                       progress=False)
    with pytest.raises(ValueError, match='memoryless'): Deployed(fit('lstm', 'teacher_mse'), villin['terms'])
    with pytest.raises(ValueError, match='members=1'): Deployed(fit('mlp', 'teacher_mse', members=2), villin['terms'])
    with pytest.raises(ValueError, match='or not trained'): Deployed(Student('mlp'), villin['terms'])
    rule = features.named('Q + RMSD', villin['model'])
    with pytest.raises(ValueError, match="feature 'Q' is not a smooth sum"): pair_terms(rule.features, villin['native'])
    with pytest.raises(ValueError, match='needs the columns of its contacts'):
        pair_terms(features.named('Q_soft', villin['model']).features, villin['native'])
    heavy = features.named('Q_soft + contacts', villin['model']).features
    # as of an all-atom structure
    other = features.Features(heavy.names, heavy.units, (heavy.atoms[0] + ('LEU1-CB',),) + heavy.atoms[1:])
    with pytest.raises(ValueError, match='between C-alphas'): pair_terms(other, villin['native'])
    few = pair_terms(features.named('contact_distances', villin['model']).features, villin['native'])
    with pytest.raises(ValueError, match='the terms describe'): Deployed(villin['student'], few)


def test_a_biased_run_is_repeatable_and_feels_its_bias(villin):
    model, x = villin['model'], villin['xyz'][0]
    z0 = position_gradient(villin['deployed'], x, villin['atoms'])[0]
    force = lambda centre: openmm_force(villin['deployed'], villin['native'].topology, kappa=200., centre=centre)
    a, b = (run_biased(model, force(z0 + .3), x, 20, 50, seed=5, skip=20)[0] for _ in range(2))
    np.testing.assert_array_equal(a, b)
    z = lambda frames: np.mean([position_gradient(villin['deployed'], f, villin['atoms'])[0] for f in frames])
    low = run_biased(model, force(z0 - .3), x, 20, 50, seed=5, skip=20)[0]
    assert z(a) > z(low) + .15


# reweighting

def test_one_window_without_bias_gives_equal_weights():
    np.testing.assert_allclose(unbiased_weights(np.zeros((1, 7)), [7]), 1 / 7)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(-5, 5))
def test_a_constant_added_to_a_bias_changes_nothing(seed, shift):
    rng = np.random.default_rng(seed)
    bias = rng.uniform(0, 3, (3, 60))
    a, b = unbiased_weights(bias, [20, 30, 10]), unbiased_weights(bias + np.array([[0], [shift], [0]]), [20, 30, 10])
    assert a.sum() == pytest.approx(1)
    np.testing.assert_allclose(a, b, atol=1e-7)


def test_gaussians_under_harmonic_bias_give_back_the_gaussian():
    "Prior N(0, 1) under a spring k about c is N(kc/(1+k), 1/(1+k)): everything is known."
    rng, k, centres = np.random.default_rng(4), 3., np.linspace(-3, 3, 9)
    windows = [rng.normal(k * c / (1 + k), 1 / np.sqrt(1 + k), 4000) for c in centres]
    edges = np.linspace(-3, 3, 25)
    F, error = umbrella_free_energy(windows, centres, k, edges)
    p = np.diff(norm.cdf(edges))
    exact = -np.log(p)
    exact -= exact.mean()
    assert np.abs(F - exact).max() < .3 and np.sqrt(np.mean(((F - exact) / error)**2)) < 2 and (error < .2).all()


def test_windows_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match='bias has shape'): unbiased_weights(np.zeros((2, 5)), [2, 2])
    far = np.array([[0] * 5 + [900] * 5, [900] * 5 + [0] * 5], float)
    with pytest.raises(ValueError, match='do not overlap'): unbiased_weights(far, [5, 5])


def test_weights_solve_their_own_equation():
    "Self-consistency, iterated independently of Newton's method."
    rng = np.random.default_rng(6)
    x = np.concatenate([rng.normal(c, .8, 50 * (k + 1)) for k, c in enumerate((-2, 0, 2))])
    bias, n = 2 * (x - np.array([[-2], [0], [2]]))**2, np.array([50, 100, 150])
    w = unbiased_weights(bias, n)
    f = -np.log((w * np.exp(-bias)).sum(1))
    again = 1 / (n[:, None] * np.exp(f[:, None] - bias)).sum(0)
    np.testing.assert_allclose(w, again / again.sum(), rtol=1e-8)
    F = weighted_free_energy(np.array([.1, .1, .9]), np.linspace(0, 1, 4))
    assert np.isnan(F[1]) and np.isfinite(F[[0, 2]]).all() and F[0] < F[2]


def test_the_stored_umbrella_run_agrees_with_the_unbiased_trajectories():
    stored = json.loads((data.shipped_directory() / 'umbrella.json').read_text())
    edges, counts = np.array(stored['edges']), np.array(stored['shipped'], float)
    middle = (edges[1:] + edges[:-1]) / 2
    assert counts.shape == (8, len(edges) - 1) and counts.sum() > 75_000
    F, error = umbrella_free_energy([np.array(w) for w in stored['windows']], stored['centres'], stored['kappa_kT'],
                                    edges)
    each = np.array([weighted_free_energy(middle, edges, counts.sum(0) - h) for h in counts])
    G, G_error = weighted_free_energy(middle, edges, counts.sum(0)), np.sqrt(7 * each.var(0))
    assert np.sqrt(np.mean((F - G)**2 / (error**2 + G_error**2))) < 2 and np.abs(F - G).max() < 1
