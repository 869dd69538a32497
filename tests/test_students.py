"Formulas, lines of students and the anatomy of their errors, on systems with a known committor."
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.linear_model import OrthogonalMatchingPursuit

from foldbook.distill import Student
from foldbook.features import Features
from foldbook.students import Formula, card, error_anatomy, fit_weights, hand_down, pursue, white_errors
from foldbook.systems import dw1d, lshape2d, persist1d
from foldbook.zq import cut_profiles
from foldbook.scores import error_budget
from foldbook.verdicts import profile


def sampled(system, n_frames=100_000, n=1, seed=0):
    return system.observe(system.sample(n_frames, n, seed=seed))


def fitted(terms, weights, intercept=0., n=5):
    f = Formula()
    f.terms, f.weights, f.intercept = terms, np.array(weights), intercept
    f.names, f.units = tuple('abcdefgh'[:n]), ('',) * n
    return f


# formulas

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_gradient_of_any_formula_is_its_finite_difference(seed):
    rng = np.random.default_rng(seed)
    library = [(a,) for a in range(5)] + [(a, b) for a in range(5) for b in range(a, 5)]
    terms = [library[k] for k in rng.choice(len(library), 4, replace=False)]
    f, x, h = fitted(terms, rng.normal(size=4), rng.normal()), rng.normal(size=(7, 5)), 1e-5
    numeric = np.stack([(f.transform([x + h * e])[0] - f.transform([x - h * e])[0]) / (2 * h) for e in np.eye(5)], 1)
    np.testing.assert_allclose(f.gradient(x), numeric, atol=1e-8)


def test_pursuit_is_that_of_scikit_learn_on_weighted_rows():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(500, 20)) * rng.uniform(.1, 10, 20) + rng.normal(size=20)
    y = expit(x[:, 3] / x[:, 3].std() - x[:, 8] / x[:, 8].std() + .1 * rng.normal(size=500))
    eta = rng.normal(size=500)
    p = np.clip(expit(eta), 1e-3, 1 - 1e-3)
    w = p * (1 - p)
    response, mean = np.log(p / (1 - p)) + (y - p) / w, w @ x / w.sum()
    z = (x - mean) / np.sqrt(w @ (x - mean)**2 / w.sum())
    root = np.sqrt(w)
    peer = OrthogonalMatchingPursuit(n_nonzero_coefs=4, fit_intercept=False).fit(root[:, None] * z,
        root * (response - w @ response / w.sum()))
    np.testing.assert_array_equal(pursue(x, y, 4, eta), np.flatnonzero(peer.coef_))


def test_weights_minimise_the_cross_entropy_of_soft_targets():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(400, 3)) * [1, 10, .1] + [0, 5, 1]
    y = rng.uniform(.02, .98, 400)
    w, b = fit_weights(x, y)
    z = (x - x.mean(0)) / x.std(0)
    peer = minimize(lambda v: np.mean(np.logaddexp(0, z @ v[1:] + v[0]) - y * (z @ v[1:] + v[0])), np.zeros(4),
                    tol=1e-12).x
    np.testing.assert_allclose(x @ w + b, z @ peer[1:] + peer[0], atol=1e-4)


def test_a_formula_ignores_constant_and_repeated_columns():
    X, S, q = sampled(dw1d(), 20_000)
    x = X[0]
    X = [np.hstack([np.ones_like(x), x, x, 0 * x])]
    f = Formula(max_terms=5).fit(X, S, q)
    assert 1 <= len(f.terms) <= 5 and np.isfinite(f.weights).all()
    assert not any(0 in t or 3 in t for t in f.terms if len(t) == 1)
    assert error_budget(f.transform(X, S), q, S) < 5


def test_fitting_twice_gives_the_same_formula_and_disk_changes_nothing(tmp_path):
    X, S, q = sampled(lshape2d(), 20_000)
    a, b = (Formula().fit(X, S, q) for _ in range(2))
    assert str(a) == str(b) and len(a.terms) <= 5
    a.save(tmp_path / 'deep' / 'folder')
    c = Formula.load(tmp_path / 'deep' / 'folder')
    np.testing.assert_array_equal(c.transform(X)[0], a.transform(X)[0])
    assert (str(c), c.max_terms, c.n_parameters) == (str(a), a.max_terms, a.n_parameters)
    with pytest.raises(FileNotFoundError, match='formula.json'): Formula.load(tmp_path)


def test_names_and_units_are_printed():
    f = fitted([(0,), (1, 1), (0, 2)], [1.5, -2, .25], -1)
    f.names, f.units = ('Q', 'RMSD', 'd A-B'), ('', 'nm', 'nm')
    assert str(f) == 'ln q/(1-q) =\n    -1\n    + 1.5 Q\n    - 2 (RMSD/nm)^2\n    + 0.25 Q * (d A-B/nm)'
    assert str(Formula()) == 'Formula(not fitted)'


def test_malformed_input_is_refused_with_a_cure():
    X, S, q = sampled(dw1d(), 5000)
    with pytest.raises(ValueError, match='max_terms=0'): Formula(max_terms=0)
    with pytest.raises(ValueError, match='degree=3'): Formula(degree=3)
    with pytest.raises(ValueError, match='not been fitted'): Formula().transform(X)
    with pytest.raises(ValueError): Formula().fit([np.full_like(X[0], np.nan)], S, q)
    with pytest.raises(ValueError): Formula().fit([X[0][:-1]], S, q)
    with pytest.raises(ValueError, match='names 2 columns'):
        Formula().fit(X, S, q, description=Features(('a', 'b'), ('', ''), ((), ())))
    f = Formula().fit(X, S, q)
    with pytest.raises(ValueError, match='reads 1 features'): f.transform([np.hstack([X[0], X[0]])])
    one_sided = [np.where(S[0] == 1, -1, S[0]).astype(np.int8)]
    with pytest.raises(ValueError): Formula().fit(X, one_sided, None)


# a line of students

def test_each_student_is_taught_by_the_one_above():
    class Pupil:
        def __init__(self, value): self.value = value
        def fit(self, features, states, teacher, validation, progress):
            self.heard = teacher
            return self
        def transform(self, features, states): return [self.value * x for x in q]
    X, S, q = sampled(dw1d(), 3000)
    stages = hand_down(dict(old=Pupil(.1), middle=Pupil(.2), young=Formula()), X, S, teacher=q,
                       description=Features(('x',), ('nm',), (('A-CA',),)))
    assert stages['old'].heard is q and (stages['middle'].heard[0] == .1 * q[0]).all()
    assert stages['young'].names == ('x',)


# anatomy of errors

@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 5, 16]))
def test_roughness_and_coupling_add_up_to_the_excess(seed, lag):
    X, S, q = sampled(dw1d(), 4000, 2, seed=3)
    rng = np.random.default_rng(seed)
    r = [np.clip(x + rng.normal(0, rng.uniform(0, .2), len(x)), 0, 1) for x in q]
    clamped = [np.where(s < 0, x, s) for x, s in zip(r, S)]
    a = error_anatomy(r, q, S, lag)
    n_ab = cut_profiles(q, S, lags=[lag]).n_ab
    direct = (cut_profiles(clamped, S, lags=[lag]).delta_r2[0] - cut_profiles(q, S, lags=[lag]).delta_r2[0]) / (2
                                                                                                                * n_ab)
    assert a.roughness + a.coupling == pytest.approx(a.excess, abs=1e-9) and a.excess == pytest.approx(direct, abs=1e-9)
    assert a.budget == pytest.approx(error_budget(clamped, q, S)) and a.roughness >= 0
    assert a.roughness == pytest.approx(a.budget * (1 - a.correlation) / lag)


def test_a_perfect_copy_has_no_errors():
    X, S, q = sampled(dw1d(), 4000)
    assert np.abs(np.array(error_anatomy(q, q, S))).max() == 0


@pytest.mark.parametrize('system', [dw1d, lshape2d, persist1d])
@pytest.mark.parametrize('budget', [.25, 1., 4.])
def test_white_errors_obey_the_law_within_five_percent(system, budget):
    X, S, q = sampled(system(), 400_000, seed=11)
    a = error_anatomy(white_errors(q, S, budget, seed=12), q, S)
    assert a.excess == pytest.approx(budget, rel=.05)
    assert a.roughness == pytest.approx(budget, rel=.03) and abs(a.correlation) < .02


@pytest.mark.parametrize('correlation', [.5, .9])
def test_slow_errors_are_rough_in_proportion_to_one_minus_rho(correlation):
    X, S, q = sampled(dw1d(), 400_000, seed=13)
    a = error_anatomy(white_errors(q, S, 1., correlation, seed=14), q, S)
    assert a.correlation < correlation + .01 # the boundary, where errors end, takes some of the correlation
    assert a.excess == pytest.approx(a.budget * (1 - a.correlation), rel=.1)


def test_errors_that_are_functions_of_a_reversible_state_do_not_couple():
    system = dw1d()
    def couplings(error, seeds=range(24)):
        out = []
        for seed in seeds:
            X, S, q = sampled(system, 50_000, seed=seed)
            out.append(error_anatomy([a + error(x[:, 0]) for a, x in zip(q, X)], q, S).coupling)
        return np.array(out)
    for error in (lambda x: .2 * np.sin(3 * x), lambda x: .1 * (x > 0)):
        c = couplings(error)
        assert abs(c.mean()) < 3 * c.std(ddof=1) / np.sqrt(len(c))
    X, S, q = sampled(system, 50_000, seed=1)
    lagging = error_anatomy([np.convolve(np.pad(x, (4, 0), mode='edge'), np.ones(5) / 5, 'valid') for x in q], q, S)
    assert lagging.coupling < -lagging.roughness and lagging.excess < -.3


def test_anatomy_needs_an_event():
    with pytest.raises(ValueError, match='no A to B transition'):
        error_anatomy([np.array([0, .4, .6, 0])], [np.array([0, .5, .5, 0])], [np.array([0, -1, -1, 0], np.int8)])


# how small is small enough

@pytest.mark.parametrize('system, sizes, batch, rate',
                         [(dw1d, ((2, 3), (16, 15)), 2048, .01),
                          pytest.param(lshape2d, ((3, 2), (16, 12)), 512, .02, marks=pytest.mark.slow)])
def test_students_with_a_budget_below_a_twentieth_pass_on_held_out_frames(system, sizes, batch, rate):
    system = system()
    X, S, q = sampled(system, 40_000, 4, seed=21)
    held_out = [sampled(system, 100_000, 1, seed=s) for s in (121, 122)]
    small, large = [], []
    for hidden, epochs in sizes:
        student = Student('mlp', 'teacher_cross_entropy', hidden=hidden, max_epochs=epochs, learning_rate=rate,
                          batch_size=batch, seed=5)
        student.fit(X[:3], S[:3], q[:3], (X[3:], S[3:]), progress=False)
        for Xt, St, qt in held_out:
            c = card(student, Xt, St, qt)
            (small if c['budget'] <= .05 else large if c['budget'] > .5 else []).append(c['t_max'])
    assert len(small) >= 2 and max(small) <= 3.1 # the exact committor stays below 3.1 in 99 samples of 100
    assert all(t > 3.1 for t in large)


def test_white_noise_with_a_budget_of_a_twentieth_is_not_small_enough_everywhere():
    "Z_q is lifted where the frames crowd, so the law of the mean is not a bound on the maximum."
    X, S, q = sampled(dw1d(), 100_000, seed=5)
    assert profile(white_errors(q, S, .05, seed=6), S).t_max > 4
    assert profile(white_errors(q, S, .002, seed=6), S).t_max < 3.1


def test_a_card_has_the_numbers_of_the_profile():
    X, S, q = sampled(lshape2d(), 20_000, 2)
    f = Formula().fit(X, S, q)
    c, z = card(f, X, S, q, n_bootstrap=10), profile(f.transform(X, S), S)
    assert c['t_max'] == z.t_max and c['parameters'] == len(f.terms) + 1 and c['t_max_se'] > 0 and c['microseconds'] > 0
    assert 'budget' not in card(f, X, S)
