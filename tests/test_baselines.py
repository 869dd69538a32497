"The rivals: right where they should be, wrong where they must be, seeded, and kept without pickle."
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from foldbook.baselines import (
    BASELINES, LogisticCommittor, MSMCommittor, SlowModeCommittor, TicaCoordinate, baseline, msm_committor, slow_modes)
from foldbook.maps import DiffusiveCommittor, IsotonicCommittor
from foldbook.systems import dw1d, lshape2d
from foldbook.verdicts import profile

# Small settings: what is tested is right or wrong by a wide margin.
SMALL = {'logistic': LogisticCommittor, 'msm': lambda seed=0: MSMCommittor(n_cells=80, seed=seed),
         'vampnet': lambda seed=0, epochs=8: SlowModeCommittor('softmax', 3, max_epochs=epochs, seed=seed),
         'srv': lambda seed=0: SlowModeCommittor('linear', 2, max_epochs=8, seed=seed)}


# --- maps --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def well():
    system = dw1d()
    path = system.sample(60_000, 2, seed=3)
    return system, [system.coordinates[p, 0] for p in path], [system.states[p] for p in path]


@pytest.mark.parametrize('make', [DiffusiveCommittor, IsotonicCommittor])
@pytest.mark.parametrize('sign', [1, -1])
def test_maps_find_the_committor_whichever_way_x_runs(make, sign, well):
    system, x, states = well
    r = make().fit([sign*v for v in x], states).transform([sign*system.coordinates[:, 0]])[0]
    inside = system.states < 0
    assert abs(r - system.committor)[inside].max() < .08
    assert r.min() > 0 and r.max() < 1, 'an interior frame is never certain'


@settings(deadline=None, max_examples=10)
@given(st.floats(-5, 5), st.floats(.1, 20))
def test_diffusive_map_does_not_depend_on_units(shift, scale):
    system = dw1d()
    path = system.sample(20_000, seed=5)
    x, states = [system.coordinates[p, 0] for p in path], [system.states[p] for p in path]
    a = DiffusiveCommittor().fit(x, states).transform(x)[0]
    y = [shift + scale*v for v in x]
    b = DiffusiveCommittor().fit(y, states).transform(y)[0]
    assert abs(a - b).max() < .03


@pytest.mark.parametrize('make', [DiffusiveCommittor, IsotonicCommittor])
def test_maps_are_saved_and_loaded(make, well, tmp_path):
    _, x, states = well
    fitted = make().fit(x, states).save(tmp_path)
    assert all(np.array_equal(a, b) for a, b in zip(make.load(tmp_path).transform(x), fitted.transform(x)))


def test_map_without_a_state_says_so(well):
    _, x, states = well
    with pytest.raises(ValueError, match=r'A \(0\)|state A'):
        DiffusiveCommittor().fit(x, [np.where(f == 0, -1, f) for f in states])


# --- TICA --------------------------------------------------------------------------------------------------------
def test_tica_agrees_with_the_closed_form():
    rng = np.random.default_rng(0)
    slow = np.zeros(20_000)
    for t in range(1, len(slow)): slow[t] = .99*slow[t-1] + rng.normal()
    x = np.stack([slow + rng.normal(size=len(slow)), rng.normal(size=len(slow)), 3*rng.normal(size=len(slow)) - slow,
                  np.full(len(slow), 2.)], 1)
    states = [np.where(slow > 8, 1, np.where(slow < -8, 0, -1)).astype(np.int8)]
    got = TicaCoordinate(5).fit([x], states).transform([x])[0]
    a, b = x[:-5, :3], x[5:, :3]
    mean = (a.mean(0) + b.mean(0))/2
    a, b = a - mean, b - mean
    c0, c1 = a.T @ a + b.T @ b, a.T @ b + b.T @ a
    values, vectors = np.linalg.eig(np.linalg.solve(c0, c1))
    want = x[:, :3] @ vectors[:, values.real.argmax()].real
    assert abs(np.corrcoef(got, want)[0, 1]) > 1 - 1e-6
    assert got[states[0] == 1].mean() > got[states[0] == 0].mean()
    with pytest.raises(ValueError, match='too short'): TicaCoordinate(50).fit([x[:40]], [states[0][:40]])
    mean, weights = slow_modes([x], 5, 2)
    both = (x - mean) @ weights
    own = [np.corrcoef(v[:-5], v[5:])[0, 1] for v in both.T]
    assert weights.shape == (4, 2) and np.allclose(both.std(0), own,
                                                   atol=.02) and (weights[3] == 0).all(), 'a kinetic map'


# --- every rival -------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def bent():
    "Training, validation and fresh frames of the L-shaped path, and its committor on the fresh ones."
    system = lshape2d()
    parts = [system.sample(n, 2, seed=seed) for n, seed in ((40_000, 1), (15_000, 3), (40_000, 2))]
    seen = [([system.coordinates[p] for p in path], [system.states[p] for p in path]) for path in parts]
    return *seen, [system.committor[p] for p in parts[2]]


def error(r, exact, states):
    return np.sqrt(np.mean((np.concatenate(r) - np.concatenate(exact))[np.concatenate(states) < 0]**2))


@pytest.fixture(scope='module')
def fitted(bent):
    train, held, _, _ = bent
    return {name: make().fit(*train, validation=held) for name, make in SMALL.items()}


@pytest.mark.parametrize('name, most', [('msm', .06), ('vampnet', .06), ('srv', .06)])
def test_right_on_the_bent_path(name, most, fitted, bent):
    _, _, (x, states), exact = bent
    r = fitted[name].transform(x, states)
    assert error(r, exact, states) < most
    assert all((v[f == 0] == 0).all() and (v[f == 1] == 1).all() for v, f in zip(r, states))
    assert all(0 < v.min() and v.max() < 1 for v in fitted[name].transform(x))


def test_a_straight_line_cannot_follow_the_bend(fitted, bent):
    _, _, (x, states), exact = bent
    r = fitted['logistic'].transform(x, states)
    assert error(r, exact, states) > .07 and not profile(r, states).verdict.passed


@pytest.mark.slow
def test_right_in_the_double_well(well):
    system, x, states = well
    x = [v[:, None] for v in x]
    grid, inside = system.coordinates[:, :1], system.states < 0
    for name, make in SMALL.items():
        q = make().fit(x, states, validation=(x[:1], states[:1])).transform([grid], [system.states])[0]
        assert np.sqrt(np.mean((q - system.committor)[inside]**2)) < .05, name


@pytest.mark.parametrize('name', SMALL)
def test_saved_and_loaded_without_pickle(name, fitted, bent, tmp_path):
    _, _, (x, states), _ = bent
    one = fitted[name]
    again = type(one).load(one.save(tmp_path) and tmp_path)
    assert all(np.array_equal(a, b) for a, b in zip(again.transform(x, states), one.transform(x, states)))
    assert again.n_parameters == one.n_parameters > 0
    with np.load(next(tmp_path.glob('*.npz')), allow_pickle=False) as f:
        assert all(f[k].dtype != object for k in f.files)
    with pytest.raises(FileNotFoundError): type(one).load(tmp_path/'nothing')


@pytest.mark.parametrize('name', ['msm', 'vampnet'])
def test_the_seed_decides(name, bent):
    train, held, (x, _), _ = bent
    def small(seed):
        made = SMALL[name](seed=seed) if name == 'msm' else SMALL[name](seed=seed, epochs=1)
        return made.fit([v[:5000] for v in train[0]], [f[:5000] for f in train[1]], validation=held).transform(x)[0]
    assert np.array_equal(small(1), small(1)) and not np.array_equal(small(1), small(2))


def test_training_leaves_the_global_random_state_alone(bent):
    import torch
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    SlowModeCommittor(max_epochs=1).fit([v[:3000] for v in bent[0][0]], [f[:3000] for f in bent[0][1]])
    assert torch.equal(torch.rand(3), want)


def test_a_stopped_training_goes_on_where_it_was(bent, tmp_path, monkeypatch):
    import deeptime.decomposition.deep as deep
    (x, states), held, _, _ = bent
    train = [v[:4000] for v in x], [f[:4000] for f in states]
    made = lambda seed=0: SlowModeCommittor(max_epochs=5, seed=seed)
    whole = made().fit(*train, validation=held)
    score, calls = deep.vamp_score, []
    def failing(*args, **options):
        calls.append(1)
        if len(calls) == 4: raise RuntimeError('killed')
        return score(*args, **options)
    monkeypatch.setattr(deep, 'vamp_score', failing)
    with pytest.raises(RuntimeError, match='killed'): made().fit(*train, validation=held, directory=tmp_path)
    monkeypatch.undo()
    again = made().fit(*train, validation=held, directory=tmp_path)
    assert all(np.array_equal(a, b) for a, b in zip(again.transform(x), whole.transform(x)))
    with pytest.raises(ValueError, match='another'): made(1).fit(*train, validation=held, directory=tmp_path)


@pytest.mark.parametrize('make', [*SMALL.values(), TicaCoordinate, IsotonicCommittor, lambda: DiffusiveCommittor(50)])
def test_are_estimators(make):
    from sklearn.base import clone
    one = make()
    assert clone(one).get_params() == one.get_params() and one != clone(one)
    with pytest.raises(ValueError): one.set_params(width=3)


def test_markov_model_agrees_with_the_linear_solve():
    rng = np.random.default_rng(0)
    # symmetric: reversible
    p = np.array([[.8, 0, .2, 0, 0], [0, .8, 0, 0, .2], [.2, 0, .5, .3, 0], [0, 0, .3, .4, .3], [0, .2, 0, .3, .5]])
    walk = [0]
    for u in rng.random(200_000): walk.append(int(np.searchsorted(p[walk[-1]].cumsum(), u)))
    q = np.linalg.solve(np.eye(3) - p[2:, 2:], p[2:, 1])
    assert abs(msm_committor([np.array(walk)], 1, 3) - q).max() < .01
    short = msm_committor([np.array(walk)], 1, 6)
    assert np.isnan(short[3:]).all() and np.isfinite(short[:3]).all(), 'cells that are never seen have no committor'


def test_lag_and_regularisation_are_chosen_on_validation(fitted, bent):
    assert float(fitted['logistic'].fitted['strength']) in LogisticCommittor().strengths
    assert int(fitted['msm'].fitted['lag']) == 1
    alone = LogisticCommittor().fit(*bent[0])
    assert float(alone.fitted['strength']) == LogisticCommittor().strengths[2]


def test_bad_input():
    x, f = [np.random.default_rng(0).normal(size=(50, 2))], [np.r_[0, np.full(24, -1), 0, np.full(22, -1), 0,
                                                                   1].astype(np.int8)]
    with pytest.raises(ValueError, match='others that go to B'): LogisticCommittor().fit(x, f)
    with pytest.raises(ValueError, match='softmax, linear'): SlowModeCommittor('relu')
    with pytest.raises(ValueError, match='too short'): SlowModeCommittor(lag=60).fit(x, f)
    apart = [np.r_[s, np.full(49, -1)].astype(np.int8) for s in (0, 1)]
    with pytest.raises(ValueError, match='not connected'):
        MSMCommittor(n_cells=5, tica_lag=2).fit([x[0], x[0] + 99], apart)
    with pytest.raises(ValueError, match='oracle.*vampnet'): baseline('oracle')
    assert baseline('srv', 4, 7).seed == 4 and baseline('srv', 4, 7).lag == 7 and set(BASELINES) == {'logistic', 'msm',
                                                                                            'vampnet', 'srv', 'memory'}
