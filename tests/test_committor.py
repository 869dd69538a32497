"States, bookkeeping and the nonparametric committor: properties, faults, and the known answers."
import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from foldbook.committor import (NonparametricCommittor, as_ensemble, basis, boundaries, check_coordinate, check_states, clamp,
                                count_transitions, evaluate, held, held_out, outcome_log_loss, outcomes, passages, plot_agreement,
                                plot_convergence, plot_outcomes, plot_watch, previous_outcomes, rmse, squared_increments, states_from)
from foldbook.systems import dw1d, lshape2d, persist1d

quick = settings(deadline=None, max_examples=60)
flags = st.lists(st.sampled_from([-1, 0, 1]), min_size=1, max_size=40).map(lambda s: np.array(s, np.int8))
ensembles = st.lists(flags, min_size=1, max_size=5)


def first(values, default): return next(iter(values), default)


@quick
@given(flags)
def test_boundaries_by_brute_force(s):
    previous, following = boundaries(s)
    for t in range(len(s)):
        assert previous[t] == first((u for u in range(t - 1, -1, -1) if s[u] >= 0), -1)
        assert following[t] == first((u for u in range(t + 1, len(s)) if s[u] >= 0), -1)


@quick
@given(ensembles)
def test_outcomes_by_brute_force(states):
    for s, after, before in zip(states, outcomes(states), previous_outcomes(states)):
        for t in range(len(s)):
            assert np.array_equal(after[t], first((float(u) for u in s[t:] if u >= 0), np.nan), equal_nan=True)
            assert np.array_equal(before[t], first((float(u) for u in s[t::-1] if u >= 0), np.nan), equal_nan=True)


@quick
@given(ensembles)
def test_transitions_by_brute_force(states):
    n = [0, 0]
    for s in states:
        last = -1
        for f in s:
            if f >= 0 and last >= 0 and f != last: n[last] += 1
            if f >= 0: last = f
    assert list(count_transitions(states)) == n
    p = passages(states)
    assert len(p.transit) == n[0] and len(p.ab) <= n[0] and len(p.ba) <= n[1] and (p.transit >= 1).all()


@quick
@given(ensembles, st.randoms())
def test_order_of_trajectories_is_irrelevant(states, random):
    order = list(range(len(states)))
    random.shuffle(order)
    shuffled = [states[i] for i in order]
    assert count_transitions(shuffled) == count_transitions(states)
    for i, o in zip(order, outcomes(shuffled)): assert np.array_equal(o, outcomes(states)[i], equal_nan=True)
    for a, b in zip(passages(states), passages(shuffled)): assert sorted(a) == sorted(b)


@quick
@given(flags, flags)
def test_nothing_crosses_a_trajectory_end(a, b):
    "Counting two trajectories is adding two counts, also when their ends would make a transition."
    assert count_transitions([a, b]) == tuple(np.add(count_transitions([a]), count_transitions([b])))
    x = [a.astype(float), b.astype(float)]
    assert squared_increments(x) == squared_increments(x[:1]) + squared_increments(x[1:])


@quick
@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(1, 6))
def test_dwell_looks_back_only(condition, dwell):
    c = np.array(condition)
    expected = [t + 1 >= dwell and c[t + 1 - dwell:t + 1].all() for t in range(len(c))]
    assert (held(c, dwell) == expected).all()
    for cut in range(1, len(c) + 1): assert (held(c[:cut], dwell) == held(c, dwell)[:cut]).all()


def test_clamp():
    r = clamp([np.full(4, .5)], [[0, -1, 1, -1]])
    assert r[0].tolist() == [0, .5, 1, .5]


@pytest.mark.parametrize('x, words', [
    ([np.zeros(2), [0, np.nan]], 'trajectory 1, frame 1'), ([[np.inf]], 'trajectory 0, frame 0'), ([], 'no trajectory'),
    ([np.zeros(0)], 'no frames'), ([['a']], 'numbers'), (3., 'one array per trajectory'), ([3., 4.], 'one array per trajectory')])
def test_bad_ensembles(x, words):
    with pytest.raises((ValueError, TypeError), match=words): as_ensemble(x if isinstance(x, list) else [x])


@pytest.mark.parametrize('states, lengths, words', [
    ([[0, 1, 2]], None, 'frame 2 is 2'), ([[0, 1, .5]], None, '0.5'), ([[0, 1, np.nan]], None, 'NaN'), ([[0, -1]], None, 'no frame is in B'),
    ([[1, -1]], None, 'no frame is in A'), ([[0, 1]], [3], 'has 2 frames'), ([[0, 1]], [2, 2], '1 trajectories'), ([[[0, 1]]], None, 'one flag per frame')])
def test_bad_states(states, lengths, words):
    with pytest.raises(ValueError, match=words): check_states(states, lengths)


def test_flags_may_come_as_floats_or_one_array():
    assert check_states(np.array([0., -1, 1]))[0].dtype == np.int8
    assert len(check_states([[-1, -1]], both=False)) == 1
    with pytest.raises(ValueError, match='same frame'): check_coordinate([[0., 1]], [[0, 1, 1]])


COLUMNS = ['Q', 'RMSD', 'end to end']
F = [np.random.default_rng(0).uniform(0, 1, (50, 3)).astype(np.float32), np.random.default_rng(1).uniform(0, 1, (20, 3)).astype(np.float32)]


@pytest.mark.parametrize('text, value', [
    ('Q < 0.5', lambda q, r, e: q < .5), ('not Q < 0.5', lambda q, r, e: ~(q < .5)), ('0.2 <= Q < 0.5 or RMSD > 0.9', lambda q, r, e: ((q >= .2) & (q < .5)) | (r > .9)),
    ('Q > 0.5 and RMSD < 0.3 and `end to end` > 0.1', lambda q, r, e: (q > .5) & (r < .3) & (e > .1)),
    ('-Q + 2 * RMSD / 3 - 1 < `end to end`', lambda q, r, e: -q + 2 * r / 3 - 1 < e), ('Q == Q', lambda q, r, e: q == q), ('(Q != RMSD) and Q > +0.1', lambda q, r, e: (q != r) & (q > .1))])
def test_expressions(text, value):
    for x, found in zip(F, evaluate(F, COLUMNS, text)): assert (found == value(*x.T)).all()


@pytest.mark.parametrize('text', [
    '__import__("os").system("true")', 'Q.__class__', 'Q.max() > 0', 'Q[0] > 0', 'open("x")', 'lambda: 0', '[Q > 0 for Q in (1,)]', 'Q if Q else Q', 'Q ** 10 ** 10', 'Q @ Q', 'Q // 1',
    'Q % 2 > 1', 'Q & Q', 'Q is 1', 'Q in 1', '"Q" > 0', 'True', 'Q > 1j', '(Q := 1) > 0', 'Q >', '', 'Q; Q', 'P > 0.5', '`Q', 'f"{Q}"', '*Q', 'Q\x00', '1 / 0 > Q', 'Q / (Q - Q) > 1', '1e400 - 1e400 > Q', '+'.join(['Q'] * 5000), '9' * 400 + ' > Q', '(' * 500 + 'Q' + ')' * 500])
def test_expressions_are_refused(text):
    with pytest.raises(ValueError): evaluate(F, COLUMNS, text)


def test_states_from_expressions():
    s = states_from(F, COLUMNS, 'Q < 0.2', 'Q > 0.8')
    for x, f in zip(F, s): assert (f == np.where(x[:, 0] < .2, 0, np.where(x[:, 0] > .8, 1, -1))).all()
    with pytest.raises(ValueError, match='in A .* and in B'): states_from(F, COLUMNS, 'Q < 0.5', 'RMSD > 0.5')
    with pytest.raises(ValueError, match='never|no frame'): states_from(F, COLUMNS, 'Q < 0.5', 'Q > 1.5')
    with pytest.raises(ValueError, match='not a condition'): states_from(F, COLUMNS, 'Q', 'RMSD > 0.5')
    with pytest.raises(ValueError, match='dwell'): states_from(F, COLUMNS, 'Q < 0.2', 'Q > 0.8', dwell=0)
    with pytest.raises(ValueError, match='NaN'): states_from([np.full((3, 3), np.nan)], COLUMNS)
    with pytest.raises(ValueError, match='did you mean RMSD'): states_from(F, COLUMNS, 'RMSE < 0.2')


def test_observed_passages_agree_with_the_exact_ones():
    for s in (dw1d(), persist1d()):
        p = passages([s.states[x] for x in s.sample(300_000, 2, seed=8)])
        for x, exact in ((p.ab, s.rates.mfpt_ab), (p.ba, s.rates.mfpt_ba), (p.transit, s.rates.mtpt + 1)):
            assert abs(x.mean() - exact) < 3 * x.std() / len(x)**.5


# --- the nonparametric committor ---

def corner(n=100_000, k=1, seed=0):
    s = lshape2d()
    x, states, q = s.observe(s.sample(n, k, seed=seed))
    rng = np.random.default_rng(seed)
    return [np.column_stack([f, f.sum(1), f[:, 0] - f[:, 1], rng.normal(size=(len(f), 2))]).astype(np.float32) for f in x], states, q


def inside_naive(model, x, states, r, lag, y, window, z):
    "One set of NPNEq equations written with whole arrays, for a single trajectory."
    t = np.arange(len(r))
    u = np.maximum(t - lag, 0)
    g = np.where(states < 0, 1 / (1 + np.exp(-window[1] * (r - window[0]) * 100)), 0)
    g[window[1] * (r - window[0]) * 100 <= -20] = 0
    f = np.stack([g * y[u]**i * z[u]**j for i in range(model.degree + 1) for j in range(model.degree + 1 - i)])
    ahead = np.append(f[:, 1:], np.zeros((len(f), 1)), 1)
    joined = np.append(np.ones(len(r) - 1), 0)
    dr = np.append(np.diff(r), 0)
    if model.method == 'NPq':
        d = (ahead - f)[:, :-1]
        return d @ d.T, -d @ dr[:-1]
    return f @ (joined * ahead - (joined + model.gamma) * f).T, -f @ dr


@pytest.mark.parametrize('method', ['NPNEq', 'NPq'])
@pytest.mark.parametrize('lag', [0, 3])
def test_equations_against_whole_arrays(method, lag):
    from foldbook.committor import _envelope, _fitted, _Frames, _orthogonality, _Scale
    x, states, _ = corner(3000)
    scale = _Scale.of(x)
    f = _Frames.of(x, states, scale)
    m = NonparametricCommittor(method, degree=4)
    r = np.where(states[0] < 0, np.random.default_rng(1).random(3000), states[0])
    z = 2 * r - 1
    now, joined, _ = _fitted(f, np.ones(3000, bool), method == 'NPq')
    window = (0.4, 1.)
    reversible = method == 'NPq'
    A, b = _orthogonality(f.y[1], z, (lag, lag), r, _envelope(r, f.interior, *window), now, joined, f.begin, 4, 0. if reversible else m.gamma, reversible)
    A0, b0 = inside_naive(m, x[0], states[0], r, lag, f.y[1].astype(float), window, z)
    assert np.allclose(A, A0, rtol=1e-6, atol=1e-6 * np.abs(A0).max()) and np.allclose(b, b0, rtol=1e-6, atol=1e-6 * np.abs(b0).max())


@pytest.mark.parametrize('method', ['NPNEq', 'NPq'])
def test_corner_is_found(method):
    "The exact committor of lshape2d from six features, two of them noise, as accurate as published."
    x, states, q = corner()
    m = NonparametricCommittor(method, n_iterations=400, history=(0,), guard=0).fit(x, states, progress=False)
    assert rmse(m.r, q, states) < 0.035 and np.corrcoef(m.r[0], q[0])[0, 1] > 0.998
    assert (m.r[0][states[0] == 0] == 0).all() and (m.r[0][states[0] == 1] == 1).all() and (0 <= m.r[0]).all() and (m.r[0] <= 1).all()
    assert m.stopped == 'iterations' and len(m.delta_r2) == 400
    assert m.delta_r2[-1] == pytest.approx(squared_increments(m.r))


def test_history_replaces_the_hidden_direction():
    s = persist1d()
    x, states, q = s.observe(s.sample(100_000, seed=0))
    x = [f[:, :1] for f in x]
    blind = NonparametricCommittor(n_iterations=100, history=(0,)).fit(x, states, progress=False)
    seeing = NonparametricCommittor(n_iterations=600, history=range(9)).fit(x, states, progress=False)
    assert 0.08 < rmse(blind.r, q, states) < 0.1 and rmse(seeing.r, q, states) < 0.025


def test_guard_stops():
    x, states, _ = corner()
    m = NonparametricCommittor('NPq', n_iterations=2000, history=(0,)).fit(x, states, progress=False)
    assert m.stopped == 'guard' and m.delta_r2[-1] < m.n_transitions <= m.delta_r2[-2]


def test_seed_and_order():
    x, states, _ = corner(4000, 3)
    a, b, c = (NonparametricCommittor(n_iterations=30, seed=k).fit(x, states, progress=False) for k in (1, 1, 2))
    assert all((p == q).all() for p, q in zip(a.r, b.r)) and not all((p == q).all() for p, q in zip(a.r, c.r))


def test_trajectories_do_not_leak():
    "Fitted trajectories decide alone: what is held out may be anything, and replay repeats it."
    x, states, _ = corner(4000, 3)
    m = NonparametricCommittor(n_iterations=40, degree=3).fit(x, states, train=[0, 1], progress=False)
    assert np.array_equal(m.replay(x, states)[2], m.r[2]) and np.array_equal(m.replay(x[:1], states[:1])[0], m.r[0])
    with pytest.raises(ValueError, match='counted from 0'): m.fit(x, states, train=[7], progress=False)
    later = [f.copy() for f in x]
    later[2][100:] += 1
    changed = m.replay(later, states)
    assert np.array_equal(changed[2][:100], m.r[2][:100]) and not np.array_equal(changed[2], m.r[2])


def test_short_and_undecided_trajectories():
    s = dw1d()
    x, states, _ = s.observe(s.sample(30, 400, seed=0, ensemble='absorbed', length='poisson'))
    assert min(map(len, x)) == 1 and any((f < 0).all() for f in states)
    m = NonparametricCommittor(n_iterations=50, history=(0,)).fit(x, states, progress=False)
    q = [s.committor[p] for p in s.sample(30, 400, seed=0, ensemble='absorbed', length='poisson')]
    assert np.isfinite(np.concatenate(m.r)).all() and rmse(m.r, q, states) < 0.15


def test_monitor_keeps_the_best():
    x, states, _ = corner(4000, 3)
    seen = []
    def monitor(r):
        seen.append([v.copy() for v in r])
        return [3., 1., 2., 4., 5., 6.][len(seen) - 1]
    m = NonparametricCommittor(n_iterations=500, monitor_every=5, patience=3).fit(x, states, monitor=monitor, progress=False)
    assert m.stopped == 'monitor' and len(seen) == 5 and all((a == b).all() for a, b in zip(m.r, seen[1]))
    assert np.array_equal(m.replay(x, states)[0], m.r[0])


def test_save_and_load(tmp_path):
    x, states, _ = corner(3000, 2)
    m = NonparametricCommittor(n_iterations=30, monitor_every=10).fit(x, states, monitor=held_out(states, [1]), train=[0], progress=False)
    m.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['committor.json', 'committor.npz']
    json.loads((tmp_path / 'committor.json').read_text())
    again = NonparametricCommittor.load(tmp_path)
    assert all((a == b).all() for a, b in zip(again.transform(x), m.r)) and (again.replay(x, states)[1] == m.r[1]).all()
    assert again.history == m.history and again.stopped == m.stopped
    with pytest.raises(FileNotFoundError, match='missing'): NonparametricCommittor.load(tmp_path / 'nowhere')


def test_transform_is_for_fitted_frames():
    x, states, _ = corner(3000)
    m = NonparametricCommittor(n_iterations=5)
    for call in (m.transform, lambda f: m.replay(f, states)):
        with pytest.raises(ValueError, match='not fitted'): call(x)
    m.fit(x, states, progress=False)
    assert (m.transform(x, states)[0] == m.r[0]).all()
    with pytest.raises(ValueError, match='replay'): m.transform([x[0][:-1]])
    with pytest.raises(ValueError, match='columns'): m.replay([x[0][:, :2]], states)


def test_bad_fits():
    x, states, _ = corner(3000)
    fit = lambda f, s: NonparametricCommittor(n_iterations=2).fit(f, s, progress=False)
    for options in (dict(method='NP'), dict(history=()), dict(history=(-1,))):
        with pytest.raises(ValueError): NonparametricCommittor(**options)
    with pytest.raises(ValueError, match='constant'): fit([np.ones((3000, 2))], states)
    with pytest.raises(ValueError, match='shape'): fit([x[0][:, 0]], states)
    with pytest.raises(ValueError, match='frames'): fit([x[0][1:]], states)
    with pytest.raises(ValueError, match='NaN'): fit([np.where(x[0] > 0, np.nan, 0)], states)
    with pytest.raises(ValueError, match='same'): fit([x[0], x[0][:, :2]], states * 2)


def test_scores():
    assert outcome_log_loss([[.25, .5, .5]], [[-1, 1, -1]]) == pytest.approx(np.log(4))
    assert np.isnan(outcome_log_loss([[.5]], [[-1]]))
    assert rmse([[0., .5]], [[1., .25]], [[0, -1]]) == .25
    assert held_out([[0, -1, 1], [-1, 0]], [1])([np.zeros(3), np.array([.5, 0])]) == pytest.approx(np.log(2))
    out = np.empty((10, 2))
    basis(np.array([2., 3]), np.array([5., 7]), np.ones(2), 3, out)
    assert out[:, 0].tolist() == [1, 5, 25, 125, 2, 10, 50, 4, 20, 8]


def test_pictures():
    import matplotlib
    matplotlib.use('Agg')
    x, states, q = corner(3000)
    m = NonparametricCommittor(n_iterations=5).fit(x, states, progress=False)
    assert plot_outcomes(x[0][:, 0], states[0]).get_xlabel() == 'frame'
    assert len(plot_convergence({'a': m}).lines) == 2 and plot_agreement(m.r, q, states).get_xlabel() == 'exact committor'
    assert len(plot_watch({'a': [1, 2]}, 5, 5).lines) == 2


def test_passages_of_a_short_series():
    from foldbook.committor import Passages
    times = passages([np.array([0, -1, -1, 1, 1, -1, 0, 1], np.int8)])
    assert isinstance(times, Passages)
    assert times.transit.tolist() == [3, 1] and times.ba.tolist() == [3] and times.ab[-1] == 1


def test_every_update_is_recorded():
    from foldbook.committor import Step
    X, states, _ = dw1d().observe(dw1d().sample(5_000, seed=3))
    model = NonparametricCommittor(n_iterations=5, degree=2, history=(0, 1), seed=0).fit(X, states, progress=False)
    assert 0 < len(model.steps) <= 5
    assert all(isinstance(s, Step) and s.column == 0 and s.lag in (0, 1) and len(s.alpha) == 6 for s in model.steps)
