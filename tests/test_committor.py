"States, bookkeeping and the nonparametric committor: properties, faults, and the known answers."
import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from foldbook.committor import (
    as_ensemble, boundaries, check_coordinate, check_states, check_weights, clamp, count_transitions, departures,
    evaluate_expression, held, outcomes, passages, plot_outcomes, previous_outcomes, squared_increments, states_from)
from foldbook.npne import METHODS, NonparametricCommittor, held_out
from foldbook.scores import log_loss, rmse
from foldbook.systems import dw1d, lshape2d, persist1d, solve_boundary, stationary

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
    assert [sum(len(departures(s)[k]) for s in states) for k in (0, 1)] == n
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
    ([np.zeros(0)], 'no frames'), ([['a']], 'numbers'), (3., 'one array per trajectory'),
    ([3., 4.], 'one array per trajectory')])
def test_bad_ensembles(x, words):
    with pytest.raises((ValueError, TypeError), match=words): as_ensemble(x if isinstance(x, list) else [x])


@pytest.mark.parametrize('states, lengths, words', [
    ([[0, 1, 2]], None, 'frame 2 is 2'), ([[0, 1, .5]], None, '0.5'), ([[0, 1, np.nan]], None, 'NaN'),
    ([[0, -1]], None, 'no frame is in B'),
    ([[1, -1]], None, 'no frame is in A'), ([[0, 1]], [3], 'has 2 frames'), ([[0, 1]], [2, 2], '1 trajectories'),
    ([[[0, 1]]], None, 'one flag per frame')])
def test_bad_states(states, lengths, words):
    with pytest.raises(ValueError, match=words): check_states(states, lengths)


def test_flags_may_come_as_floats_or_one_array():
    assert check_states(np.array([0., -1, 1]))[0].dtype == np.int8
    assert len(check_states([[-1, -1]], both=False)) == 1
    with pytest.raises(ValueError, match='same frame'): check_coordinate([[0., 1]], [[0, 1, 1]])


COLUMNS = ['Q', 'RMSD', 'end to end']
F = [np.random.default_rng(0).uniform(0, 1, (50, 3)).astype(np.float32),
     np.random.default_rng(1).uniform(0, 1, (20, 3)).astype(np.float32)]


@pytest.mark.parametrize('text, value', [
    ('Q < 0.5', lambda q, r, e: q < .5), ('not Q < 0.5', lambda q, r, e: ~(q < .5)),
    ('0.2 <= Q < 0.5 or RMSD > 0.9', lambda q, r, e: ((q >= .2) & (q < .5)) | (r > .9)),
    ('Q > 0.5 and RMSD < 0.3 and `end to end` > 0.1', lambda q, r, e: (q > .5) & (r < .3) & (e > .1)),
    ('-Q + 2 * RMSD / 3 - 1 < `end to end`', lambda q, r, e: -q + 2 * r / 3 - 1 < e),
    ('Q == Q', lambda q, r, e: q == q), ('(Q != RMSD) and Q > +0.1', lambda q, r, e: (q != r) & (q > .1))])
def test_expressions(text, value):
    for x, found in zip(F, evaluate_expression(F, COLUMNS, text)): assert (found == value(*x.T)).all()


@pytest.mark.parametrize('text', [
    '__import__("os").system("true")', 'Q.__class__', 'Q.max() > 0', 'Q[0] > 0', 'open("x")', 'lambda: 0', '[Q > 0 '
        'for Q in (1,)]', 'Q if Q else Q', 'Q ** 10 ** 10', 'Q @ Q', 'Q // 1',
    'Q % 2 > 1', 'Q & Q', 'Q is 1', 'Q in 1', '"Q" > 0', 'True', 'Q > 1j', '(Q := 1) > 0', 'Q >', '', 'Q; Q', 'P > 0.5',
    '`Q', 'f"{Q}"', '*Q', 'Q\x00', '1 / 0 > Q', 'Q / (Q - Q) > 1', '1e400 - 1e400 > Q', '+'.join(['Q'] * 5000),
    '9' * 400 + ' > Q', '(' * 500 + 'Q' + ')' * 500])
def test_expressions_are_refused(text):
    with pytest.raises(ValueError): evaluate_expression(F, COLUMNS, text)


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
    return [np.column_stack([f, f.sum(1), f[:, 0] - f[:, 1], rng.normal(size=(len(f), 2))]).astype(np.float32)
            for f in x], states, q


def whole_arrays(model, gamma, states, r, weights, f):
    "Equations of a method written with whole arrays, for the basis f (K, T) of a single trajectory."
    ahead, joined = np.append(f[:, 1:], np.zeros((len(f), 1)), 1), np.append(np.ones(len(r) - 1), 0)
    dr, d = np.append(np.diff(r), 0), joined * (ahead - f)
    if model.method == 'NPNEw': return (d - gamma * joined * f) @ f.T, -d @ r
    if model.method in ('NPq', 'NPt'):
        near = joined * ((states < 0) | np.append(states[1:] < 0, False))
        return (weights * d) @ d.T, -d @ (weights * dr) + model.elapsed * (f + ahead) @ (weights * near)
    return (weights * f) @ (d - gamma * f).T, -f @ (weights * (dr + model.elapsed * joined))


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('lag', [0, 3])
@pytest.mark.parametrize('weighted', [False, True])
def test_an_update_against_whole_arrays(method, lag, weighted):
    "The eighth update solves the equations, and moves r, as whole arrays of the seventh iterate say."
    x, states, _ = corner(3000)
    weights = np.random.default_rng(1).random(3000) if weighted and method != 'NPNEw' else np.ones(3000)
    before, after = (NonparametricCommittor(method, n_iterations=n, degree=4, history=(lag,), guard=0).fit(
        x, states, progress=False, weights=[weights]) for n in (7, 8))
    assert len(after.steps) == len(before.steps) + 1
    s, r, t = after.steps[-1], before.r[0] * before.mean, np.arange(3000)
    flags = {'q': states[0], 't': np.where(states[0] == 0, 0, -1), 'w': np.full(3000, -1)}[method[-1]]
    column = x[0][:, s.column]
    y = 2 * (column - column.min()) / (column.max() - column.min()) - 1
    first = np.maximum(t - lag, 0)
    second = y if s.itself else np.minimum(2 * r / s.unit - 1, 1)[first]
    z = s.sign * (r - s.centre) / s.unit * 100
    g = np.where((flags < 0) & (z > -20), 1 / (1 + np.exp(-np.clip(z, -20, 700))), 0)
    f = np.stack([g * y[first].astype(float)**i * second**j for i in range(5) for j in range(5 - i)])
    gamma = {'NPNEq': .2, 'NPNEw': .05}.get(method, 0)
    A, b = whole_arrays(after, gamma, flags, r, weights, f)
    assert np.abs(A @ s.alpha - b).max() < 1e-4 * np.abs(b).max()
    assert np.allclose(np.clip(r + s.alpha @ f, 0, after.ceiling), after.r[0] * after.mean, rtol=1e-5, atol=1e-5)


def counted(s, paths):
    """Transition matrix estimated by counting the hidden microstates, and the microstates seen: the best that any
    estimator can know."""
    C = np.zeros_like(s.transition)
    for p in paths: np.add.at(C, (p[:-1], p[1:]), 1)
    seen = np.flatnonzero(C.sum(0) + C.sum(1))
    P = C[np.ix_(seen, seen)]
    return P / np.maximum(P.sum(1, keepdims=True), 1), seen


def by_counting(s, paths, boundary, source=0.):
    "A committor or first-passage time (one value per microstate) of the counted chain."
    P, seen = counted(s, paths)
    f = np.zeros(len(s.states))
    f[seen] = solve_boundary(P, np.where(boundary[seen] < 0, np.nan, boundary[seen]).astype(float), source)
    return f


def slow(*values): return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize('method, seed', [('NPNEq', 1), slow('NPNEq', 3), slow('NPq', 1), slow('NPq', 3)])
def test_corner_is_found(method, seed):
    """The exact committor of lshape2d from six features, two of them noise: errors as small as counting all 625
    microstates gives, and as published."""
    x, states, q = corner(seed=seed)
    m = NonparametricCommittor(method, n_iterations=600, history=(0,), guard=0).fit(x, states, progress=False)
    paths = lshape2d().sample(100_000, seed=seed)
    count = by_counting(lshape2d(), paths, lshape2d().states)
    assert rmse(m.r, q, states) < max(1.25 * rmse([count[p] for p in paths], q, states), .012)
    assert rmse(m.r, q, states) <= (.021 if method == 'NPNEq' else .022) and np.corrcoef(m.r[0], q[0])[0, 1] > 0.998
    assert (m.r[0][states[0] == 0] == 0).all() and (m.r[0][states[0] == 1] == 1).all()
    assert (0 <= m.r[0]).all() and (m.r[0] <= 1).all()
    assert m.stopped == 'iterations' and len(m.delta_r2) == 600
    assert m.delta_r2[-1] == pytest.approx(squared_increments(m.r))


@pytest.mark.slow
def test_history_replaces_the_hidden_direction():
    s, errors = persist1d(), []
    for seed in (0, 1):
        x, states, q = s.observe(s.sample(100_000, seed=seed))
        x = [f[:, :1] for f in x]
        seeing = NonparametricCommittor(n_iterations=600, history=range(9)).fit(x, states, progress=False)
        errors.append(rmse(seeing.r, q, states))
    blind = NonparametricCommittor(n_iterations=100, history=(0,)).fit(x, states, progress=False)
    assert 0.08 < rmse(blind.r, q, states) < 0.1 and np.mean(errors) <= 0.0185 and min(errors) <= .018


@pytest.mark.parametrize('system, methods, target', [
    (dw1d, ('NPNEt', 'NPt'), 'A'), slow(dw1d, ('NPNEt', 'NPt'), 'B'), slow(lshape2d, ('NPNEt', 'NPt'), 'A'),
    slow(lshape2d, ('NPNEt', 'NPt'), 'B'), slow(persist1d, ('NPNEt',), 'A'), (persist1d, ('NPNEt',), 'B')])
def test_first_passage_times(system, methods, target):
    """Times agree with those of the chain that was counted to a few per cent, and with the exact ones as well as
    that chain does."""
    s = system()
    paths = s.sample(100_000, seed=0)
    x, states, _ = s.observe(paths)
    boundary = np.where(s.states == 'AB'.index(target), 0, -1)
    exact, count = (f[paths[0]] for f in ({'A': s.mfpt_to_a, 'B': s.mfpt_to_b}[target],
                                          by_counting(s, paths, boundary, 1.)))
    for method in methods:
        m = NonparametricCommittor(method, n_iterations=120, history=(0,), target=target).fit(x, states, progress=False)
        r, out = m.r[0], boundary[paths[0]] < 0
        assert (r[~out] == 0).all() and r.max() <= m.ceiling == 100_000
        assert abs(r[out].mean() / count[out].mean() - 1) < .05 and np.corrcoef(r, exact)[0, 1] > .998
        assert np.sqrt(np.mean((r - exact)[out]**2)) < np.sqrt(np.mean((count
                                                                        - exact)[out]**2)) + .03 * exact[out].mean()


def biased(s, ensemble, **options):
    "Three thousand short trajectories, most of them begun on the side of A."
    start = s.stationary * np.where(s.coordinates[:, 0] < .2, 5, 1) * (1 if ensemble == 'free' else s.states < 0)
    return s.sample(33, 3000, seed=1, ensemble=ensemble, start=start / start.sum(), **options)


@pytest.mark.parametrize('system, ensemble, length', [
    (dw1d, 'free', 'fixed'), slow(dw1d, 'free', 'poisson'), slow(dw1d, 'absorbed', 'fixed'),
    slow(dw1d, 'absorbed', 'poisson'), slow(persist1d, 'free', 'fixed'), slow(persist1d, 'free', 'poisson'),
    slow(persist1d, 'absorbed', 'fixed'), (persist1d, 'absorbed', 'poisson')])
def test_short_trajectories_off_equilibrium(system, ensemble, length):
    "NPNEq is as good as counting; NPq is visibly wrong."
    s = system()
    paths = biased(s, ensemble, length=length)
    x, states, q = s.observe(paths)
    fit = lambda method: rmse(NonparametricCommittor(method, n_iterations=100, history=(0,), guard=0).fit(x, states,
        progress=False).r, q, states)
    count = by_counting(s, paths, s.states)
    floor = rmse([count[p] for p in paths], q, states)
    assert fit('NPNEq') < 1.3 * floor + .005 and fit('NPq') > max(.04, 2 * floor)


@pytest.mark.parametrize('system', [dw1d, slow(persist1d)])
def test_weights_make_the_starts_stationary(system):
    """NPNEw finds the stationary law of the counted chain; with its weights least squares is right again, and times
    hold with and without them."""
    s = system()
    paths = biased(s, 'free')
    x, states, q = s.observe(paths)
    m = NonparametricCommittor('NPNEw', n_iterations=200, history=(0,)).fit(x, states, progress=False)
    starts, w = np.concatenate([p[:-1] for p in paths]), np.concatenate([r[:-1] for r in m.r])
    assert w.mean() == pytest.approx(1) and all((a == b).all() for a, b in zip(m.replay(x, states), m.r))
    P, seen = counted(s, paths)
    law, known = np.zeros(len(s.states)), np.bincount(starts, w, len(s.states)) / w.sum()
    law[seen] = stationary(P)
    raw = np.bincount(starts, minlength=len(law)) / len(starts)
    assert abs(known - law).sum() / 2 < .01 and abs(known - s.stationary).sum() < abs(raw - s.stationary).sum() / 4
    if system is dw1d:
        error = lambda weights: rmse(NonparametricCommittor('NPq', n_iterations=100, history=(0,), guard=0).fit(x,
            states, progress=False, weights=weights).r, q, states)
        assert error(m.r) < .025 < .04 < error(None)
    t = [np.concatenate(NonparametricCommittor('NPNEt', n_iterations=100, history=(0,)).fit(x, states, progress=False,
        weights=v).r).mean() for v in (None, m.r)]
    exact = np.concatenate([s.mfpt_to_a[p] for p in paths]).mean()
    assert max(abs(v / exact - 1) for v in t) < .25


def test_copies_weigh_as_much_as_weights():
    "A trajectory of weight 2 is the trajectory given twice."
    x, states, _ = corner(4000, 2)
    for method in ('NPNEq', 'NPq'):
        def fit(f, s, w, method=method):
            m = NonparametricCommittor(method, n_iterations=1, history=(0,), guard=0)
            return m.fit(f, s, progress=False, weights=w)
        a, b = fit(x, states, [np.full(4000, 2.), np.ones(4000)]), fit([x[0], *x], [states[0], *states], None)
        assert np.allclose(a.r[1], b.r[2], atol=1e-6)


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
    m = NonparametricCommittor(n_iterations=500, monitor_every=5, patience=3).fit(x, states, monitor=monitor,
                                                                                  progress=False)
    assert m.stopped == 'monitor' and len(seen) == 5 and all((a == b).all() for a, b in zip(m.r, seen[1]))
    assert np.array_equal(m.replay(x, states)[0], m.r[0])


@pytest.mark.parametrize('method', METHODS)
def test_every_method_is_replayed_and_saved(method, tmp_path):
    x, states, _ = corner(4000, 3)
    m = NonparametricCommittor(method, n_iterations=40, degree=3, gamma=lambda i: .1 / (1 + i)).fit(x, states,
        train=[0, 1], progress=False)
    m.save(tmp_path)
    again = NonparametricCommittor.load(tmp_path)
    assert np.array_equal(m.replay(x, states)[2], m.r[2]) and np.array_equal(again.replay(x[1:], states[1:])[1], m.r[2])
    assert np.array_equal(again.transform(x, states)[0], m.r[0]) and len(again.gamma) == 40
    assert all((v >= 0).all() and np.isfinite(v).all()
               for v in m.r) and (method[-1] != 'q' or all(v.max() <= 1 for v in m.r))
    other = [x[0], x[1], x[2][::-1].copy()]
    m2 = NonparametricCommittor(method, n_iterations=40, degree=3, gamma=lambda i: .1 / (1 + i)).fit(other,
        [states[0], states[1], states[2][::-1].copy()], train=[0, 1], progress=False)
    assert np.array_equal(m.r[0], m2.r[0]) and np.array_equal(m.r[1], m2.r[1]) # what is held out changes nothing


def test_damping():
    "A number, numbers to interpolate and a function of the iteration are the same; least squares and times have none."
    x, states, _ = corner(3000)
    def fitted(**options): return NonparametricCommittor(n_iterations=5, **options).fit(x, states, progress=False).r[0]
    assert (fitted() == fitted(gamma=.2)).all() and not (fitted() == fitted(gamma=.3)).all()
    assert np.allclose(fitted(gamma=(1, 0)), fitted(gamma=lambda i: 1 - i / 4), atol=1e-9)
    assert (fitted(method='NPq', gamma=.3) == fitted(method='NPq', gamma=0)).all()
    assert (fitted(method='NPNEt') == fitted(method='NPNEt', gamma=0)).all()
    for bad in (-.1, (0, np.nan), lambda i: -i):
        with pytest.raises(ValueError, match='gamma'): NonparametricCommittor(gamma=bad)


def test_is_an_estimator():
    from sklearn.base import clone
    m = NonparametricCommittor('NPq', n_iterations=7, history=range(3), gamma=(1, 0))
    assert clone(m).get_params() == m.get_params() and m.history == range(3) and m != clone(m)
    with pytest.raises(ValueError, match='Invalid parameter'): m.set_params(iterations=3)
    x, states, _ = corner(3000)
    with pytest.raises(ValueError, match='method'): m.set_params(method='NP').fit(x, states, progress=False)


def test_bad_weights_and_targets():
    x, states, _ = corner(3000, 2)
    fit = lambda method='NPNEq', s=states, **k: NonparametricCommittor(method, n_iterations=2).fit(x, s, progress=False,
                                                                                                   **k)
    for w, words in (([np.ones(3000)], 'trajectories'), ([np.ones(3000), np.ones(2)], 'frames'),
                     ([np.ones(3000), -np.ones(3000)], 'negative'), ([np.ones(3000), np.full(3000, np.nan)], 'NaN')):
        with pytest.raises(ValueError, match=words): fit(weights=w)
    with pytest.raises(ValueError, match='arrives in A'): fit('NPNEt', [np.where(s == 0, -1, s) for s in states])
    with pytest.raises(ValueError, match='target'): NonparametricCommittor('NPNEt', target='C')
    assert fit('NPNEt', [np.where(s == 1, -1, s) for s in states]).r[0].max() > 0 # the other state need not exist
    assert check_weights(None, [2, 1])[0].tolist() == [1, 1] and log_loss(np.array([0., .5]),
        np.array([1, 0])).tolist() == pytest.approx([-np.log(1e-6), np.log(2)])


def test_save_and_load(tmp_path):
    x, states, _ = corner(3000, 2)
    m = NonparametricCommittor(n_iterations=30, monitor_every=10).fit(x, states, monitor=held_out(states, [1]),
                                                                      train=[0], progress=False)
    m.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['committor.json', 'committor.npz']
    json.loads((tmp_path / 'committor.json').read_text())
    again = NonparametricCommittor.load(tmp_path)
    assert all((a == b).all() for a, b in zip(again.transform(x), m.r)) and (again.replay(x, states)[1] == m.r[1]).all()
    assert again.history == list(m.history) and again.stopped == m.stopped
    with pytest.raises(FileNotFoundError, match='committor.json'): NonparametricCommittor.load(tmp_path / 'nowhere')


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
    assert rmse([[0., .5]], [[1., .25]], [[0, -1]]) == .25
    assert held_out([[0, -1, 1], [-1, 0]], [1])([np.zeros(3), np.array([.5, 0])]) == pytest.approx(np.log(2))
    assert np.isnan(held_out([[-1]], [0])([np.array([.5])]))


def test_pictures():
    import matplotlib
    matplotlib.use('Agg')
    x, states, _ = corner(3000)
    assert plot_outcomes(x[0][:, 0], states[0]).get_xlabel() == 'frame'


def test_passages_of_a_short_series():
    times = passages([np.array([0, -1, -1, 1, 1, -1, 0, 1], np.int8)])
    assert times.transit.tolist() == [3, 1] and times.ba.tolist() == [3] and times.ab[-1] == 1


def test_every_update_is_recorded():
    X, states, _ = dw1d().observe(dw1d().sample(5_000, seed=3))
    model = NonparametricCommittor(n_iterations=5, degree=2, history=(0, 1), seed=0).fit(X, states, progress=False)
    assert 0 < len(model.steps) <= 5
    assert all(s.column == 0 and s.lag in (0, 1) and len(s.alpha) == 6 for s in model.steps)
