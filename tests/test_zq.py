"The yardstick: sums against brute force, the law of the exact committor, bad coordinates told apart, faults."
import json, subprocess, sys
from collections import Counter
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from foldbook.committor import clamp, count_transitions, outcomes
from foldbook.systems import SYSTEMS
from foldbook.zq import (LIMIT, Scores, Verdict, ZqResult, calibration, cut_profiles, cycle_bootstrap, default_lags, error_budget, excursions, judge, law,
                         mean_transition_path, measure_law, paired_log_loss, plot_calibration, plot_zq, profile, scores)

few = settings(deadline=None, max_examples=40)


@lru_cache
def sample(name, n_frames, seed, n=1):
    "Paths, coordinates, flags and exact committor; do not change in place."
    system = SYSTEMS[name]()
    paths = system.sample(n_frames, n, seed)
    return paths, *system.observe(paths)


def windows(flags, lag):
    "Every window of one trajectory as Counter{(start, end): how often}, item by item as the definition lists them."
    n, found = len(flags), Counter()
    boundary = [t for t in range(n) if flags[t] >= 0]
    for t in range(n):
        before, after = [b for b in boundary if b < t], [b for b in boundary if b > t]
        p, f = (before[-1] if before else None), (after[0] if after else None)
        if flags[t] < 0:
            if f is None or f - t > lag:
                if t + lag <= n - 1: found[t, t + lag] += 1
            elif n - 1 - t >= lag: found[t, f] += 1
            if p is not None and t - p <= lag and t >= lag: found[p, t] += 1
        elif f is not None and f - t <= lag: found[t, f] += lag - (f - t) + 1
    return found


def by_windows(found, r, lag, x, weights=None):
    "Z_q(x) and Delta r^2 from a list of windows."
    w = np.ones(len(r)) if weights is None else weights
    zq = sum(m * w[s] * (r[e] - r[s]) for (s, e), m in found.items() if r[s] < x)
    return zq / lag, sum(m * w[s] * (r[e] - r[s])**2 for (s, e), m in found.items()) / lag


@st.composite
def ensembles(draw, most=3, longest=24):
    "A few short random trajectories; now and then clamped, one state missing, one frame long."
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    flags = [rng.choice(draw(st.sampled_from([(-1, 0, 1), (-1, -1, -1, 0, 1), (-1, 0), (-1, -1, 1), (-1,)])), draw(st.integers(1, longest))).astype(np.int8)
             for _ in range(draw(st.integers(1, most)))]
    r = [rng.random(len(f)) for f in flags]
    return (clamp(r, flags) if draw(st.booleans()) else r), flags


@few
@given(ensembles(), st.booleans())
def test_sums_match_brute_force(data, weighted):
    r, flags = data
    longest = max(map(len, flags))
    lags = [k for k in (1, 2, 3, 5, 9, 17) if k < max(longest, 2)]
    weights = [np.random.default_rng(0).random(len(x)) for x in r] if weighted else None
    result = cut_profiles(r, flags, lags, 20, weights)
    assert isinstance(result, ZqResult)
    for i, k in enumerate(lags):
        lists = [windows(f, k) for f in flags]
        parts = lambda x: np.sum([by_windows(c, y, k, x, weights[j] if weighted else None) for j, (c, y) in enumerate(zip(lists, r))], 0)
        for b in (0, 7, 19): assert abs(result.zq[i, b] - parts(result.edges[b + 1])[0]) <= 1e-12
        assert abs(result.delta_r2[i] - parts(2)[1]) <= 1e-12


@few
@given(ensembles())
def test_zc1_is_the_mean_of_both_directions_in_time(data):
    r, flags = data
    forward, backward = cut_profiles(r, flags), cut_profiles([x[::-1] for x in r], [f[::-1] for f in flags], default_lags(flags))
    assert np.abs(forward.zc1 - (forward.zq + backward.zq) / 2).max() <= 1e-10


@pytest.mark.parametrize('name', SYSTEMS)
def test_area_of_zc1_is_half_the_squared_displacement(name):
    _, _, states, q = sample(name, 100_000, 7)
    rng = np.random.default_rng(0)
    r = clamp([np.clip(x + rng.normal(0, 0.01, len(x)), 0, 1) for x in q], states)  # the committor of a chain has few values
    result = cut_profiles(r, states)
    np.testing.assert_allclose(result.zc1.mean(1), result.delta_r2 / 2, rtol=2e-3)


@given(st.integers(0, 50), st.sampled_from([1, 5]))
@settings(deadline=None, max_examples=12)
def test_outcome_leak_is_exactly_flat(seed, n):
    _, _, states, q = sample('dw1d', 20_000 // n, seed, n)
    r = [np.where(np.isnan(o), x, o) for o, x in zip(outcomes(states), q)]
    result = profile(r, states)
    if result.n_ab == 0: return
    ends = n * 1.0  # a trajectory that begins or ends between the states has no outcome there
    assert np.abs(result.ratio - 1).max() <= ends / result.n_ab + 1e-12
    assert result.verdict.label == 'uses the future'


def test_law_of_the_exact_committor():
    t_max, t_sd = measure_law([f() for f in SYSTEMS.values()], 20, seed=300)
    assert t_max.shape == (60,)
    assert ((t_max <= 3.1) & (t_sd <= 1.3)).mean() >= 0.95
    assert 1.2 <= np.median(t_max) <= 1.7 and 0.42 <= np.median(t_sd) <= 0.58


def test_law_is_a_distribution():
    x = np.linspace(0, 10, 50)
    for name in ('t_max', 't_sd'):
        p = [law(name, v) for v in x]
        assert (np.diff(p) >= 0).all() and p[0] == 0.001 and p[-1] == 0.999
    assert abs(law('t_max', 3.0) - 0.985) < 0.01


def average(r, states, width, ahead=0):
    "Moving average that ends `ahead` frames in the future."
    past = np.arange(ahead, ahead - width, -1)
    return clamp([x[np.clip(np.arange(len(x)) + past[:, None], 0, len(x) - 1)].mean(0) for x in r], states)


def along(name, paths, states, diffusive):
    "Committor along the first coordinate alone: of one-dimensional diffusion, or the conditional mean of the exact one."
    system = SYSTEMS[name]()
    x, k = np.unique(system.coordinates[:, 0].round(6), return_inverse=True)
    if diffusive:
        flux = np.zeros(len(x))
        for p in paths:
            low, high = np.sort([k[p][:-1], k[p][1:]], 0)
            np.add.at(flux, low, high - low), np.add.at(flux, high, low - high)
        c = np.r_[0, np.cumsum(1 / np.maximum(np.cumsum(flux)[:-1], 0.5))]
        a, b = (np.mean(c[k[system.states == i]]) for i in (0, 1))
        values = np.clip((c - a) / (b - a), 0, 1)
    else:
        w = system.stationary * (system.states < 0)
        values = np.bincount(k, w * system.committor) / np.maximum(np.bincount(k, w), 1e-300)
    return clamp([values[k][p] for p in paths], states)


@pytest.mark.parametrize('name', SYSTEMS)
def test_bad_coordinates_are_told_apart(name):
    paths, _, states, q = sample(name, 400_000, 0)
    square, causal = profile([x**2 for x in q], states), profile(average(q, states, 7), states)
    loose = profile([0.01 + 0.98 * x for x in q], states)
    assert square.t_max >= 7 and square.verdict.label == 'miscalibrated'
    assert causal.t_max >= 6 and causal.verdict.label == 'over-smoothed'
    assert loose.t_max >= 6 and loose.verdict.label == 'unclamped boundary'
    exact = profile(q, states)
    assert exact.verdict.passed and exact.verdict.label == 'pass' and isinstance(exact.verdict, Verdict)
    assert judge(exact, q, states) == exact.verdict and exact.t_max <= LIMIT


def test_hidden_variables_are_told_apart():
    paths, _, states, _ = sample('lshape2d', 400_000, 0)
    diffusive, mean = (profile(along('lshape2d', paths, states, d), states) for d in (True, False))
    assert diffusive.t_max >= 11 and mean.t_max >= 100
    assert diffusive.verdict.label == mean.verdict.label == 'missing slow variable'
    assert mean.ratio[0].mean() > 3 > 1.6 > mean.ratio[-1].mean()
    paths, _, states, _ = sample('persist1d', 100_000, 0)
    mean = profile(along('persist1d', paths, states, False), states)
    assert mean.t_max >= 9 and mean.verdict.label == 'over-smoothed' and mean.ratio[0].mean() < 0.3


@pytest.mark.parametrize('name', SYSTEMS)
def test_controls_are_flagged_by_another_check(name):
    _, _, states, q = sample(name, 400_000, 1)
    leak = [np.where(np.isnan(o), x, o) for o, x in zip(outcomes(states), q)]
    assert profile(leak, states).t_sd < 0.2
    centred = average(q, states, 7, 3)
    verdict = profile(centred, states, reference=q).verdict
    if name != 'persist1d':  # with a persistent direction the average forgets more than it learns
        difference, se = paired_log_loss(centred, q, states)
        assert difference < -3 * se and verdict.label == 'uses the future'
    assert not verdict.passed


def test_the_trivial_martingale_passes_and_knows_little():
    _, _, train, _ = sample('dw1d', 1_000_000, 5)
    _, _, states, q = sample('dw1d', 100_000, 6)
    def key(f):
        t = np.arange(len(f))
        left = np.maximum.accumulate(np.where(f >= 0, t, -1))
        return np.where(left < 0, 400, f[left].astype(int) * 200 + np.minimum(t - left, 199))
    k, o = key(train[0]), outcomes(train)[0]
    seen = (train[0] < 0) & ~np.isnan(o)
    table = (np.bincount(k[seen], o[seen], 401) + 0.5) / (np.bincount(k[seen], minlength=401) + 1)
    r = clamp([table[key(f)] for f in states], states)
    assert profile(r, states).t_max <= LIMIT
    difference, se = paired_log_loss(r, q, states)
    assert difference > 5 * se > 0


@pytest.mark.parametrize('clamped', [False, True])
@given(st.sampled_from(sorted(SYSTEMS)), st.integers(0, 5), st.sampled_from([-1, 1]), st.booleans())
@settings(deadline=None, max_examples=12)
def test_a_shift_by_one_frame_is_caught(clamped, name, seed, frames, move_flags):
    _, _, states, q = sample(name, 50_000, seed)
    if profile(q, states).n_ab < 5: return
    cut = lambda x, a, b: [v[a:len(v) + b] for v in x]
    early, late = (1, 0), (0, -1)
    r, s = (cut(q, *early), cut(states, *late)) if (frames > 0) != move_flags else (cut(q, *late), cut(states, *early))
    verdict = profile(clamp(r, s) if clamped else r, s).verdict
    assert not verdict.passed and verdict.label == 'misaligned flags'
    assert np.abs(profile(r, s).zq - profile(q, states).zq).max() > 0.5


@few
@given(ensembles(most=4), st.integers(0, 100))
def test_order_of_trajectories_does_not_matter(data, seed):
    r, flags = data
    order = np.random.default_rng(seed).permutation(len(r))
    a, b = cut_profiles(r, flags), cut_profiles([r[i] for i in order], [flags[i] for i in order])
    np.testing.assert_allclose(a.zq, b.zq, atol=1e-12)
    np.testing.assert_allclose(a.zc1, b.zc1, atol=1e-12)
    assert (a.n_ab, a.n_frames, a.n_interior) == (b.n_ab, b.n_frames, b.n_interior)


@few
@given(ensembles(most=1, longest=40), st.integers(1, 39), st.sampled_from([1, 2, 3, 7]))
def test_splitting_loses_only_the_windows_across_the_cut(data, cut, lag):
    (r,), (flags,) = data
    cut = min(cut, len(r) - 1)
    if cut < 1 or lag >= max(cut, len(r) - cut): return
    whole, parts = windows(flags, lag), windows(flags[:cut], lag)
    for (s, e), m in windows(flags[cut:], lag).items(): parts[s + cut, e + cut] += m
    lost = whole - parts
    assert not parts - whole
    assert all(min(s, e - lag) < cut <= max(e, s + lag) for s, e in lost)
    a, b = cut_profiles([r], [flags], [lag], 10), cut_profiles([r[:cut], r[cut:]], [flags[:cut], flags[cut:]], [lag], 10)
    for i in range(10): assert abs(a.zq[0, i] - b.zq[0, i] - by_windows(lost, r, lag, a.edges[i + 1])[0]) <= 1e-12


def test_splitting_a_long_trajectory_hardly_matters():
    _, _, states, q = sample('dw1d', 200_000, 3)
    half = lambda x: [x[0][:100_000], x[0][100_000:]]
    a, b = profile(q, states), profile(half(q), half(states), default_lags(states))
    assert np.abs(a.zq - b.zq).max() <= 2 and abs(a.t_max - b.t_max) < 0.3


def test_wrong_input_is_refused():
    _, _, states, q = sample('dw1d', 20_000, 3)
    bad = q[0].copy()
    bad[17] = np.nan
    with pytest.raises(ValueError, match='frame 17'): profile(bad, states)
    with pytest.raises(ValueError, match='frames'): profile(q[0][1:], states)
    with pytest.raises(ValueError, match='trajectories'): profile([q[0], q[0]], states)
    with pytest.raises(ValueError, match='allowed'): profile(q, [states[0] + 3])
    with pytest.raises(ValueError, match='longest'): profile(q, states, lags=[0, 1])
    with pytest.raises(ValueError, match='longest'): profile(q, states, lags=[20_000])
    with pytest.raises(ValueError, match='negative'): profile(q, states, weights=[-np.ones(20_000)])
    with pytest.raises(ValueError, match='weights'): profile(q, states, weights=[np.ones(5)])
    with pytest.raises(ValueError, match='known outcome'): scores([np.zeros(3)], [np.zeros(3)])


def test_no_transition_is_reported_and_never_a_number():
    r, states = [np.array([0.5]), np.array([0, 0.2, 0.3, 0]), np.array([0.4, 0.4, 0.4])], [np.array([-1]), np.array([0, -1, -1, 0]), np.full(3, -1)]
    result = profile(r, states, n_bootstrap=10)
    assert result.verdict.label == 'not normalisable' and not result.verdict.passed
    assert result.t_max is result.t_sd is result.p_value is result.ratio is None
    text = json.dumps(result.to_dict(), allow_nan=False)
    assert 'not normalisable' in text and np.isfinite(result.zq).all() and len(result.table()) == len(result.lags)
    with pytest.raises(ValueError, match='transition'): plot_zq(result)
    with pytest.raises(ValueError, match='transition'): error_budget(r, r, states)


def test_odd_trajectories_change_nothing_they_should_not():
    _, _, states, q = sample('dw1d', 50_000, 2)
    a = profile(q, states)
    b = profile(q + [np.array([0.3]), np.array([1.0]), np.full(50, 0.4)], states + [np.array([-1]), np.array([1]), np.full(50, -1)], a.lags)
    np.testing.assert_allclose(a.zq, b.zq, atol=1e-12)
    assert a.n_ab == b.n_ab


def test_unit_weights_are_no_weights_and_a_cycle_twice_is_two_cycles():
    _, _, states, q = sample('dw1d', 50_000, 2)
    a, b = profile(q, states), profile(q, states, weights=[np.ones(50_000)])
    np.testing.assert_allclose(a.zq, b.zq, rtol=1e-12)
    assert abs(a.t_max - b.t_max) < 1e-9
    twice, weighted = profile(q + q, states + states), profile(q, states, weights=[np.full(50_000, 2.)])
    np.testing.assert_allclose(twice.zq, weighted.zq, rtol=1e-9)
    assert weighted.n_ab == twice.n_ab == 2 * a.n_ab and abs(weighted.t_max - a.t_max) < 1e-9


def test_cycle_bootstrap_gives_the_true_error():
    lags, middle, claimed, t_max, t_claimed = np.array([1, 4, 16, 64, 256, 1024]), [], [], [], []
    for seed in range(60):
        _, _, states, q = sample('dw1d', 100_000, 1000 + seed)
        sample.cache_clear()
        result = profile(q, states, lags, n_bins=100, n_bootstrap=60, seed=seed)
        middle.append(result.ratio[:, 50]); claimed.append(result.zq_se[:, 50])
        t_max.append(result.t_max); t_claimed.append(result.t_max_se)
    share = np.mean(claimed, 0) / np.std(middle, 0, ddof=1)
    assert ((share > 0.8) & (share < 1.35)).all(), share
    assert 0.7 < np.mean(t_claimed) / np.std(t_max) < 2


def test_bootstrap_is_reproducible():
    _, _, states, q = sample('dw1d', 20_000, 4)
    a, b, c = (cycle_bootstrap(q, states, n_replicates=5, seed=s) for s in (1, 1, 2))
    assert (a == b).all() and not (a == c).all()
    whole = cycle_bootstrap(q, states, n_replicates=400, n_bins=50).mean(0)
    assert np.abs(whole - cut_profiles(q, states, n_bins=50).ratio).max() < 0.2


@few
@given(ensembles())
def test_excursions_tile_the_interior(data):
    for r, f in zip(*data):
        left, right = excursions(r, f)
        inside = np.concatenate([np.arange(a + 1, b) for a, b in zip(left, right)] + [np.empty(0, int)])
        assert (inside == np.flatnonzero(f < 0)).all()


def test_scores_against_scikit_learn():
    from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score
    _, _, states, q = sample('lshape2d', 50_000, 9)
    y = np.concatenate([o[f < 0] for o, f in zip(outcomes(states), states)])
    p = np.concatenate([x[f < 0] for x, f in zip(q, states)])
    p, y = p[~np.isnan(y)], y[~np.isnan(y)]
    found = scores(q, states)
    assert isinstance(found, Scores) and found.n == len(y)
    np.testing.assert_allclose(found[:3], (log_loss(y, p), brier_score_loss(y, p), roc_auc_score(y, p)), rtol=1e-10)


def test_exact_committor_is_calibrated():
    _, _, states, q = sample('lshape2d', 400_000, 0)
    table = calibration(q, states, 10)
    z = (table.observed - table.predicted) / table.se
    assert np.abs(z).max() < 4 and table.frames.sum() == scores(q, states).n
    assert paired_log_loss(q, q, states) == (0, 0)


def test_white_errors_follow_the_budget():
    _, _, states, q = sample('dw1d', 400_000, 0)
    n_ab, n = count_transitions(states)[0], sum((f < 0).sum() for f in states)
    base = cut_profiles(q, states, [1]).delta_r2[0] / 2 / n_ab
    for share in (0.25, 1, 4):
        rng = np.random.default_rng(1)
        r = clamp([x + rng.normal(0, (share * n_ab / n)**0.5, len(x)) for x in q], states)
        assert abs(error_budget(r, q, states) / share - 1) < 0.05
        assert abs(cut_profiles(r, states, [1]).delta_r2[0] / 2 / n_ab / (base + share) - 1) < 0.05


def test_ladder():
    _, _, states, _ = sample('dw1d', 100_000, 3)
    lags = default_lags(states)
    assert (np.diff(np.log2(lags)) == 1).all() and 5 * mean_transition_path(states) < lags[-1] <= 10 * mean_transition_path(states)
    assert default_lags([np.full(100, -1)])[-1] == 32 and np.isnan(mean_transition_path([np.full(100, -1)]))


def test_pictures_and_tables():
    import matplotlib
    matplotlib.use('Agg')
    _, _, states, q = sample('dw1d', 50_000, 2)
    result = profile(q, states, n_bootstrap=10)
    ax = plot_zq(result)
    assert len(ax.lines) == len(result.lags) + 1 and plot_calibration(q, states).get_xlabel()
    row = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert row['t_max'] == result.t_max and row['verdict']['label'] == 'pass' and len(row['t_max_per_lag']) == len(result.lags)
    assert list(result.table()['lag']) == result.lags.tolist() and str(result.verdict).startswith('PASS')


def test_import_is_light():
    heavy = ('torch', 'lightning', 'pandas', 'matplotlib', 'sklearn', 'mdtraj')
    code = f'import sys, foldbook.zq; print([m for m in {heavy!r} if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
